"""A live machine: N CPU processes, the seamldr process and the KVM process on one bus, started, watched and ended.

    async with Machine(Topology(cpus=4, vcpus=8)) as machine:
        await machine.run_workload()
    judgement = machine.check()

Inside the block every process is online; after it none is left, nor a socket file, nor the memory, however the block
ended. What can be done to a machine that runs is in `kvm.operator`.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic
from types import TracebackType

import msgspec
import trio

from bus.judge import Judgement, judge
from bus.link import Delivery
from bus.memory import PhysicalMemory
from bus.messages import Done, FaultReached, Fenced, Finish, Finished, Hello, Progress, Start, Stopped, Waits
from bus.node import join
from bus.spec import KVM, LAUNCHER, SEAMLDR
from cpu.layout import MULTI_STOP, UPDATE_CTRL, memory_size
from kvm.background import background
from kvm.fleet import PARENT_GONE, MachineError
from kvm.operator import Operator
from kvm.processes import Parent, Process, enough_files
from kvm.topology import Topology, machine_images, machine_spec

STUCK_LOOK_S = 0.25
STUCK_PER_CPU_S = 0.02
"""How much longer than the grace period nothing may move, for each CPU."""
FINISH_S = 2.0
"""How long user space may take to come to its end when asked, plus `FINISH_PER_CPU_S` for each CPU."""
FINISH_PER_CPU_S = 0.05

__all__ = ["Machine", "MachineError", "OnProgress", "Watch"]

OnProgress = Callable[[dict[str, int]], None]
Watch = Callable[["Machine"], Awaitable[None]]


class Machine(Operator):
    """One live machine. `on_progress` is called with counts while the workload runs; `watch` is a task beside it, from
    before its first process until after its last.
    """

    def __init__(
        self,
        topology: Topology,
        on_progress: OnProgress | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.topology = topology
        self.on_progress = on_progress
        self._watcher = watch
        self.facts: dict[str, int] = {}
        self.finished = trio.Event()
        self.online_seconds = 0.0
        self.run_seconds = 0.0
        self._ended = False
        self._life = self._live()

    # Up and down

    async def __aenter__(self) -> Machine:
        """Start every process and wait until all are online; raises `MachineError`."""
        await self._life.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """End every process, in order if the workload came to its end, and leave nothing behind."""
        return await self._life.__aexit__(kind, error, trace)

    async def end(self) -> None:
        """Take every process down before the block ends, so that `check` can judge all of it."""
        if not self._ended:
            self._end("the workload was not run")
        self._proceed_all()
        await self._stop_all()

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            yield

    @trio.lowlevel.enable_ki_protection  # Ctrl-C comes where it waits, not between a thing and the note to undo it
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
        self.images = machine_images(self.topology, self.run_dir)
        self.spec = machine_spec(self.topology, self.run_dir, socket_dir, key, memory.fd, self.images)
        self.processes = {node: Process(node, 1) for node in self.spec.nodes()}
        self.node = await stack.enter_async_context(join(self.spec, LAUNCHER, 1))
        stack.callback(self._forget_all)
        self._nursery = await stack.enter_async_context(background())
        self._describe()
        self._nursery.start_soon(self._receive)
        self._nursery.start_soon(self._hear_parent)
        if self._watcher is not None:
            self._nursery.start_soon(self._watcher, self)
        stack.push_async_callback(self._stop_all)
        stack.callback(self._proceed_all)
        stack.push(self._end_early)
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

    @property
    def ended(self) -> bool:
        """Whether its work is over, or it broke; what comes is the end of its processes."""
        return self._ended

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
            case Hello() if not process.hello:
                process.hello = True
                self._came_online(process)
            case Progress(facts=facts):
                self._progress(facts)
            case Finished():
                self.finished.set()
            case Stopped(facts=totals):
                process.totals = totals
            case Done(request=request) as done:
                self._done[request] = done
                self._progressed()
            case FaultReached() as reached:
                self._reached(process.node, reached)
            case Fenced(cpu=cpu):
                self._nursery.start_soon(self.kill, cpu)
            case Waits() as waits:
                self._waits[process.node] = waits
                self._progressed()
            case body:
                self.node.refuse("unexpected", type(body).__name__)

    def _progress(self, facts: dict[str, int]) -> None:
        if facts != self.facts:
            self.facts = facts
            self._last_progress = monotonic()
        if self.on_progress is not None:
            self.on_progress(facts)

    # The workload

    async def run_workload(self) -> bool:
        """Let user space run to its end; False if the machine got stuck or broke."""
        began = self._last_progress = monotonic()
        workload = self.spec.workload
        planned = began + workload.duration_ns / 1e9
        patience, stopped = workload.grace_ns / 1e9 + STUCK_PER_CPU_S * self.spec.cpus, self._stopping()
        while not self.finished.is_set() and not self._broken:
            with trio.move_on_after(STUCK_LOOK_S):
                await self.finished.wait()
            if (stopping := self._stopping()) != stopped:
                stopped, self._last_progress = stopping, monotonic()
            quiet = monotonic() - max(self._last_progress, planned)
            if quiet > patience and not self.finished.is_set():
                self._break(f"nothing has moved for {patience:.2g} s after the planned end")
        self.run_seconds = monotonic() - began
        if self._broken:
            await self._ask_all()
        self._end(self._broken or "")
        return self._broken is None

    def _stopping(self) -> list[int]:
        """How far a stop_machine and the update in it are: with a thousand CPUs they take longer than any request."""
        stop, update = MULTI_STOP, UPDATE_CTRL
        words = stop.nr_todo, stop.state, stop.thread_ack, update.update, update.state, update.num_ack
        return [self.memory.read64(word) for word in words]

    async def finish(self) -> None:
        """Have user space come to its end now; if it does not within `FINISH_S`, the machine counts as stuck."""
        self.node.endpoint.send(KVM, Finish())
        patience = FINISH_S + FINISH_PER_CPU_S * self.spec.cpus
        with trio.move_on_after(patience):
            await self.finished.wait()
            return
        self._break(f"user space has not come to its end within {patience:g} s of an interrupt")

    def _end_early(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The block ends, or the start failed, before the workload has ended: the records say why."""
        if not self._ended:
            why = "the workload was not run" if error is None else f"ended by {type(error).__name__}"
            self._end(str(error) if isinstance(error, MachineError) else why)

    def _end(self, why: str) -> None:
        self._ended = True
        self.node.emit("machine_end", finished=int(not why and self.finished.is_set()), why=why)

    def next_image(self) -> Path:
        """A new image file, one version up from the last."""
        return self.images.next()

    # Afterwards

    def check(self) -> Judgement:
        """Judge the records of this run."""
        return judge(self.run_dir)
