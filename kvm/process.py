"""The KVM process: host user space and the load balancer. It asks; the CPUs do.

Which CPU has a task is one word in shared memory, written by the CPU that has it. This process only reads it, sends
requests over the bus, and owns the pages that user space's buffers are made of.
"""

from __future__ import annotations

import os
from errno import EBUSY
from pathlib import Path
from time import monotonic_ns

import trio

from bus.link import Delivery
from bus.memory import PhysicalMemory
from bus.messages import (
    AdminDone,
    Do,
    Done,
    Finish,
    Finished,
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
from cpu.layout import KERNEL, TD_TABLE
from cpu.struct import NONE
from kvm.syscalls import Syscalls, file_content
from kvm.sysfs import clear, serve_sysfs
from kvm.tasks import Tasks
from kvm.td_owner import TdOwner
from kvm.vcpu import td_vcpu_of, vcpu_of
from kvm.workload import Action, Build, Kick, Move, Read, Update, placement, timeline

PROGRESS_S = 0.2
WARM_UP_EXITS = 20
WARM_UP_AT_MOST_S = 10.0


class KvmProcess(Syscalls):
    """User space of the machine."""

    nursery: trio.Nursery

    def __init__(self, node: Node, memory: PhysicalMemory) -> None:
        super().__init__(node, memory)
        self.total = node.spec.vcpus + node.spec.tds
        self.tasks = Tasks(self.total, memory, node.clock, node.endpoint.send, node.emit)
        self.facts |= {"moves": 0, "ended": 0, "tds_begun": 0, "tds_built": 0, "tds_failed": 0, "tds_ended": 0}
        self.started = trio.Event()
        self.stop = trio.Event()
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
                self.wake()
            case body:
                if not self.node.handle_control(body):
                    self.node.refuse("unexpected", type(body).__name__)

    def _cpu_changed(self, name: str, state: str) -> None:
        """A CPU has died or lives again: what becomes of requests and tasks."""
        number = cpu_number(name)
        if number is None:
            return
        if state == "dead":
            for request in self.requests.lose(number):
                self.emit("request_lost", request=request, cpu=number)
        self._look_after_tasks()
        self.wake()

    def _look_after_tasks(self) -> None:
        if not self.load(KERNEL.workload_began):
            return  # no task is anywhere yet, and their words are zeros
        self.count("ended", self.tasks.look(self.usable()))

    # The run

    async def run(self) -> None:
        """Place the tasks, act by the timeline, bring everything to an end."""
        await self.started.wait()
        resumed = self.load(KERNEL.workload_began) != 0
        if resumed:
            self._resume()
        else:
            self._begin()
        self._look_after_tasks()
        if not resumed:
            await self._warm_up()
            self.store(KERNEL.workload_began, monotonic_ns())
        if self.spec.sysfs:
            root, fuse = Path(self.spec.sysfs), self.spec.fuse
            async with serve_sysfs(root, self, self.support(), fuse=fuse) as self.sysfs:
                self.facts["sysfs"] = 1
                await self._act_by_timeline()
            self.sysfs = None
        else:
            await self._act_by_timeline()
        await self.until(lambda: not self.requests.open)
        await self._end_tasks()
        self._progress()
        self.node.endpoint.send(LAUNCHER, Finished())

    def _begin(self) -> None:
        self._prepare_tds()
        for task, cpu in enumerate(placement(self.total, self.spec.cpus)):
            self.tasks.put(task, cpu)
        self.store(KERNEL.workload_began, monotonic_ns())

    def _resume(self) -> None:
        """Another incarnation has begun, and the machine has gone on since it died."""
        self.tasks.look(())
        elapsed, updates = monotonic_ns() - self.load(KERNEL.workload_began), self.load(KERNEL.workload_updates)
        self.emit("workload_resume", elapsed_ns=elapsed, tasks=len(self.tasks.live), updates=updates)
        if self.spec.sysfs:
            clear(Path(self.spec.sysfs))

    async def _act_by_timeline(self) -> None:
        """Do what is due, until the time is over or the launcher says so; then let those end whose TDs are in build."""
        async with trio.open_nursery() as self._builders:
            await self._act_when_due()
            self._no_more_updates = True
            self.wake()

    async def _act_when_due(self) -> None:
        began, spec, now = self.load(KERNEL.workload_began), self.spec, monotonic_ns()
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
        return isinstance(action, Update) and action.index >= self.load(KERNEL.workload_updates)

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
                for cpu in self.usable() & set(cpus):
                    (page,) = self.pool.take(1)
                    request = self.new_request("read_version", cpu, [page])
                    endpoint.send(f"cpu{cpu}", ReadVersion(request, page))
            case Kick(cpu=cpu):
                if cpu in self.usable():
                    endpoint.send(f"cpu{cpu}", Preempt())
            case Move(task=task, to=to):
                self._move(task, to)
            case Update(index=index, cpu=cpu) if self._is_owed(action):
                self.store(KERNEL.workload_updates, index + 1)
                await self._update(index, cpu)
            case Build() as build:
                self._builders.start_soon(self._owner_of_tds.live, build)

    def _move(self, task: int, to: int) -> None:
        owner, usable = self.tasks.owner(task), self.usable()
        if task in self.tasks.live and owner in usable and to in usable and owner != to:
            self.node.emit("task_move", task=task, to=to)
            self.node.endpoint.send(f"cpu{owner}", MoveTask(task, to))

    async def _update(self, index: int, cpu: int) -> None:
        """Install a planned image, once the TDs are in build that it is to meet; again after them if they refuse it."""
        image = file_content(self.spec.images[index])
        await self.until(lambda: not self._owner_of_tds.not_waiting)
        if not self.all_online():
            self.refuse(-EBUSY, "a CPU is offline: P-SEAMLDR would wait for it for ever")
            return
        errno = await self.install(image, len(image), cpu)
        if errno == -EBUSY:
            self._waits_for_builds = True
            self.wake()
            await self.until(lambda: not self._owner_of_tds.in_build)
            self._waits_for_builds = False
            await self.install(image, len(image), cpu)

    async def next_update(self) -> None:
        """Return when the next update has ended, when it waits for TDs in build, or when no more will come."""
        before = self.facts["updates_done"]
        await self.until(
            lambda: self._no_more_updates or self._waits_for_builds or self.facts["updates_done"] > before
        )

    async def _do(self, do: Do) -> None:
        errno, text = await self.obey(do)
        self.node.endpoint.send(LAUNCHER, Done(do.request, errno, text))

    # The end

    async def _end_tasks(self) -> None:
        """Ask every live task to end; one that is just moving is asked when it has arrived."""
        asked: dict[int, int | None] = {}
        while self.tasks.live:
            self._look_after_tasks()
            for task in sorted(self.tasks.live):
                cpu = self.tasks.runs_on(task)
                if cpu is not None and asked.get(task) != cpu:
                    self.node.endpoint.send(f"cpu{cpu}", StopTask(task))
                asked[task] = cpu
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
