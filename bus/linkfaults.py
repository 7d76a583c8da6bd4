"""Link faults: what becomes of each frame that leaves a process, by rules and a seed. Pure.

The faults are below the links: they lose, repeat and delay *frames*. The links of `bus.link` see to it that *messages*
still arrive in order and once. Control links, to and from the launcher, are exempt, and a node's frames to itself:
they cross nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from bus.spec import LAUNCHER

BUFFER_NS = 1_000_000_000
"""Longest time that a frame waits for a link of limited bandwidth; what would wait longer is dropped."""

HOLD_NS = 5_000_000
"""How long a frame is held back to be overtaken."""

MAX_RULES = 256
"""Rules in force at once."""

_PARTITIONS = ("", "one-way", "two-way")


class LinkRule(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Faults on the frames from `source` to `target`, both a node's name, a beginning and a star ("cpu*"), or "*".

    `drop`, `duplicate` and `reorder` are probabilities, each drawn for itself: the frame is lost; it is transmitted
    twice; it is held back for 5 ms, so that what is sent after it, on this link and on others, overtakes it. Every
    copy is delayed by `delay_ns` plus 0 to `jitter_ns` nanoseconds, uniformly; jitter may change the order.
    `bandwidth` in bytes per second (0: no limit) holds for each pair of nodes by itself; a frame that would wait for
    more than a second is dropped. `partition` is "one-way" (no frame gets through), "two-way" (in the other direction
    neither) or "".

    Raises `ValueError` on a value that is out of range.
    """

    source: str = "*"
    target: str = "*"
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay_ns: int = 0
    jitter_ns: int = 0
    bandwidth: int = 0
    partition: str = ""

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            pattern = getattr(self, name)
            if not 0 < len(pattern) <= 64 or "*" in pattern[:-1]:
                raise ValueError(f"{name} {pattern!r} is neither a node's name nor one with a star at its end")
        for name in ("drop", "duplicate", "reorder"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not a probability, 0 to 1")
        for name in ("delay_ns", "jitter_ns", "bandwidth"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise ValueError(f"{name} {getattr(self, name)} is negative or too large")
        if self.partition not in _PARTITIONS:
            raise ValueError(f'partition {self.partition!r} is neither "one-way" nor "two-way"')

    def applies(self, source: str, target: str) -> bool:
        """Whether frames from `source` to `target` are subject to this rule."""
        if _fits(self.source, source) and _fits(self.target, target):
            return True
        return self.partition == "two-way" and _fits(self.source, target) and _fits(self.target, source)


def _fits(pattern: str, node: str) -> bool:
    return node.startswith(pattern[:-1]) if pattern.endswith("*") else node == pattern


def is_exempt(source: str, target: str) -> bool:
    """Whether no rule can apply between these nodes."""
    return LAUNCHER in (source, target) or source == target


class _Lane:
    """The way from this process to one target: its rules, its random numbers, and when its bandwidth is free again."""

    def __init__(self, rules: list[LinkRule], seed: str) -> None:
        self._rules = [(rule, random.Random(f"{seed} {number}").random) for number, rule in enumerate(rules)]
        self._free_at = [0] * len(rules)

    def decide(self, size: int, now: int) -> list[int]:
        """Every rule draws the same numbers for each frame, whatever becomes of it: so frame n has the nth ones."""
        times = [now]
        for number, (rule, draw) in enumerate(self._rules):
            lost, twice, held, late, later = draw(), draw(), draw(), draw(), draw()
            if lost < rule.drop or rule.partition:
                times = []
            delay = rule.delay_ns + HOLD_NS * (held < rule.reorder)
            copies = (late, later) if twice < rule.duplicate else (late,)
            times = [time + delay + int(share * rule.jitter_ns) for time in times for share in copies]
            if rule.bandwidth:
                times = [at for time in times if (at := self._pass(number, rule.bandwidth, size, time)) is not None]
        return times

    def _pass(self, number: int, bandwidth: int, size: int, time: int) -> int | None:
        """When the frame has passed the bottleneck; None if too much waits there."""
        start = max(time, self._free_at[number])
        if start - time > BUFFER_NS:
            return None
        self._free_at[number] = start + size * 1_000_000_000 // bandwidth
        return self._free_at[number]


class LinkFaults:
    """The rules in force for the frames that leave `source`, and how many frames they have met since it started.

    Every rule that applies to a link acts, in their order. `dropped`, `duplicated` and `delayed` count frames.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.rules: tuple[LinkRule, ...] = ()
        self.dropped = 0
        self.duplicated = 0
        self.delayed = 0
        self._seed = 0
        self._lanes: dict[str, _Lane | None] = {}

    def set(self, rules: Sequence[LinkRule], seed: int) -> None:
        """From now on these rules, and no others; `ValueError` if there are more than 256."""
        if len(rules) > MAX_RULES:
            raise ValueError(f"{len(rules)} link rules are more than {MAX_RULES}")
        self.rules = tuple(rules)
        self._seed = seed
        self._lanes = {}

    def decide(self, target: str, frame_size: int, now: int) -> list[int]:
        """The times, in ns of the clock that `now` is of, at which copies of a frame are to be transmitted.

        Empty if it is dropped, [now] if nothing happens to it. What is drawn follows from the seed, the two nodes and
        how many frames were sent on this link since the rules were set.
        """
        if target not in self._lanes:
            self._lanes[target] = self._lane(target)
        lane = self._lanes[target]
        if lane is None:
            return [now]
        times = lane.decide(frame_size, now)
        self.dropped += not times
        self.duplicated += len(times) > 1
        self.delayed += bool(times) and max(times) > now
        return times

    def _lane(self, target: str) -> _Lane | None:
        rules = [rule for rule in self.rules if rule.applies(self.source, target)]
        if not rules or is_exempt(self.source, target):
            return None
        return _Lane(rules, f"{self._seed} {self.source}>{target}")
