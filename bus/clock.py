"""Lamport time: one counter a process, moved by its own events and past everything that it hears of."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Clock = Annotated[int, Meta(ge=0, lt=2**62)]
"""A Lamport time that leaves room: whoever hears of it goes on counting from there."""


class LamportClock:
    """The logical clock of one process.

    >>> clock = LamportClock()
    >>> clock.tick(), clock.tick()
    (1, 2)
    >>> clock.merge(40); clock.tick()
    41
    """

    __slots__ = ("now",)

    def __init__(self, now: int = 0) -> None:
        self.now = now

    def tick(self) -> int:
        """The time of the next event of this process."""
        self.now += 1
        return self.now

    def merge(self, heard: int) -> None:
        """Move past a time that arrived with a message or a stamped word."""
        if heard > self.now:
            self.now = heard
