"""Questions in SQL to the records of a run: DuckDB over records/*.jsonl.

The records are loaded into a database in memory, which is then cut off from files and network: no query can change
the record files, or anything else. DuckDB is loaded on first use only; it takes a third of a second.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bus.columns import COMMON
from bus.events import EVENTS
from bus.merge import Notes, read_file
from bus.queries import SAMPLES
from bus.spec import LAUNCHER
from bus.views import MACROS, VIEWS, event_view

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_STORED = ("ts", "clock", "node", "pid", "seq", "event", "ctx", "irqs")
_NEEDED = ("ts", "clock", "node", "pid", "seq", "event")


class QueryError(ValueError):
    """The query is no query, or DuckDB refuses it; the message is one line for the user."""


class Answer(msgspec.Struct, frozen=True):
    """What a query gives: names and DuckDB's types of its columns, and its rows."""

    columns: list[str]
    types: list[str]
    rows: list[tuple[Any, ...]]


class Database:
    """The records of one run. Made by `open_database`."""

    def __init__(self, connection: DuckDBPyConnection) -> None:
        self._connection = connection

    def ask(self, query: str, limit: int | None = None) -> Answer:
        """The answer, or its first `limit` rows; raises `QueryError`."""
        with _errors():
            self._check(query)
            cursor = self._connection.execute(query)
            described = cursor.description or []
            rows = cursor.fetchall() if limit is None else cursor.fetchmany(limit)
            return Answer([column[0] for column in described], [str(column[1]) for column in described], rows)

    def write_parquet(self, query: str, path: Path) -> None:
        """The answer as a Parquet file at the path that `open_database` was told; raises `QueryError`."""
        with _errors():
            self._check(query)
            self._connection.sql(query).write_parquet(str(path))

    def samples(self) -> dict[str, list[float]]:
        """By name, the measurements that runs are compared by, in us, in the order of time."""
        return {name: [row[0] for row in self.ask(sql).rows] for name, (_, sql) in SAMPLES.items()}

    def _check(self, query: str) -> None:
        from duckdb import ExpectedResultType

        statements = self._connection.extract_statements(query)
        if len(statements) != 1:
            raise QueryError(f"a query is one statement, not {len(statements)}")
        if statements[0].expected_result_type != [ExpectedResultType.QUERY_RESULT]:
            raise QueryError("a query asks: it is a SELECT, a DESCRIBE or the like")


@contextlib.contextmanager
def open_database(run_dir: Path, notes: Notes, parquet: Path | None = None) -> Iterator[Database]:
    """The records of a run, loaded; what is odd about the files is added to `notes`.

    `parquet` is the only file that can be written: a new one. Raises `QueryError` if there are no record files.
    """
    import duckdb

    paths = sorted(path for path in (run_dir / "records").glob("*.jsonl") if path.is_file())  # no pipe, no device
    if not paths:
        raise QueryError(f"{run_dir} has no record files")
    settings = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false",
                "python_enable_replacements": "false", "preserve_insertion_order": "false"}  # fmt: skip
    with tempfile.TemporaryDirectory() as spill, _errors():
        connection = duckdb.connect(":memory:", config={**settings, "temp_directory": spill})
        try:
            _load(connection, paths, notes)
            connection.execute("SET allowed_paths = $paths", {"paths": [str(parquet)] if parquet else []})
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            yield Database(connection)
        finally:
            connection.close()


def _load(connection: DuckDBPyConnection, paths: list[Path], notes: Notes) -> None:
    """The table of all records, and the views over it."""
    types = ", ".join(f'"{name}": "{COMMON[name][0] if name in COMMON else "VARCHAR"}"' for name in _STORED)
    whole = " AND ".join(f"c.{name} IS NOT NULL" for name in _NEEDED)
    connection.execute(
        f"CREATE TABLE stored AS SELECT c.*, TRY_CAST(regexp_extract(c.node, '^cpu(\\d+)$', 1) AS INTEGER) AS on_cpu, "
        f"json AS fields, CASE WHEN {whole} THEN NULL ELSE filename END AS unreadable_in FROM "
        f"(SELECT json, filename, json_transform(json, '{{{types}}}') AS c FROM "
        "read_ndjson_objects($paths, ignore_errors = true, filename = true))",
        {"paths": [str(path) for path in paths]},
    )
    _note_oddities(connection, paths, notes)
    row = connection.execute("SELECT min(ts) FROM stored").fetchone()
    begin = row[0] if row and row[0] is not None else 0
    columns = ", ".join(f"(ts - {begin}) / 1e6 AS ms" if name == "ms" else name for name in COMMON)
    connection.execute(f"CREATE VIEW records AS SELECT {columns}, event, fields FROM stored")
    for macro, sql in MACROS.items():
        connection.execute(f"CREATE MACRO {macro} AS {sql}")
    for event in EVENTS:
        connection.execute(f"CREATE VIEW {event} AS {event_view(event)}")
    for name, view in VIEWS.items():
        connection.execute(f"CREATE VIEW {name} AS {view.sql}")


def _note_oddities(connection: DuckDBPyConnection, paths: list[Path], notes: Notes) -> None:
    """Lines that are no records and lines that came twice are taken out; what is missing is noted."""
    unreadable = "SELECT DISTINCT unreadable_in FROM stored WHERE unreadable_in IS NOT NULL ORDER BY 1"
    for (name,) in connection.execute(unreadable).fetchall():
        for _ in read_file(Path(name), notes):
            pass
    connection.execute("DELETE FROM stored WHERE unreadable_in IS NOT NULL")
    counts = "SELECT node, count(*), count(DISTINCT seq), max(seq) FROM stored GROUP BY node"
    for node, lines, records, last in connection.execute(counts).fetchall():
        if lines > records:
            notes.duplicates[node] += lines - records
            twice = "SELECT min(rowid) FROM stored WHERE node = $node GROUP BY seq"
            connection.execute(f"DELETE FROM stored WHERE node = $node AND rowid NOT IN ({twice})", {"node": node})
        if last > records:
            notes.gaps[node] += last - records
    online = "SELECT DISTINCT fields->>'name' FROM stored WHERE event = 'process_online' ORDER BY 1"
    expected = [LAUNCHER, *(name for (name,) in connection.execute(online).fetchall() if name not in (None, LAUNCHER))]
    present = {path.stem for path in paths}
    notes.missing += [node for node in expected if node not in present]


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What DuckDB refuses is told in one line."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        said = str(error).partition("\n\nLINE ")[0]
        raise QueryError(f"DuckDB says: {' '.join(said.split())}") from None
