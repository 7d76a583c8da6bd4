"""Synthetic guests: small programs whose first VM exit is known by name.

A guest has no code in memory. Its RIP says which program it runs and how far it is: each program has a page of its
own from `ROM` on, an instruction is as long as its encoding would be, and what follows the last one is VMCALL. An
event that the guest takes through its IDT continues at IDTR.base + 16 * vector, where every instruction is VMCALL.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from . import steps
from .config import U32_MAX, Msr
from .controls import Activity, Cr0, Cr4, Efer, Entry, Exit, Pin, Primary, Rflags, Secondary
from .fields import Field, FieldType, type_of
from .lp import LogicalProcessor
from .steps import Step
from .vmcs import NO_VMCS

ROM = 0x4000_0000
IDT = 0x4800_0000
PAGE = 0x1000

_DATA_RIGHTS = 0xC093
_CODE_RIGHTS = 0xA09B
_TSS_RIGHTS = 0x008B
_UNUSABLE = 1 << 16
_LONG_EFER = Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE
_TIMER_TICKS = 1000


class UnsupportedGuest(Exception):
    """The configured processor lacks a control that this guest needs."""


class Guest(msgspec.Struct, frozen=True):
    """A program, and what it needs: control bits that are set, and fields with other values than usual."""

    program: tuple[Step, ...]
    pin: int = 0
    primary: int = 0
    secondary: int = 0
    exit: int = 0
    fields: dict[Field, int] = {}


def _intercepts(*vectors: int) -> dict[Field, int]:
    return {Field.EXCEPTION_BITMAP: sum(1 << vector for vector in vectors)}


_ALWAYS_EXIT = (
    "vmcall cpuid invd rdmsr wrmsr vmread vmwrite vmxon vmxoff vmptrld vmptrst vmclear vmlaunch vmresume invept "
    "invvpid xsetbv"
)
_ONE_INSTRUCTION = {name: Guest((getattr(steps, name.upper()),)) for name in _ALWAYS_EXIT.split()}
_IF_SET = {Field.GUEST_RFLAGS: Rflags.FIXED | Rflags.IF}
_TIMER = {Field.VMX_PREEMPTION_TIMER_VALUE: _TIMER_TICKS}

GUESTS: dict[str, Guest] = _ONE_INSTRUCTION | {
    "hlt": Guest((steps.HLT,), primary=Primary.HLT_EXITING),
    "in": Guest((steps.IN,), primary=Primary.UNCONDITIONAL_IO_EXITING),
    "out": Guest((steps.OUT,), primary=Primary.UNCONDITIONAL_IO_EXITING),
    "rdtsc": Guest((steps.RDTSC,), primary=Primary.RDTSC_EXITING),
    "rdpmc": Guest((steps.RDPMC,), primary=Primary.RDPMC_EXITING),
    "invlpg": Guest((steps.INVLPG,), primary=Primary.INVLPG_EXITING),
    "monitor": Guest((steps.MONITOR,), primary=Primary.MONITOR_EXITING),
    "mwait": Guest((steps.MWAIT,), primary=Primary.MWAIT_EXITING),
    "pause": Guest((steps.PAUSE,), primary=Primary.PAUSE_EXITING),
    "mov_cr3": Guest((steps.MOV_TO_CR3,), primary=Primary.CR3_LOAD_EXITING),
    "mov_from_cr3": Guest((steps.MOV_FROM_CR3,), primary=Primary.CR3_STORE_EXITING),
    "mov_dr": Guest((steps.MOV_DR,), primary=Primary.MOV_DR_EXITING),
    "int3": Guest((steps.INT3,), fields=_intercepts(3)),
    "ud2": Guest((steps.UD2,), fields=_intercepts(6)),
    "gp": Guest((steps.GP,), fields=_intercepts(13)),
    "pf": Guest((steps.PF,), fields=_intercepts(14)),
    "triple": Guest((steps.UD2,), fields={Field.GUEST_IDTR_LIMIT: 0}),
    "ept_read": Guest((steps.EPT_READ,), secondary=Secondary.EPT),
    "ept_write": Guest((steps.EPT_WRITE,), secondary=Secondary.EPT),
    "ept_exec": Guest((steps.EPT_EXEC,), secondary=Secondary.EPT),
    "ept_misconfig": Guest((steps.EPT_MISCONFIG,), secondary=Secondary.EPT),
    "extint": Guest((steps.INTERRUPT_ARRIVES, steps.SPIN), pin=Pin.EXTERNAL_INTERRUPT_EXITING),
    "extint_ack": Guest(
        (steps.INTERRUPT_ARRIVES, steps.SPIN), pin=Pin.EXTERNAL_INTERRUPT_EXITING, exit=Exit.ACKNOWLEDGE_INTERRUPT
    ),
    "spin_extint": Guest((steps.SPIN,), pin=Pin.EXTERNAL_INTERRUPT_EXITING),
    "spin_nmi": Guest((steps.SPIN,), pin=Pin.NMI_EXITING),
    "spin": Guest((steps.SPIN,)),
    "intr_window": Guest((steps.NOP,), primary=Primary.INTERRUPT_WINDOW_EXITING, fields=_IF_SET),
    "preempt_zero": Guest((steps.SPIN,), pin=Pin.PREEMPTION_TIMER),
    "preempt_spin": Guest((steps.SPIN,), pin=Pin.PREEMPTION_TIMER, fields=_TIMER),
    "hlt_preempt": Guest((steps.HLT,), pin=Pin.PREEMPTION_TIMER, fields=_TIMER),
    "inject_ud": Guest((steps.SPIN,), fields={Field.VMENTRY_INTR_INFO: 0x8000_0306}),
    "wait_sipi": Guest((steps.SPIN,), fields={Field.GUEST_ACTIVITY_STATE: Activity.WAIT_FOR_SIPI}),
    "two_exits": Guest((steps.CPUID, steps.VMCALL)),
    "mtf": Guest((steps.NOP, steps.NOP), primary=Primary.MONITOR_TRAP_FLAG),
}

_PAGE_OF = {name: ROM + PAGE * number for number, name in enumerate(GUESTS)}
_PROGRAMS = {_PAGE_OF[name]: guest.program for name, guest in GUESTS.items()}

DEFECTS: dict[str, Callable[[LogicalProcessor], dict[Field, int]]] = {
    "bad_pin": lambda lp: {
        Field.PIN_BASED_CONTROLS: 0 if lp.config.control_limits(Msr.IA32_VMX_PINBASED_CTLS).must else U32_MAX
    },
    "bad_host_rip": lambda lp: {Field.HOST_RIP: 0x8000_0000_0000},
    "bad_host_cr4": lambda lp: {Field.HOST_CR4: 0},
    "bad_host_tr": lambda lp: {Field.HOST_TR_SELECTOR: 0},
    "bad_guest_cr0": lambda lp: {Field.GUEST_CR0: Cr0.PG | Cr0.ET},
    "bad_guest_rip": lambda lp: {Field.GUEST_RIP: 0x8000_0000_0000_0000},
    "bad_rflags": lambda lp: {Field.GUEST_RFLAGS: 0},
    "bad_link": lambda lp: {Field.VMCS_LINK_POINTER: 1},
    "bad_activity": lambda lp: {Field.GUEST_ACTIVITY_STATE: 4},
    "bad_inject": lambda lp: {Field.VMENTRY_INTR_INFO: 0x8000_0100},
    "bad_msr_load": lambda lp: {Field.VMENTRY_MSR_LOAD_COUNT: 1, Field.VMENTRY_MSR_LOAD_ADDR: ROM},
    "bad_cr3_count": lambda lp: {Field.CR3_TARGET_COUNT: (lp.config.misc >> 16 & 0x1FF) + 1},
}


def step_at(rip: int) -> Step | None:
    """The instruction at a guest's RIP; None where no synthetic guest can be."""
    if IDT <= rip < IDT + PAGE:
        return steps.VMCALL
    offset = rip % PAGE
    program = _PROGRAMS.get(rip - offset)
    if program is None:
        return None
    for step in program:
        if offset <= 0:
            return step
        offset -= step.length
    return steps.VMCALL


def named_fields(lp: LogicalProcessor, name: str) -> dict[int, int]:
    """Every control, guest and host field of the guest or defect `name`, set up on `lp`.

    Raises KeyError for an unknown name, UnsupportedGuest if the processor cannot run this guest.
    """
    if name in DEFECTS:
        return named_fields(lp, "vmcall") | dict(DEFECTS[name](lp))
    guest = GUESTS[name]
    fields: dict[int, int] = {
        field: 0 for field in Field if type_of(field) is not FieldType.EXIT_INFORMATION
    }
    fields |= _control_fields(lp, guest) | _guest_fields(lp) | host_fields(lp)
    fields[Field.GUEST_RIP] = _PAGE_OF[name]
    return fields | dict(guest.fields)


def _control_fields(lp: LogicalProcessor, guest: Guest) -> dict[int, int]:
    primary = guest.primary | (Primary.SECONDARY_CONTROLS if guest.secondary else 0)
    wanted = (
        (Field.PIN_BASED_CONTROLS, Msr.IA32_VMX_PINBASED_CTLS, guest.pin),
        (Field.PRIMARY_PROC_CONTROLS, Msr.IA32_VMX_PROCBASED_CTLS, primary),
        (Field.SECONDARY_PROC_CONTROLS, Msr.IA32_VMX_PROCBASED_CTLS2, guest.secondary),
        (Field.PRIMARY_VMEXIT_CONTROLS, Msr.IA32_VMX_EXIT_CTLS, guest.exit | Exit.HOST_ADDRESS_SPACE_SIZE),
        (Field.VMENTRY_CONTROLS, Msr.IA32_VMX_ENTRY_CTLS, int(Entry.IA32E_MODE_GUEST)),
    )
    fields: dict[int, int] = {}
    for field, msr, bits in wanted:
        limits = lp.config.control_limits(msr)
        if bits & ~limits.may:
            raise UnsupportedGuest(f"{field.name} cannot have bits {bits & ~limits.may:#x}")
        fields[field] = limits.adjust(bits)
    if guest.secondary & Secondary.EPT:
        fields[Field.EPT_POINTER] = ROM | 3 << 3 | 6
    return fields


def _guest_fields(lp: LogicalProcessor) -> dict[int, int]:
    """A 64-bit guest at CPL 0 with flat segments."""
    fields: dict[int, int] = {
        Field.GUEST_CR0: lp.cr0_fixed.adjust(Cr0.PG | Cr0.WP | Cr0.NE | Cr0.ET | Cr0.PE),
        Field.GUEST_CR4: lp.cr4_fixed.adjust(Cr4.PAE | Cr4.VMXE),
        Field.GUEST_DR7: 0x400,
        Field.GUEST_RFLAGS: int(Rflags.FIXED),
        Field.GUEST_IA32_EFER: _LONG_EFER,
        Field.GUEST_IA32_PAT: 0x0007_0406_0007_0406,
        Field.GUEST_IDTR_BASE: IDT,
        Field.GUEST_IDTR_LIMIT: 0xFFF,
        Field.GUEST_GDTR_LIMIT: 0xFF,
        Field.VMCS_LINK_POINTER: NO_VMCS,
        Field.GUEST_CS_SELECTOR: 0x08,
        Field.GUEST_CS_ACCESS_RIGHTS: _CODE_RIGHTS,
        Field.GUEST_CS_LIMIT: U32_MAX,
        Field.GUEST_TR_SELECTOR: 0x18,
        Field.GUEST_TR_ACCESS_RIGHTS: _TSS_RIGHTS,
        Field.GUEST_TR_LIMIT: 0x67,
        Field.GUEST_LDTR_ACCESS_RIGHTS: _UNUSABLE,
    }
    for name in ("ES", "SS", "DS", "FS", "GS"):
        fields[Field[f"GUEST_{name}_SELECTOR"]] = 0x10
        fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = _DATA_RIGHTS
        fields[Field[f"GUEST_{name}_LIMIT"]] = U32_MAX
    return fields


def host_fields(lp: LogicalProcessor) -> dict[int, int]:
    """Host state that continues on `lp` as it is now."""
    return {
        Field.HOST_CR0: lp.cr0,
        Field.HOST_CR3: lp.cr3,
        Field.HOST_CR4: lp.cr4,
        Field.HOST_CS_SELECTOR: 0x08,
        Field.HOST_SS_SELECTOR: 0x10,
        Field.HOST_DS_SELECTOR: 0x10,
        Field.HOST_ES_SELECTOR: 0x10,
        Field.HOST_TR_SELECTOR: 0x18,
        Field.HOST_RIP: 0xFFFF_8000_0000_1000,
        Field.HOST_RSP: 0xFFFF_8000_0010_0000,
        Field.HOST_IA32_EFER: lp.efer,
        Field.HOST_IA32_PAT: lp.msrs[Msr.IA32_PAT],
    }
