"""What the hazards share: how one is described, and the short pieces of history that they are made of.

A hazard is a history of a few CPUs, stepped operation by operation, that shows one thing that can go wrong. It is
played in several cases, with what breaks and with what holds, and each case says which of the two it expects to see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from cpu.cpu import Cpu
from cpu.layout import BUFFERS, TDX_STATE
from kvm.stepped import Body, Stepped, module
from kvm.vmx import VmxVcpu
from seamldr.image import build_v2
from seamldr.strategies import Strategy
from seamldr.update import seamldr_install_module, seamldr_version_show
from seamldr.update_v3 import seamldr_install_module_v3

INFO_PAGE = BUFFERS + 0x10_0000
SHARED_INFO_PAGE = BUFFERS + 0x11_0000
PARAMS = BUFFERS + 0x12_0000
IMAGE_AT = BUFFERS + 0x20_0000
NESTED_PAGES = BUFFERS + 0x30_0000

A_STRATEGY = str | Strategy


class Shown(msgspec.Struct):
    """What a history came to: whether the hazard's observable is there, what was looked at, and the machine."""

    machine: Stepped
    bites: bool
    seen: Mapping[str, object]


class Case(msgspec.Struct, frozen=True):
    """One way of playing a hazard, and whether it is expected to bite."""

    label: str
    play: Callable[[], Shown]
    bites: bool


class Hazard(msgspec.Struct, frozen=True):
    """`history` is what happens, `observable` what shows it, `source` where the rule comes from that it breaks."""

    id: str
    slug: str
    history: str
    observable: str
    source: str
    cases: tuple[Case, ...]


def cases(
    play: Callable[..., Shown],
    *,
    bites: Mapping[str, Mapping[str, Any]] | None = None,
    spares: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Case, ...]:
    """The cases of one play: label to its keyword arguments, of those that it bites and of those that it spares."""
    made = [Case(label, functools.partial(play, **named), True) for label, named in (bites or {}).items()]
    made += [Case(label, functools.partial(play, **named), False) for label, named in (spares or {}).items()]
    return tuple(made)


def under(*strategies: A_STRATEGY, **named: Any) -> dict[str, dict[str, Any]]:
    """Cases that differ in the strategy alone, by its name; `named` are further arguments of each."""
    words = "".join(f", {name}={value}" for name, value in named.items())
    return {f"{name_of(strategy)}{words}": {"strategy": strategy, **named} for strategy in strategies}


def name_of(strategy: A_STRATEGY) -> str:
    """A strategy's name; of one with a mistake, its function's."""
    return strategy if isinstance(strategy, str) else getattr(strategy, "__name__", "?")


@contextmanager
def patched(where: object, name: str, replacement: object) -> Iterator[None]:
    """A kernel with one function replaced, as a mistaken patch would."""
    original = getattr(where, name)
    setattr(where, name, replacement)
    try:
        yield
    finally:
        setattr(where, name, original)


# Pieces of kernel code


async def info(cpu: Cpu) -> int:
    """Read the version of P-SEAMLDR by way of a page of this CPU; the errno."""
    return (await seamldr_version_show(cpu, INFO_PAGE + 4096 * cpu.number))[0]


def load_run_put(vcpu: VmxVcpu) -> Body:
    """One KVM_RUN of one entry; whether the vCPU can go on."""

    async def body(cpu: Cpu) -> bool:
        await vcpu.vcpu_load(cpu)
        await vcpu.vcpu_enter_guest(cpu)
        await vcpu.vcpu_put(cpu)
        return vcpu.fail_reason is None

    return body


def load_only(vcpu: VmxVcpu) -> Body:
    """Load and put, without an entry."""

    async def body(cpu: Cpu) -> None:
        await vcpu.vcpu_load(cpu)
        await vcpu.vcpu_put(cpu)

    return body


def install(machine: Stepped, image: bytes | None = None, *, v3: bool = False) -> Body:
    """User space's upload of an image (a good one of version 1.5.09 if None); the errno. `v3` checks first."""
    data = build_v2(module("1.5.09")) if image is None else image
    machine.memory.write(IMAGE_AT, data)
    pages = tuple(range(IMAGE_AT, IMAGE_AT + len(data), 4096))

    async def body(cpu: Cpu) -> int:
        if v3:
            return await seamldr_install_module_v3(cpu, pages, len(data), PARAMS, SHARED_INFO_PAGE)
        return await seamldr_install_module(cpu, pages, len(data), PARAMS)

    return body


# Who steps


def step_until(machine: Stepped, number: int, condition: Callable[[], bool], limit: int = 3000) -> None:
    """Step one CPU until something holds; raises RuntimeError if it never does."""
    for _ in range(limit):
        if condition():
            return
        machine.machine.step(number)
    raise RuntimeError(f"CPU {number} never comes to where the history wants it")


def until_in_seam(machine: Stepped, number: int) -> None:
    """Step one CPU until it is inside P-SEAMLDR."""
    step_until(machine, number, lambda: machine.seam.inside == number)


def all_until(machine: Stepped, condition: Callable[[], bool], limit: int = 10_000) -> None:
    """Step CPUs, the lowest that can first, until something holds; raises RuntimeError if it never does."""
    for _ in range(limit):
        ready = machine.machine.ready()
        if condition() or not ready:
            break
        machine.machine.step(ready[0])
    if not condition():
        raise RuntimeError("the machine never comes to where the history wants it")


def only(machine: Stepped, number: int, steps: int = 3000) -> None:
    """Step one CPU until it sleeps, as if the others had stopped for good."""
    for _ in range(steps):
        if number not in machine.machine.ready():
            return
        machine.machine.step(number)


def prefer(number: int) -> Callable[[list[int]], int]:
    """A choice of who steps: this CPU whenever it can."""
    return lambda ready: number if number in ready else ready[0]


# What to look at


def initialized(machine: Stepped) -> bool:
    """Whether the kernel believes that there is a running module."""
    return bool(machine.memory.load(TDX_STATE.initialized)[0])


def violated(machine: Stepped, *, finished: bool = True) -> list[str]:
    """Invariants that the history breaks by itself, in their order."""
    found = {v.invariant for v in machine.judge(finished=finished).violations if not v.follows_from}
    return sorted(found, key=lambda invariant: int(invariant[1:]))


def warnings(machine: Stepped) -> list[str]:
    """What the kernel warned of."""
    return [record["text"] for record in machine.events("warn")]


def failed(machine: Stepped, *events: str) -> list[str]:
    """Instructions that failed, with their results."""
    return [f"{r['event']} {r['result']}" for r in machine.events(*events) if r["result"] != "ok"]
