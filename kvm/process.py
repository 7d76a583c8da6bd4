"""The KVM process: host user space and the load balancer. It asks; the CPUs do.

Which CPU has a task is one word in shared memory, written by the CPU that has it. This process only reads it, sends
requests over the bus, and owns the pages that user space's buffers are made of.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from errno import EBUSY, EIO, ENXIO
from pathlib import Path
from time import monotonic_ns

import trio

from bus.link import Delivery
from bus.memory import PAGE_SIZE, PhysicalMemory
from bus.messages import (
    AdminDone,
    Body,
    BuildTd,
    Do,
    Done,
    Finish,
    Finished,
    Hotplug,
    InstallModule,
    Member,
    MoveTask,
    Preempt,
    Progress,
    Query,
    ReadVersion,
    Start,
    Stop,
    StopTask,
    TaskEnded,
    TaskMoved,
    Waits,
)
from bus.node import Node, join, shared_memory, until_terminated
from bus.spec import LAUNCHER, MachineSpec, cpu_number
from cpu.layout import KERNEL, TD_TABLE, TDX_STATE, per_cpu
from cpu.struct import NONE
from kvm.compose import Knobs, kernel
from kvm.leased import remove_tree
from kvm.pages import PagePool
from kvm.requests import Requests
from kvm.sysfs import SysfsTree, serve_sysfs
from kvm.tasks import Tasks
from kvm.td_owner import TdOwner
from kvm.vcpu import td_vcpu_of, vcpu_of
from kvm.workload import Action, Build, Kick, Move, Read, Update, placement, timeline
from seamldr.structures import SeamldrInfo
from seamldr.update import version_text
from seamldr.upload import Support

PROGRESS_S = 0.2
WARM_UP_EXITS = 20
WARM_UP_AT_MOST_S = 10.0


class KvmProcess:
    """User space of the machine."""

    nursery: trio.Nursery

    def __init__(self, node: Node, memory: PhysicalMemory) -> None:
        self.node = node
        self.emit = node.emit
        self.spec = node.spec
        self.memory = memory
        incarnation = node.identity.incarnation
        self.pool = PagePool(node.spec.seed, incarnation)
        self.requests = Requests(self.pool, incarnation)
        self.total = node.spec.vcpus + node.spec.tds
        self.tasks = Tasks(self.total, memory, node.clock, node.endpoint.send, node.emit)
        self.facts = {"requests": 0, "done": 0, "updates": 0, "updates_done": 0, "moves": 0, "ended": 0}
        self.facts |= {"tds_begun": 0, "tds_built": 0, "tds_failed": 0, "tds_ended": 0, "lost": 0, "stale": 0}
        self.started = trio.Event()
        self.stop = trio.Event()
        self.changed = trio.Event()
        self.sysfs: SysfsTree | None = None
        self._leaving: set[int] = set()
        self._rng = random.Random(node.spec.seed)
        self._worker = trio.Lock()
        self._owner_of_tds = TdOwner(self)
        self._no_more_updates = self._waits_for_builds = False
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
            case AdminDone() as done:
                self.count("done" if self.requests.end(done) else "stale")
            case TaskMoved(moved=moved):
                self.count("moves", int(moved))
            case TaskEnded(task=task):
                if task in self.tasks.live:
                    self.tasks.live.discard(task)
                    self.count("ended")
            case Member(node=name, incarnation=incarnation, state=state):
                self.node.endpoint.member(name, incarnation, state)
                self._cpu_changed(name, state)
            case Do() as do:
                self.nursery.start_soon(self._do, do)
            case Query():
                what = f"{len(self.requests.open)} requests and {len(self.tasks.live)} tasks are open"
                self.node.endpoint.send(LAUNCHER, Waits(what, "", self.facts["done"]))
            case Finish():
                self._finish.set()
            case Stop():
                self.stop.set()
                self._wake()
            case body:
                if not self.node.handle_control(body):
                    self.node.emit("refused", reason="unexpected", head=type(body).__name__)

    def count(self, fact: str, by: int = 1) -> None:
        """`by` more of something that the launcher is told."""
        self.facts[fact] += by
        self._wake()

    def _cpu_changed(self, name: str, state: str) -> None:
        """A CPU has died or lives again: what becomes of requests and tasks."""
        number = cpu_number(name)
        if number is None:
            return
        if state == "dead":
            for request in self.requests.lose(number):
                self.emit("request_lost", request=request, cpu=number)
        self._look_after_tasks()
        self._wake()

    def _look_after_tasks(self) -> None:
        if not self._load(KERNEL.workload_began):
            return  # no task is anywhere yet, and their words are zeros
        self.count("ended", self.tasks.look(self._usable()))

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
        resumed = self._load(KERNEL.workload_began) != 0
        if resumed:
            self._resume()
        else:
            self._begin()
        self._look_after_tasks()
        if not resumed:
            await self._warm_up()
            self._store(KERNEL.workload_began, monotonic_ns())
        if self.spec.sysfs:
            async with serve_sysfs(Path(self.spec.sysfs), self, self._support()) as self.sysfs:
                self.facts["sysfs"] = 1
                await self._act_by_timeline()
            self.sysfs = None
        else:
            await self._act_by_timeline()
        await self._until(lambda: not self.requests.open)
        await self._end_tasks()
        self._progress()
        self.node.endpoint.send(LAUNCHER, Finished())

    def _begin(self) -> None:
        self._prepare_tds()
        for task, cpu in enumerate(placement(self.total, self.spec.cpus)):
            self.tasks.put(task, cpu)
        self._store(KERNEL.workload_began, monotonic_ns())

    def _resume(self) -> None:
        """Another incarnation has begun, and the machine has gone on since it died."""
        self.tasks.look(())
        elapsed, updates = monotonic_ns() - self._load(KERNEL.workload_began), self._load(KERNEL.workload_updates)
        self.emit("workload_resume", elapsed_ns=elapsed, tasks=len(self.tasks.live), updates=updates)
        if self.spec.sysfs:
            remove_tree(Path(self.spec.sysfs))

    async def _act_by_timeline(self) -> None:
        """Do what is due, until the time is over or the launcher says so; then let those end whose TDs are in build."""
        async with trio.open_nursery() as self._builders:
            await self._act_when_due()
            self._no_more_updates = True
            self._wake()

    async def _act_when_due(self) -> None:
        began, spec, now = self._load(KERNEL.workload_began), self.spec, monotonic_ns()
        for due, action in timeline(spec.workload, spec.seed, self.total, spec.cpus, builds=bool(spec.tds)):
            if began + due < now and not self._is_owed(action):
                continue
            await self._sleep_until(began + due)
            if self._finish.is_set():
                return
            await self._act(action)
        await self._sleep_until(began + self.spec.workload.duration_ns)

    def _is_owed(self, action: Action) -> bool:
        """Of what was due before this process began only an update is made up for."""
        return isinstance(action, Update) and action.index >= self._load(KERNEL.workload_updates)

    async def _sleep_until(self, time: int) -> None:
        with trio.move_on_after(max(0, time - monotonic_ns()) / 1e9):
            await self._finish.wait()

    async def _warm_up(self) -> None:
        """Let every guest run a little before anything disturbs it."""
        with trio.move_on_after(WARM_UP_AT_MOST_S):
            while not all(self._exits(task) >= WARM_UP_EXITS for task in self.tasks.live):  # noqa: ASYNC110
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
                for cpu in self._usable() & set(cpus):
                    (page,) = self.pool.take(1)
                    request = self._new_request("read_version", cpu, [page])
                    endpoint.send(f"cpu{cpu}", ReadVersion(request, page))
            case Kick(cpu=cpu):
                if cpu in self._usable():
                    endpoint.send(f"cpu{cpu}", Preempt())
            case Move(task=task, to=to):
                self._move(task, to)
            case Update(index=index, cpu=cpu) if self._is_owed(action):
                self._store(KERNEL.workload_updates, index + 1)
                await self._update(index, cpu)
            case Build() as build:
                self._builders.start_soon(self._owner_of_tds.live, build)

    def _new_request(self, kind: str, cpu: int, pages: list[int], *, wanted: bool = False) -> int:
        request = self.requests.new(cpu, pages, wanted=wanted)
        self.facts["requests"] += 1
        self.node.emit("request", request=request, kind=kind, cpu=cpu)
        return request

    def _move(self, task: int, to: int) -> None:
        owner, usable = self.tasks.owner(task), self._usable()
        if task in self.tasks.live and owner in usable and to in usable and owner != to:
            self.node.emit("task_move", task=task, to=to)
            self.node.endpoint.send(f"cpu{owner}", MoveTask(task, to))

    async def _update(self, index: int, cpu: int) -> None:
        """Install a planned image, once the TDs are in build that it is to meet; again after them if they refuse it."""
        image = _content(self.spec.images[index])
        await self._until(lambda: not self._owner_of_tds.not_waiting)
        errno = await self.install(image, len(image), cpu)
        if errno == -EBUSY:
            self._waits_for_builds = True
            self._wake()
            await self._until(lambda: not self._owner_of_tds.in_build)
            self._waits_for_builds = False
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

            def message(request: int) -> InstallModule:
                return InstallModule(request, length, tuple(pages[:count]), pages[count])

            done = await self._ask("install", pages, message, cpu=cpu)
            self.count("updates_done")
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
        done = await self._ask("read_version", [page], lambda request: ReadVersion(request, page))
        info = None if done.errno else SeamldrInfo.decode(self.memory.read(page, PAGE_SIZE))
        remaining = info.num_remaining_updates if info else 0
        self.emit("seamldr_info", request=done.request, errno=done.errno, remaining=remaining)
        return done.errno, info

    async def td_command(self, command: str, td: int, task: int, contents: Iterable[bytes] = ()) -> AdminDone:
        """Have some CPU do one step in the life of a TD; `contents` go to pages of user space before."""
        contents = list(contents)
        pages = self.pool.take(len(contents))
        for page, content in zip(pages, contents, strict=True):
            self.memory.write(page, content)
        return await self._ask(
            f"td_{command}", pages, lambda request: BuildTd(request, command, td, task, tuple(pages))
        )

    async def next_update(self) -> None:
        """Return when the next update has ended, when it waits for TDs in build, or when no more will come."""
        before = self.facts["updates_done"]
        await self._until(
            lambda: self._no_more_updates or self._waits_for_builds or self.facts["updates_done"] > before
        )

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
        self.requests.end(AdminDone(request, error, why))
        self.node.emit("admin_begin", request=request, kind="install")
        self.node.emit("update_refused", errno=error, why=why)
        self.node.emit("admin_end", request=request, kind="install", errno=error, text=why)

    def _support(self) -> Support:
        """What this kernel knows when its driver is loaded; with the gate off it does not mind the SEAMRET erratum."""
        knobs = Knobs(**self.spec.knobs)
        gate = kernel(self.spec.strategy, knobs, self.spec.cpus).knobs["enforce_gate"]
        sysinfo, features0 = bool(self._load(TDX_STATE.initialized)), self._load(TDX_STATE.features0)
        return Support(sysinfo, features0, bool(gate and not knobs.vmx_basic_bit60))

    async def _ask(
        self, kind: str, pages: list[int], message: Callable[[int], Body], *, cpu: int | None = None, but: int = -1
    ) -> AdminDone:
        """Send a CPU a request and wait for its answer: `cpu` if it can take one, else any, not `but`.

        `pages` belong to the request, and are free again when the answer is there. -ENXIO if the CPU dies over it, or
        if there is none.
        """
        usable = sorted(self._usable() - {but})
        if not usable:
            self.pool.give(pages)
            return AdminDone(0, -ENXIO, "no CPU is active")
        chosen = cpu if cpu in usable else self._rng.choice(usable)
        request = self._new_request(kind, chosen, pages, wanted=True)
        self.node.endpoint.send(f"cpu{chosen}", message(request))
        await self._until(lambda: self.requests.open[request].done is not None)
        done = self.requests.answer(request)
        assert done is not None
        return done

    def _usable(self) -> set[int]:
        """CPUs that take requests and tasks: online, not dead, not on their way out."""
        areas = {cpu: per_cpu(cpu) for cpu in range(self.spec.cpus) if cpu not in self._leaving}
        return {cpu for cpu, area in areas.items() if self._load(area.active) and not self._load(area.dead)}

    def _load(self, word: int) -> int:
        value, stamp = self.memory.load(word)
        self.node.clock.merge(stamp)
        return value

    def _store(self, word: int, value: int) -> None:
        self.memory.store(word, value, self.node.clock.tick())

    # What an operator asks for

    async def _do(self, do: Do) -> None:
        errno, text = await self._done(do)
        self.node.endpoint.send(LAUNCHER, Done(do.request, errno, text))

    async def _done(self, do: Do) -> tuple[int, str]:
        if do.what in ("offline", "online"):
            done = await self._hotplug(do.cpu, online=do.what == "online")
        elif do.what == "read":
            (page,) = self.pool.take(1)
            done = await self._ask("read_version", [page], lambda request: ReadVersion(request, page), cpu=do.cpu)
        else:
            try:
                image = _content(do.path)
            except OSError as error:
                return -(error.errno or EIO), str(error)
            return await self.install(image, len(image), do.cpu), ""
        return done.errno, done.text

    async def _hotplug(self, cpu: int, *, online: bool) -> AdminDone:
        """Write to the `online` file of a CPU. What it does for user space ends before: a worker cannot be moved."""
        if not online:
            self._leaving.add(cpu)
            await self._until(lambda: not self.requests.on(cpu))
        kind = "online" if online else "offline"
        done = await self._ask(kind, [], lambda request: Hotplug(request, cpu, online), but=cpu)
        self._leaving.discard(cpu)
        return done

    # The end

    async def _end_tasks(self) -> None:
        """Ask every live task to end; one that is just moving is asked again at its new CPU."""
        asked: dict[int, int] = {}
        while self.tasks.live:
            self._look_after_tasks()
            for task in sorted(self.tasks.live):
                owner = self.tasks.owner(task)
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
        async with trio.open_nursery() as process.nursery:
            nursery = process.nursery
            nursery.start_soon(process.tell)
            nursery.start_soon(process.run)
            await process.receive()
            nursery.cancel_scope.cancel()
        await node.say_goodbye(dict(process.facts))
