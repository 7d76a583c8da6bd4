"""Rounds of chaos, points and plans as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bus.points import POINTS
from bus.spec import SEAMLDR
from kvm.campaign import Round
from kvm.chaos import Strike

UNDONE = ("undone", "struck")


def print_points(console: Console) -> None:
    """The points at which a fault can strike."""
    table = Table(title="Points at which a fault can strike", title_justify="left")
    table.add_column("at", style="bold", no_wrap=True)
    table.add_column("when that is")
    table.add_column("seen by", no_wrap=True)
    table.add_row("time", "After `after_ms` milliseconds of work.", "")
    for name, point in POINTS.items():
        table.add_row(name, point.sentence, "seamldr" if point.seen_by == SEAMLDR else "the CPU")
    console.print(table)


def print_strikes(console: Console, strikes: Sequence[Strike]) -> None:
    """The faults of one run and what became of them."""
    table = Table(title="Faults", title_justify="left")
    for name in ("fault", "struck", "outcome"):
        table.add_column(name)
    for strike in strikes:
        table.add_row(strike.fault.describe(), strike.node, strike.outcome)
    console.print(table)


def print_rounds(console: Console, done: Sequence[Round]) -> None:
    """A campaign: what struck how often, and what came of it."""
    counts: Counter[tuple[str, str]] = Counter()
    struck: Counter[tuple[str, str]] = Counter()
    for one in done:
        for strike in one.strikes:
            kind: tuple[str, str] = (strike.fault.do, strike.fault.at)
            counts[kind] += 1
            struck[kind] += strike.outcome in UNDONE
    table = Table(title="1 round" if len(done) == 1 else f"{len(done)} rounds", title_justify="left")
    table.add_column("fault")
    table.add_column("at")
    table.add_column("planned", justify="right")
    table.add_column("struck", justify="right")
    for what, number in sorted(counts.items()):
        table.add_row(*what, str(number), str(struck[what]))
    console.print(table)
    outcomes = Counter(one.outcome for one in done)
    words = ", ".join(f"{outcomes[name]} {name}" for name in ("held", "broken", "unfinished"))
    console.print(f"Rounds: {words}", style="green" if outcomes["held"] == len(done) else "red")
    excuses = Counter(excuse.partition(":")[0] for one in done for excuse in one.excused)
    for invariant, number in sorted(excuses.items()):
        console.print(f"{invariant}: explained by a fault {number} times", style="dim")
    for one in done:
        if one.outcome != "held":
            reason = ", ".join(one.broken) or "; ".join(one.why)
            console.print(f"seed {one.plan.seed}: {one.outcome}: {reason}", style="red")
