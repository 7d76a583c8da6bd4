"""Invariants about the TDX module while it is updated: I34, I36, I38, I40, I43.

A CPU that died in an update leaves it open; what is done then to get out of it is not Linux, and not judged here.
"""

from __future__ import annotations

from bus.invariant import EXPLAINED_BY_DEATH, Invariant
from bus.invariants_update import TDH_SYS_INIT, TDH_SYS_LP_INIT, TDH_SYS_SHUTDOWN, TDH_SYS_UPDATE, leaf_number
from bus.records import Record
from bus.shadow import P_SEAMLDR, Shadow

TDX_VCPU_NOT_ASSOCIATED = 0x80000702
"""Upper half of the status of TDH.VP.FLUSH on a vCPU that belongs to no CPU."""

WITHOUT_MODULE = (TDH_SYS_INIT, TDH_SYS_LP_INIT, TDH_SYS_UPDATE)


def succeeded(record: Record, leaf: int) -> bool:
    """Whether a `seamcall_return` tells that this leaf of the module was entered and said 0."""
    return bool(record["entered"]) and record["status"] == 0 and leaf_number(record["leaf"]) == leaf


class NoModuleBetween(Invariant):
    """Judged at SEAMCALLs and TD entries, from SHUTDOWN to UPDATE or to the first CPU that fails."""

    id = "I34"
    slug = "no-module-between"
    sentence = (
        "From a successful TDH.SYS.SHUTDOWN to a successful TDH.SYS.UPDATE no CPU makes a module SEAMCALL but "
        "TDH.SYS.INIT, TDH.SYS.LP.INIT and TDH.SYS.UPDATE, and no TD is entered."
    )
    source = "kernel seamldr.c: the update runs under stop_machine"
    broken_by = "a CPU that takes no part in the rendezvous"

    def __init__(self) -> None:
        super().__init__()
        self._shutdown: Record | None = None

    def _is_between(self, shadow: Shadow) -> bool:
        update = shadow.open_update()
        return self._shutdown is not None and update is not None and not update.failed and not shadow.dead

    def on_update_begin(self, record: Record, shadow: Shadow) -> None:
        self._shutdown = None

    def on_seamcall_enter(self, record: Record, shadow: Shadow) -> None:
        leaf = leaf_number(record["leaf"])
        if self._is_between(shadow) and not leaf & P_SEAMLDR and leaf not in WITHOUT_MODULE:
            why = f"{record['name']} on {record['node']} while there is no module"
            self.violated(why, ("shutdown", self._shutdown), ("call", record))

    def on_seamcall_return(self, record: Record, shadow: Shadow) -> None:
        if succeeded(record, TDH_SYS_SHUTDOWN):
            self._shutdown = record
        elif succeeded(record, TDH_SYS_UPDATE):
            self._shutdown = None

    def on_td_enter(self, record: Record, shadow: Shadow) -> None:
        if self._is_between(shadow):
            why = f"TD {record['td']} was entered on {record['node']} while there is no module"
            self.violated(why, ("shutdown", self._shutdown), ("entered", record))


class OnlyTheCallbackRuns(Invariant):
    """Judged where a CPU starts a stage, and at what shows that something else runs there."""

    id = "I36"
    slug = "only-the-callback-runs"
    sentence = "While a CPU is in the stages of an update, it has interrupts off and runs nothing but the callback."
    source = "kernel stop_machine.c, MULTI_STOP_RUN"
    broken_by = "a rendezvous that begins before all CPUs have disabled interrupts"

    def __init__(self) -> None:
        super().__init__()
        self._inside: dict[str, Record] = {}

    def on_state_enter(self, record: Record, shadow: Shadow) -> None:
        self._inside[record["node"]] = record
        if record.get("irqs"):
            self.violated(f"{record['node']} started {record['state']} with interrupts on", ("stage", record))

    def on_ack(self, record: Record, shadow: Shadow) -> None:
        if record["ret"]:
            self._inside.clear()
        elif record["state"] == "DONE":
            self._inside.pop(record["node"], None)

    def on_update_begin(self, record: Record, shadow: Shadow) -> None:
        self._inside.clear()

    on_update_end = on_update_begin

    def _judge(self, record: Record, shadow: Shadow) -> None:
        stage = self._inside.get(record["node"])
        if stage is not None and not shadow.dead:
            why = f"{record['event']} on {record['node']} in the middle of {stage['state']}"
            self.violated(why, ("stage", stage), (record["event"], record))

    on_irq_enter = on_vcpu_load = on_vcpu_put = on_vmentry = on_td_enter = on_admin_begin = on_csd_run = _judge


class InitializedIsTrue(Invariant):
    """Judged at the end of each update."""

    id = "I38"
    slug = "initialized-is-true"
    sentence = (
        "After an update the kernel calls TDX initialized if and only if TDH.SYS.UPDATE succeeded or TDH.SYS.SHUTDOWN "
        "did not."
    )
    source = "kernel tdx.c, tdx_module_shutdown() and tdx_module_run_update()"
    broken_by = "a flag that is not cleared before the module goes, or not set again"

    def __init__(self) -> None:
        super().__init__()
        self._module: Record | None = None
        self._flag: Record | None = None

    def on_seamcall_return(self, record: Record, shadow: Shadow) -> None:
        if succeeded(record, TDH_SYS_SHUTDOWN) or succeeded(record, TDH_SYS_UPDATE):
            self._module = record

    def on_module_init_flag(self, record: Record, shadow: Shadow) -> None:
        self._flag = record

    def on_update_end(self, record: Record, shadow: Shadow) -> None:
        there = self._module is None or leaf_number(self._module["leaf"]) == TDH_SYS_UPDATE
        says = self._flag is None or bool(self._flag["initialized"])
        if there != says and self._module is not None and self._module["node"] in shadow.dead:
            self.excused.append(f"the kernel does not know the module's state: {EXPLAINED_BY_DEATH[self.id]}")
        elif there != says:
            why = f"the kernel says that TDX is {'' if says else 'not '}initialized, the module that it is not so"
            self.violated(why, ("module", self._module), ("flag", self._flag), ("end", record))


class RefusedWithoutCall(Invariant):
    """Judged where an update is refused before it began."""

    id = "I40"
    slug = "refused-without-call"
    sentence = "An image that the kernel refuses has caused no SEAMCALL, and no CPU has heard of it."
    source = "kernel seamldr_install_module(): the image is checked before stop_machine()"
    broken_by = "a check that comes after SHUTDOWN"

    def __init__(self) -> None:
        super().__init__()
        self._begun: dict[tuple[str, str], Record | None] = {}

    def on_admin_begin(self, record: Record, shadow: Shadow) -> None:
        if record["kind"] == "install":
            self._begun[record["node"], record.get("ctx", "")] = None

    def _note(self, record: Record, shadow: Shadow) -> None:
        key = (record["node"], record.get("ctx", ""))
        if key in self._begun and self._begun[key] is None:
            self._begun[key] = record

    on_seamcall_enter = on_update_begin = _note

    def on_update_refused(self, record: Record, shadow: Shadow) -> None:
        before = self._begun.get((record["node"], record.get("ctx", "")))
        if before is not None:
            why = f"an update was refused ({record['why']}) after {before.get('name', 'it had begun')}"
            self.violated(why, ("before", before), ("refused", record))


class OneAssociation(Invariant):
    """Judged at TD entries that succeed and at TDH.VP.FLUSH."""

    id = "I43"
    slug = "one-association"
    sentence = "A TD vCPU belongs to at most one CPU: TDH.VP.FLUSH comes before it is entered on another."
    source = "Intel TDX module base specification, VCPU association"
    broken_by = "a flush IPI that is lost"

    def __init__(self) -> None:
        super().__init__()
        self._entered: dict[int, Record] = {}

    def on_td_enter(self, record: Record, shadow: Shadow) -> None:
        if record["status"] >> 63:
            return
        before = self._entered.get(record["vcpu"])
        if before is not None and before["node"] != record["node"]:
            why = f"TD vCPU {record['vcpu']} was entered on {record['node']} while it belonged to {before['node']}"
            self.violated(why, ("before", before), ("entered", record))
        self._entered[record["vcpu"]] = record

    def on_td_flush(self, record: Record, shadow: Shadow) -> None:
        before = self._entered.get(record["vcpu"])
        flushed = record["status"] == 0 or record["status"] >> 32 == TDX_VCPU_NOT_ASSOCIATED
        if before is not None and before["node"] == record["node"] and flushed:
            del self._entered[record["vcpu"]]


MODULE_INVARIANTS: tuple[type[Invariant], ...] = (
    NoModuleBetween,
    OnlyTheCallbackRuns,
    InitializedIsTrue,
    RefusedWithoutCall,
    OneAssociation,
)
