"""A machine of a few CPUs stepped in one process, with firmware, a loaded module and helpers to run kernel code on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from bus.memory import PhysicalMemory
from cpu.core import GuestExit
from cpu.cpu import Cpu
from cpu.layout import BUFFERS, TDX_STATE, memory_size, task_vmcs
from cpu.loop import Priority, Thread
from cpu.stepped import SteppedMachine
from cpu.stop_machine import cpu_stopper_thread
from kvm.compose import Knobs, kernel, vmx_config
from kvm.hardware import cpu_up
from kvm.vcpu import vcpu_of
from kvm.vmx import VmxVcpu
from seamldr.arbiter import SteppedArbiter
from seamldr.identity import make_identity
from seamldr.image import ModuleImage
from seamldr.module_maker import make_module
from seamldr.seam import SeamSide, platform_of
from seamldr.sigstruct import SigStruct, new_key, signer_hash
from seamldr.update import version_word

Body = Callable[[Cpu], Coroutine[Any, Any, Any]]


@functools.cache
def signing_key() -> rsa.RSAPrivateKey:
    """One key for all tests of a session."""
    return new_key()


@functools.cache
def module(version: str) -> ModuleImage:
    """A signed module."""
    return make_module(make_identity(version), key=signing_key())


class Stepped:
    """Machine, arbiter and SEAM side, with every CPU up and its stopper asleep."""

    def __init__(self, strategy: str, *, cpus: int = 1, tds: int = 0, **knobs: Any) -> None:
        settings = Knobs(**knobs)
        memory = PhysicalMemory.private(memory_size(cpus))
        trusted = signer_hash(SigStruct.decode(module("1.5.08").sigstruct))
        platform = platform_of(cpus, settings.fms, settings.seamldr_profile, settings.seamdb_size, (trusted,))
        self.seam = SeamSide(platform, memory)
        self.seam.load(module("1.5.08"), BUFFERS)
        self.seam.boot_module()
        self.tds = self.seam.build_tds(tds)
        config = vmx_config(settings)
        self.machine = SteppedMachine(cpus, config, kernel(strategy, settings, cpus), memory)
        self.arbiter = SteppedArbiter(self.machine, self.seam)
        memory.store(TDX_STATE.initialized, 1, 0)
        memory.store(TDX_STATE.version, version_word(1, 5, 8), 0)
        for number in range(cpus):
            self.run(cpu_up, number)
            stopper = cpu_stopper_thread(self.machine.cpus[number])
            self.machine.start(number, Thread(f"migration/{number}", Priority.STOPPER, stopper))
        self.machine.run()
        self.machine.records.clear()

    @property
    def memory(self) -> PhysicalMemory:
        """Physical memory."""
        return self.machine.memory

    def cpu(self, number: int = 0) -> Cpu:
        """One CPU."""
        return self.machine.cpus[number]

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


__all__ = ["GuestExit", "Stepped", "module", "signing_key"]
