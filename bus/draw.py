"""Pictures of a run: reads its records and writes one file. What is drawn is the business of the modules that it uses.

Each `write_...` reads the records once, in causal order. It tells `on_read` of the bytes, and raises `OSError` if the
file cannot be written. Records that are not as the event table says are passed over, as the verdict does.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol

from bus.html import Page
from bus.merge import Notes, OnRead, merge_run
from bus.perfetto import FLOWS, Trace
from bus.picture import Painter
from bus.records import Record
from bus.shiviz import Log

Summary = dict[str, Any]


def write_html(run_dir: Path, summary: Summary, path: Path, on_read: OnRead) -> None:
    """The page with timeline, verdicts and stories."""
    with path.open("w", encoding="utf-8") as file:
        painter, page = Painter(), Page()
        _show(run_dir, on_read, painter, page)
        file.write(page.render(summary, painter.finish()))


def write_perfetto(run_dir: Path, path: Path, on_read: OnRead) -> str:
    """The trace for the Perfetto UI; what was left out, in a sentence, empty if nothing was."""
    with path.open("wb") as file:
        painter = Painter()
        trace = Trace(file.write, painter.activities)
        _show(run_dir, on_read, painter, trace)
        trace.finish(painter.finish())
    if not trace.flows_left_out:
        return ""
    return f"{path} has the first {FLOWS} flows, {trace.flows_left_out} are left out"


def write_shiviz(run_dir: Path, summary: Summary, path: Path, on_read: OnRead) -> str:
    """The log for ShiViz; what was left out, in a sentence, empty if nothing was."""
    with path.open("w", encoding="utf-8") as file:
        log = Log(summary)
        _show(run_dir, on_read, log)
        file.writelines(f"{line}\n" for line in log.lines())
    return f"{path} leaves {log.left_out} events out: ShiViz draws every event" if log.left_out else ""


class Viewer(Protocol):
    """What looks at a history."""

    def see(self, record: Record) -> object:
        """The next record in causal order."""


def _show(run_dir: Path, on_read: OnRead, *viewers: Viewer) -> None:
    for record in merge_run(run_dir, Notes(on_read)):
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            for viewer in viewers:
                viewer.see(record)
