"""Merging record files into one history, whatever state they are in."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from bus.merge import Notes, merge, merge_run, read_file


def record(node: str, seq: int, clock: int, pid: int = 1, **fields: Any) -> dict[str, Any]:
    """A record that is whole."""
    return {"ts": 0, "clock": clock, "node": node, "pid": pid, "seq": seq, "event": "log", **fields}


def write(folder: Path, node: str, *items: dict[str, Any] | bytes) -> Path:
    """A record file of these records or raw lines; the last raw line gets no newline."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{node}.jsonl"
    rows = [item if isinstance(item, bytes) else msgspec.json.encode(item) for item in items]
    path.write_bytes(b"\n".join(rows) + (b"" if isinstance(items[-1], bytes) else b"\n"))
    return path


def order(run_dir: Path, notes: Notes, expected: tuple[str, ...] = ()) -> list[tuple[int, str, int]]:
    """(clock, node, seq) of the merged history."""
    return [(r["clock"], r["node"], r["seq"]) for r in merge_run(run_dir, notes, expected)]


def test_records_come_by_clock_then_node_then_seq(tmp_path: Path) -> None:
    """The order of the history is that of (clock, node, seq)."""
    write(tmp_path / "records", "cpu1", record("cpu1", 1, 1), record("cpu1", 2, 5), record("cpu1", 3, 5))
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 2), record("cpu0", 2, 5))
    notes = Notes()
    merged = order(tmp_path, notes)
    assert merged == [(1, "cpu1", 1), (2, "cpu0", 1), (5, "cpu0", 2), (5, "cpu1", 2), (5, "cpu1", 3)]
    assert notes.sentences == [] and not notes.incomplete


def test_a_torn_last_line_is_skipped_with_a_note(tmp_path: Path) -> None:
    """A line without its end is no loss: the process was killed while it wrote."""
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 1), b'{"ts":0,"clock":2,"no')
    notes = Notes()
    assert order(tmp_path, notes) == [(1, "cpu0", 1)]
    assert notes.sentences == ["cpu0 ends in a torn line, which is skipped"] and not notes.incomplete


def test_a_line_torn_before_a_restart_is_no_loss(tmp_path: Path) -> None:
    """The torn line of a process that was started again stands before the first line of its successor."""
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 1), b'{"ts":0,"cl', record("cpu0", 2, 3, pid=2))
    notes = Notes()
    assert order(tmp_path, notes) == [(1, "cpu0", 1), (3, "cpu0", 2)]
    assert notes.torn == {"cpu0": 1} and not notes.incomplete


def test_unreadable_lines_in_the_middle_are_a_loss(tmp_path: Path) -> None:
    """A line that cannot be read, or lacks a common field, is skipped, and the history is incomplete."""
    lines = [b"nonsense", b'{"seq":2}', b"[1]", b"\xff\xfe"]
    for bad in lines:
        write(tmp_path / "records", "cpu0", record("cpu0", 1, 1), bad, record("cpu0", 2, 3))
        notes = Notes()
        assert order(tmp_path, notes) == [(1, "cpu0", 1), (3, "cpu0", 2)]
        assert notes.sentences == ["cpu0 has unreadable lines"] and notes.incomplete


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    """A record that comes twice, in one file or in a copy of it, counts once."""
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 1), record("cpu0", 1, 1), record("cpu0", 2, 2))
    write(tmp_path / "records", "copy", record("cpu0", 1, 1), record("cpu0", 2, 2))
    notes = Notes()
    assert order(tmp_path, notes) == [(1, "cpu0", 1), (2, "cpu0", 2)]
    assert notes.sentences == ["cpu0 has records that came twice (3)"]


def test_a_gap_makes_the_history_incomplete(tmp_path: Path) -> None:
    """A missing sequence number is a missing record."""
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 1), record("cpu0", 4, 2))
    notes = Notes()
    assert len(order(tmp_path, notes)) == 2
    assert notes.sentences == ["cpu0 lacks records (2)"] and notes.incomplete


def test_a_missing_file_is_noted(tmp_path: Path) -> None:
    """A node that should have written and has no file is named."""
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 1))
    notes = Notes()
    order(tmp_path, notes, ("cpu0", "cpu1"))
    assert notes.missing == ["cpu1"] and notes.sentences == ["cpu1 has no record file"]


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    """A directory that is no run is refused."""
    with pytest.raises(FileNotFoundError, match="records"):
        merge_run(tmp_path, Notes())


def test_the_order_of_a_file_is_kept() -> None:
    """A clock that was set back does not change the order in which one process wrote."""
    one = [record("cpu0", 1, 10), record("cpu0", 2, 3), record("cpu0", 3, 11)]
    two = [record("cpu1", 1, 5), record("cpu1", 2, 12)]
    merged = [(r["node"], r["seq"]) for r in merge([one, two], Notes())]
    assert merged == [("cpu1", 1), ("cpu0", 1), ("cpu0", 2), ("cpu0", 3), ("cpu1", 2)]


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_files_are_read_in_pieces_of_any_size(tmp_path: Path, piece: int) -> None:
    """However a file is cut into pieces, its records are the same."""
    records = [record("cpu0", seq, seq, text="x" * seq) for seq in range(1, 40)]
    path = write(tmp_path, "cpu0", *records)
    notes = Notes()
    assert list(read_file(path, notes, piece)) == records and notes.sentences == []


@pytest.mark.parametrize("seed", range(4))
def test_the_merge_is_one_sort(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However dense, long and cut into pieces the files are, the history is that of one sort; nothing is noted."""
    random, everything = Random(seed), []
    monkeypatch.setattr("bus.merge.PIECE_BYTES", random.choice((100, 700, 5000)))
    for number in range(random.choice((1, 3, 30))):
        node, clock, step = f"cpu{number}", 0, random.choice((1, 3, 200))
        rows = []
        for seq in range(1, random.choice((2, 40, 400))):
            clock += random.randint(1, step)
            rows.append(record(node, seq, clock))
        write(tmp_path / "records", node, *rows)
        everything += [(one["clock"], node, one["seq"]) for one in rows]
    notes = Notes()
    assert order(tmp_path, notes) == sorted(everything) and notes.sentences == []


def test_only_pieces_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first record comes out, one piece of each file has been read, not more."""
    monkeypatch.setattr("bus.merge.PIECE_BYTES", 200)
    read: list[int] = []
    real = os.pread
    monkeypatch.setattr("bus.merge.os.pread", lambda fd, size, at: read.append(at) or real(fd, size, at))
    for node in ("cpu0", "cpu1"):
        write(tmp_path / "records", node, *(record(node, seq, seq) for seq in range(1, 200)))
    history = merge_run(tmp_path, Notes())
    next(history)
    assert read == [0, 0]
    assert len(list(history)) == 2 * 199 - 1 and len(read) > 100


def test_a_line_that_is_only_half_readable_is_noted(tmp_path: Path) -> None:
    """A line whose common fields can be read, but whose rest is damaged, is skipped when it is wanted whole."""
    damaged = msgspec.json.encode(record("cpu0", 2, 2, text="abc")).replace(b"abc", b"a\xffc")
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 1), damaged, record("cpu0", 3, 3))
    notes = Notes()
    assert order(tmp_path, notes) == [(1, "cpu0", 1), (3, "cpu0", 3)]
    assert notes.sentences == ["cpu0 has unreadable lines"] and notes.incomplete


@pytest.mark.parametrize("field", ["ts", "clock", "seq", "pid", "node", "event"])
def test_a_common_field_of_another_type_is_unreadable(tmp_path: Path, field: str) -> None:
    """A common field that is no number, or no text, makes the line unreadable."""
    strange = record("cpu0", 2, 2) | {field: [1]}
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 1), strange, record("cpu0", 3, 3))
    notes = Notes()
    assert order(tmp_path, notes) == [(1, "cpu0", 1), (3, "cpu0", 3)]
    assert notes.bad == {"cpu0": 1}


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    """What is whole is a record; only what is cut off is torn."""
    write(tmp_path / "records", "cpu0", record("cpu0", 1, 1), msgspec.json.encode(record("cpu0", 2, 2)))
    notes = Notes()
    assert order(tmp_path, notes) == [(1, "cpu0", 1), (2, "cpu0", 2)] and notes.sentences == []


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    """A process that wrote nothing is not missing."""
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "cpu0.jsonl").touch()
    notes = Notes()
    assert order(tmp_path, notes, ("cpu0",)) == [] and notes.sentences == []
