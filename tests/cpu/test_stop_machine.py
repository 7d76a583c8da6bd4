"""stop_machine: everybody arrives, then everybody turns interrupts off, then everybody runs the callback."""

from __future__ import annotations

from random import Random

import pytest
from loop_bench import LoopBench

from cpu.cpu import Cpu
from cpu.layout import KERNEL, MULTI_STOP, per_cpu
from cpu.loop import Priority
from cpu.smp import smp_call_function_single
from cpu.stop_machine import MultiStopState, cpu_stopper_thread, online_cpus, stop_machine


class StopBench(LoopBench):
    """CPUs with their stoppers asleep. `ran` notes (CPU, data, IF, context) of each callback, `answers` is by CPU."""

    def __init__(self, cpus: int, answers: dict[int, int] | None = None) -> None:
        self.ran: list[tuple[int, int, bool, str]] = []
        self.arrived: list[int] = []

        async def fn(cpu: Cpu, data: int) -> int:
            self.ran.append((cpu.number, data, cpu.irqs_on, cpu.context))
            self.arrived.append(sum(self.cpu(n).context.startswith("migration") for n in range(cpus)))
            await cpu.give_way()
            return (answers or {}).get(cpu.number, 0)

        async def ping(cpu: Cpu, info: int) -> None:
            await cpu.give_way()

        super().__init__(cpus, {"fn": fn, "ping": ping})
        for number in range(cpus):
            stopper = cpu_stopper_thread
            self.start(stopper, number, name=f"migration/{number}", priority=Priority.STOPPER)
        self.machine.run()


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_every_online_cpu_runs_the_callback_once_with_irqs_off(cpus: int) -> None:
    """Each stopper runs it once, in its own context, with interrupts off, while all the others are stopped too."""
    bench = StopBench(cpus)
    assert bench.run(lambda cpu: stop_machine(cpu, "fn", 5)) == 0
    assert sorted(bench.ran) == [(number, 5, False, f"migration/{number}") for number in range(cpus)]
    assert bench.arrived == [cpus] * cpus
    assert all(bench.cpu(number).irqs_on for number in range(cpus))


def test_an_offline_cpu_does_not_take_part() -> None:
    """A CPU outside the online mask is neither waited for nor stopped."""
    bench = StopBench(3)
    bench.memory.store(per_cpu(1).online, 0, 1)
    assert bench.run(online_cpus) == [0, 2]
    bench.run(lambda cpu: stop_machine(cpu, "fn", 0))
    assert sorted(number for number, *_ in bench.ran) == [0, 2]


def test_the_result_is_the_last_that_is_not_zero() -> None:
    """A negative errno of one CPU is the result of all, as a negative number; a later call starts from 0 again."""
    answers = {1: -5}
    bench = StopBench(3, answers)
    assert bench.run(lambda cpu: stop_machine(cpu, "fn", 0)) == -5
    answers.clear()
    assert bench.run(lambda cpu: stop_machine(cpu, "fn", 0)) == 0


def test_nobody_turns_interrupts_off_before_all_have_arrived() -> None:
    """A CPU that stays in a section with preemption off keeps the others in PREPARE, with their interrupts on."""
    bench = StopBench(3)

    async def section(cpu: Cpu) -> None:
        await cpu.preempt_disable()
        while not await cpu.load(KERNEL.next_update):
            await cpu.cpu_relax()
        await cpu.preempt_enable()

    bench.start(section, 2)
    bench.machine.run()
    thread = bench.start(lambda cpu: stop_machine(cpu, "fn", 0))
    bench.machine.run()
    assert bench.memory.load(MULTI_STOP.state)[0] == MultiStopState.PREPARE
    assert [bench.cpu(number).context for number in range(3)] == ["migration/0", "migration/1", "task"]
    assert all(bench.cpu(number).irqs_on for number in range(3)) and bench.ran == []
    bench.memory.store(KERNEL.next_update, 1, 1)
    bench.machine.asleep.discard(2)
    bench.machine.run()
    assert thread.result == 0 and len(bench.ran) == 3


def test_a_cross_call_that_is_under_way_ends_before_the_freeze() -> None:
    """The caller of a cross-call has preemption off, so its own stopper waits for it; no schedule deadlocks."""
    for seed in range(40):
        bench, rng = StopBench(3), Random(seed)

        async def caller(cpu: Cpu) -> int:
            return await smp_call_function_single(cpu, (cpu.number + 1) % 3, "ping", 0)

        threads = [bench.start(caller, number) for number in (1, 2)]
        worker = bench.start(lambda cpu: stop_machine(cpu, "fn", 6))
        bench.machine.run(rng.choice)
        assert [thread.result for thread in (*threads, worker)] == [0, 0, 0], seed
        assert len(bench.ran) == 3


def test_the_caller_is_not_preempted_by_its_own_stopper_while_it_queues_the_work() -> None:
    """Whoever steps first, no stopper waits for one that has been given no work: every schedule ends."""
    for seed in range(40):
        bench = StopBench(2)
        worker = bench.start(lambda cpu: stop_machine(cpu, "fn", 0))
        bench.machine.run(Random(seed).choice)
        assert worker.result == 0, seed
    bench = StopBench(2)
    worker = bench.start(lambda cpu: stop_machine(cpu, "fn", 0))
    bench.machine.run(min)
    assert worker.result == 0


def test_one_stop_machine_at_a_time() -> None:
    """Callers on several CPUs come one after the other; each callback sees the data of one caller only."""
    for seed in range(25):
        bench, rng = StopBench(3), Random(seed)
        workers = [bench.start(lambda cpu: stop_machine(cpu, "fn", cpu.number), number) for number in range(3)]
        bench.machine.run(rng.choice)
        assert [worker.result for worker in workers] == [0, 0, 0], seed
        groups = [[data for _, data, _, _ in bench.ran[at : at + 3]] for at in range(0, 9, 3)]
        assert sorted(groups) == [[0] * 3, [1] * 3, [2] * 3]


def test_interrupts_wait_and_nmis_do_not() -> None:
    """During the callback an NMI is taken, an interrupt only after it."""
    bench = StopBench(1)
    bench.start(lambda cpu: stop_machine(cpu, "fn", 0))
    while not bench.ran:
        bench.step()
    bench.cpu().apic.accept(0x30)
    bench.cpu().apic.accept_nmi()
    bench.step()
    assert bench.order() == ["nmi"]
    bench.machine.run()
    assert bench.order() == ["nmi", "nmi end", "device", "device end"]
