"""Invariants about KVM's tracking of VMCSs, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

import pytest
from history import INFO, NONE, Run

V, W = 0x1000, 0x2000


def tracked() -> Run:
    """V is active and tracked on CPU 0."""
    return Run().cpu(0).vmclear(V, "alloc").cpu_store(V, NONE).track(V, 0).put(V)


def test_a_vmcs_that_moves_keeps_everything() -> None:
    """A VMCS that is cleared by an IPI, taken by another CPU, used there and freed violates nothing."""
    run = tracked().cpu(0, "irq", irqs=False).untrack(V).cpu(1).track(V, 1).put(V)
    run.cpu(1, "irq", irqs=False).untrack(V).cpu(1).write("vcpu_destroy", vcpu=0, vmcs=V)
    assert run.write("vmxoff", active=0, result="ok").violated() == set()


def test_an_active_vmcs_at_vmxoff_breaks_i7() -> None:
    """I7 is broken by VMXOFF with an active VMCS; one that fails does not count."""
    assert tracked().write("vmxoff", active=1, result="fault:6").violated() == {"I18"}
    run = tracked().write("vmxoff", active=1, result="ok")
    assert run.violated() == {"I7"} and "VMPTRLD" in run.story("I7")


def test_a_store_without_the_list_breaks_i8() -> None:
    """I8 is broken where cpu names a CPU whose list lacks the VMCS, and where the list has it and cpu is another."""
    run = Run().cpu(0).cpu_store(V, NONE).load_as(V, 0)
    assert run.violated() == {"I8"}
    run = Run().cpu(0).cpu_store(V, NONE).write("list_add", vmcs=V).load(V)
    assert run.violated() == {"I8"}


def test_where_nothing_is_known_i8_is_not_judged() -> None:
    """I8 and I9 need the history of a VMCS: one that begins in the middle is not judged."""
    assert Run().cpu(0).load(V).put(V).write("list_add", vmcs=W).violated() == set()


@pytest.mark.parametrize("missing", ["vmclear", "list_del"])
def test_a_release_too_early_breaks_i9(missing: str) -> None:
    """I9 is broken by cpu = -1 before VMCLEAR, and before the VMCS has left the list."""
    run = tracked().cpu(0, "irq", irqs=False).cv(NONE)
    run = run.write("list_del", vmcs=V) if missing == "vmclear" else run.vmclear(V)
    assert run.cpu_store(V, NONE).violated() == {"I9"}


def test_a_vmcs_taken_too_early_breaks_i9() -> None:
    """I9 is broken by a CPU that puts a VMCS on its list while cpu still names another; not if that one is dead."""
    assert tracked().cpu(1).write("list_add", vmcs=V).violated() == {"I9"}
    assert tracked().exit("cpu0", wanted=False, status=-9).cpu(1).write("list_add", vmcs=V).violated() == set()


def test_a_free_of_what_is_in_use_breaks_i10() -> None:
    """I10 is broken by freeing a VMCS that is active, and one that current_vmcs still names."""
    assert tracked().write("vcpu_destroy", vcpu=0, vmcs=V).violated() == {"I10"}
    run = tracked().cpu(0, "irq", irqs=False).vmclear(V).write("list_del", vmcs=V).cpu_store(V, NONE)
    assert run.write("vcpu_destroy", vcpu=0, vmcs=V).violated() == {"I10"}


def test_a_restore_of_something_else_breaks_i11() -> None:
    """I11 is broken by a restore of a VMCS that this call did not save, or saved on another CPU."""
    run = Run().cpu(0, "reader").begin(V).vmptrst(V).seamcall(INFO, lost=V)
    assert run.vmptrld(W, reason="restore").end(W).violated() == {"I11"}
    run = Run().cpu(0, "reader").begin(V).vmptrst(V).cpu(1, "reader", irqs=False).vmptrld(V, reason="restore")
    assert run.violated() == {"I11"}


def test_an_older_save_does_not_count_for_i11() -> None:
    """I11 wants the save of the same call: what a call before it saved is forgotten."""
    run = Run().cpu(0, "reader").begin(V).vmptrst(V).vmptrld(V, reason="restore").end(V)
    assert run.violated() == set()
    assert run.begin(V).vmptrld(V, reason="restore").end(V).violated() == {"I11"}


def test_a_repair_with_interrupts_on_breaks_i12() -> None:
    """I12 is broken inside seamldr_call only, by whatever touches VMCSs or the tracking."""
    for event in ("vmptrst", "vmclear", "cv"):
        run = Run().cpu(0, "reader").begin(V).cpu(0, "reader", irqs=True)
        assert getattr(run, event)(V).violated() == {"I12"}
    assert Run().cpu(0, "reader").begin(V).seamcall(INFO).end(NONE).vmclear(V).violated() == set()


def test_a_clear_on_another_cpu_breaks_i15() -> None:
    """I15 is broken by VMCLEAR of a VMCS that is active elsewhere."""
    assert tracked().cpu(1).vmclear(V).violated() == {"I15"}
    assert tracked().cpu(1).vmclear(W).violated() == set()
