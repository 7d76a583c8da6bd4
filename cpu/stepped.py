"""A machine that is stepped in one process: no sockets, no clock; who steps next is decided outside, at every
operation.

The same kernel code and cores run here as in the live machine. The lock service and the SEAM side are handed in as an
`Arbiter`, since they live in rooms above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from bus.clock import LamportClock
from bus.memory import PhysicalMemory
from cpu import watch
from cpu.core import GuestExit, GuestRun, Kernel, SeamReply, SeamTrap
from cpu.cpu import Cpu
from cpu.layout import per_cpu
from cpu.loop import Need, StepLoop, Thread
from cpu.vmx import VmxConfig, VmxUnit

Record = dict[str, Any]


class Arbiter(Protocol):
    """The lock service and the SEAM side, as plain calls."""

    def lock_acquire(self, cpu: int, lock: str, level: int, request: int) -> None: ...

    def lock_release(self, cpu: int, lock: str, epoch: int, number: int) -> None: ...

    def seam_enter(self, cpu: int, request: SeamTrap) -> SeamReply | None:
        """The reply of a SEAMCALL that was not admitted, or None: it is resident."""

    def seam_leave(self, cpu: int) -> SeamReply:
        """SEAMRET."""


class SteppedWorld:
    """What one CPU reaches of the others."""

    def __init__(self, machine: SteppedMachine, number: int) -> None:
        self.machine = machine
        self.number = number

    def send_ipi(self, target: int, vector: int, nmi: bool) -> str:
        machine = self.machine
        machine.messages += 1
        message = f"m{machine.messages}"
        if target in machine.dead:
            return message
        receiver = machine.cpus[target]
        coalesced = receiver.apic.accept_nmi() if nmi else receiver.apic.accept(vector)
        receiver.clock.merge(machine.cpus[self.number].clock.now)
        source = f"cpu{self.number}"
        receiver.emit(
            "ipi_deliver", source=source, vector=vector, nmi=int(nmi), id=message, coalesced=int(coalesced)
        )
        machine.asleep.discard(target)
        return message

    def ring(self, target: int, word: int) -> None:
        self.machine.asleep.discard(target)

    def lock_acquire(self, lock: str, level: int, request: int) -> None:
        self.machine.arbiter.lock_acquire(self.number, lock, level, request)

    def lock_release(self, lock: str, epoch: int, number: int) -> None:
        self.machine.arbiter.lock_release(self.number, lock, epoch, number)

    def now_ns(self) -> int:
        return self.machine.steps


class SteppedMachine:
    """N CPUs, their loops and one memory. `arbiter` is set after construction, since it grants locks to the CPUs."""

    arbiter: Arbiter

    def __init__(self, num_cpus: int, config: VmxConfig, kernel: Kernel, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.records: list[Record] = []
        self.steps = 0
        self.messages = 0
        self.asleep: set[int] = set()
        self.dead: set[int] = set()
        self.births = [1] * num_cpus
        """Incarnation of each CPU's process, which is its process id here."""
        self.ended: list[tuple[int, Thread]] = []
        self.on_ended: Callable[[int, Thread], None] = lambda number, thread: None
        self.cpus: list[Cpu] = []
        self.loops: list[StepLoop] = []
        self._waiting: dict[int, GuestRun | SeamTrap] = {}
        for number in range(num_cpus):
            cpu = self._new_cpu(number, config, kernel)
            self.cpus.append(cpu)
            self.loops.append(self._new_loop(cpu))

    def _new_cpu(self, number: int, config: VmxConfig, kernel: Kernel) -> Cpu:
        unit = VmxUnit(config, self.memory)
        unit.reset_to_vmx_ready()
        clock = LamportClock()
        return Cpu(number, unit, self.memory, clock, SteppedWorld(self, number), kernel, self._emitter(number, clock))

    def _new_loop(self, cpu: Cpu) -> StepLoop:
        return StepLoop(cpu, functools.partial(self._thread_ended, cpu.number))

    def _thread_ended(self, number: int, thread: Thread) -> None:
        self.ended.append((number, thread))
        self.on_ended(number, thread)

    def kill(self, number: int) -> None:
        """The CPU's process is no more, at whatever operation it was; all others hear of it."""
        self.dead.add(number)
        self.drop(number)
        self.memory.store(per_cpu(number).dead, 1, self.cpus[number].clock.now)
        self.asleep.clear()
        for cpu in self.cpus:
            cpu.take_what_waits()

    def drop(self, number: int) -> None:
        """What the CPU runs comes to no end."""
        self._waiting.pop(number, None)
        loop = self.loops[number]
        for frame in reversed(loop.stack):
            frame.body.close()
        for thread in loop.threads():
            thread.body.close()

    def bear(self, number: int) -> None:
        """A new process in the place of a dead one: hardware as after INIT, and RAM as it is."""
        old = self.cpus[number]
        self.births[number] += 1
        self.cpus[number] = cpu = self._new_cpu(number, old.vmx.config, old.kernel)
        cpu.clock.merge(max(one.clock.now for one in [old, *self.cpus]))
        self.loops[number] = self._new_loop(cpu)
        self.dead.discard(number)

    def _emitter(self, number: int, clock: LamportClock) -> Callable[..., int]:
        def emit(event: str, /, **fields: object) -> int:
            time = clock.tick()
            cpu = self.cpus[number]
            seq, pid = len(self.records) + 1, self.births[number]
            head = {"ts": self.steps, "clock": time, "node": f"cpu{number}", "pid": pid, "seq": seq, "event": event}
            self.records.append(head | cpu.record_context() | fields)
            return time

        return emit

    def start(self, number: int, thread: Thread) -> None:
        """Give a CPU a thread."""
        self.loops[number].add(thread)
        self.asleep.discard(number)

    def ready(self) -> list[int]:
        """CPUs that can step."""
        return [number for number in range(len(self.cpus)) if number not in self.asleep and number not in self.dead]

    def waiting_for(self, number: int) -> GuestRun | SeamTrap | None:
        """What the CPU's next step ends: a run of its guest, or a residence in SEAM."""
        return self._waiting.get(number)

    def step(self, number: int, *, interrupt_guest: bool = False) -> None:
        """One operation of one CPU."""
        self.steps += 1
        self.asleep.discard(number)
        loop = self.loops[number]
        reply: SeamReply | GuestExit | None = None
        waiting = self._waiting.pop(number, None)
        if isinstance(waiting, SeamTrap):
            reply = self.arbiter.seam_leave(number)
            if waiting.guest:
                loop.account_exit()
        elif waiting is not None:
            reply = self._guest_exit(number, interrupt_guest)
        watch.disarm(self.memory, number)
        loop.wake_sleepers()
        self._after(number, loop.step(reply))

    def _guest_exit(self, number: int, interrupted: bool) -> GuestExit:
        apic = self.cpus[number].apic
        self.loops[number].account_exit()
        if apic.nmi_pending:
            apic.nmi_pending = False
            return GuestExit(nmi=True)
        if apic.irr or interrupted:
            return GuestExit(vector=apic.acknowledge()) if apic.irr else GuestExit()
        return GuestExit()

    def _after(self, number: int, need: Need | GuestRun | SeamTrap) -> None:
        if isinstance(need, SeamTrap):
            reply = self.arbiter.seam_enter(number, need)
            if reply is None:
                self._waiting[number] = need
            else:
                self._after(number, self.loops[number].step(reply))
        elif isinstance(need, GuestRun):
            self._waiting[number] = need
        elif need is Need.RELAX:
            if watch.arm(self.memory, number, list(self.cpus[number].recent_loads)):
                self.asleep.add(number)
        elif need is Need.IDLE:
            loads = [word for thread in self.loops[number].sleepers for word in thread.sleeping_on or []]
            if watch.arm(self.memory, number, loads):
                self.asleep.add(number)

    def run(self, choose: Callable[[list[int]], int] = min, limit: int = 1_000_000) -> None:
        """Step CPUs, chosen by `choose`, until all sleep; raises RuntimeError after `limit` steps."""
        for _ in range(limit):
            ready = self.ready()
            if not ready:
                return
            self.step(choose(ready))
        raise RuntimeError(f"{limit} steps and still running")
