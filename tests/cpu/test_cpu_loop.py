"""The step loop: what comes between two operations, in which order, and who runs next."""

from __future__ import annotations

from itertools import permutations

import msgspec
import pytest
from loop_bench import DEVICE, TIMER, LoopBench, Seen

from cpu.core import GuestRun, Trap, trap
from cpu.cpu import Cpu, RawSpinLock, current_vmcs
from cpu.layout import KERNEL, per_cpu
from cpu.loop import Need, Priority, StepLoop, Thread
from cpu.struct import NONE

LOCK = RawSpinLock("lock")
WORD = KERNEL.stop_mutex
OTHER = KERNEL.next_call


def busy(bench: LoopBench, who: str, times: int) -> Thread:
    """A vCPU-priority thread that notes itself before each of its operations."""

    async def body(cpu: Cpu) -> None:
        for _ in range(times):
            bench.see(cpu, who)
            await cpu.give_way()

    return bench.start(body, name=who, priority=Priority.VCPU)


def kernel_thread(bench: LoopBench, who: str = "kernel") -> Thread:
    """A short thread above vCPUs."""

    async def body(cpu: Cpu) -> None:
        bench.see(cpu, who)
        await cpu.give_way()

    return bench.start(body, name=who)


# Events


@pytest.mark.parametrize("order", list(permutations(["nmi", "irq", "thread"])), ids="-".join)
def test_nmi_then_interrupt_then_preemption(order: tuple[str, ...]) -> None:
    """What waits at one boundary is taken in a fixed order, whatever arrived first."""
    bench = LoopBench()
    busy(bench, "vcpu", 2)
    bench.step()
    for event in order:
        if event == "nmi":
            bench.cpu().apic.accept_nmi()
        elif event == "irq":
            bench.cpu().apic.accept(DEVICE)
        else:
            kernel_thread(bench)
    bench.machine.run()
    assert bench.order() == ["vcpu", "nmi", "nmi end", "device", "device end", "kernel", "vcpu"]


def test_the_highest_vector_goes_first() -> None:
    """Pending interrupts are taken by priority, one after the other, each vector once."""
    bench = LoopBench()
    busy(bench, "vcpu", 2)
    bench.step()
    for vector in (DEVICE, TIMER, DEVICE):
        bench.cpu().apic.accept(vector)
    bench.machine.run()
    assert bench.order() == ["vcpu", "timer", "timer end", "device", "device end", "vcpu"]


def test_an_nmi_interrupts_an_interrupt_handler_and_nothing_interrupts_an_nmi() -> None:
    """Handlers nest: an NMI on an interrupt; a second NMI and interrupts wait until the first has ended."""
    bench = LoopBench()
    bench.handler_steps = 3
    busy(bench, "vcpu", 2)
    bench.step()
    bench.cpu().apic.accept(DEVICE)
    bench.step()
    bench.cpu().apic.accept_nmi()
    bench.step()
    assert [frame.kind for frame in bench.machine.loops[0].stack] == ["thread", "irq", "nmi"]
    assert bench.cpu().contexts == ["idle", "vcpu", "irq", "nmi"] and bench.cpu().level == 2
    bench.cpu().apic.accept_nmi()
    bench.cpu().apic.accept(TIMER)
    bench.machine.run()
    ends = ["nmi end", "nmi", "nmi end", "device end", "timer", "timer end", "vcpu"]
    assert bench.order() == ["vcpu", "device", "nmi", *ends]
    assert bench.cpu().contexts == ["idle"]


def test_the_state_in_which_handlers_run() -> None:
    """A handler runs with interrupts off, the NMI handler with NMIs blocked; both are as before afterwards."""
    bench = LoopBench()
    busy(bench, "vcpu", 2)
    bench.step()
    bench.cpu().apic.accept(DEVICE)
    bench.cpu().apic.accept_nmi()
    bench.machine.run()
    assert bench.log == [
        Seen("vcpu", True, False, 0),
        Seen("nmi", False, True, 0),
        Seen("nmi end", False, True, 0),
        Seen("device", False, False, 0),
        Seen("device end", False, False, 0),
        Seen("vcpu", True, False, 0),
    ]


def test_interrupts_wait_for_the_interrupt_flag_and_nmis_do_not() -> None:
    """Between CLI and STI only NMIs are taken; right after STI the interrupt."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> None:
        await cpu.local_irq_disable()
        bench.see(cpu, "off")
        await cpu.give_way()
        bench.see(cpu, "still off")
        await cpu.local_irq_enable()
        bench.see(cpu, "on")

    bench.start(body)
    bench.step()
    bench.cpu().apic.accept(DEVICE)
    bench.cpu().apic.accept_nmi()
    bench.machine.run()
    assert bench.order() == ["nmi", "nmi end", "off", "still off", "device", "device end", "on"]


def test_preemption_waits_for_preempt_count_and_interrupt_flag() -> None:
    """A higher thread runs at the first operation that leaves preemption and interrupts on."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> None:
        await cpu.preempt_disable()
        kernel_thread(bench)
        await cpu.local_irq_disable()
        await cpu.preempt_enable()
        bench.see(cpu, "irqs off")
        await cpu.preempt_disable()
        await cpu.local_irq_enable()
        bench.see(cpu, "preemption off")
        await cpu.preempt_enable()
        bench.see(cpu, "both on")

    bench.start(body, priority=Priority.VCPU)
    bench.machine.run()
    assert bench.order() == ["irqs off", "preemption off", "kernel", "both on"]


def test_a_handler_is_never_preempted() -> None:
    """A thread that becomes ready while a handler runs waits for its end."""
    bench = LoopBench()
    bench.handler_steps = 3
    busy(bench, "vcpu", 2)
    bench.step()
    bench.cpu().apic.accept(DEVICE)
    bench.step()
    kernel_thread(bench)
    bench.machine.run()
    assert bench.order() == ["vcpu", "device", "device end", "kernel", "vcpu"]


def test_an_idle_cpu_takes_events() -> None:
    """With no thread at all, NMIs and interrupts are handled."""
    bench = LoopBench()
    bench.cpu().apic.accept(DEVICE)
    bench.cpu().apic.accept_nmi()
    assert bench.machine.loops[0].event_due()
    bench.machine.run()
    assert bench.order() == ["nmi", "nmi end", "device", "device end"]
    assert not bench.machine.loops[0].event_due()


def test_a_spinning_wait_takes_events() -> None:
    """cpu_relax sleeps only while nothing is due, and handlers run on top of it."""
    bench = LoopBench()

    async def spin(cpu: Cpu) -> None:
        while not await cpu.load(WORD):
            await cpu.cpu_relax()
        bench.see(cpu, "over")

    bench.start(spin)
    bench.machine.run()
    assert bench.machine.ready() == []
    bench.cpu().apic.accept(DEVICE)
    bench.machine.asleep.clear()
    bench.machine.run()
    assert bench.order() == ["device", "device end"]
    bench.machine.asleep.clear()
    bench.memory.store(WORD, 1, 1)
    bench.machine.run()
    assert bench.order()[2:] == ["over"]


# Threads


def test_stopper_before_kernel_before_vcpu() -> None:
    """Threads run by priority, the stopper first, and in order of arrival within one."""
    bench = LoopBench()
    busy(bench, "vcpu", 1)
    kernel_thread(bench, "first")
    kernel_thread(bench, "second")

    async def stopper(cpu: Cpu) -> None:
        bench.see(cpu, "stopper")
        await cpu.give_way()

    bench.start(stopper, priority=Priority.STOPPER)
    bench.machine.run()
    assert bench.order() == ["stopper", "first", "second", "vcpu"]


def test_a_kernel_thread_does_not_preempt_its_equal() -> None:
    """A thread of the same priority waits until the running one ends."""
    bench = LoopBench()

    async def first(cpu: Cpu) -> None:
        kernel_thread(bench, "second")
        for _ in range(3):
            await cpu.give_way()
        bench.see(cpu, "first ends")

    bench.start(first)
    bench.machine.run()
    assert bench.order() == ["first ends", "second"]


def test_a_preempted_thread_keeps_the_head_of_its_queue() -> None:
    """After whoever preempted it, the same vCPU thread goes on, not the one that waits behind it."""
    bench = LoopBench()
    busy(bench, "a", 3)
    busy(bench, "b", 1)
    bench.step()
    kernel_thread(bench)
    bench.machine.run()
    assert bench.order() == ["a", "kernel", "a", "a", "b"]


def test_after_its_slice_a_thread_goes_to_the_tail() -> None:
    """A slice is counted in VM exits; its end preempts in favour of an equal, and the next slice is whole again."""
    bench = LoopBench()
    loop = bench.machine.loops[0]
    a = busy(bench, "a", 3)
    busy(bench, "b", 1)
    bench.step()
    for left in range(a.slice_exits - 1, -1, -1):
        assert not loop.event_due()
        loop.account_exit()
        assert a.slice_left == left
    assert loop.event_due()
    bench.machine.run()
    assert bench.order() == ["a", "b", "a", "a"]
    assert a.slice_left == a.slice_exits


def test_a_thread_alone_gets_a_new_slice_at_once() -> None:
    """With no equal waiting, the end of a slice changes nothing."""
    bench = LoopBench()
    a = busy(bench, "a", 2)
    bench.step()
    for _ in range(a.slice_exits):
        bench.machine.loops[0].account_exit()
    assert a.slice_left == a.slice_exits and not bench.machine.loops[0].event_due()


def test_a_needless_reschedule_switches_nobody() -> None:
    """need_resched with nobody better waiting leaves the thread where it is, without its notifiers."""
    bench = LoopBench()
    thread = busy(bench, "a", 3)
    thread.notifier = Recorder(bench)
    busy(bench, "b", 1)
    bench.step(2)
    bench.log.clear()
    bench.cpu().need_resched = True
    bench.machine.run()
    assert bench.order() == ["a", "a", "b"]


def test_the_head_of_a_threads_loop_says_whether_it_may_stay() -> None:
    """resume_user_mode is True until the thread is asked to move or to stop."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> tuple[bool, ...]:
        first = await cpu.resume_user_mode()
        thread.move_to = 1
        second = await cpu.resume_user_mode()
        thread.move_to, thread.stopping = None, True
        return first, second, await cpu.resume_user_mode()

    thread = bench.start(body)
    bench.machine.run()
    assert thread.result == (True, False, False)


def test_a_halted_loop_runs_nothing() -> None:
    """After `halted` every step says idle, whatever waits."""
    bench = LoopBench()
    busy(bench, "a", 2)
    bench.step()
    loop = bench.machine.loops[0]
    loop.halted = True
    assert loop.step() is Need.IDLE
    assert bench.order() == ["a"]


def test_tasks_are_found_by_number_wherever_they_are() -> None:
    """find_task sees the running thread, those that wait and those that sleep."""
    bench = LoopBench()

    async def sleep(cpu: Cpu) -> None:
        await cpu.load(WORD)
        await cpu.schedule()

    async def idle(cpu: Cpu) -> None:
        await cpu.give_way()
        await cpu.give_way()

    loop = bench.machine.loops[0]
    for task, body in enumerate((sleep, idle, idle)):
        loop.add(Thread(f"t{task}", Priority.VCPU, body(bench.cpu()), task=task))
    bench.step(3)
    assert loop.current is loop.find_task(1)
    assert [loop.find_task(task) is not None for task in range(4)] == [True, True, True, False]
    bench.machine.run()


# Notifiers


class Recorder:
    """Preempt notifiers that note themselves."""

    def __init__(self, bench: LoopBench) -> None:
        self.bench = bench

    async def sched_in(self, cpu: Cpu) -> None:
        self.bench.see(cpu, "sched_in")
        await cpu.give_way()

    async def sched_out(self, cpu: Cpu) -> None:
        self.bench.see(cpu, "sched_out")
        await cpu.give_way()


def test_preemption_notifies_with_irqs_off_and_the_return_with_irqs_on() -> None:
    """sched_out runs with interrupts off, sched_in with interrupts on and preemption off, in the thread's name."""
    bench = LoopBench()
    thread = busy(bench, "vcpu", 2)
    thread.notifier = Recorder(bench)
    bench.step(2)
    kernel_thread(bench)
    bench.step()
    assert bench.cpu().contexts == ["idle", "vcpu", "vcpu"]
    bench.machine.run()
    assert bench.log[1:] == [
        Seen("vcpu", True, False, 0),
        Seen("sched_out", False, False, 0),
        Seen("kernel", True, False, 0),
        Seen("sched_in", True, False, 1),
        Seen("vcpu", True, False, 0),
    ]


def test_only_an_nmi_comes_in_sched_out() -> None:
    """IF decides in the switch as everywhere: an interrupt that arrives in sched_out waits until the switch is over."""
    bench = LoopBench()
    thread = busy(bench, "vcpu", 2)
    thread.notifier = Recorder(bench)
    bench.step(2)
    kernel_thread(bench)
    bench.step()
    bench.cpu().apic.accept(DEVICE)
    bench.cpu().apic.accept_nmi()
    bench.machine.run()
    assert bench.order()[2:] == ["sched_out", "nmi", "nmi end", "device", "device end", "kernel", "sched_in", "vcpu"]


def test_an_interrupt_comes_in_sched_in() -> None:
    """sched_in runs with interrupts on, and is not preempted."""
    bench = LoopBench()
    thread = busy(bench, "vcpu", 1)
    thread.notifier = Recorder(bench)
    bench.step()
    bench.cpu().apic.accept(DEVICE)
    kernel_thread(bench)
    bench.machine.run()
    assert bench.order() == [
        "sched_in", "device", "device end", "sched_out", "kernel", "sched_in", "vcpu",
    ]  # fmt: skip


def test_sleeping_notifies_as_preemption_does() -> None:
    """A thread that sleeps is scheduled out, and in again when it goes on."""
    bench = LoopBench()

    async def sleep(cpu: Cpu) -> None:
        cpu.thread.notifier = Recorder(bench)
        while not await cpu.load(WORD):
            await cpu.schedule()
        bench.see(cpu, "awake")

    async def wake(cpu: Cpu) -> None:
        bench.see(cpu, "other")
        await cpu.store(WORD, 1)

    bench.start(sleep)
    bench.start(wake)
    bench.machine.run()
    assert bench.order() == ["sched_out", "other", "sched_in", "awake"]


# Sleeping


def sleeper(bench: LoopBench, number: int = 0) -> Thread:
    """A thread that sleeps until WORD is not 0."""

    async def sleep(cpu: Cpu) -> int:
        while not (value := await cpu.load(WORD)):
            await cpu.schedule()
        return value

    return bench.start(sleep, number, name="sleeper")


def test_a_store_of_another_cpu_wakes_a_sleeper() -> None:
    """The machine sleeps, a store of the word that the thread read last wakes it; a store elsewhere does not."""
    bench = LoopBench(cpus=2)
    thread = sleeper(bench)
    bench.machine.run()
    bench.run(lambda cpu: cpu.store(OTHER, 5), number=1)
    assert thread.sleeping_on == [(WORD, 0)] and 0 in bench.machine.asleep
    bench.run(lambda cpu: cpu.store(WORD, 7), number=1)
    assert thread.result == 7


def test_a_store_between_the_look_and_the_sleep_is_not_missed() -> None:
    """The word changes after the load and before schedule(): the thread does not sleep over it."""
    bench = LoopBench(cpus=2)
    thread = sleeper(bench)
    bench.step()
    bench.run(lambda cpu: cpu.store(WORD, 9), number=1)
    assert thread.result == 9


def test_a_sleeper_that_wakes_preempts_lower_threads() -> None:
    """A kernel thread whose word has changed goes before the vCPU thread that runs, without any interrupt."""
    bench = LoopBench()
    thread = sleeper(bench)
    bench.machine.run()
    busy(bench, "vcpu", 20)
    bench.step(3)
    bench.memory.store(WORD, 1, 1)
    bench.step(2)
    assert thread.result == 1
    assert len(bench.log) < 6


def test_more_sleepers_than_watch_slots() -> None:
    """Ten threads that sleep on one word, behind one that sleeps on another, are all woken by their own stores."""
    bench = LoopBench(cpus=2)

    async def lonely(cpu: Cpu) -> int:
        while not await cpu.load(OTHER):
            await cpu.schedule()
        return 1

    first = bench.start(lonely)
    many = [sleeper(bench) for _ in range(10)]
    bench.machine.run()
    bench.run(lambda cpu: cpu.store(OTHER, 1), number=1)
    assert first.result == 1 and not any(thread.result for thread in many)
    bench.run(lambda cpu: cpu.store(WORD, 2), number=1)
    assert [thread.result for thread in many] == [2] * 10


async def _reads_much(cpu: Cpu) -> None:
    for _ in range(9):
        await cpu.load(OTHER)


@pytest.mark.parametrize("spins", [False, True], ids=["sleeps", "spins"])
@pytest.mark.parametrize("by", ["interrupt", "thread"])
def test_who_is_interrupted_between_the_look_and_the_wait_waits_for_what_it_read(by: str, spins: bool) -> None:
    """An interrupt handler or another thread reads other words in between; the store of the own word still wakes."""
    bench = LoopBench(cpus=2, reads=_reads_much)

    async def waits(cpu: Cpu) -> int:
        while not (value := await cpu.load(WORD)):
            await (cpu.cpu_relax() if spins else cpu.schedule())
        return value

    thread = bench.start(waits, priority=Priority.VCPU)
    bench.step()
    if by == "interrupt":
        bench.cpu().apic.accept(DEVICE)
    else:
        bench.start(_reads_much)
    bench.machine.run()
    assert thread.result is None and 0 in bench.machine.asleep
    bench.run(lambda cpu: cpu.store(WORD, 7), number=1)
    assert thread.result == 7


def test_a_sleeper_may_watch_several_words() -> None:
    """schedule(2) ends when either of the two words that were read last changes."""
    for word in (WORD, OTHER):
        bench = LoopBench(cpus=2)

        async def waits(cpu: Cpu) -> bool:
            while not await cpu.load(WORD) and not await cpu.load(OTHER):
                await cpu.schedule(2)
            return True

        thread = bench.start(waits)
        bench.machine.run()
        bench.run(lambda cpu, word=word: cpu.store(word, 1), number=1)
        assert thread.result


def test_sleeping_while_atomic_is_a_warning() -> None:
    """schedule() with preemption or interrupts off is the kernel's own BUG message."""
    for disable in (Cpu.preempt_disable, Cpu.local_irq_disable):
        bench = LoopBench()
        bench.memory.store(WORD, 1, 1)

        async def body(cpu: Cpu, disable: object = disable) -> None:
            assert callable(disable)
            await disable(cpu)
            await cpu.load(WORD)
            await cpu.schedule()

        bench.start(body)
        bench.step(3)
        assert [r["text"] for r in bench.machine.records if r["event"] == "warn"] == ["BUG: scheduling while atomic"]


# A machine that is dropped


def test_a_dropped_machine_releases_no_lock() -> None:
    """GeneratorExit in a thread that holds a lock writes no record and gives nothing back: power is gone."""
    bench = LoopBench()

    async def hold(cpu: Cpu) -> None:
        async with cpu.raw_spin_lock_irqsave(LOCK):
            while True:
                await cpu.give_way()

    thread = bench.start(hold)
    bench.step(20)
    assert bench.cpu().tokens == {"lock": (1, 1)}
    written = len(bench.machine.records)
    thread.body.close()
    assert bench.arbiter.releases == [] and len(bench.machine.records) == written
    assert bench.cpu().tokens == {"lock": (1, 1)} and not bench.cpu().irqs_on


# SEAM


async def call_and_repair(bench: LoopBench, cpu: Cpu) -> None:
    """What a wrapper does: SEAMCALL, then the store that makes KVM forget the current VMCS."""
    await cpu.seamcall(1 << 63, (), name="SEAMLDR.INFO")
    bench.see(cpu, "returned")
    await cpu.this_cpu_write(current_vmcs, None)
    bench.see(cpu, "repaired")


def test_seamcall_takes_no_event_until_it_returns() -> None:
    """In SEAM neither NMI nor interrupt is taken; after SEAMRET both are, before the caller goes on."""
    bench = LoopBench()
    bench.enter_vmx()
    bench.start(lambda cpu: call_and_repair(bench, cpu))
    bench.step()
    bench.cpu().apic.accept(DEVICE)
    bench.cpu().apic.accept_nmi()
    assert bench.order() == [] and bench.machine.records[-1]["event"] == "seamcall_enter"
    bench.machine.run()
    assert bench.order() == ["nmi", "nmi end", "device", "device end", "returned", "repaired"]


@pytest.mark.parametrize("steps, before", [(1, "returned"), (2, "returned"), (3, "repaired")])
def test_an_nmi_can_land_between_seamret_and_the_store(steps: int, before: str) -> None:
    """The repair is an operation: an NMI before it finds no current VMCS, and a pointer that still names one."""
    bench = LoopBench()
    vmcs = bench.enter_vmx()
    bench.memory.store(per_cpu(0).current_vmcs, vmcs, 0)
    believed: list[tuple[int, int]] = []

    async def nmi(cpu: Cpu) -> None:
        bench.see(cpu, "nmi")
        believed.append((cpu.vmx.cur, bench.memory.load(cpu.percpu.current_vmcs)[0]))
        await cpu.give_way()

    bench.cpu().kernel = msgspec.structs.replace(bench.cpu().kernel, nmi=nmi)
    bench.start(lambda cpu: call_and_repair(bench, cpu))
    bench.step(steps)
    bench.cpu().apic.accept_nmi()
    bench.machine.run()
    assert bench.order()[bench.order().index("nmi") + 1 :][0] == before
    assert believed == [(NONE, vmcs) if before == "returned" else (NONE, NONE)]


def test_a_busy_seam_answers_at_once() -> None:
    """A SEAMCALL that is not admitted is VMfailInvalid and loses nothing."""
    bench = LoopBench()
    vmcs = bench.enter_vmx()
    bench.arbiter.busy = True
    reply = bench.run(lambda cpu: cpu.seamcall(1 << 63, (1, 2), name="SEAMLDR.INFO"))
    assert (reply.entered, reply.registers, bench.cpu().vmx.cur) == (False, (1, 2), vmcs)


def test_seamcall_outside_vmx_operation_faults() -> None:
    """Without VMXON the instruction is #UD and the SEAM side never hears of it."""
    bench = LoopBench()
    outcome = bench.run(lambda cpu: cpu.seamcall(1 << 63, (), name="SEAMLDR.INFO"))
    assert outcome.vector == 6
    assert bench.machine.records == []


# Driving


def test_a_guest_run_is_handed_to_the_shell() -> None:
    """step returns what only a shell can do, and its argument is the answer."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> object:
        return await trap(GuestRun())

    loop = StepLoop(bench.cpu(), lambda thread: None)
    thread = Thread("vcpu", Priority.VCPU, body(bench.cpu()))
    loop.add(thread)
    assert loop.step() == GuestRun()
    assert loop.step(5) is Need.IDLE
    assert thread.result == 5


def test_a_relax_is_a_poll_if_something_is_due() -> None:
    """The shell is not told to sleep while an event waits."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> None:
        cpu.apic.accept_nmi()
        await trap(Trap.RELAX)
        await trap(Trap.RELAX)

    loop = StepLoop(bench.cpu(), lambda thread: None)
    loop.add(Thread("spinner", Priority.KERNEL, body(bench.cpu())))
    assert loop.step() is Need.POLL
    bench.handler_steps = 0
    assert loop.step() is Need.RELAX
    assert bench.order() == ["nmi", "nmi end"]
