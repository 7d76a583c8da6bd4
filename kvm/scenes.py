"""The situations that the verdict matrix puts a strategy into, each a small machine stepped by a seed.

A scene asks one question, so only some invariants count in it. Each builds its machine, has P-SEAMLDR called a few
times at moments that the seed decides, and comes to rest; the records are then judged.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from bus.judge import Judgement
from cpu.core import GuestRun
from cpu.cpu import Cpu
from cpu.irq_work import irq_work_queue
from cpu.layout import BUFFERS, task_vmcs
from cpu.loop import Priority, Thread
from kvm.stepped import Stepped
from kvm.vcpu import vcpu_of
from kvm.vmx import VmxVcpu, vcpu_thread
from seamldr.strategies import Strategy
from seamldr.update import seamldr_version_show

INFO_PAGES = BUFFERS + 0x10_0000
CALLS = 6
WARM_UP = 300
REST = 20_000
RESIDENCE = 0.7
"""Chance that a CPU inside P-SEAMLDR lets another one step first."""


class Act(msgspec.Struct, frozen=True):
    """What came of one machine: its judgement, and how many P-SEAMLDR calls were entered."""

    machine: Stepped
    judgement: Judgement
    calls: int
    came_to_rest: bool


class Stage:
    """A machine with what the scenes need: vCPU threads, readers of the version, steps chosen by a seed."""

    def __init__(self, strategy: str | Strategy, seed: int, *, cpus: int = 1, **knobs: Any) -> None:
        self.rng = Random(seed)
        self.stepped = Stepped(strategy, cpus=cpus, **knobs)
        self.machine = self.stepped.machine
        self.machine.ended.clear()
        self.threads: list[Thread] = []
        self.pages = 0

    def vcpu(self, task: int, number: int = 0) -> Thread:
        """A vCPU's thread, started on a CPU."""
        vcpu = VmxVcpu(task, vcpu_of(task))
        body = vcpu_thread(self.machine.cpus[number], vcpu, task_vmcs(task))
        thread = Thread(f"vcpu{task}", Priority.VCPU, body, task=task, slice_exits=3)
        self.threads.append(thread)
        self.machine.start(number, thread)
        return thread

    async def info(self, cpu: Cpu) -> None:
        """Read the version of P-SEAMLDR."""
        self.pages += 1
        await seamldr_version_show(cpu, INFO_PAGES + 4096 * self.pages)

    def reader(self, number: int) -> None:
        """A thread that reads the version, of the same class as the vCPUs' threads."""
        cpu = self.machine.cpus[number]
        self.machine.start(number, Thread("reader", Priority.VCPU, self.info(cpu), slice_exits=1))
        self.tick(number)

    def tick(self, number: int) -> None:
        """The timer ends the slice of the thread that runs on the CPU."""
        thread = self.machine.loops[number].current
        if thread is not None:
            thread.slice_left = 0
            self.machine.cpus[number].need_resched = True

    def interrupt(self, number: int) -> None:
        """An interrupt on top of what the CPU does, whose handler reads the version."""
        irq_work_queue(self.machine.cpus[number], self.info)
        self.machine.asleep.discard(number)

    def steps(self, count: int) -> bool:
        """Step until the machine sleeps, `count` steps at most; whether it sleeps."""
        machine = self.machine
        for _ in range(count):
            ready = machine.ready()
            if not ready:
                return True
            machine.step(self._choose(ready))
            self._move()
        return False

    def _choose(self, ready: list[int]) -> int:
        inside = self.stepped.seam.inside
        others = [number for number in ready if number != inside]
        slow = len(others) < len(ready) and self.rng.random() < RESIDENCE
        return self.rng.choice(others if others and slow else ready)

    def _move(self) -> None:
        machine = self.machine
        while machine.ended:
            _, thread = machine.ended.pop()
            if thread.result == "moved" and thread.move_to is not None and thread.task is not None:
                self.vcpu(thread.task, thread.move_to)

    def until_guest_runs(self, number: int) -> None:
        """Step until the CPU is in guest mode; gives up after a while."""
        for _ in range(WARM_UP):
            if isinstance(self.machine.waiting_for(number), GuestRun) or self.steps(1):
                return

    def until_in_seam(self, number: int) -> None:
        """Step until the CPU is inside P-SEAMLDR, where a call spends most of its time; gives up after a while."""
        for _ in range(WARM_UP):
            if self.stepped.seam.inside == number or self.steps(1):
                return

    def end(self) -> Act:
        """End the vCPUs, come to rest, judge."""
        for thread in self.threads:
            thread.stopping = True
        rests = self.steps(REST)
        calls = sum(bool(r["leaf"] >> 63 and r["entered"]) for r in self.stepped.events("seamcall_return"))
        return Act(self.stepped, self.stepped.judge(finished=rests), calls, rests)


def task(strategy: str | Strategy, seed: int, **knobs: Any) -> Act:
    """A thread calls while the vCPU of its CPU is preempted, and may be preempted itself; that vCPU is loaded next."""
    stage = Stage(strategy, seed, **knobs)
    stage.vcpu(0)
    stage.steps(WARM_UP)
    for _ in range(CALLS):
        stage.reader(0)
        stage.until_in_seam(0)
        stage.tick(0)
        stage.steps(stage.rng.randrange(40, 160))
    return stage.end()


def irq(strategy: str | Strategy, seed: int, **knobs: Any) -> Act:
    """An interrupt handler calls on top of a vCPU's thread, wherever that is just now."""
    stage = Stage(strategy, seed, **knobs)
    stage.vcpu(0)
    stage.steps(WARM_UP)
    for _ in range(CALLS):
        stage.interrupt(0)
        stage.steps(stage.rng.randrange(40, 160))
    return stage.end()


def clear_ipi(strategy: str | Strategy, seed: int, **knobs: Any) -> Act:
    """A thread calls on the CPU where a vCPU ran last, while another CPU loads that vCPU: a clear IPI is on its way."""
    stage = Stage(strategy, seed, cpus=2, **knobs)
    stage.vcpu(0)
    stage.steps(WARM_UP)
    for turn in range(CALLS):
        here, there = turn % 2, 1 - turn % 2
        stage.threads[-1].move_to = there
        stage.steps(stage.rng.randrange(60))
        stage.reader(here)
        stage.steps(stage.rng.randrange(150, 400))
    return stage.end()


def nmi(strategy: str | Strategy, seed: int, **knobs: Any) -> Act:
    """An interrupt ends a guest's run and its handler calls; a performance-counter NMI waits for SEAMRET."""
    stage = Stage(strategy, seed, nmi_inject="in-seam", **knobs)
    stage.vcpu(0)
    stage.steps(WARM_UP)
    for _ in range(CALLS):
        stage.until_guest_runs(0)
        stage.interrupt(0)
        stage.steps(stage.rng.randrange(40, 160))
    return stage.end()


def launch_clear(strategy: str | Strategy, seed: int, **knobs: Any) -> Act:
    """As `task`, where SEAMRET clears the launch state of the VMCS that was current."""
    return task(strategy, seed, seamret_launch="clear", **knobs)


def whole_cache(strategy: str | Strategy, seed: int, **knobs: Any) -> Act:
    """Two vCPUs on the CPU, and SEAMRET clears the launch state of every VMCS that is active there."""
    stage = Stage(strategy, seed, seamret_launch="clear", seamret_scope="all_active_on_lp", **knobs)
    stage.vcpu(0)
    stage.vcpu(1)
    stage.steps(2 * WARM_UP)
    for _ in range(CALLS):
        stage.reader(0)
        stage.steps(stage.rng.randrange(100, 300))
    return stage.end()


def concurrent(strategy: str | Strategy, seed: int, **knobs: Any) -> Act:
    """Threads of two CPUs call at once."""
    stage = Stage(strategy, seed, cpus=2, **knobs)
    for _ in range(CALLS):
        stage.reader(0)
        stage.reader(1)
        stage.steps(stage.rng.randrange(100, 300))
    return stage.end()


CALLERS = frozenset({"I19", "I20", "I21"})
"""About callers that are not serialized: the question of one column alone."""


class Scene(msgspec.Struct, frozen=True):
    """A column of the matrix: `judged` are the invariants that count in it; if none is named, all but `CALLERS`."""

    title: str
    play: Callable[..., Act]
    judged: frozenset[str] = frozenset()

    def counts(self, invariant: str) -> bool:
        """Whether a violation of this invariant is an answer to the scene's question."""
        return invariant in self.judged if self.judged else invariant not in CALLERS


SCENES: dict[str, Scene] = {
    "task": Scene("task caller,\nsame next", task),
    "irq": Scene("IRQ caller,\nloaded", irq),
    "clear-ipi": Scene("remote\nclear IPI", clear_ipi, frozenset({"I1", "I14", "I51"})),
    "nmi": Scene("NMI VMREAD\nin window", nmi, frozenset({"I13"})),
    "launch-clear": Scene("launch\ncleared", launch_clear),
    "whole-cache": Scene("... of all\nactive", whole_cache),
    "concurrent": Scene("two at\nonce", concurrent, CALLERS),
}
"""The columns in their order."""
