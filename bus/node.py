"""One process of a machine, joined to it: records, clock, endpoint, memory, and how it comes and goes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import trio

from bus.admission import Admission
from bus.clock import LamportClock
from bus.endpoint import CONNECTIONS, Endpoint, open_endpoint
from bus.link import Delivery, Identity
from bus.memory import PhysicalMemory
from bus.messages import ArmFault, Body, FaultReached, Hello, Proceed, SetLinkFaults, Stopped
from bus.points import FaultPoints
from bus.records import Recorder, open_records
from bus.refusals import Refusals
from bus.spec import KVM, LAUNCHER, SEAMLDR, MachineSpec, cpu_number

HEAD = 16
"""Bytes of a refused frame that its record shows."""

LINK_TOTALS = ("resent", "duplicates", "reordered", "dropped", "duplicated", "delayed")
"""What a process that ends tells the launcher of its `Statistics`."""


class Node:
    """What a process of the machine has; made by `join`."""

    def __init__(
        self,
        spec: MachineSpec,
        identity: Identity,
        clock: LamportClock,
        recorder: Recorder,
        endpoint: Endpoint,
        refusals: Refusals,
    ) -> None:
        self.spec = spec
        self.identity = identity
        self.clock = clock
        self.recorder = recorder
        self.endpoint = endpoint
        self.emit = recorder.emit
        self.refuse = refusals.add
        number = cpu_number(identity.node)
        self.points = FaultPoints(-1 if number is None else number)
        self._stands_at = 0

    def handle_control(self, body: Body) -> bool:
        """Take a message that is the same for every process of the machine; False if it is none of these."""
        match body:
            case ArmFault(fault=fault, point=point, nth=nth, cpu=cpu):
                if not self.points.arm(fault, point, nth, cpu):
                    self.refuse("point", point[:HEAD])
            case Proceed(fault=fault):
                self.points.disarm(fault)
                if fault == self._stands_at:
                    self._stands_at = 0
            case SetLinkFaults(rules=rules, seed=seed):
                self.endpoint.set_link_faults(rules, seed)
                self.emit("link_fault", rules=[msgspec.to_builtins(rule) for rule in rules], seed=seed)
            case _:
                return False
        self.recorder.watcher = self.points.see if self.points.any else None
        return True

    async def stand_still(self) -> list[Delivery]:
        """At the point of a fault: tell the launcher, and do nothing until it says to proceed.

        What arrives meanwhile is returned, to be handled then.
        """
        reached = self.points.due
        assert reached is not None
        self._stands_at = reached.fault
        self.endpoint.send(LAUNCHER, FaultReached(reached.fault, reached.cpu))
        late: list[Delivery] = []
        while self._stands_at:
            await self.endpoint.wait()
            late += [one for one in self.endpoint.drain_nowait() if not self.handle_control(one.body)]
        self.points.due = None
        return late

    def say_hello(self, pid: int) -> None:
        """Tell the launcher that this process is online."""
        self.endpoint.send(LAUNCHER, Hello(pid))

    async def say_goodbye(self, totals: dict[str, int]) -> None:
        """Tell the launcher that this process has come to its end in good order, and wait until it has heard.

        What went to others is not waited for: they leave at the same time. To its own totals the process adds what
        became of the frames on its links.
        """
        counts = self.endpoint.statistics()
        if counts.dropped or counts.duplicated or counts.delayed:
            self.emit(
                "link_totals",
                sent=counts.sent,
                dropped=counts.dropped,
                duplicated=counts.duplicated,
                delayed=counts.delayed,
                resent=counts.resent,
            )
        links = {name: getattr(counts, name) for name in LINK_TOTALS}
        self.endpoint.send(LAUNCHER, Stopped(totals | links))
        await self.endpoint.flush([LAUNCHER])


@contextlib.asynccontextmanager
async def join(spec: MachineSpec, node: str, incarnation: int) -> AsyncIterator[Node]:
    """Open records and endpoint; every other process of the machine is known, in its first incarnation or as the spec
    says.
    """
    clock = LamportClock()
    clock.merge(spec.clock)
    recorder = open_records(Path(spec.run_dir, "records", f"{node}.jsonl"), node, clock, spec.trace)
    identity = Identity(node, incarnation)

    refusals = Refusals(recorder.emit)

    def on_refused(reason: str, head: bytes) -> None:
        refusals.add(reason, head[:HEAD].hex())

    def on_backlog(to: str, waiting: int) -> None:
        recorder.emit("link_backlog", to=to, waiting=waiting)

    connections = len(spec.nodes()) + 1 if node in (LAUNCHER, SEAMLDR, KVM) else CONNECTIONS
    admission = Admission(spec, node)
    async with open_endpoint(
        identity, spec.socket_dir, spec.key, clock, on_refused, connections, admission
    ) as endpoint:
        endpoint.expect([LAUNCHER, *spec.nodes()])
        endpoint.on_backlog = on_backlog
        for member in spec.members:
            endpoint.member(member.node, member.incarnation, "online" if member.alive else "dead")
        try:
            yield Node(spec, identity, clock, recorder, endpoint, refusals)
        finally:
            refusals.conclude()
            recorder.close()


@contextlib.asynccontextmanager
async def until_terminated() -> AsyncIterator[None]:
    """Run the block until it ends or SIGTERM comes. SIGINT is the launcher's affair and ignored here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            yield
            nursery.cancel_scope.cancel()


def shared_memory(spec: MachineSpec) -> PhysicalMemory:
    """The machine's memory, mapped in this process."""
    return PhysicalMemory.attach(spec.memory_fd)
