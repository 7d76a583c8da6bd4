"""What people read: the table of one run, the table of many, and the story of each violation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import IO, Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bus.invariants import INVARIANTS
from bus.summary_words import (
    all_refused,
    broken_text,
    cost_text,
    errors_text,
    own_violations,
    times_text,
    updates_text,
    updates_word,
)

Summary = dict[str, Any]

PLAIN_WIDTH = 120

COLORS = {"safe": "green", "unsafe": "red", "incomplete": "yellow"}


def verdict_text(summary: Summary) -> Text:
    """The verdict in its colour, with what qualifies it."""
    verdict = summary["verdict"]
    text = Text(verdict, style=f"bold {COLORS.get(verdict, '')}")
    if all_refused(summary):
        text.append(" (every update refused)", style="dim")
    return text


def print_run(console: Console, summary: Summary) -> None:
    """One run: verdict, numbers, and the story of each violation."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in summary_rows(summary):
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    console.print(table)
    print_stories(console, summary)


def summary_rows(summary: Summary) -> Iterable[tuple[str, Text | str]]:
    """Names and values of a run's table; a name may come several times."""
    vmx, lock, seconds, exposures = (summary[key] for key in ("vmx", "lock", "seconds", "exposures"))
    guests, ipis, processes, cost = (summary[key] for key in ("guests", "ipis", "processes", "cost"))
    waits = lock["wait_us"]
    yield "verdict", verdict_text(summary)
    if summary["violations"]:
        yield "broken", broken_text(summary)
    for sentence in summary.get("why", []):
        yield "because", sentence
    yield "strategy", str(summary["strategy"])
    yield "machine", (
        f"{summary['cpus']} CPUs in {len(processes['cpus'])} processes, {summary['vcpus']} vCPUs, "
        f"{summary['tds']} TDs; online in {seconds['online']:.2f} s, ran {seconds['run']:.2f} s"
    )
    yield "updates", updates_text(summary)
    yield "P-SEAMLDR", (
        f"{cost['calls']} calls; {exposures['lost_vmcs']} lost a current VMCS, {exposures['same_next']} times the same "
        f"VMCS was next, {exposures['entered_after']} times it was entered again"
    )
    yield "VMX", (
        f"{vmx['vmread'] + vmx['vmwrite']:,} VMREADs and VMWRITEs, {vmx['vmread_errors']} and {vmx['vmwrite_errors']} "
        f"failed; {vmx['entry_errors']} entries failed; {vmx['vmptrld']} VMPTRLDs, {vmx['vmclear']} VMCLEARs"
    )
    yield "guests", f"{guests['exits']:,} exits, {guests['wrong_data']} times wrong data"
    yield "IPIs", f"{ipis['sent']} sent, {ipis['delivered']} delivered to CPUs"
    yield "lock", (
        f"{lock['acquisitions']} acquisitions, at most {lock['max_holders']} holder; waited {waits['p50']:.0f} us "
        f"(p50), {waits['p99']:.0f} us (p99)"
    )
    for line, count in list(summary["kernel_log"].items())[:5]:
        yield "kernel log", line + (f" ({count} times)" if count > 1 else "")
    for sentence in summary["assumptions"]:
        yield "assumed", sentence
    for sentence in [*summary.get("excused", []), *summary.get("notes", [])][:6]:
        yield "note", sentence
    yield "records", str(summary["run_dir"])


def print_stories(console: Console, summary: Summary) -> None:
    """The first time that each invariant broke by itself, with the events that show why; then what follows from them.
    """
    for violation in summary["violations"]:
        if violation["follows_from"]:
            continue
        times = times_text(violation["count"])
        console.print(Text(f"\n{violation['invariant']} {violation['slug']}, {times}", style="bold"))
        for line in violation["first"]["text"]:
            console.print(Text(line), soft_wrap=True)
    follow = [v for v in summary["violations"] if v["follows_from"]]
    if follow:
        words = ", ".join(f"{v['invariant']} {v['slug']} ({v['count']})" for v in follow)
        console.print(Text(f"\nand what follows from it: {words}", style="dim"))


def print_invariants(console: Console, summary: Summary) -> None:
    """Every invariant that was checked: held, or how often it broke."""
    broken = {violation["invariant"]: violation["count"] for violation in summary["violations"]}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("invariant", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("says")
    for id, invariant in INVARIANTS.items():
        count = broken.get(id, 0)
        verdict = Text(f"broken {count} times", style="red") if count else Text("held", style="green")
        table.add_row(f"{id} {invariant.slug}", verdict, Text(invariant.sentence))
    console.print(table)


class Column(NamedTuple):
    """A column of the comparison: what it shows of a strategy's summary, and how wide a console must be to have it."""

    header: str
    cell: Callable[[str, Summary], Text | str]
    min_width: int = 0
    left: bool = False
    console_width: int = 0


COMPARISON = (
    Column("strategy", lambda name, _: Text(name), left=True),
    Column("verdict", lambda _, s: Text(s["verdict"], style=COLORS.get(s["verdict"], "")), 6, left=True),
    Column("broken", lambda _, s: ", ".join(own_violations(s)), 8, left=True),
    Column("errors\nr / w / entry", lambda _, s: errors_text(s), 13),
    Column("extra per call\nPTRLD / CLEAR", lambda _, s: cost_text(s), 14, console_width=100),
    Column("times\nexposed", lambda _, s: str(s["exposures"]["lost_vmcs"]), 7, console_width=90),
    Column("updates", lambda _, s: updates_word(s), 9),
)


def print_comparison(console: Console, title: str, summaries: dict[str, Summary]) -> None:
    """One row a strategy: verdict, errors of VMREAD, VMWRITE and VM entry, cost and exposure, updates."""
    columns = [column for column in COMPARISON if console.width >= column.console_width]
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    for column in columns:
        justify: Literal["left", "right"] = "left" if column.left else "right"
        table.add_column(
            column.header, justify=justify, min_width=column.min_width, overflow="fold", vertical="bottom"
        )
    for name, summary in summaries.items():
        table.add_row(*(column.cell(name, summary) for column in columns))
    console.print(table)


def console_for(file: IO[str]) -> Console:
    """A console as wide as the terminal, or wide enough for the tables where there is none."""
    return Console(file=file) if file.isatty() else Console(file=file, width=PLAIN_WIDTH)
