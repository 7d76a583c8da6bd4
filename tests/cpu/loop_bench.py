"""CPUs with a bare kernel, stepped one operation at a time, and a log of who ran in which state."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec

from bus.memory import PhysicalMemory
from cpu.core import CpuFunction, GuestExit, Kernel, SeamReply, SeamTrap
from cpu.cpu import Cpu
from cpu.layout import TASKS, per_cpu, scratch_vmcs, vmxon_region
from cpu.loop import Priority, Thread
from cpu.smp import generic_smp_call_function_single_interrupt, sysvec_reschedule_ipi
from cpu.stepped import SteppedMachine
from cpu.vmx import VmxConfig, VmxUnit

Body = Callable[[Cpu], Coroutine[Any, Any, Any]]
DEVICE, TIMER = 0x30, 0x40
KNOBS = {"seamret_launch": "preserve", "seamret_scope": "current_only"}


class Seen(msgspec.Struct, frozen=True):
    """Who ran, and the state of the CPU at that moment."""

    who: str
    irqs_on: bool
    in_nmi: bool
    preempt_count: int


class BareArbiter:
    """One queue for each lock, tokens (1, n); every SEAMCALL is admitted and answers 0."""

    def __init__(self, machine: SteppedMachine) -> None:
        self.machine = machine
        self.holder: dict[str, tuple[int, int]] = {}
        self.waiting: dict[str, deque[tuple[int, int]]] = {}
        self.releases: list[tuple[int, str, int, int]] = []
        self.levels: list[int] = []
        self.granted = 0
        self.busy = False
        machine.arbiter = self

    def lock_acquire(self, cpu: int, lock: str, level: int, request: int) -> None:
        self.levels.append(level)
        self.waiting.setdefault(lock, deque()).append((cpu, request))
        self._grant(lock)

    def lock_release(self, cpu: int, lock: str, epoch: int, number: int) -> None:
        self.releases.append((cpu, lock, epoch, number))
        del self.holder[lock]
        self._grant(lock)

    def _grant(self, lock: str) -> None:
        if lock not in self.holder and self.waiting[lock]:
            cpu, request = self.holder[lock] = self.waiting[lock].popleft()
            self.granted += 1
            self.machine.cpus[cpu].lock_granted(request, 1, self.granted)
            self.machine.asleep.discard(cpu)

    def seam_enter(self, cpu: int, request: SeamTrap) -> SeamReply | None:
        return SeamReply(False, request.rax, request.registers) if self.busy else None

    def seam_leave(self, cpu: int) -> SeamReply:
        return SeamReply(True, 0, ())


class LoopBench:
    """`cpus` CPUs, all in the online mask. `functions` can be called across CPUs; `log` is what `see` noted; `reads`
    is done by every handler besides.
    """

    def __init__(
        self, cpus: int = 1, functions: Mapping[str, CpuFunction] | None = None, reads: CpuFunction | None = None
    ) -> None:
        self.log: list[Seen] = []
        self.reads = reads
        kernel = Kernel(
            interrupts={
                DEVICE: self._handler("device"),
                TIMER: self._handler("timer"),
                0xFB: generic_smp_call_function_single_interrupt,
                0xFD: sysvec_reschedule_ipi,
            },
            nmi=self._handler("nmi"),
            functions=functions or {},
            static_calls={},
            guest=_no_guest,
            knobs=KNOBS,
            num_cpus=cpus,
        )
        self.memory = PhysicalMemory.private(TASKS + (1 << 20))
        self.machine = SteppedMachine(cpus, VmxConfig(), kernel, self.memory)
        self.arbiter = BareArbiter(self.machine)
        self.handler_steps = 1
        for number in range(cpus):
            self.memory.store(per_cpu(number).online, 1, 0)

    def _handler(self, name: str) -> CpuFunction:
        async def handler(cpu: Cpu) -> None:
            self.see(cpu, name)
            if self.reads is not None:
                await self.reads(cpu)
            for _ in range(self.handler_steps):
                await cpu.give_way()
            self.see(cpu, f"{name} end")

        return handler

    def cpu(self, number: int = 0) -> Cpu:
        """One CPU."""
        return self.machine.cpus[number]

    def see(self, cpu: Cpu, who: str) -> None:
        """Note that `who` runs now."""
        self.log.append(Seen(who, cpu.irqs_on, cpu.apic.in_nmi, cpu.preempt_count))

    def order(self) -> list[str]:
        """Who ran, in order."""
        return [seen.who for seen in self.log]

    def start(self, body: Body, number: int = 0, *, name: str = "task", priority: Priority = Priority.KERNEL) -> Thread:
        """Put a thread on a CPU."""
        thread = Thread(name, priority, body(self.cpu(number)))
        self.machine.start(number, thread)
        return thread

    def run(self, body: Body, number: int = 0) -> Any:
        """Run a thread until the whole machine sleeps; its result."""
        thread = self.start(body, number)
        self.machine.run()
        return thread.result

    def step(self, count: int = 1, number: int = 0) -> None:
        """Some operations of one CPU."""
        for _ in range(count):
            self.machine.step(number)

    def enter_vmx(self, number: int = 0) -> int:
        """VMXON, and a current VMCS; its address."""
        cpu, vmcs = self.cpu(number), scratch_vmcs(number)
        for page in (vmxon_region(number), vmcs):
            self.memory.write32(page, cpu.vmx.config.vmcs_revision_id)
        for outcome in (cpu.vmx.vmxon(vmxon_region(number)), cpu.vmx.vmclear(vmcs), cpu.vmx.vmptrld(vmcs)):
            assert outcome.ok
        return vmcs


def _no_guest(unit: VmxUnit, ended: GuestExit) -> None:
    raise AssertionError("no guest runs here")
