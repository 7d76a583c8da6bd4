"""VM exits: exit information and guest state into the VMCS, host state into the processor (Intel SDM vol. 3C, "VM
Exits"). A synthetic guest keeps its state in the guest-state fields, so that there is nothing to save there."""

from __future__ import annotations

from operator import itemgetter

import msgspec

from .config import Msr
from .controls import INTR_INFO_VALID, Activity, Cr0, Efer, EventType, Exit, Pin, Primary, Rflags
from .errors import ENTRY_FAILURE, AbortIndicator, ExitReason
from .fields import Field
from .lp import CodeMode, LogicalProcessor
from .msrlist import load_msrs, store_msrs
from .outcome import ExitInfo, Outcome, Status, Vector
from .vmcs import ABORT_OFFSET, SLOT, Vmcs

NMI_EXIT_INFO = INTR_INFO_VALID | EventType.NMI << 8 | Vector.NMI

_REASON = SLOT[Field.EXIT_REASON]
_QUALIFICATION = SLOT[Field.EXIT_QUALIFICATION]
_INTR_INFO = SLOT[Field.EXIT_INTR_INFO]
_INTR_ERROR = SLOT[Field.EXIT_INTR_ERROR_CODE]
_IDT_INFO = SLOT[Field.IDT_VECTORING_INFO]
_IDT_ERROR = SLOT[Field.IDT_VECTORING_ERROR_CODE]
_LENGTH = SLOT[Field.EXIT_INSTRUCTION_LENGTH]
_INSTRUCTION_INFO = SLOT[Field.EXIT_INSTRUCTION_INFO]
_ENTRY_INTR_INFO = SLOT[Field.VMENTRY_INTR_INFO]
_ACTIVITY = SLOT[Field.GUEST_ACTIVITY_STATE]
_STORE_COUNT = SLOT[Field.VMEXIT_MSR_STORE_COUNT]
_entry_state = itemgetter(
    *(
        SLOT[field]
        for field in (
            Field.PIN_BASED_CONTROLS,
            Field.PRIMARY_PROC_CONTROLS,
            Field.GUEST_ACTIVITY_STATE,
            Field.VMX_PREEMPTION_TIMER_VALUE,
            Field.GUEST_INTERRUPTIBILITY_STATE,
            Field.GUEST_RFLAGS,
        )
    )
)
_host_state = itemgetter(
    *(
        SLOT[field]
        for field in (
            Field.PRIMARY_VMEXIT_CONTROLS,
            Field.HOST_CR0,
            Field.HOST_CR3,
            Field.HOST_CR4,
            Field.HOST_RIP,
            Field.HOST_RSP,
            Field.HOST_FS_BASE,
            Field.HOST_GS_BASE,
            Field.HOST_IA32_SYSENTER_CS,
            Field.HOST_IA32_SYSENTER_ESP,
            Field.HOST_IA32_SYSENTER_EIP,
            Field.VMEXIT_MSR_LOAD_COUNT,
        )
    )
)

# Plain integers, for an enum member costs more to look up than the rest of a test on the way of every entry and exit.
_CR0_KEPT = Cr0.CD | Cr0.NW | Cr0.ET
_EFER_LONG = Efer.LME | Efer.LMA
_HOST_LONG = int(Exit.HOST_ADDRESS_SPACE_SIZE)
_EXIT_LOADS = Exit.LOAD_EFER | Exit.LOAD_PAT | Exit.LOAD_PERF_GLOBAL_CTRL
_TIMER_REASON = int(ExitReason.PREEMPTION_TIMER)
_RFLAGS_FIXED = int(Rflags.FIXED)
_VM_EXIT = Status.VM_EXIT
_LONG, _PROTECTED = CodeMode.LONG, CodeMode.PROTECTED
_WAIT_FOR_SIPI, _AWAKE = int(Activity.WAIT_FOR_SIPI), (int(Activity.ACTIVE), int(Activity.HLT))
_TIMER, _MTF = int(Pin.PREEMPTION_TIMER), int(Primary.MONITOR_TRAP_FLAG)
_NMI_WINDOW, _INTERRUPT_WINDOW = int(Primary.NMI_WINDOW_EXITING), int(Primary.INTERRUPT_WINDOW_EXITING)
_WINDOWS = _NMI_WINDOW | _INTERRUPT_WINDOW
_IF = int(Rflags.IF)
_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP, _FS_BASE, _GS_BASE, _DEBUGCTL = map(
    int,
    (
        Msr.IA32_SYSENTER_CS,
        Msr.IA32_SYSENTER_ESP,
        Msr.IA32_SYSENTER_EIP,
        Msr.IA32_FS_BASE,
        Msr.IA32_GS_BASE,
        Msr.IA32_DEBUGCTL,
    ),
)


class VmExit(msgspec.Struct, frozen=True):
    """Exit information of the rarer kinds: error code and IDT vectoring of exceptions, operand decoding, addresses."""

    error_code: int = 0
    idt_vectoring: int = 0
    idt_vectoring_error: int = 0
    instruction_info: int = 0
    guest_linear: int | None = None
    guest_physical: int | None = None


_NO_DETAILS = VmExit()


def leave_guest(
    lp: LogicalProcessor, reason: int, qualification: int, length: int, intr_info: int, details: VmExit | None
) -> Outcome:
    """A VM exit of the running guest."""
    vmcs = lp.require_current()
    data = vmcs.data
    more = details or _NO_DETAILS
    data[_REASON] = reason
    data[_QUALIFICATION] = qualification
    data[_INTR_INFO] = intr_info
    data[_INTR_ERROR] = more.error_code
    data[_IDT_INFO] = more.idt_vectoring
    data[_IDT_ERROR] = more.idt_vectoring_error
    data[_LENGTH] = length
    data[_INSTRUCTION_INFO] = more.instruction_info
    if more.guest_linear is not None:
        vmcs[Field.GUEST_LINEAR_ADDRESS] = more.guest_linear
    if more.guest_physical is not None:
        vmcs[Field.GUEST_PHYSICAL_ADDRESS] = more.guest_physical
    data[_ENTRY_INTR_INFO] &= ~INTR_INFO_VALID & 0xFFFF_FFFF
    if reason == _TIMER_REASON and vmcs[Field.PRIMARY_VMEXIT_CONTROLS] & Exit.SAVE_PREEMPTION_TIMER:
        vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0
    if intr_info == NMI_EXIT_INFO:
        lp.nmi_blocked = True
    if data[_STORE_COUNT] and not store_msrs(lp, vmcs):
        abort(lp, vmcs, AbortIndicator.SAVING_GUEST_MSRS)
    load_host_state(lp, vmcs)
    return Outcome(_VM_EXIT, exit=ExitInfo(reason, qualification, length, intr_info, data[_ACTIVITY]))


def entry_failure(lp: LogicalProcessor, vmcs: Vmcs, reason: int, qualification: int) -> Outcome:
    """A VM entry that failed on guest state or MSR loading: like an exit, but only exit reason and qualification are
    written, and the launch state stays as it is."""
    data = vmcs.data
    data[_REASON] = reason | ENTRY_FAILURE
    data[_QUALIFICATION] = qualification
    load_host_state(lp, vmcs)
    info = ExitInfo(
        reason | ENTRY_FAILURE, qualification, data[_LENGTH], data[_INTR_INFO], data[_ACTIVITY]
    )
    return Outcome(Status.VM_EXIT, exit=info)


def load_host_state(lp: LogicalProcessor, vmcs: Vmcs) -> None:
    """Registers from the host-state area; VMX root operation."""
    controls, cr0, cr3, cr4, rip, rsp, fs, gs, cs_msr, esp, eip, loads = _host_state(vmcs.data)
    long_mode = controls & _HOST_LONG
    lp.cr0 = cr0 & ~_CR0_KEPT | lp.cr0 & _CR0_KEPT
    lp.cr3 = cr3
    lp.cr4 = cr4
    lp.rip, lp.rsp, lp.rflags = rip, rsp, _RFLAGS_FIXED
    msrs = lp.msrs
    msrs[_SYSENTER_CS], msrs[_SYSENTER_ESP], msrs[_SYSENTER_EIP] = cs_msr, esp, eip
    msrs[_FS_BASE], msrs[_GS_BASE], msrs[_DEBUGCTL] = fs, gs, 0
    lp.efer = lp.efer | _EFER_LONG if long_mode else lp.efer & ~_EFER_LONG
    if controls & _EXIT_LOADS:
        _load_chosen_msrs(lp, vmcs, controls)
    lp.enter_root(_LONG if long_mode else _PROTECTED)
    if loads and load_msrs(lp, vmcs[Field.VMEXIT_MSR_LOAD_ADDR], loads):
        abort(lp, vmcs, AbortIndicator.LOADING_HOST_MSRS)


def _load_chosen_msrs(lp: LogicalProcessor, vmcs: Vmcs, controls: int) -> None:
    if controls & Exit.LOAD_EFER:
        lp.efer = vmcs[Field.HOST_IA32_EFER]
    if controls & Exit.LOAD_PAT:
        lp.msrs[Msr.IA32_PAT] = vmcs[Field.HOST_IA32_PAT]
    if controls & Exit.LOAD_PERF_GLOBAL_CTRL:
        lp.msrs[Msr.IA32_PERF_GLOBAL_CTRL] = vmcs[Field.HOST_IA32_PERF_GLOBAL_CTRL]


def abort(lp: LogicalProcessor, vmcs: Vmcs, indicator: AbortIndicator) -> None:
    """A VMX abort: the indicator goes into the VMCS region, the processor shuts down."""
    lp.memory.write32(vmcs.pa + ABORT_OFFSET, indicator)
    lp.activity = Activity.SHUTDOWN


def exit_at_entry(lp: LogicalProcessor, injected: int) -> ExitReason | None:
    """The exit that waits for a guest that was just entered, before its first instruction, if any.

    By priority: INIT, monitor trap flag after an injection, preemption timer, NMI window, interrupt window.
    `injected` is the interruption information of the injected event, 0 if none.
    """
    pin, primary, activity, timer, blocking, rflags = _entry_state(lp.require_current().data)
    if activity == _WAIT_FOR_SIPI:
        return None
    if lp.init_pending:
        lp.init_pending = False
        return ExitReason.INIT
    if injected and (primary & _MTF or injected >> 8 & 7 == EventType.OTHER_EVENT):
        return ExitReason.MONITOR_TRAP_FLAG
    if pin & _TIMER and not timer:
        return ExitReason.PREEMPTION_TIMER
    return _window_exit(primary, activity, blocking, rflags) if primary & _WINDOWS else None


def window_exit(vmcs: Vmcs) -> ExitReason | None:
    """The NMI-window or interrupt-window exit that is due in the guest's present state, if any."""
    _pin, primary, activity, _timer, blocking, rflags = _entry_state(vmcs.data)
    return _window_exit(primary, activity, blocking, rflags) if primary & _WINDOWS else None


def _window_exit(primary: int, activity: int, blocking: int, rflags: int) -> ExitReason | None:
    if primary & _NMI_WINDOW and not blocking & 0b1011:
        return ExitReason.NMI_WINDOW
    if primary & _INTERRUPT_WINDOW and activity in _AWAKE and rflags & _IF and not blocking & 0b11:
        return ExitReason.INTERRUPT_WINDOW
    return None
