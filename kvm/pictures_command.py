"""The pictures that `analyze` draws, with words on stderr while they take long and about what they leave out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from bus.draw import write_html, write_perfetto, write_shiviz

PATIENCE_S = 2.0
"""Nothing is said before this much time has passed, and then not more often."""


def draw_html(run_dir: Path, summary: dict[str, Any], path: Path) -> None:
    """Write the page; raises `OSError`."""
    write_html(run_dir, summary, path, Progress(path))


def draw_perfetto(run_dir: Path, path: Path) -> None:
    """Write the trace; raises `OSError`."""
    _say(write_perfetto(run_dir, path, Progress(path)))


def draw_shiviz(run_dir: Path, summary: dict[str, Any], path: Path) -> None:
    """Write the log; raises `OSError`."""
    _say(write_shiviz(run_dir, summary, path, Progress(path)))


class Progress:
    """Says how many records were read for a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = time.monotonic() + PATIENCE_S

    def __call__(self, records: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PATIENCE_S
            _say(f"{self._path}: {records:,} records")


def _say(sentence: str) -> None:
    if sentence:
        print(f"seamlab: {sentence}", file=sys.stderr, flush=True)
