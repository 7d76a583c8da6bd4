"""The KVM process: host user space and the load balancer. It asks; the CPUs do.

Which CPU has a task is one word in shared memory, written by the CPU that has it. This process only reads it, sends
requests over the bus, and owns the pages that user space's buffers are made of.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns

import trio

from bus.link import Delivery
from bus.memory import PAGE_SIZE, PhysicalMemory
from bus.messages import (
    AdminDone,
    Finish,
    Finished,
    InstallModule,
    Member,
    MoveTask,
    Preempt,
    Progress,
    Query,
    ReadVersion,
    RunTask,
    Start,
    Stop,
    StopTask,
    TaskEnded,
    TaskMoved,
    Waits,
)
from bus.node import Node, join, shared_memory, until_terminated
from bus.spec import LAUNCHER, MachineSpec
from cpu.layout import BUFFERS, BUFFERS_END, TD_TABLE, TDX_STATE, Task, per_cpu, task_address
from cpu.struct import NONE
from kvm.compose import Knobs, kernel
from kvm.sysfs import SysfsTree, serve_sysfs
from kvm.vcpu import td_vcpu_of, vcpu_of
from kvm.workload import Action, Kick, Move, Read, Update, placement, timeline
from seamldr.structures import SeamldrInfo
from seamldr.update import version_text

PROGRESS_S = 0.2
WARM_UP_EXITS = 20
WARM_UP_AT_MOST_S = 10.0
POOL_PAGES = (BUFFERS_END - BUFFERS) // PAGE_SIZE - 1024


class PagePool:
    """The pages of user space's buffers: given out in no order that anybody may rely on, as vmalloc does."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._free = [BUFFERS + PAGE_SIZE * index for index in range(min(POOL_PAGES, 4096))]
        self._rng.shuffle(self._free)

    def take(self, count: int) -> list[int]:
        """Free pages; raises MemoryError if there are not so many."""
        if count > len(self._free):
            raise MemoryError(f"no {count} free pages")
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give(self, pages: list[int]) -> None:
        """Back to the pool."""
        self._free.extend(pages)


class KvmProcess:
    """User space of the machine."""

    def __init__(self, node: Node, memory: PhysicalMemory) -> None:
        self.node = node
        self.spec = node.spec
        self.memory = memory
        self.pool = PagePool(node.spec.seed)
        self.tasks = node.spec.vcpus + node.spec.tds
        self.live = set(range(self.tasks))
        self.open: dict[int, list[int]] = {}
        self.facts = {"requests": 0, "done": 0, "updates": 0, "updates_done": 0, "moves": 0, "ended": 0}
        self.started = trio.Event()
        self.stop = trio.Event()
        self.changed = trio.Event()
        self.sysfs: SysfsTree | None = None
        self._request = 0
        self._answers: dict[int, AdminDone | None] = {}
        self._rng = random.Random(node.spec.seed)
        self._worker = trio.Lock()
        self._finish = trio.Event()

    # Messages

    async def receive(self) -> None:
        """Take messages until told to stop."""
        endpoint = self.node.endpoint
        while not self.stop.is_set():
            await endpoint.wait()
            for delivery in endpoint.drain_nowait():
                self._handle(delivery)

    def _handle(self, delivery: Delivery) -> None:
        match delivery.body:
            case Start():
                self.started.set()
            case AdminDone(request=request) as done:
                if request in self._answers:
                    self._answers[request] = done
                self.pool.give(self.open.pop(request, []))
                self._count("done")
            case TaskMoved(moved=moved):
                self._count("moves", int(moved))
            case TaskEnded(task=task):
                self.live.discard(task)
                self._count("ended")
            case Member(node=name, incarnation=incarnation, state=state):
                self.node.endpoint.member(name, incarnation, state)
            case Query():
                what = f"{len(self.open)} requests and {len(self.live)} tasks are open"
                self.node.endpoint.send(LAUNCHER, Waits(what, "", self.facts["done"]))
            case Finish():
                self._finish.set()
            case Stop():
                self.stop.set()
                self._wake()
            case body:
                self.node.emit("refused", reason="unexpected", head=type(body).__name__)

    def _count(self, fact: str, by: int = 1) -> None:
        self.facts[fact] += by
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()

    # The run

    async def run(self) -> None:
        """Place the tasks, act by the timeline, bring everything to an end."""
        await self.started.wait()
        self._prepare_tds()
        for task, cpu in enumerate(placement(self.tasks, self.spec.cpus)):
            self.node.emit("task_place", task=task, cpu=cpu)
            self.node.endpoint.send(f"cpu{cpu}", RunTask(task))
        await self._warm_up()
        if self.spec.sysfs:
            async with serve_sysfs(Path(self.spec.sysfs), self, self._updates_are_supported()) as self.sysfs:
                self.facts["sysfs"] = 1
                await self._act_by_timeline()
            self.sysfs = None
        else:
            await self._act_by_timeline()
        await self._until(lambda: not self.open)
        await self._end_tasks()
        self._progress()
        self.node.endpoint.send(LAUNCHER, Finished())

    async def _act_by_timeline(self) -> None:
        """Do what is due, until the time is over or the launcher says so."""
        began = monotonic_ns()
        for due, action in timeline(self.spec.workload, self.spec.seed, self.tasks, self.spec.cpus):
            await self._sleep_until(began + due)
            if self._finish.is_set():
                return
            await self._act(action)
        await self._sleep_until(began + self.spec.workload.duration_ns)

    async def _sleep_until(self, time: int) -> None:
        with trio.move_on_after(max(0, time - monotonic_ns()) / 1e9):
            await self._finish.wait()

    async def _warm_up(self) -> None:
        """Let every guest run a little before anything disturbs it."""
        with trio.move_on_after(WARM_UP_AT_MOST_S):
            while not all(self._exits(task) >= WARM_UP_EXITS for task in self.live):  # noqa: ASYNC110
                await trio.sleep(0.005)

    def _exits(self, task: int) -> int:
        word = vcpu_of(task).exits if task < self.spec.vcpus else td_vcpu_of(task).exits
        return self.memory.load(word)[0]

    def _prepare_tds(self) -> None:
        """What KVM keeps of the TD vCPUs that firmware built."""
        for index in range(self.spec.tds):
            task = self.spec.vcpus + index
            state = td_vcpu_of(task)
            time = self.node.clock.tick()
            values = (state.number, task), (state.td, index), (state.cpu, NONE)
            for word, value in (*values, (state.tdvpr, self.memory.read64(TD_TABLE + 8 * index))):
                self.memory.store(word, value, time)

    async def _act(self, action: Action) -> None:
        endpoint = self.node.endpoint
        match action:
            case Read(cpus=cpus):
                for cpu in cpus:
                    (page,) = self.pool.take(1)
                    request = self._new_request("read_version", cpu, [page])
                    endpoint.send(f"cpu{cpu}", ReadVersion(request, page))
            case Kick(cpu=cpu):
                endpoint.send(f"cpu{cpu}", Preempt())
            case Move(task=task, to=to):
                self._move(task, to)
            case Update(index=index, cpu=cpu):
                await self._update(index, cpu)

    def _new_request(self, kind: str, cpu: int, pages: list[int]) -> int:
        self._request += 1
        self.open[self._request] = pages
        self.facts["requests"] += 1
        self.node.emit("request", request=self._request, kind=kind, cpu=cpu)
        return self._request

    def _owner(self, task: int) -> int | None:
        place, stamp = self.memory.load(Task(task_address(task)).place)
        self.node.clock.merge(stamp)
        return None if place == NONE else place >> 2

    def _move(self, task: int, to: int) -> None:
        owner = self._owner(task)
        if task in self.live and owner not in (None, to):
            self.node.emit("task_move", task=task, to=to)
            self.node.endpoint.send(f"cpu{owner}", MoveTask(task, to))

    async def _update(self, index: int, cpu: int) -> None:
        image = _content(self.spec.images[index])
        await self.install(image, len(image), cpu)

    # The kernel behind the files of the user's interface

    async def install(self, image: bytes, length: int, cpu: int | None = None) -> int:
        """Have the image installed by a worker on `cpu`, or on some CPU; 0 or a negative errno. One at a time."""
        async with self._worker:
            count = max(1, -(-len(image) // PAGE_SIZE))
            pages = self.pool.take(count + 1)
            for at, page in enumerate(pages[:count]):
                self.memory.write(page, image[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
            self.facts["updates"] += 1
            cpu = self._some_cpu() if cpu is None else cpu
            request = self._new_request("install", cpu, pages)
            done = await self._answer(cpu, request, InstallModule(request, length, tuple(pages[:count]), pages[count]))
            self._count("updates_done")
        if self.sysfs is not None:
            self.sysfs.refresh()
        return done.errno

    async def settled(self) -> None:
        """Return when no install runs."""
        async with self._worker:
            pass

    async def seamldr_info(self) -> tuple[int, SeamldrInfo | None]:
        """What SEAMLDR.INFO says on some CPU; the errno if it failed, 0 or negative."""
        (page,) = self.pool.take(1)
        cpu = self._some_cpu()
        request = self._new_request("read_version", cpu, [])
        done = await self._answer(cpu, request, ReadVersion(request, page))
        info = None if done.errno else SeamldrInfo.decode(self.memory.read(page, PAGE_SIZE))
        self.pool.give([page])
        return done.errno, info

    def version(self) -> str | None:
        """The module's version as the kernel knows it; None if TDX is not initialized."""
        return version_text(self._load(TDX_STATE.version)) if self._load(TDX_STATE.initialized) else None

    def all_online(self) -> bool:
        """Whether every CPU is online."""
        return all(self._load(per_cpu(cpu).online) for cpu in range(self.spec.cpus))

    def log(self, text: str) -> None:
        """A line of the kernel log."""
        self.node.emit("log", text=text)

    def refuse(self, error: int, why: str) -> None:
        """Record an update that was refused before any CPU heard of it."""
        request = self._new_request("install", 0, [])
        self.open.pop(request)
        self.node.emit("admin_begin", request=request, kind="install")
        self.node.emit("update_refused", errno=error, why=why)
        self.node.emit("admin_end", request=request, kind="install", errno=error, text=why)

    def _updates_are_supported(self) -> bool:
        """On a CPU with the SEAMRET erratum there is no upload, unless the gate is off."""
        knobs = Knobs(**self.spec.knobs)
        gate = kernel(self.spec.strategy, knobs, self.spec.cpus).knobs["enforce_gate"]
        return bool(knobs.vmx_basic_bit60 or not gate)

    async def _answer(self, cpu: int, request: int, body: ReadVersion | InstallModule) -> AdminDone:
        self._answers[request] = None
        self.node.endpoint.send(f"cpu{cpu}", body)
        await self._until(lambda: self._answers[request] is not None)
        done = self._answers.pop(request)
        assert done is not None
        return done

    def _some_cpu(self) -> int:
        online = [cpu for cpu in range(self.spec.cpus) if self._load(per_cpu(cpu).online)]
        return self._rng.choice(online)

    def _load(self, word: int) -> int:
        value, stamp = self.memory.load(word)
        self.node.clock.merge(stamp)
        return value

    # The end

    async def _end_tasks(self) -> None:
        """Ask every live task to end; one that is just moving is asked again at its new CPU."""
        asked: dict[int, int] = {}
        while self.live:
            for task in sorted(self.live):
                owner = self._owner(task)
                if owner is not None and asked.get(task) != owner:
                    asked[task] = owner
                    self.node.endpoint.send(f"cpu{owner}", StopTask(task))
            with trio.move_on_after(0.05):
                await self.changed.wait()

    # Progress

    def _progress(self) -> None:
        self.node.endpoint.send(LAUNCHER, Progress(dict(self.facts)))

    async def tell(self) -> None:
        """Tell the launcher how far things are."""
        while True:
            self._progress()
            await trio.sleep(PROGRESS_S)


def _content(path: str) -> bytes:
    return Path(path).read_bytes()


def main(spec: MachineSpec, node: str, incarnation: int) -> None:
    """The KVM process."""
    trio.run(_main, spec, node, incarnation)


async def _main(spec: MachineSpec, name: str, incarnation: int) -> None:
    async with until_terminated(), join(spec, name, incarnation) as node:
        process = KvmProcess(node, shared_memory(spec))
        node.say_hello(os.getpid())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.tell)
            nursery.start_soon(process.run)
            await process.receive()
            nursery.cancel_scope.cancel()
        await node.say_goodbye(dict(process.facts))
