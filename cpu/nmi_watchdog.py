"""The hard lockup detector (kernel/watchdog.c, kernel/watchdog_perf.c).

A timer interrupt counts on each CPU; an NMI looks whether it has counted since the NMI before. Whoever drives a
stepped machine says when either comes: here is only what the kernel does then.
"""

from __future__ import annotations

from cpu.cpu import Cpu


async def watchdog_hrtimer_fn(cpu: Cpu) -> None:
    """The timer's interrupt: it is a sign of life, since it needs interrupts on."""
    await cpu.atomic_add(cpu.percpu.heartbeat, 1)


async def touch_nmi_watchdog(cpu: Cpu) -> None:
    """Whoever keeps interrupts off for long on purpose says so; good until the next NMI, for which a spinner watches.
    """
    if not await cpu.load(cpu.percpu.watchdog_touch):
        await cpu.store(cpu.percpu.watchdog_touch, 1)


async def watchdog_overflow_callback(cpu: Cpu) -> None:
    """The NMI of the counter: report a CPU that took no timer interrupt since the last one. It looks at no VMCS."""
    percpu = cpu.percpu
    if await cpu.load(percpu.watchdog_touch):
        await cpu.store(percpu.watchdog_touch, 0)
        return
    beats = await cpu.load(percpu.heartbeat)
    if beats == await cpu.load(percpu.heartbeat_saved):
        cpu.warn_on_once(True, f"Watchdog detected hard LOCKUP on cpu {cpu.number}")
    else:
        await cpu.store(percpu.heartbeat_saved, beats)
