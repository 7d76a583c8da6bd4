"""Read-copy update (kernel/rcu): how the kernel takes a pointer away from readers that hold no lock.

A reader is any region with preemption off. Whoever replaced the pointer waits until each CPU has been seen outside of
such a region; after that nobody can still use what the old pointer named.
"""

from __future__ import annotations

from cpu.cpu import Cpu
from cpu.layout import per_cpu
from cpu.stop_machine import online_cpus


async def synchronize_rcu(cpu: Cpu) -> None:
    """Wait for a grace period. Task context, preemption on; sleeps."""
    for number in await online_cpus(cpu):
        while number != cpu.number and await cpu.load(per_cpu(number).preempt_count):
            await cpu.schedule()
