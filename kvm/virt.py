"""VMX operation of one CPU and who wants it (arch/x86/virt/hw.c).

Since the VMXON series the core kernel owns VMXON and counts users for each CPU: TDX is one, KVM another. Before it KVM
alone executed VMXON and VMXOFF (`vmxon_owner=kvm`), so that without KVM no SEAMCALL was possible.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, EOPNOTSUPP

from cpu.cpu import Cpu
from cpu.layout import KERNEL, vmxon_region
from cpu.vmx import Status

X86_CR4_VMXE = 1 << 13
MSR_IA32_FEAT_CTL = 0x3A


async def x86_vmx_enable_virtualization_cpu(cpu: Cpu) -> int:
    """CR4.VMXE and VMXON; 0, -EBUSY if somebody else has VMX operation on, -EFAULT if the BIOS forbids it."""
    if cpu.vmx.cr4 & X86_CR4_VMXE:
        return -EBUSY
    await cpu.cr4_set_bits(X86_CR4_VMXE)
    outcome = await cpu.vmxon(vmxon_region(cpu.number))
    if outcome.status is Status.EXCEPTION:
        feature_control = cpu.vmx.rdmsr(MSR_IA32_FEAT_CTL).value
        cpu.warn_on_once(True, f"VMXON faulted, MSR_IA32_FEAT_CTL (0x3a) = {feature_control:#x}")
        await cpu.cr4_clear_bits(X86_CR4_VMXE)
        return -EFAULT
    cpu.warn_on_once(not outcome.ok, "VMXON failed")
    return 0


async def x86_vmx_disable_virtualization_cpu(cpu: Cpu) -> None:
    """VMXOFF and CR4.VMXE off. Whatever is still active here is lost."""
    outcome = await cpu.vmxoff()
    if outcome.status is Status.EXCEPTION:
        await kvm_spurious_fault(cpu)
        return
    await cpu.cr4_clear_bits(X86_CR4_VMXE)


async def kvm_spurious_fault(cpu: Cpu) -> None:
    """A VMX instruction faulted: fine while the machine goes down, a BUG at any other time."""
    cpu.warn_on_once(not await cpu.load(KERNEL.virt_rebooting), "BUG: VMX instruction faulted")


async def x86_virt_get_ref(cpu: Cpu) -> int:
    """One more user of VMX operation on this CPU; the first executes VMXON. 0 or a negative errno."""
    await cpu.preempt_disable()
    word = cpu.percpu.virtualization_nr_users
    users = await cpu.load(word)
    await cpu.store(word, users + 1)
    ret = 0
    if not users:
        ret = await x86_vmx_enable_virtualization_cpu(cpu)
        if ret:
            await cpu.store(word, 0)
    await cpu.preempt_enable()
    return ret


async def x86_virt_put_ref(cpu: Cpu) -> None:
    """One user less; the last executes VMXOFF."""
    await cpu.preempt_disable()
    word = cpu.percpu.virtualization_nr_users
    users = await cpu.load(word)
    if cpu.warn_on_once(not users, "VMX reference dropped once too often"):
        await cpu.preempt_enable()
        return
    await cpu.store(word, users - 1)
    if users == 1:
        await x86_vmx_disable_virtualization_cpu(cpu)
    await cpu.preempt_enable()


async def x86_virt_emergency_disable_virtualization_cpu(cpu: Cpu) -> int:
    """The crash path, interrupts off: let KVM clear its VMCSs, then VMXOFF, whatever the count says.

    0, or -EOPNOTSUPP if nobody uses VMX operation here.
    """
    cpu.warn_on_once(cpu.irqs_on, "emergency VMXOFF with interrupts on")
    if not await cpu.load(cpu.percpu.virtualization_nr_users):
        return -EOPNOTSUPP
    await cpu.store(KERNEL.virt_rebooting, 1)
    if cpu.vmx.cr4 & X86_CR4_VMXE:
        if not await cpu.load(KERNEL.kvm_unloaded):
            await cpu.static_call("emergency_disable_virtualization_cpu")
        await x86_vmx_disable_virtualization_cpu(cpu)
    return 0
