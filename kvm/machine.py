"""A live machine: N CPU processes, the seamldr process and the KVM process on one bus, started, watched and ended.

    async with Machine(Topology(cpus=4, vcpus=8)) as machine:
        await machine.run_workload()
    judgement = machine.check()

Inside the block every process is online; after it none is left, nor a socket file, nor the memory, however the block
ended.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic
from types import TracebackType

import msgspec
import trio

from bus.judge import Judgement, judge
from bus.link import Delivery
from bus.memory import PhysicalMemory
from bus.messages import Finished, Hello, Member, Progress, Query, Start, Stop, Stopped, Waits
from bus.node import Node, join
from bus.spec import KVM, LAUNCHER, SEAMLDR, MachineSpec
from cpu.layout import memory_size
from kvm.processes import Parent, Process, close_pidfd
from kvm.topology import Topology, machine_spec

ONLINE_S = 60.0
"""Deadline for all processes to be online, plus what `ONLINE_PER_CPU_S` adds."""
ONLINE_PER_CPU_S = 0.1
STOP_S = 5.0
"""How long a process may take to bring its work to an end when asked, plus `STOP_PER_CPU_S` for each CPU."""
STOP_PER_CPU_S = 0.1
TERMINATE_S = 2.0
ANSWER_S = 1.0
"""How long a process has to say what it waits for."""
STUCK_LOOK_S = 0.25


class MachineError(RuntimeError):
    """The machine could not be started, or broke; the message is one line for the user."""


class Machine:
    """One live machine. `on_progress` is called with counts while the workload runs."""

    def __init__(self, topology: Topology, on_progress: Callable[[dict[str, int]], None] | None = None) -> None:
        self.topology = topology
        self.on_progress = on_progress
        self.processes: dict[str, Process] = {}
        self.facts: dict[str, int] = {}
        self.finished = trio.Event()
        self.online_seconds = 0.0
        self.run_seconds = 0.0
        self.killed = 0
        self._waits: dict[str, Waits] = {}
        self._hellos: set[str] = set()
        self._broken: str | None = None
        self._ended = False
        self._life = self._live()
        self._moved = trio.Event()

    # Up and down

    async def __aenter__(self) -> Machine:
        """Start every process and wait until all are online; raises `MachineError`."""
        await self._life.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """End every process, in order if the workload came to its end, and leave nothing behind."""
        if not self._ended:
            self._end("" if error is None else f"ended by {type(error).__name__}")
        return await self._life.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            yield

    async def _start(self, stack: AsyncExitStack) -> None:
        began = monotonic()
        self.run_dir = self.topology.make_run_dir()
        socket_dir = tempfile.mkdtemp(prefix="seam-", dir="/tmp")
        stack.callback(shutil.rmtree, socket_dir, ignore_errors=True)
        memory = PhysicalMemory.create(memory_size(self.topology.cpus))
        stack.callback(memory.close)
        assert memory.fd is not None
        self.memory = memory
        self._parent = Parent(socket_dir, memory.fd, self.run_dir / "stderr.txt")
        stack.push_async_callback(self._parent.close)
        key = secrets.token_bytes(16)
        self.spec = machine_spec(self.topology, self.run_dir, socket_dir, key, memory.fd)
        self.node = await stack.enter_async_context(join(self.spec, LAUNCHER, 1))
        nursery = await stack.enter_async_context(_background())
        self._nursery = nursery
        self._describe()
        nursery.start_soon(self._receive)
        nursery.start_soon(self._hear_parent)
        stack.push_async_callback(self._stop_all)
        for node in self.spec.nodes():
            await self._parent.spawn(self.spec, _role(node), node, 1)
        await self._all_online()
        self.online_seconds = monotonic() - began
        for node in self.spec.nodes():
            self.node.endpoint.send(node, Start())

    def _describe(self) -> None:
        spec = self.spec
        topology = msgspec.structs.asdict(self.topology) | {"run_dir": str(self.run_dir)}
        (self.run_dir / "topology.json").write_bytes(msgspec.json.format(msgspec.json.encode(topology), indent=2))
        self.node.emit(
            "machine_begin",
            strategy=self.topology.strategy,
            knobs=spec.knobs,
            seed=spec.seed,
            cpus=spec.cpus,
            vcpus=spec.vcpus,
            tds=spec.tds,
            updates=spec.workload.updates,
        )
        self.node.emit("process_online", name=LAUNCHER, incarnation=1)

    async def _all_online(self) -> None:
        with trio.move_on_after(ONLINE_S + ONLINE_PER_CPU_S * self.spec.cpus):
            while not self._broken and not self._is_online():
                await self._moved.wait()
        if self._broken:
            raise MachineError(self._broken)
        if not self._is_online():
            late = [n for n in self.spec.nodes() if n not in self.processes or not self.processes[n].online.is_set()]
            raise MachineError(f"{len(late)} of {len(self.spec.nodes())} processes did not come online: {late[0]}, ...")

    def _is_online(self) -> bool:
        started = self.processes.values()
        return len(self.processes) == len(self.spec.nodes()) and all(p.online.is_set() for p in started)

    def _progressed(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    # What arrives

    async def _receive(self) -> None:
        endpoint = self.node.endpoint
        while True:
            await endpoint.wait()
            self._drain()

    def _drain(self) -> None:
        for delivery in self.node.endpoint.drain_nowait():
            self._handle(delivery)

    def _handle(self, delivery: Delivery) -> None:
        name = delivery.source.node
        process = self.processes.get(name)
        match delivery.body:
            case Hello():
                self._hellos.add(name)
                self._met(name)
            case Progress(facts=facts):
                self._progress(facts)
            case Finished():
                self.finished.set()
            case Stopped() if process is not None:
                process.stopped.set()
            case Waits() as waits:
                self._waits[name] = waits
            case body:
                self.node.emit("refused", reason="unexpected", head=type(body).__name__)

    def _met(self, name: str) -> None:
        """A process is online once it said hello and the parent told of it, in whichever order."""
        process = self.processes.get(name)
        if process is not None and name in self._hellos and not process.online.is_set():
            self.node.emit("process_online", name=name, incarnation=process.incarnation)
            process.online.set()
            self._progressed()

    def _progress(self, facts: dict[str, int]) -> None:
        if facts != self.facts:
            self.facts = facts
            self._last_progress = monotonic()
        if self.on_progress is not None:
            self.on_progress(facts)

    async def _hear_parent(self) -> None:
        while True:
            answer = await self._parent.receive()
            if answer is None:
                self._break("the parent of the machine's processes is gone")
                return
            if isinstance(answer, Process):
                self.processes[answer.node] = answer
                self._met(answer.node)
                self._nursery.start_soon(self._watch, answer)
            else:
                self._parent.exits[answer.pid] = answer.status
                self._progressed()

    async def _watch(self, process: Process) -> None:
        """A process is dead if and only if its pidfd fires."""
        await trio.lowlevel.wait_readable(process.pidfd)
        self._drain()
        process.gone.set()
        close_pidfd(process)
        for name in self.spec.nodes():
            other = self.processes.get(name)
            if other is not None and other is not process and not other.gone.is_set():
                self.node.endpoint.send(name, Member(process.node, process.incarnation, "dead"))
        self.node.endpoint.member(process.node, process.incarnation, "dead")
        while process.pid not in self._parent.exits and not self._broken:
            await self._moved.wait()
        process.status = self._parent.exits.get(process.pid, 0)
        wanted = process.wanted
        self.node.emit("process_exit", name=process.node, status=process.status, wanted=int(wanted))
        if not wanted:
            self._break(f"process {process.node} ended by itself with status {process.status}; see {self._log()}")
        self._progressed()

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
        self._progressed()

    def _log(self) -> str:
        return str(self.run_dir / "stderr.txt")

    # The workload

    async def run_workload(self) -> bool:
        """Let user space run to its end; False if the machine got stuck or broke."""
        began = self._last_progress = monotonic()
        workload = self.spec.workload
        planned = began + workload.duration_ns / 1e9
        while not self.finished.is_set() and not self._broken:
            with trio.move_on_after(STUCK_LOOK_S):
                await self.finished.wait()
            quiet = monotonic() - max(self._last_progress, planned)
            if quiet > workload.grace_ns / 1e9 and not self.finished.is_set():
                self._break(f"nothing has moved for {workload.grace_ns / 1e9:.0f} s after the planned end")
        self.run_seconds = monotonic() - began
        if self._broken:
            await self._ask_all()
        self._end(self._broken or "")
        return self._broken is None

    def _end(self, why: str) -> None:
        self._ended = True
        self.node.emit("machine_end", finished=int(not why and self.finished.is_set()), why=why)

    async def _ask_all(self) -> None:
        """What does each process wait for?"""
        alive = [p.node for p in self.processes.values() if not p.gone.is_set()]
        for name in alive:
            self.node.endpoint.send(name, Query())
        with trio.move_on_after(ANSWER_S):
            while len(self._waits) < len(alive):
                await trio.sleep(0.02)
        for name in alive:
            waits = self._waits.get(name, Waits("does not answer", "", 0))
            if waits.what:
                self.node.emit(
                    "process_waits", name=name, what=waits.what, on=waits.on, operations=waits.operations
                )

    # Ending

    async def _stop_all(self) -> None:
        """CPUs first, since they need the others to come down; then the KVM and the seamldr process."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for name in self.spec.cpu_nodes():
                    if name in self.processes:
                        nursery.start_soon(self._stop, self.processes[name])
            for name in (KVM, SEAMLDR):
                if name in self.processes:
                    await self._stop(self.processes[name])

    async def _stop(self, process: Process) -> None:
        """Message, deadline, SIGTERM, deadline, SIGKILL; each step taken is a record."""
        process.wanted = True
        patience = STOP_S + STOP_PER_CPU_S * self.spec.cpus
        if self._broken:
            patience = TERMINATE_S
        if process.online.is_set() and not process.gone.is_set():
            self.node.endpoint.send(process.node, Stop())
            if await _within(patience, process.gone):
                return
        for number, deadline in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, STOP_S)):
            if process.gone.is_set():
                return
            self.node.emit("process_end_step", name=process.node, step=signal.Signals(number).name)
            process.signal(number)
            self.killed += number == signal.SIGKILL
            if await _within(deadline, process.gone):
                return

    # Afterwards

    def check(self) -> Judgement:
        """Judge the records of this run."""
        return judge(self.run_dir)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the CPUs."""
        return {name: process.pid for name, process in self.processes.items() if name.startswith("cpu")}


async def _within(seconds: float, event: trio.Event) -> bool:
    with trio.move_on_after(seconds):
        await event.wait()
    return event.is_set()


@asynccontextmanager
async def _background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks end with the block."""
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


def _role(node: str) -> str:
    return "cpu" if node.startswith("cpu") else node


