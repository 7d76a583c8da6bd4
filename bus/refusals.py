"""What a process refuses of what comes over the bus: all of it is counted, little of it is recorded. A pure core."""

from __future__ import annotations

from collections.abc import Callable


class Refusals:
    """`counts` by reason. A flood makes 20 records in a million: of each reason the 1st, 2nd, 4th, 8th and so on."""

    def __init__(self, emit: Callable[..., object]) -> None:
        self.counts: dict[str, int] = {}
        self._emit = emit

    def add(self, reason: str, head: str) -> None:
        """One more; `head` says which, in short."""
        count = self.counts[reason] = self.counts.get(reason, 0) + 1
        if count & (count - 1) == 0:
            self._emit("refused", reason=reason, head=head, count=count)

    def conclude(self) -> None:
        """The record of all, if there are any."""
        if self.counts:
            self._emit("refused_totals", counts=self.counts)
