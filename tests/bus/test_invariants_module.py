"""Invariants about the module while it is updated, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

import pytest
from history import INFO, Run

SYS_INIT, LP_INIT, SYS_RD, SHUTDOWN, UPDATE = 33, 35, 34, 52, 53
BUSY = 0x8000_0200_0000_0000
NOT_ASSOCIATED = 0x8000_0702_0000_0000


def without_module() -> Run:
    """In an update: the old module is shut down, the new one is not there yet."""
    return Run().cpu(0, "kworker").update_begin().cpu(0, "stopper", irqs=False).seamcall(SHUTDOWN)


def td_enter(run: Run, cpu: int, status: int = 0) -> Run:
    """TDH.VP.ENTER has returned on a CPU."""
    return run.cpu(cpu, "td0").write("td_enter", vcpu=3, td=0, status=status, counter=1)


def flag(run: Run, initialized: int) -> Run:
    """The kernel says whether TDX is initialized."""
    return run.write("module_init_flag", initialized=initialized, version="1.5.09")


@pytest.mark.parametrize("leaf", [SYS_INIT, LP_INIT, UPDATE, INFO])
def test_what_the_update_itself_calls_keeps_i34(leaf: int) -> None:
    """I34 holds for the SEAMCALLs of the update."""
    assert "I34" not in without_module().seamcall(leaf).violated()


def test_a_module_call_between_breaks_i34() -> None:
    """I34 is broken by any other module SEAMCALL, and by a TD entry, until UPDATE has succeeded or a CPU has failed."""
    assert without_module().cpu(1, "vcpu0").seamcall(SYS_RD).violated() == {"I34"}
    assert td_enter(without_module(), 1).violated() == {"I34"}
    assert td_enter(without_module().seamcall(UPDATE), 1).violated() == set()
    assert td_enter(without_module().ack("CPU_INSTALL", ret=-5), 1, status=BUSY).violated() == set()
    assert td_enter(Run().cpu(0, "kworker").update_begin(), 1).violated() == set()


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("irq_enter", {"vector": 0xFB}),
        ("admin_begin", {"request": 1, "kind": "read_version"}),
        ("csd_run", {"call": 1, "func": "clear", "source": 1}),
    ],
)
def test_something_else_in_a_stage_breaks_i36(event: str, fields: dict[str, int | str]) -> None:
    """I36 is broken by what runs on a CPU between its first stage and its last; NMIs are no such thing."""
    run = Run().cpu(0, "kworker").update_begin().cpu(1, "stopper", irqs=False).enter_state("SHUTDOWN").ack("SHUTDOWN")
    assert run.write("nmi_enter", cur=0).write("nmi_exit").violated() == set()
    assert run.write(event, **fields).violated() == {"I36"}


def test_after_its_last_stage_a_cpu_is_free_of_i36() -> None:
    """I36 is over for a CPU with its acknowledgement of the last stage, and for all when one has failed."""
    run = Run().cpu(0, "kworker").update_begin().cpu(1, "stopper", irqs=False).enter_state("DONE").ack("DONE")
    assert "I36" not in run.write("irq_enter", vector=0xFB).violated()
    run = Run().cpu(0, "kworker").update_begin().cpu(1, "stopper", irqs=False).enter_state("SHUTDOWN")
    run.cpu(0, "stopper", irqs=False).enter_state("SHUTDOWN").ack("SHUTDOWN", ret=-5)
    assert run.cpu(1).write("irq_enter", vector=0xFB).violated() == set()


def test_a_stage_with_interrupts_on_breaks_i36() -> None:
    """I36 is broken by a CPU that starts a stage with interrupts on."""
    run = Run().cpu(0, "kworker").update_begin().cpu(1, "stopper", irqs=True).enter_state("SHUTDOWN")
    assert run.violated() == {"I36"}


def ended(run: Run, ret: int) -> set[str]:
    """What is violated when the update ends like this; that it lacks SYS.INIT is not the question."""
    return run.cpu(0, "kworker").update_end(ret).violated() - {"I35"}


def test_the_kernel_s_flag_keeps_i38() -> None:
    """I38 holds for an update that succeeds, for one that is fatal, and for one that fails before SHUTDOWN."""
    assert ended(flag(flag(without_module(), 0).seamcall(UPDATE), 1), 0) == set()
    assert ended(flag(without_module(), 0), -5) == set()
    assert ended(Run().cpu(0, "kworker").update_begin(), -16) == set()


def test_a_flag_that_lies_breaks_i38() -> None:
    """I38 is broken by a flag that is not cleared at SHUTDOWN, or not set after UPDATE."""
    assert ended(without_module(), -5) == {"I38"}
    assert ended(flag(without_module(), 0).seamcall(UPDATE), 0) == {"I38"}


def test_a_refusal_after_a_call_breaks_i40() -> None:
    """I40 is broken by a refusal that comes after a SEAMCALL of the same request, or after the update has begun."""

    def refused(run: Run) -> set[str]:
        return run.write("update_refused", errno=-22, why="no").violated()

    def asked() -> Run:
        return Run().cpu(0, "kworker").write("admin_begin", request=1, kind="install")

    assert refused(asked()) == set()
    assert refused(asked().cpu(0, "reader").seamcall(INFO).cpu(0, "kworker")) == set()
    assert refused(asked().seamcall(SYS_RD)) == {"I40"}
    assert refused(asked().update_begin()) == {"I40"}


def test_an_entry_without_a_flush_breaks_i43() -> None:
    """I43 is broken by a TD vCPU that is entered on a second CPU before TDH.VP.FLUSH on the first."""
    run = td_enter(td_enter(Run(), 0), 0)
    assert td_enter(run, 1, status=BUSY).violated() == set()
    assert td_enter(run, 1).violated() == {"I43"}


@pytest.mark.parametrize("status", [0, NOT_ASSOCIATED, BUSY])
def test_only_a_flush_that_flushed_counts_for_i43(status: int) -> None:
    """I43 takes a flush into account if the vCPU is then associated with no CPU."""
    run = td_enter(Run(), 0).cpu(0, "irq").write("td_flush", vcpu=3, status=status)
    assert td_enter(run, 1).violated() == ({"I43"} if status == BUSY else set())
