"""Records: one JSON Lines file a process, each line written with one system call.

structlog is the interface: an event name, keyword fields, a chain of three processors. A line that `emit` has
returned from survives SIGKILL of the process, because `os.write` has handed it to the kernel; only the line being
written when the process dies can be torn. A process that is started again under the same node goes on in the same
file: it takes the last sequence number and the last clock from there, and ends a torn line first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import structlog
from msgspec import Meta

from bus.clock import Clock, LamportClock
from bus.events import EVENTS

Record = dict[str, Any]
"""One decoded line: the common fields of `bus.events` and those of its event."""

COMMON_FIELDS = frozenset(("ts", "clock", "node", "pid", "seq", "event"))
CPU_FIELDS = frozenset(("ctx", "irqs"))
TAIL_BYTES = 256 * 1024


class _Place(msgspec.Struct):
    """Where a record stands, as a process that goes on from there has to know it."""

    seq: Annotated[int, Meta(ge=0, lt=2**62)]
    clock: Clock


class Stamp:
    """Processor: puts the common fields in front.

    `ts` is `time.monotonic_ns()`; `clock` is a tick of the process's Lamport clock; `seq` counts from `seq` + 1.
    """

    def __init__(self, node: str, clock: LamportClock, seq: int) -> None:
        self._node = node
        self._clock = clock
        self._pid = os.getpid()
        self.seq = seq

    def __call__(self, logger: Any, method: str, fields: Any) -> Any:
        self.seq += 1
        return {
            "ts": time.monotonic_ns(),
            "clock": self._clock.tick(),
            "node": self._node,
            "pid": self._pid,
            "seq": self.seq,
            "event": fields.pop("event"),
            **fields,
        }


class Context:
    """Processor: adds what `source` says about the moment (on a CPU `ctx` and `irqs`), if there is a source."""

    def __init__(self) -> None:
        self.source: Callable[[], dict[str, Any]] | None = None

    def __call__(self, logger: Any, method: str, fields: Any) -> Any:
        if self.source is not None:
            fields.update(self.source())
        return fields


_encode = msgspec.json.Encoder().encode


def render(logger: Any, method: str, fields: Any) -> bytes:
    """Processor, the last one: the line as bytes, newline included."""
    return _encode(fields) + b"\n"


class FileLogger:
    """The end of the chain: one `os.write` a line on a descriptor opened with O_APPEND."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, line: bytes) -> None:
        """Append the line; raises `OSError` if the file system refuses."""
        os.write(self._fd, line)


class EventLogger(structlog.BoundLoggerBase):
    """Bound logger with one method; there are no levels, an event is written or it is not."""

    def event(self, name: str, fields: dict[str, Any]) -> None:
        self._proxy_to_logger("write", name, **fields)


class Recorder:
    """Writes the records of one process. Made by `open_records`.

    `context`, if set, is called for each record and gives further fields; a CPU sets it. `watcher`, if set, sees each
    record after it was written.
    """

    def __init__(self, fd: int, node: str, clock: LamportClock, seq: int, trace: bool) -> None:
        self.tracing = trace
        self.watcher: Callable[[str, dict[str, Any]], None] | None = None
        self._fd = fd
        self._clock = clock
        self._stamp = Stamp(node, clock, seq)
        self._context = Context()
        logger = structlog.wrap_logger(
            FileLogger(fd),
            processors=[self._stamp, self._context, render],
            wrapper_class=EventLogger,
            context_class=dict,
            cache_logger_on_first_use=True,
        )
        self._event = logger.bind().event

    @property
    def context(self) -> Callable[[], dict[str, Any]] | None:
        """Called for each record; its fields are added."""
        return self._context.source

    @context.setter
    def context(self, source: Callable[[], dict[str, Any]] | None) -> None:
        self._context.source = source

    @property
    def written(self) -> int:
        """Sequence number of the last record."""
        return self._stamp.seq

    def emit(self, event: str, /, **fields: Any) -> int:
        """Write a record; the Lamport time of the event."""
        self._event(event, fields)
        if self.watcher is not None:
            self.watcher(event, fields)
        return self._clock.now

    def emit_trace(self, event: str, /, **fields: Any) -> int:
        """The Lamport time of an event that is written only if tracing was asked for."""
        if self.tracing:
            self._event(event, fields)
            return self._clock.now
        return self._clock.tick()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def open_records(path: str | Path, node: str, clock: LamportClock, trace: bool = False) -> Recorder:
    """Open the record file at `path` for appending; call it in the process that writes, after the fork.

    Raises `OSError` if the file cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    seq, last = _resume(fd)
    clock.merge(last)
    return Recorder(fd, node, clock, seq, trace)


def last_clock(path: str | Path) -> int:
    """Lamport time of the last whole record of a file, whose writer may be dead; 0 if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        return _last(_tail(fd))[1]
    finally:
        os.close(fd)


def _tail(fd: int) -> bytes:
    return os.pread(fd, TAIL_BYTES, max(0, os.fstat(fd).st_size - TAIL_BYTES))


def _resume(fd: int) -> tuple[int, int]:
    """Sequence number and clock of the last whole line; a torn one is ended."""
    tail = _tail(fd)
    if tail and not tail.endswith(b"\n"):
        os.write(fd, b"\n")
    return _last(tail)


def _last(tail: bytes) -> tuple[int, int]:
    for line in reversed(tail.split(b"\n")):
        try:
            last = msgspec.json.decode(line, type=_Place)
            return last.seq, last.clock
        except (ValueError, RecursionError):
            continue
    return 0, 0


def complaint(record: Record) -> str | None:
    """What is wrong with the names in a record, judged by the event table; None if nothing is."""
    event = record.get("event")
    if event not in EVENTS:
        return f"unknown event {event!r}"
    given = record.keys() - COMMON_FIELDS - CPU_FIELDS
    wanted = EVENTS[event].fields.keys()
    if given != wanted:
        missing, unknown = sorted(wanted - given), sorted(given - wanted)
        return f"{event}: fields missing {missing}, fields unknown {unknown}"
    return None
