"""What an instruction of the VMX unit reports (Intel SDM vol. 3C, "VMX Instruction Reference", conventions)."""

from __future__ import annotations

import enum

import msgspec


class Status(enum.StrEnum):
    """How an instruction ended.

    SUCCEED, FAIL_INVALID and FAIL_VALID are VMsucceed, VMfailInvalid and VMfailValid. EXCEPTION: a fault, nothing was
    done. VM_EXIT: the processor is in VMX root operation at the host's entry point.
    """

    SUCCEED = "succeed"
    FAIL_INVALID = "fail_invalid"
    FAIL_VALID = "fail_valid"
    EXCEPTION = "exception"
    VM_EXIT = "vm_exit"


class Vector(enum.IntEnum):
    """Exception and interrupt vectors below 32 that VMX knows by number."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    UD = 6
    DF = 8
    GP = 13
    PF = 14


class ExitInfo(msgspec.Struct, frozen=True):
    """Exit-information fields as the exit left them in the VMCS; `activity` is the saved guest activity state."""

    reason: int
    qualification: int = 0
    instruction_length: int = 0
    intr_info: int = 0
    activity: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """Result of one instruction: `error` is the VM-instruction error of FAIL_VALID, `value` the u64 that was read,
    `vector` the exception of EXCEPTION, `exit` the details of VM_EXIT."""

    status: Status
    error: int = 0
    value: int = 0
    vector: int = 0
    exit: ExitInfo | None = None

    @property
    def ok(self) -> bool:
        """VMsucceed."""
        return self.status is Status.SUCCEED


SUCCEED = Outcome(Status.SUCCEED)
FAIL_INVALID = Outcome(Status.FAIL_INVALID)
UNDEFINED_OPCODE = Outcome(Status.EXCEPTION, vector=Vector.UD)
GENERAL_PROTECTION = Outcome(Status.EXCEPTION, vector=Vector.GP)
PAGE_FAULT = Outcome(Status.EXCEPTION, vector=Vector.PF)
FAIL_VALID = tuple(Outcome(Status.FAIL_VALID, error=number) for number in range(29))
