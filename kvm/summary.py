"""The summary of a run: what the records say, plus what only the launcher knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bus.judge import Judgement, judge
from kvm.again import command

Summary = dict[str, Any]

SAFE, VIOLATED, BAD_INPUT, UNFINISHED = 0, 1, 2, 3
"""Exit statuses of the command line."""


def summarize(judgement: Judgement, run_dir: Path) -> Summary:
    """The summary as JSON shows it. The text of each story ends with the command that shows it again."""
    again = command(judgement.machine, run_dir)
    summary = judgement.as_dict() | {"again": again, "run_dir": str(run_dir)}
    for violation in summary["violations"]:
        violation["first"]["text"] += [f"again: {again}"] if again else []
    return summary


def summarize_run(run_dir: Path) -> Summary:
    """Judge the records under `run_dir`, write summary.json beside them, return it; raises FileNotFoundError."""
    summary = summarize(judge(run_dir), run_dir)
    write_summary(summary, run_dir)
    return summary


def write_summary(summary: Summary, run_dir: Path) -> None:
    """summary.json of a run."""
    (run_dir / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")


def exit_status(summary: Summary) -> int:
    """0 all invariants held, 1 a violation was found, 3 the run cannot be judged."""
    return {"safe": SAFE, "unsafe": VIOLATED}.get(summary["verdict"], UNFINISHED)
