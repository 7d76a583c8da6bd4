"""The lock service: queues behind the bus, asked anew by the CPUs when this process was started again.

Nothing is made durable for a grant. What is, in the SEAM range: a lease that ended, and a dead holder that keeps the
lock, because no live CPU would tell a successor of these.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns

import msgspec

from bus.link import Delivery, Identity
from bus.messages import LockAcquire, LockClaim, LockGrant, LockRelease
from bus.node import Node
from bus.spec import MachineSpec, cpu_number
from seamldr.lock_queue import NO_TOKEN, Grant, LockMemo, LockQueue, Request, Token
from seamldr.lock_recovery import Claim, LockRecovery
from seamldr.seam import LOCK
from seamldr.seam_store import SeamStore

SEAMLDR_LOCK = "seamldr_lock"
MAX_LOCKS = 64

Action = Callable[[], None]


def live_cpus(spec: MachineSpec) -> list[Identity]:
    """The CPUs that were alive when this process was forked."""
    known = {member.node: member for member in spec.members}
    return [
        Identity(node, known[node].incarnation if node in known else 1)
        for node in spec.cpu_nodes()
        if node not in known or known[node].alive
    ]


class LockService:
    """All locks of the machine. `inside` tells which CPU is in P-SEAMLDR: no lease of seamldr_lock ends for it."""

    def __init__(self, node: Node, store: SeamStore, inside: Callable[[], int | None]) -> None:
        self.node = node
        self.queues: dict[str, LockQueue] = {}
        self.recovery: LockRecovery | None = None
        """What the CPUs have claimed, until all have; then the locks go on."""
        self.on_change: Callable[[LockQueue, int | None], object] = lambda queue, waited_ns: None
        """Told of each change of a queue, and how long its holder had waited if that was just granted the lock."""
        self._store = store
        self._inside = inside
        self._policy: str = node.spec.knobs["lock_policy"]
        self._lease_ns = node.spec.knobs["lease_ms"] * 1_000_000
        self._paused = False
        self._late: list[Action] = []
        self._after: list[Action] = []

    # Requests and grants

    def acquire(self, source: Identity, acquire: LockAcquire) -> None:
        """A CPU asks for a lock; during a recovery it waits for the end of that."""
        if self.recovery is not None:
            self._late.append(lambda: self._acquire(source, acquire))
        else:
            self._acquire(source, acquire)

    def release(self, source: Identity, release: LockRelease) -> None:
        """A CPU gives a lock back; during a recovery this is done at the end of that."""
        if self.recovery is not None:
            self._late.append(lambda: self._release(source, release))
        else:
            self._release(source, release)

    def dead(self, process: Identity) -> None:
        """A process has died; one that was asked for its claims has none any more."""
        if self.recovery is None:
            self._dead(process)
            return
        self._late.append(lambda: self._dead(process))
        self.answered(process)

    def token(self, lock: str) -> Token:
        """The token of the holder of a lock, NO_TOKEN if nobody holds it."""
        return self.queues[lock].token if lock in self.queues else NO_TOKEN

    def _queue(self, name: str) -> LockQueue | None:
        if name not in self.queues:
            if len(self.queues) >= MAX_LOCKS:
                self.node.refuse("too many locks", name[:16])
                return None
            kept = self._store.records().get(f"{LOCK}:{name}")
            memo = msgspec.msgpack.decode(kept, type=LockMemo) if kept else None
            epoch = self.node.identity.incarnation
            self.queues[name] = LockQueue(name, epoch, self._policy, memo=memo, paused=self._paused)
        return self.queues[name]

    def _acquire(self, source: Identity, acquire: LockAcquire) -> None:
        queue, by = self._queue(acquire.lock), cpu_number(source.node)
        if queue is None or by is None:
            return
        request = Request(source.node, source.incarnation, acquire.request, acquire.level, monotonic_ns())
        self._queued(queue, request, queue.depth + 1)
        self._granted(queue, queue.acquire(request))

    def _queued(self, queue: LockQueue, request: Request, depth: int) -> None:
        by, number, level = cpu_number(request.node), request.request, request.level
        self.node.emit("lock_queue", lock=queue.name, by=by, request=number, level=level, depth=depth)

    def _release(self, source: Identity, release: LockRelease) -> None:
        queue, by = self._queue(release.lock), cpu_number(source.node)
        if queue is None or by is None:
            return
        epoch, number = release.epoch, release.number
        was_holder, grant = queue.release((epoch, number), monotonic_ns())
        stale = int(not was_holder)
        self.node.emit("lock_release", lock=queue.name, by=by, epoch=epoch, number=number, stale=stale)
        self._granted(queue, grant)

    def _granted(self, queue: LockQueue, grant: Grant | None) -> None:
        if grant is None:
            self.on_change(queue, None)
            return
        request, (epoch, number) = grant.request, grant.token
        waited_ns = monotonic_ns() - request.since_ns
        self.on_change(queue, waited_ns)
        self.node.emit(
            "lock_grant",
            lock=queue.name,
            to=cpu_number(request.node),
            request=request.request,
            epoch=epoch,
            number=number,
            waited_ns=waited_ns,
            holders=1,
        )
        self.node.endpoint.send(request.node, LockGrant(queue.name, request.request, epoch, number))

    def _dead(self, process: Identity) -> None:
        by = cpu_number(process.node)
        for queue in self.queues.values():
            gone, grant = queue.dead(process.node, process.incarnation, monotonic_ns())
            for request in gone:
                self.node.emit("lock_withdraw", lock=queue.name, by=by, request=request.request)
            holder = queue.holder
            if holder is not None and holder.request.of(process.node, process.incarnation):
                request_number, (epoch, number) = holder.request.request, holder.token
                self.node.emit(
                    "lock_hang", lock=queue.name, by=by, request=request_number, epoch=epoch, number=number
                )
                self._keep_memo(queue)
            self._granted(queue, grant)

    def _keep_memo(self, queue: LockQueue) -> None:
        """Make durable what no live CPU would tell a successor of this process."""
        self._store.commit({f"{LOCK}:{queue.name}": msgspec.msgpack.encode(queue.memo)})

    # Leases

    def lease_end(self) -> int | None:
        """When, by the monotonic clock in ns, the next lease ends."""
        if self._policy != "lease" or self.recovery is not None:
            return None
        ends = (queue.lease_end(self._lease_ns) for queue in self.queues.values() if not self._is_inside(queue))
        return min((end for end in ends if end is not None), default=None)

    def _is_inside(self, queue: LockQueue) -> bool:
        holder = queue.holder
        return holder is not None and queue.name == SEAMLDR_LOCK and cpu_number(holder.request.node) == self._inside()

    def end_leases(self) -> None:
        """Take locks from those who keep them too long while somebody waits."""
        while (end := self.lease_end()) is not None and end <= (now := monotonic_ns()):
            queue = next(
                queue
                for queue in self.queues.values()
                if queue.lease_end(self._lease_ns) == end and not self._is_inside(queue)
            )
            self._end_lease(queue, now)

    def _end_lease(self, queue: LockQueue, now: int) -> None:
        held_ns = now - queue.granted_ns
        lost, grant = queue.expire(now)
        self.node.emit(
            "lock_expire",
            lock=queue.name,
            by=cpu_number(lost.request.node),
            request=lost.request.request,
            epoch=lost.token[0],
            number=lost.token[1],
            held_ns=held_ns,
        )
        self._keep_memo(queue)
        self._granted(queue, grant)

    def is_fenced(self, token: Token) -> bool:
        """Whether a SEAMCALL under this token of seamldr_lock comes after the end of its lease."""
        return self._policy == "lease" and token not in (NO_TOKEN, self.token(SEAMLDR_LOCK))

    # Starting again

    def recover(self, asked: list[Identity]) -> None:
        """Grant nothing until these CPUs have claimed what they hold and wait for."""
        self._paused = True
        self.recovery = LockRecovery((cpu.node, cpu.incarnation) for cpu in asked)
        for name in self._store.records():
            kind, _, lock = name.partition(":")
            queue = self._queue(lock) if kind == LOCK else None
            if queue is not None:
                self._restored(queue)
        self._end_recovery()

    def claim(self, delivery: Delivery, claim: LockClaim) -> None:
        """A CPU holds a lock, or waits for it."""
        source, by = delivery.source, cpu_number(delivery.source.node)
        request = Request(source.node, source.incarnation, claim.request, claim.level, monotonic_ns())
        token = (claim.epoch, claim.number)
        if (
            self.recovery is None
            or claim.epoch >= self.node.identity.incarnation
            or not self.recovery.claim(claim.lock, Claim(request, claim.clock, token))
        ):
            self.node.refuse("claim", source.node)
            return
        self.node.emit(
            "lock_claim",
            lock=claim.lock,
            by=by,
            request=claim.request,
            level=claim.level,
            asked=claim.clock,
            epoch=claim.epoch,
            number=claim.number,
        )

    def answered(self, cpu: Identity) -> None:
        """A CPU has claimed everything."""
        if self.recovery is not None:
            self.recovery.answered(cpu.node, cpu.incarnation)
            self._end_recovery()

    def after_recovery(self, action: Action) -> None:
        """Do it now, or as soon as the holders are known."""
        if self.recovery is not None:
            self._after.append(action)
        else:
            action()

    def _end_recovery(self) -> None:
        """Restore holders and waiters, do what came meanwhile in its order, then grant."""
        recovery = self.recovery
        if recovery is None or not recovery.complete:
            return
        for lock in recovery.claims:
            queue = self._queue(lock)
            if queue is not None:
                self._restore(queue, recovery)
        self.recovery = None
        _run(self._late)
        self._paused = False
        self.node.emit("lock_recovered", locks=sorted(self.queues))
        for queue in list(self.queues.values()):
            self._granted(queue, queue.resume(monotonic_ns()))
        _run(self._after)

    def _restore(self, queue: LockQueue, recovery: LockRecovery) -> None:
        waiting, hung = recovery.waiting(queue.name), queue.holder is not None
        queue.restore(recovery.holder(queue.name, queue.memo), waiting)
        if not hung:
            self._restored(queue)
        for place, one in enumerate(waiting, start=1 + (queue.holder is not None)):
            self._queued(queue, one, place)

    def _restored(self, queue: LockQueue) -> None:
        if queue.holder is not None:
            request, (epoch, number) = queue.holder.request, queue.holder.token
            to = cpu_number(request.node)
            self.node.emit(
                "lock_restore", lock=queue.name, to=to, request=request.request, epoch=epoch, number=number
            )


def _run(actions: list[Action]) -> None:
    while actions:
        actions.pop(0)()
