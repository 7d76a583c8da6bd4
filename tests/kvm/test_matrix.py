"""The verdict matrix as measured, cell by cell, and what it says about itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvm.compose import KnobError
from kvm.matrix import BROKEN, EXPECTED, REASONS, Matrix, differences, matrix_as_dict, matrix_knobs, measure, rows
from kvm.scenes import SCENES

BREAKS = {
    "none": {"task", "irq", "nmi", "launch-clear", "whole-cache"},
    "refuse-on-erratum, no check": {"task", "irq", "nmi", "launch-clear", "whole-cache"},
    "save-restore-v3": {"nmi", "launch-clear", "whole-cache", "concurrent"},
    "save-restore, IRQs on": {"task", "clear-ipi", "nmi", "launch-clear", "whole-cache", "concurrent"},
    "sweep-naive": {"task", "irq", "nmi", "launch-clear", "whole-cache"},
    "vmclear-local": {"irq", "nmi"},
    "clear-current-vmcs": {"irq", "nmi", "launch-clear", "whole-cache"},
    "save-restore": {"nmi", "launch-clear", "whole-cache"},
    "refuse-on-erratum, fixed": set(),
    "refuse-on-erratum": set(),
    "retry-on-busy": {"irq", "nmi", "launch-clear", "whole-cache", "concurrent"},
    "unserialized": {"irq", "nmi", "launch-clear", "whole-cache", "concurrent"},
    "decoy": {"nmi", "whole-cache"},
    "vmclear-current": {"irq", "nmi", "whole-cache"},
    "clear-current-and-launched": {"task", "irq", "nmi", "whole-cache"},
}


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    """The whole matrix with few schedules a cell."""
    return measure(rows(), seed=1, schedules=4)


def test_every_cell_is_as_pinned(matrix: Matrix) -> None:
    """Each strategy breaks in these situations and holds in the others; only the gate on the erratum CPU refuses."""
    broken = {name: {c for c, cell in cells.items() if cell.verdict == BROKEN} for name, cells in matrix.items()}
    assert broken == BREAKS
    assert {name for name, cells in matrix.items() if not sum(cell.calls for cell in cells.values())} == {
        "refuse-on-erratum"
    }


def test_every_difference_from_the_expected_table_has_its_reason(matrix: Matrix) -> None:
    """The cells that differ are those for which a reason is written down, no more and no fewer."""
    assert {(name, column) for name, column, _ in differences(matrix)} == set(REASONS)


def test_every_unsafe_cell_tells_a_story(matrix: Matrix) -> None:
    """A broken cell names its invariants and the records that show why."""
    for cells in matrix.values():
        for cell in cells.values():
            assert bool(cell.story) == bool(cell.invariants) == (cell.verdict == BROKEN)


def test_the_json_has_every_cell(matrix: Matrix) -> None:
    """Rows by columns, with the expected verdict where there is one."""
    found = matrix_as_dict(matrix, 1)["matrix"]
    assert {name: set(cells) for name, cells in found.items()} == {name: set(SCENES) for name in BREAKS}
    assert all(found[name][column]["expected"] == verdict for (name, column), verdict in EXPECTED.items())


def test_one_seed_gives_one_matrix() -> None:
    """The same seed measures the same, to the last line of the stories."""
    once, again = (measure(rows(["decoy"]), seed=7, schedules=2) for _ in range(2))
    assert once == again


def test_knobs_that_the_cells_set_are_refused() -> None:
    """A knob that a column stands for cannot be given besides; others hold in every cell."""
    with pytest.raises(KnobError, match="seamret_launch"):
        matrix_knobs(["seamret_launch=clear"])
    assert matrix_knobs(["preemption=lazy"]) == {"preemption": "lazy"}


def test_the_command_prints_one_json_object() -> None:
    """`compare --matrix --json` measures and prints the cells of the strategies asked for."""
    command = [sys.executable, "launcher.py", "compare", "--matrix", "--json", "--strategies", "none"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["matrix"]["none"]["task"]["invariants"] == ["I2", "I3"]
