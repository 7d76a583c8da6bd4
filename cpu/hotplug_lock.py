"""cpus_read_lock and cpus_write_lock (kernel/cpu.c): while one holds the read side, the same CPUs stay online.

A percpu-rwsem: readers are counted on the CPU where they entered, and the writer adds up.
"""

from __future__ import annotations

from cpu.cpu import Cpu
from cpu.layout import KERNEL, per_cpu
from cpu.mutex import mutex_lock, mutex_unlock, until_unlocked


async def cpus_read_lock(cpu: Cpu) -> None:
    """Task context; sleeps while a CPU goes online or offline."""
    reads = cpu.percpu.hotplug_reads
    while True:
        await cpu.atomic_add(reads, 1)
        if not await cpu.load(KERNEL.hotplug_writer):
            return
        await cpu.atomic_add(reads, -1)
        await until_unlocked(cpu, KERNEL.hotplug_writer)


async def cpus_read_unlock(cpu: Cpu) -> None:
    """The last reader lets a waiting writer in. On the CPU that took the lock."""
    await cpu.atomic_add(cpu.percpu.hotplug_reads, -1)


async def cpus_write_lock(cpu: Cpu) -> None:
    """Task context; sleeps until the writer before, and then every reader, is gone."""
    await mutex_lock(cpu, KERNEL.hotplug_writer)
    for number in range(cpu.kernel.num_cpus):
        while await cpu.load(per_cpu(number).hotplug_reads):
            await until_unlocked(cpu, per_cpu(number).hotplug_reads)


async def cpus_write_unlock(cpu: Cpu) -> None:
    """Readers may come again."""
    await mutex_unlock(cpu, KERNEL.hotplug_writer)
