"""`struct mutex` (kernel/locking/mutex.c): a lock that sleeps, in one word that says who holds it.

A mutex whose owner's CPU has died stays locked, as in Linux. Only an operator who sets `update_abort` takes from the
dead what they hold; that is not Linux.
"""

from __future__ import annotations

from cpu.cpu import Cpu
from cpu.layout import KERNEL, CpuhpWork, per_cpu
from cpu.smp import wake_up_process

_NUMBER_BITS = 16


def owner_word(cpu: Cpu) -> int:
    """What a mutex holds that is locked from this CPU, in this life of it; never 0."""
    return cpu.lives << _NUMBER_BITS | cpu.number + 1


def owner_cpu(owner: int) -> int:
    """The CPU of an owner."""
    return (owner & (1 << _NUMBER_BITS) - 1) - 1


async def is_gone(cpu: Cpu, owner: int) -> bool:
    """Whether the process of the owner's CPU has died, even if the CPU lives again."""
    percpu = per_cpu(owner_cpu(owner))
    return bool(await cpu.load(percpu.dead)) or await cpu.load(percpu.lives) != owner >> _NUMBER_BITS


async def mutex_lock(cpu: Cpu, mutex: int) -> None:
    """Task context; sleeps."""
    while await cpu.cmpxchg(mutex, 0, owner_word(cpu)):
        await until_unlocked(cpu, mutex)


async def mutex_unlock(cpu: Cpu, mutex: int) -> None:
    """Wake the waiters."""
    await cpu.store(mutex, 0)


async def until_unlocked(cpu: Cpu, mutex: int) -> None:
    """Sleep until nobody holds it."""
    while True:
        if await cpu.load(KERNEL.update_abort):
            await take_from_the_dead(cpu)
        await cpu.load(KERNEL.update_abort)
        if not await cpu.load(mutex):
            return
        await cpu.schedule(2)


async def take_from_the_dead(cpu: Cpu) -> bool:
    """Not Linux: unlock what CPUs that died had locked. False if a live CPU is still in the stop_machine of one."""
    stop = await cpu.load(KERNEL.stop_mutex)
    stop_is_orphaned = bool(stop) and await is_gone(cpu, stop)
    if stop_is_orphaned and await somebody_is_stopped(cpu):
        return False
    for number in range(cpu.kernel.num_cpus):
        if await cpu.load(per_cpu(number).dead):
            await cpu.store(per_cpu(number).hotplug_reads, 0)
    await _unlock_for_the_dead(cpu, KERNEL.upload_mutex)
    await _unlock_for_the_dead(cpu, KERNEL.tdx_lock)
    if await _unlock_for_the_dead(cpu, KERNEL.hotplug_writer):
        await _undo_offline(cpu)
    if stop_is_orphaned and await cpu.cmpxchg(KERNEL.stop_mutex, stop, 0) == stop:
        await cpu.store(KERNEL.update_abort, 0)
        cpu.emit("stop_freed", owner=owner_cpu(stop))
    return True


async def _unlock_for_the_dead(cpu: Cpu, mutex: int) -> bool:
    owner = await cpu.load(mutex)
    return bool(owner) and await is_gone(cpu, owner) and await cpu.cmpxchg(mutex, owner, 0) == owner


async def _undo_offline(cpu: Cpu) -> None:
    """Who took a CPU offline has died before it was out of the online mask: it comes back."""
    for number in range(cpu.kernel.num_cpus):
        percpu = per_cpu(number)
        alive = await cpu.load(percpu.online) and not await cpu.load(percpu.dead)
        going = await cpu.load(percpu.cpuhp_work) == CpuhpWork.OFFLINE or not await cpu.load(percpu.active)
        if alive and going:
            await cpu.store(percpu.cpuhp_work, CpuhpWork.ONLINE)
            await wake_up_process(cpu, number)


async def somebody_is_stopped(cpu: Cpu) -> bool:
    """Whether the stopper of a live CPU has work to do or to finish."""
    for number in range(cpu.kernel.num_cpus):
        percpu = per_cpu(number)
        if await cpu.load(percpu.stopper_work) and not await cpu.load(percpu.dead):
            return True
    return False
