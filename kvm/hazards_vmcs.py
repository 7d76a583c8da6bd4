"""Hazards of the current VMCS, from H0 to H9b, and H25, H29, H30, H34. `kvm.hazard_table` has the table of all."""

from __future__ import annotations

from typing import Any

from cpu.cpu import Cpu, PerCpuVariable, current_vmcs
from cpu.irq_work import irq_work_queue
from cpu.layout import LoadedVmcs, per_cpu, task_address, task_vmcs
from cpu.loop import Priority, Thread
from cpu.migration import movable, set_cpus_allowed
from cpu.struct import NONE, ListHead
from cpu.vmx import Field
from kvm import scenes
from kvm.hazard import (
    A_STRATEGY,
    NESTED_PAGES,
    Shown,
    failed,
    info,
    install,
    load_only,
    load_run_put,
    patched,
    prefer,
    step_until,
    until_in_seam,
    violated,
    warnings,
)
from kvm.hotplug import kvm_exit
from kvm.loaded_vmcs import free_loaded_vmcs, vmcs_read
from kvm.nested import NestedVcpu
from kvm.stepped import Stepped
from kvm.tdx import VmxTdVcpu
from kvm.vcpu import td_vcpu_of, vcpu_of
from kvm.vmx import VmxVcpu
from seamldr.entropy import RandomEntropy, RdrandUse
from seamldr.pseamldr import PSeamldr

V = task_vmcs(0)

FIXED = {"vmx_basic_bit60": 1}


def same_vcpu_next(strategy: A_STRATEGY, **knobs: Any) -> Shown:
    """H0: x is put, a thread reads the version, x is loaded again with no other vCPU in between."""
    machine = Stepped(strategy, **knobs)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    before = machine.count("vmptrld")
    machine.run(info)
    alive = machine.run(load_run_put(x))
    reports = warnings(machine)
    bites = failed(machine, "vmread", "vmwrite") != [] and "vmread failed: field=4400" in reports and not alive
    seen = {"VMPTRLDs": machine.count("vmptrld") - before, "kernel log": reports[:3], "the vCPU goes on": alive}
    return Shown(machine, bites, seen)


def another_vcpu_between(strategy: A_STRATEGY, launch: str) -> Shown:
    """H0b: as H0, but y is loaded in between."""
    machine = Stepped(strategy, seamret_launch=launch)
    x, y = machine.new_vcpu(0), machine.new_vcpu(1)
    machine.run(load_run_put(x))
    machine.run(info)
    machine.run(load_run_put(y))
    machine.run(load_run_put(x))
    accesses, entries = failed(machine, "vmread", "vmwrite"), failed(machine, "vmentry")
    return Shown(machine, bool(accesses or entries), {"accesses that fail": accesses, "entries that fail": entries})


def launch_state(strategy: A_STRATEGY, launch: str = "clear", between: bool = False) -> Shown:
    """H2: x has run; a thread reads the version; x enters again."""
    machine = Stepped(strategy, seamret_launch=launch)
    x, y = machine.new_vcpu(0), machine.new_vcpu(1)
    machine.run(load_run_put(x))
    machine.run(info)
    if between:
        machine.run(load_run_put(y))
    machine.run(load_run_put(x))
    seen = {"KVM_EXIT_FAIL_ENTRY, reason": x.fail_reason, "entries that fail": failed(machine, "vmentry")}
    return Shown(machine, x.fail_reason == 5, seen)


def never_ran(strategy: A_STRATEGY) -> Shown:
    """H2b: as H2, of a vCPU that was loaded and not yet entered."""
    machine = Stepped(strategy, seamret_launch="clear")
    x = machine.new_vcpu(0)
    machine.run(load_only(x))
    machine.run(info)
    alive = machine.run(load_run_put(x))
    return Shown(machine, not alive, {"the vCPU goes on": alive, "broken": violated(machine)})


def irq_caller(strategy: A_STRATEGY, **knobs: Any) -> Shown:
    """H3: the handler of an interrupt between two VMREADs of a loaded vCPU reads the version."""
    machine = Stepped(strategy, **knobs)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))

    async def two_reads(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await vmcs_read(cpu, Field.GUEST_RIP)
        irq_work_queue(cpu, info)
        await cpu.give_way()
        await vmcs_read(cpu, Field.GUEST_RSP)
        await x.vcpu_put(cpu)

    machine.run(two_reads)
    accesses = failed(machine, "vmread")
    return Shown(machine, accesses != [], {"the second VMREAD": accesses[:1] or "ok"})


def migrates_mid_call(strategy: A_STRATEGY) -> Shown:
    """H4: the stopper moves the caller to CPU 1 once it has saved; y, whose VMCS is current there, is loaded next."""
    machine = Stepped(strategy, cpus=2)
    x, y = machine.new_vcpu(0), machine.new_vcpu(1, 1)
    machine.run(load_run_put(x))
    machine.run(load_run_put(y), 1)
    cpu, here = movable(machine.cpu())
    reader = Thread("reader", Priority.KERNEL, info(cpu))
    machine.machine.start(0, reader)
    step_until(machine, 0, lambda: bool(machine.events("vmptrst")))
    set_cpus_allowed(machine.machine, reader, here, 1)
    machine.machine.run()
    restored = [r["node"] for r in machine.events("vmptrld") if r["reason"] == "restore" and r["vmcs"] == V]
    machine.run(load_run_put(y), 1)
    taken = [r["result"] for r in machine.events("vmentry", cpu=1) if r["vcpu"] == 1 and r["vmcs"] == V]
    seen = {"CPU 0's VMCS is restored on": restored, "y enters x's VMCS": taken, "broken": violated(machine)}
    return Shown(machine, restored == ["cpu1"] and taken != [] and "I1" in violated(machine), seen)


def _in_window(strategy: A_STRATEGY) -> tuple[Stepped, VmxVcpu]:
    """x was put on CPU 0, and a reader there is inside P-SEAMLDR."""
    machine = Stepped(strategy, cpus=2)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    return machine, x


def clear_ipi_in_window(strategy: A_STRATEGY) -> Shown:
    """H5: CPU 1 loads x while a reader on CPU 0, where x ran last, is in P-SEAMLDR; x runs there, and comes back."""
    machine, x = _in_window(strategy)
    machine.start(load_only(x), 1, "vcpu0")
    machine.machine.run(prefer(1))
    both = [f"cpu{n}" for n in (0, 1) if V in machine.cpu(n).vmx.active]
    machine.run(load_run_put(x), 1)
    machine.run(load_run_put(x), 0)
    wrong = machine.count("wrong_data")
    seen = {"x's VMCS is active on": both, "fields that are lost": wrong, "broken": violated(machine)}
    return Shown(machine, len(both) == 2 and "I1" in violated(machine) and wrong > 0, seen)


def page_freed_in_window(strategy: A_STRATEGY, page: str) -> Shown:
    """H5b: as H5, but CPU 1 destroys x, and the page becomes somebody else's data, a new VMCS, or nobody's."""
    machine, x = _in_window(strategy)
    fresh = VmxVcpu(1, vcpu_of(1))

    async def free(cpu: Cpu) -> None:
        await free_loaded_vmcs(cpu, x.state.loaded_vmcs)
        cpu.emit("vcpu_destroy", vcpu=0, vmcs=V)
        if page == "data":
            await cpu.write_phys(V, b"\x77" * 4096)
        elif page == "VMCS":
            await fresh.create(cpu, V)

    machine.start(free, 1)
    machine.machine.run(prefer(1))
    order = [r for r in machine.events("vmptrld", "vcpu_destroy") if r.get("reason") in ("restore", None)]
    freed = next(at for at, r in enumerate(order) if r["event"] == "vcpu_destroy")
    restores = [r["result"] for r in order[freed + 1 :]]
    seen = {
        "restored after it was freed": restores,
        "the page is a VMCS of": [f"cpu{n}" for n in (0, 1) if V in machine.cpu(n).vmx.active],
    }
    return Shown(machine, restores != [], seen)


def scheduled_into_window(strategy: A_STRATEGY) -> Shown:
    """H6: a vCPU thread of the same CPU gets its turn as soon as the caller can be preempted."""
    for seed in range(4):
        act = scenes.task(strategy, seed)
        if failed(act.machine, "vmread"):
            break
    accesses = failed(act.machine, "vmread")[:1]
    found = violated(act.machine, finished=act.came_to_rest)
    return Shown(act.machine, "I3" in found, {"broken": found, "the vCPU's first access": accesses or "ok"})


def nested_vcpu(strategy: A_STRATEGY, *, names_buddy: bool = False, **knobs: Any) -> tuple[Stepped, NestedVcpu]:
    """A machine with a nested vCPU that has run L1 and L2 once: loaded nowhere, but active on CPU 0."""
    machine = Stepped(strategy, **knobs)
    x = NestedVcpu(0, task_address(0), names_buddy=names_buddy)

    async def begin(cpu: Cpu) -> None:
        await x.create(cpu, V)
        await x.vcpu_load(cpu)
        await x.enter_vmx_operation(cpu, NESTED_PAGES, NESTED_PAGES + 0x1000)
        await x.vcpu_enter_guest(cpu)
        await x.nested_vmx_run(cpu)
        await x.vcpu_put(cpu)

    machine.run(begin)
    return machine, x


def irq_caller_in_shadow(strategy: A_STRATEGY) -> Shown:
    """H7: the handler of an interrupt reads the version while KVM copies fields out of a shadow VMCS."""
    machine, x = nested_vcpu(strategy)

    async def copy(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await x.copy_shadow_to_vmcs12(cpu)
        await x.vcpu_put(cpu)

    machine.start(copy)
    step_until(machine, 0, lambda: machine.cpu().vmx.cur == x.shadow_page)
    irq_work_queue(machine.cpu(), info)
    machine.machine.run()
    head = per_cpu(0).loaded_vmcss_on_cpu
    unlisted = machine.memory.load(ListHead(head).next)[0] == head and V in machine.cpu().vmx.active
    accesses = failed(machine, "vmread")
    seen = {"VMREADs of the copy that fail": len(accesses), "vmcs01 is active but unlisted": unlisted}
    return Shown(machine, bool(accesses) or unlisted, seen)


def nested_switch(strategy: A_STRATEGY, names_buddy: bool = False) -> Shown:
    """H8: the version is read, on top of a vCPU with vmcs02 selected, right before KVM goes back to vmcs01."""
    machine, x = nested_vcpu(strategy, names_buddy=names_buddy)

    async def switch(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await x.vmx_switch_vmcs(cpu, LoadedVmcs(x.state.vmcs02))
        irq_work_queue(cpu, info)
        await cpu.give_way()
        await x.vmx_switch_vmcs(cpu, LoadedVmcs(x.state.vmcs01))
        await x.vcpu_enter_guest(cpu)
        await x.vcpu_put(cpu)

    machine.run(switch)
    seen = {"kernel log": warnings(machine), "accesses that fail": failed(machine, "vmread", "vmwrite", "vmentry")}
    return Shown(machine, any(seen.values()), seen)


def nested_launch_state(strategy: A_STRATEGY, launch: str) -> Shown:
    """H8: as H2, for vmcs02, which was current when the version was read."""
    machine, x = nested_vcpu(strategy, seamret_launch=launch)

    async def with_vmcs02(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await x.vmx_switch_vmcs(cpu, LoadedVmcs(x.state.vmcs02))
        await x.vcpu_put(cpu)

    async def back(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await x.vmx_switch_vmcs(cpu, LoadedVmcs(x.state.vmcs01))
        await x.vcpu_enter_guest(cpu)
        await x.nested_vmx_run(cpu)
        await x.vcpu_put(cpu)

    machine.run(with_vmcs02)
    machine.run(info)
    machine.run(back)
    entries, accesses = failed(machine, "vmentry"), failed(machine, "vmread", "vmwrite")
    seen = {
        "entries that fail": entries,
        "what L1 sees": f"VMfail {x.vmcs12.vmfail}" if x.vmcs12.vmfail else "ok",
        "the vCPU goes on": x.fail_reason is None,
    }
    return Shown(machine, x.vmcs12.vmfail == 7 and x.fail_reason is None and not accesses, seen)


def no_vmx_operation(strategy: A_STRATEGY, owner: str) -> Shown:
    """H9: KVM is unloaded, then the version is read."""
    machine = Stepped(strategy, cpus=2, vmxon_owner=owner)
    machine.run(kvm_exit)
    errno = machine.run(info)
    return Shown(machine, errno < 0, {"errno": errno, "kernel log": warnings(machine)})


def no_current_vmcs(strategy: A_STRATEGY) -> Shown:
    """H9b: the version is read on a CPU on which no vCPU was ever loaded."""
    machine = Stepped(strategy)
    machine.run(info)
    saved, restores = machine.events("vmptrst")[-1]["value"], [r["result"] for r in machine.events("vmptrld")]
    seen = {"VMPTRST stores": f"{saved:#x}", "VMPTRLDs": restores}
    return Shown(machine, saved == NONE and restores != [], seen)


class DryRandom(RandomEntropy):
    """RDRAND that fails a number of times when P-SEAMLDR draws its address space."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def rdrand(self, use: RdrandUse) -> int | None:
        """64 random bits, or None."""
        if use is RdrandUse.ASLR and self.left:
            self.left -= 1
            return None
        return super().rdrand(use)


def dry_seamldr(machine: Stepped, times: int) -> None:
    """From now on P-SEAMLDR finds no entropy the first `times` times."""
    loader = machine.seam.loader
    machine.seam.loader = PSeamldr(loader.platform, loader.memory, loader.state, DryRandom(times))


def retry_in_strategy(strategy: A_STRATEGY) -> Shown:
    """H25: INSTALL finds no entropy twice and is tried again, on a CPU whose current VMCS is x's."""
    machine = Stepped(strategy)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    dry_seamldr(machine, 2)
    errno = machine.run(install(machine), name="kworker")
    calls = [r for r in machine.events("seamcall_return") if r["name"] == "SEAMLDR.INSTALL"]
    alive = machine.run(load_run_put(x))
    seen = {
        "attempts": [f"{r['status']:#x}" for r in calls],
        "VMCSs lost": [r["lost"] != NONE for r in calls],
        "saved": [f"{r['value']:#x}" for r in machine.events("vmptrst")],
        "the update": errno,
        "the vCPU goes on": alive,
    }
    return Shown(machine, not alive and seen["VMCSs lost"] == [True, False, False], seen)


def pointer_outlives_vmcs(nulled: bool) -> Shown:
    """H29: x is destroyed, and its page becomes the VMCS of a new vCPU."""
    machine = Stepped("none")
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    store = Cpu.this_cpu_write

    async def never_null(cpu: Cpu, variable: PerCpuVariable, value: int | None) -> None:
        if variable is not current_vmcs or value is not None:
            await store(cpu, variable, value)

    fresh = VmxVcpu(0, x.state)

    async def reuse(cpu: Cpu) -> None:
        await x.destroy(cpu)
        await fresh.create(cpu, V)

    with patched(Cpu, "this_cpu_write", store if nulled else never_null):
        machine.run(reuse)
    skipped = bool(machine.events("vcpu_load")[-1]["skipped"])
    accesses = failed(machine, "vmwrite")
    seen = {"VMPTRLD of the new VMCS is skipped": skipped, "VMWRITEs that fail": len(accesses)}
    return Shown(machine, skipped and accesses != [], seen)


def whole_cache(strategy: A_STRATEGY) -> Shown:
    """H30: x, then y run on a CPU; the version is read, and SEAMRET clears the launch state of all; x enters again."""
    machine = Stepped(strategy, seamret_launch="clear", seamret_scope="all_active_on_lp")
    x, y = machine.new_vcpu(0), machine.new_vcpu(1)
    machine.run(load_run_put(x))
    machine.run(load_run_put(y))
    machine.run(info)
    machine.run(load_run_put(x))
    return Shown(machine, x.fail_reason == 5, {"entries that fail": failed(machine, "vmentry")})


def only_trust_domains(td: bool) -> Shown:
    """H34: a TD, or a VMX guest, runs; the version is read; it runs again."""
    machine = Stepped("none", tds=1)
    x: VmxTdVcpu | VmxVcpu = machine.new_vcpu(1)
    if td:
        state = td_vcpu_of(0)
        for word, value in ((state.cpu, NONE), (state.tdvpr, machine.tds[0].vcpus[0])):
            machine.memory.store(word, value, 0)
        x = VmxTdVcpu(0, state)
    machine.run(x.run)
    machine.run(info)
    lost = machine.events("seamcall_return")[-1]["lost"]
    alive = machine.run(x.run)
    return Shown(machine, lost != NONE or not alive, {"VMCS lost": lost != NONE, "the guest goes on": alive})
