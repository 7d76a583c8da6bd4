"""Invariants about VMCSs, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

import pytest
from history import INFO, Run

from bus.events import NONE

V, W = 0x12000, 0x13000


def test_a_vmcs_that_is_cleared_before_it_moves_is_active_on_one_cpu() -> None:
    """I1 holds when VMCLEAR on the old CPU comes before VMPTRLD on the new one."""
    run = Run().cpu(0).load(V).put(V).cv(NONE).vmclear(V).cpu(1).load(V)
    assert run.violated() == set()


def test_a_vmcs_loaded_on_two_cpus_breaks_i1() -> None:
    """I1 is broken by VMPTRLD of a VMCS that is active on another CPU, and the story names both CPUs."""
    run = Run().cpu(0).load(V).put(V).cpu(1).load(V)
    assert run.violated() == {"I1"}
    assert "cpu0" in run.story("I1") and "cpu1" in run.story("I1")


def test_a_vmptrld_that_failed_makes_nothing_active() -> None:
    """I1 looks at VMPTRLDs that succeed; the failed one is a reported error."""
    run = Run().cpu(0).load(V).put(V).cpu(1).cv(V).vmptrld(V, "valid:11")
    assert run.violated() == {"I18"}


def test_seamret_that_clears_makes_the_vmcs_inactive() -> None:
    """With seamret_launch=clear a VMCS may be loaded elsewhere after SEAMRET took it, although KVM lists it."""
    history = Run(seamret_launch="clear").cpu(0).load(V).put(V).cpu(0, "reader").begin(V)
    assert history.seamcall(INFO, lost=V).cv(NONE).end(NONE).cpu(1).load(V).violated() == set()


def test_seamret_that_preserves_leaves_the_vmcs_active() -> None:
    """With seamret_launch=preserve the same history has the VMCS on two CPUs."""
    history = Run(seamret_launch="preserve").cpu(0).load(V).put(V).cpu(0, "reader").begin(V)
    assert history.seamcall(INFO, lost=V).cv(NONE).end(NONE).cpu(1).load(V).violated() == {"I1"}


@pytest.mark.parametrize(("scope", "broken"), [("current_only", {"I1"}), ("all_active_on_lp", set())])
def test_the_scope_of_seamret_decides_about_other_vmcss(scope: str, broken: set[str]) -> None:
    """Only seamret_scope=all_active_on_lp makes a VMCS inactive that was not current."""
    run = Run(seamret_launch="clear", seamret_scope=scope).cpu(0).load(W).put(W).load(V).put(V)
    run.cpu(0, "reader").begin(V).seamcall(INFO, lost=V).cv(NONE).end(NONE)
    assert run.cpu(1).load(W).violated() == broken


def test_the_successor_of_a_dead_cpu_starts_with_nothing_active() -> None:
    """I1 holds when a VMCS that was active on a CPU's dead incarnation is loaded after the new one is up."""
    run = Run().cpu(1).load(V).exit("cpu1", wanted=False, status=-9).online("cpu1", 2)
    run.cpu(1).new_process().write("vmxon", pa=0x9000, result="ok")
    assert run.cpu(0).load(V).violated() == set()


@pytest.mark.parametrize("repair", [NONE, 0])
def test_a_strategy_that_nulls_the_pointer_keeps_i2(repair: int) -> None:
    """I2 holds when current_vmcs is NULL, in either spelling, at the end of the strategy."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").begin(V).seamcall(INFO, lost=V).cv(repair).end(NONE)
    assert run.cpu(0).load(V).violated() == set()


def test_a_strategy_that_restores_the_pointer_keeps_i2() -> None:
    """I2 holds when VMPTRLD makes the VMCS current again before the strategy ends."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").begin(V).vmptrst(V).seamcall(INFO, lost=V)
    run.vmptrld(V, reason="restore").end(V).cpu(0).vcpu_load(V, skipped=True)
    assert run.violated() == set()


def test_a_strategy_that_repairs_nothing_breaks_i2_once() -> None:
    """I2 is broken where the strategy ends, and is not counted again while it stays wrong."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").call_none(V).cpu(0).vcpu_load(V, skipped=True).put(V)
    violation = run.judge().violations[0]
    assert (violation.invariant, violation.count) == ("I2", 1)


def test_between_the_store_and_vmptrld_nothing_is_judged() -> None:
    """I2 does not look inside vmx_vcpu_load_vmcs, where current_vmcs is ahead of the hardware."""
    run = Run().cpu(0).load(V).put(V).cv(W).cpu(0, "irq").begin(V).seamcall(INFO, cur=V).end(V)
    assert run.cpu(0).vmptrld(W).vcpu_load(W).violated() == set()


def test_a_strategy_below_another_one_is_not_a_quiet_point() -> None:
    """I2 waits until the outermost strategy on the CPU has ended."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").begin(V).seamcall(INFO, lost=V)
    run.cpu(0, "irq").begin(NONE).seamcall(INFO).end(NONE)
    assert run.cpu(0, "reader", irqs=False).cv(NONE).end(NONE).violated() == set()


@pytest.mark.parametrize("insn", ["vmread", "vmwrite", "vmentry"])
def test_vmfailinvalid_breaks_i3(insn: str) -> None:
    """I3 is broken by VMREAD, VMWRITE and entries that end in VMfailInvalid; the story tells why."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").call_none(V).cpu(0).vcpu_load(V, skipped=True)
    if insn == "vmentry":
        run.enter(NONE, result="invalid")
    else:
        run.write(insn, field=0x681E, name="GUEST_RIP", value=7, vmcs=NONE, result="invalid")
    assert run.violated() == {"I2", "I3", "I18"}
    name = {"vmentry": "VMRESUME, launched=1"}.get(insn, f"{insn.upper()} GUEST_RIP")
    assert run.rungs("I3") == [
        "*      |  vcpu0   VMPTRLD 0x12000",
        "|<-----o  reader  leaf0: SEAMRET takes 0x12000",
        "*      |  reader  call over, current_vmcs still names it",
        "*      |  vcpu0   load: current_vmcs names it, no VMPTRLD",
        f"X      |  vcpu0   {name}: VMfailInvalid",
    ]


def test_vmfailvalid_is_not_i3() -> None:
    """I3 is about having no current VMCS; an unsupported field is only a reported error."""
    assert Run().cpu(0).load(V).vmread("valid:12", V).violated() == {"I18"}


def test_launch_then_resume_keeps_i5() -> None:
    """I5 holds for VMLAUNCH after VMCLEAR and VMRESUME after that."""
    run = Run().cpu(0).vmclear(V, "alloc").load(V).enter(V, "vmlaunch").put(V).load(V).enter(V)
    assert run.cv(NONE).vmclear(V).load(V).enter(V, "vmlaunch").violated() == set()


def test_vmresume_after_seamret_cleared_breaks_i5() -> None:
    """I5 is broken by error 5, told by the launch, the SEAMRET that took the launch state, and the entry."""
    run = Run(seamret_launch="clear").cpu(0).load(V).enter(V, "vmlaunch").put(V)
    run.cpu(0, "reader").begin(V).seamcall(INFO, lost=V).cv(NONE).end(NONE)
    run.cpu(0).load(V).enter(V, result="valid:5")
    assert run.violated() == {"I5", "I18"}
    assert run.judge().violations[0].invariant == "I5"
    assert run.rungs("I5") == [
        "*      |  vcpu0   VMLAUNCH of 0x12000",
        "|<-----o  reader  SEAMRET clears its launch state",
        "X      |  vcpu0   VMRESUME, launched=1: VMfailValid(5)",
    ]


def test_vmlaunch_of_a_launched_vmcs_breaks_i5() -> None:
    """I5 is broken by error 4, and by a VMLAUNCH that succeeds although the records say launched."""
    start = Run().cpu(0).load(V).enter(V, "vmlaunch").put(V).load(V)
    assert start.enter(V, "vmlaunch").violated() == {"I5"}
    assert Run().cpu(0).load(V).enter(V, "vmlaunch", "valid:4").violated() == {"I5", "I18"}


def test_wrong_data_breaks_i14() -> None:
    """I14 is broken by a field that is not what KVM's copy says."""
    assert Run().cpu(0).load(V).wrong_data(V, "GUEST_RIP").violated() == {"I14"}


def test_lost_data_follows_from_a_lost_vmcs() -> None:
    """I14 and I18 are listed after the violations that explain them, and name these."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").call_none(V).cpu(0).vcpu_load(V, skipped=True)
    violations = run.vmread("invalid").wrong_data(V, "GUEST_RIP").judge().violations
    assert [(v.invariant, v.follows_from) for v in violations] == [
        ("I2", ()),
        ("I3", ()),
        ("I14", ("I2", "I3")),
        ("I18", ("I2", "I3")),
    ]


@pytest.mark.parametrize("event", ["vmxon", "vmxoff", "vmptrst"])
def test_every_vmx_error_breaks_i18(event: str) -> None:
    """I18 is broken by any VMX instruction that does not succeed."""
    fields = {"vmxon": {"pa": 0x9000}, "vmxoff": {"active": 0}, "vmptrst": {"value": NONE}}[event]
    assert Run().cpu(0).write(event, **fields, result="ok").violated() == set()
    assert Run().cpu(0).write(event, **fields, result="fault:6").violated() == {"I18"}


def flag(run: Run, initialized: int) -> Run:
    """The kernel's view of the module changes."""
    return run.cpu(0, "stopper").write("module_init_flag", initialized=initialized, version="1.5.07")


def td_enter(run: Run, status: int) -> Run:
    """A TD vCPU was entered."""
    return run.cpu(1, "td0").write("td_enter", vcpu=0, td=0, status=status, counter=3)


def test_a_td_that_lives_on_after_an_update_keeps_i41() -> None:
    """I41 holds when TDs enter after a successful update, also when an entry only met a busy operand."""
    run = flag(flag(Run(), 0), 1)
    assert td_enter(td_enter(run, 0x8000020000000080), 77).violated() == set()


def test_a_td_that_cannot_be_entered_after_an_update_breaks_i41() -> None:
    """I41 is broken by an entry that fails after a successful update."""
    assert td_enter(flag(flag(Run(), 0), 1), 0xC000060800000000).violated() == {"I41"}


def test_a_td_that_dies_with_a_lost_module_keeps_i41() -> None:
    """I41 holds when no TD can be entered after a fatal update, and is broken when one can."""
    assert td_enter(flag(Run(), 0), 0x8000FF00FFFF0000).violated() == set()
    assert td_enter(flag(Run(), 0), 1).violated() == {"I41"}


def test_wrong_td_contents_break_i41_not_i14() -> None:
    """I41 is broken by TD contents that are not what they were."""
    assert Run().cpu(0, "td0").wrong_data(NONE, "td counter").violated() == {"I41"}
