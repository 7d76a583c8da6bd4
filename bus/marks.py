"""What a picture shows besides lanes: faults and other marks, arrows of messages, stages of updates, holders of locks.

A pure core, like `bus.lanes`. Times are monotonic ns.
"""

from __future__ import annotations

import enum
from collections import Counter

import msgspec

from bus.activities import Activities
from bus.phrases import phrase
from bus.records import Record
from bus.shadow import STAGES, cpu_node


class MarkKind(enum.IntEnum):
    """What a mark stands for."""

    FAULT = 0
    """Injected into the machine, or taken back."""
    FAILURE = 1
    """A process died, a VMX instruction failed, a guest saw wrong data, a call broke its contract."""
    WARNING = 2
    """The kernel would have warned."""


class Mark(msgspec.Struct, frozen=True):
    """A point on the lane of `node`."""

    node: str
    ts: int
    kind: MarkKind
    text: str


class Arrow(msgspec.Struct, frozen=True):
    """A message: of `kind` "ipi" or "grant", from one node's lane to another's."""

    kind: str
    source: str
    sent: int
    target: str
    taken: int
    text: str


class Stage(msgspec.Struct, frozen=True):
    """A stage of an update, until the next one or the end of the update."""

    begin: int
    end: int
    update: int
    name: str


class Hold(msgspec.Struct, frozen=True):
    """A grant of a lock, until its service had it back."""

    lock: str
    node: str
    begin: int
    end: int


class Depth(msgspec.Struct, frozen=True):
    """From `ts` on so many requests wait in the queue of the lock."""

    lock: str
    ts: int
    waiting: int


_KINDS: dict[str, MarkKind] = {
    "fault": MarkKind.FAULT,
    "machine_reset": MarkKind.FAULT,
    "stop_abort": MarkKind.FAULT,
    "broken": MarkKind.FAILURE,
    "seam_dead": MarkKind.FAILURE,
    "seam_fenced": MarkKind.FAILURE,
    "strategy_error": MarkKind.FAILURE,
    "vcpu_dead": MarkKind.FAILURE,
    "vcpu_lost": MarkKind.FAILURE,
    "task_lost": MarkKind.FAILURE,
    "wrong_data": MarkKind.FAILURE,
    "warn": MarkKind.WARNING,
    "soft_lockup": MarkKind.WARNING,
    "hard_lockup": MarkKind.WARNING,
}


class Marks:
    """Sees one history in causal order, after `activities` has seen each record."""

    def __init__(self, activities: Activities) -> None:
        self.marks: list[Mark] = []
        self.arrows: list[Arrow] = []
        self.stages: list[Stage] = []
        self.holds: list[Hold] = []
        self.depths: list[Depth] = []
        self._activities = activities
        self._sent: dict[tuple[str, object], Record] = {}
        self._granted: dict[tuple[str, int, int], tuple[str, int]] = {}
        self._stage: tuple[int, int, str] | None = None
        self._waiting: Counter[str] = Counter()

    def see(self, record: Record) -> None:
        """The next record; raises KeyError or TypeError if it is not as the event table says."""
        event = record["event"]
        if event in _KINDS or _failed(record):
            kind = _KINDS.get(event, MarkKind.FAILURE)
            self.marks.append(Mark(_struck(record), record["ts"], kind, phrase(record)))
        match event:
            case "ipi_send":
                self._sent["ipi", record["id"]] = record
            case "ipi_deliver":
                what = "NMI" if record["nmi"] else f"IPI, vector {record['vector']:#x}"
                self._arrive("ipi", record["id"], record, what)
            case "lock_hold":
                self._arrive("grant", _token(record), record, f"grant of {record['lock']}")
            case "update_begin" | "state_advance" | "update_end":
                self._see_update(event, record)
            case "lock_queue" | "lock_grant" | "lock_release" | "lock_withdraw" | "lock_expire" | "lock_claim":
                self._see_service(event, record)

    def finish(self, end: int) -> None:
        """The history is over, at this time: what is open ends with it."""
        self._close_stage(end)
        for (lock, _, _), (node, begin) in self._granted.items():
            self.holds.append(Hold(lock, node, begin, end))
        self._granted.clear()
        self.holds.sort(key=lambda hold: hold.begin)
        self.marks.sort(key=lambda mark: mark.ts)
        self.arrows.sort(key=lambda arrow: arrow.sent)

    def _arrive(self, kind: str, key: object, record: Record, text: str) -> None:
        sent = self._sent.pop((kind, key), None)
        if sent is not None:
            left = sent["ts"] - sent.get("took_ns", 0)  # an `ipi_send` is written when the message has left
            self.arrows.append(Arrow(kind, sent["node"], left, record["node"], max(left, record["ts"]), text))

    def _see_update(self, event: str, record: Record) -> None:
        self._close_stage(record["ts"])
        match event:
            case "update_begin":
                self._stage = record["ts"], record["update"], STAGES[1]
            case "state_advance":
                self._stage = record["ts"], record["update"], record["state"]

    def _close_stage(self, ts: int) -> None:
        if self._stage is not None:
            begin, update, name = self._stage
            self.stages.append(Stage(begin, max(begin, ts), update, name))
        self._stage = None

    def _see_service(self, event: str, record: Record) -> None:
        lock, ts = record["lock"], record["ts"]
        match event:
            case "lock_grant":
                self._sent["grant", _token(record)] = record
                self._granted[_token(record)] = cpu_node(record["to"]), ts
            case "lock_release" if not record["stale"]:
                self._end_hold(_token(record), ts)
            case "lock_expire":
                self._end_hold(_token(record), ts)
            case "lock_withdraw":
                by = cpu_node(record["by"])
                for token in [t for t, (node, _) in self._granted.items() if (t[0], node) == (lock, by)]:
                    self._end_hold(token, ts)
        waiting = len(self._activities.queues.get(lock, ()))
        if waiting != self._waiting[lock]:
            self._waiting[lock] = waiting
            self.depths.append(Depth(lock, ts, waiting))

    def _end_hold(self, token: tuple[str, int, int], ts: int) -> None:
        node, begin = self._granted.pop(token, ("", 0))
        if node:
            self.holds.append(Hold(token[0], node, begin, ts))


def _token(record: Record) -> tuple[str, int, int]:
    return record["lock"], record["epoch"], record["number"]


def _failed(record: Record) -> bool:
    """Whether it is a VMX instruction that failed, or a process that ended without being asked to."""
    if record["event"] == "process_exit":
        return not record["wanted"]
    return bool(record.get("result", "ok") != "ok")


def _struck(record: Record) -> str:
    """The node that a fault or a death is about, else who wrote the record."""
    if record["event"] in ("fault", "process_exit") and record["name"]:
        return str(record["name"])
    if record["event"] in ("seam_dead", "seam_fenced"):
        return cpu_node(record["by"])
    return str(record["node"])
