"""The lock service and the SEAM side as plain calls, for a machine that is stepped in one process."""

from __future__ import annotations

from cpu.core import SeamReply, SeamTrap
from cpu.stepped import SteppedMachine
from seamldr.gate import Admission
from seamldr.leaves import leaf_name
from seamldr.lock_queue import NO_TOKEN, Grant, LockQueue, Request
from seamldr.seam import SeamSide


class SteppedArbiter:
    """Serves a `SteppedMachine`; its records name the node "seamldr", as in the live machine."""

    def __init__(self, machine: SteppedMachine, seam: SeamSide) -> None:
        self.machine = machine
        self.seam = seam
        self.locks: dict[str, LockQueue] = {}
        self._calls: dict[int, int] = {}
        self._policy = str(machine.cpus[0].kernel.knobs.get("lock_policy", "release"))
        machine.arbiter = self

    def _emit(self, event: str, cpu: int, **fields: object) -> None:
        machine = self.machine
        clock = machine.cpus[cpu].clock
        head = {"ts": machine.steps, "clock": clock.tick(), "node": "seamldr", "pid": 0}
        machine.records.append(head | {"seq": len(machine.records) + 1, "event": event} | fields)

    def lock_acquire(self, cpu: int, lock: str, level: int, request: int) -> None:
        """Queue a request."""
        queue = self.locks.setdefault(lock, LockQueue(lock, 1, self._policy))
        wanted = Request(f"cpu{cpu}", 1, request, level, self.machine.steps)
        self._emit("lock_queue", cpu, lock=lock, by=cpu, request=request, level=level, depth=queue.depth + 1)
        self._granted(queue, queue.acquire(wanted), cpu)

    def lock_release(self, cpu: int, lock: str, epoch: int, number: int) -> None:
        """Take a lock back."""
        queue = self.locks[lock]
        was_holder, grant = queue.release((epoch, number))
        stale = int(not was_holder)
        self._emit("lock_release", cpu, lock=lock, by=cpu, epoch=epoch, number=number, stale=stale)
        self._granted(queue, grant, cpu)

    def dead(self, cpu: int, cause: int) -> None:
        """The process of a CPU has died; the record that follows is one of after `cause`, a live CPU."""
        for queue in self.locks.values():
            gone, grant = queue.dead(f"cpu{cpu}", 1)
            for request in gone:
                self._emit("lock_withdraw", cause, lock=queue.name, by=cpu, request=request.request)
            self._granted(queue, grant, cause)
        if self.seam.leave_dead(cpu):
            self._emit("seam_dead", cause, by=cpu, why="the CPU died inside SEAM")

    def _granted(self, queue: LockQueue, grant: Grant | None, cause: int) -> None:
        if grant is None:
            return
        machine, request = self.machine, grant.request
        target = int(request.node.removeprefix("cpu"))
        epoch, number = grant.token
        waited = machine.steps - request.since_ns
        self._emit(
            "lock_grant", cause, lock=queue.name, to=target, request=request.request, epoch=epoch, number=number,
            waited_ns=waited, holders=1,
        )  # fmt: skip
        machine.cpus[target].clock.merge(machine.cpus[cause].clock.now)
        machine.cpus[target].lock_granted(request.request, epoch, number)
        machine.asleep.discard(target)

    def seam_enter(self, cpu: int, request: SeamTrap) -> SeamReply | None:
        """SEAMCALL; None if admitted."""
        seam, rax = self.seam, request.rax
        inside = seam.inside is not None
        entry = seam.enter(cpu, rax, request.registers)
        admitted = entry.admission is Admission.ADMITTED
        alive = entry.admission in (Admission.ADMITTED, Admission.MUTEX_HELD)
        token = self.machine.cpus[cpu].tokens.get("seamldr_lock", NO_TOKEN)
        holder = self.locks["seamldr_lock"].token if "seamldr_lock" in self.locks else NO_TOKEN
        self._emit(
            "seam_enter", cpu, by=cpu, leaf=rax, name=leaf_name(rax), admitted=int(admitted), alive=int(alive),
            inside=int(inside) + (admitted and bool(rax >> 63)), epoch=token[0], number=token[1],
            holder_epoch=holder[0], holder_number=holder[1],
        )  # fmt: skip
        if not admitted:
            return SeamReply(False, rax, request.registers)
        self._calls[cpu] = rax
        return None

    def seam_leave(self, cpu: int) -> SeamReply:
        """SEAMRET."""
        rax, registers = self.seam.leave(cpu)
        leaf = self._calls.pop(cpu)
        inside = int(self.seam.inside is not None)
        self._emit("seam_return", cpu, by=cpu, leaf=leaf, name=leaf_name(leaf), status=rax, inside=inside)
        return SeamReply(True, rax, registers)


