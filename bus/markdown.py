"""Verdicts in Markdown, for the description of a pull request: one run, or a table of strategies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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

LINES = 60
"""Lines of a page at most."""


COMPARISON = (
    "strategy",
    "verdict",
    "broken",
    "errors r / w / entry",
    "extra per call PTRLD / CLEAR",
    "exposed",
    "updates",
)


def run_markdown(summary: Summary) -> str:
    """One run: the verdict, a table of numbers, the stories of what broke, as many as there is room for."""
    lines = [f"## Seamlab: {_verdict(summary)}", ""]
    if summary["violations"]:
        lines += [f"Broken: {broken_text(summary)}.", ""]
    lines += [f"* {_inline(sentence)}" for sentence in summary["why"][:5]]
    lines += [""] * bool(summary["why"]) + _table(("", ""), _rows(summary))
    notes = [*summary["assumptions"], *summary["excused"], *summary["notes"]][:6]
    lines += ["", *(f"* {_inline(sentence)}" for sentence in notes)]
    return _page(lines, _stories(summary))


def comparison_markdown(summaries: Mapping[str, Summary]) -> str:
    """One row a strategy, then the story of the first thing that broke under each, as many as there is room for."""
    first = next(iter(summaries.values()))
    size = f"{first['cpus']} CPUs, {first['vcpus']} vCPUs, {first['tds']} TDs, seed {first['seed']}"
    lines = [f"## Seamlab: {len(summaries)} strategies", "", f"{size}.", ""]
    lines += _table(COMPARISON, (_strategy(name, summary) for name, summary in summaries.items()))
    lines += ["", *(f"* {_inline(sentence)}" for sentence in first["assumptions"])]
    stories = (story for name, summary in summaries.items() for story in _stories(summary, f"{name}: ")[:1])
    return _page(lines, stories)


def _verdict(summary: Summary) -> str:
    return f"**{summary['verdict']}**" + (" (every update refused)" if all_refused(summary) else "")


def _rows(summary: Summary) -> Iterable[tuple[str, str]]:
    exposures, vmx, lock, seconds = (summary[key] for key in ("exposures", "vmx", "lock", "seconds"))
    waits = lock["wait_us"]
    yield "strategy", f"`{summary['strategy']}`"
    yield "machine", f"{summary['cpus']} CPUs, {summary['vcpus']} vCPUs, {summary['tds']} TDs, seed {summary['seed']}"
    yield "ran", f"{seconds['run']:.2f} s"
    yield "updates", updates_text(summary)
    yield "P-SEAMLDR calls", (
        f"{summary['cost']['calls']}; {exposures['lost_vmcs']} lost a current VMCS, "
        f"{exposures['same_next']} times it was next"
    )
    yield "extra VMPTRLDs / VMCLEARs per call", cost_text(summary)
    yield "failed VMREADs / VMWRITEs / entries", errors_text(summary)
    yield "VMREADs and VMWRITEs", f"{vmx['vmread'] + vmx['vmwrite']:,}"
    yield "wrong data", times_text(summary["guests"]["wrong_data"])
    yield "seamldr_lock", (
        f"{lock['acquisitions']} acquisitions, at most {lock['max_holders']} holder; "
        f"waited {waits['p50']:.0f} us (p50), {waits['p99']:.0f} us (p99)"
    )


def _strategy(name: str, summary: Summary) -> tuple[str, ...]:
    return (
        f"`{name}`",
        _verdict(summary),
        ", ".join(own_violations(summary)),
        errors_text(summary),
        cost_text(summary),
        str(summary["exposures"]["lost_vmcs"]),
        updates_word(summary),
    )


def _stories(summary: Summary, prefix: str = "") -> list[list[str]]:
    """Each invariant that broke by itself: a heading, and its story in a fenced block."""
    return [_story(violation, prefix) for violation in summary["violations"] if not violation["follows_from"]]


def _story(violation: dict[str, Any], prefix: str) -> list[str]:
    heading = f"**{_inline(prefix)}{violation['invariant']} {violation['slug']}**, {times_text(violation['count'])}"
    return ["", heading, "", *_fenced(violation["first"]["text"])]


def _page(lines: list[str], stories: Iterable[list[str]]) -> str:
    """The lines, and whole stories up to the limit; what is left out is counted."""
    left_out = 0
    for story in stories:
        if len(lines) + len(story) + 2 <= LINES and not left_out:
            lines += story
        else:
            left_out += 1
    if left_out:
        lines += ["", f"{left_out} more {'story is' if left_out == 1 else 'stories are'} left out."]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(header)
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_inline(cell).replace("|", "\\|") for cell in cells) + " |"


def _inline(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split()) if "\n" in text else text


def _fenced(lines: Iterable[str]) -> list[str]:
    """A block that no line of its text can end."""
    texts = list(lines)
    fence = "```"
    while any(fence in text for text in texts):
        fence += "`"
    return [f"{fence}text", *texts, fence]
