"""KVM's tracking of VMCSs per CPU (arch/x86/kvm/vmx/vmx.c, vmx_ops.h).

The rule that everything here keeps: a VMCS is active on at most one CPU, `loaded_vmcs.cpu` names it, and
`current_vmcs` of that CPU names the one that is current there. VMPTRLD is skipped when `current_vmcs` says that
nothing changed.
"""

from __future__ import annotations

from cpu.cpu import Cpu, current_vmcs
from cpu.layout import LoadedVmcs
from cpu.lists import ListWalk, list_add, list_del
from cpu.smp import smp_call_function_single
from cpu.struct import NONE, container_of
from cpu.vmx import Field, Outcome, Status
from kvm.lost import is_lost, lost_cpu
from kvm.virt import kvm_spurious_fault

# Instructions, with KVM's error reports (vmx_ops.h)


async def vmcs_read(cpu: Cpu, field: Field) -> int:
    """vmcs_readl: 0 if it fails, and execution goes on."""
    outcome = await cpu.vmread(field)
    if outcome.ok:
        return outcome.value
    if not await _faulted(cpu, outcome):
        cpu.warn_on_once(True, f"vmread failed: field={field:x}")
    return 0


async def vmcs_write(cpu: Cpu, field: Field, value: int) -> None:
    """vmcs_writel: the value is lost if it fails, and execution goes on."""
    outcome = await cpu.vmwrite(field, value)
    if not outcome.ok and not await _faulted(cpu, outcome):
        error = await vmcs_read(cpu, Field.VM_INSTRUCTION_ERROR)
        cpu.warn_on_once(True, f"vmwrite failed: field={field:x} val={value:x} err={error}")


async def write_if_changed(cpu: Cpu, cache: int, field: Field, value: int) -> None:
    """A write-through cache of a field: VMWRITE is skipped when KVM believes that nothing changed."""
    if await cpu.load(cache) != value:
        await vmcs_write(cpu, field, value)
        await cpu.store(cache, value)


async def _faulted(cpu: Cpu, outcome: Outcome) -> bool:
    """An exception instead of VMfail, as after VMXOFF, goes another way: no report, but a BUG at most times."""
    if outcome.status is Status.EXCEPTION:
        await kvm_spurious_fault(cpu)
    return outcome.status is Status.EXCEPTION


async def _report(cpu: Cpu, name: str, vmcs: int, outcome: Outcome) -> None:
    if not outcome.ok and not await _faulted(cpu, outcome):
        error = await vmcs_read(cpu, Field.VM_INSTRUCTION_ERROR)
        cpu.warn_on_once(True, f"{name} failed: {vmcs:x} err={error}")


async def vmcs_load(cpu: Cpu, vmcs: int) -> None:
    """VMPTRLD."""
    await _report(cpu, "vmptrld", vmcs, await cpu.vmptrld(vmcs, "load"))


async def vmcs_clear(cpu: Cpu, vmcs: int, reason: str = "clear") -> None:
    """VMCLEAR."""
    await _report(cpu, "vmclear", vmcs, await cpu.vmclear(vmcs, reason))


# Clearing


async def __loaded_vmcs_clear(cpu: Cpu, address: int) -> None:
    """Make a VMCS inactive on this CPU, where it is active. IRQs off, as in an IPI handler."""
    v = LoadedVmcs(address)
    if await cpu.load(v.cpu) != cpu.number:
        return
    vmcs = await cpu.load(v.vmcs)
    if await cpu.this_cpu_read(current_vmcs) == vmcs:
        await cpu.this_cpu_write(current_vmcs, None)
    await vmcs_clear(cpu, vmcs)
    shadow = await cpu.load(v.shadow_vmcs)
    if shadow and await cpu.load(v.launched):
        await vmcs_clear(cpu, shadow)
    cpu.emit("list_del", vmcs=vmcs)
    await list_del(cpu, v.link)
    # Two stores: as soon as another CPU sees cpu == -1 it may take the VMCS, before launched is 0.
    await cpu.store_recorded(v.cpu, NONE, "cpu_store", vmcs=vmcs)
    await cpu.store_recorded(v.launched, 0, "launched_store", vmcs=vmcs)


clear_on_this_cpu = __loaded_vmcs_clear


async def loaded_vmcs_clear(cpu: Cpu, v: LoadedVmcs) -> bool:
    """Clear a VMCS on whichever CPU it is active, by a waiting IPI. IRQs on. False if it is lost with a dead CPU."""
    owner = await cpu.load(v.cpu)
    if owner == NONE:
        return True
    if lost_cpu(owner) is not None:
        return False
    # -ENXIO is fine: a CPU that went offline has swept its list before.
    ret = await smp_call_function_single(cpu, owner, "__loaded_vmcs_clear", v.address)
    return not await is_lost(cpu, v.cpu, owner, ret)


async def vmclear_local_loaded_vmcss(cpu: Cpu) -> None:
    """Clear every VMCS that is active on this CPU."""
    async for entry in ListWalk(cpu, cpu.percpu.loaded_vmcss_on_cpu):
        await clear_on_this_cpu(cpu, container_of(entry, LoadedVmcs, "link").address)


async def loaded_vmcs_clear_current(cpu: Cpu) -> None:
    """Clear only the VMCS that `current_vmcs` names. Not in Linux: for the strategy `vmclear-current`."""
    current = await cpu.this_cpu_read(current_vmcs)
    async for entry in ListWalk(cpu, cpu.percpu.loaded_vmcss_on_cpu):
        v = container_of(entry, LoadedVmcs, "link")
        if current is not None and await cpu.load(v.vmcs) == current:
            await clear_on_this_cpu(cpu, v.address)


# Loading


async def vmx_vcpu_load_vmcs(cpu: Cpu, vcpu: int, v: LoadedVmcs, via: str, buddy: LoadedVmcs | None = None) -> bool:
    """Make `v` current on this CPU. Preemption off, IRQs on. `vcpu` and `via` are for the record.

    False, and nothing is loaded, if it is lost with a CPU that has died while `v` was active there.
    Kernels before May 2025 named the vCPU's other VMCS at a nested switch (`buddy`), and warned if it was not current.
    """
    vmcs = await cpu.load(v.vmcs)
    already = await cpu.load(v.cpu) == cpu.number
    if not already:
        if not await loaded_vmcs_clear(cpu, v):
            cpu.emit("vcpu_lost", vcpu=vcpu, vmcs=vmcs, cpu=lost_cpu(await cpu.load(v.cpu)))
            return False
        await cpu.local_irq_disable()
        cpu.emit("list_add", vmcs=vmcs)
        await list_add(cpu, v.link, cpu.percpu.loaded_vmcss_on_cpu)
        await cpu.local_irq_enable()
    previous = await cpu.this_cpu_read(current_vmcs)
    skipped = previous == vmcs
    if not skipped:
        await cpu.this_cpu_write(current_vmcs, vmcs)
        await vmcs_load(cpu, vmcs)
        if buddy is not None:
            cpu.warn_on_once(await cpu.load(buddy.vmcs) != previous, "buddy->vmcs != prev")
    if not already:
        await vmcs_write(cpu, Field.HOST_TR_BASE, host_tr_base(cpu))
        await vmcs_write(cpu, Field.HOST_GDTR_BASE, host_gdtr_base(cpu))
        await vmcs_write(cpu, Field.HOST_IA32_SYSENTER_ESP, host_tr_base(cpu) + 0x200)
        await cpu.store_recorded(v.cpu, cpu.number, "cpu_store", vmcs=vmcs)
    cpu.emit("vcpu_load", vcpu=vcpu, vmcs=vmcs, via=via, skipped=int(skipped), migrated=int(not already))
    return True


def host_tr_base(cpu: Cpu) -> int:
    """Linear address of this CPU's TSS."""
    return 0xFFFF_FE00_0000_3000 + cpu.number * 0x10000


def host_gdtr_base(cpu: Cpu) -> int:
    """Linear address of this CPU's GDT."""
    return 0xFFFF_FE00_0000_1000 + cpu.number * 0x10000


# Allocation


async def alloc_loaded_vmcs(cpu: Cpu, v: LoadedVmcs, page: int) -> None:
    """Stamp the revision id into the page and VMCLEAR it; the CPU is in VMX operation. A vmcs of 0 in `v` means none.
    """
    await cpu.clear_page(page)
    await cpu.write_phys(page, cpu.vmx.config.vmcs_revision_id.to_bytes(4, "little"))
    await vmcs_clear(cpu, page, "alloc")
    for word, value in ((v.vmcs, page), (v.shadow_vmcs, 0), (v.host_rsp, 0), (v.host_cr3, 0)):
        await cpu.store(word, value)
    await cpu.store(v.exec_control, 0)
    await cpu.store(v.secondary_exec_control, 0)
    await cpu.store_recorded(v.cpu, NONE, "cpu_store", vmcs=page)
    await cpu.store_recorded(v.launched, 0, "launched_store", vmcs=page)


async def free_loaded_vmcs(cpu: Cpu, v: LoadedVmcs) -> None:
    """Clear the VMCS wherever it is active and forget its page."""
    if await cpu.load(v.vmcs):
        await loaded_vmcs_clear(cpu, v)
        await cpu.store(v.vmcs, 0)
        cpu.warn_on_once(bool(await cpu.load(v.shadow_vmcs)), "a VMCS is freed with its shadow VMCS")
