"""Markdown for a pull request: one run, or a table of strategies."""

from __future__ import annotations

from typing import Any

from history import Run

from bus.markdown import LINES, comparison_markdown, run_markdown

A = 0x8001000


def summary(run: Run, **changes: Any) -> dict[str, Any]:
    """The summary of a history."""
    return run.judge().as_dict() | changes


def unsafe() -> Run:
    """A call that takes a VMCS away, which is read afterwards."""
    return Run().cpu(0).load(A).call_none(A).vcpu_load(A, skipped=True).vmread("invalid").finish()


def blocks(text: str) -> list[str]:
    """Fenced blocks."""
    return text.split("```")[1::2]


def test_a_run_has_verdict_table_and_stories() -> None:
    """The verdict is first; each invariant that broke by itself is told in a fenced block, and no other."""
    run = unsafe()
    text = run_markdown(summary(run))
    assert text.startswith("## Seamlab: **unsafe**\n\nBroken: I2, I3 (so I18).\n")
    assert "| strategy | `none` |" in text and "| failed VMREADs / VMWRITEs / entries |" in text
    assert blocks(text) == [f"text\n{run.story(id)}\n" for id in ("I2", "I3")]


def test_an_incomplete_run_says_why() -> None:
    """Why a run proves nothing stands below the verdict."""
    text = run_markdown(summary(Run().finish()))
    assert text.startswith("## Seamlab: **incomplete**\n\n* nothing was put to the test")
    assert blocks(text) == []


def test_every_table_row_has_the_same_cells() -> None:
    """A table is a table: a pipe in a name does not split its cell."""
    told = summary(unsafe(), strategy="a|b.py:f")
    for text in (run_markdown(told), comparison_markdown({"a|b.py:f": told, "none": told})):
        lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
        assert len(lines) > 3 and len({line.count("|") for line in lines}) == 1


def test_a_page_stays_short() -> None:
    """Whatever broke, a page has at most 60 lines, stories are whole, and those left out are counted."""
    told = summary(unsafe())
    told["violations"] = told["violations"][:1] * 30
    told["notes"] = ["a note"] * 50
    told["why"] = ["why"] * 50
    text = run_markdown(told)
    assert len(text.splitlines()) <= LINES and text.count("```") % 2 == 0
    shown = len(blocks(text))
    assert 1 <= shown < 30 and f"{30 - shown} more stories are left out." in text


def test_a_story_cannot_end_its_block() -> None:
    """Text with a fence in it stays inside its block."""
    told = summary(unsafe())
    told["violations"][0]["first"]["text"] = ["before", "```", "# not a heading"]
    assert "````text\nbefore\n```\n# not a heading\n````" in run_markdown(told)


def test_a_comparison_has_a_row_a_strategy_and_what_broke_first() -> None:
    """One row a strategy; of each that is unsafe the first story, under its name."""
    refused = summary(Run().finish(), verdict="safe")
    refused["updates"] = {"requested": 1, "succeeded": 0, "failed": 0, "refused": 1}
    text = comparison_markdown({"none": summary(unsafe()), "refuse-on-erratum": refused})
    assert "## Seamlab: 2 strategies" in text and "2 CPUs, 2 vCPUs, 0 TDs, seed 1." in text
    assert "| `none` | **unsafe** | I2, I3 |" in text
    assert "| `refuse-on-erratum` | **safe** (every update refused) |  |" in text and "1 refused |" in text
    assert "**none: I2 cached-pointer**, 1 time" in text and len(blocks(text)) == 1


def test_a_catalogue_of_broken_strategies_stays_short() -> None:
    """Twenty unsafe strategies have twenty rows and no more stories than there is room for."""
    text = comparison_markdown({f"strategy{number}": summary(unsafe()) for number in range(20)})
    assert text.count("**unsafe**") == 20 and len(text.splitlines()) <= LINES
    assert "stories are left out" in text
