"""A live machine: N CPU processes, the seamldr process and the KVM process on one bus, started, watched and ended.

    async with Machine(Topology(cpus=4, vcpus=8)) as machine:
        await machine.run_workload()
    judgement = machine.check()

Inside the block every process is online; after it none is left, nor a socket file, nor the memory, however the block
ended.
"""

from __future__ import annotations

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
from bus.spec import KVM, LAUNCHER, SEAMLDR
from cpu.forkserver import Exited, NotSpawned, Spawned
from cpu.layout import memory_size
from kvm.processes import Parent, Process, enough_files
from kvm.topology import Topology, machine_spec

ONLINE_S = 60.0
"""Deadline for all processes to be online, plus what `ONLINE_PER_CPU_S` adds."""
ONLINE_PER_CPU_S = 0.1
STOP_S = 5.0
"""How long a process may take to bring its work to an end when asked, plus `STOP_PER_CPU_S` for each CPU."""
STOP_PER_CPU_S = 0.1
TERMINATE_S = 2.0
ANSWER_S = 1.0
"""How long the processes have to say what they wait for, plus `ANSWER_PER_CPU_S` for each CPU."""
ANSWER_PER_CPU_S = 0.01
STUCK_LOOK_S = 0.25
LOG_TAIL = 4096
"""Bytes at the end of the log among which the reason of an unexpected end is looked for."""

PARENT_GONE = "the parent of the machine's processes has died, and they with it"


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
        self._online = self._expected = 0
        self._waits: dict[str, Waits] = {}
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
            self._end("the workload was not run" if error is None else f"ended by {type(error).__name__}")
        return await self._life.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            yield

    async def _start(self, stack: AsyncExitStack) -> None:
        began = monotonic()
        if not stack.enter_context(enough_files(self.topology.cpus + 2)):
            raise MachineError(f"{self.topology.cpus} CPUs need more open files than `ulimit -Hn` allows")
        self.run_dir = self.topology.make_run_dir()
        socket_dir = tempfile.mkdtemp(prefix="seam-", dir="/tmp")
        stack.callback(shutil.rmtree, socket_dir, ignore_errors=True)
        memory = PhysicalMemory.create(memory_size(self.topology.cpus))
        stack.callback(memory.close)
        assert memory.fd is not None
        self.memory = memory
        self._parent = Parent(socket_dir, memory.fd, self._log)
        stack.push_async_callback(self._parent.close)
        key = secrets.token_bytes(16)
        self.spec = machine_spec(self.topology, self.run_dir, socket_dir, key, memory.fd)
        self.node: Node = await stack.enter_async_context(join(self.spec, LAUNCHER, 1))
        stack.callback(self._forget_all)
        self._nursery = await stack.enter_async_context(_background())
        self._describe()
        self._nursery.start_soon(self._receive)
        self._nursery.start_soon(self._hear_parent)
        stack.push_async_callback(self._stop_all)
        self.processes = {node: Process(node, 1) for node in self.spec.nodes()}
        try:
            await self._parent.begin(self.spec)
        except OSError:
            self._break(PARENT_GONE)
        # Firmware first: a CPU that comes up asks the TDX module to know it.
        await self._bring_up([SEAMLDR])
        await self._bring_up([KVM, *self.spec.cpu_nodes()])
        self.online_seconds = monotonic() - began
        self.node.endpoint.send(KVM, Start())

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

    async def _bring_up(self, nodes: list[str]) -> None:
        """Start these processes and wait until they are online; raises `MachineError`."""
        self._expected += len(nodes)
        try:
            for node in nodes:
                await self._parent.spawn(_role(node), node, self.processes[node].incarnation)
        except OSError:
            self._break(PARENT_GONE)
        with trio.move_on_after(ONLINE_S + ONLINE_PER_CPU_S * self.spec.cpus):
            while not self._broken and self._online < self._expected:
                await self._moved.wait()
        if self._broken:
            raise MachineError(self._broken)
        late = [node for node in nodes if not self.processes[node].online]
        if late:
            raise MachineError(f"{len(late)} of {len(nodes)} processes did not come online, {late[0]} among them")

    def _progressed(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    # What arrives

    async def _receive(self) -> None:
        endpoint = self.node.endpoint
        while True:
            await endpoint.wait()
            for delivery in endpoint.drain_nowait():
                self._handle(delivery)

    def _handle(self, delivery: Delivery) -> None:
        process = self.processes[delivery.source.node]
        match delivery.body:
            case Hello():
                process.hello = True
                self._came_online(process)
            case Progress(facts=facts):
                self._progress(facts)
            case Finished():
                self.finished.set()
            case Stopped(facts=totals):
                process.totals = totals
            case Waits() as waits:
                self._waits[process.node] = waits
                self._progressed()
            case body:
                self.node.emit("refused", reason="unexpected", head=type(body).__name__)

    def _came_online(self, process: Process) -> None:
        """A process counts when it said hello and its parent said which one it is, in whatever order."""
        if process.online:
            self.node.emit("process_online", name=process.node, incarnation=process.incarnation)
            self._online += 1
            if self._online == self._expected:
                self._progressed()

    def _progress(self, facts: dict[str, int]) -> None:
        if facts != self.facts:
            self.facts = facts
            self._last_progress = monotonic()
        if self.on_progress is not None:
            self.on_progress(facts)

    async def _hear_parent(self) -> None:
        while (heard := await self._parent.receive()) is not None:
            answer, pidfd = heard
            process = self.processes[answer.node]
            match answer:
                case Spawned(pid=pid) if pidfd >= 0:
                    process.bear(pid, pidfd)
                    self._nursery.start_soon(self._watch, process)
                    self._came_online(process)
                case Spawned():
                    self._break(f"process {process.node} cannot be watched: this process has too many open files")
                case NotSpawned(why=why):
                    self._break(f"process {process.node} cannot be forked: {why}")
                case Exited(status=status):
                    process.exit(status)
        self._break(PARENT_GONE)
        for process in self.processes.values():
            process.exit(-signal.SIGKILL)

    async def _watch(self, process: Process) -> None:
        """A process is dead if and only if its pidfd fires."""
        await trio.lowlevel.wait_readable(process.pidfd)
        process.forget()
        wanted = process.wanted
        if not wanted and self._parent.alive:
            self._publish_death(process)
        await process.exited.wait()
        self.node.emit("process_exit", name=process.node, status=process.status, wanted=int(wanted))
        process.gone.set()
        if not wanted:
            self._break(self._obituary(process) if self._parent.alive else PARENT_GONE)

    def _publish_death(self, process: Process) -> None:
        """To all that are left; not while the machine is taken down, or each of N would hear of N others."""
        self.node.endpoint.member(process.node, process.incarnation, "dead")
        for name, other in self.processes.items():
            if not other.gone.is_set():
                self.node.endpoint.send(name, Member(process.node, process.incarnation, "dead"))

    def _obituary(self, process: Process) -> str:
        if process.status < 0:
            return f"process {process.node} was killed by {signal.Signals(-process.status).name}"
        return f"process {process.node} ended by itself with status {process.status}{self._last_words(process.node)}"

    def _last_words(self, node: str) -> str:
        lines = self._log.read_bytes()[-LOG_TAIL:].decode(errors="replace").splitlines()
        words = [line.removeprefix(f"{node}: ") for line in lines if line.startswith(f"{node}: ")]
        return f": {words[-1]} (more in {self._log})" if words else ""

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
        self._progressed()

    @property
    def _log(self) -> Path:
        return self.run_dir / "stderr.txt"

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
                self._break(f"nothing has moved for {workload.grace_ns / 1e9:g} s after the planned end")
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
        asked = [process for process in self.processes.values() if not process.gone.is_set()]
        for process in asked:
            self.node.endpoint.send(process.node, Query())
        with trio.move_on_after(ANSWER_S + ANSWER_PER_CPU_S * self.spec.cpus):
            while any(not process.gone.is_set() and process.node not in self._waits for process in asked):
                await self._moved.wait()
        for process in asked:
            waits = self._waits.get(process.node, Waits("does not answer", "", 0))
            if waits.what and not process.gone.is_set():
                what, on, operations = waits.what, waits.on, waits.operations
                self.node.emit("process_waits", name=process.node, what=what, on=on, operations=operations)

    # Ending

    async def _stop_all(self) -> None:
        """CPUs first, since they need the others to come down; then the KVM and the seamldr process."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for name in self.spec.cpu_nodes():
                    nursery.start_soon(self._stop, self.processes[name])
            for name in (KVM, SEAMLDR):
                await self._stop(self.processes[name])

    async def _stop(self, process: Process) -> None:
        """Message, deadline, SIGTERM, deadline, SIGKILL; each step taken is a record."""
        process.wanted = True
        patience = STOP_S + STOP_PER_CPU_S * self.spec.cpus
        if self._broken:
            patience = TERMINATE_S
        if process.online:
            self.node.endpoint.send(process.node, Stop())
            if await _within(patience, process.gone):
                return
        for number, deadline in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, STOP_S)):
            if process.gone.is_set() or not process.born.is_set():
                return
            self.node.emit("process_end_step", name=process.node, step=signal.Signals(number).name)
            process.signal(number)
            self.killed += number == signal.SIGKILL
            if await _within(deadline, process.gone):
                return

    def _forget_all(self) -> None:
        for process in self.processes.values():
            process.forget()

    # Afterwards

    def check(self) -> Judgement:
        """Judge the records of this run."""
        return judge(self.run_dir)

    @property
    def parent_pid(self) -> int:
        """Process id of the parent that forked them all."""
        return self._parent.pid

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
    """A nursery whose tasks end with the block, not before: they go on while a block that is cancelled cleans up.

    What ends it early is raised as itself, not in a group.
    """

    async def serve(task_status: trio.TaskStatus[trio.Nursery]) -> None:
        await trio.lowlevel.checkpoint()  # if the block is cancelled already, not to begin is the only chance
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                task_status.started(nursery)
                await trio.sleep_forever()

    try:
        async with trio.open_nursery() as outer:
            nursery: trio.Nursery = await outer.start(serve)
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _unwrapped(group) from None


def _unwrapped(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A group without its cancellations: its exception itself if it is one, and Ctrl-C before all others."""
    if group.subgroup(KeyboardInterrupt):
        return KeyboardInterrupt()
    rest: BaseException = group.split(trio.Cancelled)[1] or group
    while isinstance(rest, BaseExceptionGroup) and len(rest.exceptions) == 1:
        rest = rest.exceptions[0]
    return rest


def _role(node: str) -> str:
    return "cpu" if node.startswith("cpu") else node
