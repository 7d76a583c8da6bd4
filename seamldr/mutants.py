"""Ways of calling P-SEAMLDR with a mistake in them, each of a kind that a review has to find.

They are no strategies to choose from; the hazards show what becomes of them, beside the way without the mistake. Each
can be run on a live machine too:

    seamlab run --strategy seamldr/mutants.py:save_restore_irqs_on
"""

from __future__ import annotations

from cpu.layout import KERNEL
from seamldr.api import (
    NO_VMCS,
    Cpu,
    TdxModuleArgs,
    current_vmcs,
    seamcall_prerr,
    seamldr_lock,
    vmclear_local_loaded_vmcss,
    vmptrld,
    vmptrst,
)
from seamldr.seamcall import RDRAND_RETRY_LOOPS, report_seamcall, sc_retry
from seamldr.status import SeamldrStatus


async def save_restore_irqs_on(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """The first save and restore without its interrupts off, which also held the scheduler off."""
    saved = await vmptrst(cpu)
    ret = await seamcall_prerr(cpu, fn, args)
    if saved is not None and saved != NO_VMCS:
        await vmptrld(cpu, saved)
    return ret


async def restore_blindly(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Save and restore that does not look at what it saved."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        saved = await vmptrst(cpu)
        ret = await seamcall_prerr(cpu, fn, args)
        await vmptrld(cpu, saved or 0)
    return ret


async def save_outside_the_loop(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """v3 as posted with its second retry: also when P-SEAMLDR has no entropy. One save, one restore; no mistake."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        saved = await vmptrst(cpu)
        for _ in range(RDRAND_RETRY_LOOPS):
            status, _ = await sc_retry(cpu, fn, args)
            if status != SeamldrStatus.ENOENTROPY:
                break
        if saved is not None and saved != NO_VMCS:
            await vmptrld(cpu, saved)
    return report_seamcall(cpu, fn, status)


async def save_inside_the_loop(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """The same, saving before each attempt."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        for _ in range(RDRAND_RETRY_LOOPS):
            saved = await vmptrst(cpu)
            status, _ = await sc_retry(cpu, fn, args)
            if status != SeamldrStatus.ENOENTROPY:
                break
        if saved is not None and saved != NO_VMCS:
            await vmptrld(cpu, saved)
    return report_seamcall(cpu, fn, status)


async def plain_lock(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """`clear-current-vmcs` with a plain spinlock, which sleeps on PREEMPT_RT."""
    async with cpu.spin_lock_irqsave(seamldr_lock):
        ret = await seamcall_prerr(cpu, fn, args)
        await cpu.this_cpu_write(current_vmcs, None)
    return ret


async def merged_without_check(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """What was merged, on a kernel that does not know the erratum: the lock, with interrupts as they are."""
    async with cpu.raw_spin_lock(seamldr_lock):
        return await seamcall_prerr(cpu, fn, args)


async def kvm_callback(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """`vmclear-local` through a pointer that KVM, a module, registers: read under the lock; no mistake."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        if not await cpu.load(KERNEL.kvm_unloaded):
            await _call_kvm(cpu)
        return await seamcall_prerr(cpu, fn, args)


async def kvm_callback_read_early(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """The same, with the pointer read before the lock is held: outside of any grace period."""
    registered = not await cpu.load(KERNEL.kvm_unloaded)
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        if registered:
            await _call_kvm(cpu)
        return await seamcall_prerr(cpu, fn, args)


async def _call_kvm(cpu: Cpu) -> None:
    """Jump into KVM's module."""
    freed = bool(await cpu.load(KERNEL.kvm_text_freed))
    cpu.warn_on_once(freed, "BUG: unable to handle page fault: instruction fetch from a module that is unloaded")
    await vmclear_local_loaded_vmcss(cpu)
