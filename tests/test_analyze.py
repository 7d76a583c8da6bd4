"""`analyze` as a user meets it: queries, files for other people's tools, two runs compared."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest

import launcher
from bus.columns import event_columns
from bus.events import EVENTS
from bus.merge import Notes
from bus.queries import QUERIES, SAMPLES
from bus.sql import Database, open_database
from kvm.summary import BAD_INPUT, SAFE, VIOLATED

ROOT = Path(__file__).resolve().parent.parent


def live_run(run_dir: Path, strategy: str, *more: str) -> Path:
    """A small machine of real processes, run and judged."""
    size = ("--cpus", "2", "--vcpus", "4", "--seconds", "0.6", "--updates", "1", "--json")
    command = [sys.executable, str(ROOT / "launcher.py"), "run", *size, "--strategy", strategy, *more]
    command += ["--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (SAFE, VIOLATED), done.stderr
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two live runs: of the default strategy with a TD, and of the bug."""
    base = tmp_path_factory.mktemp("runs")
    return live_run(base / "safe", "clear-current-vmcs", "--tds", "1"), live_run(base / "none", "none")


@pytest.fixture(scope="module")
def database(runs: tuple[Path, Path]) -> Iterator[Database]:
    """The records of the first."""
    with open_database(runs[0], Notes()) as opened:
        yield opened


def seamlab(*arguments: object) -> int:
    """Run a command in this process; its exit status."""
    try:
        return launcher.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def summary_of(run_dir: Path) -> dict[str, Any]:
    """The summary of a run."""
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return found


# Queries


def test_every_field_of_a_live_run_has_its_type(database: Database) -> None:
    """Whatever a live record has in a field is a value of the column's type: nothing is lost to a wrong type."""
    present = [event for (event,) in database.ask("SELECT DISTINCT event FROM records").rows]
    assert len(present) > 40 and set(present) <= EVENTS.keys()
    for event in present:
        columns = event_columns(event)
        counts = ", ".join(["count(*)", *(f'count("{field}")' for field in columns)])
        records, *typed = database.ask(f"SELECT {counts} FROM {event}").rows[0]
        assert dict(zip(columns, typed, strict=True)) == dict.fromkeys(columns, records), event


@pytest.mark.parametrize("name", QUERIES)
def test_ready_query_on_a_live_run(name: str, database: Database) -> None:
    """Each ready query runs on the records of a real machine; those about trouble have no rows in a safe run."""
    answer = database.ask(QUERIES[name].sql)
    if name in ("errors", "wrong-data", "kernel-log"):
        assert answer.rows == []
    elif name not in ("faults", "vmcs-moves", "cross-calls"):
        assert answer.rows


def test_queries_agree_with_the_judge(database: Database, runs: tuple[Path, Path]) -> None:
    """What SQL counts is what the summary says."""
    summary = summary_of(runs[0])
    samples = database.samples()
    assert samples.keys() == SAMPLES.keys()
    assert len(samples["lock wait"]) == summary["lock"]["acquisitions"]
    assert len(samples["P-SEAMLDR residence"]) == summary["cost"]["calls"]
    assert len(samples["update duration"]) == summary["updates"]["succeeded"] == 1
    assert len(samples["IPI latency"]) == summary["ipis"]["delivered"]
    assert all(value > 0 for values in samples.values() for value in values)
    assert database.ask("SELECT count(*) FROM lost_vmcss").rows == [(summary["exposures"]["lost_vmcs"],)]
    seamcalls = dict(database.ask("SELECT name, count(*) FROM seamcall_enter GROUP BY name").rows)
    assert seamcalls == summary["seamcalls"]


def test_errors_have_their_cause(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The bug of the mail: every VMX instruction that failed did so because SEAMRET took the current VMCS."""
    assert seamlab("analyze", runs[1], "--sql", "errors", "--json") == SAFE
    answer = json.loads(capsys.readouterr().out)
    vmx = summary_of(runs[1])["vmx"]
    errors = {row["instruction"]: row["errors"] for row in answer}
    assert errors["VMREAD"] == vmx["vmread_errors"] > 0 and errors["VMWRITE"] == vmx["vmwrite_errors"] > 0
    assert all(row["cause"].startswith("SEAMRET of SEAMLDR.") for row in answer)


def test_answers_in_every_format(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, CSV and JSON on stdout, and each in a file; Parquet in a file."""
    query = "SELECT node, count(*) AS records FROM records GROUP BY node ORDER BY node"
    expected = [
        (path.stem, path.read_bytes().count(b"\n")) for path in sorted((runs[0] / "records").glob("*.jsonl"))
    ]
    said = {}
    for given in ("table", "csv", "json"):
        assert seamlab("analyze", runs[0], "--sql", query, "--format", given) == SAFE
        said[given] = capsys.readouterr().out
        out = tmp_path / f"out.{given}"
        assert seamlab("analyze", runs[0], "--sql", query, "--format", given, "--out", out) == SAFE
        assert out.read_text() == said[given] and capsys.readouterr().out == ""
    assert [(row["node"], row["records"]) for row in json.loads(said["json"])] == expected
    assert [(node, int(count)) for node, count in list(csv.reader(io.StringIO(said["csv"])))[1:]] == expected
    assert [tuple(line.split()) for line in said["table"].splitlines() if line.strip()][2:] == [
        (node, str(count)) for node, count in expected
    ]
    out = tmp_path / "out.parquet"
    for _ in range(2):
        assert seamlab("analyze", runs[0], "--sql", query, "--format", "parquet", "--out", out) == SAFE
    assert out.read_bytes()[:4] == out.read_bytes()[-4:] == b"PAR1"
    folder = tmp_path / "out.dir"
    folder.mkdir()
    assert seamlab("analyze", runs[0], "--sql", query, "--format", "parquet", "--out", folder) == BAD_INPUT
    assert "out.dir cannot be written" in capsys.readouterr().err
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".dir", ".json", ".parquet", ".table"}


def test_ready_queries_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`--queries` prints each ready query with its sentence, and needs no run."""
    assert seamlab("analyze", "--queries") == SAFE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, query.sentence] for name, query in QUERIES.items()]


def test_a_query_leaves_the_run_as_it_was(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the records nor the summary are touched, and nothing is left beside them."""
    files = sorted(path for path in runs[0].rglob("*") if path.is_file())
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}
    assert seamlab("analyze", runs[0], "--sql", "lock-wait") == SAFE
    target = runs[0] / "records" / "cpu0.jsonl"
    assert seamlab("analyze", runs[0], "--sql", f"COPY (SELECT 1) TO '{target}'") == BAD_INPUT
    assert seamlab("analyze", runs[0], "--sql", "events", "--out", target) == BAD_INPUT
    after = sorted(path for path in runs[0].rglob("*") if path.is_file())
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in after} == before


def test_odd_files_are_told_beside_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A torn line and a missing file are notes on stderr; the answer is on stdout."""
    (tmp_path / "records").mkdir()
    common = '"ts":1,"clock":1,"node":"launcher","pid":1,"seq":1'
    record = f'{{{common},"event":"process_online","name":"kvm","incarnation":1}}'
    (tmp_path / "records" / "launcher.jsonl").write_text(f"{record}\n{record[:30]}")
    assert seamlab("analyze", tmp_path, "--sql", "SELECT name FROM process_online", "--format", "csv") == SAFE
    output = capsys.readouterr()
    assert output.out == "name\nkvm\n"
    notes = ["kvm has no record file", "launcher ends in a torn line, which is skipped"]
    assert output.err.splitlines() == [f"seamlab: note: {note}" for note in notes]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--sql nonsense", "no query 'nonsense'; there are events,"),
        ("--sql SELECT,nope", "nope"),
        ("--sql SELEKT,1", "syntax error"),
        ("--sql SELECT,1;SELECT,2", "one statement, not 2"),
        ("--sql events --format parquet", "needs --out FILE"),
        ("--sql events --format xls", "invalid choice"),
        ("--sql events --out /nowhere/out.csv", "/nowhere/out.csv cannot be written"),
        ("--sql events --format parquet --out /nowhere/out.parquet", "cannot"),
        ("--format csv", "for the answer of --sql"),
        ("--junit /nowhere/out.xml", "/nowhere/out.xml cannot be written"),
        ("--markdown /proc", "/proc cannot be written"),
        ("{run} --sql events", "of two runs the differences are told"),
        ("{run} --markdown out.md", "of two runs the differences are told"),
        ("{run} {run}", "one run directory, or two"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: str, says: str, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad queries, formats, files and combinations end with one line that says what is wrong."""
    given = [word.replace(",", " ").replace("{run}", str(runs[1])) for word in arguments.split()]
    assert seamlab("analyze", runs[0], *given) == BAD_INPUT
    output = capsys.readouterr()
    assert output.out == "" and says in output.err and len(output.err.strip().splitlines()) == 1


def test_no_run_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a run, with what is no run, and with one that has no files, a query is refused in one line."""
    (tmp_path / "records").mkdir()
    for given, says in (([], "takes one run directory"), (["nowhere"], "no records/"), ([tmp_path], "no record files")):
        assert seamlab("analyze", *given, "--sql", "events") == BAD_INPUT
        assert says in capsys.readouterr().err


# Files


def test_several_files_at_once(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JUnit XML and Markdown are written along with the summary, and along with an answer; the status is the run's."""
    junit, markdown = tmp_path / "out.xml", tmp_path / "out.md"
    files = ("--junit", junit, "--markdown", markdown)
    assert seamlab("analyze", runs[1], *files, "--json") == VIOLATED
    summary = json.loads(capsys.readouterr().out)
    suite = fromstring(junit.read_bytes()).find("testsuite")
    assert suite is not None and suite.get("failures") == str(len(summary["violations"]))
    assert markdown.read_text().startswith("## Seamlab: **unsafe**") and len(markdown.read_text().splitlines()) <= 60
    junit.unlink()
    assert seamlab("analyze", runs[1], "--junit", junit, "--sql", "updates", "--format", "csv") == SAFE
    assert junit.exists() and capsys.readouterr().out.startswith("update,cpu,cpus,")


def test_compare_writes_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`compare --junit --markdown` has a suite and a row a strategy; the matrix has neither."""
    junit, markdown = tmp_path / "out.xml", tmp_path / "out.md"
    size = ("--cpus", "2", "--vcpus", "2", "--seconds", "0.4", "--updates", "1", "--strategies", "none")
    files = ("--junit", junit, "--markdown", markdown)
    assert seamlab("compare", *size, *files, "--run-dir", tmp_path / "runs") == SAFE
    assert [suite.get("name") for suite in fromstring(junit.read_bytes())] == ["none"]
    assert "| `none` | **" in markdown.read_text()
    capsys.readouterr()
    assert seamlab("compare", "--matrix", *files) == BAD_INPUT
    assert "not about the matrix" in capsys.readouterr().err


# Two runs


def test_two_runs_are_compared(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """`analyze A B` tells verdicts, invariants, counts and times of a safe run and an unsafe one, and exits 0."""
    assert seamlab("analyze", *runs, "--json") == SAFE
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdicts"] == ["safe", "unsafe"] and answer["runs"] == [str(run) for run in runs]
    assert {"name": "strategy", "a": "clear-current-vmcs", "b": "none"} in answer["settings"]
    broken = {v["invariant"]: v["count"] for v in summary_of(runs[1])["violations"]}
    assert {one["name"].split()[0]: one["b"] for one in answer["invariants"]} == broken
    waits = next(one for one in answer["distributions"] if one["name"] == "lock wait")
    assert waits["counts"] == [summary_of(run)["lock"]["acquisitions"] for run in runs]
    assert seamlab("analyze", *runs) == SAFE
    text = capsys.readouterr().out
    assert "A is safe" in text and "B is unsafe" in text and "I3 current-vmcs-needed" in text and "lock wait" in text
