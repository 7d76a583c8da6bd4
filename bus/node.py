"""One process of a machine, joined to it: records, clock, endpoint, memory, and how it comes and goes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from bus.clock import LamportClock
from bus.endpoint import CONNECTIONS, Endpoint, open_endpoint
from bus.link import Identity
from bus.memory import PhysicalMemory
from bus.messages import Hello, Stopped
from bus.records import Recorder, open_records
from bus.spec import KVM, LAUNCHER, SEAMLDR, MachineSpec

HEAD = 16
"""Bytes of a refused frame that its record shows."""


class Node:
    """What a process of the machine has; made by `join`."""

    def __init__(
        self, spec: MachineSpec, identity: Identity, clock: LamportClock, recorder: Recorder, endpoint: Endpoint
    ) -> None:
        self.spec = spec
        self.identity = identity
        self.clock = clock
        self.recorder = recorder
        self.endpoint = endpoint
        self.emit = recorder.emit

    def say_hello(self, pid: int) -> None:
        """Tell the launcher that this process is online."""
        self.endpoint.send(LAUNCHER, Hello(pid))

    async def say_goodbye(self, totals: dict[str, int]) -> None:
        """Tell the launcher that this process has come to its end in good order, and wait until it has heard.

        What went to others is not waited for: they leave at the same time. To its own totals the process adds how
        often its links had to repeat, and how often they saw repeated or reordered, frames.
        """
        counts = self.endpoint.statistics()
        links = {"resent": counts.resent, "duplicates": counts.duplicates, "reordered": counts.reordered}
        self.endpoint.send(LAUNCHER, Stopped(totals | links))
        await self.endpoint.flush([LAUNCHER])


@contextlib.asynccontextmanager
async def join(spec: MachineSpec, node: str, incarnation: int) -> AsyncIterator[Node]:
    """Open records and endpoint; every other process of the machine is known, in its first incarnation or as the spec
    says.
    """
    clock = LamportClock()
    recorder = open_records(Path(spec.run_dir, "records", f"{node}.jsonl"), node, clock, spec.trace)
    identity = Identity(node, incarnation)

    def on_refused(reason: str, head: bytes) -> None:
        recorder.emit("refused", reason=reason, head=head[:HEAD].hex())

    connections = len(spec.nodes()) + 1 if node in (LAUNCHER, SEAMLDR, KVM) else CONNECTIONS
    async with open_endpoint(identity, spec.socket_dir, spec.key, clock, on_refused, connections) as endpoint:
        endpoint.expect([LAUNCHER, *spec.nodes()])
        for member in spec.members:
            endpoint.member(member.node, member.incarnation, "online" if member.alive else "dead")
        try:
            yield Node(spec, identity, clock, recorder, endpoint)
        finally:
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
