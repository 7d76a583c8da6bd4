"""`analyze --sql`: ask the records of a run, show the answer or write it to a file."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from bus.answers import TABLE_ROWS, csv_text, json_text, print_answer
from bus.merge import Notes
from bus.queries import QUERIES, query_text
from bus.report import console_for
from bus.sql import Answer, Database, QueryError, open_database
from kvm.reading import busy

FORMATS = ("table", "csv", "json", "parquet")


def add_sql_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `analyze` that are about queries."""
    add = parser.add_argument
    add("--sql", metavar="QUERY|NAME", help="ask the records: a SELECT, or the name of a ready query")
    add("--queries", action="store_true", help="list the ready queries, and end")
    add("--format", choices=FORMATS, help="of the answer (default table; with --json json)")
    add("--out", metavar="FILE", help="write the answer to this file")


def list_queries() -> None:
    """Print the ready queries."""
    width = max(map(len, QUERIES))
    for name, query in QUERIES.items():
        print(f"{name:{width}}  {query.sentence}")


def ask(arguments: argparse.Namespace, run_dir: Path) -> None:
    """Answer the query of the command line; raises `QueryError` or `UnknownQuery`, and tells notes on stderr."""
    query, wanted = query_text(arguments.sql), arguments.format or ("json" if arguments.json else "table")
    out = Path(arguments.out).resolve() if arguments.out else None
    if wanted == "parquet" and out is None:
        raise QueryError("--format parquet needs --out FILE")
    if out is not None and out.is_relative_to(run_dir / "records"):
        raise QueryError(f"{out} is among the records of the run; write somewhere else")
    notes, part = Notes(), out.with_name(f".{out.name}.part") if out and wanted == "parquet" else None
    with ExitStack() as stack:
        with busy("loading the records"):
            database = stack.enter_context(open_database(run_dir, notes, part))
        for sentence in notes.sentences:
            print(f"seamlab: note: {sentence}", file=sys.stderr)
        if out is not None and part is not None:
            _write_parquet(database, query, part, out)
        else:
            _show(database, query, wanted, out)


def _write_parquet(database: Database, query: str, part: Path, out: Path) -> None:
    """The file appears whole, or not at all."""
    try:
        part.touch()
        part.unlink()
        database.write_parquet(query, part)
        os.replace(part, out)
    except OSError as error:
        raise QueryError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _show(database: Database, query: str, wanted: str, out: Path | None) -> None:
    with busy("asking the records"):
        answer = database.ask(query, TABLE_ROWS + 1 if wanted == "table" else None)
    if out is None:
        _print(sys.stdout, answer, wanted)
        return
    try:
        with out.open("w", encoding="utf-8") as file:
            _print(file, answer, wanted)
    except OSError as error:
        raise QueryError(f"{out} cannot be written: {error.strerror}") from None


def _print(file: IO[str], answer: Answer, wanted: str) -> None:
    if wanted == "table":
        print_answer(console_for(file), answer)
    else:
        file.write(csv_text(answer) if wanted == "csv" else json_text(answer))
