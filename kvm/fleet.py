"""The processes of a live machine as its launcher keeps them: born, watched by pidfd, announced, ended step by step.

Membership is the launcher's alone: it holds the pidfds, so a process is dead if and only if it says so. The death of a
CPU is an event of the machine, which goes on; a process that ends with an error of its own, or a service that nobody
meant to kill, ends the run.
"""

from __future__ import annotations

import signal
from pathlib import Path

import trio

from bus.memory import PhysicalMemory
from bus.messages import Member, Query, Ring, Stop, Waits
from bus.node import Node
from bus.records import last_clock
from bus.spec import KVM, SEAMLDR, MachineSpec, MemberState, cpu_number
from cpu.forkserver import Exited, NotSpawned, Spawned
from cpu.layout import per_cpu
from cpu.watch import watchers_of
from kvm.background import within
from kvm.processes import Parent, Process

ONLINE_S = 60.0
"""Deadline for processes to be online, plus `ONLINE_PER_CPU_S` for each CPU."""
ONLINE_PER_CPU_S = 0.1
STOP_S = 5.0
"""How long a process may take to bring its work to an end when asked, plus `STOP_PER_CPU_S` for each CPU."""
STOP_PER_CPU_S = 0.1
TERMINATE_S = 2.0
ANSWER_S = 1.0
"""How long the processes have to say what they wait for, plus `ANSWER_PER_CPU_S` for each CPU."""
ANSWER_PER_CPU_S = 0.01
LOG_TAIL = 4096
"""Bytes at the end of the log among which the reason of an unexpected end is looked for."""

PARENT_GONE = "the parent of the machine's processes has died, and they with it"


class MachineError(RuntimeError):
    """The machine could not be started, or broke; the message is one line for the user."""


class Fleet:
    """Base of `Machine`: its processes. `_start` of the machine sets node, spec, memory, parent and nursery."""

    node: Node
    spec: MachineSpec
    memory: PhysicalMemory
    run_dir: Path
    _parent: Parent
    _nursery: trio.Nursery

    def __init__(self) -> None:
        self.processes: dict[str, Process] = {}
        self._waits: dict[str, Waits] = {}
        self._broken: str | None = None
        self._moved = trio.Event()

    # Up

    async def _bring_up(self, nodes: list[str]) -> None:
        """Start these processes and wait until they are online, or were killed on purpose; raises `MachineError`."""
        members = self._members()
        try:
            for node in nodes:
                process = self.processes[node]
                await self._parent.spawn(_role(node), node, process.incarnation, members, self.node.clock.now)
        except OSError:
            self._break(PARENT_GONE)
        late = list(nodes)
        with trio.move_on_after(ONLINE_S + ONLINE_PER_CPU_S * self.spec.cpus):
            while not self._broken:
                moved = self._moved
                while late and self.processes[late[-1]].settled:
                    late.pop()
                if not late:
                    return
                await moved.wait()
        if self._broken:
            raise MachineError(self._broken)
        late = [node for node in late if not self.processes[node].settled]
        raise MachineError(f"{len(late)} of {len(nodes)} processes did not come online, {late[0]} among them")

    def _members(self) -> tuple[MemberState, ...]:
        """What a process that starts now has to know of the others."""
        return tuple(
            MemberState(process.node, process.incarnation, not process.dead)
            for process in self.processes.values()
            if process.incarnation > 1 or process.dead
        )

    def _succeed(self, dead: Process) -> Process:
        """A new incarnation in the place of a process that is gone; the others hear of it before it speaks."""
        process = Process(dead.node, dead.incarnation + 1)
        self.processes[dead.node] = process
        self._publish(process, "online")
        return process

    def _progressed(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    def _came_online(self, process: Process) -> None:
        """A process counts when it said hello and its parent said which one it is, in whatever order."""
        if process.online:
            self.node.emit("process_online", name=process.node, incarnation=process.incarnation)
            self._progressed()

    # What the parent says

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
        process.dead, wanted = True, process.wanted
        if not wanted and self._parent.alive:
            self._publish_death(process)
        await process.exited.wait()
        self.node.emit("process_exit", name=process.node, status=process.status, wanted=int(wanted))
        process.gone.set()
        self._progressed()
        if not wanted and not (self._parent.alive and self._survives(process)):
            self._break(self._obituary(process) if self._parent.alive else PARENT_GONE)

    def _survives(self, process: Process) -> bool:
        """Whether the machine goes on without it: a CPU that a signal killed, or what was killed on purpose."""
        if process.doomed:
            return True
        return process.status < 0 and process.hello and cpu_number(process.node) is not None

    def _publish_death(self, process: Process) -> None:
        """The word in memory first: who hears of the death finds it there."""
        # Its last records come before its death in any order by clock.
        self.node.clock.merge(last_clock(self.run_dir / "records" / f"{process.node}.jsonl"))
        number = cpu_number(process.node)
        if number is not None:
            self._store(per_cpu(number).dead, 1)
        self._publish(process, "dead")

    def _store(self, word: int, value: int) -> None:
        """Store a word of the kernel's, from outside of it, and ring the CPUs that sleep on it."""
        if self.memory.store(word, value, self.node.clock.tick()):
            self.memory.disarm(word)
            for number in watchers_of(self.memory, self.spec.cpus, word):
                if not self.processes[f"cpu{number}"].gone.is_set():
                    self.node.endpoint.send(f"cpu{number}", Ring(word))

    def _publish(self, process: Process, state: str) -> None:
        """To all that are left; not while the machine is taken down, or each of N would hear of N others."""
        self.node.endpoint.member(process.node, process.incarnation, state)
        for name, other in self.processes.items():
            if other is not process and not other.gone.is_set():
                self.node.endpoint.send(name, Member(process.node, process.incarnation, state))

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

    # What they wait for

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

    # Down

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
        process.signal(signal.SIGCONT)
        if process.online:
            self.node.endpoint.send(process.node, Stop())
            if await within(patience, process.gone):
                return
        for number, deadline in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, STOP_S)):
            if process.gone.is_set() or not process.born.is_set():
                return
            self.node.emit("process_end_step", name=process.node, step=signal.Signals(number).name)
            process.signal(number)
            if await within(deadline, process.gone):
                return

    def _forget_all(self) -> None:
        for process in self.processes.values():
            process.forget()

    # For those who look

    @property
    def parent_pid(self) -> int:
        """Process id of the parent that forked them all."""
        return self._parent.pid

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the CPUs."""
        return {name: process.pid for name, process in self.processes.items() if name.startswith("cpu")}



def _role(node: str) -> str:
    return "cpu" if node.startswith("cpu") else node
