"""Cross-calls: smp_call_function_single, its interrupt, and the reschedule IPI."""

from __future__ import annotations

from random import Random

import pytest
from loop_bench import LoopBench

from cpu.apic import Vector
from cpu.cpu import Cpu
from cpu.layout import KERNEL, CallSingleData, per_cpu
from cpu.smp import ENXIO, csd_of, handle_irq, handle_nmi, smp_call_function_single, wake_up_process

Ran = tuple[int, int, str, bool]
WORD = KERNEL.stop_mutex


class CallBench(LoopBench):
    """CPUs with one function that can be called: it notes (CPU, argument, context, IF), and takes a while."""

    def __init__(self, cpus: int = 2) -> None:
        self.ran: list[Ran] = []

        async def func(cpu: Cpu, info: int) -> None:
            self.ran.append((cpu.number, info, cpu.context, cpu.irqs_on))
            await cpu.store(WORD, info)
            await cpu.give_way()

        super().__init__(cpus, {"other": self._other, "func": func})

    @staticmethod
    async def _other(cpu: Cpu, info: int) -> None:
        raise AssertionError("nobody calls this one")

    def count(self, event: str, **fields: object) -> int:
        """How many records of an event have these fields."""
        records = [r for r in self.machine.records if r["event"] == event]
        return sum(all(r[key] == value for key, value in fields.items()) for r in records)


async def call(cpu: Cpu, target: int, info: int = 7) -> int:
    """A waiting cross-call."""
    return await smp_call_function_single(cpu, target, "func", info)


def test_a_call_runs_once_on_its_target_and_is_waited_for() -> None:
    """The function runs in interrupt context on the target, IRQs off; when the call returns, its effect is there."""
    bench = CallBench()

    async def caller(cpu: Cpu) -> tuple[int, int]:
        ret = await call(cpu, 1)
        return ret, await cpu.load(WORD)

    assert bench.run(caller) == (0, 7)
    assert bench.ran == [(1, 7, "irq", False)]
    names = ["csd_lock", "ipi_send", "ipi_deliver", "irq_enter", "csd_run", "irq_exit", "csd_done"]
    assert sorted(r["event"] for r in bench.machine.records) == sorted(names)
    assert bench.cpu().preempt_count == 0 and bench.cpu().waits_for == ("", "")


def test_the_caller_does_not_return_before_the_function_has() -> None:
    """While the target keeps interrupts off, the caller waits, asleep, and says for whom."""
    bench = CallBench()

    async def deaf(cpu: Cpu) -> None:
        await cpu.local_irq_disable()
        while not await cpu.load(KERNEL.next_update):
            await cpu.cpu_relax()
        await cpu.local_irq_enable()

    bench.start(deaf, 1)
    bench.machine.run()
    thread = bench.start(lambda cpu: call(cpu, 1))
    bench.machine.run()
    assert thread.result is None and bench.ran == []
    assert bench.cpu().waits_for == ("waits for func on CPU 1", "cpu1")
    bench.memory.store(KERNEL.next_update, 1, 1)
    bench.machine.asleep.discard(1)
    bench.machine.run()
    assert thread.result == 0 and len(bench.ran) == 1


def test_a_call_to_itself_is_a_plain_call_with_irqs_off() -> None:
    """On the own CPU the function runs at once, without an IPI, and the interrupt flag is as before afterwards."""
    bench = CallBench(1)

    async def caller(cpu: Cpu) -> tuple[int, bool]:
        return await call(cpu, 0), cpu.irqs_on

    assert bench.run(caller) == (0, True)
    assert bench.ran == [(0, 7, "task", False)]
    assert bench.machine.records == []


def test_an_offline_target_is_enxio() -> None:
    """A CPU that is not in the online mask is not called: -ENXIO, no IPI, preemption as before."""
    bench = CallBench()
    bench.memory.store(per_cpu(1).online, 0, 1)
    assert bench.run(lambda cpu: call(cpu, 1)) == -ENXIO
    assert bench.ran == [] and bench.machine.records == []
    assert bench.cpu().preempt_count == 0


def test_calling_with_irqs_off_is_warned_about_once() -> None:
    """The kernel's WARN_ON_ONCE comes before the wait that may never end."""
    bench = CallBench()

    async def caller(cpu: Cpu) -> None:
        await cpu.local_irq_disable()
        await call(cpu, 1)
        await call(cpu, 1)
        await cpu.local_irq_enable()
        await call(cpu, 1)

    bench.run(caller)
    assert bench.count("warn", text="smp_call_function_single() with interrupts disabled") == 1
    assert len(bench.ran) == 3
    events = [r["event"] for r in bench.machine.records]
    assert events.index("warn") < events.index("csd_lock")


def test_two_cpus_that_call_each_other_with_irqs_off_wait_for_ever() -> None:
    """The deadlock that the warning is about: the machine comes to rest with both waiting for each other."""
    bench = CallBench()

    async def caller(cpu: Cpu) -> None:
        await cpu.local_irq_disable()
        await call(cpu, 1 - cpu.number)

    threads = [bench.start(caller, number) for number in (0, 1)]
    bench.machine.run(lambda ready: ready[bench.machine.steps % len(ready)])
    assert bench.machine.ready() == [] and bench.ran == []
    assert [thread.result for thread in threads] == [None, None]
    assert [bench.cpu(number).waits_for[1] for number in (0, 1)] == ["cpu1", "cpu0"]
    assert bench.count("warn") == 2


def test_several_callers_are_served_first_come_first_served_by_one_interrupt() -> None:
    """Only the call that finds the queue empty sends an IPI; one interrupt runs all that wait, in their order."""
    bench = CallBench(4)

    async def deaf(cpu: Cpu) -> None:
        await cpu.local_irq_disable()
        while not await cpu.load(KERNEL.next_update):
            await cpu.cpu_relax()
        await cpu.local_irq_enable()

    bench.start(deaf, 0)
    bench.machine.run()
    for number in (2, 1, 3):
        bench.start(lambda cpu: call(cpu, 0, 100 + cpu.number), number)
        bench.machine.run()
    assert bench.count("ipi_send") == 1 and bench.count("csd_lock") == 3
    bench.memory.store(KERNEL.next_update, 1, 1)
    bench.machine.asleep.discard(0)
    bench.machine.run()
    assert [info for _, info, _, _ in bench.ran] == [102, 101, 103]
    assert bench.count("irq_enter") == 1 and bench.count("csd_done") == 3


def test_interrupts_merge_but_calls_do_not() -> None:
    """Three interrupts of one vector that arrive together run the handler once; no call is lost by it."""
    bench = CallBench(2)

    async def send(cpu: Cpu) -> None:
        for _ in range(3):
            await cpu.send_ipi(1, Vector.CALL_FUNCTION_SINGLE)

    bench.start(send)
    bench.step(3)
    bench.machine.run()
    assert [r["coalesced"] for r in bench.machine.records if r["event"] == "ipi_deliver"] == [0, 1, 1]
    assert bench.count("irq_enter") == 1 and bench.ran == []


@pytest.mark.parametrize("cpus", [2, 3])
def test_everybody_calls_everybody_under_any_schedule(cpus: int) -> None:
    """With interrupts on, all calls of all CPUs end, each function has run exactly once, on its target."""
    for seed in range(25):
        bench, rng = CallBench(cpus), Random(seed)

        async def caller(cpu: Cpu, cpus: int = cpus) -> int:
            return sum([await call(cpu, target, cpu.number * 10 + target) for target in range(cpus)])

        threads = [bench.start(caller, number) for number in range(cpus)]
        bench.machine.run(rng.choice)
        assert [thread.result for thread in threads] == [0] * cpus, seed
        wanted = [(target, source * 10 + target) for source in range(cpus) for target in range(cpus)]
        assert sorted((cpu, info) for cpu, info, _, _ in bench.ran) == sorted(wanted)
        runs = [r["call"] for r in bench.machine.records if r["event"] == "csd_run"]
        assert len(runs) == len(set(runs)) == cpus * (cpus - 1)


def test_each_context_has_its_own_call_data() -> None:
    """A call from a handler does not overwrite that of the task it interrupts."""
    addresses = [csd_of(cpu, level).address for cpu in (0, 1) for level in (0, 1, 2)]
    assert all(b - a >= CallSingleData.SIZE for a, b in zip(sorted(addresses), sorted(addresses)[1:], strict=False))
    bench = CallBench(2)

    async def nested(cpu: Cpu) -> int:
        cpu.contexts.append("irq")
        ret = await call(cpu, 1)
        cpu.contexts.pop()
        return ret

    bench.run(nested)
    assert [r["csd"] for r in bench.machine.records if r["event"] == "csd_lock"] == [csd_of(0, 1).address]


def test_waking_a_thread_elsewhere_sends_a_reschedule() -> None:
    """A local wake-up sets need_resched; a remote one is an IPI whose handler does."""
    bench = CallBench(2)
    woken: list[bool] = []

    async def wake(cpu: Cpu) -> None:
        await cpu.preempt_disable()
        await wake_up_process(cpu, 0)
        woken.append(cpu.need_resched)
        await wake_up_process(cpu, 1)
        await cpu.preempt_enable()

    bench.run(wake)
    assert woken == [True] and not bench.cpu(0).need_resched
    assert bench.count("ipi_send", vector=int(Vector.RESCHEDULE), target=1) == bench.count("ipi_send") == 1


def test_handlers_after_a_vm_exit_run_in_their_own_context() -> None:
    """An acknowledged vector runs as "irq"; an NMI exit is serviced with NMIs blocked, and both end as they began."""
    bench = LoopBench()

    async def exits(cpu: Cpu) -> tuple[str, bool]:
        await cpu.local_irq_disable()
        await handle_irq(cpu, 0x30)
        await handle_nmi(cpu)
        return cpu.context, cpu.apic.in_nmi

    assert bench.run(exits) == ("task", False)
    assert [(seen.who, seen.in_nmi) for seen in bench.log] == [
        ("device", False),
        ("device end", False),
        ("nmi", True),
        ("nmi end", True),
    ]
