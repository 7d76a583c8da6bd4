"""What the tests of hazards share: short histories of one or two CPUs, and strategies that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepping import Stepped, module

from cpu.core import SeamReply
from cpu.cpu import Cpu
from cpu.layout import BUFFERS, KERNEL, TDX_STATE
from kvm.vmx import VmxVcpu
from seamldr.image import build_v2
from seamldr.update import seamldr_install_module, seamldr_version_show

INFO_PAGE = BUFFERS + 0x10_0000
IMAGE_AT = BUFFERS + 0x20_0000
PARAMS = BUFFERS + 0x12_0000


async def info(cpu: Cpu) -> int:
    """Read the version of P-SEAMLDR into a page of this CPU; the errno."""
    return (await seamldr_version_show(cpu, INFO_PAGE + 4096 * cpu.number))[0]


def load_run_put(vcpu: VmxVcpu) -> Callable[[Cpu], Any]:
    """One KVM_RUN of one entry; whether the vCPU can go on."""

    async def body(cpu: Cpu) -> bool:
        await vcpu.vcpu_load(cpu)
        await vcpu.vcpu_enter_guest(cpu)
        await vcpu.vcpu_put(cpu)
        return vcpu.fail_reason is None

    return body


def load_only(vcpu: VmxVcpu) -> Callable[[Cpu], Any]:
    """Load and put, without an entry."""

    async def body(cpu: Cpu) -> None:
        await vcpu.vcpu_load(cpu)
        await vcpu.vcpu_put(cpu)

    return body


def install(machine: Stepped, image: bytes | None = None) -> Callable[[Cpu], Any]:
    """User space's upload of an image (a good one of version 1.5.09 if None); the errno."""
    data = build_v2(module("1.5.09")) if image is None else image
    machine.memory.write(IMAGE_AT, data)
    pages = tuple(range(IMAGE_AT, IMAGE_AT + len(data), 4096))

    async def body(cpu: Cpu) -> int:
        return await seamldr_install_module(cpu, pages, len(data), PARAMS)

    return body


def initialized(machine: Stepped) -> int:
    """Whether the kernel believes that there is a running module."""
    return machine.memory.load(TDX_STATE.initialized)[0]


def kvm_unloaded(machine: Stepped) -> int:
    """Whether KVM is gone."""
    return machine.memory.load(KERNEL.kvm_unloaded)[0]


def step_until(machine: Stepped, number: int, condition: Callable[[], bool], limit: int = 2000) -> None:
    """Step one CPU until something holds; fails if it never does."""
    for _ in range(limit):
        if condition():
            return
        machine.machine.step(number)
    raise AssertionError("it never happens")


def until_in_seam(machine: Stepped, number: int) -> None:
    """Step one CPU until it is inside P-SEAMLDR."""
    step_until(machine, number, lambda: machine.seam.inside == number)


def prefer(number: int) -> Callable[[list[int]], int]:
    """A choice of who steps: this CPU whenever it can."""
    return lambda ready: number if number in ready else ready[0]


def answer_first(machine: Stepped, statuses: list[int]) -> None:
    """The next SEAMCALLs that are entered bring these statuses, whatever SEAM has to say."""
    leave, waiting = machine.arbiter.seam_leave, iter(statuses)

    def answer(cpu: int) -> SeamReply:
        reply = leave(cpu)
        return SeamReply(True, next(waiting, reply.rax), reply.registers)

    machine.arbiter.seam_leave = answer  # type: ignore[method-assign]


def violated(machine: Stepped, *, finished: bool = True) -> set[str]:
    """Invariants that the history breaks."""
    return {violation.invariant for violation in machine.judge(finished=finished).violations}


def warnings(machine: Stepped) -> list[str]:
    """What the kernel warned of."""
    return [record["text"] for record in machine.events("warn")]


def failed(machine: Stepped, *events: str) -> list[tuple[str, str]]:
    """Instructions that failed, with their results."""
    return [(r["event"], r["result"]) for r in machine.events(*events) if r["result"] != "ok"]
