"""Merge: the records of a run as one history, in the order of (Lamport clock, node, seq).

Files are read in pieces and never held open, so a run of a thousand processes needs neither a thousand descriptors
nor memory for all records. Of each line only what the order needs is decoded here; the rest is decoded by whoever
wants the record, and most records of a traced run nobody wants. What is odd about the files is noted; nothing here is
fatal.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from bus.decode import U63, UNREADABLE, Seq, decode_record
from bus.plain import plain
from bus.records import Record

PIECE_BYTES = 32 * 1024
PIECE_RECORDS = 1024
NEVER = 1 << 64
"""A clock that no record has."""

LONGEST_LINE = 1 << 20
"""Bytes of a line beyond which it is no record."""
NO_RECORD = b"\0"
"""What is kept of such a line."""


OnRead = Callable[[int], None]


class Notes:
    """What the reader of records should know about them.

    `sentences` are for people. `torn`, `bad`, `duplicates`, `gaps` count, by node, last lines that were cut off,
    unreadable lines before the last, records that came twice, and records that are missing; `missing` names nodes
    that should have a file and have none. `on_read` is told of bytes as they are read.
    """

    def __init__(self, on_read: OnRead = lambda size: None) -> None:
        self.on_read = on_read
        self.torn: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()
        self.missing: list[str] = []
        self._said: dict[str, None] = {}

    def add(self, sentence: str) -> None:
        """Say something, once."""
        self._said[plain(sentence)] = None

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
            f"{plain(node)} {what}" + (f" ({count})" if count > 1 else "")
            for counter, what in counted
            if counter
            for node, count in sorted(counter.items())
        ]
        return found + list(self._said)


class Entry(msgspec.Struct, gc=False):
    """A record of which only the common fields are decoded, and `result` if it has one; `line` is the whole.

    `clock` is its place in the order: that of the record, or of one before it in the file if that is later.
    """

    clock: U63
    node: str
    seq: Seq
    pid: U63
    event: str
    result: Any = ""
    line: bytes = msgspec.field(default=b"", name="(line)")
    given: Record | None = msgspec.field(default=None, name="(given)")

    def record(self) -> Record:
        """The whole record; raises what is `UNREADABLE`."""
        return self.given if self.given is not None else decode_record(self.event, self.line)


_entries = msgspec.json.Decoder(Entry)
_order = attrgetter("clock", "node", "seq")
_clock = attrgetter("clock")


def merge_run(run_dir: str | Path, notes: Notes, expected: Iterable[str] = ()) -> Iterator[Record]:
    """All records of `run_dir`/records/*.jsonl in causal order; `expected` are nodes that should have a file.

    Raises `FileNotFoundError` if there is no folder `records`.
    """
    return whole_records(merge_entries(run_dir, notes, expected), notes)


def merge_entries(run_dir: str | Path, notes: Notes, expected: Iterable[str] = ()) -> Iterator[Entry]:
    """As `merge_run`, undecoded."""
    folder = Path(run_dir) / "records"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of records")
    paths = sorted(folder.glob("*.jsonl"))
    present = {path.stem for path in paths}
    notes.missing += [node for node in expected if node not in present]
    return _merge([_read(path, notes, PIECE_BYTES) for path in paths], notes)


def merge_by_time(run_dir: str | Path, notes: Notes) -> Iterator[Record]:
    """As `merge_run`, in the order of the monotonic clock, which all processes of a machine read on one computer."""
    paths = sorted((Path(run_dir) / "records").glob("*.jsonl"))
    return whole_records(_merge([_timed(_read(path, notes, PIECE_BYTES), notes) for path in paths], notes), notes)


def _timed(pieces: Iterable[list[Entry]], notes: Notes) -> Iterator[list[Entry]]:
    for piece in pieces:
        yield [
            Entry(record["ts"], record["node"], record["seq"], record["pid"], record["event"], given=record)
            for record in whole_records(piece, notes)
        ]


def merge(files: Iterable[Iterable[Record]], notes: Notes) -> Iterator[Record]:
    """Merge record streams that are each in the order they were written.

    The order inside one stream is always kept, also where its clock was set back.
    """
    return whole_records(_merge([_given(iter(file)) for file in files], notes), notes)


def read_file(path: Path, notes: Notes, piece: int = PIECE_BYTES) -> Iterator[Record]:
    """The records of one file, as written.

    Unreadable lines are noted and skipped. The last line of a process that was killed may be torn; that is no loss,
    and neither is one before the first line of the process that was started in its place.
    """
    return whole_records((entry for entries in _read(path, notes, piece) for entry in entries), notes)


def whole_records(entries: Iterable[Entry], notes: Notes) -> Iterator[Record]:
    """Each entry decoded. A line whose beginning can be read, but not the whole, is noted and skipped."""
    for entry in entries:
        try:
            yield entry.record()
        except UNREADABLE:
            notes.add_unreadable(entry.node, 1, torn=False)


def _given(records: Iterator[Record]) -> Iterator[list[Entry]]:
    while piece := list(islice(records, PIECE_RECORDS)):
        yield [
            Entry(one["clock"], one["node"], one["seq"], one["pid"], one["event"], given=one)
            for one in piece
        ]


# The order


class _Stream:
    """What is read of one writer and not yet merged. Its own order is that in which it wrote."""

    def __init__(self, pieces: Iterator[list[Entry]], notes: Notes) -> None:
        self.entries: list[Entry] = []
        self.known_until = 0
        """No entry that is not yet read has a lower clock."""
        self._pieces = pieces
        self._notes = notes
        self._seq = 0

    def read_on(self) -> None:
        """Read the next piece."""
        for piece in filter(None, self._pieces):
            entries = self._in_order(piece)
            if entries:
                self.entries += entries
                self.known_until = entries[-1].clock
                return
        self.known_until = NEVER

    def take(self, horizon: int) -> list[Entry]:
        """The entries before this clock, which are then done with."""
        number = bisect_left(self.entries, horizon, key=_clock)
        taken = self.entries[:number]
        del self.entries[:number]
        return taken

    def _in_order(self, piece: list[Entry]) -> list[Entry]:
        clocks, seqs = [entry.clock for entry in piece], [entry.seq for entry in piece]
        regular = seqs == list(range(self._seq + 1, self._seq + 1 + len(piece)))
        if regular and clocks == sorted(clocks) and clocks[0] >= self.known_until:
            self._seq = seqs[-1]
            return piece
        return list(self._one_by_one(piece))

    def _one_by_one(self, piece: list[Entry]) -> Iterator[Entry]:
        clock = self.known_until
        for entry in piece:
            if entry.seq <= self._seq:
                self._notes.duplicates[entry.node] += 1
                continue
            if entry.seq > self._seq + 1:
                self._notes.gaps[entry.node] += entry.seq - self._seq - 1
            self._seq = entry.seq
            entry.clock = clock = max(clock, entry.clock)
            yield entry


def _merge(files: Iterable[Iterator[list[Entry]]], notes: Notes) -> Iterator[Entry]:
    """All entries in order. The stream of which least is known is read on; what comes before all that is not yet known
    is sorted by clock, at little cost: it consists of sorted runs, which stand in the order of their nodes.
    """
    streams = [_Stream(pieces, notes) for pieces in files]
    for stream in streams:
        stream.read_on()
    streams = sorted((stream for stream in streams if stream.entries), key=lambda stream: stream.entries[0].node)
    copies = len({stream.entries[0].node for stream in streams}) < len(streams)
    known = [(stream.known_until, number) for number, stream in enumerate(streams)]
    first = [(stream.entries[0].clock, number) for number, stream in enumerate(streams)]
    heapq.heapify(known)
    heapq.heapify(first)
    while first:
        horizon, slowest = known[0]
        due = []
        while first and first[0][0] < horizon:
            due.append(heapq.heappop(first)[1])
        batch: list[Entry] = []
        for number in sorted(due):
            batch += streams[number].take(horizon)
            if streams[number].entries:
                heapq.heappush(first, (streams[number].entries[0].clock, number))
        batch.sort(key=_clock)
        yield from _once(batch, notes) if copies else batch
        streams[slowest].read_on()
        heapq.heapreplace(known, (streams[slowest].known_until, slowest))


def _once(batch: list[Entry], notes: Notes) -> Iterator[Entry]:
    """Sorted, without the records of which there is a copy in another file."""
    before: object = None
    for entry in sorted(batch, key=_order):
        key = _order(entry)
        if key == before:
            notes.duplicates[entry.node] += 1
        else:
            yield entry
        before = key


# One file


def _read(path: Path, notes: Notes, piece: int) -> Iterator[list[Entry]]:
    node, pid, unreadable = path.stem, 0, 0
    for lines in _lines(path, notes, piece):
        entries = _decode_all(lines)
        if entries is None or unreadable:
            entries = []
            for line in filter(None, lines.split(b"\n")):
                entry = _decode_one(line)
                if entry is None:
                    unreadable += 1
                    continue
                if unreadable:
                    notes.add_unreadable(node, unreadable, torn=entry.pid != pid)
                    unreadable = 0
                pid = entry.pid
                entries.append(entry)
        if entries:
            pid = entries[-1].pid
            yield entries
    if unreadable:
        notes.add_unreadable(node, unreadable, torn=True)


def _lines(path: Path, notes: Notes, piece: int) -> Iterator[bytes]:
    """Whole lines, in pieces; at last what follows the last newline."""
    offset = 0
    rest = b""
    while data := _piece(path, notes, piece, offset):
        offset += len(data)
        notes.on_read(len(data))
        whole, newline, rest = (rest + data).rpartition(b"\n")
        if newline:
            yield whole
        if len(rest) > LONGEST_LINE:
            rest = NO_RECORD
    if rest:
        yield rest


def _piece(path: Path, notes: Notes, size: int, offset: int) -> bytes:
    """Nothing, and a note, if there is a file that cannot be read; raises `FileNotFoundError` if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        notes.missing.append(path.stem)
        notes.add(f"{path.name} cannot be read: {error.strerror}")
        return b""


def _decode_all(lines: bytes) -> list[Entry] | None:
    """An entry for each line; None if one cannot be read."""
    try:
        entries = _entries.decode_lines(lines)
    except UNREADABLE:
        return None
    each = lines.split(b"\n")
    if len(entries) != len(each):
        return None
    for entry, line in zip(entries, each, strict=True):
        entry.line = line
    return entries


def _decode_one(line: bytes) -> Entry | None:
    try:
        entry = _entries.decode(line)
    except UNREADABLE:
        return None
    entry.line = line
    return entry
