"""A whole machine of a few CPUs, stepped in one process: firmware, a running TDX module, helpers to run kernel code.

What the live machine does with processes is done here by plain calls; who steps next is decided by whoever drives it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa

from bus.judge import Judgement, judge_records
from bus.memory import PhysicalMemory
from bus.records import Record
from cpu.cpu import Cpu
from cpu.layout import BUFFERS, TDX_STATE, memory_size, per_cpu, task_vmcs
from cpu.loop import Priority, Thread
from cpu.stepped import SteppedMachine
from cpu.stop_machine import cpu_stopper_thread
from kvm.compose import Knobs, kernel, vmx_config
from kvm.hardware import cpu_up
from kvm.hotplug import cpuhp_thread
from kvm.run_queue import (
    dequeue_task,
    enqueue_task,
    is_active,
    on_its_way_to,
    place_word,
    select_fallback_rq,
)
from kvm.vcpu import vcpu_of
from kvm.vmx import VmxVcpu, vcpu_thread
from seamldr.arbiter import SteppedArbiter
from seamldr.firmware import tell_sysinfo
from seamldr.identity import make_identity
from seamldr.image import ModuleImage
from seamldr.module_maker import make_module
from seamldr.seam import SeamSide, platform_of
from seamldr.sigstruct import SigStruct, new_key, signer_hash
from seamldr.strategies import Strategy
from seamldr.update import version_word

TASKS_AT_MOST = 16
UP = "up"

Body = Callable[[Cpu], Coroutine[Any, Any, Any]]


@functools.cache
def signing_key() -> rsa.RSAPrivateKey:
    """One key for all machines of a process."""
    return new_key()


@functools.cache
def module(version: str, profile: Literal["A", "B"] = "A") -> ModuleImage:
    """A signed module."""
    return make_module(make_identity(version, profile), key=signing_key())


def _killed(number: int) -> dict[str, Any]:
    return {"name": f"cpu{number}", "status": -9, "wanted": 0}


class Stepped:
    """Machine, arbiter and SEAM side, with every CPU up and its stopper asleep."""

    def __init__(self, strategy: str | Strategy, *, cpus: int = 1, tds: int = 0, **knobs: Any) -> None:
        settings = Knobs(**knobs)
        self._exits: list[Record] = []
        self._tasks: set[Thread] = set()
        knob_values = msgspec.structs.asdict(settings)
        self.described = {"strategy": str(strategy), "knobs": knob_values, "cpus": cpus, "tds": tds}
        memory = PhysicalMemory.private(memory_size(cpus))
        image = module("1.5.08", "B" if settings.module_profile == "B" else "A")
        trusted = signer_hash(SigStruct.decode(image.sigstruct))
        platform = platform_of(cpus, settings.fms, settings.seamldr_profile, settings.seamdb_size, (trusted,))
        self.seam = SeamSide(platform, memory)
        self.seam.load(image, BUFFERS)
        self.seam.boot_module()
        self.tds = self.seam.build_tds(tds)
        config = vmx_config(settings)
        self.machine = SteppedMachine(cpus, config, kernel(strategy, settings, cpus), memory)
        self.arbiter = SteppedArbiter(self.machine, self.seam)
        memory.store(TDX_STATE.initialized, 1, 0)
        memory.store(TDX_STATE.version, version_word(1, 5, 8), 0)
        assert self.seam.module is not None
        tell_sysinfo(memory, self.seam.module, tds)
        self.machine.on_ended = self._thread_ended
        for number in range(cpus):
            self.run(cpu_up, number, UP)
        self.machine.records.clear()

    @property
    def memory(self) -> PhysicalMemory:
        """Physical memory."""
        return self.machine.memory

    def cpu(self, number: int = 0) -> Cpu:
        """One CPU."""
        return self.machine.cpus[number]

    def _start_threads(self, number: int) -> None:
        cpu = self.machine.cpus[number]
        self.machine.start(number, Thread(f"migration/{number}", Priority.STOPPER, cpu_stopper_thread(cpu)))
        self.machine.start(number, Thread(f"cpuhp/{number}", Priority.KERNEL, cpuhp_thread(cpu)))

    def kill(self, number: int) -> None:
        """The process of a CPU dies where it is: the launcher says so in memory, the lock service hears of it."""
        self.machine.kill(number)
        alive = min(set(range(len(self.machine.cpus))) - self.machine.dead)
        self.arbiter.dead(number, alive)
        self._exits.append(self._launcher(self.machine.cpus[alive].clock.now, "process_exit", **_killed(number)))

    def replug(self, number: int) -> Thread:
        """A new process for a dead CPU begins to come up; the launcher says so in memory when it has."""
        self.machine.bear(number)
        return self.start(functools.partial(cpu_up, vcpus=TASKS_AT_MOST), number, UP)

    def run_task(self, task: int, number: int) -> Thread | None:
        """Put a vCPU thread on a CPU's run queue; None if it is not on its way there."""
        cpu = self.machine.cpus[number]
        if not enqueue_task(cpu, task):
            return None
        body = vcpu_thread(cpu, VmxVcpu(task, vcpu_of(task)), task_vmcs(task))
        thread = Thread(f"vcpu{task}", Priority.VCPU, body, task=task, slice_exits=3)
        self._tasks.add(thread)
        self.machine.start(number, thread)
        return thread

    def send_task(self, task: int, number: int) -> Thread | None:
        """User space puts a new task on a CPU."""
        self.memory.store(place_word(task), on_its_way_to(number), 0)
        return self.run_task(task, number)

    def _thread_ended(self, number: int, thread: Thread) -> None:
        """As the shell of a live CPU: a CPU that came up gets its threads, a task that moves goes on elsewhere."""
        cpu = self.machine.cpus[number]
        if thread.name == UP:
            self._start_threads(number)
            self.memory.store(per_cpu(number).dead, 0, cpu.clock.now)
        if thread not in self._tasks:
            return
        self._tasks.remove(thread)
        to = thread.move_to if thread.result == "moved" else None
        if to is not None and not is_active(cpu, to):
            to = select_fallback_rq(cpu)
        assert thread.task is not None
        dequeue_task(cpu, thread.task, to)
        if to is not None:
            self.machine.cpus[to].clock.merge(cpu.clock.now)
            self.run_task(thread.task, to)

    def start(self, body: Body, number: int = 0, name: str = "task") -> Thread:
        """Put kernel code on a CPU as a thread."""
        thread = Thread(name, Priority.KERNEL, body(self.machine.cpus[number]))
        self.machine.start(number, thread)
        return thread

    def run(self, body: Body, number: int = 0, name: str = "task") -> Any:
        """Run kernel code on a CPU until the whole machine sleeps; its result."""
        thread = self.start(body, number, name)
        self.machine.run()
        return thread.result

    def new_vcpu(self, task: int, number: int = 0) -> VmxVcpu:
        """A created vCPU that is loaded nowhere."""
        vcpu = VmxVcpu(task, vcpu_of(task))

        async def create(cpu: Cpu) -> None:
            await vcpu.create(cpu, task_vmcs(task))
            await cpu.static_call("loaded_vmcs_clear_current")

        self.run(create, number)
        return vcpu

    def events(self, *names: str, cpu: int | None = None) -> list[dict[str, Any]]:
        """Records by event name."""
        nodes = None if cpu is None else f"cpu{cpu}"
        return [r for r in self.machine.records if r["event"] in names and nodes in (None, r["node"])]

    def count(self, event: str, **fields: Any) -> int:
        """How many records of an event have these fields."""
        return sum(all(r.get(k) == v for k, v in fields.items()) for r in self.events(event))

    def judge(self, *, finished: bool = True) -> Judgement:
        """The records so far, held against every invariant, as those of a run that has come to its end here."""
        begin = self._launcher(0, "machine_begin", **self.described, seed=0, vcpus=0, updates=0)
        last = max(cpu.clock.now for cpu in self.machine.cpus) + 1
        end = self._launcher(last, "machine_end", finished=int(finished), why="")
        seen: Counter[str] = Counter()
        numbered = []
        for record in [*self.machine.records, *self._exits, end]:
            seen[record["node"]] += 1
            numbered.append(record | {"seq": seen[record["node"]] + (record["node"] == "launcher")})
        return judge_records([begin, *numbered])

    def _launcher(self, clock: int, event: str, **fields: Any) -> Record:
        head = {"ts": self.machine.steps, "clock": clock, "node": "launcher", "pid": 1, "seq": 1}
        return head | {"event": event} | fields
