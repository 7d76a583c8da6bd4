"""What differs between two runs: verdict, violated invariants, settings, counts, and how long things took.

Two samples of times are compared by the two-sample Kolmogorov-Smirnov test: `distance` is the largest difference
between the shares of the two samples that lie below some time. Waits in a row resemble each other, so that each sample
counts only as many values as it would have if they were independent, by the correlation of the ranks of neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from bus.statistics import percentiles

Summary = dict[str, Any]

SIGNIFICANT = 0.01
"""A difference that chance would bring about less often than this is more than noise."""

SMALL = 0.1
"""A distance below this is small, however many values show it."""

SETTINGS = ("strategy", "seed", "cpus", "vcpus", "tds")
COUNTED = ("exposures", "cost", "updates", "vmx", "seamcalls", "ipis", "guests", "lock", "processes", "seconds")
"""Parts of a summary with numbers to compare."""


class Side(msgspec.Struct, frozen=True):
    """A run: its summary, and its samples of times by name, in us, in the order of time."""

    summary: Summary
    samples: Mapping[str, Sequence[float]]


class Change(msgspec.Struct, frozen=True):
    """Something that is not the same: a setting, a count of the summary, how often an invariant was violated."""

    name: str
    a: Any
    b: Any


class Distribution(msgspec.Struct, frozen=True):
    """A measurement in both runs: how many values, percentiles in us, and how far the samples are from each other.

    `distance` is 0 to 1, `p_value` how often chance alone brings about such a distance or a larger one;
    `more_than_noise` is None if there are too few values to tell.
    """

    name: str
    counts: tuple[int, int]
    a: dict[str, float]
    b: dict[str, float]
    distance: float | None
    p_value: float | None
    more_than_noise: bool | None

    @property
    def sentence(self) -> str:
        """What can be said about it.

        >>> compare_samples("x", [1.0], [2.0]).sentence
        'too few values to tell'
        """
        if not all(self.counts):
            return "nothing to compare"
        if self.more_than_noise is None:
            return "too few values to tell"
        if not self.more_than_noise:
            return "no more than noise"
        small = "" if self.distance is None or self.distance >= SMALL else ", but small"
        if self.a["p50"] == self.b["p50"]:
            return f"more than noise{small}: spread otherwise"
        return f"more than noise{small}: B {'longer' if self.b['p50'] > self.a['p50'] else 'shorter'}"


class Differences(msgspec.Struct, frozen=True):
    """What differs between run A and run B; `notes` are sentences on how far they can be compared."""

    verdicts: tuple[str, str]
    settings: tuple[Change, ...]
    invariants: tuple[Change, ...]
    counts: tuple[Change, ...]
    distributions: tuple[Distribution, ...]
    notes: tuple[str, ...]


def differences(a: Side, b: Side) -> Differences:
    """Compare two runs."""
    settings = tuple(_changes(_settings(a.summary), _settings(b.summary)))
    return Differences(
        verdicts=(a.summary["verdict"], b.summary["verdict"]),
        settings=settings,
        invariants=tuple(_changes(_violations(a.summary), _violations(b.summary), missing=0)),
        counts=tuple(_changes(_counts(a.summary), _counts(b.summary), missing=0)),
        distributions=tuple(
            compare_samples(name, a.samples.get(name, ()), b.samples.get(name, ()))
            for name in {**a.samples, **b.samples}
        ),
        notes=tuple(_notes(a.summary, b.summary, {change.name for change in settings})),
    )


def _changes(a: dict[str, Any], b: dict[str, Any], missing: Any = None) -> list[Change]:
    """What is not the same on both sides, in the order of A, then B."""
    pairs = {name: (a.get(name, missing), b.get(name, missing)) for name in {**a, **b}}
    return [Change(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]


def _settings(summary: Summary) -> dict[str, Any]:
    return {name: summary.get(name) for name in SETTINGS} | (summary.get("knobs") or {})


def _violations(summary: Summary) -> dict[str, int]:
    return {f"{one['invariant']} {one['slug']}": one["count"] for one in summary["violations"]}


def _counts(summary: Summary) -> dict[str, float]:
    """Numbers of the summary by "part.name"; those of lock waits are compared as a distribution."""
    return {
        f"{part}.{name}": value
        for part in COUNTED
        for name, value in summary[part].items()
        if isinstance(value, int | float)
    }


def _notes(a: Summary, b: Summary, settings: set[str]) -> list[str]:
    notes = []
    if settings & {"cpus", "vcpus", "tds"}:
        notes.append("the machines are of different size: counts and waits grow with it")
    if "strategy" in settings:
        notes.append(f"the strategies differ: A is {a['strategy']}, B is {b['strategy']}")
    if "seed" in settings:
        notes.append("the seeds differ, and so the workloads")
    first, second = a["seconds"]["run"], b["seconds"]["run"]
    if max(first, second) > 1.2 * min(first, second):
        notes.append(f"A ran {first:.2f} s, B {second:.2f} s: compare counts by the second")
    notes.append("times depend on what else the computer did: a difference between two single runs is a hint")
    return notes


# Samples


def compare_samples(name: str, a: Sequence[float], b: Sequence[float]) -> Distribution:
    """Two samples of one measurement, in us."""
    distance = p_value = None
    if a and b:
        distance = kolmogorov_smirnov(a, b)
        first, second = effective_size(a), effective_size(b)
        if _enough(first, second):
            p_value = chance(distance, first, second)
    return Distribution(
        name,
        (len(a), len(b)),
        _percentiles(a),
        _percentiles(b),
        None if distance is None else round(distance, 4),
        None if p_value is None else round(p_value, 6),
        None if p_value is None else p_value < SIGNIFICANT,
    )


def _enough(n: float, m: float) -> bool:
    """Whether chance brings the largest distance about, 1, less often than `SIGNIFICANT`."""
    few, many = sorted((min(int(n), 100), min(int(m), 100)))
    return few > 0 and 2 / math.comb(few + many, few) < SIGNIFICANT


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return percentiles([round(value * 1000) for value in values])


def kolmogorov_smirnov(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference between the empirical distribution functions of two samples, neither of them empty.

    >>> kolmogorov_smirnov([1, 2, 3, 4], [3, 4, 5, 6])
    0.5
    """
    steps: dict[float, float] = {}
    for values, step in ((a, 1 / len(a)), (b, -1 / len(b))):
        for value in values:
            steps[value] = steps.get(value, 0.0) + step
    height = largest = 0.0
    for value in sorted(steps):
        height += steps[value]
        largest = max(largest, abs(height))
    return min(1.0, largest)


def effective_size(values: Sequence[float]) -> float:
    """How many independent values are worth as much as these, by the rank correlation r of neighbours: n (1-r)/(1+r).

    Alternation (a negative r) is not credited.
    """
    n = len(values)
    if n < 10:
        return float(n)
    ranks = _ranks(values)
    mean = sum(ranks) / n
    variance = sum((rank - mean) ** 2 for rank in ranks)
    if variance == 0:
        return float(n)
    r = sum((x - mean) * (y - mean) for x, y in pairwise(ranks)) / variance
    r = min(max(r, 0.0), 0.99)
    return n * (1 - r) / (1 + r)


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value; equal values share their mean rank."""
    ordered = sorted(values)
    last = {value: place for place, value in enumerate(ordered)}
    first = {value: place for place, value in zip(range(len(ordered) - 1, -1, -1), reversed(ordered), strict=True)}
    return [(first[value] + last[value]) / 2 for value in values]


def chance(distance: float, n: float, m: float) -> float:
    """How often two samples of one distribution, of n and m values, are this far apart (Kolmogorov's series).

    >>> round(chance(0.5, 8, 8), 3), round(chance(0.1, 8, 8), 3)
    (0.188, 1.0)
    """
    root = math.sqrt(n * m / (n + m))
    x = (root + 0.12 + 0.11 / root) * distance
    if x < 0.2:
        return 1.0
    total: float = sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * total))
