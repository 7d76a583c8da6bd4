"""Parts of the kernel that hazards are built on: threads that move, grace periods, lockdep, the watchdog."""

from __future__ import annotations

from random import Random

import pytest
from hazards import info, install, prefer, violated, warnings
from stepping import Stepped

from cpu.cpu import Cpu
from cpu.irq_work import irq_work_queue, nmi_work_queue
from cpu.layout import KERNEL, task_vmcs
from cpu.loop import Priority, Thread
from cpu.migration import movable, set_cpus_allowed
from cpu.nmi_watchdog import touch_nmi_watchdog, watchdog_hrtimer_fn, watchdog_overflow_callback
from cpu.rcu import synchronize_rcu
from kvm.hazard import all_until, only
from kvm.hotplug import kvm_exit
from kvm.vcpu import vcpu_of
from kvm.vmx import VmxVcpu, vcpu_thread
from seamldr.call import seamldr_lock


@pytest.mark.parametrize("seed", range(5))
def test_a_vcpu_survives_being_moved_anywhere(seed: int) -> None:
    """Moved between three CPUs wherever it can be preempted, with readers about, a vCPU loses nothing."""
    rng = Random(seed)
    machine = Stepped("clear-current-vmcs", cpus=3)
    stepped = machine.machine
    cpu, here = movable(machine.cpu())
    thread = Thread("vcpu0", Priority.VCPU, vcpu_thread(cpu, VmxVcpu(0, vcpu_of(0)), task_vmcs(0)), task=0)
    stepped.start(0, thread)
    visited = set()
    for _ in range(40):
        visited.add(here.now.number)
        machine.start(info, rng.randrange(3), "reader")
        set_cpus_allowed(stepped, thread, here, rng.randrange(3))
        for _ in range(rng.randrange(300)):
            stepped.step(rng.choice(stepped.ready()))
    thread.stopping = True
    stepped.run(rng.choice)
    assert visited == {0, 1, 2}
    assert machine.memory.load(vcpu_of(0).exits)[0] > 10
    assert violated(machine) == [] and warnings(machine) == []


def test_a_thread_with_preemption_off_is_not_moved() -> None:
    """The stopper waits until the thread can be preempted; one that ends before is not moved at all."""
    machine = Stepped("none", cpus=2)
    cpu, here = movable(machine.cpu())
    seen = []

    async def body(cpu: Cpu) -> None:
        await cpu.preempt_disable()
        seen.append(cpu.number)
        await cpu.give_way()
        seen.append(cpu.number)
        await cpu.preempt_enable()
        await cpu.give_way()
        seen.append(cpu.number)

    thread = Thread("task", Priority.KERNEL, body(cpu))
    machine.machine.start(0, thread)
    machine.machine.step(0)
    set_cpus_allowed(machine.machine, thread, here, 1)
    machine.machine.run()
    assert seen == [0, 0, 1]
    set_cpus_allowed(machine.machine, thread, here, 0)
    machine.machine.run()
    assert here.now.number == 1


def test_a_grace_period_waits_for_readers() -> None:
    """synchronize_rcu returns only when a region with preemption off on another CPU is over."""
    machine = Stepped("none", cpus=2)
    over = []

    async def reader(cpu: Cpu) -> None:
        await cpu.preempt_disable()
        for _ in range(10):
            await cpu.give_way()
        over.append(True)
        await cpu.preempt_enable()

    machine.start(reader, 1)
    machine.machine.step(1)
    writer = machine.start(synchronize_rcu)
    while 0 in machine.machine.ready():
        machine.machine.step(0)
    assert not over and writer in machine.machine.loops[0].threads()
    machine.machine.run()
    assert over and writer not in machine.machine.loops[0].threads()


async def take_it(cpu: Cpu) -> None:
    """Take the lock with interrupts as they are."""
    async with cpu.raw_spin_lock(seamldr_lock):
        await cpu.give_way()


def test_lockdep_names_a_deadlock_before_it_happens() -> None:
    """A lock taken twice, by the same code or by an interrupt handler on top of it, is reported, and then spins."""
    machine = Stepped("none")

    async def twice(cpu: Cpu) -> None:
        async with cpu.raw_spin_lock(seamldr_lock):
            await take_it(cpu)

    machine.start(twice)
    machine.machine.run()
    assert warnings(machine) == ["WARNING: possible recursive locking detected: seamldr_lock"]
    assert machine.cpu().waits_for[0] == "spins on seamldr_lock"

    machine = Stepped("none")

    async def interrupted(cpu: Cpu) -> None:
        async with cpu.raw_spin_lock(seamldr_lock):
            irq_work_queue(cpu, take_it)
            await cpu.give_way()

    machine.start(interrupted)
    machine.machine.run()
    assert warnings(machine) == ["WARNING: inconsistent lock state: seamldr_lock"]


def test_the_watchdog_reports_who_takes_no_interrupts() -> None:
    """An NMI that finds no timer interrupt since the last one reports, unless the code at hand has said so before."""
    machine = Stepped("none")

    def nmi(*, timer: bool = False, touched: bool = False) -> list[str]:
        cpu = machine.cpu()
        if timer:
            irq_work_queue(cpu, watchdog_hrtimer_fn)
        if touched:
            machine.run(touch_nmi_watchdog)
        machine.machine.asleep.clear()
        machine.machine.run()
        nmi_work_queue(cpu, watchdog_overflow_callback)
        machine.machine.asleep.clear()
        machine.machine.run()
        return warnings(machine)

    assert nmi(timer=True) == []
    assert nmi(timer=True) == []
    assert nmi(touched=True) == []
    assert nmi() == ["Watchdog detected hard LOCKUP on cpu 0"]


def nmis(machine: Stepped, number: int) -> list[str]:
    """Three NMIs of the watchdog on a CPU that alone goes on; what it says."""
    for _ in range(3):
        nmi_work_queue(machine.cpu(number), watchdog_overflow_callback)
        machine.machine.asleep.discard(number)
        only(machine, number)
    return warnings(machine)


@pytest.mark.parametrize(("state", "reported"), [("in stop_machine, after DISABLE_IRQ", False), ("waits for", True)])
def test_stop_machine_touches_the_watchdog_outside_of_its_callback(state: str, reported: bool) -> None:
    """A CPU that waits for the others with interrupts off is reported inside the callback, and not before it."""
    machine = Stepped("none", cpus=2)
    machine.run(watchdog_hrtimer_fn)
    machine.start(install(machine), 0, "kworker")
    all_until(machine, lambda: not machine.cpu().irqs_on and machine.cpu().waits_for[0].startswith(state))
    assert bool(nmis(machine, 0)) == reported


def test_unloading_kvm_waits_for_who_has_read_its_pointer() -> None:
    """KVM's code stays as long as a CPU that found it registered keeps preemption off, interrupts on or not."""
    machine = Stepped("none", cpus=2)
    freed = []

    async def reader(cpu: Cpu) -> None:
        await cpu.preempt_disable()
        assert not await cpu.load(KERNEL.kvm_unloaded)
        for _ in range(50):
            await cpu.give_way()
        freed.append(await cpu.load(KERNEL.kvm_text_freed))
        await cpu.preempt_enable()

    machine.start(reader, 1)
    machine.machine.step(1)
    machine.machine.step(1)
    machine.start(kvm_exit)
    machine.machine.run(prefer(0))
    assert freed == [0]
    assert machine.memory.load(KERNEL.kvm_text_freed)[0] == 1
