"""Progress of a command that reads the records of a run, on stderr, once it has taken two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE_S = 2.0
"""Nothing is said before this much time has passed; where there is no terminal, then not more often."""
MEGABYTE = 1_000_000


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Says so on a terminal until the block ends, where nobody can tell how far it is."""
    with Console(stderr=True).status(what) if sys.stderr.isatty() else nullcontext():
        yield


class Reading:
    """Called with the bytes that were read: a bar on a terminal, else a line now and then; gone with the block.

    >>> with Reading(Path("runs/no-such-run"), "judging") as reading:
    ...     reading(4096)
    """

    def __init__(self, run_dir: Path, what: str) -> None:
        self._what = what
        self._read = self._size = 0
        for path in (run_dir / "records").glob("*.jsonl"):
            with suppress(OSError):
                self._size += path.stat().st_size
        self._next = time.monotonic() + PATIENCE_S
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(what, total=self._size)

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def __call__(self, size: int) -> None:
        """So many bytes more."""
        self._read += size
        if time.monotonic() < self._next:
            return
        if sys.stderr.isatty():
            self._bar.start()
            self._bar.update(self._task, completed=self._read)
        else:
            self._next = time.monotonic() + PATIENCE_S
            far = f"{self._read / MEGABYTE:.1f} of {self._size / MEGABYTE:.1f} MB"
            print(f"seamlab: {self._what}: {far}", file=sys.stderr, flush=True)
