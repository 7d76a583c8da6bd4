"""stop_machine (kernel/stop_machine.c): every online CPU runs a callback at once, interrupts off.

Two phases matter: nobody disables interrupts before everybody has arrived, so that a CPU which waits for a cross-call
or holds a raw lock with interrupts on can finish first.
"""

from __future__ import annotations

import enum
from errno import EINTR

from cpu.cpu import Cpu
from cpu.layout import KERNEL, MULTI_STOP, per_cpu
from cpu.mutex import mutex_lock, mutex_unlock, somebody_is_stopped, take_from_the_dead
from cpu.nmi_watchdog import touch_nmi_watchdog
from cpu.smp import wake_up_process
from cpu.struct import NONE


class MultiStopState(enum.IntEnum):
    """enum multi_stop_state."""

    NONE = 0
    PREPARE = 1
    DISABLE_IRQ = 2
    RUN = 3
    EXIT = 4


async def online_cpus(cpu: Cpu) -> list[int]:
    """for_each_online_cpu."""
    return [number for number in range(cpu.kernel.num_cpus) if await cpu.load(per_cpu(number).online)]


async def stop_machine(cpu: Cpu, fn: str, data: int, *, only: int | None = None) -> int:
    """Stop every online CPU and run `fn(data)` there, or on the CPU `only`; the last non-zero result.

    Task context; the caller sleeps meanwhile, and for ever if a CPU has died, unless an operator sets `update_abort`:
    then every live CPU leaves, and the result is -EINTR. That is not Linux.
    """
    await mutex_lock(cpu, KERNEL.stop_mutex)
    await cpu.store(KERNEL.update_abort, 0)
    cpus = await online_cpus(cpu)
    work = MULTI_STOP
    await cpu.store(work.fn, cpu.kernel.function_number(fn))
    await cpu.store(work.data, data)
    await cpu.store(work.active_cpu, NONE if only is None else only)
    await cpu.store(work.num_threads, len(cpus))
    await cpu.store(work.thread_ack, len(cpus))
    await cpu.store(work.result, 0)
    await cpu.store(work.nr_todo, len(cpus))
    await cpu.store(work.state, MultiStopState.PREPARE)
    # Preemption off, or this CPU's own stopper waits for stoppers that have no work yet (queue_stop_cpus_work).
    await cpu.preempt_disable()
    for target in cpus:
        await cpu.store(per_cpu(target).stopper_work, work.address)
        await wake_up_process(cpu, target)
    await cpu.preempt_enable()
    while await cpu.load(work.nr_todo):
        cpu.waits_for = ("sleeps until stop_machine is over", "")
        if await cpu.load(KERNEL.update_abort):
            await _until_all_have_left(cpu)
            break
        await cpu.schedule(2)
    cpu.waits_for = ("", "")
    result = await cpu.load(work.result)
    await mutex_unlock(cpu, KERNEL.stop_mutex)
    return result - (1 << 64) if result >> 63 else result


async def _until_all_have_left(cpu: Cpu) -> None:
    """The operator has given the stop up; what it was for has failed."""
    while await somebody_is_stopped(cpu):
        await cpu.cond_resched()
        await cpu.cpu_relax()
    await cpu.store(MULTI_STOP.result, -EINTR & NONE)
    await cpu.store(KERNEL.update_abort, 0)


async def cpu_stopper_thread(cpu: Cpu) -> None:
    """migration/N: the highest thread of its CPU; runs what is queued for it."""
    while True:
        if await cpu.load(cpu.percpu.stopper_work):
            await _multi_cpu_stop(cpu)
            await cpu.store(cpu.percpu.stopper_work, 0)
            await cpu.atomic_add(MULTI_STOP.nr_todo, -1)
            if await cpu.load(KERNEL.update_abort):
                await take_from_the_dead(cpu)
        else:
            await cpu.schedule()


async def _multi_cpu_stop(cpu: Cpu) -> None:
    work = MULTI_STOP
    current = MultiStopState.NONE
    flags = cpu.irqs_on
    cpu.emit("stop_enter")
    while current is not MultiStopState.EXIT:
        new = MultiStopState(await cpu.load(work.state))
        if new is current:
            if await cpu.load(KERNEL.update_abort):
                cpu.emit("stop_abort", state=current.name)
                break
            cpu.waits_for = (f"in stop_machine, after {current.name}", "")
            if current > MultiStopState.PREPARE:
                await touch_nmi_watchdog(cpu)
            await cpu.cpu_relax()
            continue
        current = new
        if current is MultiStopState.DISABLE_IRQ:
            await cpu.local_irq_disable()
        elif current is MultiStopState.RUN:
            await _run(cpu)
        await _ack_state(cpu, current)
    cpu.waits_for = ("", "")
    cpu.emit("stop_exit")
    await cpu.local_irq_restore(flags)


async def _run(cpu: Cpu) -> None:
    work = MULTI_STOP
    if await cpu.load(work.active_cpu) not in (NONE, cpu.number):
        return
    fn = cpu.kernel.function_named(await cpu.load(work.fn))[1]
    result = await fn(cpu, await cpu.load(work.data))
    if result:
        await cpu.store(work.result, result & NONE)


async def _ack_state(cpu: Cpu, current: MultiStopState) -> None:
    """The last CPU to acknowledge a state sets the next; after EXIT there is none."""
    if await cpu.atomic_add(MULTI_STOP.thread_ack, -1) == 0 and current is not MultiStopState.EXIT:
        await cpu.store(MULTI_STOP.thread_ack, await cpu.load(MULTI_STOP.num_threads))
        await cpu.store(MULTI_STOP.state, current + 1)
