"""The watchdog's core: what it makes of ticks, turns and the buddy's heartbeat."""

from __future__ import annotations

from typing import Any

import pytest

from cpu.watchdog import HardLockup, LockupOver, Observation, Report, SoftLockup, Watchdog

THRESH_S = 10
PERIOD_S = 4
SECOND = 1_000_000_000


class Cpu:
    """CPU 3 with its watchdog; `look` lets one period pass, in which what `moves` says happens."""

    def __init__(self) -> None:
        self.watchdog = Watchdog(3, THRESH_S, 8)
        self.seen: dict[str, Any] = {
            "now_ns": 100 * SECOND,
            "ticks": 5,
            "turns": 5,
            "operations": 0,
            "task": "kworker/3:120",
            "touched": False,
            "buddy": 4,
            "buddy_ticks": 7,
        }
        self.reports: list[tuple[float, Report]] = []
        self.watchdog.observe(Observation(**self.seen))

    def look(self, times: int = 1, *, moves: str = "", after_s: float = PERIOD_S, **changes: Any) -> Cpu:
        for _ in range(times):
            self.seen["now_ns"] += int(after_s * SECOND)
            for count in moves.split():
                self.seen[count] += 100 if count == "operations" else 1
            self.seen |= changes
            at = self.seen["now_ns"] / SECOND - 100
            self.reports += [(at, report) for report in self.watchdog.observe(Observation(**self.seen))]
        return self


ALL = "ticks turns operations buddy_ticks"


def test_a_cpu_that_schedules_is_left_alone() -> None:
    """Ticks, turns and the buddy's ticks move: no report, however long."""
    assert Cpu().look(50, moves=ALL).reports == []


def test_the_sample_period_is_the_kernels() -> None:
    """2 * watchdog_thresh / 5: four seconds at the default threshold."""
    assert Watchdog(0, 10, 64).period_ns == 4 * SECOND
    assert Watchdog(0, 1, 1).period_ns == SECOND * 2 // 5


def test_a_large_machine_gets_more_time() -> None:
    """1024 processes share the cores of the host: sixteen times what 64 get."""
    assert Watchdog(0, 10, 1024).thresh_ns == 160 * SECOND


def test_a_soft_lockup_in_the_kernels_words() -> None:
    """Ticks without a turn of the watchdog's thread for twice the threshold; again after as long a time."""
    cpu = Cpu().look(10, moves="ticks operations buddy_ticks")
    soft = SoftLockup(3, 20, "kworker/3:120", 500)
    assert cpu.reports == [(20, soft), (40, SoftLockup(3, 40, "kworker/3:120", 1000))]
    assert soft.text == "watchdog: BUG: soft lockup - CPU#3 stuck for 20s! [kworker/3:120]"


def test_a_soft_lockup_that_ends_is_over() -> None:
    """The next turn after a report says how long it lasted; one without a report says nothing."""
    no_turn = "ticks buddy_ticks"
    cpu = Cpu().look(6, moves=no_turn).look(moves=ALL).look(3, moves=no_turn).look(5, moves=ALL)
    assert [type(report) for _, report in cpu.reports] == [SoftLockup, LockupOver]
    assert cpu.reports[-1] == (28, LockupOver(3, "soft_lockup", 28))


def test_with_interrupts_off_there_is_no_soft_lockup() -> None:
    """Without ticks the soft lockup detector does not run; the buddy of this CPU has to see it."""
    assert Cpu().look(20, moves="buddy_ticks").reports == []


def test_a_touched_watchdog_keeps_quiet() -> None:
    """Kernel code that says that it knows what it does is not stuck; the time counts from the last touch."""
    cpu = Cpu().look(10, moves="ticks buddy_ticks", touched=True)
    assert cpu.reports == []
    assert [at for at, _ in cpu.look(5, moves="ticks buddy_ticks", touched=False).reports] == [60]


def test_a_hard_lockup_of_the_buddy_in_the_kernels_words() -> None:
    """The buddy takes no tick for the threshold: reported once, whatever this CPU does; and its end."""
    cpu = Cpu().look(10, moves="ticks turns")
    hard = HardLockup(4, 12)
    assert cpu.reports == [(12, hard)] and hard.text == "watchdog: Watchdog detected hard LOCKUP on cpu 4"
    assert cpu.look(moves=ALL).reports[1:] == [(44, LockupOver(4, "hard_lockup", 44))]
    assert cpu.look(3, moves="ticks turns").reports[2:] == [(56, hard)]


def test_a_cpu_with_interrupts_off_still_sees_its_buddy() -> None:
    """The look is like an NMI: two CPUs that are locked up with each other are both reported."""
    assert Cpu().look(3).reports == [(12, HardLockup(4, 12))]


@pytest.mark.parametrize("buddy", [5, None])
def test_another_buddy_gets_its_own_time(buddy: int | None) -> None:
    """When the next CPU goes offline the one after it, if there is one, is met anew."""
    cpu = Cpu().look(2, moves="ticks turns").look(2, moves="ticks turns", buddy=buddy)
    assert cpu.reports == []
    assert [report.cpu for _, report in cpu.look(2, moves="ticks turns").reports] == ([5] if buddy else [])


def test_an_observer_that_did_not_run_accuses_nobody() -> None:
    """After SIGSTOP of the whole machine every count is old; who looks late begins anew."""
    cpu = Cpu().look(2, moves=ALL).look(after_s=60)
    assert cpu.reports == []
    assert cpu.look(2, moves=ALL).reports == []
