"""What user space does during a run: it follows from the seed, and keeps to the CPUs and tasks that there are."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.spec import Workload
from kvm.pages import PagePool
from kvm.workload import BURST, Action, Kick, Move, Read, Update, placement, timeline

MS = 1_000_000


def actions(seed: int, *, updates: int = 3, tasks: int = 6, cpus: int = 4, ms: int = 2000) -> list[tuple[int, Action]]:
    """The timeline of a run with something to do every 5 ms."""
    workload = Workload(duration_ns=ms * MS, updates=updates, guest_ns=1, action_ns=5 * MS)
    return list(timeline(workload, seed, tasks, cpus))


def test_tasks_are_placed_round_robin() -> None:
    """No CPU has more than one task more than another."""
    assert placement(5, 2) == [0, 1, 0, 1, 0]
    assert placement(0, 2) == []


@settings(max_examples=60)
@given(st.integers(0, 1 << 32), st.integers(0, 9), st.integers(0, 5), st.integers(1, 6))
def test_a_timeline_is_in_order_and_in_bounds(seed: int, updates: int, tasks: int, cpus: int) -> None:
    """Times never go back nor past the end; every update comes once, in order; CPUs and tasks exist."""
    found = actions(seed, updates=updates, tasks=tasks, cpus=cpus, ms=300)
    times = [at for at, _ in found]
    assert times == sorted(times) and all(0 < at <= 300 * MS for at in times)
    assert [a.index for _, a in found if isinstance(a, Update)] == list(range(updates))
    for _, action in found:
        match action:
            case Read(cpus=reading):
                assert 1 <= len(reading) == len(set(reading)) <= max(1, min(BURST, cpus))
                assert set(reading) <= set(range(cpus))
            case Move(task=task, to=to):
                assert task < tasks and to < cpus and cpus > 1
            case Kick(cpu=cpu) | Update(cpu=cpu):
                assert cpu < cpus


def test_one_seed_gives_one_timeline() -> None:
    """Two timelines of one seed are equal, those of two seeds are not; no other random numbers are used."""
    assert actions(1) == actions(1) != actions(2)


def test_updates_lie_evenly_in_the_run() -> None:
    """n updates divide the run into n + 1 equal parts."""
    times = [at for at, action in actions(7, updates=4) if isinstance(action, Update)]
    assert times == [400 * MS * part for part in (1, 2, 3, 4)]


def test_a_run_that_is_shorter_than_its_steps_still_has_its_updates() -> None:
    """Whatever is left at the end is done at the end."""
    workload = Workload(duration_ns=MS, updates=2, guest_ns=1, action_ns=50 * MS)
    assert [type(action) for _, action in timeline(workload, 3, 1, 1)] == [Update, Update]


def test_half_of_the_rest_are_reads() -> None:
    """About half reads, some of them bursts; the others moves and preemptions."""
    kinds = Counter(type(action).__name__ for _, action in actions(11, updates=0, ms=20_000))
    total = sum(kinds.values())
    assert total == pytest.approx(4000, rel=0.05)
    assert kinds["Read"] / total == pytest.approx(0.5, abs=0.05)
    assert kinds["Move"] / total == pytest.approx(0.25, abs=0.05)
    bursts = [action for _, action in actions(11, ms=20_000) if isinstance(action, Read) and len(action.cpus) == BURST]
    assert len(bursts) / total == pytest.approx(0.15, abs=0.05)


def test_with_one_cpu_or_no_task_nothing_moves() -> None:
    """There is nowhere to move to, or nothing to move."""
    for tasks, cpus in ((0, 4), (3, 1)):
        assert not any(isinstance(action, Move) for _, action in actions(5, tasks=tasks, cpus=cpus))


@given(st.integers(0, 100), st.lists(st.integers(0, 40), max_size=20))
def test_pages_of_user_space_are_given_out_once(seed: int, sizes: list[int]) -> None:
    """No page is in two buffers; what comes back is used again; the order follows from the seed."""
    pool, rng, out = PagePool(seed), Random(seed), list[list[int]]()
    for size in sizes:
        taken = pool.take(size)
        held = {page for pages in out for page in pages}
        assert len(set(taken)) == size and not held & set(taken) and all(page % 4096 == 0 for page in taken)
        out.append(taken)
        if rng.random() < 0.5:
            pool.give(out.pop(rng.randrange(len(out))))
    assert PagePool(seed).take(5) == PagePool(seed).take(5)


def test_a_pool_runs_out() -> None:
    """More pages than there are is an error, and nothing is taken."""
    pool = PagePool(0)
    everything = pool.take(4096)
    with pytest.raises(MemoryError, match="no 1 free pages"):
        pool.take(1)
    pool.give(everything)
    assert sorted(pool.take(4096)) == sorted(everything)
