"""The process of one CPU: a trio program around the step loop. It gives the loop messages, time and the SEAM side."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic_ns

import msgspec
import trio

from bus.link import Delivery
from bus.messages import (
    Body,
    ClaimsEnd,
    Ipi,
    LockAcquire,
    LockClaim,
    LockGrant,
    LockRelease,
    Member,
    Query,
    Ring,
    Seamcall,
    SeamcallEvent,
    Seamret,
    Stop,
    Waits,
)
from bus.node import Node, join, shared_memory, until_terminated
from bus.spec import LAUNCHER, SEAMLDR, MachineSpec, cpu_number
from cpu import watch
from cpu.apic import Vector
from cpu.board import Board, Doing
from cpu.core import CpuFunction, GuestExit, GuestRun, Kernel, SeamReply, SeamTrap
from cpu.cpu import Cpu
from cpu.layout import per_cpu
from cpu.loop import Need, Priority, StepLoop, Thread
from cpu.softlockup import watchdog_thread
from cpu.stop_machine import cpu_stopper_thread
from cpu.vmx import VmxConfig, VmxUnit
from cpu.watchdog_task import keep_watch

QUANTUM = 256
"""Operations between two looks at the inbox."""

BREATH_NS = 5_000_000
"""Longest time without giving trio its turn."""

EXITS_PER_REST = 4
"""VM exits that follow each other at once; then the guest runs for a while."""


class Personality(msgspec.Struct, frozen=True):
    """What the rooms above make of a CPU: its kernel, how it comes up and goes down, and what messages make it do.

    `cpuhp` is its hotplug thread. `spawn` turns a message that is not the CPU's own into a new thread, or into a change
    of one that is there.
    """

    config: VmxConfig
    kernel: Kernel
    cpu_up: CpuFunction
    cpu_down: CpuFunction
    cpuhp: CpuFunction
    spawn: Callable[[CpuProcess, Body], Thread | None]
    thread_ended: Callable[[CpuProcess, Thread], None]


class CpuWorld:
    """The bus as kernel code reaches it."""

    def __init__(self, node: Node) -> None:
        self._send = node.endpoint.send

    def send_ipi(self, target: int, vector: int, nmi: bool) -> str:
        return self._send(f"cpu{target}", Ipi(vector, nmi))

    def ring(self, target: int, word: int) -> None:
        self._send(f"cpu{target}", Ring(word))

    def lock_acquire(self, lock: str, level: int, request: int) -> None:
        self._send(SEAMLDR, LockAcquire(lock, level, request))

    def lock_release(self, lock: str, epoch: int, number: int) -> None:
        self._send(SEAMLDR, LockRelease(lock, epoch, number))

    def now_ns(self) -> int:
        return monotonic_ns()


class CpuProcess:
    """One CPU on the bus."""

    def __init__(self, node: Node, number: int, personality: Personality) -> None:
        self.node = node
        self.spec = node.spec
        self.endpoint = node.endpoint
        self.personality = personality
        unit = VmxUnit(personality.config, shared_memory(node.spec))
        unit.reset_to_vmx_ready()
        self.cpu = Cpu(
            number,
            unit,
            unit.memory,
            node.clock,
            CpuWorld(node),
            personality.kernel,
            node.emit,
            trace=node.spec.trace,
            quantum=QUANTUM,
        )
        self.board = Board(unit.memory, number, self.cpu.count)
        self.board.change(Doing.KERNEL, monotonic_ns())
        node.recorder.context = self.cpu.record_context
        node.points.on_due = self._fault_due
        self.loop = StepLoop(self.cpu, self._thread_ended)
        self.stopping = False
        self.done = False
        self._rested = monotonic_ns()
        self._nap = trio.CancelScope()
        self._exits = 0
        self._calls = 0
        self._call: Seamcall | None = None
        """The SEAMCALL that this CPU is in."""
        self._told = False
        """Its guest knows that an event is pending, if it runs one."""
        self._seamret: Seamret | None = None
        states = {member.node: member.incarnation for member in node.spec.members}
        self._service = states.get(SEAMLDR, 1)
        """Incarnation of the lock service that has, or needs not, this CPU's claims."""

    def _fault_due(self) -> None:
        """The operation that runs is the last one before the shell looks."""
        self.cpu.budget = 0

    # Messages

    def _poll(self) -> bool:
        """Take what has arrived; whether there was anything."""
        batch = self.endpoint.drain_nowait()
        for delivery in batch:
            self._handle(delivery)
        if self.loop.sleepers:
            self.loop.wake_sleepers()
        return bool(batch)

    def _handle(self, delivery: Delivery) -> None:
        match delivery.body:
            case Ipi() as ipi:
                self._interrupt(delivery, ipi)
            case Ring():
                pass
            case LockGrant() | Seamret() if not self.endpoint.is_alive(delivery.source):
                pass  # it came with the record of its sender's death; what was claimed since then holds
            case LockGrant(request=request, epoch=epoch, number=number) if request in self.cpu.requests:
                self.cpu.lock_granted(request, epoch, number)
            case Seamret() as seamret if self._call is not None and seamret.call == self._call.call:
                self._seamret = seamret
            case LockGrant() | Seamret():
                self.node.refuse("unasked", type(delivery.body).__name__)
            case Stop():
                self._begin_to_stop()
            case Member(node=node, incarnation=incarnation, state=state):
                self.endpoint.member(node, incarnation, state)
                if node == SEAMLDR and state == "online" and incarnation > self._service:
                    self._service = incarnation
                    self.claim()
                self._interrupt_again(node, state)
            case Query():
                self.endpoint.send(LAUNCHER, self._waits())
            case body:
                if not self.node.handle_control(body):
                    thread = self.personality.spawn(self, body)
                    if thread is not None:
                        self.loop.add(thread)

    def _interrupt_again(self, node: str, state: str) -> None:
        """An interrupt may be lost that a CPU sent at its death, or that was sent to it then.

        What waits for this CPU in memory is taken; to a new process what waits for that is announced again.
        """
        number = cpu_number(node)
        if number is None or state == "offline":
            return
        if state == "dead":
            self.cpu.take_what_waits()
            return
        area, world = per_cpu(number), self.cpu.world
        waiting = (area.call_single_queue, Vector.CALL_FUNCTION_SINGLE), (area.stopper_work, Vector.RESCHEDULE)
        for word, vector in waiting:
            if self.cpu.memory.load(word)[0]:
                self.cpu.count.ipis_sent += 1
                begun = world.now_ns()
                message = world.send_ipi(number, vector, False)
                took = world.now_ns() - begun
                self.cpu.emit("ipi_send", target=number, vector=int(vector), nmi=0, id=message, took_ns=took)

    def claim(self) -> None:
        """A lock service that has started again is told all that this CPU holds and waits for, and its SEAMCALL."""
        cpu, send = self.cpu, self.endpoint.send
        for request, one in cpu.requests.items():
            epoch, number = cpu.grants.get(request, one.token)
            send(SEAMLDR, LockClaim(one.lock, one.level, request, one.clock, epoch, number))
        send(SEAMLDR, ClaimsEnd())
        if self._call is not None:
            self._told = False
            send(SEAMLDR, self._call)

    def _waits(self) -> Waits:
        cpu = self.cpu
        what, on = cpu.waits_for
        if not what and cpu.context != "idle":
            what = f"runs {cpu.context}"
        return Waits(what, on, cpu.count.operations)

    def _interrupt(self, delivery: Delivery, ipi: Ipi) -> None:
        cpu, vector, nmi = self.cpu, ipi.vector, ipi.nmi
        if not nmi and vector not in cpu.kernel.interrupts:
            self.node.refuse("vector", f"{vector:02x}")
            return
        coalesced = cpu.apic.accept_nmi() if nmi else cpu.apic.accept(vector)
        cpu.count.ipis_delivered += 1
        source = delivery.source.node
        cpu.emit(
            "ipi_deliver", source=source, vector=vector, nmi=int(nmi), id=delivery.id, coalesced=int(coalesced)
        )

    # Threads

    def _thread_ended(self, thread: Thread) -> None:
        if thread.name == "down":
            self.done = self.loop.halted = True
        elif thread.name == "up":
            self._came_up()
        else:
            self.personality.thread_ended(self, thread)

    def _came_up(self) -> None:
        """Only now, since RAM may have held work for the threads of the process before this one."""
        cpu, number = self.cpu, self.cpu.number
        self.loop.add(Thread(f"migration/{number}", Priority.STOPPER, cpu_stopper_thread(cpu)))
        self.loop.add(Thread(f"cpuhp/{number}", Priority.KERNEL, self.personality.cpuhp(cpu)))
        self.node.say_hello(os.getpid())

    def _begin_to_stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.loop.add(Thread("down", Priority.KERNEL, self.personality.cpu_down(self.cpu)))

    # The loop

    async def run(self) -> None:
        """Until the CPU has gone down."""
        cpu = self.cpu
        reply: GuestExit | SeamReply | None = None
        while True:
            if self.node.points.due is not None:
                await self._stand_still()
            need = self.loop.step(reply)
            reply = None
            if self.done:
                return
            if self.node.points.due is not None:
                await self._stand_still()
            if need is Need.POLL:
                self._poll()
                await self._breathe()
            elif need is Need.RELAX:
                await self._sleep(self._spins_for(), list(cpu.recent_loads))
            elif need is Need.IDLE:
                words = [word for thread in self.loop.sleepers for word in thread.sleeping_on or []]
                await self._sleep(Doing.IDLE, words)
            elif isinstance(need, GuestRun):
                reply = await self._run_guest()
            elif isinstance(need, SeamTrap):
                reply = await self._seamcall(need)

    async def _stand_still(self) -> None:
        """A fault is due here, before anything else may happen."""
        self.board.change(Doing.STANDS, monotonic_ns())
        late = await self.node.stand_still()
        self.board.change(Doing.KERNEL, monotonic_ns())
        for delivery in late:
            self._handle(delivery)

    async def _wait(self, doing: Doing, detail: int = 0) -> None:
        """Until a message may have come, or the timer has ticked; meanwhile the CPU shows that it does this."""
        self.board.change(doing, monotonic_ns(), detail)
        try:
            with trio.CancelScope() as self._nap:
                await self.endpoint.wait()
        finally:
            self.board.change(Doing.KERNEL, monotonic_ns())

    def _spins_for(self) -> Doing:
        current = self.loop.current
        if any(request.token == (0, 0) for request in self.cpu.requests.values()):
            return Doing.LOCK
        return Doing.STOPPED if current is not None and current.priority is Priority.STOPPER else Doing.WAITS

    def wake(self) -> None:
        """An event that is no message is due: whoever waits looks again."""
        self._nap.cancel()

    async def _breathe(self) -> None:
        now = monotonic_ns()
        if now - self._rested > BREATH_NS:
            self._rested = now
            await trio.lowlevel.checkpoint()

    async def _sleep(self, doing: Doing, loads: list[tuple[int, int]]) -> None:
        """Until a message comes, unless one is there or one of the words changes before."""
        cpu = self.cpu
        if self._poll() or self.loop.event_due():
            return
        if watch.arm(cpu.memory, cpu.number, loads):
            await self._wait(doing)
        watch.disarm(cpu.memory, cpu.number)
        self._poll()

    async def _run_guest(self) -> GuestExit:
        """The guest runs until it exits by itself or an event ends it."""
        apic, points = self.cpu.apic, self.node.points
        self.loop.account_exit()
        self._exits += 1
        if points.any:
            points.see("*guest", {})
            if points.due is not None:
                await self._stand_still()
        rest = 0 if self._exits % EXITS_PER_REST else self.spec.workload.guest_ns / 1e9
        task = self.loop.current.task if self.loop.current is not None else None
        with trio.move_on_after(rest) as guest_time:
            while rest:
                self._poll()
                if apic.nmi_pending or apic.irr:
                    break
                await self._wait(Doing.GUEST, 0 if task is None else task + 1)
        if not guest_time.cancelled_caught:
            self._poll()
        if apic.nmi_pending:
            apic.nmi_pending = False
            return GuestExit(nmi=True)
        return GuestExit(vector=apic.acknowledge()) if apic.irr else GuestExit()

    async def _seamcall(self, request: SeamTrap) -> SeamReply:
        """In SEAM until it returns: what arrives stays pending."""
        cpu = self.cpu
        self._calls += 1
        epoch, number = cpu.tokens.get("seamldr_lock", (0, 0))
        call = Seamcall(self._calls, request.rax, request.registers, epoch, number, cpu.irqs_on)  # type: ignore[arg-type]
        self._call, self._told = call, False
        self.endpoint.send(SEAMLDR, call)
        if request.guest:
            self.loop.account_exit()
        cpu.waits_for = ("in SEAM", SEAMLDR)
        while True:
            self._poll()
            seamret = self._seamret
            if seamret is not None and seamret.call == self._calls:
                break
            if request.guest and not self._told and (cpu.apic.irr or cpu.apic.nmi_pending):
                self._told = True
                self.endpoint.send(SEAMLDR, SeamcallEvent(self._calls, cpu.apic.nmi_pending))
            await self._wait(Doing.P_SEAMLDR if request.rax >> 63 else Doing.SEAM, request.rax)
        self.board.calls += seamret.entered and request.rax >> 63
        cpu.waits_for = ("", "")
        self._call = None
        return SeamReply(seamret.entered, seamret.rax, seamret.registers)

    def counters(self) -> None:
        """Write the totals so far."""
        self.cpu.emit("counters", counts=msgspec.structs.asdict(self.cpu.count))


def main(spec: MachineSpec, node: str, incarnation: int, personality: Personality) -> None:
    """The process of the CPU called `node`."""
    number = cpu_number(node)
    assert number is not None
    trio.run(_main, spec, node, incarnation, number, personality)


async def _main(spec: MachineSpec, name: str, incarnation: int, number: int, personality: Personality) -> None:
    async with until_terminated(), join(spec, name, incarnation) as node:
        process = CpuProcess(node, number, personality)
        cpu = process.cpu
        if any(member.node == SEAMLDR for member in spec.members):
            process.claim()  # that it has nothing to claim: its service may be waiting for all
        process.loop.add(Thread("up", Priority.KERNEL, personality.cpu_up(cpu)))
        async with trio.open_nursery() as nursery:
            if thresh_s := cpu.kernel.knobs["watchdog_thresh"]:
                process.loop.add(Thread(f"watchdog/{number}", Priority.STOPPER, watchdog_thread(cpu)))
                nursery.start_soon(keep_watch, cpu, thresh_s, process.wake)
            await process.run()
            nursery.cancel_scope.cancel()
        process.board.change(Doing.OFFLINE, monotonic_ns())
        process.counters()
        await node.say_goodbye(msgspec.structs.asdict(cpu.count))
