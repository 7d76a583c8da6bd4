"""`analyze` with its pictures, as a user meets it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest
from history import Run
from synthetic import Synthetic

import launcher
from bus.html import unpack
from bus.records import Record
from kvm import reading
from kvm.summary import BAD_INPUT, VIOLATED


def run_directory(folder: Path, records: list[Record]) -> Path:
    """A run directory with these records."""
    files: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        files[record["node"]].append(record)
    (folder / "records").mkdir(parents=True)
    for node, lines in files.items():
        text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        (folder / "records" / f"{node}.jsonl").write_bytes(text)
    return folder


def broken_run() -> list[Record]:
    run = Run().cpu(0).load(0x1000).enter(0x1000).cpu(0, "reader").call_none(0x1000)
    return run.cpu(0).vcpu_load(0x1000, skipped=True).vmread("invalid").finish().records


def test_all_pictures_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command writes all three; the exit status is that of the verdict, and nothing is said beside it."""
    run = run_directory(tmp_path / "run", broken_run())
    files = {kind: tmp_path / f"out.{kind}" for kind in ("html", "perfetto", "shiviz")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    assert launcher.main(["analyze", str(run), *options]) == VIOLATED
    assert unpack(files["html"].read_text())["stories"][0] == "I2"
    assert len(json.loads(files["perfetto"].read_text())["traceEvents"]) > 10
    assert files["shiviz"].read_text().startswith("(?<host>")
    output = capsys.readouterr()
    assert "unsafe" in output.out and output.err == ""


@pytest.mark.parametrize("kind", ["html", "perfetto", "shiviz"])
@pytest.mark.parametrize("out", ["no/such/folder/out", "."])
def test_a_file_that_cannot_be_written_is_one_line(
    kind: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is named, with the reason, and the exit status is 2."""
    run = run_directory(tmp_path / "run", broken_run())
    assert launcher.main(["analyze", str(run), f"--{kind}", str(tmp_path / out)]) == BAD_INPUT
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    assert f"{tmp_path / out} cannot be written: " in output.err


def test_what_takes_long_or_leaves_out_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress and what a cap leaves out are told on stderr."""
    monkeypatch.setattr(reading, "PATIENCE_S", 0.0)
    run = run_directory(tmp_path / "run", list(Synthetic(4).records(4000)))
    launcher.main(["analyze", str(run), "--shiviz", str(tmp_path / "out")])
    lines = capsys.readouterr().err.splitlines()
    size = sum(path.stat().st_size for path in (run / "records").iterdir()) / 1e6
    assert f"seamlab: judging: {size:.1f} of {size:.1f} MB" in lines
    assert f"seamlab: writing {tmp_path / 'out'}: {size:.1f} of {size:.1f} MB" in lines
    assert f"{tmp_path / 'out'} leaves " in lines[-1] and "events out" in lines[-1]


def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    """Records that are not as the event table says, and torn lines, do not keep the others from being drawn."""
    run = run_directory(tmp_path / "run", broken_run())
    with (run / "records" / "cpu0.jsonl").open("a") as file:
        strange = {"ts": 99_000_000, "clock": 99, "node": "cpu0", "pid": 100, "seq": 99}
        for event in ("ipi_send", "lock_request", "csd_lock", "td_enter", "nonsense"):
            strange["seq"] += 1
            file.write(json.dumps(strange | {"event": event}) + "\n")
        file.write('{"ts":1,"clo')
    for kind in ("html", "perfetto", "shiviz"):
        launcher.main(["analyze", str(run), f"--{kind}", str(tmp_path / kind)])
    assert [lane["node"] for lane in unpack((tmp_path / "html").read_text())["lanes"]] == ["launcher", "cpu0"]
    assert json.loads((tmp_path / "perfetto").read_text())["traceEvents"]
