"""Cross-calls between CPUs (kernel/smp.c) and the reschedule IPI."""

from __future__ import annotations

from cpu.apic import Vector
from cpu.cpu import Cpu
from cpu.layout import CSD_LEVELS, CSD_LIVES, KERNEL, CallSingleData, per_cpu

ENXIO = 6
CSD_FLAG_LOCK = 1
CSD_LOST = 2
"""The target has died without running it. Not Linux, where the sender waits for ever."""


def csd_of(cpu: int, level: int, lives: int = 0) -> CallSingleData:
    """The call_single_data on the stack of whatever runs on `cpu` at this context level, in this life of it."""
    return CallSingleData(per_cpu(cpu).csd + (lives % CSD_LIVES * CSD_LEVELS + level) * CallSingleData.SIZE)


def _locked_for(target: int) -> int:
    return CSD_FLAG_LOCK | target + 1 << 2


async def smp_call_function_single(cpu: Cpu, target: int, func: str, info: int) -> int:
    """Run `func(info)` on `target` in interrupt context and wait for it; 0, or -ENXIO if it is not online.

    Waiting with IRQs off for a CPU that waits for us with IRQs off is a deadlock, so that is warned about before it
    happens. For a CPU that is online and dead Linux waits for ever, and so does this with `lock_policy=hang`; otherwise
    the wait ends with -ENXIO.
    """
    await cpu.preempt_disable()
    cpu.warn_on_once(not cpu.irqs_on, "smp_call_function_single() with interrupts disabled")
    ret = 0
    if target == cpu.number:
        flags = await cpu.local_irq_save()
        await cpu.kernel.functions[func](cpu, info)
        await cpu.local_irq_restore(flags)
    elif await cpu.load(per_cpu(target).online):
        ret = await _call(cpu, target, func, info)
    else:
        ret = -ENXIO
    await cpu.preempt_enable()
    return ret


async def _call(cpu: Cpu, target: int, func: str, info: int) -> int:
    csd = csd_of(cpu.number, cpu.level, cpu.lives)
    waits_for_ever = cpu.kernel.knobs.get("lock_policy") == "hang"
    if not waits_for_ever and await cpu.load(per_cpu(target).dead):
        return -ENXIO
    if not await _queue(cpu, csd, target, func, info, 0 if waits_for_ever else per_cpu(target).dead):
        return await _lost(cpu, csd, target)
    return await _csd_lock_wait(cpu, csd, target, func, waits_for_ever)


async def _queue(cpu: Cpu, csd: CallSingleData, target: int, func: str, info: int, unless: int) -> bool:
    """False if the word `unless` forbids it."""
    call = await cpu.atomic_add(KERNEL.next_call, 1)
    await cpu.store(csd.flags, _locked_for(target))
    await cpu.store(csd.func, cpu.kernel.function_number(func))
    await cpu.store(csd.info, info)
    await cpu.store(csd.source, cpu.number)
    await cpu.store(csd.call, call)
    cpu.emit("csd_lock", csd=csd.address, call=call, target=target, func=func, info=info, wait=1)
    first = await cpu.llist_add(csd.next, per_cpu(target).call_single_queue, unless=unless)
    if first:
        await cpu.send_ipi(target, Vector.CALL_FUNCTION_SINGLE)
    return first is not None


async def _csd_lock_wait(cpu: Cpu, csd: CallSingleData, target: int, func: str, waits_for_ever: bool) -> int:
    while (flags := await cpu.load(csd.flags)) & CSD_FLAG_LOCK:
        if not waits_for_ever and await cpu.load(per_cpu(target).dead):
            break
        cpu.waits_for = (f"waits for {func} on CPU {target}", f"cpu{target}")
        await cpu.cpu_relax()
    cpu.waits_for = ("", "")
    if flags:
        return await _lost(cpu, csd, target)
    cpu.emit("csd_done", call=await cpu.load(csd.call))
    return 0


async def _lost(cpu: Cpu, csd: CallSingleData, target: int) -> int:
    """Not Linux: the target is dead, so this call has no end."""
    cpu.emit("csd_lost", call=await cpu.load(csd.call), target=target)
    return -ENXIO


async def complete_calls_to_the_dead(cpu: Cpu) -> None:
    """A new process of this CPU: what was queued to the one that died and has not run is over for its senders."""
    await cpu.store(cpu.percpu.call_single_queue, 0)
    for source in range(cpu.kernel.num_cpus):
        for slot in range(CSD_LIVES * CSD_LEVELS):
            csd = CallSingleData(per_cpu(source).csd + slot * CallSingleData.SIZE)
            if await cpu.load(csd.flags) == _locked_for(cpu.number):
                await cpu.cmpxchg(csd.flags, _locked_for(cpu.number), CSD_LOST)


async def generic_smp_call_function_single_interrupt(cpu: Cpu) -> None:
    """Handler of CALL_FUNCTION_SINGLE: run every queued function, first queued first; one interrupt may bring many."""
    cpu.emit("irq_enter", vector=int(Vector.CALL_FUNCTION_SINGLE))
    node = await cpu.xchg(cpu.percpu.call_single_queue, 0)
    pending: list[CallSingleData] = []
    while node:
        pending.insert(0, CallSingleData(node))
        node = await cpu.load(node)
    for csd in pending:
        number, info = await cpu.load(csd.func), await cpu.load(csd.info)
        source, call = await cpu.load(csd.source), await cpu.load(csd.call)
        name, func = cpu.kernel.function_named(number)
        await func(cpu, info)
        cpu.emit("csd_run", call=call, func=name, source=source)
        await cpu.store(csd.flags, 0)
    cpu.emit("irq_exit", vector=int(Vector.CALL_FUNCTION_SINGLE))


async def sysvec_reschedule_ipi(cpu: Cpu) -> None:
    """Handler of RESCHEDULE: the scheduler looks again on the way out."""
    cpu.need_resched = True


async def wake_up_process(cpu: Cpu, target: int) -> None:
    """A thread that sleeps on `target` may run again; its word was stored before."""
    if target == cpu.number:
        cpu.need_resched = True
        await cpu.give_way()
    else:
        await cpu.send_ipi(target, Vector.RESCHEDULE)


async def handle_irq(cpu: Cpu, vector: int) -> None:
    """Run a vector's handler on top of the code at hand, IRQs off: an interrupt that a VM exit has acknowledged."""
    cpu.contexts.append("irq")
    await cpu.kernel.interrupts[vector](cpu)
    cpu.contexts.pop()


async def handle_nmi(cpu: Cpu) -> None:
    """Service an NMI that caused a VM exit, with NMIs blocked."""
    cpu.apic.in_nmi = True
    cpu.contexts.append("nmi")
    await cpu.kernel.nmi(cpu)
    cpu.contexts.pop()
    cpu.apic.in_nmi = False
