"""A stepped machine with running vCPUs whose CPUs go, come, die and live again, each step chosen by a seed.

`with live(...) as lives` switches it off at its end: code that was never run to its end is dropped.
"""
from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from stepping import Stepped

from cpu.cpu import Cpu
from cpu.layout import KERNEL, per_cpu
from cpu.loop import Thread
from cpu.struct import NONE
from kvm.hotplug import add_cpu, remove_cpu
from kvm.run_queue import ON_RQ, place_word
from kvm.vcpu import vcpu_of

MOVES = 0.004
"""Chance at each step that the load balancer moves a task."""

Body = Callable[[Cpu], Coroutine[Any, Any, Any]]


def offline(number: int) -> Body:
    """Kernel code that takes a CPU out of the online mask."""
    return lambda cpu: remove_cpu(cpu, number)


def online(number: int) -> Body:
    """Kernel code that takes a CPU into the online mask."""
    return lambda cpu: add_cpu(cpu, number)


@contextmanager
def live(seed: int, **settings: Any) -> Iterator[Lives]:
    """A machine for the time of the block."""
    lives = Lives(seed, **settings)
    try:
        yield lives
    finally:
        for number in range(len(lives.machine.cpus)):
            lives.machine.drop(number)


class Lives:
    """`cpus` CPUs with some vCPUs each. The callback that takes a CPU offline has interrupts off: the hazard of the
    other way (a clear IPI in the middle of the sweep) is none of these tests' business.
    """

    def __init__(self, seed: int, *, cpus: int = 3, vcpus: int = 2, **knobs: Any) -> None:
        self.rng = Random(seed)
        self.stepped = Stepped("clear-current-vmcs", cpus=cpus, offline_irqs="off", **knobs)
        self.machine = self.stepped.machine
        self.tasks = range(vcpus * cpus)
        for task in self.tasks:
            self.stepped.send_task(task, task % cpus)

    def word(self, address: int) -> int:
        """The value of a word."""
        return self.stepped.memory.load(address)[0]

    def step(self) -> bool:
        """One operation of some CPU; False if all sleep."""
        ready = self.machine.ready()
        if not ready:
            return False
        self.machine.step(self.rng.choice(ready))
        if self.rng.random() < MOVES:
            alive = [number for number in range(len(self.machine.cpus)) if number not in self.machine.dead]
            threads = [t for t in self.machine.loops[self.rng.choice(alive)].threads() if t.task is not None]
            if threads:
                self.rng.choice(threads).move_to = self.rng.choice(alive)
        return True

    def go(self, steps: int = 8000, until: Callable[[], bool] = lambda: False) -> None:
        """Step, at most `steps` times, until something holds."""
        for _ in range(steps):
            if until() or not self.step():
                return

    def start(self, body: Body, number: int = 0) -> Thread:
        """A kernel thread."""
        return self.stepped.start(body, number, "kworker")

    def run(self, body: Body, number: int = 0) -> Any:
        """A kernel thread, and its result; None if it does not come to its end."""
        thread = self.start(body, number)
        self.go(until=lambda: thread.result is not None)
        return thread.result

    def kill_after(self, operations: int, number: int) -> None:
        """Kill a CPU after so many operations of its own."""
        for _ in range(20_000):
            if operations <= 0:
                break
            before = self.machine.cpus[number].count.operations
            if not self.step():
                break
            operations -= self.machine.cpus[number].count.operations - before
        self.stepped.kill(number)

    def abort(self) -> None:
        """What the operator's `abort_update` does."""
        self.stepped.memory.store(KERNEL.update_abort, 1, max(cpu.clock.now for cpu in self.machine.cpus))
        self.machine.asleep.clear()

    def replug(self, number: int) -> None:
        """A new process for a dead CPU, until it is up."""
        self.stepped.replug(number)
        self.go(until=lambda: not self.word(per_cpu(number).dead))
        assert not self.word(per_cpu(number).dead)

    # What there is to see

    def violations(self) -> dict[str, str]:
        """Invariants that the history breaks, with the first time of each."""
        judgement = self.stepped.judge(finished=False)
        return {violation.invariant: violation.first.sentence for violation in judgement.violations}

    def exits(self) -> list[int]:
        """VM exits of each vCPU."""
        return [self.word(vcpu_of(task).exits) for task in self.tasks]

    def where(self) -> list[int | None]:
        """The CPU that has each task; None if it has ended."""
        places = [self.word(place_word(task)) for task in self.tasks]
        return [None if place == NONE else place >> 2 for place in places]

    def queued(self) -> list[int]:
        """Tasks on a run queue, by their words."""
        places = {task: self.word(place_word(task)) for task in self.tasks}
        return [task for task, place in places.items() if place != NONE and place & ON_RQ]

    def all_go_on(self) -> bool:
        """Whether every task makes exits that does not end, on CPUs that live."""
        before, gone = self.exits(), {None, *self.machine.dead}

        def they_do() -> bool:
            now, where = self.exits(), self.where()
            return all(now[task] > before[task] for task in self.tasks if where[task] not in gone)

        self.go(12_000, they_do)
        return they_do()
