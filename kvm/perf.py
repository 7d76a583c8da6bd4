"""The NMI handler, with perf's performance-counter interrupt: the one NMI-time user of a VMCS (arch/x86/kvm/x86.c).

A sample that lands while KVM handles an interrupt of its guest belongs to the guest, so perf asks KVM for the guest's
instruction pointer, and KVM executes VMREAD. Everywhere else the sample is the host's, and no VMCS is touched.
"""

from __future__ import annotations

from cpu.cpu import Cpu
from cpu.irq_work import run_nmi_work
from cpu.layout import KERNEL
from cpu.vmx import Field
from kvm.emergency import crash_nmi_callback
from kvm.loaded_vmcs import vmcs_read
from kvm.vmx import VmxVcpu


def kvm_get_running_vcpu(cpu: Cpu) -> VmxVcpu | None:
    """The vCPU that is loaded by the thread at hand."""
    notifier = cpu.thread.notifier if cpu.thread is not None else None
    return notifier if isinstance(notifier, VmxVcpu) else None


async def kvm_guest_get_ip(cpu: Cpu, vcpu: VmxVcpu) -> int:
    """Guest RIP, by VMREAD from the VMCS that is believed to be this vCPU's."""
    return await vmcs_read(cpu, Field.GUEST_RIP)


async def perf_event_nmi_handler(cpu: Cpu) -> None:
    """A counter has overflowed: take one sample."""
    vcpu = kvm_get_running_vcpu(cpu)
    if vcpu is not None and vcpu.handling_intr_from_guest:
        await kvm_guest_get_ip(cpu, vcpu)


async def default_do_nmi(cpu: Cpu) -> None:
    """exc_nmi: every cause that may be behind this NMI is looked at, since several merge into one."""
    cpu.emit("nmi_enter", cur=cpu.vmx.cur)
    if await cpu.load(KERNEL.crashing_cpu):
        await crash_nmi_callback(cpu)
    if cpu.pmi_pending:
        cpu.pmi_pending = False
        await perf_event_nmi_handler(cpu)
    await run_nmi_work(cpu)
    cpu.emit("nmi_exit")
