"""The command line as a user meets it: what is typed, what is printed, which exit status comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import launcher
from bus.events import EVENTS
from bus.invariants import INVARIANTS
from bus.merge import Notes, read_file
from bus.records import complaint
from kvm.summary import BAD_INPUT, SAFE, VIOLATED

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--cpus", "2", "--vcpus", "4", "--seconds", "0.6", "--updates", "1")


def seamlab(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    command = [sys.executable, str(ROOT / "launcher.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


@pytest.fixture(scope="module")
def safe_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of the default strategy with TDs: its directory and summary."""
    run_dir = tmp_path_factory.mktemp("runs") / "safe"
    done = seamlab("run", *SMALL, "--tds", "1", "--json", "--run-dir", str(run_dir))
    assert (done.returncode, done.stderr) == (SAFE, "")
    return run_dir, json.loads(done.stdout)


def test_run_json_is_one_object_with_every_documented_key(safe_run: tuple[Path, dict[str, Any]]) -> None:
    """`run --json` prints exactly one JSON object, the summary, and the same is in summary.json."""
    run_dir, summary = safe_run
    assert summary == json.loads((run_dir / "summary.json").read_text())
    keys = (
        "schema verdict strategy knobs seed cpus vcpus tds violations assumptions exposures updates vmx seamcalls ipis "
        "guests lock processes seconds run_dir"
    )
    assert set(keys.split()) <= summary.keys()
    assert summary["schema"] == 1 and summary["verdict"] == "safe" and summary["violations"] == []
    assert summary["updates"] == {"requested": 1, "succeeded": 1, "failed": 0, "refused": 0}
    assert len(set(summary["processes"]["cpus"].values())) == 2
    assert summary["exposures"]["lost_vmcs"] > 0
    assert summary["vmx"]["vmread"] > 0 and summary["vmx"]["vmread_errors"] == 0
    assert summary["seamcalls"]["SEAMLDR.INSTALL"] == 2 and summary["seamcalls"]["TDH.SYS.UPDATE"] == 1
    assert summary["kernel_log"] == {}
    assert summary["lock"]["max_holders"] == 1 and summary["lock"]["last_token"] >= summary["updates"]["succeeded"]


def test_every_record_of_a_run_is_as_the_event_table_says(safe_run: tuple[Path, dict[str, Any]]) -> None:
    """Names and fields of all records, of every process, are those of the event table."""
    run_dir, _ = safe_run
    files = sorted((run_dir / "records").glob("*.jsonl"))
    assert [file.stem for file in files] == ["cpu0", "cpu1", "kvm", "launcher", "seamldr"]
    seen = set()
    for file in files:
        for record in read_file(file, Notes()):
            assert complaint(record) is None
            seen.add(record["event"])
    assert seen <= EVENTS.keys() and len(seen) > 40


def test_analyze_says_the_same_again(safe_run: tuple[Path, dict[str, Any]]) -> None:
    """`analyze --check` judges the same records to the same verdict and numbers."""
    run_dir, summary = safe_run
    done = seamlab("analyze", str(run_dir), "--check", "--json")
    assert done.returncode == SAFE
    assert json.loads(done.stdout) == summary


def test_analyze_check_lists_every_invariant(safe_run: tuple[Path, dict[str, Any]]) -> None:
    """`analyze --check` prints each invariant with its sentence and its verdict."""
    done = seamlab("analyze", str(safe_run[0]), "--check")
    assert done.returncode == SAFE
    lines = done.stdout.splitlines()
    for id, invariant in INVARIANTS.items():
        assert any(f"{id} {invariant.slug} " in line and " held " in line for line in lines)


def test_a_second_run_does_not_overwrite_the_first(safe_run: tuple[Path, dict[str, Any]]) -> None:
    """A run directory that holds records is refused with status 2 and loses nothing."""
    run_dir, _ = safe_run
    before = (run_dir / "records" / "cpu0.jsonl").read_bytes()
    done = seamlab("run", *SMALL, "--run-dir", str(run_dir))
    assert done.returncode == BAD_INPUT and "holds the records of another run" in done.stderr
    assert (run_dir / "records" / "cpu0.jsonl").read_bytes() == before


def test_the_bug_of_the_mail_shows_and_is_explained(tmp_path: Path) -> None:
    """`none` loses its VMCS: status 1, errors counted, and the story names what took it, who believed, what failed."""
    done = seamlab("run", *SMALL, "--strategy", "none", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == VIOLATED
    for word in ("unsafe", "I2", "I3", "SEAMRET takes", "names it, no VMPTRLD", "VMfailInvalid", "again: seamlab run"):
        assert word in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_compare_judges_each_strategy_on_its_own_machine(tmp_path: Path) -> None:
    """`compare --json` has one summary a strategy, and exits 0 when it could judge each."""
    chosen = "none,clear-current-vmcs,refuse-on-erratum"
    done = seamlab("compare", *SMALL, "--strategies", chosen, "--json", "--run-dir", str(tmp_path / "runs"))
    assert done.returncode == SAFE
    answer = json.loads(done.stdout)
    assert answer["schema"] == 1
    verdicts = {name: summary["verdict"] for name, summary in answer["strategies"].items()}
    assert verdicts == {"none": "unsafe", "clear-current-vmcs": "safe", "refuse-on-erratum": "safe"}
    refused = answer["strategies"]["refuse-on-erratum"]
    assert refused["updates"]["refused"] == 1 and refused["seamcalls"].get("SEAMLDR.INSTALL", 0) == 0


def test_the_table_fits_a_narrow_terminal(tmp_path: Path) -> None:
    """Without --json, compare prints a table, what was assumed, and why each unsafe strategy is unsafe."""
    done = seamlab("compare", *SMALL, "--strategies", "none", "--run-dir", str(tmp_path / "runs"))
    assert done.returncode == SAFE
    assert "Assumed: SEAMRET" in done.stdout and "why none is unsafe" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("run --cpus 0", "cpus is 1 to 1024, not 0"),
        ("run --cpus many", "invalid int value"),
        ("run --topology 9q", "not like 2s8c2t"),
        ("run --cpus 2 --topology 1s2c1t", "not allowed with"),
        ("run --vcpus -1", "vcpus is 0 to"),
        ("run --vcpus 0", "at least one vCPU or TD"),
        ("run --seconds nan", "seconds is"),
        ("run --strategy nope", "no strategy 'nope'; there are none,"),
        ("run --strategy nowhere.py:f", "does not exist"),
        ("run --knob a=b", "no knob 'a=b'"),
        ("run --knob seamret_launch=maybe", "preserve, clear"),
        ("run --knob fms=x", "whole number"),
        ("run --module /nowhere", "cannot be read"),
        ("run --module pyproject.toml", "not a TDX module image"),
        ("run --run-dir /proc/none", "cannot be made"),
        ("compare --strategies none,bogus", "no strategy 'bogus'"),
        ("analyze nowhere", "not a run directory"),
        ("module inspect pyproject.toml", "not a TDX module image"),
        ("module verify pyproject.toml --fms zzz", "invalid number"),
        ("module verify pyproject.toml --running pyproject.toml", "not a TDX module image"),
        ("module make out.bin --version 1.5", "not major.minor.update"),
        ("module make out.bin --pages 3", "4 to 496 pages"),
        ("module make /nowhere/out.bin", "cannot be written"),
        ("frobnicate", "invalid choice"),
        ("", "required"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input of any kind ends before a machine starts, with one line that says what to do."""
    monkeypatch.chdir(ROOT)
    try:
        status = launcher.main(arguments.split())
    except SystemExit as end:
        status = int(end.code or 0)
    output = capsys.readouterr()
    assert status == BAD_INPUT and output.out == ""
    assert says in output.err and len(output.err.strip().splitlines()) == 1


def test_a_made_module_is_inspected_verified_and_installed(tmp_path: Path) -> None:
    """`module make` signs with a new key; verify and run trust it by the hash beside it; v1 is reframed, said so."""
    image = tmp_path / "module.bin"
    assert "1.5.13" in seamlab("module", "make", str(image), "--version", "1.5.13", "--v1").stdout
    shown = seamlab("module", "inspect", str(image))
    assert shown.returncode == SAFE and "SEAMHASH" in shown.stdout and "1.5.13" in shown.stdout
    done = seamlab("run", *SMALL, "--module", str(image), "--json", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == SAFE and "reframed" in done.stderr
    records = (tmp_path / "run" / "records" / "cpu0.jsonl").read_text()
    assert '"version":"1.5.13"' in records


def test_verify_says_exactly_which_rule_fails(tmp_path: Path) -> None:
    """An image of an unknown signer is refused for just that."""
    image = tmp_path / "module.bin"
    seamlab("module", "make", str(image))
    assert seamlab("module", "verify", str(image)).returncode == SAFE
    (tmp_path / "module.bin.signer").unlink()
    done = seamlab("module", "verify", str(image))
    assert done.returncode == VIOLATED and "signer" in done.stdout and "EBADSIG" in done.stdout
