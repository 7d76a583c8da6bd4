"""CPU hotplug (kernel/cpu.c) with the callbacks of TDX and KVM, and KVM's own going and coming (virt/kvm/kvm_main.c).

A CPU goes down through its callbacks from the latest to the earliest: TDX ("virt/tdx:online"), then KVM
("kvm/cpu:online"); it comes up in the opposite order. They run on the CPU itself, in its hotplug thread.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENXIO, EPERM

from cpu.cpu import Cpu
from cpu.hotplug_lock import cpus_read_lock, cpus_read_unlock, cpus_write_lock, cpus_write_unlock
from cpu.layout import KERNEL, TDX_STATE, CpuhpWork, per_cpu
from cpu.lists import ListWalk
from cpu.rcu import synchronize_rcu
from cpu.smp import smp_call_function_single, wake_up_process
from cpu.stop_machine import online_cpus, stop_machine
from cpu.struct import NONE, container_of
from kvm.loaded_vmcs import vmclear_local_loaded_vmcss
from kvm.run_queue import sched_cpu_activate, sched_cpu_deactivate
from kvm.tdx import tdx_flush_vp
from kvm.vcpu import TdVcpu
from kvm.virt import (
    x86_virt_get_ref,
    x86_virt_put_ref,
    x86_vmx_disable_virtualization_cpu,
    x86_vmx_enable_virtualization_cpu,
)
from seamldr.update import tdx_cpu_enable

# KVM


def core_owns_vmxon(cpu: Cpu) -> bool:
    """Whether the kernel has the VMXON series."""
    return bool(cpu.kernel.knobs["vmxon_owner"] == "core")


async def kvm_enable_virtualization_cpu(cpu: Cpu, _: int = 0) -> int:
    """KVM becomes a user of VMX operation here, or its owner."""
    return await (x86_virt_get_ref(cpu) if core_owns_vmxon(cpu) else x86_vmx_enable_virtualization_cpu(cpu))


async def kvm_disable_virtualization_cpu(cpu: Cpu, _: int = 0) -> None:
    """Flush TD vCPUs, clear every VMCS, and be no user of VMX operation any more."""
    flags = await cpu.local_irq_save()
    async for entry in ListWalk(cpu, cpu.percpu.associated_tdvcpus):
        await tdx_flush_vp(cpu, container_of(entry, TdVcpu, "cpu_list").address)
    await cpu.local_irq_restore(flags)
    await vmclear_local_loaded_vmcss(cpu)
    await (x86_virt_put_ref(cpu) if core_owns_vmxon(cpu) else x86_vmx_disable_virtualization_cpu(cpu))


async def kvm_online_cpu(cpu: Cpu) -> int:
    """Callback of "kvm/cpu:online"."""
    return 0 if await cpu.load(KERNEL.kvm_unloaded) else await kvm_enable_virtualization_cpu(cpu)


async def kvm_offline_cpu(cpu: Cpu) -> int:
    """Teardown of "kvm/cpu:online". It runs in the online section: interrupts are on, unless `offline_irqs=off`."""
    if await cpu.load(KERNEL.kvm_unloaded):
        return 0
    if cpu.kernel.knobs["offline_irqs"] == "on":
        await kvm_disable_virtualization_cpu(cpu)
    else:
        flags = await cpu.local_irq_save()
        await kvm_disable_virtualization_cpu(cpu)
        await cpu.local_irq_restore(flags)
    return 0


async def kvm_exit(cpu: Cpu) -> None:
    """Unload KVM: no VM is left. On each CPU it stops using VMX operation; TDX, if it may, keeps it on.

    `kvm_unloaded` is the pointer by which the core kernel calls KVM, as NULL: only after a grace period is nobody left
    who has read the old one, and KVM's code may go.
    """
    await cpus_read_lock(cpu)
    for target in await online_cpus(cpu):
        await smp_call_function_single(cpu, target, "kvm_disable_virtualization_cpu", 0)
    await cpu.store(KERNEL.kvm_unloaded, 1)
    await cpus_read_unlock(cpu)
    await synchronize_rcu(cpu)
    await cpu.store(KERNEL.kvm_text_freed, 1)


async def kvm_init(cpu: Cpu) -> None:
    """Load KVM and create the first VM."""
    await cpu.store(KERNEL.kvm_text_freed, 0)
    await cpus_read_lock(cpu)
    await cpu.store(KERNEL.kvm_unloaded, 0)
    for target in await online_cpus(cpu):
        await smp_call_function_single(cpu, target, "kvm_enable_virtualization_cpu", 0)
    await cpus_read_unlock(cpu)


# TDX


async def tdx_online_cpu(cpu: Cpu) -> int:
    """Callback of "virt/tdx:online": VMX operation, and the module told of this CPU."""
    if not core_owns_vmxon(cpu):
        return 0
    ret = await x86_virt_get_ref(cpu)
    if ret:
        return ret
    flags = await cpu.local_irq_save()
    ret = await tdx_cpu_enable(cpu)
    await cpu.local_irq_restore(flags)
    if ret:
        await x86_virt_put_ref(cpu)
    return ret


async def tdx_offline_cpu(cpu: Cpu) -> int:
    """Teardown of "virt/tdx:online": refused for the last CPU of a package while a private key id is in use."""
    if await cpu.load(TDX_STATE.nr_keyids) and not await _package_has_another(cpu):
        cpu.pr_err(
            "virt/tdx: TDX requires all packages to have an online CPU. Delete all TDs in order to offline all CPUs "
            "of a package."
        )
        return -EBUSY
    if core_owns_vmxon(cpu):
        await x86_virt_put_ref(cpu)
    return 0


async def _package_has_another(cpu: Cpu) -> bool:
    package = await cpu.load(cpu.percpu.package)
    others = [number for number in await online_cpus(cpu) if number != cpu.number]
    for number in others:
        if await cpu.load(per_cpu(number).package) == package:
            return True
    return False


# The hotplug thread of a CPU, and who asks it


async def cpuhp_thread(cpu: Cpu) -> None:
    """cpuhp/N: does for its CPU what it is asked for."""
    percpu = cpu.percpu
    while True:
        work = await cpu.load(percpu.cpuhp_work)
        if work == CpuhpWork.NONE:
            await cpu.schedule()
            continue
        ret = await (_offline(cpu) if work == CpuhpWork.OFFLINE else _online(cpu))
        await cpu.store(percpu.cpuhp_result, ret & NONE)
        # Not a plain store: if who asked for it has died, what was done is to be undone.
        await cpu.cmpxchg(percpu.cpuhp_work, work, CpuhpWork.NONE)


async def _offline(cpu: Cpu) -> int:
    if not await cpu.load(cpu.percpu.active):
        return 0  # done before, for a CPU that died over it
    ret = await sched_cpu_deactivate(cpu)
    if ret:
        return ret
    ret = await tdx_offline_cpu(cpu)
    if ret:
        await sched_cpu_activate(cpu)
        return ret
    await kvm_offline_cpu(cpu)
    return 0


async def take_cpu_down(cpu: Cpu, _: int = 0) -> int:
    """Under stop_machine, on the CPU that goes: out of the online mask."""
    await cpu.store(cpu.percpu.online, 0)
    await cpu.atomic_add(KERNEL.num_online, -1)
    cpu.emit("cpu_offline")
    return 0


async def set_cpu_online(cpu: Cpu) -> None:
    """Into the online mask, where a CPU still is that died."""
    if not await cpu.load(cpu.percpu.online):
        await cpu.store(cpu.percpu.online, 1)
        await cpu.atomic_add(KERNEL.num_online, 1)
    await sched_cpu_activate(cpu)
    cpu.emit("cpu_online")


async def _online(cpu: Cpu) -> int:
    if await cpu.load(cpu.percpu.active):
        return 0
    ret = await kvm_online_cpu(cpu)
    if ret:
        return ret
    ret = await tdx_online_cpu(cpu)
    if ret:
        await kvm_offline_cpu(cpu)
        return ret
    await set_cpu_online(cpu)
    return 0


async def remove_cpu(cpu: Cpu, target: int) -> int:
    """Take another CPU offline; 0, -EPERM for CPU 0, -EINVAL if it is offline, or what a callback says."""
    if target == 0:
        return -EPERM
    await cpus_write_lock(cpu)
    ret = await _cpu_down(cpu, target)
    await cpus_write_unlock(cpu)
    return ret


async def add_cpu(cpu: Cpu, target: int) -> int:
    """Take another CPU online; 0, -EINVAL if it is, or what a callback says."""
    await cpus_write_lock(cpu)
    online = await cpu.load(per_cpu(target).online)
    ret = -EINVAL if online else await _cpuhp_kick(cpu, target, CpuhpWork.ONLINE)
    await cpus_write_unlock(cpu)
    return ret


async def _cpu_down(cpu: Cpu, target: int) -> int:
    if not await cpu.load(per_cpu(target).online):
        return -EINVAL
    ret = await _cpuhp_kick(cpu, target, CpuhpWork.OFFLINE)
    if ret:
        return ret
    ret = await stop_machine(cpu, "take_cpu_down", target, only=target)
    if ret:
        await _cpuhp_kick(cpu, target, CpuhpWork.ONLINE)
    return ret


async def _cpuhp_kick(cpu: Cpu, target: int, work: CpuhpWork) -> int:
    """Have the hotplug thread of a CPU do its work and wait for it; -ENXIO if that CPU is dead.

    In Linux, and with `lock_policy=hang`, the wait for a dead CPU has no end.
    """
    percpu = per_cpu(target)
    waits_for_ever = cpu.kernel.knobs.get("lock_policy") == "hang"
    await cpu.store(percpu.cpuhp_work, work)
    await wake_up_process(cpu, target)
    while await cpu.load(percpu.cpuhp_work):
        if await cpu.load(percpu.dead) and not waits_for_ever:
            return -ENXIO
        cpu.waits_for = (f"waits for the hotplug thread of CPU {target}", f"cpu{target}")
        await cpu.schedule(2)
    cpu.waits_for = ("", "")
    result = await cpu.load(percpu.cpuhp_result)
    return result - (1 << 64) if result >> 63 else result
