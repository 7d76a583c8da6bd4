"""Vector time: it orders exactly what messages and processes order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from history import INFO, Run
from synthetic import Synthetic

from bus.records import Record
from bus.vector import SENT, TAKEN, VectorClocks, before

Clock = dict[str, int]


def clocks_of(run: Run) -> list[Clock]:
    """Vector time of each record."""
    clocks = VectorClocks()
    return [dict(clocks.see(record)) for record in run.records]


MESSAGES: dict[str, Callable[[Run], Run]] = {
    "ipi_send ipi_deliver": lambda run: run.cpu(0).ipi_send(1, 7).cpu(1).ipi_deliver(0, 7),
    "csd_lock csd_run": lambda run: run.cpu(0).csd_lock(1, 7).cpu(1).csd_run(0, 7),
    "csd_run csd_done": lambda run: run.cpu(1).csd_run(0, 7).cpu(0).csd_done(7),
    "lock_request lock_queue": lambda run: run.cpu(3).lock_request(1).node("seamldr").queue(3, 1),
    "lock_grant lock_hold": lambda run: run.node("seamldr").grant(3, 1, 9).cpu(3).lock_hold(1, 9),
    "lock_drop lock_release": lambda run: run.cpu(3).lock_drop(9).node("seamldr").release(3, 9),
    "seamcall_enter seam_enter": lambda run: seam(run, "seamcall_enter", "seam_enter"),
    "seam_return seamcall_return": lambda run: seam(run, "seam_return", "seamcall_return"),
    "request admin_begin": lambda run: run.request(1, "read_version").cpu(0).admin("read_version"),
}


def seam(run: Run, *wanted: str) -> Run:
    """Of a whole SEAMCALL these records alone."""
    run.cpu(3).seamcall(INFO).node("seamldr").seam_enter(3).seam_return(3)
    kept = {record["event"]: record for record in run.records}
    run.records = [run.records[0], *(kept[event] for event in wanted)]
    return run


@pytest.mark.parametrize("events", MESSAGES)
def test_what_was_sent_is_before_what_was_taken(events: str) -> None:
    """The two ends of each kind of message are ordered."""
    run = MESSAGES[events](Run())
    sent, taken = events.split()
    at = {record["event"]: clock for record, clock in zip(run.records, clocks_of(run), strict=True)}
    assert before(at[sent], at[taken]) and not before(at[taken], at[sent])


def test_every_kind_of_message_is_tested() -> None:
    """The table above has every event that sends or takes, and what is taken is of a kind that is sent."""
    assert {event for pair in MESSAGES for event in pair.split()} == SENT.keys() | TAKEN.keys()
    assert sorted(kind for kind, _ in SENT.values()) == sorted(kind for kind, _ in TAKEN.values())


def test_without_a_message_events_are_concurrent() -> None:
    """Lamport time orders all records; vector time leaves apart what no message joins."""
    clocks = clocks_of(Run().cpu(0).put(1).cpu(1).put(2))
    assert not before(clocks[1], clocks[2]) and not before(clocks[2], clocks[1])


def test_knowledge_goes_on_through_others() -> None:
    """What cpu0 did before its IPI to cpu1 is before what cpu2 does after cpu1's IPI to it, and nothing later is."""
    run = Run().cpu(0).put(1).ipi_send(1, 7).put(1).cpu(1).ipi_deliver(0, 7).ipi_send(2, 8).cpu(2).ipi_deliver(1, 8)
    clocks = clocks_of(run)
    assert before(clocks[1], clocks[-1]) and not before(clocks[3], clocks[-1])
    assert clocks[-1] == {"cpu0": 2, "cpu1": 2, "cpu2": 1}


def reachable(records: list[Record]) -> list[set[int]]:
    """For each record those that are before it, found by walking: of its node, and from what it takes."""
    last: dict[str, int] = {}
    sent: dict[tuple[object, ...], int] = {}
    found: list[set[int]] = []
    for i, record in enumerate(records):
        causes = {last[record["node"]]} if record["node"] in last else set()
        if record["event"] == "ipi_deliver" and ("ipi", record["id"]) in sent:
            causes.add(sent["ipi", record["id"]])
        if record["event"] in ("lock_queue", "lock_grant", "lock_hold", "lock_release"):
            causes |= {sent[key] for key in (("request", record.get("request")), ("token", record.get("number")))
                       if key in sent and record["event"] != "lock_grant"}  # fmt: skip
        found.append(causes.union(*(found[cause] for cause in causes)))
        last[record["node"]] = i
        match record["event"]:
            case "ipi_send":
                sent["ipi", record["id"]] = i
            case "lock_request":
                sent["request", record["request"]] = i
            case "lock_grant" | "lock_drop":
                sent["token", record["number"]] = i
    return found


def test_vector_time_is_reachability() -> None:
    """On a long history one event is before another exactly if a path of messages and processes leads to it."""
    records = list(Synthetic(6).records(400))
    clocks = VectorClocks()
    times = [dict(clocks.see(record)) for record in records]
    for i, causes in enumerate(reachable(records)):
        assert {j for j, time in enumerate(times) if before(time, times[i])} == causes
