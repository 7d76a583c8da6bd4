"""cpus_read_lock and cpus_write_lock (kernel/cpu.c): while one holds the read side, the same CPUs stay online."""

from __future__ import annotations

from cpu.cpu import Cpu
from cpu.layout import KERNEL


async def cpus_read_lock(cpu: Cpu) -> None:
    """Task context; sleeps while a CPU goes online or offline."""
    while True:
        await cpu.atomic_add(KERNEL.hotplug_readers, 1)
        if not await cpu.load(KERNEL.hotplug_writer):
            return
        await cpu.atomic_add(KERNEL.hotplug_readers, -1)
        while await cpu.load(KERNEL.hotplug_writer):
            await cpu.schedule()


async def cpus_read_unlock(cpu: Cpu) -> None:
    """The last reader lets a waiting writer in."""
    await cpu.atomic_add(KERNEL.hotplug_readers, -1)


async def cpus_write_lock(cpu: Cpu) -> None:
    """Task context; sleeps until the writer before, and then every reader, is gone."""
    while await cpu.xchg(KERNEL.hotplug_writer, 1):
        while await cpu.load(KERNEL.hotplug_writer):
            await cpu.schedule()
    while await cpu.load(KERNEL.hotplug_readers):
        await cpu.schedule()


async def cpus_write_unlock(cpu: Cpu) -> None:
    """Readers may come again."""
    await cpu.store(KERNEL.hotplug_writer, 0)
