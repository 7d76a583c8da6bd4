"""The log for ShiViz, which draws who told whom: a line an event, with its host and its vector time.

ShiViz reads the first line of a file as the regular expression of all others, and the second, empty here, as what
separates executions (ShiViz, `js/shiviz.js`). It draws each event, so that a few thousand are as many as it can show.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from bus.records import Record
from bus.story import text
from bus.vector import VectorClocks

EVENTS = 2000
"""At most so many events are written."""
AFTER = 200
"""So many of them are the effect of a violation and what follows."""

REGEX = r"(?<host>\S+) (?<clock>\{\S+\}) (?<ms>\S+) (?<event>.*)"

ROUTINE = frozenset(("vcpu_load", "vcpu_put", "vmentry", "td_enter", "counters"))
"""Left out unless a story tells them: guests that run tell nobody anything."""


class Log:
    """Sees one history; `lines` are the log of its beginning or, if it has a violation, of what led to the first one.

    `left_out` counts the events that would be there but for the cap.
    """

    def __init__(self, summary: dict[str, Any]) -> None:
        self.left_out = 0
        told = [event for violation in summary["violations"][:1] for event in violation["first"]["events"]]
        self._told = {(event["node"], event["seq"]) for event in told}
        self._until = max(((event["clock"], event["node"], event["seq"]) for event in told), default=None)
        self._kept: deque[Record] = deque()
        self._most = EVENTS if self._until is None else EVENTS - AFTER
        self._begin: int | None = None

    def see(self, record: Record) -> None:
        """The next record in causal order."""
        if self._begin is None:
            self._begin = record["ts"]
        if record["event"] in ROUTINE and (record["node"], record["seq"]) not in self._told:
            return
        self._kept.append(record)
        if self._until is not None and (record["clock"], record["node"], record["seq"]) >= self._until:
            self._until, self._most = None, EVENTS
        if len(self._kept) > self._most:
            self.left_out += 1
            drop = self._kept.pop if self._until is None else self._kept.popleft
            drop()

    def lines(self) -> Iterator[str]:
        """The lines of the file."""
        yield REGEX
        yield ""
        yield f"# {len(self._kept)} events, {self.left_out} left out: ShiViz is slow beyond a few thousand"
        clocks = VectorClocks()
        for record in self._kept:
            clock = msgspec.json.encode(clocks.see(record)).decode()
            ms = (record["ts"] - (self._begin or 0)) / 1_000_000
            yield f"{record['node']} {clock} {ms:.3f} {text(record)}"
