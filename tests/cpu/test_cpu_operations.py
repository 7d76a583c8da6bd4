"""The operations of a CPU: their effect, their stamps, and where each gives way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from loop_bench import DEVICE, LoopBench

from bus.memory import PAGE_SIZE, PhysicalMemory
from cpu.core import Trap
from cpu.cpu import Cpu, RawSpinLock, current_vmcs
from cpu.layout import KERNEL, TASKS, CallSingleData, per_cpu
from cpu.ops_vmx import REGION_STAMP, field_name
from cpu.struct import NONE
from cpu.vmx import Field

LOCK = RawSpinLock("lock")
WORD, OTHER = KERNEL.stop_mutex, KERNEL.next_call
U64 = (1 << 64) - 1


def run(*bodies: Callable[[Cpu], Awaitable[Any]], bench: LoopBench | None = None) -> list[Any]:
    """Results of operations that one thread makes one after the other."""

    async def body(cpu: Cpu) -> list[Any]:
        return [await operation(cpu) for operation in bodies]

    result: list[Any] = (bench or LoopBench()).run(body)
    return result


# Memory


def test_words_hold_what_was_stored() -> None:
    """Loads see stores; exchange and add return the old and the new value; arithmetic wraps at 64 bits."""
    assert run(
        lambda cpu: cpu.load(WORD),
        lambda cpu: cpu.store(WORD, 5),
        lambda cpu: cpu.load(WORD),
        lambda cpu: cpu.xchg(WORD, 7),
        lambda cpu: cpu.atomic_add(WORD, 3),
        lambda cpu: cpu.atomic_add(WORD, -11),
        lambda cpu: cpu.atomic_add(WORD, 1),
    ) == [0, None, 5, 5, 10, U64, 0]


def test_a_load_moves_the_clock_past_the_store_that_it_sees() -> None:
    """Whatever a CPU does after a load has a later Lamport time than the store whose value it read."""
    reads: list[Callable[[Cpu], Awaitable[Any]]] = [
        lambda cpu: cpu.load(WORD),
        lambda cpu: cpu.xchg(WORD, 1),
        lambda cpu: cpu.atomic_add(WORD, 1),
        lambda cpu: cpu.llist_add(OTHER, WORD),
    ]
    for read in reads:
        bench = LoopBench(2)
        bench.cpu(0).clock.merge(1000)
        run(lambda cpu: cpu.store(WORD, 1), bench=bench)
        assert bench.cpu(1).clock.now < 1000
        bench.run(read, 1)  # type: ignore[arg-type]
        assert bench.cpu(1).clock.now >= bench.cpu(0).clock.now > 1000


def test_a_recorded_store_has_the_time_of_its_record() -> None:
    """current_vmcs and the words with records are stamped by their record, so the reader comes after it."""
    bench = LoopBench(2)
    bench.cpu(0).clock.merge(500)
    run(
        lambda cpu: cpu.this_cpu_write(current_vmcs, 0x5000),
        lambda cpu: cpu.store_recorded(WORD, 1, "launched_store", vmcs=0x5000),
        bench=bench,
    )
    said = [(r["event"], r["clock"], r["new"]) for r in bench.machine.records]
    assert said == [("cv_write", 501, 0x5000), ("launched_store", 502, 1)]
    assert bench.memory.load(per_cpu(0).current_vmcs) == (0x5000, 501)
    bench.run(lambda cpu: cpu.load(WORD), 1)
    assert bench.cpu(1).clock.now >= 502


@pytest.mark.parametrize(
    "store",
    [
        lambda cpu: cpu.store(WORD, 1),
        lambda cpu: cpu.xchg(WORD, 1),
        lambda cpu: cpu.atomic_add(WORD, 1),
        lambda cpu: cpu.llist_add(OTHER, WORD),
        lambda cpu: cpu.store_recorded(WORD, 1, "launched_store", vmcs=0),
    ],
    ids=["store", "xchg", "atomic_add", "llist_add", "store_recorded"],
)
def test_every_kind_of_store_wakes_those_who_sleep_on_the_word(store: Any) -> None:
    """A CPU that spins on a word goes on after any store to it, whichever operation made it."""
    bench = LoopBench(2)

    async def spin(cpu: Cpu) -> int:
        while not (value := await cpu.load(WORD)):
            await cpu.cpu_relax()
        return value

    thread = bench.start(spin, 1)
    bench.machine.run()
    assert bench.machine.ready() == [] and thread.result is None
    bench.run(store)
    assert thread.result


def test_a_per_cpu_pointer_that_is_null_reads_as_none() -> None:
    """this_cpu_read and this_cpu_write speak of None, the memory of all ones."""
    bench = LoopBench()
    answers = run(
        lambda cpu: cpu.this_cpu_write(current_vmcs, None),
        lambda cpu: cpu.this_cpu_read(current_vmcs),
        lambda cpu: cpu.this_cpu_write(current_vmcs, 0x1000),
        lambda cpu: cpu.this_cpu_read(current_vmcs),
        bench=bench,
    )
    assert answers == [None, None, None, 0x1000]
    assert [(r["old"], r["new"]) for r in bench.machine.records] == [(0, NONE), (NONE, 0x1000)]


def test_a_lock_free_list_says_who_was_first() -> None:
    """llist_add pushes at the head; only the first push finds the list empty."""
    bench = LoopBench()
    first, second = (CallSingleData(per_cpu(0).csd + index * CallSingleData.SIZE).next for index in (0, 1))
    head = per_cpu(0).call_single_queue
    answers = run(lambda cpu: cpu.llist_add(first, head), lambda cpu: cpu.llist_add(second, head), bench=bench)
    assert answers == [True, False]
    assert [bench.memory.load(at)[0] for at in (head, second, first)] == [second, first, 0]


def test_a_list_that_dies_with_its_cpu_takes_nothing_more() -> None:
    """llist_add pushes nothing while the word that it is told to look at is set."""
    bench = LoopBench()
    node, head, dead = CallSingleData(per_cpu(0).csd).next, per_cpu(0).call_single_queue, per_cpu(0).dead
    bench.memory.store(dead, 1, 0)
    assert run(lambda cpu: cpu.llist_add(node, head, unless=dead), bench=bench) == [None]
    assert bench.memory.load(head)[0] == 0
    bench.memory.store(dead, 0, 0)
    assert run(lambda cpu: cpu.llist_add(node, head, unless=dead), bench=bench) == [True]


def test_compare_and_exchange() -> None:
    """cmpxchg stores only over what it expects, and says what it found."""
    bench = LoopBench()
    answers = run(
        lambda cpu: cpu.cmpxchg(WORD, 0, 5), lambda cpu: cpu.cmpxchg(WORD, 0, 6), lambda cpu: cpu.cmpxchg(WORD, 5, 7),
        bench=bench,
    )  # fmt: skip
    assert answers == [0, 5, 5] and bench.memory.load(WORD)[0] == 7


def test_pages_are_copied_whole() -> None:
    """write_phys, read_phys and clear_page move bytes."""
    data = bytes(range(256)) * 16
    assert run(
        lambda cpu: cpu.write_phys(TASKS, data),
        lambda cpu: cpu.read_phys(TASKS + 1, 3),
        lambda cpu: cpu.clear_page(TASKS),
        lambda cpu: cpu.read_phys(TASKS, PAGE_SIZE),
    ) == [None, b"\x01\x02\x03", None, bytes(PAGE_SIZE)]


# Interrupts and preemption


def test_saving_and_restoring_the_interrupt_flag_nests() -> None:
    """local_irq_restore brings back what local_irq_save found, on or off."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> list[bool]:
        seen = []
        outer = await cpu.local_irq_save()
        inner = await cpu.local_irq_save()
        seen += [outer, inner, cpu.irqs_on]
        await cpu.local_irq_restore(inner)
        seen.append(cpu.irqs_on)
        await cpu.local_irq_restore(outer)
        return [*seen, cpu.irqs_on]

    assert bench.run(body) == [True, False, False, False, True]


def test_the_preempt_count_is_in_ram() -> None:
    """preempt_disable and preempt_enable nest, and their count can be read by others."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> list[int]:
        seen = []
        for change in (cpu.preempt_disable, cpu.preempt_disable, cpu.preempt_enable, cpu.preempt_enable):
            await change()
            seen.append(bench.memory.load(per_cpu(0).preempt_count)[0])
        return seen

    assert bench.run(body) == [1, 2, 1, 0]


# Giving way


def traps(bench: LoopBench, quantum: int, operation: Callable[[Cpu], Any], times: int) -> int:
    """How often a row of operations gives way on a CPU with this quantum."""
    cpu = bench.cpu()
    cpu.quantum = cpu.budget = quantum

    async def body() -> None:
        for _ in range(times):
            await operation(cpu)

    coroutine, count = body(), 0
    try:
        while True:
            assert coroutine.send(None) is Trap.BOUNDARY
            count += 1
    except StopIteration:
        return count


OPERATIONS: dict[str, Callable[[Cpu], Any]] = {
    "load": lambda cpu: cpu.load(WORD),
    "store": lambda cpu: cpu.store(WORD, 1),
    "atomic_add": lambda cpu: cpu.atomic_add(WORD, 1),
    "xchg": lambda cpu: cpu.xchg(WORD, 1),
    "llist_add": lambda cpu: cpu.llist_add(OTHER, WORD),
    "this_cpu_read": lambda cpu: cpu.this_cpu_read(current_vmcs),
    "this_cpu_write": lambda cpu: cpu.this_cpu_write(current_vmcs, None),
    "store_recorded": lambda cpu: cpu.store_recorded(WORD, 1, "launched_store", vmcs=0),
    "read_phys": lambda cpu: cpu.read_phys(TASKS, 1),
    "write_phys": lambda cpu: cpu.write_phys(TASKS, b"x"),
    "local_irq_disable": lambda cpu: cpu.local_irq_disable(),
    "local_irq_enable": lambda cpu: cpu.local_irq_enable(),
    "preempt_disable": lambda cpu: cpu.preempt_disable(),
    "vmread": lambda cpu: cpu.vmread(Field.GUEST_RIP),
    "vmwrite": lambda cpu: cpu.vmwrite(Field.GUEST_RIP, 1),
    "vmptrst": lambda cpu: cpu.vmptrst(),
    "vmptrld": lambda cpu: cpu.vmptrld(0x5000),
    "vmclear": lambda cpu: cpu.vmclear(0x5000),
    "send_ipi": lambda cpu: cpu.send_ipi(0, DEVICE),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_gives_way_once(name: str) -> None:
    """On a stepped CPU every operation is one boundary; on a live one every `quantum`-th is."""
    assert traps(LoopBench(), 1, OPERATIONS[name], 6) == 6
    assert traps(LoopBench(), 3, OPERATIONS[name], 6) == 2


def test_what_becomes_deliverable_is_taken_at_once_whatever_the_quantum() -> None:
    """STI with an interrupt pending, and the end of a preemption-off section with a reschedule due, end the quantum."""
    bench = LoopBench()
    bench.cpu().apic.accept(DEVICE)
    assert traps(bench, 1000, lambda cpu: cpu.local_irq_enable(), 1) == 1
    bench = LoopBench()
    bench.cpu().preempt_count, bench.cpu().need_resched = 2, True
    assert traps(bench, 1000, lambda cpu: cpu.preempt_enable(), 1) == 0
    assert traps(bench, 1000, lambda cpu: cpu.preempt_enable(), 1) == 1


def test_operations_are_counted_by_the_quantum() -> None:
    """The count of operations grows by the quantum at each boundary."""
    bench = LoopBench()
    traps(bench, 4, OPERATIONS["load"], 8)
    assert bench.cpu().count.operations == 8


def test_relaxing_forgets_what_was_read() -> None:
    """Only words read since the last relax are waited for."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> list[list[tuple[int, int]]]:
        await cpu.load(WORD)
        before = list(cpu.recent_loads)
        cpu.apic.accept(DEVICE)
        await cpu.cpu_relax()
        return [before, list(cpu.recent_loads)]

    assert bench.run(body) == [[(WORD, 0)], []]


# Locks


def test_a_lock_turns_interrupts_off_before_it_spins() -> None:
    """raw_spin_lock_irqsave spins with IRQs and preemption off; raw_spin_lock leaves interrupts on."""
    bench = LoopBench(2)

    async def hold(cpu: Cpu) -> None:
        async with cpu.raw_spin_lock(LOCK) as guard:
            assert cpu.irqs_on and cpu.preempt_count == 1 and cpu.tokens == {"lock": guard.token}
            while not await cpu.load(WORD):
                await cpu.cpu_relax()

    async def wait(cpu: Cpu) -> bool:
        async with cpu.raw_spin_lock_irqsave(LOCK):
            return cpu.irqs_on

    bench.start(hold, 1)
    bench.machine.run()
    thread = bench.start(wait)
    bench.machine.run()
    waiter = bench.cpu()
    assert (waiter.irqs_on, waiter.preempt_count, waiter.waits_for) == (False, 1, ("spins on lock", "seamldr"))
    bench.memory.store(WORD, 1, 1)
    bench.machine.asleep.clear()
    bench.machine.run()
    assert thread.result is False
    for number in (0, 1):
        cpu = bench.cpu(number)
        assert (cpu.irqs_on, cpu.preempt_count, cpu.tokens, cpu.grants, cpu.waits_for) == (True, 0, {}, {}, ("", ""))
    assert bench.arbiter.releases == [(1, "lock", 1, 1), (0, "lock", 1, 2)]


def test_an_exception_in_the_section_gives_the_lock_back() -> None:
    """Only a dropped coroutine keeps a lock; an error of kernel code leaves the section as any return does."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> str:
        try:
            async with cpu.raw_spin_lock_irqsave(LOCK):
                raise KeyError("broken")
        except KeyError as error:
            return str(error)

    assert bench.run(body) == "'broken'"
    assert bench.arbiter.releases == [(0, "lock", 1, 1)] and bench.cpu().irqs_on


def test_a_request_says_in_which_context_it_waits() -> None:
    """The level of a lock request is 0 in a task, 1 in an interrupt, 2 in the NMI handler."""
    bench = LoopBench()

    async def body(cpu: Cpu) -> None:
        for context in ("task", "irq", "nmi"):
            cpu.contexts.append(context)
            async with cpu.raw_spin_lock(LOCK):
                pass
            cpu.contexts.pop()

    bench.run(body)
    assert bench.arbiter.levels == [0, 1, 2]
    assert [r["level"] for r in bench.machine.records if r["event"] == "lock_request"] == [0, 1, 2]


# VMX instructions


def test_the_stamp_of_a_region_orders_those_who_load_it() -> None:
    """VMPTRLD on another CPU comes later, in Lamport time, than the VMCLEAR that wrote the region."""
    bench = LoopBench(2)
    vmcs = bench.enter_vmx()
    bench.enter_vmx(1)
    bench.cpu(0).clock.merge(1000)
    run(lambda cpu: cpu.vmclear(vmcs), bench=bench)
    bench.run(lambda cpu: cpu.vmptrld(vmcs), 1)
    clear, load = bench.machine.records
    assert (clear["event"], load["event"]) == ("vmclear", "vmptrld") and load["clock"] > clear["clock"] > 1000
    assert bench.memory.read64(vmcs + REGION_STAMP) == load["clock"]


def test_an_address_without_ram_has_no_stamp() -> None:
    """VMPTRLD of nonsense fails by itself; the stamp of its region is not looked for."""
    bench = LoopBench()
    bench.enter_vmx()
    end = bench.memory.size
    outcomes = run(*[lambda cpu, pa=pa: cpu.vmptrld(pa) for pa in (0x123, end, end - 8, U64)], bench=bench)
    assert not any(outcome.ok for outcome in outcomes)
    assert all(r["result"] != "ok" for r in bench.machine.records) and bench.cpu().clock.now < 100


def test_reads_and_writes_are_recorded_only_if_they_fail_or_are_traced() -> None:
    """Counts tell how many VMREADs and VMWRITEs there were; records tell of failures, with the field's name."""
    bench = LoopBench()
    vmcs = bench.enter_vmx()
    run(lambda cpu: cpu.vmwrite(Field.GUEST_RIP, 9), lambda cpu: cpu.vmread(Field.GUEST_RIP), bench=bench)
    assert bench.machine.records == []
    bench.cpu().vmx.make_current(None)
    run(lambda cpu: cpu.vmread(Field.GUEST_RIP), lambda cpu: cpu.vmwrite(Field.TSC_OFFSET | 1, 9), bench=bench)
    assert [(r["event"], r["name"], r["result"]) for r in bench.machine.records] == [
        ("vmread", "GUEST_RIP", "invalid"),
        ("vmwrite", "TSC_OFFSET_HIGH", "invalid"),
    ]
    counts = bench.cpu().count
    assert (counts.vmread, counts.vmwrite, counts.vmread_errors, counts.vmwrite_errors) == (2, 2, 1, 1)
    bench.machine.records.clear()
    bench.cpu().trace = True
    bench.cpu().vmx.vmptrld(vmcs)
    run(lambda cpu: cpu.vmread(Field.GUEST_RIP), bench=bench)
    assert [(r["event"], r["result"]) for r in bench.machine.records] == [("vmread", "ok")]


def test_an_encoding_without_a_name_is_shown_in_hex() -> None:
    """field_name never fails."""
    assert [field_name(encoding) for encoding in (0x681E, 0x2011, 0x7FFE)] == ["GUEST_RIP", "TSC_OFFSET_HIGH", "0x7ffe"]


# Messages of the kernel


def test_warn_on_once_is_once_a_text_and_cpu() -> None:
    """A condition that is false says nothing; the same text is recorded once on each CPU, WARN every time."""
    bench = LoopBench(2)
    first, second = bench.cpu(0), bench.cpu(1)
    assert not first.warn_on_once(False, "a")
    assert all((first.warn_on_once(True, "a"), first.warn_on_once(True, "a"), first.warn_on_once(True, "b")))
    assert second.warn_on_once(True, "a")
    for _ in range(2):
        first.warn("w")
    texts = [(r["node"], r["text"]) for r in bench.machine.records]
    assert texts == [("cpu0", "a"), ("cpu0", "b"), ("cpu1", "a"), ("cpu0", "w"), ("cpu0", "w")]


def test_a_cpu_tells_what_it_is_doing() -> None:
    """The repr names the context, the current VMCS, the interrupt flag and what is pending."""
    cpu = LoopBench().cpu()
    cpu.apic.accept(DEVICE)
    assert repr(cpu) == f"<Cpu 0 in idle vmcs={NONE:#x} irqs=on preempt=0 pending=[48]>"
    assert repr(LOCK) == "<raw_spinlock lock>"


def test_memory_of_a_stepped_machine_is_private() -> None:
    """Two machines share nothing."""
    one, two = LoopBench(), LoopBench()
    run(lambda cpu: cpu.store(WORD, 1), bench=one)
    assert isinstance(two.memory, PhysicalMemory) and two.memory.load(WORD) == (0, 0)
