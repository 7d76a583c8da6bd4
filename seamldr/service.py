"""The seamldr process: the lock service and the SEAM side of the platform, on the bus.

It is judged by its own sequence of records: what it queues, grants and admits happens in the order in which it writes
it.
"""

from __future__ import annotations

import os
from collections import deque
from math import inf
from time import monotonic_ns

import msgspec
import trio

from bus.link import Delivery, Identity
from bus.messages import (
    ClaimsEnd,
    Fenced,
    LockAcquire,
    LockClaim,
    LockRelease,
    Member,
    Query,
    Seamcall,
    SeamcallEvent,
    Seamret,
    Stop,
    Waits,
)
from bus.node import Node, join, shared_memory, until_terminated
from bus.spec import LAUNCHER, MachineSpec, cpu_number
from seamldr.firmware import take_over
from seamldr.gate import Admission
from seamldr.journal import SeamCall
from seamldr.leaves import leaf_name
from seamldr.lock_board import LockBoard
from seamldr.lock_service import SEAMLDR_LOCK, LockService, live_cpus
from seamldr.seam import SeamSide
from seamldr.status import Fatal


class Resident(msgspec.Struct):
    """A SEAMCALL between enter and leave; `scope` ends its residence early."""

    delivery: Delivery
    call: Seamcall
    lp: int
    guest: bool
    scope: trio.CancelScope
    nmi: bool = False


class SeamldrService:
    """Lock queues, the SEAM side, and who is inside."""

    def __init__(self, node: Node, seam: SeamSide, nursery: trio.Nursery) -> None:
        self.node = node
        self.seam = seam
        self.nursery = nursery
        self.locks = LockService(node, seam.store, lambda: seam.inside)
        self.resident: dict[int, Resident] = {}
        self.stopping = False
        self.inbox: deque[Delivery] = deque()
        self.moving = trio.Event()
        """Cleared while a fault makes this process stand still: then nobody leaves SEAM either."""
        self.moving.set()
        self._look = trio.CancelScope()

    async def serve(self) -> None:
        """Take messages until told to stop."""
        node, inbox = self.node, self.inbox
        while not self.stopping:
            with trio.CancelScope(deadline=self._next_look()) as self._look:
                await node.endpoint.wait()
            self.locks.end_leases()
            await self._stand_still()
            inbox.extend(node.endpoint.drain_nowait())
            while inbox:
                self.handle(inbox.popleft())
                await self._stand_still()

    async def _stand_still(self) -> None:
        """If a fault is due: until it is over."""
        if self.node.points.due is not None:
            self.moving = trio.Event()
            self.inbox.extend(await self.node.stand_still())
            self.moving.set()

    def _next_look(self) -> float:
        """By trio's clock: when the next lease ends."""
        end = self.locks.lease_end()
        return inf if end is None else trio.current_time() + (end - monotonic_ns()) / 1e9

    def handle(self, delivery: Delivery) -> None:
        """One message; none of an incarnation whose death has come before it."""
        if not self.node.endpoint.is_alive(delivery.source):
            self.node.refuse("dead_incarnation", delivery.source.node)
            return
        match delivery.body:
            case LockAcquire() as acquire:
                self.locks.acquire(delivery.source, acquire)
            case LockRelease() as release:
                self.locks.release(delivery.source, release)
            case LockClaim() as claim:
                self.locks.claim(delivery, claim)
            case ClaimsEnd():
                self.locks.answered(delivery.source)
            case Seamcall() as call:
                self._seamcall(delivery, call)
            case SeamcallEvent() as event:
                self._event(delivery, event)
            case Member(node=name, incarnation=incarnation, state=state):
                self.node.endpoint.member(name, incarnation, state)
                if state == "dead":
                    self._dead(Identity(name, incarnation))
            case Query():
                self.node.endpoint.send(LAUNCHER, self._waits())
            case Stop():
                self.stopping = True
            case body:
                if not self.node.handle_control(body):
                    self.node.refuse("unexpected", type(body).__name__)

    def _dead(self, process: Identity) -> None:
        self.locks.dead(process)
        number = cpu_number(process.node)
        call = None if number is None else self.seam.journal.inside(number)
        if number is not None and call is not None and call.incarnation == process.incarnation:
            self._died_inside(number)

    def _died_inside(self, lp: int) -> None:
        resident = self.resident.pop(lp, None)
        if resident is not None:
            resident.scope.cancel()
        self.seam.leave_dead(lp)
        self.node.emit("seam_dead", by=lp, why="the CPU died inside SEAM")

    def _waits(self) -> Waits:
        locks = self.locks
        silent = sorted(node for node, _ in locks.recovery.silent) if locks.recovery is not None else []
        if silent:
            what = f"asks {', '.join(silent)} what they hold and wait for"
            return Waits(what, silent[0], self.node.recorder.written)
        held = [f"{q.name} is held by {q.holder.request.node}" for q in locks.queues.values() if q.holder]
        inside = self.seam.inside
        facts = held + ([f"CPU {inside} is in P-SEAMLDR"] if inside is not None else [])
        return Waits("; ".join(facts) or "nothing", "", self.node.recorder.written)

    # Starting again

    def take_over(self) -> None:
        """Go on where the process before this one was killed."""
        live, inside = live_cpus(self.node.spec), self.seam.inside
        self.node.emit(
            "service_restart",
            epoch=self.node.identity.incarnation,
            asked=[cpu_number(cpu.node) for cpu in live],
            inside=-1 if inside is None else inside,
        )
        for lp in list(self.seam.journal.calls):
            call = self.seam.journal.inside(lp)
            if call is not None and Identity(f"cpu{lp}", call.incarnation) not in live:
                self._died_inside(lp)
        self.locks.recover(live)

    def _again(self, delivery: Delivery, call: Seamcall, lp: int, known: SeamCall) -> None:
        """A call that the process before this one had begun, or answered, is sent again."""
        if known.over:
            self.node.emit(
                "seam_answer", by=lp, leaf=known.rax, name=leaf_name(known.rax), entered=int(known.entered)
            )
            self._answer(delivery.source, call, known)
        elif lp not in self.resident:
            self.node.emit("seam_resume", by=lp, leaf=known.rax, name=leaf_name(known.rax))
            resident = Resident(delivery, call, lp, known.guest, trio.CancelScope())
            if known.rax >> 63:
                self._begin_residence(resident)
            else:
                resident.scope.cancel()
                self._leave(resident)

    # SEAM

    def _seamcall(self, delivery: Delivery, call: Seamcall) -> None:
        source, lp = delivery.source, cpu_number(delivery.source.node)
        if lp is None or lp >= self.node.spec.cpus:
            self.node.refuse("seamcall", source.node)
            return
        known = self.seam.journal.find(lp, source.incarnation, call.call)
        if known is not None:
            self._again(delivery, call, lp, known)
        elif self.seam.journal.inside(lp) is not None:
            self.node.refuse("seamcall", source.node)
        elif call.rax >> 63:
            self.locks.after_recovery(lambda: self._call_p_seamldr(delivery, call, lp))
        else:
            self._enter(delivery, call, lp)

    def _call_p_seamldr(self, delivery: Delivery, call: Seamcall, lp: int) -> None:
        """P-SEAMLDR is entered unless the lock was taken from the caller: such a CPU is halted, and gets no answer."""
        if not self.node.endpoint.is_alive(delivery.source):
            return
        if not self.locks.is_fenced((call.epoch, call.number)):
            self._enter(delivery, call, lp)
            return
        holder = self.locks.token(SEAMLDR_LOCK)
        self.node.emit(
            "seam_fenced",
            by=lp,
            leaf=call.rax,
            name=leaf_name(call.rax),
            epoch=call.epoch,
            number=call.number,
            holder_epoch=holder[0],
            holder_number=holder[1],
        )
        self.node.endpoint.send(LAUNCHER, Fenced(lp))

    def _enter(self, delivery: Delivery, call: Seamcall, lp: int) -> None:
        rax, incarnation = call.rax, delivery.source.incarnation
        entry = self.seam.enter(lp, rax, call.registers, incarnation=incarnation, call=call.call)
        admitted = entry.admission is Admission.ADMITTED
        if rax >> 63 or not (admitted and entry.guest):
            self._record_enter(lp, call, entry.admission)
        if not admitted:
            self._answer(delivery.source, call, self.seam.journal.calls[lp])
            return
        if entry.guest and self.node.points.any:
            self.node.points.see("*td", {"by": lp})
        resident = Resident(delivery, call, lp, entry.guest, trio.CancelScope())
        if rax >> 63 or entry.guest:
            self._begin_residence(resident)
        else:
            self._leave(resident)

    def _begin_residence(self, resident: Resident) -> None:
        self.resident[resident.lp] = resident
        self.nursery.start_soon(self._reside, resident)

    def _answer(self, target: Identity, call: Seamcall, known: SeamCall) -> None:
        rax, registers = known.result
        self.node.endpoint.send(target.node, Seamret(call.call, known.entered, rax, registers))  # type: ignore[arg-type]

    def _record_enter(self, lp: int, call: Seamcall, admission: Admission) -> None:
        holder = self.locks.token(SEAMLDR_LOCK)
        self.node.emit(
            "seam_enter",
            by=lp,
            leaf=call.rax,
            name=leaf_name(call.rax),
            admitted=int(admission is Admission.ADMITTED),
            alive=int(admission in (Admission.ADMITTED, Admission.MUTEX_HELD)),
            inside=int(self.seam.inside is not None),
            epoch=call.epoch,
            number=call.number,
            holder_epoch=holder[0],
            holder_number=holder[1],
        )

    async def _reside(self, resident: Resident) -> None:
        """The time that a call spends in SEAM: fixed in P-SEAMLDR; a guest's run, which an interrupt may end."""
        workload = self.node.spec.workload
        time = workload.guest_ns if resident.guest else workload.residence_ns
        with resident.scope:
            await trio.sleep(time / 1e9)
        await self.moving.wait()
        if self.resident.get(resident.lp) is resident:
            del self.resident[resident.lp]
            self._leave(resident)
            self._look.deadline = self._next_look()

    def _event(self, delivery: Delivery, event: SeamcallEvent) -> None:
        resident = self.resident.get(cpu_number(delivery.source.node) or 0)
        if resident is not None and resident.guest and resident.call.call == event.call:
            resident.nmi = event.nmi
            resident.scope.cancel()

    def _leave(self, resident: Resident) -> None:
        lp, call = resident.lp, resident.call
        interrupted = resident.guest and resident.scope.cancel_called
        try:
            rax, _ = self.seam.leave(lp, interrupted=interrupted, nmi=resident.nmi)
        except Fatal as error:
            self.node.emit("seam_dead", by=lp, why=f"fatal error in SEAM: {error}")
        else:
            if call.rax >> 63 or not resident.guest:
                inside = int(self.seam.inside is not None)
                self.node.emit(
                    "seam_return", by=lp, leaf=call.rax, name=leaf_name(call.rax), status=rax, inside=inside
                )
        self._answer(resident.delivery.source, call, self.seam.journal.calls[lp])


def main(spec: MachineSpec, node: str, incarnation: int) -> None:
    """The seamldr process."""
    trio.run(_main, spec, node, incarnation)


async def _main(spec: MachineSpec, name: str, incarnation: int) -> None:
    async with until_terminated(), join(spec, name, incarnation) as node, trio.open_nursery() as nursery:
        memory = shared_memory(spec)
        service = SeamldrService(node, take_over(spec, memory), nursery)
        service.locks.on_change = LockBoard(memory).show
        if incarnation > 1:
            service.take_over()
        node.say_hello(os.getpid())
        await service.serve()
        await node.say_goodbye({})
        nursery.cancel_scope.cancel()
