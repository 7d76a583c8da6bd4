"""The view of `--watch` at given sizes: what it shows, and that it never has a line too many or too long."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from cpu.board import SPENT_IN, Doing
from cpu.stop_machine import MultiStopState
from kvm.observer import Counts, CpuSeen, Seen, UpdateSeen
from kvm.watch_view import LOOKS, Heading, draw, line_of
from seamldr.lock_board import LockRow
from seamldr.update import ModuleUpdateState

SIZES = ((80, 24), (200, 50))
HEADING = Heading("clear-current-vmcs   many CPUs", "3.2 s of 5", updates_done=1, updates=2)
EVENTS = [f"{number}.00 s  event {number}" for number in range(60)]
MIXED = (Doing.GUEST, Doing.KERNEL, Doing.LOCK, Doing.P_SEAMLDR, Doing.DEAD, Doing.IDLE, Doing.OFFLINE, Doing.STOPPED)


def cpu(number: int, doing: Doing = Doing.GUEST, **fields: Any) -> CpuSeen:
    """A CPU that spends three quarters of its time in a guest and a quarter in the kernel."""
    shares = tuple({Doing.GUEST: 0.75, Doing.KERNEL: 0.25}.get(one, 0.0) for one in SPENT_IN)
    usual: dict[str, Any] = {"what": "", "for_ns": 1_200_000, "exits_per_s": 7, "calls": 2, "errors": 0, "tasks": 2}
    return CpuSeen(number=number, doing=doing, shares=shares, **(usual | fields))


def machine(cpus: Sequence[CpuSeen], **fields: Any) -> Seen:
    """A machine of these CPUs in which nothing else is to be seen."""
    usual: dict[str, Any] = {
        "now_ns": 5_000_000_000,
        "began_ns": 1_800_000_000,
        "locks": [],
        "update": UpdateSeen(),
        "totals": Counts(),
        "per_s": Counts(),
        "wait_ns": 0.0,
        "dead_vcpus": 0,
        "module": "1.5.08",
    }
    return Seen(cpus=list(cpus), **(usual | fields))


def lines(seen: Seen, width: int, height: int, events: Sequence[str] = (), *, colors: bool = False) -> list[str]:
    """What a terminal of this width gets; raises if the view has more lines than `height` or a line is too long."""
    text = draw(seen, HEADING, events, width, height)
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=colors, color_system="256" if colors else None
    )
    with console.capture() as capture:
        console.print(text)
    shown = capture.get().split("\n")[:-1]
    assert len(shown) <= height
    if not colors:
        assert all(len(line) <= width for line in shown)
    return shown


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cpus", [1, 8, 256, 1024])
def test_every_cpu_is_on_the_screen(cpus: int, size: tuple[int, int]) -> None:
    """At both sizes each CPU of a machine of any size has its row or its cell, in its order, and the legend counts."""
    states = [MIXED[number % len(MIXED)] for number in range(cpus)]
    shown = lines(machine([cpu(number, state) for number, state in enumerate(states)]), *size, events=EVENTS)
    letters = "".join(LOOKS[state].letter for state in states)
    rows = [line.split() for line in shown if line[:5].strip().isdigit()]
    if shown[5].split()[:2] == ["CPU", "does"]:
        names = [LOOKS[state].name.split()[0] for state in states]
        assert [(int(row[0]), row[1]) for row in rows] == list(enumerate(names))
    else:
        assert "".join("".join(row[1:]) for row in rows) == letters
        per_row = len("".join(rows[0][1:]))
        assert [int(row[0]) for row in rows] == list(range(0, cpus, per_row)) and per_row % 8 == 0
    legend = " ".join(shown)
    for state in set(states):
        assert f"{LOOKS[state].letter} {LOOKS[state].name} {states.count(state)}" in legend


def test_few_cpus_have_rows_and_many_have_cells() -> None:
    """A row a CPU if all fit beside the rest; a cell a CPU else."""
    heads = {(cpus, size): "exits/s calls" in "\n".join(lines(machine([cpu(n) for n in range(cpus)]), *size))
             for cpus in (1, 8, 32, 256) for size in SIZES}  # fmt: skip
    assert [key for key, has_rows in heads.items() if has_rows] == [
        (1, (80, 24)), (1, (200, 50)), (8, (80, 24)), (8, (200, 50)), (32, (200, 50)),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(80, 24), (40, 10), (20, 5), (6, 3), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("cpus", [1, 8, 1024])
def test_it_fits_any_terminal(cpus: int, size: tuple[int, int]) -> None:
    """However small the terminal is, no line is too long and there are not too many."""
    locks = [LockRow("seamldr_lock", 1, 0, tuple(range(23)), 900)]
    assert lines(machine([cpu(number) for number in range(cpus)], locks=locks), *size, events=EVENTS)


def test_cpus_that_do_not_fit_are_counted() -> None:
    """Where not even single letters fit, the view says how many CPUs are missing."""
    shown = "\n".join(lines(machine([cpu(number) for number in range(1024)]), 40, 12))
    assert "and 832 CPUs more" in shown and shown.count("gggggggg") == 192 // 8


def test_a_row_tells_state_time_task_and_shares() -> None:
    """What a CPU does, since when, on what, its counts, and its last second as a bar of letters."""
    shown = lines(machine([cpu(0), cpu(1, Doing.LOCK, what="seamldr_lock, 2nd", errors=3)]), 100, 24)
    first, second = (next(line for line in shown if line.startswith(f"   {number} ")) for number in range(2))
    assert first.split()[:9] == ["0", "guest", "1.2", "ms", "7", "2", "2", "k" * 8 + "g" * 24]
    assert "waits for lock" in second and "seamldr_lock, 2nd" in second and "3 errors" in second


def test_the_queue_of_a_lock_is_told_in_its_order() -> None:
    """Holder, number of waiters, and who they are; a lock that nobody holds or wants is not shown."""
    locks = [LockRow("update_ctrl.lock"), LockRow("seamldr_lock", 3, 0, (1, 7), 2)]
    shown = lines(machine([cpu(0)], locks=locks), 80, 24)
    assert "locks   seamldr_lock cpu3, 2 wait: cpu1 cpu7" in shown
    assert "locks   nobody holds one" in lines(machine([cpu(0)], locks=locks[:1]), 80, 24)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (UpdateSeen(), "update  1 of 2 ended"),
        (
            UpdateSeen(2, ModuleUpdateState.SHUTDOWN, running=True, stop=MultiStopState.PREPARE, stopped=5, stopping=8),
            "2: SHUTDOWN CPU_INSTALL CPU_INIT RUN_UPDATE DONE   stop_machine: PREPARE 5/8",
        ),
        (
            UpdateSeen(2, ModuleUpdateState.CPU_INSTALL, 3, 8, running=True, stop=MultiStopState.RUN),
            "2: SHUTDOWN CPU_INSTALL 3/8 CPU_INIT RUN_UPDATE DONE",
        ),
        (UpdateSeen(2, ModuleUpdateState.DONE, 0, 8, over=True), "2: done"),
        (UpdateSeen(2, ModuleUpdateState.CPU_INIT, 8, 8, failed=1), "2: CPU_INIT 8/8, failed on 1"),
        (UpdateSeen(2, ModuleUpdateState.CPU_INIT, 7, 8), "2: CPU_INIT 7/8, not running"),
        (
            UpdateSeen(1, ModuleUpdateState.DONE, over=True, stop=MultiStopState.RUN, stopped=1, stopping=2),
            "1: done   stop_machine: RUN 1/2",
        ),
    ],
)  # fmt: skip
def test_the_update_line(update: UpdateSeen, words: str) -> None:
    """How far an update is, how it ended, and a stop_machine that is not an update's."""
    (line,) = (line for line in lines(machine([cpu(0)], update=update), 100, 24) if line.startswith("update"))
    assert line.rstrip().endswith(words)


def test_errors_are_told_only_if_there_are() -> None:
    """A machine without errors says nothing of them."""
    assert "VMX errors" not in "\n".join(lines(machine([cpu(0)]), 100, 24))
    bad = machine([cpu(0)], totals=Counts(errors=12), dead_vcpus=2)
    assert "12 VMX errors, 2 vCPUs dead" in "\n".join(lines(bad, 100, 24))


def test_the_newest_events_come_first() -> None:
    """Of many events the last ones are shown, as many as there is room for."""
    shown = [line for line in lines(machine([cpu(n) for n in range(8)]), 80, 24, EVENTS) if "event" in line]
    assert [line.split()[-1] for line in shown] == [str(number) for number in range(59, 59 - len(shown), -1)]
    assert len(shown) >= 3


def test_colors_change_no_letter() -> None:
    """With colours the screen has the same characters, each state in its own colour."""
    seen = machine([cpu(number, state) for number, state in enumerate(MIXED)])
    colored = "\n".join(lines(seen, 80, 24, colors=True))
    for state in MIXED:
        number = Console().get_style(LOOKS[state].color).color
        assert number is not None and f"48;5;{number.number}m{LOOKS[state].letter}" in colored
    assert len({look.color for look in LOOKS.values()}) == len({look.letter for look in LOOKS.values()}) == len(Doing)


def test_one_line_tells_the_same() -> None:
    """States with their counts, rates, the lock, the update: one line."""
    locks = [LockRow("seamldr_lock", 3, 0, (1, 7), 2)]
    update = UpdateSeen(2, ModuleUpdateState.CPU_INSTALL, 3, 8, running=True)
    seen = machine([cpu(0), cpu(1, Doing.DEAD)], locks=locks, update=update, per_s=Counts(exits=1412, calls=41))
    assert line_of(seen, HEADING) == (
        "3.2 s of 5; 1 guest, 1 dead; 1,412 exits/s, 41 P-SEAMLDR calls/s; seamldr_lock cpu3, 2 wait: cpu1 cpu7; "
        "update 2: CPU_INSTALL 3/8"
    )
