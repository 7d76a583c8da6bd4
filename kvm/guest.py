"""The synthetic guest: what it does between a VM entry and the VM exit that ends it.

Its whole state is two registers in the VMCS. A run that is not interrupted moves both by a fixed rule and ends in an
instruction that exits; KVM knows the rule, so that a lost or stale VMCS shows as wrong data, not only as a failed
instruction.
"""

from __future__ import annotations

from cpu.core import GuestExit
from cpu.vmx import Field, VmxUnit

TEXT = 0x40_0000
TEXT_SIZE = 1 << 20
STACK = 0x7F00_0000_0000
STACK_SIZE = 1 << 30
INSTRUCTIONS = 16
"""Bytes of guest code from one exiting instruction to the next."""

EXIT_REASON_EXCEPTION_NMI = 0
EXIT_REASON_EXTERNAL_INTERRUPT = 1
_EXITS = ((10, 2), (18, 3), (31, 2), (30, 1))
"""(basic exit reason, instruction length): CPUID, VMCALL, RDMSR, OUT."""


def guest_step(rip: int, rsp: int) -> tuple[int, int]:
    """RIP and RSP at the guest's next exiting instruction.

    >>> rip, rsp = guest_step(TEXT, STACK)
    >>> hex(rip), STACK <= rsp < STACK + STACK_SIZE
    ('0x400010', True)
    """
    rip = TEXT + (rip - TEXT + INSTRUCTIONS) % TEXT_SIZE
    rsp = STACK + ((rsp - STACK) * 1_103_515_245 + rip) % STACK_SIZE
    return rip, rsp & ~0xF


def next_rip(rip: int, length: int) -> int:
    """RIP after KVM has emulated an exiting instruction of `length` bytes."""
    return TEXT + (rip - TEXT + length) % TEXT_SIZE


def exit_of(rip: int) -> tuple[int, int]:
    """The exit that the instruction at `rip` causes: basic reason and instruction length."""
    return _EXITS[(rip >> 4) % len(_EXITS)]


def run_guest(unit: VmxUnit, ended: GuestExit) -> None:
    """Between entry and exit of the VMCS that is current. An interrupted run has not moved the guest."""
    if ended.nmi:
        unit.vm_exit(EXIT_REASON_EXCEPTION_NMI, intr_info=0x8000_0202)
    elif ended.vector:
        unit.vm_exit(EXIT_REASON_EXTERNAL_INTERRUPT, intr_info=0x8000_0000 | ended.vector)
    else:
        rip, rsp = guest_step(unit.guest_read(Field.GUEST_RIP), unit.guest_read(Field.GUEST_RSP))
        unit.guest_write(Field.GUEST_RIP, rip)
        unit.guest_write(Field.GUEST_RSP, rsp)
        reason, length = exit_of(rip)
        unit.vm_exit(reason, instruction_length=length)
