"""Invariants about KVM's tracking of VMCSs, and about strategies that touch it: I7, I8, I9, I10, I11, I12, I15.

What a dead CPU had is not judged: its list and its `current_vmcs` are RAM that nobody kept up to date.
"""

from __future__ import annotations

from bus.events import NONE
from bus.invariant import Invariant
from bus.records import Record
from bus.shadow import Shadow, cpu_node


class Tracked(Invariant):
    """Base: `owner` is the last store of each `loaded_vmcs.cpu`, `lists` what is on each loaded_vmcss_on_cpu."""

    def __init__(self) -> None:
        super().__init__()
        self.owner: dict[int, Record] = {}
        self.lists: dict[str, dict[int, Record]] = {}

    def on_list_add(self, record: Record, shadow: Shadow) -> None:
        self.lists.setdefault(record["node"], {})[record["vmcs"]] = record

    def on_list_del(self, record: Record, shadow: Shadow) -> None:
        self.lists.get(record["node"], {}).pop(record["vmcs"], None)

    def on_cpu_store(self, record: Record, shadow: Shadow) -> None:
        self.owner[record["vmcs"]] = record


class InactiveAtVmxoff(Invariant):
    """Judged at each VMXOFF."""

    id = "I7"
    slug = "inactive-at-vmxoff"
    sentence = "At VMXOFF no VMCS is active on the CPU."
    source = "SDM vol. 3C 25.11.1: VMCLEAR every active VMCS before VMXOFF"
    broken_by = "a CPU that goes offline unswept; a VMCS that is active and on no list"

    def on_vmxoff(self, record: Record, shadow: Shadow) -> None:
        if record["result"] == "ok" and record["active"]:
            active = sorted(shadow.cpu(record["node"]).active)
            loads = [("load", shadow.v(vmcs).activated.get(record["node"])) for vmcs in active[:2]]
            self.violated(f"{record['active']} VMCSs were active on {record['node']}", *loads, ("off", record))


class ListMatchesOwner(Tracked):
    """Judged for a vCPU's VMCS where it has been loaded and where it is put."""

    id = "I8"
    slug = "list-matches-owner"
    sentence = "A VMCS is on a CPU's loaded_vmcss_on_cpu if and only if its loaded_vmcs.cpu names this CPU."
    source = "kernel vmx_vcpu_load_vmcs() and __loaded_vmcs_clear()"
    broken_by = "a reset of half of the tracking; two changes of a list at once"

    def _judge(self, record: Record, shadow: Shadow) -> None:
        node, vmcs = record["node"], record["vmcs"]
        owner, added = self.owner.get(vmcs), self.lists.get(node, {}).get(vmcs)
        if owner is None or node in shadow.dead:
            return
        named = owner["new"] != NONE and cpu_node(owner["new"]) == node
        if named != (added is not None):
            where = "is not" if named else "is"
            why = f"VMCS {vmcs:#x} {where} on the list of {node} although its cpu is {_owner(owner)}"
            self.violated(why, ("owner", owner), ("list", added), ("seen", record))

    on_vcpu_load = on_vcpu_put = _judge


class ReleasedAfterClear(Tracked):
    """Judged where `loaded_vmcs.cpu` becomes -1, and where a VMCS joins a list."""

    id = "I9"
    slug = "released-after-clear"
    sentence = (
        "loaded_vmcs.cpu becomes -1 only after VMCLEAR and after the VMCS has left the list, and no CPU takes a VMCS "
        "before that."
    )
    source = "kernel __loaded_vmcs_clear(): smp_wmb() before the store, and its counterpart in vmx_vcpu_load_vmcs()"
    broken_by = "a clear IPI that nobody waits for; stores in another order"

    def on_cpu_store(self, record: Record, shadow: Shadow) -> None:
        node, vmcs = record["node"], record["vmcs"]
        if record["new"] == NONE:
            active, added = shadow.v(vmcs).activated.get(node), self.lists.get(node, {}).get(vmcs)
            if active is not None or added is not None:
                how = "while it was active" if active is not None else "while it was on the list"
                self.violated(f"{node} gave VMCS {vmcs:#x} up {how}", ("since", active or added), ("gave up", record))
        super().on_cpu_store(record, shadow)

    def on_list_add(self, record: Record, shadow: Shadow) -> None:
        node, vmcs = record["node"], record["vmcs"]
        owner = self.owner.get(vmcs)
        if owner is not None and owner["new"] != NONE and cpu_node(owner["new"]) not in shadow.dead:
            why = f"{node} took VMCS {vmcs:#x} while its cpu was {_owner(owner)}"
            self.violated(why, ("owner", owner), ("taken", record))
        super().on_list_add(record, shadow)


def _owner(record: Record) -> str:
    return "-1" if record["new"] == NONE else cpu_node(record["new"])


class FreedWhenInactive(Invariant):
    """Judged where a vCPU's VMCS is freed."""

    id = "I10"
    slug = "freed-when-inactive"
    sentence = "A VMCS is freed only when it is active on no CPU, and no current_vmcs names it."
    source = "kernel free_loaded_vmcs()"
    broken_by = "a page that is freed without a clear; a VMPTRLD of a VMCS that was saved before it was freed"

    def on_vcpu_destroy(self, record: Record, shadow: Shadow) -> None:
        vmcs = record["vmcs"]
        for node, activated in shadow.v(vmcs).activated.items():
            if node not in shadow.dead:
                self.violated(
                    f"VMCS {vmcs:#x} was freed while it was active on {node}", ("load", activated), ("freed", record)
                )
        for cpu in shadow.cpus.values():
            if cpu.cv == vmcs and cpu.node not in shadow.dead:
                why = f"VMCS {vmcs:#x} was freed while current_vmcs of {cpu.node} named it"
                self.violated(why, ("load", cpu.load), ("freed", record))


class RestoresWhatItSaved(Invariant):
    """Judged at each VMPTRLD with which a strategy restores; `saved` is by CPU and context."""

    id = "I11"
    slug = "restores-what-it-saved"
    sentence = "A strategy restores exactly the VMCS that the same call saved, on the same CPU."
    source = "seamldr_call() of version 3 of the series: VMPTRST before, VMPTRLD after"
    broken_by = "migration between save and restore; a variable for the saved pointer that callers share"

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[tuple[str, str], Record] = {}

    def on_strategy_begin(self, record: Record, shadow: Shadow) -> None:
        self._saved.pop((record["node"], record.get("ctx", "")), None)

    def on_vmptrst(self, record: Record, shadow: Shadow) -> None:
        self._saved[record["node"], record.get("ctx", "")] = record

    def on_vmptrld(self, record: Record, shadow: Shadow) -> None:
        saved = self._saved.get((record["node"], record.get("ctx", "")))
        if record["reason"] == "restore" and (saved is None or saved["value"] != record["vmcs"]):
            what = "nothing" if saved is None else f"VMCS {saved['value']:#x}"
            why = f"{record['node']} restored VMCS {record['vmcs']:#x} after this call had saved {what} here"
            self.violated(why, ("saved", saved), ("restored", record))


class RepairsWithInterruptsOff(Invariant):
    """Judged at everything that a strategy does to VMCSs and their tracking."""

    id = "I12"
    slug = "repairs-with-irqs-off"
    sentence = "Inside seamldr_call, what saves, clears or restores VMCSs or their tracking runs with interrupts off."
    source = "version 3 of the series: a vCPU may be scheduled in, or a clear IPI land, between save and restore"
    broken_by = "a strategy without irqsave"

    def _judge(self, record: Record, shadow: Shadow) -> None:
        if record.get("irqs") and shadow.cpu(record["node"]).strategies[record.get("ctx", "")]:
            what = f"{record['event']} inside seamldr_call on {record['node']} with interrupts on"
            self.violated(what, (record["event"], record))

    on_vmptrst = on_vmptrld = on_vmclear = on_cv_write = on_list_del = _judge


class ClearedWhereActive(Invariant):
    """Judged at each VMCLEAR."""

    id = "I15"
    slug = "cleared-where-active"
    sentence = "VMCLEAR of a VMCS is executed only on the CPU where it is active, or while it is active nowhere."
    source = "SDM vol. 3C 25.11.1: VMCLEAR on another processor leaves the data in this one's cache"
    broken_by = "a strategy that walks the list of another CPU"

    def on_vmclear(self, record: Record, shadow: Shadow) -> None:
        node, vmcs = record["node"], record["vmcs"]
        elsewhere = shadow.v(vmcs).active - {node} - shadow.dead
        if record["result"] == "ok" and elsewhere:
            other = min(elsewhere)
            why = f"VMCS {vmcs:#x} was cleared on {node} while it was active on {other}"
            self.violated(why, ("load", shadow.v(vmcs).activated.get(other)), ("cleared", record))


TRACKING_INVARIANTS: tuple[type[Invariant], ...] = (
    InactiveAtVmxoff,
    ListMatchesOwner,
    ReleasedAfterClear,
    FreedWhenInactive,
    RestoresWhatItSaved,
    RepairsWithInterruptsOff,
    ClearedWhereActive,
)
