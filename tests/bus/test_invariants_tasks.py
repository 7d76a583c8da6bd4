"""Invariants about tasks and about CPUs that go and come, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

import pytest
from history import Run

DEAD = {"wanted": False, "status": -9}


def begun(kind: str = "offline") -> Run:
    """A request to take a CPU out of the online mask, or into it, that a worker on CPU 0 has begun."""
    return Run().cpu(0, "kworker").write("admin_begin", request=7, kind=kind)


@pytest.mark.parametrize("errno", [0, -1, -16, -22])
def test_hotplug_that_completes_or_is_refused_keeps_i56(errno: int) -> None:
    """I56 holds for a request that ends, with success or with a refusal that Linux knows."""
    run = begun().write("admin_end", request=7, kind="offline", errno=errno, text="")
    assert run.finish().violated() == set()


def test_hotplug_that_never_ends_breaks_i56() -> None:
    """I56 is broken by a request without an end in a finished run; in one that was cut it is suspect."""
    assert begun().finish().violated() == {"I56"}
    cut = begun("online").finish(finished=False)
    assert cut.violated() == set() and any("online" in suspect for suspect in cut.judge().suspects)


def test_hotplug_that_fails_in_another_way_breaks_i56() -> None:
    """I56 is broken by an errno that is no refusal."""
    run = begun().write("admin_end", request=7, kind="offline", errno=-14, text="")
    assert run.finish().violated() == {"I56"}


def test_a_dead_cpu_excuses_i56() -> None:
    """I56 is excused when a CPU died, which may be the one that goes or the one that waits for it."""
    run = begun().exit("cpu1", **DEAD).finish()
    assert run.violated() == set() and any("I56" in excuse or "goes" in excuse for excuse in run.judge().excused)


def enqueue(run: Run, cpu: int, task: int = 3) -> Run:
    """A task joins the run queue of a CPU."""
    return run.cpu(cpu, "idle").write("task_enqueue", task=task)


def dequeue(run: Run, cpu: int, to: int, task: int = 3) -> Run:
    """A task leaves the run queue of a CPU."""
    return run.cpu(cpu, "idle").write("task_dequeue", task=task, to=to)


def test_a_task_that_moves_keeps_i62() -> None:
    """I62 holds for a task that leaves one run queue before it joins another, and for another task besides."""
    run = enqueue(dequeue(enqueue(enqueue(Run(), 0), 1, task=4), 0, 1), 1)
    assert dequeue(run, 1, -1).violated() == set()


def test_a_task_on_two_run_queues_breaks_i62() -> None:
    """I62 is broken by a second CPU, or the same again, that takes a task which has not left."""
    assert enqueue(enqueue(Run(), 0), 1).violated() == {"I62"}
    assert enqueue(enqueue(Run(), 0), 0).violated() == {"I62"}


def test_a_task_that_leaves_where_it_was_not_breaks_i62() -> None:
    """I62 is broken by a CPU that gives away what it does not have."""
    assert dequeue(enqueue(Run(), 0), 1, 0).violated() == {"I62"}


def test_a_lost_task_that_runs_again_breaks_i62() -> None:
    """I62: what was lost with a CPU is on no run queue any more, and stays so."""
    lost = enqueue(Run(), 1).node("kvm").write("task_lost", task=3, cpu=1)
    assert lost.violated() == set()
    assert enqueue(lost, 0).violated() == {"I62"}
