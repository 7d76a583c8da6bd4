"""MSR areas of a VMCS: lists of 16-byte entries, MSR index, reserved, value (Intel SDM vol. 3C, "Loading MSRs")."""

from __future__ import annotations

import struct

from .config import Msr
from .fields import Field
from .lp import LogicalProcessor
from .registers import read_msr, write_msr
from .vmcs import Vmcs

_ENTRY = struct.Struct("<IIQ")
_X2APIC_MSRS = range(0x800, 0x900)
_NEVER_LOADED = (Msr.IA32_FS_BASE, Msr.IA32_GS_BASE)


def load_msrs(lp: LogicalProcessor, address: int, count: int) -> int:
    """Load `count` MSRs from `address`; 0, or the 1-based number of the first entry that cannot be loaded."""
    for number in range(count):
        msr, reserved, value = _ENTRY.unpack(lp.memory.read(address + 16 * number, 16))
        if reserved or msr in _NEVER_LOADED or msr in _X2APIC_MSRS or not write_msr(lp, msr, value):
            return number + 1
    return 0


def store_msrs(lp: LogicalProcessor, vmcs: Vmcs) -> bool:
    """Store the MSRs of the VM-exit MSR-store area; False if one cannot be read."""
    for number in range(vmcs[Field.VMEXIT_MSR_STORE_COUNT]):
        entry = vmcs[Field.VMEXIT_MSR_STORE_ADDR] + 16 * number
        msr, reserved, _ = _ENTRY.unpack(lp.memory.read(entry, 16))
        value = read_msr(lp, msr)
        if reserved or value is None or msr in _X2APIC_MSRS:
            return False
        lp.memory.write64(entry + 8, value)
    return True
