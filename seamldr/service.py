"""The seamldr process: the lock service and the SEAM side of the platform, on the bus.

It is judged by its own sequence of records: what it queues, grants and admits happens in the order in which it writes
it.
"""

from __future__ import annotations

import os
from collections import deque
from time import monotonic_ns

import msgspec
import trio

from bus.link import Delivery
from bus.messages import (
    LockAcquire,
    LockGrant,
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
from seamldr.leaves import leaf_name
from seamldr.lock_queue import NO_TOKEN, Grant, LockQueue, Request
from seamldr.seam import SeamSide
from seamldr.status import Fatal

SEAMLDR_LOCK = "seamldr_lock"
MAX_LOCKS = 64


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
        self.locks: dict[str, LockQueue] = {}
        self.resident: dict[int, Resident] = {}
        self.stopping = False
        self.inbox: deque[Delivery] = deque()
        self.moving = trio.Event()
        """Cleared while a fault makes this process stand still: then nobody leaves SEAM either."""
        self.moving.set()

    async def serve(self) -> None:
        """Take messages until told to stop."""
        node, inbox = self.node, self.inbox
        while not self.stopping:
            await node.endpoint.wait()
            inbox.extend(node.endpoint.drain_nowait())
            while inbox:
                self.handle(inbox.popleft())
                if node.points.due is not None:
                    self.moving = trio.Event()
                    inbox.extend(await node.stand_still())
                    self.moving.set()

    def handle(self, delivery: Delivery) -> None:
        """One message."""
        match delivery.body:
            case LockAcquire() as acquire:
                self._acquire(delivery, acquire)
            case LockRelease() as release:
                self._release(delivery, release)
            case Seamcall() as call:
                self._seamcall(delivery, call)
            case SeamcallEvent() as event:
                self._event(delivery, event)
            case Member(node=name, incarnation=incarnation, state=state):
                self.node.endpoint.member(name, incarnation, state)
                if state == "dead":
                    self._dead(name, incarnation)
            case Query():
                self.node.endpoint.send(LAUNCHER, Waits(self._held(), "", self.node.recorder.written))
            case Stop():
                self.stopping = True
            case body:
                if not self.node.handle_control(body):
                    self.node.emit("refused", reason="unexpected", head=type(body).__name__)

    # Locks

    def _queue(self, name: str) -> LockQueue | None:
        if name not in self.locks:
            if len(self.locks) >= MAX_LOCKS:
                self.node.emit("refused", reason="too many locks", head=name[:16])
                return None
            self.locks[name] = LockQueue(name, self.node.identity.incarnation, self.node.spec.lock_policy)
        return self.locks[name]

    def _acquire(self, delivery: Delivery, acquire: LockAcquire) -> None:
        queue, by = self._queue(acquire.lock), cpu_number(delivery.source.node)
        if queue is None or by is None:
            return
        source = delivery.source
        request = Request(source.node, source.incarnation, acquire.request, acquire.level, monotonic_ns())
        depth, level = queue.depth + 1, acquire.level
        self.node.emit("lock_queue", lock=queue.name, by=by, request=acquire.request, level=level, depth=depth)
        self._granted(queue, queue.acquire(request))

    def _release(self, delivery: Delivery, release: LockRelease) -> None:
        queue, by = self._queue(release.lock), cpu_number(delivery.source.node)
        if queue is None or by is None:
            return
        epoch, number = release.epoch, release.number
        was_holder, grant = queue.release((epoch, number))
        stale = int(not was_holder)
        self.node.emit("lock_release", lock=queue.name, by=by, epoch=epoch, number=number, stale=stale)
        self._granted(queue, grant)

    def _granted(self, queue: LockQueue, grant: Grant | None) -> None:
        if grant is None:
            return
        request, (epoch, number) = grant.request, grant.token
        self.node.emit(
            "lock_grant",
            lock=queue.name,
            to=cpu_number(request.node),
            request=request.request,
            epoch=epoch,
            number=number,
            waited_ns=monotonic_ns() - request.since_ns,
            holders=1,
        )
        self.node.endpoint.send(request.node, LockGrant(queue.name, request.request, epoch, number))

    def _held(self) -> str:
        held = [f"{q.name} is held by {q.holder.request.node}" for q in self.locks.values() if q.holder]
        inside = self.seam.inside
        return "; ".join(held + ([f"CPU {inside} is in P-SEAMLDR"] if inside is not None else [])) or "nothing"

    def _dead(self, name: str, incarnation: int) -> None:
        number = cpu_number(name)
        if number is None:
            return
        for queue in self.locks.values():
            gone, grant = queue.dead(name, incarnation)
            for request in gone:
                self.node.emit("lock_withdraw", lock=queue.name, by=number, request=request.request)
            self._granted(queue, grant)
        resident = self.resident.pop(number, None)
        if resident is not None:
            resident.scope.cancel()
        if self.seam.leave_dead(number):
            self.node.emit("seam_dead", by=number, why="the CPU died inside SEAM")

    # SEAM

    def _seamcall(self, delivery: Delivery, call: Seamcall) -> None:
        lp = cpu_number(delivery.source.node)
        if lp is None or lp >= self.node.spec.cpus or lp in self.resident:
            self.node.emit("refused", reason="seamcall", head=delivery.source.node)
            return
        rax = call.rax
        entry = self.seam.enter(lp, rax, call.registers)
        admitted = entry.admission is Admission.ADMITTED
        if rax >> 63 or not (admitted and entry.guest):
            self._record_enter(lp, call, entry.admission)
        if not admitted:
            self.node.endpoint.send(delivery.source.node, Seamret(call.call, False, rax, call.registers))
            return
        if entry.guest and self.node.points.any:
            self.node.points.see("*td", {"by": lp})
        resident = Resident(delivery, call, lp, entry.guest, trio.CancelScope())
        if rax >> 63 or entry.guest:
            self.resident[lp] = resident
            self.nursery.start_soon(self._reside, resident)
        else:
            self._leave(resident)

    def _record_enter(self, lp: int, call: Seamcall, admission: Admission) -> None:
        queue = self.locks.get(SEAMLDR_LOCK)
        holder = queue.token if queue else NO_TOKEN
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
        if self.resident.pop(resident.lp, None) is resident:
            self._leave(resident)

    def _event(self, delivery: Delivery, event: SeamcallEvent) -> None:
        resident = self.resident.get(cpu_number(delivery.source.node) or 0)
        if resident is not None and resident.guest and resident.call.call == event.call:
            resident.nmi = event.nmi
            resident.scope.cancel()

    def _leave(self, resident: Resident) -> None:
        lp, call = resident.lp, resident.call
        interrupted = resident.guest and resident.scope.cancel_called
        try:
            rax, registers = self.seam.leave(lp, interrupted=interrupted, nmi=resident.nmi)
        except Fatal as error:
            self.node.emit("seam_dead", by=lp, why=f"fatal error in SEAM: {error}")
            rax, registers = call.rax, call.registers
            self.node.endpoint.send(resident.delivery.source.node, Seamret(call.call, False, rax, call.registers))
            return
        if call.rax >> 63 or not resident.guest:
            inside = int(self.seam.inside is not None)
            self.node.emit(
                "seam_return", by=lp, leaf=call.rax, name=leaf_name(call.rax), status=rax, inside=inside
            )
        self.node.endpoint.send(
            resident.delivery.source.node,
            Seamret(call.call, True, rax, registers),  # type: ignore[arg-type]
        )


def main(spec: MachineSpec, node: str, incarnation: int) -> None:
    """The seamldr process."""
    trio.run(_main, spec, node, incarnation)


async def _main(spec: MachineSpec, name: str, incarnation: int) -> None:
    async with until_terminated(), join(spec, name, incarnation) as node, trio.open_nursery() as nursery:
        service = SeamldrService(node, take_over(spec, shared_memory(spec)), nursery)
        node.say_hello(os.getpid())
        await service.serve()
        await node.say_goodbye({})
        nursery.cancel_scope.cancel()
