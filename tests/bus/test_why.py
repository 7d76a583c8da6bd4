"""What `why` makes of records: what each process waits for, since when, the cycle, and where the waits lead to."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from history import INSTALL, SECOND, Run, save
from rich.console import Console

from bus.report_why import nodes_text, print_why, why_as_dict
from bus.snapshot import RunError, look
from bus.why import Edge, Inquiry, Row, Why

ALIVE = {"cpu0": "asleep", "cpu1": "asleep", "cpu2": "asleep", "seamldr": "asleep", "kvm": "asleep"}


def ask(run: Run, states: Mapping[str, str] = ALIVE, *, running: bool = True, after_s: float = 1.0) -> Why:
    """The answer `after_s` seconds after the last record."""
    inquiry = Inquiry(run.records[0])
    for record in run.records:
        inquiry.see(record)
    return inquiry.conclude(run.records[-1]["ts"] + int(after_s * SECOND), states if running else {}, running)


def row(why: Why, node: str) -> Row:
    """The row of one process."""
    return next(row for row in why.processes if row.node == node)


def edges(why: Why) -> set[tuple[str, str, str]]:
    """The graph without times."""
    return {(edge.node, edge.on, edge.kind) for edge in why.graph}


def text(why: Why) -> str:
    """What a terminal of 160 columns shows."""
    out = io.StringIO()
    print_why(Console(file=out, width=160), why)
    return out.getvalue()


# What a process waits for


def test_a_wait_for_a_lock_names_its_holder() -> None:
    """Who holds it, since when, under which token; who waits, since when, and in which order."""
    run = Run().cpu(0).lock_request(1).node("seamldr").queue(0, 1).grant(0, 1, 7).cpu(0).lock_hold(1, 7)
    held = run.records[-1]["ts"] - run.records[0]["ts"]
    for number in (2, 1):
        run.later().cpu(number, "reader", irqs=False).lock_request(1).node("seamldr").queue(number, 1)
    why = ask(run)
    assert row(why, "cpu1").what == "waits for seamldr_lock, held by cpu0 under token 1.7 for 5.0 s, interrupts off"
    assert (row(why, "cpu1").on, row(why, "cpu1").context) == (("cpu0",), "reader")
    assert row(why, "cpu1").for_s == pytest.approx(1.001)
    assert row(why, "cpu0").what == "idle: nothing is under way"
    assert [within.what for within in row(why, "cpu0").within] == ["holds seamldr_lock, token 1.7"]
    (lock,) = why.locks
    assert (lock.lock, lock.holder, lock.epoch, lock.number) == ("seamldr_lock", "cpu0", 1, 7)
    assert (lock.since_s, lock.queue) == (held / SECOND, ("cpu2", "cpu1"))
    assert row(why, "seamldr").what == "serves: seamldr_lock is held by cpu0"
    assert [(root.node, root.waiting) for root in why.roots] == [("cpu0", ("cpu1", "cpu2"))]


def test_a_grant_on_its_way_is_no_wait_for_a_holder() -> None:
    """A request that its service has granted, and one that it has not answered yet."""
    why = ask(Run().cpu(0).lock_request(1).node("seamldr").queue(0, 1).grant(0, 1, 7))
    assert row(why, "cpu0").what == "waits for seamldr_lock, which is granted and on its way"
    why = ask(Run().cpu(0).lock_request(1))
    assert row(why, "cpu0").what == "waits for seamldr_lock, which nobody holds: its service has to answer"
    assert why.graph == () and why.locks[0].queue == ("cpu0",)


def test_a_lock_that_is_given_back_is_not_held() -> None:
    """Its holder has let go and waits elsewhere, the service has not heard of it: no deadlock."""
    run = Run().cpu(0).lock_request(1).node("seamldr").queue(0, 1).grant(0, 1, 7).cpu(0).lock_hold(1, 7)
    run.cpu(1, irqs=False).lock_request(1, lock="b").lock_hold(1, 1, lock="b").lock_request(2)
    run.cpu(0, irqs=False).lock_drop(7)
    why = ask(run.lock_request(2, lock="b"))
    assert row(why, "cpu1").what.startswith("waits for seamldr_lock, given back by cpu0: its service has to take it")
    assert edges(why) == {("cpu0", "cpu1", "lock")} and why.cycle == ()


def test_who_waits_for_a_service_that_cannot_serve() -> None:
    """Its process is stopped: a lock request and a SEAMCALL wait for it; else they are no waits for a process."""
    run = Run().node("seamldr").write("lock_queue", lock="x", by=3, request=1, level=0, depth=1)
    run.cpu(0).lock_request(1).cpu(1, "kworker", irqs=False).write(
        "seamcall_enter", leaf=INSTALL, name="SEAMLDR.INSTALL", attempt=1, cur=0, epoch=1, number=1
    )
    assert edges(ask(run)) == set()
    why = ask(run, ALIVE | {"seamldr": "stopped"})
    assert edges(why) == {("cpu0", "seamldr", "lock"), ("cpu1", "seamldr", "seam")}
    assert row(why, "cpu1").what == "in P-SEAMLDR: SEAMLDR.INSTALL"
    assert [(root.node, root.state, root.waiting) for root in why.roots] == [("seamldr", "stopped", ("cpu0", "cpu1"))]


def deadlock() -> Run:
    """Hazard D2: CPU 0 waits for a call to CPU 1 under the lock that CPU 1 wants, interrupts off; 2 wants it too."""
    run = Run().cpu(0, "reader", irqs=False).lock_request(1).lock_hold(1, 1).csd_lock(1, 7)
    run.cpu(1, "reader", irqs=False).lock_request(1).cpu(2, "reader", irqs=False).lock_request(1)
    return run.request(9, "install")


def test_a_cycle_is_found_and_marked() -> None:
    """Two CPUs that wait for each other; a third and user space wait behind them, and lead to no other root."""
    why = ask(deadlock())
    assert set(why.cycle) == {"cpu0", "cpu1"} and why.behind_cycle == ("cpu2", "kvm") and why.roots == ()
    assert {(edge.node, edge.on) for edge in why.graph if edge.in_cycle} == {("cpu0", "cpu1"), ("cpu1", "cpu0")}
    assert row(why, "cpu0").what == "waits for cpu1 to run clear, interrupts off"
    shown = text(why)
    assert shown.count("<- cycle") == 2
    assert "Deadlock: cpu0 -> cpu1 -> cpu0. No time will end this." in shown or "cpu1 -> cpu0 -> cpu1" in shown
    assert "Behind it: cpu2, kvm." in shown


def test_a_call_to_a_cpu_that_takes_interrupts_is_no_deadlock() -> None:
    """The target waits for the caller's lock, but with interrupts on: it will run the call."""
    run = Run().cpu(0, "reader", irqs=False).lock_request(1).lock_hold(1, 1).csd_lock(1, 7).cpu(1).lock_request(1)
    assert ask(run).cycle == ()


def test_a_dead_holder_is_the_root() -> None:
    """Its death is on record; who waits, waits in the end for a dead process."""
    run = Run().cpu(0).lock_request(1).lock_hold(1, 1).cpu(1, irqs=False).lock_request(1)
    why = ask(run.exit("cpu0", wanted=False, status=-9))
    assert row(why, "cpu0").state == "dead"
    assert "held by cpu0 (dead)" in row(why, "cpu1").what
    assert [(root.node, root.state, root.waiting) for root in why.roots] == [("cpu0", "dead", ("cpu1",))]


# An update that is stuck


def half_done() -> Run:
    """CPUs 0 and 1 have acknowledged SHUTDOWN, CPU 2 works at it."""
    run = Run().cpu(0, "kworker").update_begin(online=(0, 1, 2))
    for number in range(3):
        run.cpu(number, f"migration/{number}").write("stop_enter")
    for number in range(3):
        run.cpu(number, f"migration/{number}", irqs=False).enter_state("SHUTDOWN")
    for number in range(2):
        acknowledge(run, number, "SHUTDOWN")
    return run


def acknowledge(run: Run, number: int, state: str, ret: int = 0) -> Run:
    """As the kernel does: under the lock of update control."""
    run.cpu(number, f"migration/{number}", irqs=False).lock_request(5, lock="update").lock_hold(5, 1, lock="update")
    return run.ack(state, ret).lock_drop(1, lock="update")


def test_a_stuck_update_names_who_has_not_acknowledged_which_stage() -> None:
    """Who has acknowledged waits for the stage, the stage for who has not, and that one is stopped."""
    why = ask(half_done(), ALIVE | {"cpu2": "stopped"})
    assert row(why, "cpu0").what == "has acknowledged SHUTDOWN of update 1, waits for cpu2"
    assert [within.what for within in row(why, "cpu0").within] == ["in stop_machine", "runs update 1"]
    assert row(why, "cpu2").what == "works at stage SHUTDOWN of update 1"
    stage = "stage SHUTDOWN of update 1"
    assert edges(why) == {("cpu0", stage, "stage"), ("cpu1", stage, "stage"), (stage, "cpu2", "stage")}
    assert why.update is not None and (why.update.stage, why.update.missing, why.update.late) == (
        "SHUTDOWN",
        ("cpu2",),
        (),
    )
    assert [(root.node, root.state, root.waiting) for root in why.roots] == [("cpu2", "stopped", ("cpu0", "cpu1"))]
    assert "acknowledged by 2 of 3; not acknowledged: cpu2" in text(why)


def test_a_cpu_that_does_not_come_to_stop_machine() -> None:
    """Before all have come nobody runs the callback: those that came wait for the one that did not."""
    run = Run().cpu(0, "kworker").update_begin(online=(0, 1))
    why = ask(run.cpu(0, "migration/0").write("stop_enter").cpu(1, "reader").csd_lock(2, 7))
    stop = "stop_machine of update 1"
    assert edges(why) == {("cpu0", stop, "stop"), (stop, "cpu1", "stop"), ("cpu1", "cpu2", "call")}
    assert row(why, "cpu0").what == "in stop_machine, waits for cpu1 to come"
    assert why.update is not None and why.update.late == ("cpu1",)


def test_a_failed_update_is_left_by_all_but_one() -> None:
    """A CPU that failed leaves the callback, and waits in stop_machine for those that are still in it."""
    run = acknowledge(half_done(), 2, "SHUTDOWN").advance("CPU_INSTALL")
    for number in range(3):
        run.cpu(number, f"migration/{number}", irqs=False).enter_state("CPU_INSTALL")
    why = ask(acknowledge(run, 0, "CPU_INSTALL", ret=-5))
    assert row(why, "cpu0").what == "has acknowledged CPU_INSTALL of update 1, leaves the callback"
    stop = "stop_machine of update 1"
    assert {edge for edge in edges(why) if edge[2] == "stop"} >= {("cpu0", stop, "stop"), (stop, "cpu2", "stop")}
    assert why.update is not None and why.update.failed == 1


def test_the_lock_around_an_acknowledgement_makes_no_deadlock() -> None:
    """Between its acknowledgement and its release a CPU has no wait yet: who wants that lock is not stuck."""
    run = half_done()
    run.cpu(2, "migration/2", irqs=False).lock_request(6, lock="update").lock_hold(6, 2, lock="update").ack("SHUTDOWN")
    run.advance("CPU_INSTALL").lock_drop(2, lock="update")
    for number in range(3):
        run.cpu(number, f"migration/{number}", irqs=False).enter_state("CPU_INSTALL")
    run.lock_request(7, lock="update").lock_hold(7, 3, lock="update").ack("CPU_INSTALL")
    run.cpu(1, "migration/1", irqs=False).lock_request(8, lock="update")
    assert ask(run).cycle == ()


def test_a_lock_kept_in_the_lock_step_is_a_deadlock() -> None:
    """Who waits for the stage with a lock that another CPU needs to acknowledge it never goes on."""
    run = Run().cpu(0, "reader").lock_request(1).lock_hold(1, 1)
    run.cpu(0, "kworker").update_begin(online=(0, 1))
    for number in range(2):
        run.cpu(number, f"migration/{number}").write("stop_enter")
        run.cpu(number, f"migration/{number}", irqs=False).enter_state("SHUTDOWN")
    acknowledge(run, 0, "SHUTDOWN").cpu(1, "migration/1", irqs=False).lock_request(1)
    why = ask(run)
    assert set(why.cycle) == {"cpu0", "cpu1", "stage SHUTDOWN of update 1"}
    assert [violation.invariant for violation in run.finish(False).judge().violations][:1] == ["I50"]


def test_who_sleeps_for_a_lock_does_not_keep_its_stopper() -> None:
    """With `preemption=rt` a thread sleeps for a plain lock, interrupts on; the stopper works meanwhile."""
    run = Run().cpu(0, "reader").lock_request(1).lock_hold(1, 1).cpu(1, "reader").lock_request(1)
    run.cpu(0, "kworker").update_begin(online=(0, 1))
    for number in range(2):
        run.cpu(number, f"migration/{number}").write("stop_enter")
        run.cpu(number, f"migration/{number}", irqs=False).enter_state("SHUTDOWN")
    assert ask(acknowledge(run, 0, "SHUTDOWN")).cycle == ()


# What else a process may be doing


def test_a_vcpu_is_in_guest_mode_or_only_loaded() -> None:
    """An entry since the load tells; a vCPU that was put leaves an idle CPU behind."""
    run = Run().cpu(0).load(0x1000)
    assert row(ask(run), "cpu0").what == "vcpu0 is loaded, not entered yet"
    assert row(ask(run.enter(0x1000, "vmlaunch")), "cpu0").what == "runs vcpu0: in guest mode, or between two entries"
    idle = row(ask(run.put(0x1000)), "cpu0")
    assert (idle.what, idle.context, idle.for_s) == ("idle: nothing is under way", "idle", 1.0)


def test_a_handler_is_the_innermost() -> None:
    """An interrupt on top of a strategy on top of a request: the handler, within the others, the nearest first."""
    run = Run().cpu(0, "reader").write("admin_begin", request=4, kind="read_version").begin(0)
    run.cpu(0, "irq", irqs=False).write("irq_enter", vector=0xFB)
    why = row(ask(run), "cpu0")
    assert why.what == "handles interrupt 0xfb"
    assert [within.what for within in why.within] == [
        "in seamldr_call(INFO), in reader",
        "serves request 4 (read_version) in reader",
    ]


def test_an_offline_cpu_and_a_td() -> None:
    """A CPU that has left the online mask says so; of a TD only the last return is on record."""
    run = Run().cpu(0, "cpuhp/0").write("cpu_offline")
    why = ask(run.cpu(1, "td0").write("td_enter", vcpu=1, td=0, status=0, counter=1))
    assert (row(why, "cpu0").what, row(why, "cpu1").what) == ("is offline", "ran td0 last")


def test_user_space_waits_for_its_requests() -> None:
    """Those without an end, the first three by name, and since the oldest."""
    run = Run()
    for number in range(5):
        run.request(number, "read_version")
    run.cpu(0, "reader").write("admin_begin", request=0, kind="read_version")
    run.write("admin_end", request=0, kind="read_version", errno=0, text="")
    kvm = row(ask(run), "kvm")
    named = ", ".join(f"{number} (read_version, cpu0)" for number in (1, 2, 3))
    assert kvm.what == f"waits for answers to requests {named} and 1 more"
    assert kvm.on == ("cpu0",)
    assert [edge.what for edge in ask(run).graph] == ["to answer request 1 (read_version) and 3 more"]


def test_a_process_that_began_anew_is_in_the_middle_of_nothing() -> None:
    """What a CPU had begun died with its process."""
    run = Run().cpu(0).lock_request(1).exit("cpu0", wanted=False).online("cpu0", 2).cpu(0).new_process()
    why = ask(run.write("cpu_online"))
    assert (row(why, "cpu0").state, row(why, "cpu0").what) == ("asleep", "idle: nothing is under way")


@pytest.mark.parametrize(("kind", "state"), [("stop", "stopped"), ("standstill", "stands still")])
def test_a_fault_holds_a_process(kind: str, state: str) -> None:
    """In a machine that has ended only the records tell; after the process has gone on it is held no longer."""
    run = Run().cpu(0).lock_request(1).node("launcher")
    run.write("fault", kind=kind, name="cpu0", incarnation=1, what="here")
    assert row(ask(run, running=False), "cpu0").state == state
    run.node("launcher").write("fault", kind="resume", name="cpu0", incarnation=1, what="")
    assert row(ask(run.cpu(0).lock_hold(1, 1).finish(False), running=False), "cpu0").state == "alive"


def test_what_a_process_said_when_it_was_asked() -> None:
    """A stuck machine has asked its processes: answers are shown, silence is a state."""
    run = Run().cpu(0).lock_request(1).cpu(1).lock_request(1).node("launcher")
    run.write("process_waits", name="cpu0", what="spins on seamldr_lock", on="seamldr", operations=5)
    run.write("process_waits", name="cpu1", what="does not answer", on="", operations=0).finish(False)
    why = ask(run, running=False)
    assert (row(why, "cpu0").state, row(why, "cpu0").said) == ("alive", "spins on seamldr_lock, after 5 operations")
    assert row(why, "cpu1").state == "no answer"
    assert why.ended == "time is up" and "The machine has ended: time is up." in text(why)


def test_lockups_are_shown_until_they_are_over() -> None:
    """In the kernel's words, with the machine's time."""
    words = "watchdog: Watchdog detected hard LOCKUP on cpu 1"
    run = Run().later(12).cpu(0).write("hard_lockup", cpu=1, stuck_s=12, text=words)
    assert f"at 12.0 s: {words}" in text(ask(run))
    assert ask(run.write("lockup_over", cpu=1, kind="hard_lockup", stuck_s=14)).lockups == ()


# The whole


def test_a_large_machine_stays_readable() -> None:
    """255 CPUs that wait for one share a row and a line of the graph; JSON has each by itself."""
    run = Run().cpu(0, "reader", irqs=False).lock_request(1).lock_hold(1, 1)
    for number in range(1, 256):
        run.cpu(number, "reader", irqs=False).lock_request(1)
        run.write("hard_lockup", cpu=number, stuck_s=12, text=f"hard LOCKUP on cpu {number}")
    why = ask(run)
    shown = text(why)
    assert len(shown.splitlines()) < 30
    assert "cpu1-cpu255 (255)" in shown and "cpu1-cpu255 wait in the end for cpu0" in shown
    assert len(why_as_dict(why, "/run")["processes"]) == 257


def test_json_has_all_of_it() -> None:
    """The answer is plain data, with the cycle marked in the graph."""
    answer = msgspec.json.decode(msgspec.json.encode(why_as_dict(ask(deadlock()), "/run")))
    assert (answer["schema"], answer["run_dir"], answer["running"], answer["ended"]) == (1, "/run", True, None)
    assert {edge["node"] for edge in answer["graph"] if edge["in_cycle"]} == {"cpu0", "cpu1"} == set(answer["cycle"])
    assert answer["processes"][0].keys() == set(Row.__struct_fields__)
    assert answer["graph"][0].keys() == set(Edge.__struct_fields__)


def test_a_strange_record_is_passed_over() -> None:
    """A record without its fields is a note, no more."""
    run = Run().cpu(0).lock_request(1)
    run.records.append(run.records[-1] | {"event": "csd_lock", "seq": 2})
    (note,) = ask(run).notes
    assert note.startswith("cpu0: a csd_lock record is not as the event table says")


def test_a_process_that_has_written_nothing_is_unknown() -> None:
    """It said hello; nothing else is known of it while the machine runs."""
    why = ask(Run().online("seamldr"), {})
    assert (row(why, "seamldr").state, row(why, "seamldr").pid, row(why, "seamldr").silent_s) == ("unknown", 0, None)


def test_nodes_in_short() -> None:
    """Neighbours are a range, other processes are not CPUs, and a long list is cut."""
    assert nodes_text([f"cpu{number}" for number in range(0, 40, 2)]).endswith("cpu12, cpu14 and 12 more")
    assert nodes_text(["cpu2", "cpu1", "seamldr", "cpu10", "cpu9", "kvm"]) == "cpu1-cpu2, cpu9-cpu10, kvm, seamldr"


# Run directories


def test_a_machine_is_shown_as_it_stood_at_its_end(tmp_path: Path) -> None:
    """What its processes did while they were taken down, after the end, changes nothing; nor does a torn line."""
    run = deadlock().later().finish(False).later().cpu(1).lock_hold(1, 2)
    folder = save(run, tmp_path)
    with (folder / "records" / "cpu0.jsonl").open("ab") as file:
        file.write(b'{"ts":123,"clo')
    why = look(folder)
    assert set(why.cycle) == {"cpu0", "cpu1"}
    assert (why.running, why.ended) == (False, "time is up")
    assert row(why, "cpu0").state == "alive"


def test_a_machine_that_vanished_is_shown_at_its_last_record(tmp_path: Path) -> None:
    """No end is on record, and whoever has its process ids now does not have its files open: the machine is gone."""
    run = deadlock()
    run.records = [record | {"pid": os.getpid()} for record in run.records]
    why = look(save(run, tmp_path))
    assert (why.running, why.ended, why.newest_s) == (False, None, 0.0)
    assert row(why, "cpu0").state == "gone"
    assert "The machine is gone and did not say why." in text(why)


@pytest.mark.parametrize("there", ["nothing", "a file", "no launcher", "no machine"])
def test_what_is_no_run_is_refused(tmp_path: Path, there: str) -> None:
    """One line that names the directory and says what is missing."""
    path = tmp_path / "run"
    if there == "a file":
        path.write_text("")
    elif there != "nothing":
        (path / "records").mkdir(parents=True)
        if there == "no machine":
            (path / "records" / "launcher.jsonl").write_text("nonsense\n")
    with pytest.raises(RunError, match=f"^{path} is not .*launcher.jsonl .*$"):
        look(path)
