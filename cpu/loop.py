"""The step loop of one CPU: which coroutine runs next, and what may come between two operations.

A pure core. `step` drives kernel code with `send()` until something is needed that only a shell can give: messages,
time, the SEAM side. At every boundary, in this order: an NMI unless one is being handled; an interrupt if IF is set;
preemption if the preempt count is 0, IF is set and another thread should run (with KVM's preempt notifiers). Handlers
run nested, on top of the thread that they interrupt.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from cpu.core import GuestRun, SeamTrap, Trap
from cpu.cpu import Cpu


class Priority(enum.IntEnum):
    """Which thread goes first; the stopper is above all others."""

    STOPPER = 0
    KERNEL = 1
    VCPU = 2


FULL = ("full", "rt")
"""Preemption models in which kernel code is preempted between any two operations. `rt` differs in what a plain spinlock
is; in `lazy` only the stopper preempts at once; in `none` and `voluntary` a thread gives way where it says so."""


class NotAnOperation(TypeError):
    """Kernel code awaited something that is not of this machine, such as a function of an async library."""


class Notifier(Protocol):
    """`struct preempt_notifier`: told when its thread loses and gets back the CPU."""

    async def sched_in(self, cpu: Cpu) -> None:
        """The thread runs again here. IRQs on, preemption off."""

    async def sched_out(self, cpu: Cpu) -> None:
        """The thread stops running. IRQs off."""


class Thread:
    """A kernel thread of one CPU. `slice_exits` VM exits make its slice; `task` is its number if it can move."""

    def __init__(
        self,
        name: str,
        priority: Priority,
        body: Coroutine[Any, Any, Any],
        *,
        task: int | None = None,
        slice_exits: int = 8,
    ) -> None:
        self.name = name
        self.priority = priority
        self.body = body
        self.task = task
        self.slice_exits = slice_exits
        self.slice_left = slice_exits
        self.sleeping_on: list[tuple[int, int]] | None = None
        self.loads: list[tuple[int, int]] = []
        """What it had read for its next wait when it lost the CPU."""
        self.notifier: Notifier | None = None
        self.move_to: int | None = None
        self.stopping = False
        self.result: Any = None

    def __repr__(self) -> str:
        state = "asleep" if self.sleeping_on is not None else f"{self.slice_left} exits left"
        return f"<Thread {self.name} {state}>"


class Frame(msgspec.Struct):
    """One coroutine on the CPU's stack. `loads` is what the code below it has read for its next wait."""

    body: Coroutine[Any, Any, Any]
    kind: str
    irqs_on: bool
    loads: list[tuple[int, int]]
    then: Callable[[], None] | None = None


class Need(enum.Enum):
    """What the shell is asked for, besides `GuestRun` and `SeamTrap`."""

    POLL = "look for messages, then step again"
    RELAX = "sleep until something may have changed, then step again"
    IDLE = "no thread can run: sleep until one may"


class StepLoop:
    """Threads of one CPU and the stack of what runs on it now."""

    def __init__(self, cpu: Cpu, thread_ended: Callable[[Thread], None]) -> None:
        self.cpu = cpu
        self.model = str(cpu.kernel.knobs.get("preemption", "full"))
        self.thread_ended = thread_ended
        self.runnable: dict[Priority, deque[Thread]] = {priority: deque() for priority in Priority}
        self.sleepers: list[Thread] = []
        self.current: Thread | None = None
        self.stack: list[Frame] = []
        self.halted = False
        cpu.irqs_on = True

    # Threads

    def add(self, thread: Thread) -> None:
        """A new thread: it can run at once and preempts lower ones."""
        self.runnable[thread.priority].append(thread)
        self._preempt_for(thread)

    def threads(self) -> list[Thread]:
        """All threads of this CPU."""
        waiting = [thread for queue in self.runnable.values() for thread in queue]
        return ([self.current] if self.current else []) + waiting + self.sleepers

    def find_task(self, task: int) -> Thread | None:
        """The thread of a task, if it is here."""
        return next((thread for thread in self.threads() if thread.task == task), None)

    def _preempt_for(self, thread: Thread) -> None:
        if self.current is not None and thread.priority < self.current.priority:
            self.cpu.need_resched = True

    def wake_sleepers(self) -> None:
        """Make every sleeper runnable one of whose words has changed."""
        memory = self.cpu.memory
        for thread in list(self.sleepers):
            words = thread.sleeping_on or []
            if any(memory.load(word)[0] != value for word, value in words):
                thread.sleeping_on = None
                self.sleepers.remove(thread)
                self.runnable[thread.priority].appendleft(thread)
                self._preempt_for(thread)

    def _pick(self) -> Thread | None:
        self.wake_sleepers()
        for priority in Priority:
            if self.runnable[priority]:
                return self.runnable[priority].popleft()
        return None

    def _better_waits(self) -> bool:
        current = self.current
        if current is None:
            return False
        queue = self.runnable[current.priority]
        return any(self.runnable[p] for p in Priority if p < current.priority) or bool(queue and not current.slice_left)

    def account_exit(self) -> None:
        """One VM exit of the running thread's slice is used up."""
        thread = self.current
        if thread is not None and thread.slice_left:
            thread.slice_left -= 1
            if not thread.slice_left:
                if self.runnable[thread.priority]:
                    self.cpu.need_resched = True
                else:
                    thread.slice_left = thread.slice_exits

    def _requeue(self, thread: Thread) -> None:
        """A preempted thread stays at the head for the rest of its slice, then goes to the tail."""
        if thread.slice_left:
            self.runnable[thread.priority].appendleft(thread)
        else:
            thread.slice_left = thread.slice_exits
            self.runnable[thread.priority].append(thread)

    # Events

    def event_due(self) -> bool:
        """Whether a step would take an event before it resumes what runs."""
        cpu = self.cpu
        if cpu.apic.nmi_pending and not cpu.apic.in_nmi:
            return True
        if not cpu.irqs_on:
            return False
        return bool(cpu.apic.irr) or (cpu.need_resched and self._preemptible())

    def _preemptible(self) -> bool:
        cpu = self.cpu
        if len(self.stack) != 1 or cpu.preempt_count:
            return False
        at_once = self.model in FULL or (self.model == "lazy" and bool(self.runnable[Priority.STOPPER]))
        return at_once or cpu.resched_point

    def _take_events(self) -> None:
        cpu, apic = self.cpu, self.cpu.apic
        if apic.nmi_pending and not apic.in_nmi:
            apic.nmi_pending, apic.in_nmi = False, True
            self._push(cpu.kernel.nmi(cpu), "nmi", self._end_of_nmi)
        elif cpu.irqs_on and apic.irr:
            vector = apic.acknowledge()
            self._push(cpu.kernel.interrupts[vector](cpu), "irq")
        elif cpu.irqs_on and cpu.need_resched and self._preemptible():
            cpu.need_resched = False
            self.wake_sleepers()
            if self._better_waits():
                self._preempt()

    def _end_of_nmi(self) -> None:
        self.cpu.apic.in_nmi = False

    def _push(
        self,
        body: Coroutine[Any, Any, Any],
        kind: str,
        then: Callable[[], None] | None = None,
        *,
        irqs_on: bool = False,
    ) -> None:
        cpu = self.cpu
        self.stack.append(Frame(body, kind, cpu.irqs_on, list(cpu.recent_loads), then))
        cpu.contexts.append(cpu.context if kind == "switch" else kind)
        cpu.irqs_on = irqs_on

    def _pop(self) -> None:
        frame = self.stack.pop()
        self.cpu.contexts.pop()
        self.cpu.irqs_on = frame.irqs_on
        self._restore_loads(frame.loads)
        if frame.then is not None:
            frame.then()

    # Context switches

    def _preempt(self) -> None:
        thread = self.current
        assert thread is not None
        if thread.notifier is None:
            self._switched_out()
        else:
            self._push(thread.notifier.sched_out(self.cpu), "switch", self._switched_out)

    def _switched_out(self) -> None:
        thread = self.current
        assert thread is not None
        self._leave(thread)
        self._requeue(thread)

    def _restore_loads(self, loads: list[tuple[int, int]]) -> None:
        """Whoever was interrupted between a read and its wait still waits for what it read."""
        self.cpu.recent_loads.clear()
        self.cpu.recent_loads.extend(loads)

    def _leave(self, thread: Thread) -> None:
        thread.loads = list(self.cpu.recent_loads)
        self.stack.clear()
        self.cpu.contexts[:] = ["idle"]
        self.current = self.cpu.thread = None
        self.cpu.resched_point = False

    def _switch_in(self, thread: Thread) -> None:
        cpu = self.cpu
        self.current = cpu.thread = thread
        cpu.contexts[:] = ["idle", thread.name]
        self._restore_loads(thread.loads)
        self.stack.append(Frame(thread.body, "thread", True, []))
        cpu.irqs_on = True
        if thread.notifier is not None:
            cpu.preempt_count += 1
            self._push(thread.notifier.sched_in(cpu), "switch", self._switched_in, irqs_on=True)

    def _switched_in(self) -> None:
        self.cpu.preempt_count -= 1

    def _sleep(self) -> None:
        """The running thread sleeps on the words that it read last."""
        thread = self.current
        assert thread is not None
        thread.sleeping_on = list(self.cpu.recent_loads)[-self.cpu.sleep_words :]
        self.sleepers.append(thread)
        if thread.notifier is None:
            self._leave(thread)
        else:
            self._push(thread.notifier.sched_out(self.cpu), "switch", lambda: self._leave(thread))

    # Driving

    def step(self, reply: Any = None) -> Need | GuestRun | SeamTrap:
        """Run until the shell is needed. `reply` answers the `GuestRun` or `SeamTrap` that the last call returned."""
        resume = reply is not None
        while not self.halted:
            if not resume:
                self._take_events()
            resume = False
            if not self.stack:
                thread = self._pick()
                if thread is None:
                    if self.event_due():
                        continue
                    return Need.IDLE
                self._switch_in(thread)
            request, reply = self._send(reply), None
            if request is None:
                continue
            if request is Trap.BOUNDARY:
                return Need.POLL
            if request is Trap.RELAX:
                return Need.POLL if self.event_due() else Need.RELAX
            if request is Trap.SLEEP:
                self._sleep()
            elif request is Trap.USER:
                reply = self._may_stay()
                resume = True
            elif isinstance(request, GuestRun | SeamTrap):
                return request
            else:
                reply = NotAnOperation(f"awaited a {type(request).__name__}, which is no operation of a CPU")
                resume = True
        return Need.IDLE

    def _may_stay(self) -> bool:
        thread = self.current
        assert thread is not None
        return thread.move_to is None and not thread.stopping

    def _send(self, reply: Any) -> Any:
        """Resume the top of the stack; its trap, or None if it has ended."""
        frame = self.stack[-1]
        try:
            return frame.body.throw(reply) if isinstance(reply, NotAnOperation) else frame.body.send(reply)
        except StopIteration as end:
            if frame.kind == "thread":
                thread = self.current
                assert thread is not None
                thread.result = end.value
                self._leave(thread)
                self.thread_ended(thread)
            else:
                self._pop()
            return None
