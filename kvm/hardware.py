"""Bringing a CPU into the machine and taking it out (arch/x86/virt/hw.c, kvm_arch_enable_virtualization_cpu)."""

from __future__ import annotations

from cpu.cpu import Cpu, current_vmcs
from cpu.layout import KERNEL, TDX_STATE, scratch_vmcs, vmxon_region
from cpu.lists import ListWalk, init_list_head
from cpu.struct import container_of
from kvm.loaded_vmcs import vmcs_clear, vmclear_local_loaded_vmcss
from kvm.tdx import tdx_flush_vp
from kvm.vcpu import TdVcpu


async def cpu_up(cpu: Cpu) -> None:
    """Per-CPU variables, VMXON, and into the online mask."""
    percpu = cpu.percpu
    revision = cpu.vmx.config.vmcs_revision_id.to_bytes(4, "little")
    await cpu.write_phys(vmxon_region(cpu.number), revision)
    await cpu.write_phys(scratch_vmcs(cpu.number), revision)
    await init_list_head(cpu, percpu.loaded_vmcss_on_cpu)
    await init_list_head(cpu, percpu.associated_tdvcpus)
    await cpu.this_cpu_write(current_vmcs, None)
    outcome = await cpu.vmxon(vmxon_region(cpu.number))
    cpu.warn_on_once(not outcome.ok, "VMXON failed")
    await vmcs_clear(cpu, scratch_vmcs(cpu.number), "alloc")
    await cpu.store(percpu.lp_initialized, await cpu.load(TDX_STATE.initialized))
    await cpu.store(percpu.online, 1)
    await cpu.atomic_add(KERNEL.num_online, 1)
    cpu.emit("cpu_online")


async def cpu_down(cpu: Cpu) -> None:
    """Flush every TD vCPU, clear every VMCS, VMXOFF, out of the online mask."""
    flags = await cpu.local_irq_save()
    async for entry in ListWalk(cpu, cpu.percpu.associated_tdvcpus):
        await tdx_flush_vp(cpu, container_of(entry, TdVcpu, "cpu_list").address)
    await vmclear_local_loaded_vmcss(cpu)
    await cpu.local_irq_restore(flags)
    await cpu.vmxoff()
    await cpu.store(cpu.percpu.online, 0)
    await cpu.atomic_add(KERNEL.num_online, -1)
    cpu.emit("cpu_offline")
