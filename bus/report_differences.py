"""What differs between two runs, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bus.differences import Change, Differences, Distribution
from bus.queries import SAMPLES
from bus.report import COLORS


def print_differences(console: Console, found: Differences, runs: tuple[str, str]) -> None:
    """Verdicts, then one table each of settings, invariants, counts, and times."""
    for letter, run, verdict in zip("AB", runs, found.verdicts, strict=True):
        console.print(Text.assemble(f"{letter} is ", (verdict, f"bold {COLORS.get(verdict, '')}"), f": {run}"))
    for note in found.notes:
        console.print(Text(f"note: {note}", style="dim"))
    _print_changes(console, "what was asked for", found.settings)
    _print_changes(console, "invariants: times violated", found.invariants)
    _print_changes(console, "counts", found.counts, ratio=True)
    _print_distributions(console, found.distributions)


def _print_changes(console: Console, title: str, changes: Iterable[Change], ratio: bool = False) -> None:
    rows = [(change.name, _value(change.a), _value(change.b), *[_ratio(change)] * ratio) for change in changes]
    if not rows:
        console.print(Text(f"\n{title}: no difference", style="dim"))
        return
    table = _table(title, ("", "A", "B", *["B / A"] * ratio))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_distributions(console: Console, distributions: Iterable[Distribution]) -> None:
    table = _table("times, us", ("", "values\nA / B", "p50\nA / B", "p99\nA / B", "distance", "p value"))
    table.add_column("", vertical="bottom")
    for one in distributions:
        values = f"{one.counts[0]:,} / {one.counts[1]:,}"
        spread = [f"{one.a[name]:,.0f} / {one.b[name]:,.0f}" for name in ("p50", "p99")]
        distance = "-" if one.distance is None else f"{one.distance:.2f}"
        table.add_row(*map(Text, (one.name, values, *spread, distance, _p_value(one.p_value), one.sentence)))
    console.print(table)
    for one in distributions:
        console.print(Text(f"{one.name}: {SAMPLES[one.name][0]}", style="dim"))


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(title: str, headers: Iterable[str]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left", vertical="bottom")
    return table


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _ratio(change: Change) -> str:
    both = isinstance(change.a, int | float) and isinstance(change.b, int | float)
    return f"{change.b / change.a:.2f}" if both and change.a else ""


def differences_as_dict(found: Differences, runs: tuple[str, str]) -> dict[str, Any]:
    """The same for `--json`."""
    answer: dict[str, Any] = msgspec.to_builtins(found)
    for one, distribution in zip(answer["distributions"], found.distributions, strict=True):
        one["sentence"] = distribution.sentence
        one["measures"] = SAMPLES[one["name"]][0]
    return {"schema": 1, "runs": list(runs), **answer}
