"""VM entry: the checks of guest state (Intel SDM vol. 3C, "Checking and Loading Guest State"). Each finds None, or
the exit qualification of the failed entry.
"""

from __future__ import annotations

from operator import itemgetter

from .config import MISC_ACTIVITY_SHIFT, U32_MAX, U64_MAX
from .controls import (
    INTR_INFO_VALID,
    Activity,
    Cr0,
    Cr4,
    Efer,
    Entry,
    EventType,
    Interruptibility,
    Pin,
    Primary,
    Rflags,
    Secondary,
)
from .fields import Field
from .lp import LogicalProcessor
from .outcome import Vector
from .registers import pat_valid
from .shadow import shadowing
from .translations import is_canonical, physical_address_valid
from .vmcs import NO_VMCS, SHADOW_VMCS, SLOT, Vmcs

GUEST_STATE = 0
NMI_WITH_STI_BLOCKING = 3
LINK_POINTER = 4

UNUSABLE = 1 << 16
_AR_RESERVED = 0xFFFE_0F00
_AR_PRESENT = 1 << 7
_AR_CODE_OR_DATA = 1 << 4
_AR_LONG = 1 << 13
_AR_DEFAULT_BIG = 1 << 14
_AR_GRANULARITY = 1 << 15
_LINEAR_BITS = 48

_LONG_GUEST = int(Entry.IA32E_MODE_GUEST)
_RFLAGS_BAD, _RFLAGS_FIXED, _RFLAGS_VM = int(Rflags.RESERVED), int(Rflags.FIXED), int(Rflags.VM)

_ES, _CS, _SS, _DS, _FS, _GS, _LDTR, _TR = range(8)
_DATA_SEGMENTS = (_SS, _DS, _ES, _FS, _GS)

_volatile = itemgetter(
    *(
        SLOT[field]
        for field in (
            Field.GUEST_RIP,
            Field.GUEST_RFLAGS,
            Field.GUEST_CR3,
            Field.GUEST_ACTIVITY_STATE,
            Field.GUEST_INTERRUPTIBILITY_STATE,
            Field.VMCS_LINK_POINTER,
            Field.VMENTRY_INTR_INFO,
            Field.VMENTRY_CONTROLS,
            Field.PIN_BASED_CONTROLS,
            Field.GUEST_CS_ACCESS_RIGHTS,
            Field.GUEST_SS_ACCESS_RIGHTS,
        )
    )
)


def guest_defect(lp: LogicalProcessor, vmcs: Vmcs) -> int | None:
    """Registers and segments: what rarely changes between two entries."""
    valid = _registers_valid(lp, vmcs) and _msrs_valid(vmcs) and _segments_valid(vmcs) and _tables_valid(vmcs)
    return None if valid else GUEST_STATE


def guest_event_defect(lp: LogicalProcessor, vmcs: Vmcs) -> int | None:
    """RIP, RFLAGS, CR3, activity, interruptibility and the link pointer: what differs from entry to entry."""
    rip, rflags, cr3, activity, blocking, link, info, entry, pin, cs, ss = _volatile(vmcs.data)
    long_guest = entry & _LONG_GUEST
    valid = (
        _rip_valid(rip, long_guest and cs & _AR_LONG)
        and rflags & _RFLAGS_FIXED
        and not rflags & _RFLAGS_BAD
        and not rflags & _RFLAGS_VM
        and not cr3 >> lp.config.maxphyaddr
        and (
            not (activity or blocking or info & INTR_INFO_VALID)
            or _events_valid(lp, rflags, activity, blocking, info, pin, ss)
        )
    )
    if not valid:
        return GUEST_STATE
    return None if link == NO_VMCS or _link_valid(lp, vmcs, link) else LINK_POINTER


def _events_valid(
    lp: LogicalProcessor, rflags: int, activity: int, blocking: int, info: int, pin: int, ss: int
) -> bool:
    kind = info >> 8 & 7 if info & INTR_INFO_VALID else None
    return (
        (kind != EventType.EXTERNAL_INTERRUPT or rflags & Rflags.IF != 0)
        and _activity_valid(lp, activity, blocking, kind, info & 0xFF, ss)
        and _blocking_valid(rflags, blocking, kind, pin)
    )


def _rip_valid(rip: int, long_code: int) -> bool:
    if not long_code:
        return rip <= U32_MAX
    # Only the bits above the linear-address width are compared: RIP may be non-canonical in the last bit.
    top = rip >> _LINEAR_BITS
    return top == 0 or top == U64_MAX >> _LINEAR_BITS


def _activity_valid(
    lp: LogicalProcessor, activity: int, blocking: int, kind: int | None, vector: int, ss: int
) -> bool:
    if activity == Activity.ACTIVE:
        return True
    if activity > Activity.WAIT_FOR_SIPI or not lp.config.misc >> (MISC_ACTIVITY_SHIFT + activity - 1) & 1:
        return False
    if blocking & (Interruptibility.BLOCKING_BY_STI | Interruptibility.BLOCKING_BY_MOV_SS):
        return False
    if activity == Activity.HLT:
        machine_event = vector in (Vector.DB, 18) if kind == EventType.HARDWARE_EXCEPTION else True
        return ss >> 5 & 3 == 0 and machine_event and kind not in (4, 5, 6)
    if activity == Activity.SHUTDOWN:
        return kind is None or kind == EventType.NMI or (kind == EventType.HARDWARE_EXCEPTION and vector == 18)
    return kind is None


def _blocking_valid(rflags: int, blocking: int, kind: int | None, pin: int) -> bool:
    sti = blocking & Interruptibility.BLOCKING_BY_STI
    mov_ss = blocking & Interruptibility.BLOCKING_BY_MOV_SS
    nmi = blocking & Interruptibility.BLOCKING_BY_NMI
    return (
        blocking & ~0b11111 == 0
        and not blocking & Interruptibility.BLOCKING_BY_SMI
        and not (sti and mov_ss)
        and (not sti or rflags & Rflags.IF != 0)
        and not (kind == EventType.EXTERNAL_INTERRUPT and (sti or mov_ss))
        and not (kind == EventType.NMI and mov_ss)
        and not (kind == EventType.NMI and nmi and pin & Pin.VIRTUAL_NMIS)
    )


def _link_valid(lp: LogicalProcessor, vmcs: Vmcs, link: int) -> bool:
    if not physical_address_valid(lp.config, link) or link == lp.cur:
        return False
    word = lp.memory.read32(link)
    wanted = lp.config.vmcs_revision_id | (SHADOW_VMCS if shadowing(vmcs) else 0)
    return word == wanted


def _registers_valid(lp: LogicalProcessor, vmcs: Vmcs) -> bool:
    cr0, cr4 = vmcs[Field.GUEST_CR0], vmcs[Field.GUEST_CR4]
    entry = vmcs[Field.VMENTRY_CONTROLS]
    needed = Cr0.PE | Cr0.PG if _unrestricted(vmcs) else 0
    if not lp.cr0_fixed.allow(cr0 | lp.cr0_fixed.must & needed) or not lp.cr4_fixed.allow(cr4):
        return False
    if (cr0 & Cr0.PG and not cr0 & Cr0.PE) or (cr4 & Cr4.CET and not cr0 & Cr0.WP):
        return False
    if entry & Entry.LOAD_DEBUG_CONTROLS and vmcs[Field.GUEST_DR7] >> 32:
        return False
    if entry & Entry.IA32E_MODE_GUEST:
        return cr0 & Cr0.PG != 0 and cr4 & Cr4.PAE != 0
    return not cr4 & Cr4.PCIDE


def _msrs_valid(vmcs: Vmcs) -> bool:
    entry = vmcs[Field.VMENTRY_CONTROLS]
    if not (is_canonical(vmcs[Field.GUEST_IA32_SYSENTER_ESP]) and is_canonical(vmcs[Field.GUEST_IA32_SYSENTER_EIP])):
        return False
    if entry & Entry.LOAD_PAT and not pat_valid(vmcs[Field.GUEST_IA32_PAT]):
        return False
    if not entry & Entry.LOAD_EFER:
        return True
    efer = vmcs[Field.GUEST_IA32_EFER]
    lma, lme = efer & Efer.LMA != 0, efer & Efer.LME != 0
    paging = vmcs[Field.GUEST_CR0] & Cr0.PG != 0
    return not efer & ~Efer.VALID and lma == (entry & Entry.IA32E_MODE_GUEST != 0) and (not paging or lma == lme)


def _unrestricted(vmcs: Vmcs) -> bool:
    secondary = vmcs[Field.PRIMARY_PROC_CONTROLS] & Primary.SECONDARY_CONTROLS
    return secondary != 0 and vmcs[Field.SECONDARY_PROC_CONTROLS] & Secondary.UNRESTRICTED_GUEST != 0


# Segments. There are no guests in virtual-8086 mode here: RFLAGS.VM = 1 is refused.


def _segment(vmcs: Vmcs, number: int) -> tuple[int, int, int, int]:
    """Selector, base, limit and access rights of a segment register, by its place in the encodings (ES first)."""
    return (
        vmcs[Field.GUEST_ES_SELECTOR + 2 * number],
        vmcs[Field.GUEST_ES_BASE + 2 * number],
        vmcs[Field.GUEST_ES_LIMIT + 2 * number],
        vmcs[Field.GUEST_ES_ACCESS_RIGHTS + 2 * number],
    )


def _segments_valid(vmcs: Vmcs) -> bool:
    return (
        _code_segment_valid(vmcs)
        and all(_data_segment_valid(vmcs, number) for number in _DATA_SEGMENTS)
        and _stack_privilege_valid(vmcs)
        and _system_segments_valid(vmcs)
    )


def _limit_consistent(limit: int, rights: int) -> bool:
    if limit & 0xFFF != 0xFFF and rights & _AR_GRANULARITY:
        return False
    return limit >> 20 == 0 or rights & _AR_GRANULARITY != 0


def _code_segment_valid(vmcs: Vmcs) -> bool:
    _, base, limit, rights = _segment(vmcs, _CS)
    kind, dpl = rights & 0xF, rights >> 5 & 3
    ss_dpl = vmcs[Field.GUEST_SS_ACCESS_RIGHTS] >> 5 & 3
    privilege = {9: dpl == ss_dpl, 11: dpl == ss_dpl, 13: dpl <= ss_dpl, 15: dpl <= ss_dpl}
    if _unrestricted(vmcs):
        privilege[3] = dpl == 0
    long_guest = vmcs[Field.VMENTRY_CONTROLS] & Entry.IA32E_MODE_GUEST
    return (
        not rights & (UNUSABLE | _AR_RESERVED)
        and rights & _AR_CODE_OR_DATA != 0
        and rights & _AR_PRESENT != 0
        and privilege.get(kind, False)
        and not (long_guest and rights & _AR_LONG and rights & _AR_DEFAULT_BIG)
        and base <= U32_MAX
        and _limit_consistent(limit, rights)
    )


def _data_segment_valid(vmcs: Vmcs, number: int) -> bool:
    selector, base, limit, rights = _segment(vmcs, number)
    if number in (_FS, _GS) and not is_canonical(base):
        return False
    if rights & UNUSABLE:
        return True
    kind, dpl = rights & 0xF, rights >> 5 & 3
    if number == _SS:
        kind_valid = kind in (3, 7)
    else:
        readable_code = kind & 0b1000 == 0 or kind & 0b10 != 0
        conforming = kind >= 12
        kind_valid = kind & 1 == 1 and readable_code and (
            _unrestricted(vmcs) or conforming or dpl >= selector & 3
        )
    return (
        kind_valid
        and not rights & _AR_RESERVED
        and rights & _AR_CODE_OR_DATA != 0
        and rights & _AR_PRESENT != 0
        and (number in (_FS, _GS) or base <= U32_MAX)
        and _limit_consistent(limit, rights)
    )


def _stack_privilege_valid(vmcs: Vmcs) -> bool:
    if _unrestricted(vmcs):
        return True
    selector, _, _, rights = _segment(vmcs, _SS)
    return selector & 3 == vmcs[Field.GUEST_CS_SELECTOR] & 3 and rights >> 5 & 3 == selector & 3


def _system_segments_valid(vmcs: Vmcs) -> bool:
    selector, base, limit, rights = _segment(vmcs, _TR)
    long_guest = vmcs[Field.VMENTRY_CONTROLS] & Entry.IA32E_MODE_GUEST
    task_valid = (
        not selector & 4
        and is_canonical(base)
        and (rights & 0xF == 11 or (not long_guest and rights & 0xF == 3))
        and not rights & (UNUSABLE | _AR_RESERVED | _AR_CODE_OR_DATA)
        and rights & _AR_PRESENT != 0
        and _limit_consistent(limit, rights)
    )
    selector, base, limit, rights = _segment(vmcs, _LDTR)
    ldt_valid = rights & UNUSABLE != 0 or (
        not selector & 4
        and is_canonical(base)
        and rights & 0xF == 2
        and not rights & (_AR_RESERVED | _AR_CODE_OR_DATA)
        and rights & _AR_PRESENT != 0
        and _limit_consistent(limit, rights)
    )
    return task_valid and ldt_valid


def _tables_valid(vmcs: Vmcs) -> bool:
    return (
        is_canonical(vmcs[Field.GUEST_GDTR_BASE])
        and is_canonical(vmcs[Field.GUEST_IDTR_BASE])
        and vmcs[Field.GUEST_GDTR_LIMIT] >> 16 == 0
        and vmcs[Field.GUEST_IDTR_LIMIT] >> 16 == 0
    )
