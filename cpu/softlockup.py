"""The thread of the soft lockup detector on one CPU (kernel/watchdog.c: softlockup_fn)."""

from __future__ import annotations

from cpu.cpu import Cpu


async def watchdog_thread(cpu: Cpu) -> None:
    """watchdog/N, before all other threads: each tick wakes it, and its turn shows that this CPU schedules."""
    while True:
        await cpu.load(cpu.percpu.heartbeat)
        cpu.watchdog_turns += 1
        await cpu.schedule()
