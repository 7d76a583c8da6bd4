"""Knobs: what they accept, and what each of NMI injection and preemption model does to a stepped machine."""

from __future__ import annotations

import pytest
from hazards import info, load_run_put
from stepping import Stepped

from cpu.core import NMI_PERIODS
from cpu.cpu import Cpu
from cpu.irq_work import irq_work_queue, nmi_work_queue
from cpu.layout import task_vmcs
from cpu.loop import Priority, Thread
from cpu.struct import NONE
from kvm.compose import CHOICES, KnobError, Knobs, parse_knobs


@pytest.mark.parametrize(
    "setting",
    [
        "nmi_inject=sometimes", "call_context=softirq", "preemption=dynamic", "vmxon_owner=tdx", "offline_irqs=1",
        "preemption", "no_such_knob=1", "seamdb_size=many", "seamdb_size=0", "fms=0",
    ],
)  # fmt: skip
def test_a_knob_that_cannot_be_is_refused(setting: str) -> None:
    """A name or a value that does not exist is one sentence that says what there is."""
    with pytest.raises(KnobError, match="knob"):
        parse_knobs([setting])


def test_every_choice_is_accepted() -> None:
    """Each value that a knob offers parses, and the default is one of them."""
    for name, choices in CHOICES.items():
        assert str(getattr(Knobs(), name)) in choices
        for choice in choices:
            assert str(getattr(parse_knobs([f"{name}={choice}"]), name)) == choice


SEEN = {
    "before-vmptrst": (task_vmcs(0), []),
    "after-vmptrst": (task_vmcs(0), ["vmptrst"]),
    "in-seam": (NONE, ["vmptrst", "seamcall_return"]),
    "after-seamret": (NONE, ["vmptrst", "seamcall_return"]),
    "after-repair": (task_vmcs(0), ["vmptrst", "seamcall_return", "vmptrld"]),
}


@pytest.mark.parametrize("point", SEEN)
def test_an_nmi_arrives_at_its_point(point: str) -> None:
    """Under `save-restore` the NMI handler finds the VMCS current, except between SEAMRET and the restore."""
    machine = Stepped("save-restore", nmi_inject=point)
    machine.run(load_run_put(machine.new_vcpu(0)))
    machine.machine.records.clear()
    assert machine.run(info) == 0
    events = machine.events("vmptrst", "seamcall_return", "vmptrld", "nmi_enter")
    before = [r["event"] for r in events[: [r["event"] for r in events].index("nmi_enter")]]
    assert (machine.events("nmi_enter")[0]["cur"], before) == SEEN[point]
    assert machine.count("nmi_enter") == machine.count("nmi_pend", point=point) == 1


def test_samples_come_by_count() -> None:
    """`sampled` takes each point once in so many passages: the same on every run."""
    machine = Stepped("save-restore", nmi_inject="sampled")
    for _ in range(30):
        machine.run(info)
    points = [r["point"] for r in machine.events("nmi_pend")]
    assert {point: points.count(point) for point in SEEN} == {point: 30 // NMI_PERIODS[point] for point in SEEN}


@pytest.mark.parametrize(("queue", "context"), [(irq_work_queue, "irq"), (nmi_work_queue, "nmi")])
def test_work_runs_on_top_of_a_task(queue: object, context: str) -> None:
    """Queued work calls P-SEAMLDR in its own context, in the middle of what runs; an NMI does not wait for STI."""
    machine = Stepped("none")

    async def body(cpu: Cpu) -> None:
        await cpu.local_irq_disable()
        queue(cpu, info)  # type: ignore[operator]
        await cpu.give_way()
        cpu.emit("log", text="still off")
        await cpu.local_irq_enable()

    machine.run(body)
    events = machine.events("log", "strategy_begin")
    assert [r["ctx"] for r in events if r["event"] == "strategy_begin"] == [context]
    assert events[0]["event"] == ("log" if context == "irq" else "strategy_begin")


@pytest.mark.parametrize("model", ["none", "voluntary", "full", "lazy", "rt"])
@pytest.mark.parametrize("higher", [Priority.STOPPER, Priority.KERNEL])
def test_where_a_thread_is_preempted(model: str, higher: Priority) -> None:
    """Fully preemptible kernels switch between any two operations, lazy ones for the stopper, others at points."""
    machine = Stepped("none", preemption=model)
    order: list[str] = []

    async def low(cpu: Cpu) -> None:
        machine.machine.start(0, Thread("high", higher, high(cpu)))
        await cpu.give_way()
        await cpu.give_way()
        order.append("low")
        await cpu.might_resched()
        order.append("might sleep")
        await cpu.cond_resched()
        order.append("point")

    async def high(cpu: Cpu) -> None:
        await cpu.give_way()
        order.append("high")

    machine.machine.start(0, Thread("low", Priority.VCPU, low(machine.cpu())))
    machine.machine.run()
    at_once = model in ("full", "rt") or (model == "lazy" and higher is Priority.STOPPER)
    expected = 0 if at_once else 1 if model == "voluntary" else 2
    assert order.index("high") == expected
