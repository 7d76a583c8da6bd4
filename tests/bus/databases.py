"""Histories as run directories, and what SQL says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from history import Run

from bus.merge import Notes
from bus.queries import query_text
from bus.sql import open_database


def write_run(run: Run, run_dir: Path) -> Path:
    """The records of a history in files, one a node."""
    files: dict[str, list[bytes]] = {}
    for record in run.records:
        files.setdefault(record["node"], []).append(msgspec.json.encode(record) + b"\n")
    (run_dir / "records").mkdir(parents=True)
    for node, lines in files.items():
        (run_dir / "records" / f"{node}.jsonl").write_bytes(b"".join(lines))
    return run_dir


def rows(run: Run, query: str, tmp_path: Path) -> list[tuple[Any, ...]]:
    """The answer to a query, or to a ready one, about a history."""
    with open_database(write_run(run, tmp_path / "run"), Notes()) as database:
        return database.ask(query_text(query)).rows
