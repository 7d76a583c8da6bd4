"""Work that runs in interrupt or NMI context on top of what its CPU does (kernel/irq_work.c)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from cpu.apic import Vector
from cpu.cpu import Cpu

Work = Callable[[Cpu], Coroutine[Any, Any, Any]]


def irq_work_queue(cpu: Cpu, work: Work) -> None:
    """Have `work` run in hard interrupt context on this CPU: the next interrupt that it takes. Not an operation."""
    cpu.irq_work.append(work)
    cpu.apic.accept(Vector.IRQ_WORK)


def nmi_work_queue(cpu: Cpu, work: Work) -> None:
    """Have `work` run in the NMI handler of this CPU. No kernel code should; it shows why. Not an operation."""
    cpu.nmi_work.append(work)
    cpu.apic.accept_nmi()


async def sysvec_irq_work(cpu: Cpu) -> None:
    """Handler of IRQ_WORK: run what is queued, first queued first."""
    cpu.emit("irq_enter", vector=int(Vector.IRQ_WORK))
    while cpu.irq_work:
        await cpu.irq_work.popleft()(cpu)
    cpu.emit("irq_exit", vector=int(Vector.IRQ_WORK))


async def run_nmi_work(cpu: Cpu) -> None:
    """The NMI handler's part: one NMI may stand for several causes."""
    while cpu.nmi_work:
        await cpu.nmi_work.popleft()(cpu)
