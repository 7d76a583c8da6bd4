"""The watchdog's timer and thread on stepped machines: when a tick is taken, and when its thread gets its turn."""

from __future__ import annotations

import pytest
from hazards import info, load_run_put, step_until, until_in_seam
from stepping import Stepped

from cpu.apic import Vector
from cpu.core import GuestRun
from cpu.cpu import Cpu
from cpu.loop import Priority, Thread
from cpu.softlockup import watchdog_thread


def machine_with_watchdog(**knobs: str) -> Stepped:
    """One CPU whose watchdog thread sleeps."""
    machine = Stepped("clear-current-vmcs", **knobs)
    machine.machine.start(0, Thread("watchdog/0", Priority.STOPPER, watchdog_thread(machine.cpu())))
    machine.machine.run()
    return machine


def tick(machine: Stepped) -> None:
    """The timer goes off."""
    machine.cpu().apic.accept(Vector.LOCAL_TIMER)
    machine.machine.asleep.discard(0)


def seen(machine: Stepped) -> tuple[int, int]:
    """Ticks that were taken, and turns of the thread."""
    cpu = machine.cpu()
    return machine.memory.load(cpu.percpu.heartbeat)[0], cpu.watchdog_turns


def test_an_idle_cpu_takes_its_ticks() -> None:
    """Each tick is counted, and each wakes the thread."""
    machine = machine_with_watchdog()
    assert seen(machine) == (0, 1)
    for count in (1, 2):
        tick(machine)
        machine.machine.run()
        assert seen(machine) == (count, 1 + count)


def test_a_tick_ends_the_guests_run() -> None:
    """In guest mode the interrupt is a VM exit, whatever RFLAGS.IF of the host is: the CPU is not locked up."""
    machine = machine_with_watchdog()
    machine.start(load_run_put(machine.new_vcpu(0)))
    step_until(machine, 0, lambda: isinstance(machine.machine.waiting_for(0), GuestRun))
    assert not machine.cpu().irqs_on
    tick(machine)
    step_until(machine, 0, lambda: seen(machine) == (1, 2), limit=60)


def test_in_seam_no_tick_is_taken() -> None:
    """The interrupt waits until SEAMRET, and then until the strategy turns interrupts on again."""
    machine = machine_with_watchdog()
    machine.start(info)
    until_in_seam(machine, 0)
    tick(machine)
    step_until(machine, 0, lambda: machine.seam.inside is None)
    assert seen(machine) == (0, 1)
    machine.machine.run()
    assert seen(machine) == (1, 2)


def test_with_interrupts_off_no_tick_is_taken() -> None:
    """What a hard lockup is; ticks that come meanwhile are one when interrupts come on again."""
    machine = machine_with_watchdog()
    at_last: list[tuple[int, int]] = []

    async def body(cpu: Cpu) -> None:
        await cpu.local_irq_disable()
        for _ in range(20):
            tick(machine)
            await cpu.give_way()
        at_last.append(seen(machine))
        await cpu.local_irq_enable()

    machine.run(body)
    assert at_last == [(0, 1)]
    assert seen(machine) == (1, 2)


@pytest.mark.parametrize(("model", "turns"), [("full", 2), ("none", 1)])
def test_kernel_code_that_keeps_the_cpu(model: str, turns: int) -> None:
    """Preemption off in the code, or a kernel that never preempts, is what a soft lockup is: ticks without turns."""
    machine = machine_with_watchdog(preemption=model)
    during: dict[str, tuple[int, int]] = {}

    async def body(cpu: Cpu) -> None:
        await cpu.preempt_disable()
        tick(machine)
        for _ in range(20):
            await cpu.give_way()
        during["preemption off"] = seen(machine)
        await cpu.preempt_enable()
        for _ in range(20):
            await cpu.give_way()
        during["preemption on"] = seen(machine)

    machine.run(body)
    assert during == {"preemption off": (1, 1), "preemption on": (1, turns)}
    assert seen(machine) == (1, 2)
