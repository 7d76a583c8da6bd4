"""The row in which a CPU shows what it does: times, counts, and what a process finds there of the one before it."""

from __future__ import annotations

import pytest

from bus.memory import PhysicalMemory
from cpu.board import SPENT_IN, Board, Doing, read_rows
from cpu.core import Counters
from cpu.layout import BOARD, BOARD_ROW, LOCK_BOARD, MAX_CPUS, PER_CPU, WATCH_SLOTS, WATCH_TABLE

SIZE = BOARD + 4 * BOARD_ROW


@pytest.fixture
def memory() -> PhysicalMemory:
    """Enough for the rows of four CPUs."""
    return PhysicalMemory.private(SIZE)


def spent(memory: PhysicalMemory, number: int) -> dict[Doing, int]:
    """What a CPU has spent in which state, without zeros."""
    row = read_rows(memory, number + 1)[number]
    return {doing: ns for doing, ns in zip(SPENT_IN, row.spent_ns, strict=True) if ns}


def test_a_row_says_what_the_cpu_does_and_what_it_has_spent_its_time_on(memory: PhysicalMemory) -> None:
    """Time goes to the state that ends; the present one is told by its beginning."""
    board = Board(memory, 2, Counters())
    board.change(Doing.KERNEL, 1000)
    board.change(Doing.GUEST, 1300, 5)
    board.change(Doing.KERNEL, 2300)
    board.change(Doing.LOCK, 2400)
    row = read_rows(memory, 4)[2]
    assert (row.doing, row.since_ns, row.detail) == (Doing.LOCK, 2400, 0)
    assert spent(memory, 2) == {Doing.KERNEL: 400, Doing.GUEST: 1000}


def test_each_cpu_has_a_row_of_its_own(memory: PhysicalMemory) -> None:
    """What one CPU shows is seen in its row alone; the row of a CPU without a process is all zeros."""
    Board(memory, 1, Counters()).change(Doing.IDLE, 7)
    rows = read_rows(memory, 4)
    assert [row.doing for row in rows] == [Doing.OFFLINE, Doing.IDLE, Doing.OFFLINE, Doing.OFFLINE]
    assert [row.since_ns for row in rows] == [0, 7, 0, 0]


def test_counts_go_on_where_the_process_before_has_left_them(memory: PhysicalMemory) -> None:
    """A new process of a CPU adds to what it finds, and the time between the two processes is nobody's."""
    for life in range(2):
        count = Counters()
        board = Board(memory, 0, count)
        board.change(Doing.KERNEL, 1000 + 10_000 * life)
        count.exits, count.ipis_delivered, count.vmread_errors, count.entry_errors = 5, 4, 2, 1
        board.calls += 3
        board.change(Doing.GUEST, 1100 + 10_000 * life)
    row = read_rows(memory, 1)[0]
    assert (row.exits, row.calls, row.ipis, row.errors) == (10, 6, 8, 6)
    assert spent(memory, 0) == {Doing.KERNEL: 200}


def test_rows_of_the_largest_machine_have_room() -> None:
    """Watch slots, rows of CPUs, rows of locks and per-CPU areas do not overlap."""
    assert WATCH_TABLE + MAX_CPUS * WATCH_SLOTS * 8 <= BOARD
    assert BOARD + MAX_CPUS * BOARD_ROW <= LOCK_BOARD
    assert LOCK_BOARD + 64 * 128 <= PER_CPU
