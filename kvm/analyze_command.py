"""The command `analyze`: judge the records of a run again, ask them questions, write them in other people's formats."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bus.differences import Side, differences
from bus.draw import write_html, write_perfetto, write_shiviz
from bus.ftrace import ftrace
from bus.judge import Judgement, judge
from bus.junit import junit_xml
from bus.markdown import comparison_markdown, run_markdown
from bus.merge import Notes, OnRead, merge_by_time
from bus.queries import UnknownQuery
from bus.report import console_for, print_invariants, print_run
from bus.report_differences import differences_as_dict, print_differences
from bus.snapshot import RunError, making_sense
from bus.sql import QueryError, open_database
from kvm.reading import Reading, busy
from kvm.sql_command import add_sql_arguments, ask, list_queries
from kvm.summary import SAFE, Summary, exit_status, summarize, write_summary

ANALYZE_ERRORS = (RunError, QueryError, UnknownQuery)
"""What is wrong with the input, in one line."""


class Analyzed(msgspec.Struct, frozen=True):
    """A run that was judged: where it lies, its judgement, its summary."""

    run_dir: Path
    judgement: Judgement
    summary: Summary


class Output(msgspec.Struct, frozen=True):
    """A file that `analyze` writes when it is asked to: what it is, and what writes it.

    That gives a sentence on what was left out, if anything was, and may raise `OSError`.
    """

    help: str
    write: Callable[[Analyzed, Path, OnRead], str | None]


def _junit(analyzed: Analyzed, path: Path, on_read: OnRead) -> None:
    path.write_bytes(junit_xml({str(analyzed.summary["strategy"]): analyzed.summary}))


def _markdown(analyzed: Analyzed, path: Path, on_read: OnRead) -> None:
    path.write_text(run_markdown(analyzed.summary), encoding="utf-8")


def _html(analyzed: Analyzed, path: Path, on_read: OnRead) -> None:
    write_html(analyzed.run_dir, analyzed.summary, path, on_read)


def _perfetto(analyzed: Analyzed, path: Path, on_read: OnRead) -> str:
    return write_perfetto(analyzed.run_dir, path, on_read)


def _shiviz(analyzed: Analyzed, path: Path, on_read: OnRead) -> str:
    return write_shiviz(analyzed.run_dir, analyzed.summary, path, on_read)


def _ftrace(analyzed: Analyzed, path: Path, on_read: OnRead) -> None:
    records = merge_by_time(analyzed.run_dir, Notes(on_read))
    cpus = int(analyzed.summary["cpus"] or 0)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(ftrace(records, analyzed.judgement.statistics.records, cpus))


OUTPUTS: dict[str, Output] = {
    "html": Output("write one page, to be opened in a browser: verdicts, stories and a timeline", _html),
    "perfetto": Output("write a trace for the Perfetto UI", _perfetto),
    "shiviz": Output("write a log for ShiViz, with vector clocks", _shiviz),
    "ftrace": Output("write the records as the kernel's tracer prints events, with lines of the kernel log", _ftrace),
    "junit": Output("write JUnit XML: a test case an invariant", _junit),
    "markdown": Output("write a summary in Markdown, for a pull request", _markdown),
}
"""By the name of the option."""


def add_analyze_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `analyze`."""
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", help="run directory; of two, it is told what differs between them")
    add("--check", action="store_true", help="also list every invariant with its verdict")
    add("--json", action="store_true", help="print the summary as one JSON object")
    for name, output in OUTPUTS.items():
        add(f"--{name}", metavar="OUT", help=output.help)
    add_sql_arguments(parser)
    parser.set_defaults(command=analyze_command)


def analyze_command(arguments: argparse.Namespace) -> int:
    """Do it; the exit status."""
    if arguments.queries:
        list_queries()
        return SAFE
    if len(arguments.runs) not in (1, 2):
        raise RunError("analyze takes one run directory, or two to compare")
    directories = [_directory(given) for given in arguments.runs]
    if arguments.sql is None and (arguments.format or arguments.out):
        raise RunError("--format and --out are for the answer of --sql")
    with making_sense(directories[-1]):
        if len(directories) == 2:
            return _compare(arguments, *directories)
        if arguments.sql is None:
            return _judge(arguments, *directories)
        return _ask(arguments, *directories)


def _directory(given: str) -> Path:
    run_dir = Path(given)
    if not (run_dir / "records").is_dir():
        raise RunError(f"{run_dir} is not a run directory: it has no records/")
    return run_dir.resolve()


def _judge(arguments: argparse.Namespace, run_dir: Path) -> int:
    """Judge it, write the files that are asked for, show the summary."""
    summary = _analyze(arguments, run_dir)
    if arguments.json:
        print(msgspec.json.encode(summary).decode())
        return exit_status(summary)
    console = console_for(sys.stdout)
    if arguments.check:
        print_invariants(console, summary)
    print_run(console, summary)
    return exit_status(summary)


def _analyze(arguments: argparse.Namespace, run_dir: Path) -> Summary:
    judgement = _judgement(run_dir)
    summary = summarize(judgement, run_dir)
    try:
        write_summary(summary, run_dir)
    except OSError as error:  # a run that may only be read can be judged all the same
        print(f"seamlab: summary.json is not written: {error.strerror}", file=sys.stderr)
    for name, path in _asked_for(arguments).items():
        _write(OUTPUTS[name], Analyzed(run_dir, judgement, summary), path)
    return summary


def _judgement(run_dir: Path) -> Judgement:
    with Reading(run_dir, "judging") as reading:
        return judge(run_dir, reading)


def _asked_for(arguments: argparse.Namespace) -> dict[str, Path]:
    given = {name: getattr(arguments, name) for name in OUTPUTS}
    return {name: Path(path) for name, path in given.items() if path is not None}


def _ask(arguments: argparse.Namespace, run_dir: Path) -> int:
    """Answer a query; the run is judged only for files that need it."""
    if _asked_for(arguments):
        _analyze(arguments, run_dir)
    ask(arguments, run_dir)
    return SAFE


def _compare(arguments: argparse.Namespace, a: Path, b: Path) -> int:
    if arguments.sql is not None or arguments.check or _asked_for(arguments):
        raise RunError("of two runs the differences are told, as a table or with --json, and nothing else")
    runs = (str(a), str(b))
    found = differences(_side(a), _side(b))
    if arguments.json:
        print(msgspec.json.encode(differences_as_dict(found, runs)).decode())
    else:
        print_differences(console_for(sys.stdout), found, runs)
    return SAFE


def _side(run_dir: Path) -> Side:
    with busy("loading the records"), open_database(run_dir, Notes()) as database:
        samples = database.samples()
    return Side(summarize(_judgement(run_dir), run_dir), samples)


def _write(output: Output, analyzed: Analyzed, path: Path) -> None:
    with _writing(path), Reading(analyzed.run_dir, f"writing {path}") as reading:
        left_out = output.write(analyzed, path, reading)
    if left_out:
        print(f"seamlab: {left_out}", file=sys.stderr)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


# The same for `compare`


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The files that `compare` writes when it is asked to."""
    parser.add_argument("--junit", metavar="OUT", help="write JUnit XML: a suite a strategy")
    parser.add_argument("--markdown", metavar="OUT", help="write the table in Markdown, for a pull request")


def write_reports(arguments: argparse.Namespace, summaries: dict[str, Summary]) -> None:
    """Write the files that are asked for; raises `RunError`."""
    if arguments.junit:
        with _writing(Path(arguments.junit)):
            Path(arguments.junit).write_bytes(junit_xml(summaries))
    if arguments.markdown:
        with _writing(Path(arguments.markdown)):
            Path(arguments.markdown).write_text(comparison_markdown(summaries), encoding="utf-8")
