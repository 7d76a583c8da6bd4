"""The table of conformance rows in README.md is that of the tests that there are, and a row that fails is not in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"


def run(table: Path, *arguments: object, cwd: Path = TESTS.parent) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, with a table to write."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--conformance={table}"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=60)


def test_the_table_is_up_to_date(tmp_path: Path) -> None:
    """It is what a run writes in which every row passes; else run `make conformance`."""
    marked = [file for file in sorted(TESTS.rglob("test_*.py")) if "mark.conformance" in file.read_text()]
    copy = tmp_path / "README.md"
    shutil.copy(README, copy)
    done = run(copy, "--collect-only", "-m", "conformance", *marked)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert copy.read_text() == README.read_text()
    assert "| Hazards |" in copy.read_text()


ROWS = """
import pytest

pytestmark = pytest.mark.conformance("Golden sequences")

def test_g1_passes(): pass
def test_g2_fails(): assert False
@pytest.mark.skip
def test_g3_is_skipped(): pass
def test_g4_passes_here(): pass
def test_g4_fails_there(): assert False
def test_g5_g6_are_one_test(): pass
def test_that_is_no_row(): assert False
@pytest.mark.parametrize("value", [1], ids=["row-01-one"])
@pytest.mark.conformance("Hazards", "H14b")
def test_named(value): pass
"""


NO_ROW = "@pytest.mark.conformance('Hazards', 'H36')\ndef test(): pass"


@pytest.mark.parametrize(("extra", "code"), [("", 1), (NO_ROW, 4)], ids=["rows", "no-row"])
def test_only_rows_that_pass_are_counted(tmp_path: Path, extra: str, code: int) -> None:
    """A row passes if all its tests do; one that does not exist is a usage error, and nothing is written."""
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_rows.py").write_text(ROWS.replace("row-01", "row-G1") + extra)
    table = tmp_path / "table.md"
    begin, end = (line for line in README.read_text().splitlines() if line.startswith("<!-- "))
    table.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    done = run(table, "-c", "/dev/null", tmp_path, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    text = table.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    if code == 4:
        assert "old" in text and "Hazards have no row H36" in done.stderr
    else:
        lines = text.splitlines()
        assert "old" not in lines
        assert [line.split("|")[3:5] for line in lines if line.startswith("| Golden")] == [[" 10 ", " 3 "]]
        assert [line.split("|")[3:5] for line in lines if line.startswith("| Hazards")] == [[" 41 ", " 1 "]]
