"""Lanes: what each process did, from its first record to its last, as intervals on one axis of time.

A pure core. Records come in causal order; a lane is drawn by their `ts`, which one machine's processes share. What a
CPU does follows from its own records, in the order in which it wrote them. That it was stopped, or died, is told by the
launcher, whose Lamport clock may lag: so this is cut into the lanes by time, when all records are there.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator

import msgspec

from bus.activities import Activities, Activity
from bus.records import Record
from bus.shadow import P_SEAMLDR
from bus.spec import cpu_number


class State(enum.IntEnum):
    """What a lane shows at a moment."""

    GUEST = 0
    """A vCPU has been entered since it was loaded: in guest mode, or between two entries of its run loop."""
    KERNEL = 1
    LOCK = 2
    """Waits for a lock of the lock service."""
    P_SEAMLDR = 3
    SEAM = 4
    """In the TDX module, or in a TD."""
    STOPPED = 5
    """In stop_machine."""
    IDLE = 6
    """Nothing is under way, and no task is on the run queue."""
    OFFLINE = 7
    """Out of the online mask, by CPU hotplug."""
    DEAD = 8
    SIGSTOPPED = 9
    RUNS = 10
    """A process that is not a CPU."""


NAMES: dict[State, str] = {
    State.GUEST: "guest",
    State.KERNEL: "kernel",
    State.LOCK: "waits for a lock",
    State.P_SEAMLDR: "in P-SEAMLDR",
    State.SEAM: "in the TDX module or a TD",
    State.STOPPED: "stop_machine",
    State.IDLE: "idle",
    State.OFFLINE: "offline",
    State.DEAD: "dead",
    State.SIGSTOPPED: "SIGSTOPped",
    State.RUNS: "runs",
}


class Interval(msgspec.Struct, frozen=True):
    """`begin` and `end` are monotonic ns; `what` says more than the state, it may be empty."""

    begin: int
    end: int
    state: State
    what: str


class Lane:
    """One node. `starts` are the beginnings of a CPU's intervals, as its own records tell them."""

    def __init__(self) -> None:
        self.pid = 0
        self.starts: list[tuple[int, State, str]] = []
        self.births: list[int] = []
        """Times of the first record of each of its processes; if it is no CPU, also those at which it was online."""
        self.ends: list[tuple[int, str]] = []
        """Times at which the launcher saw its process gone; in what way, empty if it was asked to go."""
        self.stops: list[tuple[int, bool]] = []
        """Times of SIGSTOP (True) and SIGCONT."""
        self.tasks: set[int] = set()
        """Tasks on its run queue."""
        self.doing: Activity | None = None
        """The activity at hand, and whether it was a vCPU that has been `entered`."""
        self.entered = False
        self.td: Record | None = None
        """The `td_enter` of the TD that it runs."""

    def start(self, ts: int, state: State, what: str) -> None:
        """From now on it does this; nothing new if it did so already."""
        if not self.starts or self.starts[-1][1:] != (state, what):
            self.starts.append((ts, state, what))


class Lanes:
    """Sees one history; `finish` gives the intervals by node. `begin` and `end` are those of the history, ns."""

    def __init__(self) -> None:
        self.activities = Activities()
        self.begin = self.end = 0
        self._lanes: dict[str, Lane] = {}

    def see(self, record: Record) -> None:
        """The next record in causal order; raises KeyError or TypeError if it is not as the event table says."""
        node, ts, event = record["node"], record["ts"], record["event"]
        self.begin = min(self.begin or ts, ts)
        self.end = max(self.end, ts)
        self.activities.see(record)
        lane = self._lane(node)
        if lane.pid != record["pid"]:
            lane.pid, lane.td = record["pid"], None
            lane.births.append(ts)
        self._see_others(event, record)
        if cpu_number(node) is not None:
            self._see_cpu(lane, event, record)

    def _lane(self, node: str) -> Lane:
        lane = self._lanes.get(node)
        if lane is None:
            lane = self._lanes[node] = Lane()
        return lane

    def _see_others(self, event: str, record: Record) -> None:
        """What a record says of other lanes than its own."""
        ts = record["ts"]
        match event:
            case "process_online" if cpu_number(record["name"]) is None:
                self._lane(record["name"]).births.append(ts)
            case "process_exit":
                self._lane(record["name"]).ends.append((ts, "" if record["wanted"] else _death(record["status"])))
            case "fault" if record["kind"] in ("stop", "resume"):
                self._lane(record["name"]).stops.append((ts, record["kind"] == "stop"))
            case "task_lost":
                self._lane(f"cpu{record['cpu']}").tasks.discard(record["task"])
            case "machine_reset":
                for lane in self._lanes.values():
                    lane.tasks.clear()

    def _see_cpu(self, lane: Lane, event: str, record: Record) -> None:
        context = record.get("ctx", "")
        match event:
            case "task_enqueue":
                lane.tasks.add(record["task"])
            case "task_dequeue":
                lane.tasks.discard(record["task"])
            case "td_enter":
                lane.td = record
        if lane.td is not None and context not in ("irq", "nmi", lane.td["ctx"]):
            lane.td = None
        doing = next((one for one in reversed(self.activities.open(record["node"])) if one.kind != "hold"), None)
        if doing is not None:
            if lane.doing is not doing or lane.entered != doing.entered:
                lane.start(record["ts"], *describe(doing))
            lane.doing, lane.entered = doing, doing.entered
            return
        lane.doing = None
        if lane.td is not None:
            lane.start(record["ts"], State.SEAM, f"runs {lane.td['ctx']}")
        elif lane.tasks or context in ("up", "down"):
            lane.start(record["ts"], State.KERNEL, "")
        else:
            lane.start(record["ts"], State.IDLE, "")

    def finish(self) -> dict[str, tuple[Interval, ...]]:
        """The intervals of each node, in time order and without overlap; there are gaps where it had no process."""
        return {node: tuple(self._intervals(lane)) for node, lane in self._lanes.items() if lane.births}

    def _intervals(self, lane: Lane) -> Iterator[Interval]:
        lane.births.sort()
        starts = lane.starts or [(lane.births[0], State.RUNS, "")]
        ends = [*(begin for begin, _, _ in starts[1:]), self.end]
        base = (
            Interval(begin, max(begin, end), state, what)
            for (begin, state, what), end in zip(starts, ends, strict=True)
        )
        gone = [(ts, self._born_after(lane, ts), why) for ts, why in sorted(lane.ends)]
        dead = [Interval(begin, end, State.DEAD, why) for begin, end, why in gone]
        for interval in cut(cut(base, self._stopped(lane)), dead):
            if interval.state is not State.DEAD or interval.what:  # else it was asked to go: a gap
                yield interval

    def _born_after(self, lane: Lane, ts: int) -> int:
        return next((birth for birth in lane.births if birth >= ts), self.end)

    def _stopped(self, lane: Lane) -> Iterator[Interval]:
        since: int | None = None
        over = [(ts, False) for ts, _ in lane.ends]
        for ts, stopped in sorted(lane.stops + over):
            if since is not None:
                yield Interval(since, ts, State.SIGSTOPPED, "")
            since = ts if stopped else None
        if since is not None:
            yield Interval(since, self.end, State.SIGSTOPPED, "")


def _death(status: int) -> str:
    return f"by signal {-status}" if status < 0 else f"exit status {status}"


def cut(base: Iterable[Interval], over: Iterable[Interval]) -> Iterator[Interval]:
    """The intervals of `base` with those of `over` on top; both are in time order and without overlap.

    >>> a, b = Interval(0, 10, State.GUEST, "a"), Interval(4, 6, State.DEAD, "b")
    >>> [(i.begin, i.end, i.what) for i in cut([a], [b])]
    [(0, 4, 'a'), (4, 6, 'b'), (6, 10, 'a')]
    """
    rest = list(over)
    rest.reverse()
    for interval in base:
        begin = interval.begin
        while rest and rest[-1].begin < interval.end:
            top = rest[-1]
            if begin < top.begin:
                yield Interval(begin, top.begin, interval.state, interval.what)
            begin = max(begin, top.end)
            if top.end > interval.end:
                break
            yield rest.pop()
        if begin < interval.end or interval.begin == interval.end == begin:
            yield Interval(begin, interval.end, interval.state, interval.what)
    yield from reversed(rest)


_KERNEL = {
    "request": "{kind} for user space",
    "update": "update {update}",
    "strategy": "seamldr_call({name})",
    "call": "waits for cpu{target} to run {func}",
    "irq": "interrupt {vector:#x}",
    "nmi": "NMI",
}
_STOPPED = {
    "stop": "waits for others",
    "stage": "{state} of update {update}",
    "acked": "{state} acknowledged, update {update}",
}


def describe(activity: Activity) -> tuple[State, str]:
    """The state of a CPU in the middle of this, and what it is about.

    >>> describe(Activity("seam", {"leaf": 1 << 63, "name": "SEAMLDR.INFO"}))
    (<State.P_SEAMLDR: 3>, 'SEAMLDR.INFO')
    """
    record, kind = activity.record, activity.kind
    match kind:
        case "seam":
            return State.P_SEAMLDR if record["leaf"] & P_SEAMLDR else State.SEAM, record["name"]
        case "lock":
            return State.LOCK, record["lock"]
        case "vcpu":
            return State.GUEST if activity.entered else State.KERNEL, f"vcpu{record['vcpu']}"
        case "offline":
            return State.OFFLINE, ""
    if kind in _STOPPED:
        return State.STOPPED, _STOPPED[kind].format_map(record)
    return State.KERNEL, _KERNEL[kind].format_map(record)
