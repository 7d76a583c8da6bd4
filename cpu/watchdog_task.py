"""The watchdog of one CPU as a task beside its step loop: it ticks, looks, and writes what there is to report."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic_ns

import trio

from cpu.apic import Vector
from cpu.cpu import Cpu
from cpu.layout import per_cpu
from cpu.watchdog import HardLockup, LockupOver, Observation, Report, SoftLockup, Watchdog


async def keep_watch(cpu: Cpu, thresh_s: int, wake: Callable[[], None]) -> None:
    """Each sample period, while the CPU is online: the timer goes off, and `wake` tells the loop of the CPU.

    The look at this CPU and its buddy is like an NMI: it takes place whether or not interrupts are on.
    """
    total = cpu.kernel.num_cpus
    watchdog = Watchdog(cpu.number, thresh_s, total)
    period = watchdog.period_ns / 1e9
    await trio.sleep(period * cpu.number / total)  # not all at once
    while True:
        if _load(cpu, cpu.percpu.online):
            for report in watchdog.observe(_observation(cpu)):
                _write(cpu, report)
            cpu.apic.accept(Vector.LOCAL_TIMER)
            wake()
        await trio.sleep(period)


def _observation(cpu: Cpu) -> Observation:
    total = cpu.kernel.num_cpus
    name = "swapper" if cpu.thread is None else cpu.thread.name
    others = (number % total for number in range(cpu.number + 1, cpu.number + total))
    buddy = next((number for number in others if _load(cpu, per_cpu(number).online)), None)
    return Observation(
        now_ns=monotonic_ns(),
        ticks=_load(cpu, cpu.percpu.heartbeat),
        turns=cpu.watchdog_turns,
        operations=cpu.count.operations,
        task=f"{name if '/' in name else f'{name}/{cpu.number}'}:{os.getpid()}",
        touched=_touched(cpu),
        buddy=buddy,
        buddy_ticks=0 if buddy is None else _load(cpu, per_cpu(buddy).heartbeat),
    )


def _touched(cpu: Cpu) -> bool:
    """Whether the kernel has touched the watchdog since the last look; this counts as a tick for the buddy, too."""
    percpu, store = cpu.percpu, cpu.memory.store
    if not _load(cpu, percpu.watchdog_touch):
        return False
    store(percpu.watchdog_touch, 0, cpu.clock.tick())
    store(percpu.heartbeat, _load(cpu, percpu.heartbeat) + 1, cpu.clock.tick())
    return True


def _load(cpu: Cpu, word: int) -> int:
    value, stamp = cpu.memory.load(word)
    cpu.clock.merge(stamp)
    return value


def _write(cpu: Cpu, report: Report) -> None:
    match report:
        case SoftLockup(cpu=number, stuck_s=stuck, task=task, operations=done, text=text):
            cpu.emit("soft_lockup", cpu=number, stuck_s=stuck, task=task, operations=done, text=text)
        case HardLockup(cpu=number, stuck_s=stuck, text=text):
            cpu.emit("hard_lockup", cpu=number, stuck_s=stuck, text=text)
        case LockupOver(cpu=number, kind=kind, stuck_s=stuck):
            cpu.emit("lockup_over", cpu=number, kind=kind, stuck_s=stuck)
