"""The verdict matrix: every strategy, and what should break, in every situation that separates them; measured.

Nothing here knows the answer: each cell is a number of machines that were stepped, each judged by its records. What the
discussion of the patches leads one to expect stands beside it as data, and a cell that differs says so, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from bus.judge import Violation
from kvm.compose import KnobError, parse_knobs
from kvm.scenes import SCENES
from seamldr.mutants import merged_without_check, save_restore_irqs_on
from seamldr.strategies import STRATEGIES, Strategy

SCHEDULES = 12
"""Machines stepped for a cell that holds."""
LOOK_FURTHER = 3
"""Schedules that break a cell, of which the shortest story is told."""


class Row(msgspec.Struct, frozen=True):
    """A row: a strategy by name or function, and whether the CPU is one without the erratum."""

    strategy: str | Strategy
    fixed_cpu: bool = False


ROWS: dict[str, Row] = {
    "none": Row("none"),
    "refuse-on-erratum, no check": Row(merged_without_check),
    "save-restore-v3": Row("save-restore-v3"),
    "save-restore, IRQs on": Row(save_restore_irqs_on),
    "sweep-naive": Row("sweep-naive"),
    "vmclear-local": Row("vmclear-local"),
    "clear-current-vmcs": Row("clear-current-vmcs"),
    "save-restore": Row("save-restore"),
    "refuse-on-erratum, fixed": Row("refuse-on-erratum", fixed_cpu=True),
}
"""The rows that the discussion has a verdict for."""

BUILT_IN = {name: Row(name) for name in STRATEGIES if name not in ROWS}
"""The rest of the catalogue."""

SET_BY_CELLS = ("seamret_launch", "seamret_scope", "vmx_basic_bit60", "nmi_inject", "call_context")
"""Knobs that rows and columns of the matrix stand for."""

OK, BROKEN, REFUSED = "ok", "broken", "refused"

_BREAKS = {
    "none": ("irq", "nmi", "launch-clear"),
    "refuse-on-erratum, no check": ("irq", "nmi", "launch-clear"),
    "save-restore-v3": ("nmi", "launch-clear", "concurrent"),
    "save-restore, IRQs on": ("irq", "clear-ipi", "nmi", "launch-clear"),
    "sweep-naive": ("irq", "nmi", "launch-clear", "concurrent"),
    "vmclear-local": ("irq", "nmi"),
    "clear-current-vmcs": ("irq", "nmi", "launch-clear"),
    "save-restore": ("nmi", "launch-clear"),
    "refuse-on-erratum, fixed": (),
}
_ASKED = ("irq", "clear-ipi", "nmi", "launch-clear", "concurrent")
EXPECTED: dict[tuple[str, str], str] = {
    (row, column): BROKEN if column in breaks else OK
    for row, breaks in _BREAKS.items()
    for column in _ASKED
    if (row, column) != ("save-restore, IRQs on", "concurrent")
}
"""What reading the patches and their discussion leads one to expect, for a processor with the erratum."""

REASONS: dict[tuple[str, str], str] = {
    ("sweep-naive", "concurrent"): (
        "the sketch had no lock and would break like `unserialized`; here it has one, so that only its own fault shows"
    ),
    ("save-restore, IRQs on", "irq"): (
        "an interrupt handler runs with interrupts off anyway, so this caller is safe; the vCPU that is loaded in the "
        "window comes in on top of a caller in a task, which is the first column"
    ),
}
"""Why a cell differs from what is expected."""

UNFORESEEN = "not foreseen: read its story"


class Cell(msgspec.Struct, frozen=True):
    """One strategy in one situation. `schedules` were stepped, in which `calls` entered P-SEAMLDR.

    `sentence` and `story` tell the shortest violation found; `why` is empty unless the verdict differs from `expected`.
    """

    verdict: str
    invariants: tuple[str, ...]
    schedules: int
    calls: int
    expected: str | None
    why: str
    sentence: str
    story: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether the expected table says otherwise."""
        return self.expected is not None and (self.verdict == BROKEN) != (self.expected == BROKEN)


Matrix = dict[str, dict[str, Cell]]


def rows(names: list[str] | None = None) -> dict[str, Row]:
    """The rows of the matrix, or those of some strategies and what belongs to them; files of users' own among them."""
    every = ROWS | BUILT_IN
    if names is None:
        return every
    chosen = {row: found for row, found in every.items() if row.partition(",")[0] in names}
    return chosen | {name: Row(name) for name in names if name not in STRATEGIES}


def matrix_knobs(settings: list[str]) -> dict[str, object]:
    """Knobs for all cells from NAME=VALUE words; raises `KnobError`, also for those that the matrix itself sets."""
    knobs = parse_knobs(settings)
    names = [setting.partition("=")[0] for setting in settings]
    taken = [name for name in names if name in SET_BY_CELLS]
    if taken:
        raise KnobError(f"knob {taken[0]} is set by the cells of the matrix")
    return {name: getattr(knobs, name) for name in names}


def measure(
    chosen: dict[str, Row],
    seed: int = 1,
    on_cell: Callable[[str, str], None] = lambda row, column: None,
    schedules: int = SCHEDULES,
    knobs: dict[str, object] | None = None,
) -> Matrix:
    """Every cell of the chosen rows; the same for the same seed. `on_cell` is told which one comes next.

    `knobs` hold in every cell, besides those that rows and columns set.
    """
    matrix: Matrix = {}
    for name, row in chosen.items():
        matrix[name] = {}
        for column in SCENES:
            on_cell(name, column)
            matrix[name][column] = _cell(name, row, column, range(seed * 1000, seed * 1000 + schedules), knobs or {})
    return matrix


def _cell(name: str, row: Row, column: str, seeds: range, knobs: dict[str, object]) -> Cell:
    scene = SCENES[column]
    knobs = knobs | {"vmx_basic_bit60": int(row.fixed_cpu)}
    stepped, calls = 0, 0
    found: list[Violation] = []
    invariants: set[str] = set()
    for seed in seeds:
        act = scene.play(row.strategy, seed, **knobs)
        stepped, calls = stepped + 1, calls + act.calls
        violations = [v for v in act.judgement.violations if scene.counts(v.invariant) and not v.follows_from]
        invariants |= {v.invariant for v in violations}
        found += violations[:1]
        if len(found) == LOOK_FURTHER:
            break
    verdict = BROKEN if found else OK if calls else REFUSED
    expected = EXPECTED.get((name, column))
    story = min((violation.first for violation in found), key=_span, default=None)
    cell = Cell(
        verdict=verdict,
        invariants=tuple(sorted(invariants, key=lambda i: int(i[1:]))),
        schedules=stepped,
        calls=calls,
        expected=expected,
        why="",
        sentence=story.sentence if story else "",
        story=tuple(story.text.splitlines()[1:]) if story else (),
    )
    return msgspec.structs.replace(cell, why=REASONS.get((name, column), UNFORESEEN)) if cell.differs else cell


def _span(story: Any) -> int:
    """How long the history is that a story tells, in Lamport time."""
    clocks = [record["clock"] for record in story.records]
    return max(clocks) - min(clocks) if clocks else 0


def differences(matrix: Matrix) -> Iterator[tuple[str, str, Cell]]:
    """Row, column and cell of each verdict that differs from the expected table."""
    for name, cells in matrix.items():
        for column, cell in cells.items():
            if cell.differs:
                yield name, column, cell


def matrix_as_dict(matrix: Matrix, seed: int) -> dict[str, Any]:
    """The matrix as one JSON object."""
    cells = {
        name: {column: msgspec.to_builtins(cell) | {"differs": cell.differs} for column, cell in columns.items()}
        for name, columns in matrix.items()
    }
    titles = {column: (scene.play.__doc__ or "").strip() for column, scene in SCENES.items()}
    return {"schema": 1, "seed": seed, "columns": titles, "matrix": cells}
