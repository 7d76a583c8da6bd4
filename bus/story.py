"""Stories: the few records that explain a violation, from its cause to its effect.

A VMCS violation is told by what made the VMCS current, what took it or its launch state, what then believed in it, and
the operation that failed; others by the two or three records that show them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from bus.ladder import ladder
from bus.phrases import hexadecimal
from bus.records import COMMON_FIELDS, CPU_FIELDS, Record

HEXADECIMAL = frozenset(
    ("vmcs", "cur", "lost", "old", "new", "want", "value", "field", "leaf", "status", "csd", "pa", "expected", "got")
)
_KEYS = {
    "seamcall_return": ("name", "lost", "cur", "status"),
    "vcpu_load": ("vcpu", "vmcs", "skipped", "via"),
    "vmptrld": ("vmcs", "cur", "reason", "result"),
    "vmclear": ("vmcs", "cur", "reason", "result"),
    "vmentry": ("insn", "vmcs", "launched", "result"),
    "vmread": ("name", "vmcs", "result"),
    "vmwrite": ("name", "vmcs", "result"),
    "seam_enter": ("by", "name", "admitted", "inside", "epoch", "number", "holder_epoch", "holder_number"),
    "lock_grant": ("lock", "to", "request", "epoch", "number", "holders"),
    "csd_lock": ("call", "target", "func", "wait"),
}
"""Fields to tell, in this order, of events that have more than fit on a line."""


class Story(msgspec.Struct, frozen=True):
    """Why something is a violation: a sentence, and the records that show it, in causal order.

    `labels` say what part each record plays.
    """

    sentence: str
    labels: tuple[str, ...]
    records: tuple[Record, ...]

    @property
    def text(self) -> str:
        """The story as a ladder diagram, see `bus.ladder`."""
        return "\n".join(ladder(self))

    def as_dict(self) -> dict[str, Any]:
        """For the summary: `why`, `events` and `text`, where text is a list of lines."""
        return {"why": self.sentence, "events": list(self.records), "text": ladder(self)}


def tell(sentence: str, *parts: tuple[str, Record | None]) -> Story:
    """A story of labelled records; absent ones are left out, the same one is told once, causes come first."""
    seen: dict[tuple[str, int], tuple[str, Record]] = {}
    for label, record in parts:
        if record is not None:
            seen[record["node"], record["seq"]] = (label, record)
    ordered = sorted(seen.values(), key=lambda part: (part[1]["clock"], part[1]["node"], part[1]["seq"]))
    return Story(sentence, tuple(label for label, _ in ordered), tuple(record for _, record in ordered))


def line(record: Record) -> str:
    """One record on one line: clock, node, context, event, key fields.

    >>> line({"clock": 7, "node": "cpu1", "ctx": "vcpu3", "event": "vmread", "name": "VM_EXIT_REASON",
    ...       "vmcs": 2**64 - 1, "result": "invalid", "field": 0x4402, "value": 0})
    '7 cpu1/vcpu3 vmread name=VM_EXIT_REASON vmcs=none result=invalid'
    """
    context = record.get("ctx")
    where = f"{record['node']}/{context}" if context else record["node"]
    keys = _KEYS.get(record["event"]) or [key for key in record if key not in COMMON_FIELDS | CPU_FIELDS]
    return " ".join((str(record["clock"]), where, record["event"], *_fields(record, keys)))


def text(record: Record) -> str:
    """As `line`, without clock and node."""
    return line(record).partition(" ")[2][len(record["node"]) + 1 :]


def _fields(record: Record, keys: Iterable[str]) -> list[str]:
    return [f"{key}={hexadecimal(record[key]) if key in HEXADECIMAL else record[key]}" for key in keys if key in record]
