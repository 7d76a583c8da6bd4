"""What a synthetic guest executes: instructions by what they can cause (Intel SDM vol. 3C, "Instructions That Cause
VM Exits").
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from .controls import INTR_INFO_ERROR_CODE, INTR_INFO_VALID, Activity, EventType, Pin, Primary, Rflags, Secondary
from .errors import ExitReason
from .exit import VmExit, window_exit
from .fields import Field
from .outcome import Outcome, Vector
from .registers import msr_intercepted
from .unit import VmxUnit
from .vmcs import Vmcs

DATA = 0x5000_0000
"""Linear address, and guest-physical address, of the memory that the guests access."""

_IO_PORT = 0x80
_TSC_MSR = 0x10
_STEPS_LIMIT = 10_000
_IDT_ENTRY = 16


class Step(msgspec.Struct, frozen=True):
    """One instruction of `length` bytes.

    If it can exit: the reason, the qualification, whether the exit reports the length, and the test that says whether
    it exits. If it faults: the vector, the event type, the error code or None. `interrupt`: an external interrupt
    arrives. `spins`: the guest stays here. `halts`: it is HLT.
    """

    length: int
    reason: ExitReason | None = None
    exits: Callable[[VmxUnit], bool] = lambda unit: True
    qualification: int = 0
    reports_length: bool = True
    vector: int | None = None
    kind: EventType = EventType.HARDWARE_EXCEPTION
    error_code: int | None = None
    interrupt: bool = False
    spins: bool = False
    halts: bool = False


def _primary(control: int) -> Callable[[VmxUnit], bool]:
    return lambda unit: unit.guest_read(Field.PRIMARY_PROC_CONTROLS) & control != 0


def _port_exits(unit: VmxUnit) -> bool:
    primary = unit.guest_read(Field.PRIMARY_PROC_CONTROLS)
    if not primary & Primary.IO_BITMAPS:
        return primary & Primary.UNCONDITIONAL_IO_EXITING != 0
    bitmap = unit.memory.read(unit.guest_read(Field.IO_BITMAP_A_ADDR) + _IO_PORT // 8, 1)
    return bitmap[0] >> _IO_PORT % 8 & 1 == 1


def _ept_on(unit: VmxUnit) -> bool:
    secondary = unit.guest_read(Field.PRIMARY_PROC_CONTROLS) & Primary.SECONDARY_CONTROLS
    return secondary != 0 and unit.guest_read(Field.SECONDARY_PROC_CONTROLS) & Secondary.EPT != 0


def _ept(qualification: int, reason: ExitReason = ExitReason.EPT_VIOLATION) -> Step:
    return Step(3, reason, _ept_on, qualification, reports_length=False)


VMCALL = Step(3, ExitReason.VMCALL)
CPUID = Step(2, ExitReason.CPUID)
INVD = Step(2, ExitReason.INVD)
XSETBV = Step(3, ExitReason.XSETBV)
RDMSR = Step(2, ExitReason.RDMSR, lambda unit: msr_intercepted(unit, _TSC_MSR, 0))
WRMSR = Step(2, ExitReason.WRMSR, lambda unit: msr_intercepted(unit, _TSC_MSR, 2048))
VMREAD = Step(3, ExitReason.VMREAD)
VMWRITE = Step(3, ExitReason.VMWRITE)
VMXON = Step(4, ExitReason.VMXON)
VMXOFF = Step(3, ExitReason.VMXOFF)
VMPTRLD = Step(3, ExitReason.VMPTRLD)
VMPTRST = Step(3, ExitReason.VMPTRST)
VMCLEAR = Step(4, ExitReason.VMCLEAR)
VMLAUNCH = Step(3, ExitReason.VMLAUNCH)
VMRESUME = Step(3, ExitReason.VMRESUME)
INVEPT = Step(5, ExitReason.INVEPT)
INVVPID = Step(5, ExitReason.INVVPID)
HLT = Step(1, ExitReason.HLT, _primary(Primary.HLT_EXITING), halts=True)
IN = Step(2, ExitReason.IO_INSTRUCTION, _port_exits, _IO_PORT << 16 | 1 << 6 | 1 << 3)
OUT = Step(2, ExitReason.IO_INSTRUCTION, _port_exits, _IO_PORT << 16 | 1 << 6)
RDTSC = Step(2, ExitReason.RDTSC, _primary(Primary.RDTSC_EXITING))
RDPMC = Step(2, ExitReason.RDPMC, _primary(Primary.RDPMC_EXITING))
INVLPG = Step(3, ExitReason.INVLPG, _primary(Primary.INVLPG_EXITING), DATA)
MONITOR = Step(3, ExitReason.MONITOR, _primary(Primary.MONITOR_EXITING))
MWAIT = Step(3, ExitReason.MWAIT, _primary(Primary.MWAIT_EXITING))
PAUSE = Step(2, ExitReason.PAUSE, _primary(Primary.PAUSE_EXITING))
MOV_TO_CR3 = Step(3, ExitReason.CONTROL_REGISTER, _primary(Primary.CR3_LOAD_EXITING), 3)
MOV_FROM_CR3 = Step(3, ExitReason.CONTROL_REGISTER, _primary(Primary.CR3_STORE_EXITING), 1 << 4 | 3)
MOV_DR = Step(3, ExitReason.MOV_DR, _primary(Primary.MOV_DR_EXITING), 7)
EPT_READ = _ept(0x181)
EPT_WRITE = _ept(0x182)
EPT_EXEC = _ept(0x184)
EPT_MISCONFIG = _ept(0, ExitReason.EPT_MISCONFIGURATION)
INT3 = Step(1, vector=Vector.BP, kind=EventType.SOFTWARE_EXCEPTION)
UD2 = Step(2, vector=Vector.UD)
GP = Step(3, vector=Vector.GP, error_code=0)
PF = Step(3, vector=Vector.PF, error_code=0)
NOP = Step(1)
SPIN = Step(2, spins=True)
INTERRUPT_ARRIVES = Step(1, interrupt=True)


class NoGuest(Exception):
    """The guest's RIP is where no synthetic guest has code."""


def run_guest(
    unit: VmxUnit, step_at: Callable[[int], Step | None], interrupt: Callable[[], Outcome | None]
) -> Outcome | None:
    """Let the guest execute until its VM exit; None: it spins or sleeps until something arrives.

    `interrupt` is called when an external interrupt arrives on this processor, and returns the exit it causes. Time
    passes only for a guest that waits, so that a preemption timer ends a wait and nothing else.
    Raises NoGuest.
    """
    vmcs = unit.require_current()
    for _ in range(_STEPS_LIMIT):
        if vmcs[Field.GUEST_ACTIVITY_STATE] != Activity.ACTIVE:
            return _time_passes(unit, vmcs)
        step = step_at(vmcs[Field.GUEST_RIP])
        if step is None:
            raise NoGuest(f"no synthetic guest at RIP {vmcs[Field.GUEST_RIP]:#x}")
        if step.spins:
            return _time_passes(unit, vmcs)
        outcome = _execute(unit, vmcs, step) or (interrupt() if step.interrupt else None)
        if outcome is not None:
            return outcome
        vmcs[Field.GUEST_INTERRUPTIBILITY_STATE] &= ~0b11
        if vmcs[Field.PRIMARY_PROC_CONTROLS] & Primary.MONITOR_TRAP_FLAG:
            return unit.vm_exit(ExitReason.MONITOR_TRAP_FLAG)
        if reason := window_exit(vmcs):
            return unit.vm_exit(reason)
    return None


def _time_passes(unit: VmxUnit, vmcs: Vmcs) -> Outcome | None:
    waits_for_sipi = vmcs[Field.GUEST_ACTIVITY_STATE] == Activity.WAIT_FOR_SIPI
    if waits_for_sipi or not vmcs[Field.PIN_BASED_CONTROLS] & Pin.PREEMPTION_TIMER:
        return None
    return unit.vm_exit(ExitReason.PREEMPTION_TIMER)


def _execute(unit: VmxUnit, vmcs: Vmcs, step: Step) -> Outcome | None:
    if step.vector is not None:
        return _fault(unit, vmcs, step.vector, step)
    if step.reason is not None and step.exits(unit):
        in_memory = DATA if step.reason in (ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION) else None
        return unit.vm_exit(
            step.reason,
            step.qualification,
            step.length if step.reports_length else 0,
            details=VmExit(guest_linear=in_memory, guest_physical=in_memory) if in_memory else None,
        )
    vmcs[Field.GUEST_RIP] += step.length
    if step.halts:
        vmcs[Field.GUEST_ACTIVITY_STATE] = Activity.HLT
    return None


def _fault(unit: VmxUnit, vmcs: Vmcs, vector: int, step: Step) -> Outcome | None:
    info = INTR_INFO_VALID | step.kind << 8 | vector
    if step.error_code is not None:
        info |= INTR_INFO_ERROR_CODE
    if not _intercepted(vmcs, vector, step.error_code or 0):
        return deliver(unit, info)
    return unit.vm_exit(
        ExitReason.EXCEPTION_OR_NMI,
        DATA if vector == Vector.PF else 0,
        step.length if step.kind is EventType.SOFTWARE_EXCEPTION else 0,
        info,
        VmExit(error_code=step.error_code or 0),
    )


def _intercepted(vmcs: Vmcs, vector: int, error_code: int) -> bool:
    wanted = vmcs[Field.EXCEPTION_BITMAP] >> vector & 1 == 1
    if vector != Vector.PF:
        return wanted
    matches = error_code & vmcs[Field.PF_ERROR_CODE_MASK] == vmcs[Field.PF_ERROR_CODE_MATCH]
    return wanted == matches


def deliver(unit: VmxUnit, info: int) -> Outcome | None:
    """The guest takes an event, given as interruption information, through its IDT.

    Without a gate for it: #GP, double fault, triple fault, the first of them that exits.
    """
    vmcs = unit.require_current()
    vector = info & 0xFF
    if vmcs[Field.GUEST_IDTR_LIMIT] < _IDT_ENTRY * vector + _IDT_ENTRY - 1:
        return _no_gate(unit, vmcs, info)
    vmcs[Field.GUEST_RIP] = vmcs[Field.GUEST_IDTR_BASE] + _IDT_ENTRY * vector
    vmcs[Field.GUEST_RFLAGS] &= ~(Rflags.IF | Rflags.TF)
    vmcs[Field.GUEST_ACTIVITY_STATE] = Activity.ACTIVE
    return None


def _no_gate(unit: VmxUnit, vmcs: Vmcs, info: int) -> Outcome:
    for vector in (Vector.GP, Vector.DF):
        if vmcs[Field.EXCEPTION_BITMAP] >> vector & 1:
            exception = INTR_INFO_VALID | INTR_INFO_ERROR_CODE | EventType.HARDWARE_EXCEPTION << 8 | vector
            details = VmExit(idt_vectoring=info)
            return unit.vm_exit(ExitReason.EXCEPTION_OR_NMI, intr_info=exception, details=details)
    return unit.vm_exit(ExitReason.TRIPLE_FAULT)
