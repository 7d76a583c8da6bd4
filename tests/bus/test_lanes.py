"""Lanes: from a CPU's records to what it did when."""

from __future__ import annotations

import random
from itertools import pairwise

from history import INFO, Run
from synthetic import Synthetic

from bus.lanes import Interval, Lanes, State, cut
from bus.records import Record

A = 0x1000
MS = 1_000_000


def lanes_of(records: list[Record]) -> dict[str, tuple[Interval, ...]]:
    """The lanes of records in causal order."""
    lanes = Lanes()
    for record in records:
        lanes.see(record)
    return lanes.finish()


def states(run: Run, node: str) -> list[tuple[str, str, int]]:
    """State, what, and length in ms of each interval of a node's lane."""
    return [(i.state.name, i.what, (i.end - i.begin) // MS) for i in lanes_of(run.records)[node]]


def test_a_guest_runs_from_its_first_entry_until_its_vcpu_is_put() -> None:
    """A loaded vCPU is kernel work until it is entered; on the way a handler is kernel work too."""
    run = Run().cpu(0).write("task_enqueue", task=0).load(A).enter(A)
    run.cpu(0, "irq").write("irq_enter", vector=0xFB).write("irq_exit", vector=0xFB)
    run.cpu(0).put(A).finish()
    assert states(run, "cpu0") == [
        ("KERNEL", "", 3),
        ("KERNEL", "vcpu0", 1),
        ("GUEST", "vcpu0", 1),
        ("KERNEL", "interrupt 0xfb", 1),
        ("GUEST", "vcpu0", 1),
        ("KERNEL", "", 1),
    ]


def test_a_call_of_p_seamldr_waits_for_the_lock_and_is_inside() -> None:
    """A strategy is kernel work around its wait for the lock and its SEAMCALL; holding a lock is no state."""
    run = Run().cpu(0, "reader").begin(A).lock_request(1).later(1).lock_hold(1, 1).seamcall(INFO, lost=A)
    run.lock_drop(1).end(A).finish()
    assert states(run, "cpu0") == [
        ("KERNEL", "seamldr_call(INFO)", 1),
        ("LOCK", "seamldr_lock", 1001),
        ("KERNEL", "seamldr_call(INFO)", 1),
        ("P_SEAMLDR", "leaf0", 1),
        ("KERNEL", "seamldr_call(INFO)", 2),
        ("IDLE", "", 1),
    ]


def test_a_call_of_the_tdx_module_is_not_p_seamldr() -> None:
    """The state of a SEAMCALL follows from bit 63 of its leaf."""
    run = Run().cpu(0).seamcall(33)
    assert states(run, "cpu0")[0] == ("SEAM", "leaf33", 1)


def test_a_td_runs_until_the_cpu_does_something_else() -> None:
    """After TDH.VP.ENTER the CPU is in the TD, until a record of another context, handlers apart."""
    run = Run().cpu(0, "td0").write("td_enter", vcpu=8, td=0, status=0, counter=0)
    run.cpu(0, "irq").ipi_deliver(1, 1).cpu(0, "vcpu0").write("task_dequeue", task=8, to=1).finish()
    assert states(run, "cpu0") == [("SEAM", "runs td0", 2), ("IDLE", "", 1)]


def test_stop_machine_says_at_which_stage_it_is() -> None:
    """In stop_machine a lane tells the stage at hand, and which one is acknowledged."""
    run = Run().cpu(0, "stopper").write("stop_enter").enter_state("SHUTDOWN").ack("SHUTDOWN").write("stop_exit")
    run.finish()
    assert states(run, "cpu0") == [
        ("STOPPED", "waits for others", 1),
        ("STOPPED", "SHUTDOWN of update 1", 1),
        ("STOPPED", "SHUTDOWN acknowledged, update 1", 1),
        ("IDLE", "", 1),
    ]


def test_a_cpu_is_idle_only_without_tasks() -> None:
    """With a task on its run queue a CPU does kernel work between two things; a lost task is on it no more."""
    run = Run().cpu(0, "idle").write("task_enqueue", task=3).write("task_enqueue", task=4)
    run.write("task_dequeue", task=3, to=1).node("kvm").write("task_lost", task=4, cpu=0)
    run.cpu(0, "idle").write("task_dequeue", task=9, to=1).finish()
    assert states(run, "cpu0") == [("KERNEL", "", 4), ("IDLE", "", 1)]


def test_a_cpu_that_left_the_online_mask_is_offline() -> None:
    """Between cpu_offline and cpu_online there is one interval, whatever the CPU writes on its way."""
    run = Run().cpu(0, "down").write("cpu_offline").cpu(0, "up").write("vmxon", pa=0, result="ok").write("cpu_online")
    run.cpu(0, "idle").write("task_dequeue", task=1, to=1)
    assert states(run, "cpu0")[:2] == [("OFFLINE", "", 2), ("KERNEL", "", 1)]


def fault(run: Run, kind: str, name: str) -> Run:
    return run.node("launcher").write("fault", kind=kind, name=name, incarnation=1, what="")


def test_a_stop_is_cut_into_the_lane_by_time() -> None:
    """What the CPU did goes on before and after a SIGSTOP, also where the launcher's Lamport clock lags."""
    run = Run().cpu(0).load(A).enter(A).later(1)
    fault(run, "stop", "cpu0").later(1)
    fault(run, "resume", "cpu0").later(1).cpu(0).put(A)
    shown = [("GUEST", 1001), ("SIGSTOPPED", 1001), ("GUEST", 1001), ("IDLE", 0)]
    assert [(state, ms) for state, _, ms in states(run, "cpu0")][-4:] == shown
    lagging = sorted(run.records, key=lambda record: record["event"] != "fault")
    assert lanes_of(lagging)["cpu0"] == lanes_of(run.records)["cpu0"]


def test_a_stop_that_is_not_undone_lasts_until_the_end() -> None:
    """A CPU that is stopped when the history ends is stopped until then."""
    run = fault(Run().cpu(0).load(A).enter(A), "stop", "cpu0").later(1).finish()
    assert states(run, "cpu0")[-2:] == [("GUEST", "vcpu0", 1), ("SIGSTOPPED", "", 1001)]


def test_a_cpu_is_dead_until_its_successor_writes() -> None:
    """A process that was not asked to go leaves a dead lane; so does a stopped one that is killed."""
    run = Run().cpu(0).load(A).enter(A).later(1)
    fault(run, "stop", "cpu0").later(1).exit("cpu0", wanted=False, status=-9).later(1)
    run.cpu(0, "up").new_process().write("cpu_online").finish()
    shown = [(state, what, ms) for state, what, ms in states(run, "cpu0")][-3:]
    assert shown == [("SIGSTOPPED", "", 1001), ("DEAD", "by signal 9", 1001), ("KERNEL", "", 1)]


def test_a_cpu_that_was_asked_to_go_leaves_a_gap() -> None:
    """A lane has no interval where there was no process and nobody died."""
    run = Run().cpu(0, "idle").write("task_dequeue", task=1, to=1).exit("cpu0").later(1).finish()
    assert states(run, "cpu0") == [("IDLE", "", 1)]


def test_intervals_are_in_order_and_do_not_overlap() -> None:
    """However long the history, each interval of a lane ends before or where the next one begins."""
    for intervals in lanes_of(list(Synthetic(8).records(4000))).values():
        assert all(one.begin <= one.end <= other.begin for one, other in pairwise(intervals))
        assert all(one.end == other.begin for one, other in pairwise(intervals)), "there is a gap"


def some(rng: random.Random, state: State, gap: int) -> list[Interval]:
    """A few intervals in order, with gaps of at most `gap` before each."""
    found, now = [], 0
    for number in range(rng.randrange(5)):
        begin = now + rng.randint(0, gap)
        now = begin + rng.randint(1, 6)
        found.append(Interval(begin, now, state, str(number)))
    return found


def test_cutting_shows_at_each_moment_what_is_on_top() -> None:
    """At every moment the one on top is shown, else the one below, else nothing."""
    rng = random.Random(1)
    for _ in range(500):
        below, above = some(rng, State.GUEST, 2), some(rng, State.DEAD, 5)
        shown = list(cut(below, above))
        assert all(one.end <= other.begin for one, other in pairwise(shown))
        for moment in range(45):
            (found,) = at(moment, shown) or [None]
            assert found == next(iter(at(moment, above) + at(moment, below)), None)


def at(moment: int, intervals: list[Interval]) -> list[tuple[State, str]]:
    """What is shown just after a moment."""
    return [(i.state, i.what) for i in intervals if i.begin <= moment < i.end]


def test_a_service_is_there_from_the_first_sign_of_it() -> None:
    """Its first record may have an earlier `ts` than the launcher's word that it is online, whichever comes first."""
    run = Run().online("seamldr").later(1).node("seamldr").queue(0, 1).finish()
    online, queue = run.records[1:3]
    online["ts"], queue["ts"] = queue["ts"], online["ts"]
    assert [(i.begin, i.end) for i in lanes_of(run.records)["seamldr"]] == [(queue["ts"], run.records[-1]["ts"])]


def test_other_processes_just_run() -> None:
    """A lane of a process that is not a CPU shows when there was one, from when it was online."""
    run = Run().online("seamldr").later(1).node("seamldr").queue(0, 1).later(1).exit("seamldr", wanted=False, status=-9)
    run.later(1).online("seamldr", 2).finish()
    assert states(run, "seamldr") == [("RUNS", "", 2002), ("DEAD", "by signal 9", 1001), ("RUNS", "", 1)]
    assert lanes_of(run.records)["launcher"][0].state is State.RUNS
