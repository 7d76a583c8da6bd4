"""SQL over the records of a run: its tables, odd files, and that a query can change nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import msgspec
import pytest
from databases import rows, write_run
from history import Run

from bus.columns import COMMON, event_columns
from bus.events import EVENTS
from bus.merge import Notes
from bus.sql import Database, QueryError, open_database
from bus.views import VIEWS, VMX_ERRORS
from cpu.vmx.errors import VmInstructionError


def locks() -> Run:
    """A history with a lock, on two CPUs."""
    run = Run().online("cpu0").online("cpu1").cpu(0, "reader").lock_request(1).lock_hold(1, 1).lock_drop(1)
    return run.cpu(1, "idle").write("counters", counts={"vmread": 3})


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """The database of that history."""
    run_dir = write_run(locks(), tmp_path_factory.mktemp("runs") / "run")
    with open_database(run_dir, Notes()) as opened:
        yield opened


# Tables


def test_records_has_the_common_columns_the_event_and_the_whole_record(database: Database) -> None:
    """`records` has the documented columns with their types; `fields` is the record as it was written."""
    answer = database.ask("SELECT * FROM records WHERE event = 'lock_drop'")
    expected = {name: kind for name, (kind, _) in COMMON.items()} | {"event": "VARCHAR", "fields": "JSON"}
    assert dict(zip(answer.columns, answer.types, strict=True)) == expected
    (row,) = answer.rows
    assert row[:9] == (6_000_000, 5.0, 6, "cpu0", 0, 100, 3, "reader", True)
    assert msgspec.json.decode(row[-1]) == locks().records[5]


def test_every_event_has_a_view_with_typed_columns(database: Database) -> None:
    """A view an event: the common columns, then its own fields with the types that the docs give."""
    common = {name: kind for name, (kind, _) in COMMON.items()}
    for event in EVENTS:
        answer = database.ask(f"SELECT * FROM {event}", 1)
        assert dict(zip(answer.columns, answer.types, strict=True)) == common | event_columns(event), event


def test_joined_views_have_the_documented_columns(database: Database) -> None:
    """The columns of each joined view are those that it documents, in that order."""
    for name, view in VIEWS.items():
        assert database.ask(f"SELECT * FROM {name}", 1).columns == list(view.columns), name


def test_vmx_error_numbers_are_those_of_the_vmx_unit() -> None:
    """Each VM-instruction error that has words is one that the unit knows."""
    assert VMX_ERRORS.keys() <= set(VmInstructionError)


def test_values_keep_their_full_width(tmp_path: Path) -> None:
    """An address of 64 bits, an object, a flag written as a number: each arrives as what it is."""
    run = Run().cpu(0).cv(2**64 - 1).vcpu_load(1, skipped=True).write("counters", counts={"exits": 2})
    query = 'SELECT (SELECT "new" FROM cv_write), (SELECT skipped FROM vcpu_load), (SELECT counts FROM counters)'
    assert rows(run, query, tmp_path) == [(2**64 - 1, True, '{"exits":2}')]


# Odd files


def test_torn_and_foreign_lines_are_noted_and_skipped(tmp_path: Path) -> None:
    """A torn last line, garbage in the middle, valid JSON that is no record: the rest is there, and each is noted."""
    run_dir = write_run(locks(), tmp_path / "run")
    cpu0, cpu1 = (run_dir / "records" / f"{node}.jsonl" for node in ("cpu0", "cpu1"))
    cpu0.write_bytes(cpu0.read_bytes()[:-20])
    cpu1.write_bytes(b"\xff\xc3{garbage\n[1, 2]\nnull\n" + cpu1.read_bytes())
    notes = Notes()
    with open_database(run_dir, notes) as database:
        assert database.ask("SELECT count(*) FROM records").rows == [(len(locks().records) - 1,)]
        assert database.ask("SELECT count(*) FROM lock_hold").rows == [(1,)]
    assert (notes.torn, notes.bad) == ({"cpu0": 1, "cpu1": 1}, {"cpu1": 2})


def test_lines_that_came_twice_count_once(tmp_path: Path) -> None:
    """Records that are in a file twice are noted and are one row each."""
    run_dir = write_run(locks(), tmp_path / "run")
    path = run_dir / "records" / "cpu0.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    notes = Notes()
    with open_database(run_dir, notes) as database:
        assert database.ask("SELECT seq FROM records WHERE node = 'cpu0' ORDER BY seq").rows == [(1,), (2,), (3,)]
    assert notes.sentences == ["cpu0 has records that came twice (3)"]


def test_missing_files_and_gaps_are_noted(tmp_path: Path) -> None:
    """A process that said hello and has no file, and records that are missing in a file, are told."""
    run_dir = write_run(locks(), tmp_path / "run")
    (run_dir / "records" / "cpu1.jsonl").unlink()
    path = run_dir / "records" / "cpu0.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes((first + third) * 2)
    notes = Notes()
    with open_database(run_dir, notes):
        pass
    assert notes.sentences == [
        "cpu1 has no record file",
        "cpu0 lacks records",
        "cpu0 has records that came twice (2)",
    ]


def test_a_process_that_wrote_nothing_is_no_error(tmp_path: Path) -> None:
    """An empty record file has no rows; a run with nothing but empty files has tables all the same."""
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "launcher.jsonl").touch()
    with open_database(tmp_path, Notes()) as database:
        assert database.ask("SELECT * FROM vmx_errors").rows == []


def test_a_run_without_files_is_refused(tmp_path: Path) -> None:
    """There is nothing to ask where no process has written."""
    (tmp_path / "records").mkdir()
    with pytest.raises(QueryError, match="has no record files"), open_database(tmp_path, Notes()):
        pass


# What a query cannot do


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text('{records}')",
        "SELECT * FROM '{records}'",
        "SELECT * FROM read_csv('{elsewhere}')",
        "COPY (SELECT 1) TO '{records}'",
        "COPY records TO '{elsewhere}'",
        "ATTACH '{elsewhere}'",
        "EXPORT DATABASE '{elsewhere}'",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "RESET allowed_paths",
        "INSTALL httpfs",
        "LOAD httpfs",
        "DROP TABLE stored",
        "DELETE FROM stored",
    ],
)
def test_a_query_reaches_no_file(query: str, database: Database, tmp_path: Path) -> None:
    """Neither the record files nor any other can be read or written, and what was loaded cannot be changed."""
    records, elsewhere = tmp_path / "cpu0.jsonl", tmp_path / "elsewhere"
    records.write_text("{}\n")
    with pytest.raises(QueryError):
        database.ask(query.format(records=records, elsewhere=elsewhere))
    assert records.read_text() == "{}\n" and list(tmp_path.iterdir()) == [records]
    assert database.ask("SELECT count(*) FROM stored").rows == [(len(locks().records),)]


def test_no_setting_can_be_changed(database: Database) -> None:
    """Should a statement get past the check that it asks, it finds the settings locked."""
    with pytest.raises(duckdb.Error, match="locked"):
        database._connection.execute("SET allowed_paths = ['/tmp']")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELEKT 1", "syntax error"),
        ("SELECT * FROM lock_wait", "lock_wait does not exist"),
        ("SELECT nope FROM records", '"nope" not found'),
        ("SELECT CAST(node AS INTEGER) FROM records", "Could not convert"),
        ("SELECT error('two' || chr(10) || 'lines')", "two lines"),
        ("", "one statement, not 0"),
        ("-- nothing", "one statement, not 0"),
        ("SELECT 1; SELECT 2", "one statement, not 2"),
        ("CREATE TABLE mine AS SELECT 1", "a query asks"),
        ("SELECT $1", "parameter"),
    ],
)
def test_a_bad_query_is_one_line(query: str, says: str, database: Database) -> None:
    """What is wrong with a query is told in one line."""
    with pytest.raises(QueryError) as caught:
        database.ask(query)
    assert says in str(caught.value) and "\n" not in str(caught.value) and "LINE 1" not in str(caught.value)


@pytest.mark.parametrize(
    "query", ["SHOW TABLES", "DESCRIBE lock_waits", "EXPLAIN SELECT 1", "WITH x AS (SELECT 1) FROM x"]
)
def test_what_asks_is_a_query(query: str, database: Database) -> None:
    """Not only a SELECT asks."""
    assert database.ask(query).rows


def test_parquet_is_the_one_file_that_is_written(tmp_path: Path) -> None:
    """The answer goes to the file that was named beforehand, and to no other."""
    run_dir = write_run(locks(), tmp_path / "run")
    out = tmp_path / "out.parquet"
    with open_database(run_dir, Notes(), out) as database:
        database.write_parquet("SELECT node, count(*) AS records FROM records GROUP BY node ORDER BY node", out)
        with pytest.raises(QueryError, match="Cannot access file"):
            database.write_parquet("SELECT 1", tmp_path / "other.parquet")
        found = database.ask(f"SELECT * FROM '{out}'").rows
    assert found == [("cpu0", 3), ("cpu1", 1), ("launcher", 3)]


def test_duckdb_is_loaded_only_for_a_query() -> None:
    """The command line and the judge do without DuckDB, and DuckDB without pandas, numpy and pytz."""
    code = (
        "import sys, launcher, bus.sql\n"
        "assert 'duckdb' not in sys.modules\n"
        "import duckdb\n"
        "assert duckdb.connect().execute('SELECT 1').fetchall() == [(1,)]\n"
        "assert not {'pandas', 'numpy', 'pytz'} & sys.modules.keys()\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
