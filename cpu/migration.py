"""Threads that the scheduler moves in the middle of what they do (kernel/sched/core.c).

A coroutine cannot cross processes, so in a live machine a task moves at the head of its loop alone. Where all CPUs are
in one process it can move wherever it can be preempted, as in Linux: its code then goes on at the other CPU with the
values that it read on the first.
"""

from __future__ import annotations

from typing import Any, cast

from cpu.core import Trap, trap
from cpu.cpu import Cpu
from cpu.loop import Priority, Thread
from cpu.stepped import SteppedMachine


class ThisCpu:
    """The CPU of a thread that may be moved: each operation is one of the CPU that runs the thread just then."""

    def __init__(self, cpu: Cpu) -> None:
        object.__setattr__(self, "now", cpu)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.now, name, value)

    async def static_call(self, name: str, *arguments: Any) -> Any:
        """The callee may be preempted too, so it gets this CPU and not the one of the moment."""
        return await self.now.kernel.static_calls[name](self, *arguments)

    async def cpu_relax(self) -> None:
        """PAUSE; the words to wait for were read on the CPU that the thread is on when it resumes, or are read again.
        """
        await trap(Trap.RELAX)
        self.now.recent_loads.clear()

    def move_to(self, cpu: Cpu) -> None:
        """The thread's next operation is one of `cpu`."""
        object.__setattr__(self, "now", cpu)


def movable(cpu: Cpu) -> tuple[Cpu, ThisCpu]:
    """What the code of a movable thread is given as its CPU, twice: as kernel code and as the scheduler see it."""
    here = ThisCpu(cpu)
    return cast(Cpu, here), here


def set_cpus_allowed(machine: SteppedMachine, thread: Thread, here: ThisCpu, to: int) -> None:
    """Have the stopper of the thread's CPU move it to CPU `to`: as soon as it can be preempted, or not if it has ended.
    """
    source = here.now.number

    async def migration_cpu_stop(cpu: Cpu) -> None:
        loop = machine.loops[source]
        if thread in loop.runnable[thread.priority]:
            loop.runnable[thread.priority].remove(thread)
            here.move_to(machine.cpus[to])
            machine.start(to, thread)
        await cpu.give_way()

    machine.start(source, Thread("migration", Priority.STOPPER, migration_cpu_stop(machine.cpus[source])))
