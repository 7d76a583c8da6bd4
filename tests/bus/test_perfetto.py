"""The trace for the Perfetto UI: what it says, and that its slices nest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from history import INFO, Run
from synthetic import Synthetic

import bus.perfetto
from bus.perfetto import Trace
from bus.picture import Painter
from bus.records import Record

Event = dict[str, Any]
A = 0x1000


def trace_of(records: list[Record]) -> dict[str, Any]:
    """The file, decoded."""
    written: list[bytes] = []
    painter = Painter()
    trace = Trace(written.append, painter.activities)
    for record in records:
        painter.see(record)
        trace.see(record)
    trace.finish(painter.finish())
    decoded: dict[str, Any] = json.loads(b"".join(written))
    return decoded


def names(events: list[Event]) -> dict[tuple[int, int], str]:
    """Process and thread by their numbers: "cpu0 work"."""
    process = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    return {
        (e["pid"], e["tid"]): f"{process[e['pid']]} {e['args']['name']}" for e in events if e["name"] == "thread_name"
    }


def slices(events: list[Event]) -> dict[str, list[tuple[float, float, int, str]]]:
    """Begin, end, depth and name of the slices of each thread; fails unless they nest and are in time order."""
    events = [{"name": "", **event} for event in events]
    threads = names(events)
    found: dict[str, list[tuple[float, float, int, str]]] = {}
    stacks: dict[str, list[Event]] = {}
    now: dict[str, float] = {}
    for event in events:
        if event["ph"] not in "BE":
            continue
        thread = threads[event["pid"], event["tid"]]
        assert event["ts"] >= now.get(thread, 0), f"{thread} goes back in time"
        now[thread] = event["ts"]
        stack = stacks.setdefault(thread, [])
        if event["ph"] == "B":
            stack.append(event)
        else:
            begin = stack.pop()
            found.setdefault(thread, []).append((begin["ts"], event["ts"], len(stack), begin["name"]))
    assert not any(stacks.values()), "a slice has no end"
    return {thread: sorted(of) for thread, of in found.items()}


def test_work_is_nested() -> None:
    """A request holds the strategy, which holds the wait, then the hold, which holds the SEAMCALL."""
    run = Run().cpu(0, "reader").write("admin_begin", request=1, kind="read_version").begin(A).lock_request(1)
    run.lock_hold(1, 1).seamcall(INFO, lost=A).lock_drop(1).end(A)
    run.write("admin_end", request=1, kind="read_version", errno=0, text="").finish()
    work = slices(trace_of(run.records)["traceEvents"])["cpu0 work"]
    assert [(depth, name) for _, _, depth, name in work] == [
        (0, "read_version for user space"),
        (1, "seamldr_call(INFO)"),
        (2, "waits for a lock: seamldr_lock"),
        (2, "holds seamldr_lock"),
        (3, "in P-SEAMLDR: leaf0"),
    ]


def test_what_ends_under_others_ends_them_and_they_go_on() -> None:
    """A lock that is given back inside a later handler cuts the handler in two slices that nest."""
    run = Run().cpu(0).lock_hold(1, 1).write("irq_enter", vector=32).lock_drop(1).write("irq_exit", vector=32).finish()
    work = slices(trace_of(run.records)["traceEvents"])["cpu0 work"]
    assert [(depth, name) for _, _, depth, name in work] == [
        (0, "holds seamldr_lock"),
        (1, "interrupt 0x20"),
        (0, "interrupt 0x20"),
    ]


@pytest.mark.parametrize("replugged", [True, False])
def test_the_work_of_a_dead_cpu_ends_with_it(replugged: bool) -> None:
    """Open slices end when the launcher saw the process gone, also if another process takes its place."""
    run = Run().cpu(0).load(A).enter(A).exit("cpu0", wanted=False, status=-9).later(1)
    if replugged:
        run.cpu(0, "up").new_process().write("cpu_online")
    run.finish()
    found = slices(trace_of(run.records)["traceEvents"])
    death = next(record["ts"] for record in run.records if record["event"] == "process_exit")
    assert [(end, name) for _, end, _, name in found["cpu0 work"]] == [
        ((death - run.records[0]["ts"]) / 1000, "vcpu0"),
        ((death - run.records[0]["ts"]) / 1000, "guest"),
    ]
    assert "dead" in [name for *_, name in found["cpu0 state"]]


def test_a_long_history_nests_and_every_flow_has_slices_to_hold_on_to() -> None:
    """Slices nest in every thread; both ends of each flow lie in a slice of their thread."""
    trace = trace_of(list(Synthetic(5).records(3000)))
    events = trace["traceEvents"]
    found, threads = slices(events), names([{"name": "", **event} for event in events])
    assert {"cpu4 state", "cpu4 work", "seamldr state", "machine seamldr_lock"} <= found.keys()
    flows = [event for event in events if event["ph"] in "sf"]
    assert len(flows) > 200 and trace["otherData"]["flows"] == len(flows) / 2
    for event in flows:
        assert any(b <= event["ts"] <= e for b, e, *_ in found[threads[event["pid"], event["tid"]]])
    assert all(event["bp"] == "e" for event in flows if event["ph"] == "f")


def test_flows_are_capped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the cap flows are left out, and the file says how many."""
    monkeypatch.setattr(bus.perfetto, "FLOWS", 10)
    trace = trace_of(list(Synthetic(4).records(1000)))
    ids = {event["id"] for event in trace["traceEvents"] if event["ph"] in "sf"}
    assert ids == set(range(1, 11))
    assert trace["otherData"]["flows"] == 10 and trace["otherData"]["flows_left_out"] > 50


def test_two_holders_of_a_lock_do_not_overlap() -> None:
    """A hold that goes on beyond the next one is cut there, so that the thread of the lock nests."""
    run = Run().node("seamldr").grant(0, 1, 1).grant(1, 1, 2).release(0, 1).release(1, 2).finish()
    holds = slices(trace_of(run.records)["traceEvents"])["machine seamldr_lock"]
    assert [(begin, end, name) for begin, end, _, name in holds] == [(1000, 2000, "cpu0"), (2000, 4000, "cpu1")]


def test_counters_and_instants() -> None:
    """The queue of a lock is a counter of its service; a fault is an instant on the lane that it strikes."""
    run = Run().node("seamldr").queue(0, 1).queue(1, 1).grant(0, 1, 1).node("launcher")
    run.write("fault", kind="stop", name="cpu0", incarnation=1, what="").cpu(0).put(A).finish()
    events = trace_of(run.records)["traceEvents"]
    counted = [event for event in events if event["ph"] == "C"]
    assert [(e["name"], e["args"]["waiting"]) for e in counted] == [("wait for seamldr_lock", n) for n in (1, 2, 1)]
    (instant,) = [event for event in events if event["ph"] == "i"]
    assert names([{"name": "", **event} for event in events])[instant["pid"], instant["tid"]] == "cpu0 state"
