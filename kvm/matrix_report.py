"""The verdict matrix as people read it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvm.matrix import BROKEN, OK, Cell, Matrix, differences
from kvm.scenes import SCENES

_COLORS = {OK: "green", BROKEN: "red"}
NOTE = (
    "A cell is ok if no schedule broke what its column asks about. An NMI handler reads a VMCS only while KVM handles "
    "an interrupt of its guest, so that column calls in interrupt context; for callers in tasks it is hypothetical."
)


def print_matrix(console: Console, matrix: Matrix, seed: int) -> None:
    """The table, the shortest story of each unsafe cell, and where it differs from what is expected."""
    schedules = sum(cell.schedules for cells in matrix.values() for cell in cells.values())
    table = Table(
        title=f"verdicts of {schedules} stepped machines, seed {seed}; SEAMRET as each column says, else `preserve`",
        title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1),
    )  # fmt: skip
    table.add_column("strategy", vertical="bottom", no_wrap=True)
    for scene in SCENES.values():
        table.add_column(scene.title, vertical="bottom")
    for name, cells in matrix.items():
        table.add_row(name, *(_cell_text(cells[column]) for column in SCENES))
    console.print(table)
    console.print(NOTE, style="dim")
    _print_differences(console, matrix)
    _print_stories(console, matrix)


def _cell_text(cell: Cell) -> Text:
    mark = " *" if cell.differs else ""
    return Text(" ".join([", ".join(cell.invariants)] if cell.verdict == BROKEN else [cell.verdict]) + mark,
                style=_COLORS.get(cell.verdict, "yellow"))  # fmt: skip


def _print_differences(console: Console, matrix: Matrix) -> None:
    found = list(differences(matrix))
    console.print()
    differ = "* differs" if found else "No cell differs"
    console.print(Text(f"{differ} from the verdict that the discussion of the patches leads to.", style="bold"))
    for name, column, cell in found:
        console.print(f"  {name}, {column}: {cell.expected} expected, measured {cell.verdict}; {cell.why}.")


def _print_stories(console: Console, matrix: Matrix) -> None:
    for name, cells in matrix.items():
        for column, cell in cells.items():
            if cell.verdict == BROKEN:
                console.print(Text(f"\n{name}, {column}: {cell.sentence}", style="bold"), soft_wrap=True)
                for line in cell.story:
                    console.print(Text(line), soft_wrap=True)
