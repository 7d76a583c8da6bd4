"""Stories: the few records that explain a violation, as text for a terminal.

A VMCS violation is told by three events of one CPU: the load that believed the cached pointer, the event that took
the current VMCS or its launch state, and the operation that failed; others by the two or three records that show
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from bus.events import NONE
from bus.records import COMMON_FIELDS, CPU_FIELDS, Record

LINES = 10
COLUMNS = 100

_HEX = frozenset(
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

    `labels` say what part each record plays; `text` is the whole, at most 10 lines of 100 columns.
    """

    sentence: str
    labels: tuple[str, ...]
    records: tuple[Record, ...]

    @property
    def text(self) -> str:
        """The story for a terminal."""
        rows = [self.sentence]
        rows += [f"  {label:>9}: {line(record)}" for label, record in zip(self.labels, self.records, strict=True)]
        return "\n".join(_cut(row) for row in rows[:LINES])

    def as_dict(self) -> dict[str, Any]:
        """For the summary: `why`, `events` and `text`, where text is a list of lines."""
        return {"why": self.sentence, "events": list(self.records), "text": self.text.splitlines()}


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


def hexadecimal(value: object) -> str:
    """A number as the machine's documents write it; the NONE pointer as "none"."""
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return "none" if value == NONE else hex(value)


def _fields(record: Record, keys: Iterable[str]) -> list[str]:
    return [f"{key}={hexadecimal(record[key]) if key in _HEX else record[key]}" for key in keys if key in record]


def _cut(row: str) -> str:
    return row if len(row) <= COLUMNS else row[: COLUMNS - 3] + "..."
