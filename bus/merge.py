"""Merge: the records of a run as one history, in the order of (Lamport clock, node, seq).

Files are read in pieces and never held open, so a run of a thousand processes needs neither a thousand descriptors
nor memory for all records. What is odd about the files is noted; nothing here is fatal.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from bus.records import Record

PIECE_BYTES = 256 * 1024
ALL_PIECES_BYTES = 8 * 1024 * 1024
SMALLEST_PIECE_BYTES = 16 * 1024

_Entry = tuple[int, str, int, int, Record]


class Notes:
    """What the reader of records should know about them.

    `sentences` are for people. `torn`, `bad`, `duplicates`, `gaps` count, by node, last lines that were cut off,
    unreadable lines before the last, records that came twice, and records that are missing; `missing` names nodes
    that should have a file and have none.
    """

    def __init__(self) -> None:
        self.torn: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()
        self.missing: list[str] = []
        self._said: dict[str, None] = {}

    def add(self, sentence: str) -> None:
        """Say something, once."""
        self._said[sentence] = None

    def add_unreadable(self, node: str, lines: int, torn: bool) -> None:
        """Count unreadable lines in a row, the last of which may be torn."""
        if torn:
            self.torn[node] += 1
            lines -= 1
        if lines:
            self.bad[node] += lines

    @property
    def incomplete(self) -> bool:
        """Whether facts are missing, so that nothing can be called safe."""
        return bool(self.bad or self.gaps or self.missing)

    @property
    def sentences(self) -> list[str]:
        """All notes, in a stable order."""
        counted = [
            (self.missing and Counter(self.missing), "has no record file"),
            (self.bad, "has unreadable lines"),
            (self.gaps, "lacks records"),
            (self.duplicates, "has records that came twice"),
            (self.torn, "ends in a torn line, which is skipped"),
        ]
        found = [
            f"{node} {what}" + (f" ({count})" if count > 1 else "")
            for counter, what in counted
            if counter
            for node, count in sorted(counter.items())
        ]
        return found + list(self._said)


def merge_run(run_dir: str | Path, notes: Notes, expected: Iterable[str] = ()) -> Iterator[Record]:
    """All records of `run_dir`/records/*.jsonl in causal order; `expected` are nodes that should have a file.

    Raises `FileNotFoundError` if there is no folder `records`.
    """
    folder = Path(run_dir) / "records"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of records")
    paths = sorted(folder.glob("*.jsonl"))
    present = {path.stem for path in paths}
    notes.missing += [node for node in expected if node not in present]
    piece = max(SMALLEST_PIECE_BYTES, min(PIECE_BYTES, ALL_PIECES_BYTES // max(1, len(paths))))
    return merge([read_file(path, notes, piece) for path in paths], notes)


def merge(files: Iterable[Iterable[Record]], notes: Notes) -> Iterator[Record]:
    """Merge record streams that are each in the order they were written.

    The order inside one stream is always kept, also where its clock was set back.
    """
    last: tuple[int, str, int] | None = None
    for clock, node, seq, _, record in heapq.merge(*(_entries(i, file, notes) for i, file in enumerate(files))):
        if (clock, node, seq) == last:
            notes.duplicates[node] += 1
            continue
        last = (clock, node, seq)
        yield record


def _entries(index: int, file: Iterable[Record], notes: Notes) -> Iterator[_Entry]:
    now = 0
    last_seq = 0
    for record in file:
        node, seq = record["node"], record["seq"]
        if seq <= last_seq:
            notes.duplicates[node] += 1
            continue
        if seq > last_seq + 1:
            notes.gaps[node] += seq - last_seq - 1
        last_seq = seq
        now = max(now, record["clock"])
        yield now, node, seq, index, record


_decoder = msgspec.json.Decoder(Record)


def read_file(path: Path, notes: Notes, piece: int = PIECE_BYTES) -> Iterator[Record]:
    """The records of one file, as written.

    Unreadable lines are noted and skipped. The last line of a process that was killed may be torn; that is no loss,
    and neither is one before the first line of the process that was started in its place.
    """
    node = path.stem
    pid, unreadable = 0, 0
    for record in _lines(path, piece):
        if record is None:
            unreadable += 1
            continue
        if unreadable:
            notes.add_unreadable(node, unreadable, torn=record["pid"] != pid)
            unreadable = 0
        pid = record["pid"]
        yield record
    if unreadable:
        notes.add_unreadable(node, unreadable, torn=True)


def _lines(path: Path, piece: int) -> Iterator[Record | None]:
    offset = 0
    rest = b""
    while True:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(piece)
        if not data:
            break
        offset += len(data)
        whole, newline, rest = (rest + data).rpartition(b"\n")
        if newline:
            yield from _decode(whole)
    if rest:
        yield None


def _decode(lines: bytes) -> list[Record | None]:
    try:
        records: list[Record | None] = list(_decoder.decode_lines(lines))
    except msgspec.DecodeError:
        records = [_decode_one(line) for line in lines.split(b"\n")]
    return [record if record is not None and _is_whole(record) else None for record in records]


def _decode_one(line: bytes) -> Record | None:
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        return None


def _is_whole(record: Record) -> bool:
    get = record.get
    return (
        type(get("clock")) is int
        and type(get("seq")) is int
        and type(get("ts")) is int
        and type(get("pid")) is int
        and type(get("node")) is str
        and type(get("event")) is str
    )
