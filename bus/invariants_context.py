"""Invariants about contexts: who may call P-SEAMLDR, and who may use a VMCS meanwhile: I13, I22."""

from __future__ import annotations

from bus.invariant import Invariant
from bus.invariants_lock import SEAMLDR_LOCK
from bus.records import Record
from bus.shadow import P_SEAMLDR, Shadow

HANDLERS = ("irq", "nmi")
"""Contexts that run on top of a task."""

CRASH = "emergency"
"""Reason of the VMCLEARs that a crashing CPU executes in its NMI handler."""


class NoVmxInNmiWindow(Invariant):
    """Judged at instructions in NMI context; a VMREAD or VMWRITE that finds its VMCS has come outside the window."""

    id = "I13"
    slug = "no-vmx-in-nmi-window"
    sentence = "While a P-SEAMLDR call and its repair are under way on a CPU, no NMI handler there uses a VMCS."
    source = "kernel: the call runs with interrupts off, which NMIs ignore; perf asks KVM for guest RIP by VMREAD"
    broken_by = "an NMI, held back in SEAM and taken right after SEAMRET, whose handler executes VMREAD"

    def __init__(self) -> None:
        super().__init__()
        self._begun: dict[str, Record] = {}

    def on_strategy_begin(self, record: Record, shadow: Shadow) -> None:
        if record["ctx"] != "nmi":
            self._begun[record["node"]] = record

    def on_strategy_end(self, record: Record, shadow: Shadow) -> None:
        if record["ctx"] != "nmi":
            self._begun.pop(record["node"], None)

    on_strategy_error = on_strategy_end

    def _judge_access(self, record: Record, shadow: Shadow) -> None:
        if record["result"] != "ok":
            self._judge_change(record, shadow)

    def _judge_change(self, record: Record, shadow: Shadow) -> None:
        begun = self._begun.get(record["node"])
        if begun is not None and record["ctx"] == "nmi" and record.get("reason") != CRASH:
            self.violated(
                f"the NMI handler of {record['node']} executed {record['event'].upper()} during a P-SEAMLDR call",
                ("call", begun),
                ("took it", shadow.cpu(record["node"]).taken),
                ("in NMI", record),
            )

    on_vmread = on_vmwrite = on_vmentry = _judge_access
    on_vmptrld = on_vmclear = on_vmptrst = _judge_change


class CallContext(Invariant):
    """The second half is lockdep's rule: it needs no lockup to have happened, only both uses to have been seen."""

    id = "I22"
    slug = "call-context"
    sentence = (
        "P-SEAMLDR is never called in NMI context, and seamldr_lock is not taken in an interrupt handler "
        "if it is ever held with interrupts on."
    )
    source = "kernel seamldr_call(), merged: process context only; lockdep, inconsistent lock state"
    broken_by = "a call from a timer, an IPI or an NMI handler"

    def __init__(self) -> None:
        super().__init__()
        self._irqs_on: Record | None = None
        self._in_irq: Record | None = None

    def on_seamcall_enter(self, record: Record, shadow: Shadow) -> None:
        if record["ctx"] == "nmi" and record["leaf"] & P_SEAMLDR:
            self.violated(f"P-SEAMLDR was called in the NMI handler of {record['node']}", ("call", record))

    def on_lock_request(self, record: Record, shadow: Shadow) -> None:
        if record["lock"] == SEAMLDR_LOCK and record["ctx"] in HANDLERS:
            self._in_irq = self._in_irq or record
            self._judge()

    def on_lock_hold(self, record: Record, shadow: Shadow) -> None:
        if record["lock"] == SEAMLDR_LOCK and record["ctx"] not in HANDLERS and record["irqs"]:
            self._irqs_on = self._irqs_on or record
            self._judge()

    def _judge(self) -> None:
        if self._irqs_on is not None and self._in_irq is not None and not self.count:
            self.violated(
                "inconsistent lock state: seamldr_lock is held with interrupts on, and taken in an interrupt handler",
                ("irqs on", self._irqs_on),
                ("in irq", self._in_irq),
            )


CONTEXT_INVARIANTS: tuple[type[Invariant], ...] = (NoVmxInNmiWindow, CallContext)
