"""Bringing a CPU into the machine at its start and taking it out at its end (arch/x86/virt/hw.c, kvm_main.c)."""

from __future__ import annotations

from errno import ENXIO

from cpu.cpu import Cpu, current_vmcs
from cpu.layout import KERNEL, MAX_TDS, TDX_STATE, CpuhpWork, scratch_vmcs, vmxon_region
from cpu.lists import init_list_head
from cpu.mutex import take_from_the_dead
from cpu.smp import complete_calls_to_the_dead
from cpu.struct import NONE
from kvm.hotplug import (
    core_owns_vmxon,
    kvm_disable_virtualization_cpu,
    kvm_online_cpu,
    set_cpu_online,
    take_cpu_down,
    tdx_online_cpu,
)
from kvm.loaded_vmcs import vmcs_clear
from kvm.lost import lose_vcpus
from kvm.run_queue import lose_tasks
from kvm.virt import X86_CR4_VMXE, x86_virt_put_ref


async def cpu_up(cpu: Cpu, vcpus: int = 0, tds: int = 0) -> None:
    """Per-CPU variables, VMX operation for TDX and for KVM, and into the online mask.

    A new process over the RAM of one that died finds hardware as after INIT, and what RAM says of the old hardware it
    puts in order first. `vcpus` and `tds` are the machine's tasks, in this order; more TDs may have been built. If a
    callback fails, as TDX's does where an update has left no module, the CPU stays offline.
    """
    percpu = cpu.percpu
    cpu.lives = await cpu.load(percpu.lives) + 1
    await cpu.store(percpu.lives, cpu.lives)
    if cpu.lives > 1:
        await _bury(cpu, vcpus, tds)
    else:
        # Firmware has made every LP known to the module that it booted.
        await cpu.store(percpu.lp_initialized, await cpu.load(TDX_STATE.initialized))
    revision = cpu.vmx.config.vmcs_revision_id.to_bytes(4, "little")
    await cpu.cr4_clear_bits(X86_CR4_VMXE)
    await cpu.write_phys(vmxon_region(cpu.number), revision)
    await cpu.write_phys(scratch_vmcs(cpu.number), revision)
    await init_list_head(cpu, percpu.loaded_vmcss_on_cpu)
    await init_list_head(cpu, percpu.associated_tdvcpus)
    await cpu.this_cpu_write(current_vmcs, None)
    await cpu.store(percpu.virtualization_nr_users, 0)
    ret = await tdx_online_cpu(cpu) or await kvm_online_cpu(cpu)
    if ret:
        cpu.pr_err(f"CPU {cpu.number} cannot come online: error {ret}")
        if await cpu.load(percpu.online):
            await take_cpu_down(cpu)
        return
    await vmcs_clear(cpu, scratch_vmcs(cpu.number), "alloc")
    await set_cpu_online(cpu)


async def _bury(cpu: Cpu, vcpus: int, tds: int) -> None:
    """What the process before this one left in RAM, where it may have stopped at any operation."""
    percpu = cpu.percpu
    await lose_vcpus(cpu, vcpus, MAX_TDS)
    lose_tasks(cpu, vcpus + tds)
    for word in (percpu.active, percpu.preempt_count, percpu.nr_tasks, percpu.hotplug_reads, percpu.halted):
        await cpu.store(word, 0)
    await cpu.store(percpu.cpuhp_result, -ENXIO & NONE)
    await cpu.store(percpu.cpuhp_work, CpuhpWork.NONE)
    await cpu.store(percpu.stopper_work, 0)
    await complete_calls_to_the_dead(cpu)
    await take_from_the_dead(cpu)


async def cpu_down(cpu: Cpu) -> None:
    """What an orderly reboot does on each CPU: KVM, then TDX, lets go of VMX operation; out of the online mask."""
    if not await cpu.load(cpu.percpu.online):
        return
    flags = await cpu.local_irq_save()
    if not await cpu.load(KERNEL.kvm_unloaded):
        await kvm_disable_virtualization_cpu(cpu)
    if core_owns_vmxon(cpu):
        await x86_virt_put_ref(cpu)
    await cpu.local_irq_restore(flags)
    await cpu.store(cpu.percpu.online, 0)
    await cpu.atomic_add(KERNEL.num_online, -1)
    cpu.emit("cpu_offline")
