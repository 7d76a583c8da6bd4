"""Vector time, from what the records say of messages: which event happened before which, and which did not.

A vector clock counts, for each node, the events of it that are known to have happened (Fidge and Mattern, 1988). Here
knowledge moves with a node's own order and with messages: IPIs, lock requests, grants and releases, cross-calls,
SEAMCALLs, requests of user space. Shared memory orders events too (Lamport time follows it); it has no messages, so
that two events which are ordered through it alone look concurrent.
"""

from __future__ import annotations

from collections.abc import Mapping

from bus.records import Record
from bus.shadow import cpu_node

_Fields = tuple[str, ...]

SENT: dict[str, tuple[str, _Fields]] = {
    "ipi_send": ("ipi", ("id",)),
    "lock_request": ("lock", ("node", "lock", "request")),
    "lock_grant": ("grant", ("lock", "epoch", "number")),
    "lock_drop": ("drop", ("lock", "epoch", "number")),
    "csd_lock": ("call", ("call",)),
    "csd_run": ("done", ("call",)),
    "seamcall_enter": ("seamcall", ("node",)),
    "seam_return": ("return", ("by",)),
    "request": ("request", ("request",)),
}
"""Events that send something: what, and the fields that name it. A CPU may be named by its number or its node."""

TAKEN: dict[str, tuple[str, _Fields]] = {
    "ipi_deliver": ("ipi", ("id",)),
    "lock_queue": ("lock", ("by", "lock", "request")),
    "lock_hold": ("grant", ("lock", "epoch", "number")),
    "lock_release": ("drop", ("lock", "epoch", "number")),
    "csd_run": ("call", ("call",)),
    "csd_done": ("done", ("call",)),
    "seam_enter": ("seamcall", ("by",)),
    "seamcall_return": ("return", ("node",)),
    "admin_begin": ("request", ("request",)),
}
"""Events that take what another sent."""


class VectorClocks:
    """The clocks of all nodes. Each record that it sees is an event of its node."""

    def __init__(self) -> None:
        self._clocks: dict[str, dict[str, int]] = {}
        self._sent: dict[tuple[object, ...], dict[str, int]] = {}

    def see(self, record: Record) -> Mapping[str, int]:
        """Vector time of the next record in causal order: by node, how many of its events are known here."""
        node, event = record["node"], record["event"]
        clock = self._clocks.get(node, {})
        if event in TAKEN:
            for other, count in self._sent.pop(_key(TAKEN[event], record), clock).items():
                clock[other] = max(count, clock.get(other, 0))
        clock[node] = clock.get(node, 0) + 1
        self._clocks[node] = clock
        now = dict(clock)
        if event in SENT:
            self._sent[_key(SENT[event], record)] = now
        return now


def _key(message: tuple[str, _Fields], record: Record) -> tuple[object, ...]:
    kind, fields = message
    return kind, *(_node(record.get(field)) if field in ("node", "by") else record.get(field) for field in fields)


def _node(value: int | str | None) -> str:
    return cpu_node(value) if value is not None else ""


def before(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether the event at `one` happened before that at `other`.

    >>> before({"cpu0": 1}, {"cpu0": 2}), before({"cpu0": 1}, {"cpu1": 1})
    (True, False)
    """
    return one != other and all(count <= other.get(node, 0) for node, count in one.items())
