"""What a person can do to a running machine: kill, stop, slow down and bring back processes; updates and CPU hotplug.

Everything here is on record as a `fault` or as a request. What is stopped or slowed down is let go when the machine
ends, whatever happens.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import ENXIO
from pathlib import Path

import trio

from bus.messages import ArmFault, Do, Done, FaultReached, Proceed, Start
from bus.points import POINTS
from bus.records import last_clock
from bus.spec import KVM, SEAMLDR, cpu_number
from cpu.layout import KERNEL, per_cpu
from kvm.fleet import MachineError
from kvm.link_faults import FaultyLinks
from kvm.processes import Process

SLICE_S = 0.02
"""Period of a slow-down: for a part of it the process is stopped."""
STOPPED_LOOK_S = 0.001

Target = int | str
"""A CPU number, or the name of a process: "cpu3", "seamldr", "kvm"."""


class Standstill:
    """A process will stand still, or stands still, at a point of its work; made by `Operator.arm`."""

    def __init__(self, fault: int, node: str, point: str) -> None:
        self.fault = fault
        self.node = node
        self.point = point
        self.cpu: int | None = None
        """The CPU that the point concerns, once it is reached."""
        self.reached = trio.Event()


class Operator(FaultyLinks):
    """Base of `Machine`: commands to a machine that runs. A target is a CPU number or the name of a process."""

    def __init__(self) -> None:
        super().__init__()
        self.standstills: dict[int, Standstill] = {}
        self._number = 0
        self._done: dict[int, Done] = {}
        self._reviving = trio.Lock()
        """Held while processes are brought back: a power cycle and a replug come one after the other."""

    def process(self, target: Target) -> Process:
        """The process that is, or was last, in this place; raises `ValueError` if the machine has no such place."""
        node = f"cpu{target}" if isinstance(target, int) else target
        if node not in self.processes:
            raise ValueError(f"the machine has no process {node!r}")
        return self.processes[node]

    def number_of(self, target: Target) -> int:
        """The CPU number of a target; raises `ValueError` if it is no CPU."""
        number = cpu_number(self.process(target).node)
        if number is None:
            raise ValueError(f"{target} is no CPU")
        return number

    def _record(self, kind: str, process: Process, what: str = "") -> None:
        self.node.emit("fault", kind=kind, name=process.node, incarnation=process.incarnation, what=what)

    # Kill and bring back

    async def kill(self, target: Target) -> None:
        """SIGKILL; returns when the death is on record and published. A process that is dead already stays dead."""
        process = self.process(target)
        if not process.gone.is_set():
            self._record("kill", process)
            await self._kill([process])

    async def _kill(self, processes: list[Process]) -> None:
        for process in processes:
            process.doomed = True
        for process in processes:
            await process.born.wait()
            process.signal(signal.SIGKILL)
        for process in processes:
            await process.gone.wait()

    async def replug(self, cpu: int) -> None:
        """A fresh process for a dead CPU, over its old per-CPU memory; raises `MachineError` if it does not come up."""
        async with self._reviving:
            process = await self._revive(self.process(cpu), "replug")
            if not process.dead:
                self._store(per_cpu(cpu).dead, 0)

    async def restart(self, target: Target) -> None:
        """Kill the seamldr or the KVM process, if it still lives, and start its next incarnation."""
        number = cpu_number(self.process(target).node)
        if number is not None:
            await self.kill(number)
            await self.replug(number)
            return
        async with self._reviving:
            process = self.process(target)
            await self.kill(target)
            await self._revive(process, "restart")
            if process.node == KVM:
                self.node.endpoint.send(KVM, Start())

    async def _revive(self, dead: Process, kind: str) -> Process:
        if not dead.gone.is_set():
            raise ValueError(f"{dead.node} is not dead")
        process = self._succeed(dead)
        self._record(kind, process)
        await self._bring_up([process.node])
        return process

    async def reset(self) -> None:
        """Power cycle: all processes and all memory are gone, then the machine starts as at its beginning.

        The way out when a CPU has died inside P-SEAMLDR. Guests begin anew.
        """
        async with self._reviving:
            await self._kill(list(self.processes.values()))
            for path in sorted((self.run_dir / "records").glob("*.jsonl")):
                self.node.clock.merge(last_clock(path))
            self.node.emit("machine_reset")
            self.memory.clear()
            for process in list(self.processes.values()):
                self._succeed(process)
            await self._bring_up([SEAMLDR])
            await self._bring_up([KVM, *self.spec.cpu_nodes()])
            self.node.endpoint.send(KVM, Start())

    # Stop and slow down

    async def stop(self, target: Target) -> None:
        """SIGSTOP; returns when the process stands. `resume` lets it go on."""
        process = self.process(target)
        self._record("stop", process)
        process.signal(signal.SIGSTOP)
        while not process.gone.is_set() and not process.is_stopped():  # nothing tells of a stop  # noqa: ASYNC110
            await trio.sleep(STOPPED_LOOK_S)

    async def resume(self, target: Target) -> None:
        """SIGCONT."""
        process = self.process(target)
        self._record("resume", process)
        process.signal(signal.SIGCONT)
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def slowed(self, target: Target, share: float) -> AsyncIterator[None]:
        """Inside the block the process gets the CPU for this `share` (0 to 1) of each 20 ms at most."""
        process = self.process(target)
        if not 0 < share < 1:
            raise ValueError(f"a share is above 0 and below 1, not {share:g}")
        self._record("slow", process, f"{share:.0%} of the time")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pulse, process, share)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
                process.signal(signal.SIGCONT)
                self._record("resume", process)

    async def _pulse(self, process: Process, share: float) -> None:
        while not process.gone.is_set():
            process.signal(signal.SIGSTOP)
            await trio.sleep((1 - share) * SLICE_S)
            process.signal(signal.SIGCONT)
            await trio.sleep(share * SLICE_S)

    # Points of the work

    def arm(self, point: str, *, cpu: int | None = None, nth: int = 1) -> Standstill:
        """Have whoever reaches `point` for the `nth` time from now on stand still there; `cpu` limits it to one CPU.

        A point that a CPU sees is counted for each CPU by itself. Raises `ValueError` on an unknown point or CPU.
        """
        if cpu is not None:
            self.process(cpu)
        if point not in POINTS:
            raise ValueError(f"no point {point!r}; one of {', '.join(POINTS)}")
        if nth < 1:
            raise ValueError(f"a point is reached for the 1st, 2nd, ... time, not the {nth}th")
        self._number += 1
        standstill = Standstill(self._number, "", point)
        self.standstills[self._number] = standstill
        message = ArmFault(self._number, point, nth, -1 if cpu is None else cpu)
        for node in self._observers(point, cpu):
            self.node.endpoint.send(node, message)
        return standstill

    def _observers(self, point: str, cpu: int | None) -> list[str]:
        if POINTS[point].seen_by == SEAMLDR:
            return [SEAMLDR]
        return self.spec.cpu_nodes() if cpu is None else [f"cpu{cpu}"]

    def proceed(self, standstill: Standstill) -> None:
        """Let whoever stands still there go on, or take the point back if it was not reached."""
        if self.standstills.pop(standstill.fault, None) is None:
            return
        nodes = [standstill.node] if standstill.node else self._observers(standstill.point, None)
        for node in nodes:
            if not self.processes[node].gone.is_set():
                self.node.endpoint.send(node, Proceed(standstill.fault))

    @asynccontextmanager
    async def standing(self, point: str, *, cpu: int | None = None, nth: int = 1) -> AsyncIterator[int | None]:
        """Inside the block a process stands still at the point; gives the CPU that it concerns."""
        standstill = self.arm(point, cpu=cpu, nth=nth)
        try:
            await standstill.reached.wait()
            yield standstill.cpu
        finally:
            self.proceed(standstill)

    def _reached(self, node: str, reached: FaultReached) -> None:
        """The first to reach a point stands still; others that had the same order, and late ones, go on."""
        standstill = self.standstills.get(reached.fault)
        if standstill is None or standstill.node:
            self.node.endpoint.send(node, Proceed(reached.fault))
            return
        standstill.node = node
        standstill.cpu = None if reached.cpu < 0 else reached.cpu
        self.node.emit("fault", kind="standstill", name=node, incarnation=0, what=standstill.point)
        standstill.reached.set()

    def _proceed_all(self) -> None:
        for standstill in list(self.standstills.values()):
            self.proceed(standstill)

    # What user space does

    async def update(self, image: Path | str | None = None, *, cpu: int = 0) -> int:
        """Install a module image (version 2 file; None: the next one, made and signed on the spot).

        Returns 0 or a negative errno. Returns only when the update has ended: see `abort_update`.
        """
        return (await self.do("update", cpu, self._image_path(image))).errno

    def _image_path(self, image: Path | str | None) -> str:
        return str(self.next_image() if image is None else Path(image).absolute())

    def next_image(self) -> Path:
        """A new image file, one version up from the last."""
        raise NotImplementedError

    async def offline(self, cpu: int) -> int:
        """Take a CPU out of the online mask, as writing 0 to its `online` file does; 0 or a negative errno."""
        self.process(cpu)
        return (await self.do("offline", cpu)).errno

    async def online(self, cpu: int) -> int:
        """Take a CPU into the online mask again; 0 or a negative errno."""
        self.process(cpu)
        return (await self.do("online", cpu)).errno

    async def read_version(self, cpu: int = 0) -> str:
        """`seamldr_version`, read on a CPU; raises `OSError` with the errno if the call fails."""
        done = await self.do("read", cpu)
        if done.errno:
            raise OSError(-done.errno, "seamldr_version")
        return done.text

    async def do(self, what: str, cpu: int = 0, path: str = "") -> Done:
        """Have user space do something and wait until it has ended; raises `MachineError` if the machine broke.

        -ENXIO if the KVM process dies over it; what it had begun may go on. Raises `ValueError` if the machine has no
        such CPU.
        """
        self.process(cpu)
        self._number += 1
        request, user_space = self._number, self.process(KVM)
        self.node.endpoint.send(KVM, Do(request, what, cpu, path))
        while request not in self._done:
            if self._broken:
                raise MachineError(self._broken)
            if user_space.gone.is_set():
                return Done(request, -ENXIO, "the KVM process has died")
            await self._moved.wait()
        return self._done.pop(request)

    def abort_update(self) -> bool:
        """Give up an update that waits for a dead CPU, and take from the dead what they had locked.

        Not Linux, which would wait for ever. False if nothing is in progress that could be given up.
        """
        held = (KERNEL.stop_mutex, KERNEL.upload_mutex, KERNEL.tdx_lock, KERNEL.hotplug_writer)
        if not any(self.memory.load(word)[0] for word in held):
            return False
        self.node.emit("fault", kind="abort", name="", incarnation=0, what="the update in progress is given up")
        self._store(KERNEL.update_abort, 1)
        return True

    def leaves_out(self, cpu: int) -> int:
        """Who called the stop_machine in progress, if it waits in vain for a CPU that was replugged; else 0."""
        stop = self.memory.load(KERNEL.stop_mutex)[0]
        return 0 if self.memory.load(per_cpu(cpu).stopper_work)[0] else stop
