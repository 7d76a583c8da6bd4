"""Bringing a CPU into the machine at its start and taking it out at its end (arch/x86/virt/hw.c, kvm_main.c)."""

from __future__ import annotations

from cpu.cpu import Cpu, current_vmcs
from cpu.layout import KERNEL, TDX_STATE, scratch_vmcs, vmxon_region
from cpu.lists import init_list_head
from kvm.hotplug import core_owns_vmxon, kvm_disable_virtualization_cpu, kvm_online_cpu, tdx_online_cpu
from kvm.loaded_vmcs import vmcs_clear
from kvm.virt import X86_CR4_VMXE, x86_virt_put_ref


async def cpu_up(cpu: Cpu) -> None:
    """Per-CPU variables, VMX operation for TDX and for KVM, and into the online mask."""
    percpu = cpu.percpu
    revision = cpu.vmx.config.vmcs_revision_id.to_bytes(4, "little")
    await cpu.cr4_clear_bits(X86_CR4_VMXE)
    await cpu.write_phys(vmxon_region(cpu.number), revision)
    await cpu.write_phys(scratch_vmcs(cpu.number), revision)
    await init_list_head(cpu, percpu.loaded_vmcss_on_cpu)
    await init_list_head(cpu, percpu.associated_tdvcpus)
    await cpu.this_cpu_write(current_vmcs, None)
    await cpu.store(percpu.virtualization_nr_users, 0)
    await cpu.store(percpu.lp_initialized, await cpu.load(TDX_STATE.initialized))
    await tdx_online_cpu(cpu)
    await kvm_online_cpu(cpu)
    await vmcs_clear(cpu, scratch_vmcs(cpu.number), "alloc")
    await cpu.store(percpu.online, 1)
    await cpu.atomic_add(KERNEL.num_online, 1)
    cpu.emit("cpu_online")


async def cpu_down(cpu: Cpu) -> None:
    """What an orderly reboot does on each CPU: KVM, then TDX, lets go of VMX operation; out of the online mask."""
    flags = await cpu.local_irq_save()
    if not await cpu.load(KERNEL.kvm_unloaded):
        await kvm_disable_virtualization_cpu(cpu)
    if core_owns_vmxon(cpu):
        await x86_virt_put_ref(cpu)
    await cpu.local_irq_restore(flags)
    await cpu.store(cpu.percpu.online, 0)
    await cpu.atomic_add(KERNEL.num_online, -1)
    cpu.emit("cpu_offline")
