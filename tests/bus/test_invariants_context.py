"""Invariants about contexts, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

import pytest
from history import INFO, Run

from bus.events import NONE

V = 0x12000


def in_window(result: str, ctx: str = "nmi") -> Run:
    """A call that has lost V, and then a VMREAD before the repair."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").begin(V).seamcall(INFO, lost=V)
    return run.cpu(0, ctx).vmread(result)


def test_an_nmi_handler_that_reads_in_the_window_breaks_i13() -> None:
    """A VMREAD in NMI context after SEAMRET and before the repair finds no current VMCS."""
    run = in_window("invalid")
    assert run.violated() == {"I3", "I13", "I18"}
    assert "cpu0" in run.story("I13")


def test_an_nmi_handler_that_finds_its_vmcs_keeps_i13() -> None:
    """A VMREAD in NMI context that succeeds has come before the call took anything, or after the repair."""
    assert in_window("ok").violated() == set()


def test_the_repair_itself_is_no_nmi_handler() -> None:
    """The same instruction outside NMI context is not I13's matter."""
    assert "I13" not in in_window("invalid", "reader").violated()


def test_after_the_repair_the_window_is_closed() -> None:
    """What an NMI handler does after the strategy has ended is not I13's matter."""
    run = in_window("ok").cpu(0, "reader").cv(NONE).end(NONE).cpu(0, "nmi").vmread("invalid")
    assert "I13" not in run.violated()


@pytest.mark.parametrize(("reason", "broken"), [("clear", {"I13"}), ("emergency", set())])
def test_only_a_crashing_cpu_clears_in_the_window(reason: str, broken: set[str]) -> None:
    """VMCLEAR in NMI context is for the emergency path alone."""
    assert in_window("ok").cpu(0, "nmi", irqs=False).vmclear(V, reason).violated() == broken


def test_a_call_in_an_nmi_handler_breaks_i22() -> None:
    """P-SEAMLDR is never called in NMI context."""
    run = Run().cpu(0, "nmi", irqs=False).begin(NONE).seamcall(INFO).end(NONE)
    assert run.violated() == {"I22"}


def locked(ctx: str, irqs: bool, request: int, run: Run) -> Run:
    """One hold of seamldr_lock."""
    return run.cpu(0, ctx, irqs=irqs).lock_request(request).lock_hold(request, request).lock_drop(request)


@pytest.mark.parametrize(("irqs", "broken"), [(True, True), (False, False)])
def test_a_lock_used_with_interrupts_on_and_in_a_handler_breaks_i22(irqs: bool, broken: bool) -> None:
    """Both uses of seamldr_lock are one deadlock waiting to happen, in whichever order they are seen."""
    for uses in ([("reader", irqs), ("irq", False)], [("irq", False), ("reader", irqs)]):
        run = Run()
        for request, (ctx, on) in enumerate(uses, 1):
            locked(ctx, on, request, run)
        assert ("I22" in run.violated()) == broken
