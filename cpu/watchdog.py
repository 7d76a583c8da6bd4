"""The lockup detectors (kernel/watchdog.c, watchdog_buddy.c): a core that is fed with observations and answers with
reports.

A timer ticks on every CPU; a tick counts when its interrupt is taken (`heartbeat`), and it wakes a thread that goes
before all others (`turns`). Ticks without turns are a *soft* lockup: the CPU runs with interrupts on, but does not
schedule. No ticks are a *hard* lockup: interrupts are off, or the CPU is stopped, dead or in SEAM. Nobody can see that
in itself, so each CPU looks at its buddy, the next one in the online mask.

Time is wall time, so a report says "stuck or slow": it is never a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

SCALED_ABOVE = 64
"""CPUs of a machine from which on its processes are so slow that the threshold grows with their number."""

LATE_PERIODS = 2
"""An observer that looks later than this after its last look was not running itself, and begins anew."""


class Observation(msgspec.Struct, frozen=True):
    """What a CPU sees at `now_ns`. `ticks`, `turns` and `operations` are its own counts, `task` what runs on it;
    `touched`: the kernel says that it knows what it does (touch_nmi_watchdog). `buddy` is None if there is no other
    CPU online.
    """

    now_ns: int
    ticks: int
    turns: int
    operations: int
    task: str
    touched: bool
    buddy: int | None
    buddy_ticks: int


class SoftLockup(msgspec.Struct, frozen=True):
    """The CPU itself takes ticks and does not schedule: since when in seconds, what runs, operations done meanwhile."""

    cpu: int
    stuck_s: int
    task: str
    operations: int

    @property
    def text(self) -> str:
        """The kernel's words."""
        return f"watchdog: BUG: soft lockup - CPU#{self.cpu} stuck for {self.stuck_s}s! [{self.task}]"


class HardLockup(msgspec.Struct, frozen=True):
    """The buddy takes no ticks, since when in seconds."""

    cpu: int
    stuck_s: int

    @property
    def text(self) -> str:
        """The kernel's words."""
        return f"watchdog: Watchdog detected hard LOCKUP on cpu {self.cpu}"


class LockupOver(msgspec.Struct, frozen=True):
    """What was reported as a lockup of this kind, the name of its record, has moved after so many seconds."""

    cpu: int
    kind: str
    stuck_s: int


Report = SoftLockup | HardLockup | LockupOver


class Pulse:
    """A count that has to move, and since when it has not."""

    def __init__(self, count: int, now: int) -> None:
        self.count = count
        self.since = now
        self.reported: int | None = None
        """When it was last reported that it does not."""

    def move(self, count: int, now: int) -> int | None:
        """Take a new look; how long it had not moved if it does again after a report, in ns."""
        if count == self.count:
            return None
        over = None if self.reported is None else now - self.since
        self.count, self.since, self.reported = count, now, None
        return over


class Watchdog:
    """The watchdog of CPU `cpu` in a machine of `num_cpus`; `thresh_s` is `watchdog_thresh`, in seconds above 0."""

    def __init__(self, cpu: int, thresh_s: int, num_cpus: int) -> None:
        self.cpu = cpu
        self.thresh_ns = thresh_s * 1_000_000_000 * max(num_cpus, SCALED_ABOVE) // SCALED_ABOVE
        self.period_ns = self.thresh_ns * 2 // 5
        self._last: Observation | None = None
        self._buddy: int | None = None
        self._turns = Pulse(0, 0)
        self._ticks_of_buddy = Pulse(0, 0)
        self._operations = 0

    def observe(self, seen: Observation) -> list[Report]:
        """Look once each period; what is to be reported."""
        last, self._last = self._last, seen
        if last is None or seen.now_ns - last.now_ns > LATE_PERIODS * self.period_ns:
            self._begin(seen)
            return []
        return [*self._soft(seen, last), *self._hard(seen)]

    def _begin(self, seen: Observation) -> None:
        self._turns = Pulse(seen.turns, seen.now_ns)
        self._operations = seen.operations
        self._meet(seen)

    def _meet(self, seen: Observation) -> None:
        self._buddy = seen.buddy
        self._ticks_of_buddy = Pulse(seen.buddy_ticks, seen.now_ns)

    def _soft(self, seen: Observation, last: Observation) -> Iterator[Report]:
        """is_softlockup(): 2 * watchdog_thresh without a turn. Reported again after as long a time."""
        pulse, now = self._turns, seen.now_ns
        moved = seen.turns != pulse.count
        over = pulse.move(seen.turns, now)
        if over is not None:
            yield LockupOver(self.cpu, "soft_lockup", _seconds(over))
        if moved or seen.touched:
            pulse.since, self._operations = now, seen.operations
        elif seen.ticks != last.ticks and now - max(pulse.since, pulse.reported or 0) >= 2 * self.thresh_ns:
            pulse.reported = now
            operations = seen.operations - self._operations
            yield SoftLockup(self.cpu, _seconds(now - pulse.since), seen.task, operations)

    def _hard(self, seen: Observation) -> Iterator[Report]:
        """watchdog_hardlockup_check() of the buddy: `watchdog_thresh` without a tick. Reported once."""
        if seen.buddy is None or seen.buddy != self._buddy:
            self._meet(seen)
            return
        pulse, now = self._ticks_of_buddy, seen.now_ns
        over = pulse.move(seen.buddy_ticks, now)
        if over is not None:
            yield LockupOver(seen.buddy, "hard_lockup", _seconds(over))
        if pulse.reported is None and now - pulse.since >= self.thresh_ns:
            pulse.reported = now
            yield HardLockup(seen.buddy, _seconds(now - pulse.since))


def _seconds(ns: int) -> int:
    return round(ns / 1e9)
