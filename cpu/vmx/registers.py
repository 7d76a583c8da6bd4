"""MSRs and control registers as far as VMX watches over them (Intel SDM vol. 3C, "Restrictions on VMX Operation")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import U32_MAX, U64_MAX, Msr
from .controls import Cr0, Cr4, Efer, FeatureControl, Primary
from .errors import ExitReason
from .fields import Field
from .lp import LogicalProcessor, VmxMode
from .outcome import GENERAL_PROTECTION, SUCCEED, Outcome, Status
from .translations import is_canonical

if TYPE_CHECKING:
    from .unit import VmxUnit

_CANONICAL = frozenset(
    {
        Msr.IA32_SYSENTER_ESP,
        Msr.IA32_SYSENTER_EIP,
        Msr.IA32_LSTAR,
        Msr.IA32_FS_BASE,
        Msr.IA32_GS_BASE,
        Msr.IA32_KERNEL_GS_BASE,
    }
)
_PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})
_HIGH_MSRS = 0xC000_0000


def rdmsr(unit: VmxUnit, msr: int) -> Outcome:
    """See `VmxUnit.rdmsr`."""
    if unit.mode is VmxMode.NON_ROOT and msr_intercepted(unit, msr, 0):
        return unit.vm_exit(ExitReason.RDMSR, instruction_length=2)
    value = None if unit.cpl else read_msr(unit, msr)
    return GENERAL_PROTECTION if value is None else Outcome(Status.SUCCEED, value=value)


def wrmsr(unit: VmxUnit, msr: int, value: int) -> Outcome:
    """See `VmxUnit.wrmsr`."""
    if unit.mode is VmxMode.NON_ROOT and msr_intercepted(unit, msr, 2048):
        return unit.vm_exit(ExitReason.WRMSR, instruction_length=2)
    return SUCCEED if not unit.cpl and write_msr(unit, msr, value) else GENERAL_PROTECTION


def msr_intercepted(unit: LogicalProcessor, msr: int, write_offset: int) -> bool:
    """A guest's RDMSR (`write_offset` 0) or WRMSR (2048) exits: MSR bitmaps are off, or the MSR's bit is set."""
    vmcs = unit.require_current()
    if not vmcs[Field.PRIMARY_PROC_CONTROLS] & Primary.MSR_BITMAPS:
        return True
    index = msr - _HIGH_MSRS if msr >= _HIGH_MSRS else msr
    if not 0 <= index < 0x2000:
        return True
    byte = vmcs[Field.MSR_BITMAP_ADDR] + write_offset + (1024 if msr >= _HIGH_MSRS else 0) + index // 8
    return unit.memory.read(byte, 1)[0] >> index % 8 & 1 == 1


def read_msr(unit: LogicalProcessor, msr: int) -> int | None:
    """The value of an MSR; None if it does not exist."""
    if (capability := unit.config.caps.get(msr)) is not None:
        return capability
    if msr == Msr.IA32_FEATURE_CONTROL:
        return unit.feature_control
    if msr == Msr.IA32_SEAMRR_MASK:
        return unit.config.seamrr_mask
    return unit.efer if msr == Msr.IA32_EFER else unit.msrs.get(msr)


def write_msr(unit: LogicalProcessor, msr: int, value: int) -> bool:
    """Write an MSR; False where WRMSR would fault, and nothing is changed."""
    if msr == Msr.IA32_FEATURE_CONTROL:
        allowed = not unit.feature_control & FeatureControl.LOCK and value & ~FeatureControl.VALID == 0
        if allowed:
            unit.feature_control = value
        return allowed
    if msr == Msr.IA32_EFER:
        paging = unit.cr0 & Cr0.PG
        allowed = value & ~Efer.VALID == 0 and not (paging and (value ^ unit.efer) & Efer.LME)
        if allowed:
            unit.efer = value & ~Efer.LMA | unit.efer & Efer.LMA
        return allowed
    if msr not in unit.msrs or not 0 <= value <= U64_MAX:
        return False
    if (msr in _CANONICAL and not is_canonical(value)) or (msr == Msr.IA32_PAT and not pat_valid(value)):
        return False
    unit.msrs[msr] = value
    return True


def pat_valid(value: int) -> bool:
    """Each byte of an IA32_PAT value is a memory type."""
    return all(byte in _PAT_TYPES for byte in value.to_bytes(8, "little"))


def mov_cr0(unit: VmxUnit, value: int) -> Outcome:
    """See `VmxUnit.mov_cr0`."""
    if unit.cpl:
        return GENERAL_PROTECTION
    if unit.mode is VmxMode.NON_ROOT:
        return _guest_mov_cr(unit, 0, value)
    if not _cr0_valid(value) or (unit.efer & Efer.LMA and not value & Cr0.PG):
        return GENERAL_PROTECTION
    if unit.mode is VmxMode.ROOT and not unit.cr0_fixed.allow(value | Cr0.ET):
        return GENERAL_PROTECTION
    unit.cr0 = value | Cr0.ET
    return SUCCEED


def _cr0_valid(value: int) -> bool:
    return (
        0 <= value <= U32_MAX
        and not (value & Cr0.PG and not value & Cr0.PE)
        and not (value & Cr0.NW and not value & Cr0.CD)
    )


def mov_cr4(unit: VmxUnit, value: int) -> Outcome:
    """See `VmxUnit.mov_cr4`."""
    if unit.cpl:
        return GENERAL_PROTECTION
    if unit.mode is VmxMode.NON_ROOT:
        return _guest_mov_cr(unit, 4, value)
    long_mode = unit.efer & Efer.LMA
    if value & ~unit.cr4_fixed.may or (long_mode and (not value & Cr4.PAE or (value ^ unit.cr4) & Cr4.LA57)):
        return GENERAL_PROTECTION
    if unit.mode is VmxMode.ROOT and not unit.cr4_fixed.allow(value):
        return GENERAL_PROTECTION
    unit.cr4 = value
    return SUCCEED


def _guest_mov_cr(unit: VmxUnit, register: int, value: int) -> Outcome:
    """MOV to CR0 or CR4 in a guest: exits if a bit that the host owns would differ from the read shadow."""
    vmcs = unit.require_current()
    cr0 = register == 0
    mask = vmcs[Field.CR0_GUEST_HOST_MASK if cr0 else Field.CR4_GUEST_HOST_MASK]
    shadow = vmcs[Field.CR0_READ_SHADOW if cr0 else Field.CR4_READ_SHADOW]
    if (value ^ shadow) & mask:
        return unit.vm_exit(ExitReason.CONTROL_REGISTER, qualification=register, instruction_length=3)
    field = Field.GUEST_CR0 if cr0 else Field.GUEST_CR4
    merged = vmcs[field] & mask | value & ~mask
    if not (unit.cr0_fixed if cr0 else unit.cr4_fixed).allow(merged):
        return GENERAL_PROTECTION
    vmcs[field] = merged
    return SUCCEED
