"""A look at a run directory: its records as they are now, and what /proc says of the processes that write them.

Records are written unbuffered, so that those of a running machine are as fresh as the moment of the look. Each file is
read up to that moment; a torn last line is skipped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from time import monotonic_ns

from bus.merge import Notes, merge, read_file
from bus.records import Record
from bus.spec import LAUNCHER
from bus.why import Inquiry, Why

STATES = {"R": "running", "D": "running", "S": "asleep", "I": "asleep", "T": "stopped", "t": "stopped"}
"""The states of proc(5); the others are those of a process that has ended."""


class RunError(ValueError):
    """There is no run to look at; the message is one line for the user."""


@contextlib.contextmanager
def making_sense(run_dir: Path) -> Iterator[None]:
    """Turn what a record without its fields leads to, in the block, into a `RunError`."""
    try:
        yield
    except (KeyError, OverflowError) as error:
        raise RunError(f"{run_dir} has records that make no sense: {error!r}") from error


def look(run_dir: Path) -> Why:
    """What the processes of the machine wait for, now or when it ended; raises `RunError`."""
    now = monotonic_ns()
    records, notes = run_dir / "records", Notes()
    begin, end = _begin_and_end(records / f"{LAUNCHER}.jsonl")
    if end is not None:
        now = end["ts"]
    inquiry = Inquiry(begin)
    for record in merge([_until(now, path, notes) for path in sorted(records.glob("*.jsonl"))], notes):
        inquiry.see(record)
    pids = inquiry.pids()
    running = end is None and _state(pids[LAUNCHER], records / f"{LAUNCHER}.jsonl") != ""
    states = {node: _state(pid, records / f"{node}.jsonl") or "dead" for node, pid in pids.items()} if running else {}
    return inquiry.conclude(now if running or end is not None else inquiry.newest, states, running, notes.sentences)


def _begin_and_end(path: Path) -> tuple[Record, Record | None]:
    """The records that describe the machine and that end it."""
    run, begin, end = path.parent.parent, None, None
    try:
        for record in read_file(path, Notes()):
            if record["event"] == "machine_begin" and begin is None:
                begin = record
            elif record["event"] == "machine_end":
                end = record
    except OSError as error:
        raise RunError(f"{run} is not a run directory: {path} cannot be read: {error.strerror}") from None
    if begin is None:
        raise RunError(f"{run} is not the run of a machine: {path} describes none")
    return begin, end


def _until(now: int, path: Path, notes: Notes) -> Iterator[Record]:
    """The records of a file that were written before `now`: of all files together one consistent picture."""
    return takewhile(lambda record: record["ts"] <= now, read_file(path, notes))


def _state(pid: int, file: Path) -> str:
    """State of the process `pid` if it is the one that has this record file open, else empty."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return STATES.get(letter, "") if _has_open(pid, file) else ""
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except PermissionError:
        return "of another user"


def _has_open(pid: int, file: Path) -> bool:
    own = file.stat()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
                return True
    return False
