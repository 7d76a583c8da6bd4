"""Crash, panic and emergency reboot: an NMI stops every other CPU, VMCSs are cleared, VMX operation ends.

(arch/x86/kernel: crash.c, reboot.c; arch/x86/kvm/vmx/vmx.c.) Nothing here takes a lock, and nothing that was
interrupted goes on: whoever was inside `seamldr_call` never repairs and never unlocks.
"""

from __future__ import annotations

from cpu.apic import Vector
from cpu.cpu import Cpu
from cpu.layout import KERNEL, LoadedVmcs, per_cpu
from cpu.lists import ListWalk
from cpu.stop_machine import online_cpus
from cpu.struct import container_of
from kvm.loaded_vmcs import vmcs_clear
from kvm.virt import x86_virt_emergency_disable_virtualization_cpu
from seamldr.tdx_host import tdx_sys_disable

SHOOTDOWN_LOOKS = 1000
"""How often the crashing CPU looks whether the others have halted before it goes on without them (one second)."""


async def vmx_emergency_disable_virtualization_cpu(cpu: Cpu) -> None:
    """KVM's callback: VMCLEAR all that this CPU's list names, shadows too. The tracking stays as it is.

    The list may be caught half changed: an entry that is being added is not loaded yet, one that is being removed has
    been cleared.
    """
    async for entry in ListWalk(cpu, cpu.percpu.loaded_vmcss_on_cpu):
        v = container_of(entry, LoadedVmcs, "link")
        await vmcs_clear(cpu, await cpu.load(v.vmcs), "emergency")
        shadow = await cpu.load(v.shadow_vmcs)
        if shadow:
            await vmcs_clear(cpu, shadow, "emergency")


async def nmi_shootdown_cpus(cpu: Cpu) -> bool:
    """Stop every other CPU by NMI; True if all have halted in time."""
    await cpu.store(KERNEL.crashing_cpu, cpu.number + 1)
    others = [target for target in await online_cpus(cpu) if target != cpu.number]
    await cpu.store(KERNEL.crash_waits, len(others))
    for target in others:
        await cpu.send_ipi(target, Vector.NMI, nmi=True)
    for _ in range(SHOOTDOWN_LOOKS):
        if not await cpu.load(KERNEL.crash_waits):
            return True
    return False


async def crash_nmi_callback(cpu: Cpu) -> None:
    """On a CPU that is told to stop: out of VMX operation, then halt for ever, with NMIs blocked."""
    await x86_virt_emergency_disable_virtualization_cpu(cpu)
    await cpu.store(per_cpu(cpu.number).halted, 1)
    await cpu.atomic_add(KERNEL.crash_waits, -1)
    await halt(cpu)


async def halt(cpu: Cpu) -> None:
    """HLT in a loop; nothing wakes this CPU."""
    cpu.irqs_on = False
    while True:
        cpu.recent_loads.clear()
        await cpu.cpu_relax()


async def machine_crash_shutdown(cpu: Cpu) -> bool:
    """native_machine_crash_shutdown on the crashing CPU; whether every other CPU has halted."""
    await cpu.local_irq_disable()
    halted = await nmi_shootdown_cpus(cpu)
    await tdx_sys_disable(cpu)
    await x86_virt_emergency_disable_virtualization_cpu(cpu)
    return halted
