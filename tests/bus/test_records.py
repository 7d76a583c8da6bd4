"""The writer of records: what a line holds, that it survives, and that a restarted process goes on."""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path

import msgspec
import pytest

from bus.clock import LamportClock
from bus.events import EVENTS, NONE
from bus.merge import Notes, read_file
from bus.records import TAIL_BYTES, Record, complaint, open_records


def lines(path: Path) -> list[Record]:
    """All records of a file."""
    return [msgspec.json.decode(line, type=Record) for line in path.read_bytes().splitlines()]


def test_a_record_has_the_common_fields_first(tmp_path: Path) -> None:
    """A line begins with ts, clock, node, pid, seq and event; then come its own fields."""
    path = tmp_path / "cpu0.jsonl"
    recorder = open_records(path, "cpu0", LamportClock(41))
    assert recorder.emit("vmptrst", value=NONE, result="ok") == 42
    recorder.close()
    (record,) = lines(path)
    assert list(record) == ["ts", "clock", "node", "pid", "seq", "event", "value", "result"]
    ts = record.pop("ts")
    assert ts > 0 and record == {
        "clock": 42,
        "node": "cpu0",
        "pid": os.getpid(),
        "seq": 1,
        "event": "vmptrst",
        "value": NONE,
        "result": "ok",
    }


def test_a_table_event_may_have_a_field_of_any_name(tmp_path: Path) -> None:
    """Every event of the table can be written: no field name collides with the writer's own parameters."""
    recorder = open_records(tmp_path / "x.jsonl", "x", LamportClock())
    for event, row in EVENTS.items():
        recorder.emit(event, **dict.fromkeys(row.fields, 0))
    recorder.close()
    written = lines(tmp_path / "x.jsonl")
    assert [record["event"] for record in written] == list(EVENTS)
    assert [complaint(record) for record in written] == [None] * len(EVENTS)


def test_the_clock_ticks_once_for_each_event(tmp_path: Path) -> None:
    """emit returns the time that it wrote, and what is heard in between moves it on."""
    clock = LamportClock()
    recorder = open_records(tmp_path / "x.jsonl", "x", clock)
    times = [recorder.emit("cpu_online")]
    clock.merge(100)
    times.append(recorder.emit("cpu_offline"))
    recorder.close()
    assert times == [1, 101] == [record["clock"] for record in lines(tmp_path / "x.jsonl")]


def test_trace_events_are_dropped_but_have_a_time(tmp_path: Path) -> None:
    """Without tracing emit_trace writes nothing and returns the time all the same; with it, it is emit."""
    for trace, written in ((False, 0), (True, 1)):
        recorder = open_records(tmp_path / f"{trace}.jsonl", "x", LamportClock(6), trace)
        assert recorder.emit_trace("cpu_online") == 7
        assert recorder.written == written and recorder.tracing is trace
        recorder.close()


def test_the_context_hook_adds_fields(tmp_path: Path) -> None:
    """While a context is set its fields are in each record."""
    recorder = open_records(tmp_path / "x.jsonl", "x", LamportClock())
    recorder.context = lambda: {"ctx": "irq", "irqs": False}
    recorder.emit("cpu_online")
    recorder.context = None
    recorder.emit("cpu_online")
    recorder.close()
    first, second = lines(tmp_path / "x.jsonl")
    assert (first["ctx"], first["irqs"]) == ("irq", False) and "ctx" not in second


def test_lines_survive_sigkill(tmp_path: Path) -> None:
    """All that emit returned from is in the file when its process is killed at once."""
    path = tmp_path / "x.jsonl"
    pid = os.fork()
    if pid == 0:
        recorder = open_records(path, "x", LamportClock())
        for _ in range(200):
            recorder.emit("cpu_online")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [record["seq"] for record in lines(path)] == list(range(1, 201))


def test_whatever_emit_returned_from_survives_a_kill_from_outside(tmp_path: Path) -> None:
    """A process that is killed while it writes, at no moment of its choosing, has lost nothing that it counted."""
    path, counted = tmp_path / "x.jsonl", mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        recorder = open_records(path, "x", LamportClock())
        while True:
            recorder.emit("log", text="x" * 100)
            counted[:] = recorder.written.to_bytes(8, "little")
    while int.from_bytes(counted[:], "little") < 500:
        os.sched_yield()
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    notes = Notes()
    seqs = [record["seq"] for record in read_file(path, notes)]
    assert seqs == list(range(1, len(seqs) + 1)) and len(seqs) >= int.from_bytes(counted[:], "little") >= 500
    assert not notes.bad and notes.torn.total() <= 1


@pytest.mark.parametrize("torn", [b"", b'{"ts":5,"clock":9', b'{"ts":5}', b'{"text":"\xff"}'])
def test_a_restarted_process_goes_on(tmp_path: Path, torn: bytes) -> None:
    """A second writer of a file takes sequence and clock from its last whole line, and ends a torn one."""
    path = tmp_path / "x.jsonl"
    recorder = open_records(path, "x", LamportClock(70))
    recorder.emit("cpu_online")
    recorder.close()
    with path.open("ab") as file:
        file.write(torn)
    recorder = open_records(path, "x", LamportClock())
    assert recorder.emit("cpu_offline") == 72
    recorder.close()
    last = path.read_bytes().splitlines()[-1]
    assert msgspec.json.decode(last, type=Record)["seq"] == 2


def test_a_long_file_is_not_read_whole(tmp_path: Path) -> None:
    """Going on looks at the tail of the file only."""
    path = tmp_path / "x.jsonl"
    line = b'{"clock":3,"seq":1}\n'
    path.write_bytes(b'{"clock":900,"seq":900}\n' + line * (TAIL_BYTES // len(line) + 1))
    recorder = open_records(path, "x", LamportClock())
    assert recorder.emit("cpu_online") == 4
    recorder.close()


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    """A missing folder is told at once."""
    with pytest.raises(FileNotFoundError):
        open_records(tmp_path / "none" / "x.jsonl", "x", LamportClock())


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"event": "cpu_onlin"}, "unknown event 'cpu_onlin'"),
        ({"event": "vmptrst", "value": 1}, "vmptrst: fields missing ['result'], fields unknown []"),
        ({"event": "cpu_online", "x": 1}, "cpu_online: fields missing [], fields unknown ['x']"),
        ({"event": "cpu_online", "ctx": "idle", "irqs": True}, None),
    ],
)
def test_names_are_checked_against_the_table(record: Record, says: str | None) -> None:
    """complaint() tells an unknown event, a missing field and a field that the table does not know."""
    assert complaint(record) == says
