"""What people read: the table of one run, the table of many, and the story of each violation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Summary = dict[str, Any]

COLORS = {"safe": "green", "unsafe": "red", "incomplete": "yellow"}


def verdict_text(summary: Summary) -> Text:
    """The verdict in its colour, with what qualifies it."""
    verdict = summary["verdict"]
    text = Text(verdict, style=f"bold {COLORS.get(verdict, '')}")
    updates = summary["updates"]
    if verdict == "safe" and updates["refused"] and updates["refused"] == updates["requested"]:
        text.append(" (every update refused)", style="dim")
    return text


def broken_text(summary: Summary) -> str:
    """Ids of the invariants that broke by themselves, then those that follow: "I2, I3 (so I14, I18)"."""
    own = [v["invariant"] for v in summary["violations"] if not v["follows_from"]]
    follow = [v["invariant"] for v in summary["violations"] if v["follows_from"]]
    return ", ".join(own) + (f" (so {', '.join(follow)})" if follow else "")


def errors_text(summary: Summary) -> str:
    """Failed VMREADs, VMWRITEs and VM entries."""
    vmx = summary["vmx"]
    return f"{vmx['vmread_errors']} / {vmx['vmwrite_errors']} / {vmx['entry_errors']}"


def updates_text(summary: Summary) -> str:
    """Updates that succeeded of those requested, and what became of the others."""
    updates = summary["updates"]
    rest = [f"{updates[word]} {word}" for word in ("failed", "refused") if updates[word]]
    return f"{updates['succeeded']} of {updates['requested']}" + "".join(f", {part}" for part in rest)


def print_run(console: Console, summary: Summary) -> None:
    """One run: verdict, numbers, and the story of each violation."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _rows(summary):
        table.add_row(name, value)
    console.print(table)
    print_stories(console, summary)


def _rows(summary: Summary) -> Iterable[tuple[str, Text | str]]:
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
        f"{summary['cpus']} CPUs in {len(processes['cpus'])} processes, {summary['vcpus']} vCPUs, {summary['tds']} TDs; "
        f"online in {seconds['online']:.2f} s, ran {seconds['run']:.2f} s"
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
        f"{lock['acquisitions']} acquisitions, at most {lock['max_holders']} holder; waited {waits['p50']:.0f} us (p50), "
        f"{waits['p99']:.0f} us (p99)"
    )
    for sentence in summary["assumptions"]:
        yield "assumed", sentence
    for sentence in [*summary.get("excused", []), *summary.get("notes", [])][:6]:
        yield "note", sentence
    yield "records", str(summary["run_dir"])


def print_stories(console: Console, summary: Summary, most: int = 20) -> None:
    """The first time that each invariant broke, with the events that show why."""
    for violation in summary["violations"][:most]:
        cause = violation["follows_from"]
        title = f"\n{violation['invariant']} {violation['slug']}, {violation['count']} times"
        console.print(Text(title + (f", follows from {', '.join(cause)}" if cause else ""), style="bold"))
        if not cause:
            for line in violation["first"]["text"]:
                console.print(Text(f"  {line}"), soft_wrap=True)


def comparison_table(title: str) -> Table:
    """An empty table for `add_comparison`."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("strategy", "verdict", "invariants broken"):
        table.add_column(column)
    for column in (
        "errors\nread / write / entry",
        "extra VMPTRLD\nper call",
        "extra VMCLEAR\nper call",
        "lost / same next /\nentered again",
        "updates",
    ):
        table.add_column(column, justify="right")
    return table


def add_comparison(table: Table, name: str, summary: Summary) -> None:
    """One strategy's row."""
    cost, exposures = summary["cost"], summary["exposures"]
    calls = cost["calls"] or 1
    table.add_row(
        name,
        verdict_text(summary),
        broken_text(summary),
        errors_text(summary),
        f"{cost['extra_vmptrld'] / calls:.2f}",
        f"{cost['extra_vmclear'] / calls:.2f}",
        f"{exposures['lost_vmcs']} / {exposures['same_next']} / {exposures['entered_after']}",
        updates_text(summary),
    )
