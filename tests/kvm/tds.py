"""What the tests of TD builds share: the steps of a build on stepped machines, images with a chosen crypto library."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from hazards import install
from stepping import Stepped, signing_key

from cpu.cpu import Cpu
from cpu.layout import BUFFERS
from kvm.td_build import tdx_td_finalize, tdx_td_init, tdx_vcpu_init, tdx_vcpu_init_mem_region
from kvm.td_destroy import tdx_vm_destroy
from kvm.tdx import VmxTdVcpu
from kvm.vcpu import td_vcpu_of
from seamldr.identity import make_identity
from seamldr.image import build_v2
from seamldr.module_maker import make_module

PARAMS = BUFFERS + 0x30_0000
SOURCE = BUFFERS + 0x31_0000
TASK = 100
"""Task number of the first TD's vCPU."""
CONTENT = b"".join(hashlib.sha256(number.to_bytes(2, "little")).digest() for number in range(128))
"""A page that a TD starts with."""

Step = Callable[[Cpu], Any]


def build_steps(machine: Stepped, td: int = 0) -> dict[str, Step]:
    """The ioctls of a TD with one vCPU and one page."""
    machine.memory.write(SOURCE, CONTENT)
    return {
        "init": lambda cpu: tdx_td_init(cpu, td, PARAMS + 4096 * td),
        "vcpu": lambda cpu: tdx_vcpu_init(cpu, td, TASK + td),
        "memory": lambda cpu: tdx_vcpu_init_mem_region(cpu, td, 0, (SOURCE,)),
        "finalize": lambda cpu: tdx_td_finalize(cpu, td),
    }


def build(machine: Stepped, td: int = 0, cpu: int = 0) -> None:
    """The whole build, on one CPU."""
    for name, step in build_steps(machine, td).items():
        assert machine.run(step, cpu) == 0, name


def run_td(td: int = 0) -> Step:
    """KVM_RUN of the TD's vCPU; whether it can go on."""

    async def body(cpu: Cpu) -> bool:
        return await VmxTdVcpu(TASK + td, td_vcpu_of(TASK + td)).run(cpu)

    return body


def destroy(td: int = 0) -> Step:
    """The end of the VM; whether nothing leaked."""
    return lambda cpu: tdx_vm_destroy(cpu, td)


@functools.cache
def image(version: str, profile: Literal["A", "B"] = "B", crypto: int = 1, **fields: Any) -> bytes:
    """A module image with this crypto library; `fields` change its identity."""
    identity = msgspec.structs.replace(make_identity(version, profile), crypto_version=crypto, **fields)
    return build_v2(make_module(identity, key=signing_key()))


def update(machine: Stepped, data: bytes, cpu: int = 0) -> int:
    """Install an image; the errno."""
    errno: int = machine.run(install(machine, data), cpu)
    return errno


def expected_mrtd() -> bytes:
    """The measurement of a TD with CONTENT at guest-physical address 0, by a computation of its own."""
    context = bytes(48)
    chunks = [(0x100 * index, CONTENT[0x100 * index : 0x100 * index + 0x100]) for index in range(16)]
    steps = [b"MEM.PAGE.ADD" + bytes(8), *(b"MR.EXTEND" + at.to_bytes(8, "little") + data for at, data in chunks)]
    for step in [*steps, b"MR.FINALIZE"]:
        context = hashlib.sha384(context + step).digest()
    return context
