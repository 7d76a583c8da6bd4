"""The judge: verdicts, exposures, counts and stories of whole runs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from history import INFO, LOCK, Run, save

from bus.events import EVENTS, NONE
from bus.invariant import EXPLAINED_BY_DEATH
from bus.invariants import INVARIANTS
from bus.judge import Judge, judge, judge_records
from bus.story import line, tell

V, W = 0x12000, 0x13000


def call(run: Run, vmcs: int = V) -> Run:
    """A P-SEAMLDR call on CPU 0 that loses the VMCS and makes KVM forget the pointer."""
    return run.cpu(0, "reader").begin(vmcs).seamcall(INFO, lost=vmcs).cv(NONE).end(NONE)


def test_the_invariants_that_must_be_there_are_there() -> None:
    """Every invariant has an id, a unique slug, and names only invariants that exist as its causes."""
    vmcs = {1, 2, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 18}
    calls = {19, 20, 21, 22, 23, 24, 25, 26, 28, 50, 51, 53, 57, 58, 59, 60, 62}
    updates = {31, 32, 33, 34, 35, 36, 37, 38, 40, 41, 43, 52, 56, 61}
    interface = {39, 42, 45, 46, 47, 48}
    assert [int(name[1:]) for name in INVARIANTS] == sorted(vmcs | calls | updates | interface)
    assert len({invariant.slug for invariant in INVARIANTS.values()}) == len(INVARIANTS)
    for invariant in INVARIANTS.values():
        assert invariant.sentence.endswith(".") and invariant.source and invariant.broken_by and invariant.__doc__
        assert set(invariant.consequence_of) <= INVARIANTS.keys() - {invariant.id}


def test_death_explains_nothing_about_vmcss_and_tokens() -> None:
    """The allow-list of what a death explains holds invariants that exist, and none about data, P-SEAMLDR or tokens."""
    assert EXPLAINED_BY_DEATH.keys() <= INVARIANTS.keys()
    assert not EXPLAINED_BY_DEATH.keys() & {"I1", "I2", "I3", "I5", "I14", "I18", "I19", "I20", "I57"}


def test_every_handler_names_an_event() -> None:
    """No invariant listens to an event that the table does not know."""
    for invariant in INVARIANTS.values():
        handlers = {name.removeprefix("on_") for name in dir(invariant) if name.startswith("on_")}
        assert handlers <= EVENTS.keys(), invariant.id


# Verdicts and exposures


def test_a_call_that_took_the_vmcs_and_broke_nothing_is_safe() -> None:
    """safe needs an exposure; here the same VMCS came next and was entered."""
    run = call(Run().cpu(0).load(V).enter(V, "vmlaunch").put(V)).cpu(0).load(V).enter(V).finish()
    judgement = run.judge()
    assert judgement.verdict == "safe" and judgement.why == () and judgement.finished
    assert judgement.exposures.as_dict() == {"lost_vmcs": 1, "same_next": 1, "entered_after": 1}


def test_another_vmcs_in_between_is_no_test_of_the_skip() -> None:
    """same_next and entered_after count only if no other VMCS was loaded there first."""
    run = call(Run().cpu(0).load(V).put(V)).cpu(0).load(W).put(W).load(V).enter(V)
    assert run.judge().exposures.as_dict() == {"lost_vmcs": 1, "same_next": 0, "entered_after": 0}


def test_each_exposure_counts_once() -> None:
    """A second entry, a second load and a second SEAMCALL of one call add nothing."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").begin(V).seamcall(INFO, lost=V).seamcall(INFO).cv(NONE).end(NONE)
    run.cpu(0).load(V).vcpu_load(V, skipped=True).enter(V).enter(V)
    assert run.judge().exposures.as_dict() == {"lost_vmcs": 1, "same_next": 1, "entered_after": 1}


def test_a_strategy_that_clears_first_is_exposed_all_the_same() -> None:
    """An exposure counts whoever took the VMCS: here the strategy's own VMCLEAR did, before the call."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").begin(V).cv(NONE).vmclear(V, "strategy").seamcall(INFO).end(NONE)
    assert run.finish().judge().exposures.lost_vmcs == 1


@pytest.mark.parametrize("kept", ["entered", "current", "module"])
def test_what_takes_no_vmcs_is_no_exposure(kept: str) -> None:
    """No exposure: a call that was not entered, one that kept the VMCS, one to the TDX module."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").begin(V)
    run.seamcall(
        33 if kept == "module" else INFO,
        cur=V if kept == "current" else NONE,
        entered=0 if kept == "entered" else 1,
    )
    assert run.judge().exposures.lost_vmcs == 0


def test_nothing_put_to_the_test_is_incomplete() -> None:
    """Without exposure the verdict is incomplete, and the reason is that of this run."""
    assert Run().finish().judge().why == ("nothing was put to the test: there was no P-SEAMLDR call",)
    run = Run(vmx_basic_bit60=1).cpu(0).load(V).put(V).cpu(0, "reader").begin(V).seamcall(INFO, cur=V).end(V).finish()
    assert run.judge().verdict == "incomplete" and "vmx_basic_bit60=1" in run.judge().why[0]
    run = Run().cpu(0, "reader").begin(NONE).seamcall(INFO).end(NONE).finish()
    assert run.judge().verdict == "incomplete" and "with a current VMCS" in run.judge().why[0]


def refused(run: Run) -> Run:
    """An update that the gate refuses."""
    run.write("admin_begin", request=9, kind="install").write("update_refused", errno=-22, why="erratum")
    return run.write("admin_end", request=9, kind="install", errno=-22, text="refused")


def test_refusing_every_update_is_safe() -> None:
    """A run in which each update was refused, and P-SEAMLDR never called, is safe without exposure."""
    judgement = refused(refused(Run().cpu(0, "kworker"))).finish().judge()
    assert judgement.verdict == "safe"
    assert msgspec.to_builtins(judgement.statistics.updates) == {
        "requested": 2,
        "succeeded": 0,
        "failed": 0,
        "refused": 2,
    }


def test_refusing_some_updates_is_not() -> None:
    """One update that was not refused, or one that never came to an end, needs an exposure."""
    assert refused(Run().cpu(0, "kworker")).admin("install", -5).finish().judge().verdict == "incomplete"
    run = Run().node("kvm").write("request", request=9, kind="install", cpu=0).write(
        "request", request=10, kind="install", cpu=0
    )
    assert refused(run.cpu(0, "kworker")).finish().judge().verdict == "incomplete"


@pytest.mark.parametrize("end", ["none", "cut", "broken", "suspect"])
def test_a_run_that_did_not_end_well_is_incomplete(end: str) -> None:
    """With an exposure and no violation, a missing or early end, a bug of our own or a suspect make it incomplete."""
    run = call(Run().cpu(0).load(V).put(V))
    if end == "broken":
        run.write("broken", error="KeyError")
    if end == "suspect":
        run.lock_request(1)
    if end != "none":
        run.finish(finished=end == "broken")
    assert run.judge().verdict == "incomplete" and run.judge().why


def test_a_violation_outweighs_everything() -> None:
    """unsafe, even if the run was cut."""
    assert Run().cpu(0).load(V).put(V).cpu(0, "reader").call_none(V).judge().verdict == "unsafe"


def test_a_judge_can_watch() -> None:
    """Shown record by record, a violation is known as soon as it happens."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").call_none(V)
    watching = Judge(run.records[0])
    seen = []
    for record in run.records:
        watching.see(record)
        seen.append(watching.violated)
    assert seen == [()] * (len(run.records) - 1) + [("I2",)]


def test_the_judgement_shows_who_waits_for_whom() -> None:
    """Open waits are listed, and the cycle among them."""
    run = Run().cpu(0).lock_request(1).lock_hold(1, 1).csd_lock(1, 7).cpu(1, irqs=False).lock_request(1)
    run.cpu(2).lock_request(1)
    judgement = run.judge()
    assert {(wait.node, wait.on, wait.kind) for wait in judgement.waits} == {
        ("cpu0", "cpu1", "call"),
        ("cpu1", "cpu0", "lock"),
        ("cpu2", "cpu0", "lock"),
    }
    assert {wait.node for wait in judgement.cycle} == {"cpu0", "cpu1"}


# Run directories


def test_a_run_directory_is_judged_like_its_records(tmp_path: Path) -> None:
    """Files and lists of the same records get the same judgement."""
    run = call(Run(seamret_launch="clear").online("cpu0").cpu(0).load(V).enter(V, "vmlaunch").put(V)).cpu(0).load(V)
    run.enter(V, result="valid:5").finish()
    from_files, from_list = judge(save(run, tmp_path)).as_dict(), run.judge().as_dict()
    assert from_files == from_list and from_files["verdict"] == "unsafe"


def history(reads: int) -> Run:
    """A call, and then VMREADs that succeed."""
    run = call(Run().online("cpu0").cpu(0).load(V).enter(V, "vmlaunch").put(V)).cpu(0).load(V)
    for _ in range(reads):
        run.vmread("ok", V)
    return run.enter(V).put(V).finish()


def test_reads_that_succeed_change_nothing_but_the_count(tmp_path: Path) -> None:
    """A traced run, from files and from a list, gets the judgement of the same run untraced."""
    plain, traced = history(0).judge(), history(5).judge()
    from_files = judge(save(history(5), tmp_path))
    assert traced.statistics.records == from_files.statistics.records == plain.statistics.records + 5
    assert {plain.verdict, traced.verdict, from_files.verdict} == {"safe"}
    assert plain.exposures.as_dict() == traced.exposures.as_dict() == from_files.exposures.as_dict()


def test_what_a_process_writes_first_is_never_passed_over(tmp_path: Path) -> None:
    """A new process is noticed by its first record, also if that is one that nobody looks at."""
    run = Run().online("cpu0").cpu(0).load(V).enter(V, "vmlaunch").put(V).exit("cpu0", wanted=False, status=-9)
    run.online("cpu0", 2).cpu(0).new_process().vmread("ok", V).cpu(1).load(V).finish()
    assert "I1" not in run.violated()
    assert [one.invariant for one in judge(save(run, tmp_path)).violations] == [*run.violated()]


def test_a_cpu_without_records_makes_the_run_incomplete(tmp_path: Path) -> None:
    """A process that said hello and has no file is missed."""
    run = call(Run().online("cpu0").online("cpu1").cpu(0).load(V).put(V)).finish()
    judgement = judge(save(run, tmp_path))
    assert judgement.verdict == "incomplete" and judgement.notes == ("cpu1 has no record file",)


def test_what_happened_to_the_bus_is_noted() -> None:
    """Link faults over all processes in one sentence, and the last notice of each backlog; the verdict is the same."""
    run = call(Run().cpu(0).load(V).put(V))
    run.node("cpu0").write("link_backlog", to="cpu1", waiting=4096).write("link_backlog", to="cpu1", waiting=8192)
    for node in ("cpu0", "kvm"):
        run.node(node).write("link_totals", sent=100, dropped=10, duplicated=7, delayed=3, resent=11)
    judgement = run.finish().judge()
    assert judgement.notes == (
        "8192 messages from cpu0 to cpu1 waited at once",
        "link faults dropped 20, doubled 14 and delayed 6 frames; 200 messages were sent, 22 frames sent again",
    )
    assert judgement.verdict == call(Run().cpu(0).load(V).put(V)).finish().judge().verdict


def test_a_record_without_its_fields_is_noted() -> None:
    """A record that is not as the table says does not end the judge; the run is incomplete."""
    run = call(Run().cpu(0).load(V).put(V))
    run.records.append({**run.records[-1], "seq": run.records[-1]["seq"] + 1, "event": "vmptrld"})
    run.records.append({**run.records[-1], "seq": run.records[-1]["seq"] + 1, "event": "no_such_event"})
    judgement = judge_records(run.records)
    assert judgement.verdict == "incomplete"
    assert [note.split()[2] for note in judgement.notes] == ["vmptrld", "an"]


def test_knobs_are_known_before_the_first_record() -> None:
    """The description of the machine counts from the start, wherever the merge puts it."""
    run = call(Run(seamret_launch="clear").cpu(0).load(V).put(V)).cpu(1).load(V)
    run.records[0]["clock"] = 10_000
    assert run.violated() == set()


# Counts


def test_counters_are_summed_over_cpus_and_incarnations() -> None:
    """Of each process the last counters count; those of a dead incarnation are kept."""
    run = Run().cpu(0).write("counters", counts={"vmread": 1}).write("counters", counts={"vmread": 5, "exits": 2})
    run.new_process().write("counters", counts={"vmread": 10, "ipis_sent": 3})
    run.cpu(1).write("counters", counts={"vmread": 100, "ipis_delivered": 3})
    summary = run.judge().as_dict()
    assert summary["vmx"] == {
        "vmread": 115,
        "vmwrite": 0,
        "vmread_errors": 0,
        "vmwrite_errors": 0,
        "entry_errors": 0,
        "vmptrld": 0,
        "vmclear": 0,
    }
    assert summary["guests"] == {"exits": 2, "wrong_data": 0} and summary["ipis"] == {"sent": 3, "delivered": 3}


def test_the_lock_is_measured_by_its_service() -> None:
    """Acquisitions, holders, waits in microseconds and the last token come from grants of seamldr_lock."""
    run = Run().node("seamldr").queue(0, 1).queue(1, 1).queue(1, 2, "other")
    run.grant(0, 1, 4).release(0, 4).grant(1, 1, 7).grant(1, 2, 99, lock="other")
    assert run.judge().as_dict()["lock"] == {
        "acquisitions": 2,
        "max_holders": 1,
        "wait_us": {"p50": 2.0, "p99": 2.0, "max": 2.0},
        "last_token": 7,
    }


def test_two_cpus_that_hold_the_lock_are_two_holders() -> None:
    """`max_holders` believes the CPUs, not only the service, which can mean to grant only once."""
    run = Run().cpu(0).write("lock_hold", lock="seamldr_lock", request=1, epoch=1, number=1, waited_ns=0)
    run.cpu(1).write("lock_hold", lock="seamldr_lock", request=1, epoch=1, number=2, waited_ns=0)
    lock = run.judge().as_dict()["lock"]
    assert isinstance(lock, dict) and lock["max_holders"] == 2


def test_the_summary_describes_the_machine() -> None:
    """Strategy, knobs, calls by name, processes, seconds and assumptions come from the records."""
    run = Run(seamret_launch="clear").online("cpu0").online("cpu1").cpu(1).write("cpu_online").cpu(0)
    run.write("cpu_online").seamcall(INFO).exit("cpu1", wanted=False, status=-9).online("cpu1", 2).finish()
    summary = run.exit("cpu0").judge().as_dict()
    assert summary["strategy"] == "none" and summary["knobs"] == {"seamret_launch": "clear"}
    assert summary["seamcalls"] == {"leaf0": 1}
    assert summary["processes"] == {"cpus": {"cpu0": 100, "cpu1": 100}, "killed": 1, "stopped": 0, "restarted": 1}
    assert summary["seconds"] == {"online": 0.002, "run": 0.007, "total": 0.01}
    assert "clears the launch state of that VMCS" in summary["assumptions"][0]
    assert msgspec.json.decode(msgspec.json.encode(summary))["schema"] == 1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({}, "leaves the launch state"),
        ({"seamret_launch": "clear", "seamret_scope": "all_active_on_lp"}, "every VMCS active"),
        ({"vmx_basic_bit60": "1"}, "fixed microcode"),
    ],
)
def test_assumptions_name_the_processor(knobs: dict[str, str], words: str) -> None:
    """Each summary says what it takes SEAMRET to do."""
    assert words in Run(**knobs).judge().as_dict()["assumptions"][0]


# Stories


def test_a_story_is_told_in_causal_order() -> None:
    """Causes come first, absent records are left out, and one record is told once."""
    first = {"clock": 3, "node": "cpu0", "seq": 1, "event": "warn", "text": "a"}
    second = {"clock": 4, "node": "cpu0", "seq": 2, "event": "warn", "text": "b"}
    story = tell("why", ("late", second), ("early", first), ("none", None), ("again", first))
    assert story.records == (first, second) and story.labels == ("again", "late")


def test_addresses_are_told_in_hex() -> None:
    """Addresses are hexadecimal, the NONE pointer is a word, counts stay decimal."""
    record = {"clock": 9, "node": "cpu0", "ctx": "vcpu1", "event": "vmptrld", "vmcs": V, "cur": NONE, "result": "ok"}
    assert line(record) == "9 cpu0/vcpu1 vmptrld vmcs=0x12000 cur=none result=ok"
    plain = {"clock": 9, "node": "seamldr", "event": "x", "lock": LOCK, "by": 12}
    assert line(plain) == "9 seamldr x lock=seamldr_lock by=12"
