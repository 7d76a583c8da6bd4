"""Bits of the VM-execution, VM-exit and VM-entry controls, and of the registers that VMX looks at
(Intel SDM vol. 3C, "VM-Execution Control Fields" and the two chapters after it)."""

from __future__ import annotations

import enum


class Pin(enum.IntEnum):
    """Pin-based VM-execution controls."""

    EXTERNAL_INTERRUPT_EXITING = 1 << 0
    NMI_EXITING = 1 << 3
    VIRTUAL_NMIS = 1 << 5
    PREEMPTION_TIMER = 1 << 6
    POSTED_INTERRUPTS = 1 << 7


class Primary(enum.IntEnum):
    """Primary processor-based VM-execution controls."""

    INTERRUPT_WINDOW_EXITING = 1 << 2
    TSC_OFFSETTING = 1 << 3
    HLT_EXITING = 1 << 7
    INVLPG_EXITING = 1 << 9
    MWAIT_EXITING = 1 << 10
    RDPMC_EXITING = 1 << 11
    RDTSC_EXITING = 1 << 12
    CR3_LOAD_EXITING = 1 << 15
    CR3_STORE_EXITING = 1 << 16
    TERTIARY_CONTROLS = 1 << 17
    TPR_SHADOW = 1 << 21
    NMI_WINDOW_EXITING = 1 << 22
    MOV_DR_EXITING = 1 << 23
    UNCONDITIONAL_IO_EXITING = 1 << 24
    IO_BITMAPS = 1 << 25
    MONITOR_TRAP_FLAG = 1 << 27
    MSR_BITMAPS = 1 << 28
    MONITOR_EXITING = 1 << 29
    PAUSE_EXITING = 1 << 30
    SECONDARY_CONTROLS = 1 << 31


class Secondary(enum.IntEnum):
    """Secondary processor-based VM-execution controls."""

    VIRTUALIZE_APIC_ACCESSES = 1 << 0
    EPT = 1 << 1
    VIRTUALIZE_X2APIC = 1 << 4
    VPID = 1 << 5
    UNRESTRICTED_GUEST = 1 << 7
    APIC_REGISTERS = 1 << 8
    VIRTUAL_INTERRUPT_DELIVERY = 1 << 9
    VMCS_SHADOWING = 1 << 14
    PML = 1 << 17
    EPT_VIOLATION_VE = 1 << 18


class Exit(enum.IntEnum):
    """Primary VM-exit controls."""

    SAVE_DEBUG_CONTROLS = 1 << 2
    HOST_ADDRESS_SPACE_SIZE = 1 << 9
    LOAD_PERF_GLOBAL_CTRL = 1 << 12
    ACKNOWLEDGE_INTERRUPT = 1 << 15
    LOAD_PAT = 1 << 19
    SAVE_EFER = 1 << 20
    LOAD_EFER = 1 << 21
    SAVE_PREEMPTION_TIMER = 1 << 22
    SECONDARY_CONTROLS = 1 << 31


class Entry(enum.IntEnum):
    """VM-entry controls."""

    LOAD_DEBUG_CONTROLS = 1 << 2
    IA32E_MODE_GUEST = 1 << 9
    ENTRY_TO_SMM = 1 << 10
    DEACTIVATE_DUAL_MONITOR = 1 << 11
    LOAD_PERF_GLOBAL_CTRL = 1 << 13
    LOAD_PAT = 1 << 14
    LOAD_EFER = 1 << 15


class Activity(enum.IntEnum):
    """Activity states, of a logical processor and of a guest."""

    ACTIVE = 0
    HLT = 1
    SHUTDOWN = 2
    WAIT_FOR_SIPI = 3


class Interruptibility(enum.IntEnum):
    """Guest interruptibility state."""

    BLOCKING_BY_STI = 1 << 0
    BLOCKING_BY_MOV_SS = 1 << 1
    BLOCKING_BY_SMI = 1 << 2
    BLOCKING_BY_NMI = 1 << 3
    ENCLAVE_INTERRUPTION = 1 << 4


class EventType(enum.IntEnum):
    """Bits 10:8 of the interruption-information fields."""

    EXTERNAL_INTERRUPT = 0
    RESERVED = 1
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6
    OTHER_EVENT = 7


INTR_INFO_VALID = 1 << 31
INTR_INFO_ERROR_CODE = 1 << 11


class Cr0(enum.IntEnum):
    """CR0."""

    PE = 1 << 0
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class Cr4(enum.IntEnum):
    """CR4."""

    PAE = 1 << 5
    LA57 = 1 << 12
    VMXE = 1 << 13
    PCIDE = 1 << 17
    CET = 1 << 23


class Efer(enum.IntEnum):
    """IA32_EFER; `VALID` is every bit that is not reserved."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11
    VALID = SCE | LME | LMA | NXE


class Rflags(enum.IntEnum):
    """RFLAGS; `RESERVED` is every bit that has to be 0 beside the fixed bit 1."""

    FIXED = 1 << 1
    TF = 1 << 8
    IF = 1 << 9
    VM = 1 << 17
    RESERVED = (1 << 64) - (1 << 22) | 1 << 15 | 1 << 5 | 1 << 3


class FeatureControl(enum.IntEnum):
    """IA32_FEATURE_CONTROL; `VALID` is every bit that is not reserved."""

    LOCK = 1 << 0
    VMX_IN_SMX = 1 << 1
    VMX_OUTSIDE_SMX = 1 << 2
    VALID = 0b111 | 0xFF00 | 1 << 17 | 1 << 18 | 1 << 20
