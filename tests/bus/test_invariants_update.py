"""Invariants about the module update, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from history import INSTALL, Run

STAGES = ("SHUTDOWN", "CPU_INSTALL", "CPU_INIT", "RUN_UPDATE", "DONE", "END")
SYS_INIT, LP_INIT, SHUTDOWN, UPDATE = 33, 35, 52, 53
NO_ENTROPY = 0x8000020300000000
BUSY = 0x8000020200000000


def begun() -> Run:
    """An update of two CPUs has begun."""
    return Run().cpu(0, "kworker").update_begin()


def whole_update(run: Run, update: int = 1) -> Run:
    """An update by two CPUs, with every SEAMCALL."""
    run.cpu(0, "kworker").update_begin(update)
    work = {
        "SHUTDOWN": {0: [SHUTDOWN]},
        "CPU_INSTALL": {0: [INSTALL], 1: [INSTALL]},
        "CPU_INIT": {0: [SYS_INIT, LP_INIT], 1: [LP_INIT]},
        "RUN_UPDATE": {0: [UPDATE]},
    }
    for state, following in pairwise(STAGES):
        for number in (0, 1):
            run.cpu(number, "stopper", irqs=False).enter_state(state, update)
            for leaf in work.get(state, {}).get(number, []):
                run.seamcall(leaf)
            run.ack(state, update=update)
        run.advance(following, update)
    return run.cpu(0, "kworker").update_end(0, update)


def test_two_good_updates_keep_everything() -> None:
    """All update invariants hold for a good update, and for a second one."""
    assert whole_update(whole_update(Run()), 2).finish().violated() == set()


def test_an_update_that_failed_and_ended_keeps_everything() -> None:
    """A CPU that fails acknowledges as well; the stage stays and the update ends badly, which is no violation."""
    run = begun().cpu(0, "stopper", irqs=False).enter_state("SHUTDOWN").ack("SHUTDOWN", ret=-5)
    run.cpu(1, "stopper", irqs=False).enter_state("SHUTDOWN").ack("SHUTDOWN")
    assert run.cpu(0).update_end(-5).finish().violated() == set()


@pytest.mark.parametrize(
    ("acks", "following"),
    [
        ([(0, 0)], "CPU_INSTALL"),
        ([(0, 0), (1, -5)], "CPU_INSTALL"),
        ([(0, 0), (1, 0)], "CPU_INIT"),
        ([(0, 0), (1, 0)], "SHUTDOWN"),
    ],
    ids=["a CPU is missing", "a CPU failed", "a stage is skipped", "the stage stays"],
)
def test_a_wrong_advance_breaks_i31(acks: list[tuple[int, int]], following: str) -> None:
    """I31 is broken by an advance that is too early, after a failure, or not by one."""
    run = begun()
    for number, ret in acks:
        run.cpu(number).ack("SHUTDOWN", ret=ret)
    assert run.advance(following).update_end().cpu(0).violated() >= {"I31"}


def test_an_acknowledgement_counted_twice_breaks_i31() -> None:
    """I31 is broken when one CPU acknowledges a stage twice."""
    assert begun().cpu(0).ack("SHUTDOWN").ack("SHUTDOWN").violated() == {"I31"}


def test_a_count_of_cpus_is_enough() -> None:
    """The set of CPUs that take part may be recorded as their number."""
    run = Run().cpu(0, "kworker").write("update_begin", update=1, online=2).cpu(0).ack("SHUTDOWN")
    assert run.advance("CPU_INSTALL").violated() == {"I31"}


def test_work_before_the_stage_is_done_breaks_i32() -> None:
    """I32 is broken by a CPU that starts a stage before all have acknowledged the one before."""
    run = begun().stage("SHUTDOWN", "CPU_INSTALL")
    run.cpu(0, "stopper", irqs=False).enter_state("CPU_INSTALL").ack("CPU_INSTALL")
    assert run.violated() == set()
    assert run.enter_state("CPU_INIT").violated() == {"I32"}


@pytest.mark.parametrize("leaf", [SHUTDOWN, UPDATE])
def test_the_lead_repeats_its_work_and_breaks_i33(leaf: int) -> None:
    """I33 is broken by a second SHUTDOWN or UPDATE in an update; a retry for want of entropy is none."""
    run = begun().cpu(0, "stopper").seamcall(leaf, status=NO_ENTROPY).seamcall(leaf)
    assert run.violated() == set()
    assert run.seamcall(leaf).violated() == ({"I33", "I34"} if leaf == SHUTDOWN else {"I33"})


def test_another_cpu_does_the_lead_s_work_and_breaks_i33() -> None:
    """I33 is broken by SHUTDOWN on a CPU that is not CPU 0, and outside an update."""
    assert begun().cpu(1, "stopper").seamcall(SHUTDOWN).violated() == {"I33"}
    assert Run().cpu(0).seamcall(SHUTDOWN).violated() == {"I33"}


def test_version_bits_do_not_hide_a_leaf() -> None:
    """I33 knows a leaf by its number, whatever version RAX asks for."""
    assert Run().cpu(0).seamcall(1 << 16 | SHUTDOWN).violated() == {"I33"}


@pytest.mark.parametrize("leaf", [INSTALL, LP_INIT, SYS_INIT])
def test_a_second_execution_breaks_i35(leaf: int) -> None:
    """I35 is broken by a second INSTALL, LP.INIT or SYS.INIT on one CPU in one update."""
    run = begun().cpu(1, "stopper").seamcall(leaf)
    assert run.violated() == set()
    assert run.seamcall(leaf, status=BUSY).violated() == {"I35"}


def test_an_install_that_was_not_entered_does_not_count() -> None:
    """I35 counts executions: VMfailInvalid and another try are one."""
    assert begun().cpu(1, "stopper").seamcall(INSTALL, entered=0).seamcall(INSTALL).violated() == set()


def test_sys_init_on_a_second_cpu_breaks_i35() -> None:
    """I35 is broken by SYS.INIT on two CPUs, and by a successful update without any."""
    assert begun().cpu(0).seamcall(SYS_INIT).cpu(1).seamcall(SYS_INIT).violated() == {"I35"}
    assert begun().update_end(0).violated() == {"I35"}


def test_boot_does_not_count_as_an_update() -> None:
    """I35 is about updates: initialization at boot is nobody's business."""
    assert Run().cpu(0).seamcall(LP_INIT).seamcall(LP_INIT).seamcall(SYS_INIT).violated() == set()


@pytest.mark.parametrize("event", ["cpu_online", "cpu_offline"])
def test_hotplug_during_an_update_breaks_i37(event: str) -> None:
    """I37 is broken by a CPU that comes or goes while an update is under way, and by nothing else."""
    assert begun().cpu(1, "idle").write(event).cpu(0).update_end(-5).violated() == {"I37"}
    assert begun().update_end(-5).cpu(1, "idle").write(event).violated() == set()


def test_taking_the_machine_down_keeps_i37() -> None:
    """I37 does not look at what happens after the workload has ended."""
    run = begun().finish(finished=False).cpu(1, "idle").write("cpu_offline")
    assert run.violated() == set()


def test_a_killed_cpu_excuses_i37_and_i52() -> None:
    """I37 and I52 are excused when a CPU died during the update, and the judgement says so."""
    run = begun().exit("cpu1", wanted=False, status=-9).online("cpu1", 2)
    run.cpu(1, "idle").new_process().write("cpu_online").finish()
    assert run.violated() == set()
    assert len(run.judge().excused) == 3


def test_an_update_without_end_breaks_i52() -> None:
    """I52 is broken in a run that came to its own end with an update still open."""
    assert begun().finish().violated() == {"I52"}
    assert "SHUTDOWN" in begun().finish().story("I52")


def test_an_update_in_a_cut_run_is_suspect() -> None:
    """I52 calls an open update suspect when the run was cut, unless one of its CPUs waits in a cycle."""
    run = begun().finish(finished=False)
    assert run.violated() == set() and run.judge().verdict == "incomplete"
    run = begun().cpu(0, "stopper", irqs=False).lock_request(1).lock_hold(1, 1).lock_request(2)
    assert run.finish(finished=False).violated() == {"I50", "I52"}
