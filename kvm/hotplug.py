"""CPU hotplug (kernel/cpu.c) with the callbacks of TDX and KVM, and KVM's own going and coming (virt/kvm/kvm_main.c).

A CPU goes down through its callbacks from the latest to the earliest: TDX ("virt/tdx:online"), then KVM
("kvm/cpu:online"); it comes up in the opposite order. They run on the CPU itself, in its hotplug thread.
"""

from __future__ import annotations

import enum
from errno import EBUSY, EINVAL, EPERM

from cpu.cpu import Cpu
from cpu.hotplug_lock import cpus_write_lock, cpus_write_unlock
from cpu.layout import KERNEL, TDX_STATE, per_cpu
from cpu.lists import ListWalk
from cpu.smp import smp_call_function_single, wake_up_process
from cpu.stop_machine import online_cpus
from cpu.struct import NONE, container_of
from kvm.loaded_vmcs import vmclear_local_loaded_vmcss
from kvm.tdx import tdx_flush_vp
from kvm.vcpu import TdVcpu
from kvm.virt import (
    x86_virt_get_ref,
    x86_virt_put_ref,
    x86_vmx_disable_virtualization_cpu,
    x86_vmx_enable_virtualization_cpu,
)
from seamldr.update import tdx_cpu_enable


class CpuhpWork(enum.IntEnum):
    """What the hotplug thread of a CPU is asked for."""

    NONE = 0
    OFFLINE = 1
    ONLINE = 2


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
    """Unload KVM: no VM is left. On each CPU it stops using VMX operation; TDX, if it may, keeps it on."""
    await cpu.store(KERNEL.kvm_unloaded, 1)
    for target in await online_cpus(cpu):
        await smp_call_function_single(cpu, target, "kvm_disable_virtualization_cpu", 0)


async def kvm_init(cpu: Cpu) -> None:
    """Load KVM and create the first VM."""
    for target in await online_cpus(cpu):
        await smp_call_function_single(cpu, target, "kvm_enable_virtualization_cpu", 0)
    await cpu.store(KERNEL.kvm_unloaded, 0)


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
        await cpu.store(percpu.cpuhp_work, CpuhpWork.NONE)


async def _offline(cpu: Cpu) -> int:
    ret = await tdx_offline_cpu(cpu)
    if ret:
        return ret
    await kvm_offline_cpu(cpu)
    await cpu.store(cpu.percpu.online, 0)
    await cpu.atomic_add(KERNEL.num_online, -1)
    cpu.emit("cpu_offline")
    return 0


async def _online(cpu: Cpu) -> int:
    ret = await kvm_online_cpu(cpu)
    if ret:
        return ret
    ret = await tdx_online_cpu(cpu)
    if ret:
        await kvm_offline_cpu(cpu)
        return ret
    await cpu.store(cpu.percpu.online, 1)
    await cpu.atomic_add(KERNEL.num_online, 1)
    cpu.emit("cpu_online")
    return 0


async def remove_cpu(cpu: Cpu, target: int) -> int:
    """Take another CPU offline; 0, -EPERM for CPU 0, -EINVAL if it is offline, or what a callback says."""
    return -EPERM if target == 0 else await _cpuhp_kick(cpu, target, CpuhpWork.OFFLINE)


async def add_cpu(cpu: Cpu, target: int) -> int:
    """Take another CPU online; 0, -EINVAL if it is, or what a callback says."""
    return await _cpuhp_kick(cpu, target, CpuhpWork.ONLINE)


async def _cpuhp_kick(cpu: Cpu, target: int, work: CpuhpWork) -> int:
    percpu = per_cpu(target)
    await cpus_write_lock(cpu)
    if bool(await cpu.load(percpu.online)) == (work is CpuhpWork.ONLINE):
        await cpus_write_unlock(cpu)
        return -EINVAL
    await cpu.store(percpu.cpuhp_work, work)
    await wake_up_process(cpu, target)
    while await cpu.load(percpu.cpuhp_work):
        await cpu.schedule()
    result = await cpu.load(percpu.cpuhp_result)
    await cpus_write_unlock(cpu)
    return result - (1 << 64) if result >> 63 else result
