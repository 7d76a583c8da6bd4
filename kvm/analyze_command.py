"""The command `analyze`: judge the records of a run again, ask them questions, write them in other people's formats."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bus.judge import Judgement, judge
from bus.report import console_for, print_invariants, print_run
from bus.snapshot import RunError
from kvm.summary import Summary, exit_status, summarize, write_summary


class Analyzed(msgspec.Struct, frozen=True):
    """A run that was judged: where it lies, its judgement, its summary."""

    run_dir: Path
    judgement: Judgement
    summary: Summary


class Output(msgspec.Struct, frozen=True):
    """A file that `analyze` writes when it is asked to: what it is, and what writes it; that may raise `OSError`."""

    help: str
    write: Callable[[Analyzed, Path], Any]


OUTPUTS: dict[str, Output] = {}
"""By the name of the option."""


def add_analyze_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `analyze`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory")
    add("--check", action="store_true", help="also list every invariant with its verdict")
    add("--json", action="store_true", help="print the summary as one JSON object")
    for name, output in OUTPUTS.items():
        add(f"--{name}", metavar="OUT", help=output.help)
    parser.set_defaults(command=analyze_command)


def analyze_command(arguments: argparse.Namespace) -> int:
    """Do it; the exit status."""
    return _judge(arguments, _directory(arguments.run))


def _directory(given: str) -> Path:
    run_dir = Path(given)
    if not (run_dir / "records").is_dir():
        raise RunError(f"{run_dir} is not a run directory: it has no records/")
    return run_dir.resolve()


def _judge(arguments: argparse.Namespace, run_dir: Path) -> int:
    """Judge it, write the files that are asked for, show the summary."""
    judgement = judge(run_dir)
    summary = summarize(judgement, run_dir)
    write_summary(summary, run_dir)
    for name, output in OUTPUTS.items():
        given: str | None = getattr(arguments, name)
        if given is not None:
            _write(output, Analyzed(run_dir, judgement, summary), Path(given))
    if arguments.json:
        print(msgspec.json.encode(summary).decode())
        return exit_status(summary)
    console = console_for(sys.stdout)
    if arguments.check:
        print_invariants(console, summary)
    print_run(console, summary)
    return exit_status(summary)


def _write(output: Output, analyzed: Analyzed, path: Path) -> None:
    try:
        output.write(analyzed, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None
