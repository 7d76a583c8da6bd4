"""VM entry: the checks of control and host-state fields, and the way into the guest (Intel SDM vol. 3C, "VM
Entries").

Checks of fields that seldom change are done once: a VMCS remembers the bytes that were found good (`Vmcs.checked`).
"""

from __future__ import annotations

from operator import itemgetter

from .config import BASIC_ANY_ERROR_CODE, MISC_ZERO_LENGTH_INJECTION, Msr, VmxConfig
from .controls import (
    INTR_INFO_ERROR_CODE,
    INTR_INFO_VALID,
    Cr0,
    Cr4,
    Efer,
    Entry,
    EventType,
    Exit,
    Pin,
    Primary,
    Secondary,
)
from .entry_guest import guest_defect, guest_event_defect
from .errors import ExitReason
from .errors import VmInstructionError as Error
from .exit import entry_failure, exit_at_entry, leave_guest
from .fields import Field
from .lp import LogicalProcessor, VmxMode
from .msrlist import load_msrs
from .outcome import SUCCEED, Outcome, Vector
from .registers import pat_valid
from .shadow import linked_vmcs, shadowing
from .translations import eptp_valid, is_canonical, physical_address_valid
from .vmcs import SLOT, VOLATILE_START, LaunchState, Vmcs

_VECTORS_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_INTR_INFO = SLOT[Field.VMENTRY_INTR_INFO]
_MSR_LOAD_COUNT = SLOT[Field.VMENTRY_MSR_LOAD_COUNT]
_LMA = int(Efer.LMA)
_LAUNCHED = int(LaunchState.LAUNCHED)
_injection = itemgetter(
    SLOT[Field.VMENTRY_INTR_INFO],
    SLOT[Field.VMENTRY_EXCEPTION_ERROR_CODE],
    SLOT[Field.VMENTRY_INSTRUCTION_LENGTH],
)


def enter_guest(lp: LogicalProcessor, vmcs: Vmcs) -> Outcome:
    """VMLAUNCH or VMRESUME, after the checks of pointer, MOV-SS blocking and launch state."""
    stable = (vmcs.data[1:VOLATILE_START].tobytes(), lp.efer & _LMA)
    known_good = vmcs.checked == stable
    if not known_good:
        if not controls_valid(lp.config, vmcs):
            return lp.fail(Error.ENTRY_INVALID_CONTROLS)
        if not host_state_valid(lp, vmcs):
            return lp.fail(Error.ENTRY_INVALID_HOST_STATE)
    if vmcs.data[_INTR_INFO] & INTR_INFO_VALID and not injection_valid(lp.config, vmcs):
        return lp.fail(Error.ENTRY_INVALID_CONTROLS)
    defect = None if known_good else guest_defect(lp, vmcs)
    if defect is None:
        vmcs.checked = stable
        defect = guest_event_defect(lp, vmcs)
    if defect is not None:
        return entry_failure(lp, vmcs, ExitReason.ENTRY_FAILURE_GUEST_STATE, defect)
    count = vmcs.data[_MSR_LOAD_COUNT]
    if count and (bad := load_msrs(lp, vmcs[Field.VMENTRY_MSR_LOAD_ADDR], count)):
        return entry_failure(lp, vmcs, ExitReason.ENTRY_FAILURE_MSR_LOADING, bad)
    return _begin_guest(lp, vmcs)


def _begin_guest(lp: LogicalProcessor, vmcs: Vmcs) -> Outcome:
    vmcs.data[0] = _LAUNCHED
    lp.mode = VmxMode.NON_ROOT
    if shadowing(vmcs):
        linked_vmcs(lp)
    info = vmcs.data[_INTR_INFO]
    injected = info if info & INTR_INFO_VALID else 0
    through_idt = injected and injected >> 8 & 7 != EventType.OTHER_EVENT
    if through_idt and lp.on_inject is not None and (exited := lp.on_inject(injected)):
        return exited
    reason = exit_at_entry(lp, injected)
    return SUCCEED if reason is None else leave_guest(lp, reason, 0, 0, 0, None)


# Controls: error 7


def controls_valid(config: VmxConfig, vmcs: Vmcs) -> bool:
    """Every check of the control fields, except that of event injection."""
    primary = vmcs[Field.PRIMARY_PROC_CONTROLS]
    secondary = vmcs[Field.SECONDARY_PROC_CONTROLS] if primary & Primary.SECONDARY_CONTROLS else 0
    return (
        _limits_respected(config, vmcs, primary, secondary)
        and vmcs[Field.CR3_TARGET_COUNT] <= (config.misc >> 16 & 0x1FF)
        and _addresses_valid(config, vmcs, primary, secondary)
        and _interrupt_controls_consistent(vmcs, primary, secondary)
        and _translation_controls_consistent(config, vmcs, secondary)
        and _msr_areas_valid(config, vmcs)
    )


def _limits_respected(config: VmxConfig, vmcs: Vmcs, primary: int, secondary: int) -> bool:
    exit_controls = vmcs[Field.PRIMARY_VMEXIT_CONTROLS]
    entry_controls = vmcs[Field.VMENTRY_CONTROLS]
    tertiary = vmcs[Field.TERTIARY_PROC_CONTROLS] if primary & Primary.TERTIARY_CONTROLS else 0
    more_exit = vmcs[Field.SECONDARY_VMEXIT_CONTROLS] if exit_controls & Exit.SECONDARY_CONTROLS else 0
    return (
        config.control_limits(Msr.IA32_VMX_PINBASED_CTLS).allow(vmcs[Field.PIN_BASED_CONTROLS])
        and config.control_limits(Msr.IA32_VMX_PROCBASED_CTLS).allow(primary)
        and (not secondary or config.control_limits(Msr.IA32_VMX_PROCBASED_CTLS2).allow(secondary))
        and tertiary & ~config.caps.get(Msr.IA32_VMX_PROCBASED_CTLS3, 0) == 0
        and config.control_limits(Msr.IA32_VMX_EXIT_CTLS).allow(exit_controls)
        and more_exit & ~config.caps.get(Msr.IA32_VMX_EXIT_CTLS2, 0) == 0
        and config.control_limits(Msr.IA32_VMX_ENTRY_CTLS).allow(entry_controls)
        and not entry_controls & (Entry.ENTRY_TO_SMM | Entry.DEACTIVATE_DUAL_MONITOR)
    )


def _addresses_valid(config: VmxConfig, vmcs: Vmcs, primary: int, secondary: int) -> bool:
    pages = []
    if primary & Primary.IO_BITMAPS:
        pages += [Field.IO_BITMAP_A_ADDR, Field.IO_BITMAP_B_ADDR]
    if primary & Primary.MSR_BITMAPS:
        pages.append(Field.MSR_BITMAP_ADDR)
    if primary & Primary.TPR_SHADOW:
        pages.append(Field.VIRTUAL_APIC_ADDR)
    if secondary & Secondary.VIRTUALIZE_APIC_ACCESSES:
        pages.append(Field.APIC_ACCESS_ADDR)
    if secondary & Secondary.VMCS_SHADOWING:
        pages += [Field.VMREAD_BITMAP_ADDR, Field.VMWRITE_BITMAP_ADDR]
    if secondary & Secondary.PML:
        pages.append(Field.PML_ADDRESS)
    if secondary & Secondary.EPT_VIOLATION_VE:
        pages.append(Field.VE_INFO_ADDR)
    return all(physical_address_valid(config, vmcs[page]) for page in pages)


def _interrupt_controls_consistent(vmcs: Vmcs, primary: int, secondary: int) -> bool:
    pin = vmcs[Field.PIN_BASED_CONTROLS]
    exit_controls = vmcs[Field.PRIMARY_VMEXIT_CONTROLS]
    virtual_delivery = secondary & Secondary.VIRTUAL_INTERRUPT_DELIVERY
    needs_tpr_shadow = Secondary.VIRTUALIZE_X2APIC | Secondary.APIC_REGISTERS | virtual_delivery
    rules = (
        pin & Pin.NMI_EXITING or not pin & Pin.VIRTUAL_NMIS,
        pin & Pin.VIRTUAL_NMIS or not primary & Primary.NMI_WINDOW_EXITING,
        pin & Pin.PREEMPTION_TIMER or not exit_controls & Exit.SAVE_PREEMPTION_TIMER,
        primary & Primary.TPR_SHADOW or not secondary & needs_tpr_shadow,
        not primary & Primary.TPR_SHADOW or virtual_delivery or vmcs[Field.TPR_THRESHOLD] < 16,
        not secondary & Secondary.VIRTUALIZE_X2APIC or not secondary & Secondary.VIRTUALIZE_APIC_ACCESSES,
        not virtual_delivery or pin & Pin.EXTERNAL_INTERRUPT_EXITING,
        not pin & Pin.POSTED_INTERRUPTS
        or (virtual_delivery
        and exit_controls & Exit.ACKNOWLEDGE_INTERRUPT
        and vmcs[Field.POSTED_INTR_NOTIFICATION_VECTOR] < 256
        and vmcs[Field.POSTED_INTR_DESC_ADDR] % 64 == 0),
    )
    return all(rules)


def _translation_controls_consistent(config: VmxConfig, vmcs: Vmcs, secondary: int) -> bool:
    needs_ept = Secondary.UNRESTRICTED_GUEST | Secondary.PML
    ept = secondary & Secondary.EPT
    valid = eptp_valid(config, vmcs[Field.EPT_POINTER]) if ept else not secondary & needs_ept
    return valid and (not secondary & Secondary.VPID or vmcs[Field.VIRTUAL_PROCESSOR_ID] != 0)


def _msr_areas_valid(config: VmxConfig, vmcs: Vmcs) -> bool:
    areas = (
        (Field.VMEXIT_MSR_STORE_COUNT, Field.VMEXIT_MSR_STORE_ADDR),
        (Field.VMEXIT_MSR_LOAD_COUNT, Field.VMEXIT_MSR_LOAD_ADDR),
        (Field.VMENTRY_MSR_LOAD_COUNT, Field.VMENTRY_MSR_LOAD_ADDR),
    )
    return all(
        count == 0
        or (physical_address_valid(config, start, 16)
        and physical_address_valid(config, start + 16 * count - 1, 1))
        for count, start in ((vmcs[counter], vmcs[address]) for counter, address in areas)
    )


def injection_valid(config: VmxConfig, vmcs: Vmcs) -> bool:
    """A valid entry interruption-information field, and those that go with it."""
    info, error_code, length = _injection(vmcs.data)
    vector, kind = info & 0xFF, info >> 8 & 7
    has_error_code = info & INTR_INFO_ERROR_CODE != 0
    software = kind in (
        EventType.SOFTWARE_INTERRUPT,
        EventType.PRIVILEGED_SOFTWARE_EXCEPTION,
        EventType.SOFTWARE_EXCEPTION,
    )
    shortest = 0 if config.misc & MISC_ZERO_LENGTH_INJECTION else 1
    return (
        info & 0x7FFF_F000 == 0
        and kind != EventType.RESERVED
        and (kind != EventType.NMI or vector == Vector.NMI)
        and (kind != EventType.HARDWARE_EXCEPTION or vector <= 31)
        and (kind != EventType.OTHER_EVENT or vector == 0)
        and _error_code_consistent(config, vmcs, vector, kind, has_error_code)
        and (not has_error_code or error_code >> 16 == 0)
        and (not software or shortest <= length <= 15)
    )


def _error_code_consistent(config: VmxConfig, vmcs: Vmcs, vector: int, kind: int, has_error_code: bool) -> bool:
    if kind != EventType.HARDWARE_EXCEPTION or not vmcs[Field.GUEST_CR0] & Cr0.PE:
        return not has_error_code
    return bool(config.basic & BASIC_ANY_ERROR_CODE) or has_error_code == (vector in _VECTORS_WITH_ERROR_CODE)


# Host state: error 8


def host_state_valid(lp: LogicalProcessor, vmcs: Vmcs) -> bool:
    """Every check of the host-state area."""
    return _host_registers_valid(lp, vmcs) and _host_segments_valid(vmcs) and _host_mode_valid(lp, vmcs)


def _host_registers_valid(lp: LogicalProcessor, vmcs: Vmcs) -> bool:
    controls = vmcs[Field.PRIMARY_VMEXIT_CONTROLS]
    cr0, cr4 = vmcs[Field.HOST_CR0], vmcs[Field.HOST_CR4]
    return (
        lp.cr0_fixed.allow(cr0)
        and lp.cr4_fixed.allow(cr4)
        and (not cr4 & Cr4.CET or cr0 & Cr0.WP != 0)
        and vmcs[Field.HOST_CR3] >> lp.config.maxphyaddr == 0
        and is_canonical(vmcs[Field.HOST_IA32_SYSENTER_ESP])
        and is_canonical(vmcs[Field.HOST_IA32_SYSENTER_EIP])
        and (not controls & Exit.LOAD_PAT or pat_valid(vmcs[Field.HOST_IA32_PAT]))
    )


def _host_segments_valid(vmcs: Vmcs) -> bool:
    selectors = range(Field.HOST_ES_SELECTOR, Field.HOST_TR_SELECTOR + 2, 2)
    long_host = vmcs[Field.PRIMARY_VMEXIT_CONTROLS] & Exit.HOST_ADDRESS_SPACE_SIZE
    bases = (
        Field.HOST_FS_BASE,
        Field.HOST_GS_BASE,
        Field.HOST_TR_BASE,
        Field.HOST_GDTR_BASE,
        Field.HOST_IDTR_BASE,
    )
    return (
        all(vmcs[selector] & 7 == 0 for selector in selectors)
        and vmcs[Field.HOST_CS_SELECTOR] != 0
        and vmcs[Field.HOST_TR_SELECTOR] != 0
        and (long_host != 0 or vmcs[Field.HOST_SS_SELECTOR] != 0)
        and all(is_canonical(vmcs[base]) for base in bases)
    )


def _host_mode_valid(lp: LogicalProcessor, vmcs: Vmcs) -> bool:
    controls = vmcs[Field.PRIMARY_VMEXIT_CONTROLS]
    long_host = controls & Exit.HOST_ADDRESS_SPACE_SIZE != 0
    long_guest = vmcs[Field.VMENTRY_CONTROLS] & Entry.IA32E_MODE_GUEST != 0
    rip, cr4, efer = vmcs[Field.HOST_RIP], vmcs[Field.HOST_CR4], vmcs[Field.HOST_IA32_EFER]
    if long_host != bool(lp.efer & Efer.LMA):
        return False
    if controls & Exit.LOAD_EFER:
        expected = Efer.LME | Efer.LMA if long_host else 0
        if efer & ~Efer.VALID or efer & (Efer.LME | Efer.LMA) != expected:
            return False
    if long_host:
        return cr4 & Cr4.PAE != 0 and is_canonical(rip)
    return not long_guest and not cr4 & Cr4.PCIDE and rip >> 32 == 0
