"""A live machine seen from outside, by its shared memory alone: no message, no record, no system call. A pure core.

Looking costs the CPUs nothing. What is seen may be half a microsecond out of step: it is for eyes, the verdict comes
from the records.
"""

from __future__ import annotations

from collections import Counter, deque

import msgspec

from bus.memory import PhysicalMemory
from cpu.board import SPENT_IN, Doing, Row, read_rows
from cpu.layout import KERNEL, MULTI_STOP, TDX_STATE, UPDATE_CTRL, per_cpu
from cpu.stop_machine import MultiStopState
from kvm.vcpu import td_vcpu_of, vcpu_of
from seamldr.leaves import leaf_name
from seamldr.lock_board import LockRow, read_locks
from seamldr.update import ModuleUpdateState, version_text

WINDOW_NS = 1_000_000_000
"""Rates and shares are those of about the last second."""
MAX_SHARES = 128
"""No terminal has room for more rows, and they are the dearest part of a look."""


class Counts(msgspec.Struct, frozen=True):
    """Since the machine's beginning, or in a second: VM exits, calls that entered P-SEAMLDR, IPIs delivered, lock
    grants; `errors` are failed VMREADs, VMWRITEs and VM entries.
    """

    exits: float = 0
    calls: float = 0
    ipis: float = 0
    errors: float = 0
    grants: float = 0


class CpuSeen(msgspec.Struct, frozen=True):
    """One CPU: what it does, on what, since how many ns; its errors, tasks and exits a second; `shares` of the last
    second in each of `SPENT_IN`, empty if it does not work, or in a machine of more than `MAX_SHARES` CPUs.
    """

    number: int
    doing: Doing
    what: str
    for_ns: int
    exits_per_s: float
    calls: int
    errors: int
    tasks: int
    shares: tuple[float, ...]


class UpdateSeen(msgspec.Struct, frozen=True):
    """The last update, if `number` is not 0, and the stop_machine in progress, which may be another's.

    `acked` of `online` CPUs have done `stage`; `failed` could not. `stop` is the step of a stop_machine that runs, NONE
    if none does, and `stopped` of `stopping` CPUs have done it.
    """

    number: int = 0
    stage: ModuleUpdateState = ModuleUpdateState.START
    acked: int = 0
    online: int = 0
    failed: int = 0
    running: bool = False
    over: bool = False
    """It has gone through all its stages."""
    stop: MultiStopState = MultiStopState.NONE
    stopped: int = 0
    stopping: int = 0

    @property
    def gathers(self) -> bool:
        """The CPUs are not all stopped yet, so that nothing is done while they are."""
        return MultiStopState.NONE < self.stop < MultiStopState.RUN


class Seen(msgspec.Struct, frozen=True):
    """The machine at one moment. `began_ns` is when the workload began, by the monotonic clock, 0 before."""

    now_ns: int
    began_ns: int
    cpus: list[CpuSeen]
    locks: list[LockRow]
    update: UpdateSeen
    totals: Counts
    per_s: Counts
    wait_ns: float
    """Mean wait for a lock, of those granted in the last second."""
    dead_vcpus: int
    module: str
    """Version of the TDX module, empty while none is initialized."""

    def states(self) -> Counter[Doing]:
        """How many CPUs do what."""
        return Counter(cpu.doing for cpu in self.cpus)


class _Look(msgspec.Struct, frozen=True):
    """What a rate needs of an earlier look."""

    now_ns: int
    rows: list[Row]
    totals: Counts
    waited_ns: int


class MachineObserver:
    """Looks at one machine again and again."""

    def __init__(self, memory: PhysicalMemory, cpus: int, vcpus: int = 0, tds: int = 0) -> None:
        self._memory = memory
        self._areas = [per_cpu(number) for number in range(cpus)]
        plain = [vcpu_of(task).dead for task in range(vcpus)]
        self._vcpus = plain + [td_vcpu_of(vcpus + td).dead for td in range(tds)]
        self._looks: deque[_Look] = deque()

    def look(self, now_ns: int, stopped: frozenset[int] = frozenset()) -> Seen:
        """The machine now, by the monotonic clock. That processes of CPUs are `stopped` memory cannot tell."""
        read, rows, locks = self._memory.read64, read_rows(self._memory, len(self._areas)), read_locks(self._memory)
        totals = Counts(
            exits=sum(row.exits for row in rows),
            calls=sum(row.calls for row in rows),
            ipis=sum(row.ipis for row in rows),
            errors=sum(row.errors for row in rows),
            grants=sum(lock.grants for lock in locks),
        )
        look = _Look(now_ns, rows, totals, sum(lock.waited_ns for lock in locks))
        before = self._before(look)
        update = self._update()
        return Seen(
            now_ns=now_ns,
            began_ns=read(KERNEL.workload_began),
            cpus=self._cpus(before, look, locks, update, stopped),
            locks=locks,
            update=update,
            totals=totals,
            per_s=_rates(before, look),
            wait_ns=max(0, look.waited_ns - before.waited_ns) / max(1, totals.grants - before.totals.grants),
            dead_vcpus=sum(map(read, self._vcpus)),
            module=version_text(read(TDX_STATE.version)) if read(TDX_STATE.initialized) else "",
        )

    def _before(self, look: _Look) -> _Look:
        """The look with which this one is compared; itself if it is the first."""
        looks = self._looks
        if looks and looks[-1].totals.exits > look.totals.exits:
            looks.clear()  # the memory was cleared: a power cycle
        looks.append(look)
        while len(looks) > 2 and look.now_ns - looks[1].now_ns >= WINDOW_NS:
            looks.popleft()
        return looks[0]

    # CPUs

    def _cpus(
        self, before: _Look, look: _Look, locks: list[LockRow], update: UpdateSeen, stopped: frozenset[int]
    ) -> list[CpuSeen]:
        waiting = {cpu: f"{lock.name}, {_place(at)}" for lock in locks for at, cpu in enumerate(lock.waiting, 1)}
        seconds = max(1, look.now_ns - before.now_ns) / 1e9
        read, seen, few = self._memory.read64, [], len(self._areas) <= MAX_SHARES
        for number, (area, old, row) in enumerate(zip(self._areas, before.rows, look.rows, strict=True)):
            doing = row.doing
            if read(area.dead):
                doing = Doing.DEAD
            elif number in stopped:
                doing = Doing.SIGSTOPPED
            elif not read(area.online):
                doing = Doing.OFFLINE
            seen.append(
                CpuSeen(
                    number=number,
                    doing=doing,
                    what=waiting.get(number, "") if doing is Doing.LOCK else _what(doing, row, update),
                    for_ns=max(0, look.now_ns - row.since_ns) if row.since_ns else 0,
                    exits_per_s=(row.exits - old.exits) / seconds,
                    calls=row.calls,
                    errors=row.errors,
                    tasks=read(area.nr_tasks),
                    shares=_shares(old, row, before.now_ns, look.now_ns) if few and doing is row.doing else (),
                )
            )
        return seen

    # Updates

    def _update(self) -> UpdateSeen:
        read, ctrl = self._memory.read64, UPDATE_CTRL
        mutex, params, state, threads = (
            read(word) for word in (KERNEL.stop_mutex, ctrl.params, ctrl.state, MULTI_STOP.num_threads)
        )
        last = ModuleUpdateState.DONE
        return UpdateSeen(
            number=read(ctrl.update),
            stage=ModuleUpdateState(min(state, last)),
            acked=read(ctrl.num_ack),
            online=read(ctrl.online),
            failed=read(ctrl.num_failed),
            running=bool(mutex) and params != 0 and read(MULTI_STOP.data) == params,
            over=state > last,
            stop=MultiStopState(read(MULTI_STOP.state) if mutex else 0),
            stopped=max(0, threads - read(MULTI_STOP.thread_ack)),
            stopping=threads,
        )


def _what(doing: Doing, row: Row, update: UpdateSeen) -> str:
    match doing:
        case Doing.GUEST if row.detail:
            return f"vcpu{row.detail - 1}"
        case Doing.P_SEAMLDR | Doing.SEAM:
            return leaf_name(row.detail)
        case Doing.STOPPED:
            return update.stage.name if update.running and not update.gathers else update.stop.name
    return ""


def _place(number: int) -> str:
    """
    >>> [_place(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 22)]
    ['1st', '2nd', '3rd', '4th', '11th', '12th', '13th', '21st', '22nd']
    """
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _rates(before: _Look, look: _Look) -> Counts:
    seconds = max(1, look.now_ns - before.now_ns) / 1e9
    old, new = (msgspec.structs.astuple(one.totals) for one in (before, look))
    return Counts(*((b - a) / seconds for a, b in zip(old, new, strict=True)))


def _spent(row: Row, now_ns: int) -> list[int]:
    """Time in each state up to now, the present one included."""
    spent = list(row.spent_ns)
    if row.doing in SPENT_IN:
        spent[SPENT_IN.index(row.doing)] += max(0, now_ns - row.since_ns)
    return spent


def _shares(old: Row, row: Row, then_ns: int, now_ns: int) -> tuple[float, ...]:
    gone = [max(0, b - a) for a, b in zip(_spent(old, then_ns), _spent(row, now_ns), strict=True)]
    return tuple(ns / (sum(gone) or 1) for ns in gone)
