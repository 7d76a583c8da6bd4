"""Ladder diagrams: a story as text to paste in a mail, a lifeline for each CPU and service, a line for each event.

    VMREAD on cpu1 with no current VMCS
          cpu1 seamldr
      846  *      |   vcpu1   VMPTRLD 0x8003000
     1023  |<-----o   reader  SEAMLDR.INFO: SEAMRET takes 0x8003000
     1123  *      |   vcpu1   sched_in of 0x8003000: is current_vmcs, no VMPTRLD
     1124  X      |   vcpu1   VMREAD GUEST_RIP: VMfailInvalid

The number is Lamport time; `*` is where something happens, `o--->` and `<---o` are messages, X is the effect.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from bus.phrases import phrase
from bus.shadow import cpu_node, node_order
from bus.spec import SEAMLDR

if TYPE_CHECKING:
    from bus.records import Record
    from bus.story import Story

COLUMNS = 72
LINES = 13
"""With the name of the invariant before and the command that shows it again after, 15."""

SENTENCE_LINES = 2
ROWS = LINES - SENTENCE_LINES - 1
HEAD = ROWS // 2
"""Events of a long story before what is left out."""

LIFELINES_WIDTH = 36

_NODE = "node"
_SEAM = object()
MESSAGES: dict[str, tuple[object, object]] = {
    "seamcall_enter": (_NODE, _SEAM),
    "seamcall_return": (_SEAM, _NODE),
    "seam_enter": ("by", _NODE),
    "seam_return": (_NODE, "by"),
    "lock_request": (_NODE, _SEAM),
    "lock_queue": ("by", _NODE),
    "lock_grant": (_NODE, "to"),
    "lock_release": ("by", _NODE),
    "ipi_send": (_NODE, "target"),
    "ipi_deliver": ("source", _NODE),
    "csd_lock": (_NODE, "target"),
    "csd_run": ("source", _NODE),
    "request": (_NODE, "cpu"),
}
"""Events that are one end of a message: the fields that name its sender and its receiver."""

SAID_OF = {
    "not repaired": "call over, current_vmcs still names it",
    "launch state cleared": "SEAMRET clears its launch state",
}
"""Words for parts of a story that say more than their record does."""

HAPPENS_TO = {"process_exit": "name", "process_waits": "name", "fault": "name"}
"""Events that are told on the lifeline of another node than the one that wrote them."""


class _Row(NamedTuple):
    """`record` happens at `at`; if it is a message, it goes from `source` to `target`, one of which is `at`."""

    record: Record
    words: str
    at: str
    source: str
    target: str

    @property
    def nodes(self) -> set[str]:
        """The lifelines that it needs."""
        return {self.at, self.source, self.target}


def ladder(story: Story) -> list[str]:
    """The lines of the diagram, at most `LINES` of `COLUMNS`. Of a long story the middle is left out."""
    sentence = textwrap.wrap(story.sentence, COLUMNS, max_lines=SENTENCE_LINES, placeholder=" ...")
    rows = [_row(label, record) for label, record in zip(story.labels, story.records, strict=True)]
    left_out = len(rows) > ROWS
    if left_out:
        rows = [*rows[:HEAD], *rows[HEAD + 1 - ROWS :]]
    nodes, rows = _fit(rows)
    clocks = max((len(str(row.record["clock"])) for row in rows), default=0)
    contexts = max((len(str(row.record.get("ctx", ""))) for row in rows), default=0)
    places = _places(nodes)
    names = " ".join(node.center(_width(node)) for node in nodes)
    lines = [f"{'':{clocks}}  {names}"] if nodes else []
    lines += [_line(row, places, clocks, contexts, last=row is rows[-1]) for row in rows]
    if left_out:
        lines.insert(1 + HEAD, f"{'...':>{clocks}}")
    return [*sentence, *map(_cut, lines)]


def _row(label: str, record: Record) -> _Row:
    words = SAID_OF.get(label) or phrase(record)
    at = str(record.get(HAPPENS_TO.get(record["event"], "node")))
    sender, receiver = MESSAGES.get(record["event"], (_NODE, _NODE))
    source, target = _end(record, sender), _end(record, receiver)
    return _Row(record, words, at, source, target) if source != target else _Row(record, words, at, at, at)


def _end(record: Record, end: object) -> str:
    return SEAMLDR if end is _SEAM else cpu_node(record.get(str(end), record["node"]))


def _fit(rows: list[_Row]) -> tuple[list[str], list[_Row]]:
    """The lifelines, and the rows without what there is no room for: messages, then the earliest events."""
    while True:
        nodes = sorted(set().union(*(row.nodes for row in rows)), key=node_order)
        if sum(map(_width, nodes)) + len(nodes) <= LIFELINES_WIDTH or len(nodes) <= 1:
            return nodes, rows
        alone = [row._replace(source=row.at, target=row.at) for row in rows]
        rows = alone if alone != rows else rows[1:]


def _width(node: str) -> int:
    return max(len(node), 4)


def _places(nodes: Sequence[str]) -> dict[str, int]:
    """The column of each lifeline, in the middle under its name."""

    def walk() -> Iterator[tuple[str, int]]:
        left = 0
        for node in nodes:
            yield node, left + (_width(node) - 1) // 2
            left += _width(node) + 1

    return dict(walk())


def _line(row: _Row, places: dict[str, int], clocks: int, contexts: int, last: bool) -> str:
    rungs = [" "] * (max(places.values()) + 1)
    for place in places.values():
        rungs[place] = "|"
    source, target = places[row.source], places[row.target]
    if source < target:
        rungs[source:target] = ["o", *"-" * (target - source - 2), ">"]
    elif source > target:
        rungs[target + 1 : source + 1] = ["<", *"-" * (source - target - 2), "o"]
    else:
        rungs[source] = "*"
    if last:
        rungs[places[row.at]] = "X"
    context = str(row.record.get("ctx", "")).ljust(contexts)
    words = f"{context}  {row.words}" if contexts else row.words
    return f"{row.record['clock']:>{clocks}}  {''.join(rungs)}  {words}"


def _cut(line: str) -> str:
    line = line.rstrip()
    return line if len(line) <= COLUMNS else line[: COLUMNS - 3] + "..."
