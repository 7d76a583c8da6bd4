"""The trace: one history in the JSON trace-event format, which the Perfetto UI and chrome://tracing open.

Each node is a process with two threads: `state`, its lane, slice after slice, and `work`, what its kernel code is in
the middle of, nested. Instants are faults, failures and warnings; flows carry IPIs and grants of locks from lane to
lane; counters show how many wait for a lock. Times are microseconds since the machine began, with three decimals.

Slices of one thread must nest ("Trace Event Format", Google, "Duration Events"). So one that ends under others ends
them too, and they begin again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from bus.activities import Activities, Activity
from bus.lanes import NAMES, Interval, State, describe
from bus.marks import Hold
from bus.picture import Picture
from bus.records import Record
from bus.spec import SEAMLDR, cpu_number
from bus.story import line

FLOWS = 20_000
"""At most so many flows are written, the first ones: each makes the UI slower than a slice does."""

MACHINE = "machine"
"""The process of what belongs to no node: stages of updates, holders of locks."""

STATE, WORK = "state", "work"

_encode = msgspec.json.Encoder().encode


class Open(msgspec.Struct, frozen=True):
    """A slice that has begun: its activity, and whether it is the part of a vCPU's that follows its first entry."""

    activity: Activity
    guest: bool = False

    @property
    def name(self) -> str:
        """What the slice is called."""
        kind, record = self.activity.kind, self.activity.record
        if kind == "vcpu":
            return "guest" if self.guest else f"vcpu{record['vcpu']}"
        if kind == "hold":
            return f"holds {record['lock']}"
        state, what = describe(self.activity)
        return what if state is State.KERNEL else f"{NAMES[state]}: {what}".removesuffix(": ")

    def same(self, other: Open) -> bool:
        """Whether the other is this slice."""
        return self.activity is other.activity and self.guest is other.guest


class Trace:
    """Sees one history and writes as it goes; `finish` ends the file. `activities` have seen each record before.

    `flows` and `flows_left_out` count those that were written and those beyond the cap.
    """

    def __init__(self, write: Callable[[bytes], Any], activities: Activities) -> None:
        self.flows = self.flows_left_out = 0
        self._write = write
        self._activities = activities
        self._begin: int | None = None
        self._written = False
        self._pids: dict[str, int] = {}
        self._tids: dict[tuple[str, str], int] = {}
        self._process: dict[str, int] = {}
        self._gone: dict[str, int] = {}
        self._stacks: dict[str, list[Open]] = {}
        self._write(b'{"displayTimeUnit":"ns","traceEvents":[\n')

    def see(self, record: Record) -> None:
        """The next record in causal order."""
        node, ts = record["node"], record["ts"]
        if self._begin is None:
            self._begin = ts
        if record["event"] == "process_exit":
            self._gone[record["name"]] = ts
        if cpu_number(node) is None:
            return
        if self._process.setdefault(node, record["pid"]) != record["pid"]:
            self._process[node] = record["pid"]
            self._nest(node, min(self._gone.pop(node, ts), ts), [])
        self._nest(node, ts, self._open(node))

    def finish(self, picture: Picture) -> None:
        """Lanes, marks, flows and counters; the history is over."""
        for node in list(self._stacks):
            self._nest(node, self._gone.get(node, picture.end), [])
        for node, intervals in picture.lanes.items():
            self._slices(node, STATE, intervals)
        stages = [Interval(s.begin, s.end, State.RUNS, f"update {s.update}: {s.name}") for s in picture.stages]
        self._slices(MACHINE, "update", stages)
        for lock in sorted({hold.lock for hold in picture.holds}):
            self._slices(MACHINE, lock, _holders(hold for hold in picture.holds if hold.lock == lock))
        for mark in picture.marks:
            self._tell("i", mark.node, STATE, mark.ts, name=mark.text, cat=mark.kind.name.lower(), s="t")
        for depth in picture.depths:
            self._tell("C", SEAMLDR, STATE, depth.ts, name=f"wait for {depth.lock}", args={"waiting": depth.waiting})
        self._arrows(picture)
        self._names(list(picture.lanes))
        told = {"flows": self.flows, "flows_left_out": self.flows_left_out}
        self._write(b'\n],"otherData":' + _encode(told) + b"}\n")

    def _open(self, node: str) -> list[Open]:
        """The slices that should be open now."""
        found = []
        for activity in self._activities.open(node):
            found.append(Open(activity))
            if activity.entered:
                found.append(Open(activity, guest=True))
        return found

    def _nest(self, node: str, ts: int, wanted: list[Open]) -> None:
        """End and begin slices, so that those that are open are those that are wanted."""
        stack = self._stacks.setdefault(node, [])
        kept = 0
        while kept < min(len(stack), len(wanted)) and stack[kept].same(wanted[kept]):
            kept += 1
        for _ in stack[kept:]:
            self._tell("E", node, WORK, ts)
        for slice in wanted[kept:]:
            self._tell("B", node, WORK, ts, name=slice.name, args={"record": line(slice.activity.record)})
        stack[kept:] = wanted[kept:]

    def _slices(self, node: str, thread: str, intervals: Iterable[Interval]) -> None:
        for interval in intervals:
            name = interval.what if node == MACHINE else NAMES[interval.state]
            self._tell("B", node, thread, interval.begin, name=name, args={"what": interval.what})
            self._tell("E", node, thread, interval.end)

    def _arrows(self, picture: Picture) -> None:
        shown, rest = picture.arrows[:FLOWS], picture.arrows[FLOWS:]
        self.flows, self.flows_left_out = len(shown), len(rest)
        for id, arrow in enumerate(shown, 1):
            common = {"name": arrow.text, "cat": arrow.kind, "id": id}
            self._tell("s", arrow.source, STATE, arrow.sent, **common)
            self._tell("f", arrow.target, STATE, arrow.taken, bp="e", **common)

    def _names(self, nodes: list[str]) -> None:
        order = {MACHINE: 0} | {node: number for number, node in enumerate(nodes, 1)}
        for node, pid in self._pids.items():
            self._put({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": node}})
            where = order.get(node, len(order))
            self._put({"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": where}})
        for (node, thread), tid in self._tids.items():
            pid = self._pids[node]
            self._put({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}})

    def _tell(self, ph: str, node: str, thread: str, ts: int, **fields: Any) -> None:
        pid = self._pids.setdefault(node, len(self._pids) + 1)
        tid = self._tids.setdefault((node, thread), len(self._tids) + 1)
        self._put({"ph": ph, "pid": pid, "tid": tid, "ts": (ts - (self._begin or 0)) / 1000, **fields})

    def _put(self, event: dict[str, Any]) -> None:
        self._write((b",\n" if self._written else b"") + _encode(event))
        self._written = True


def _holders(holds: Iterable[Hold]) -> list[Interval]:
    """One holder after the other: a hold is cut where the next one begins."""
    found: list[Interval] = []
    for hold in holds:
        if found and found[-1].end > hold.begin:
            found[-1] = Interval(found[-1].begin, hold.begin, State.RUNS, found[-1].what)
        found.append(Interval(hold.begin, hold.end, State.RUNS, hold.node))
    return found
