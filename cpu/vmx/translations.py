"""Operands of INVEPT and INVVPID, EPT pointers, canonical addresses. There is no TLB here: translations are never
cached, so an invalidation only has to check its operands."""

from __future__ import annotations

from .config import U64_MAX, VmxConfig

INDIVIDUAL_ADDRESS = 0
SINGLE_CONTEXT = 1
ALL_CONTEXT = 2
SINGLE_CONTEXT_KEEP_GLOBALS = 3

_CAP_WALK = {3: 1 << 6, 4: 1 << 7}
_CAP_MEMORY_TYPE = {0: 1 << 8, 6: 1 << 14}
_CAP_INVEPT = 1 << 20
_CAP_ACCESSED_DIRTY = 1 << 21
_CAP_SUPERVISOR_SHADOW_STACK = 1 << 23
_CAP_INVVPID = 1 << 32


def is_canonical(address: int, bits: int = 48) -> bool:
    """Bits 63:`bits`-1 of a linear address are all equal.

    >>> is_canonical(0xFFFF_8000_0000_0000), is_canonical(0x8000_0000_0000)
    (True, False)
    """
    top = address >> (bits - 1)
    return top == 0 or top == U64_MAX >> (bits - 1)


def physical_address_valid(config: VmxConfig, pa: int, alignment: int = 4096) -> bool:
    """A physical address in a VMCS: aligned, no bit at or above MAXPHYADDR."""
    return pa % alignment == 0 and pa >> config.maxphyaddr == 0


def eptp_valid(config: VmxConfig, eptp: int) -> bool:
    """VM entry would accept this EPT pointer (SDM vol. 3C, "Checks on VMX Controls")."""
    cap = config.ept_vpid_cap
    reserved = 0xF00
    if not cap & _CAP_SUPERVISOR_SHADOW_STACK:
        reserved |= 1 << 7
    if not cap & _CAP_ACCESSED_DIRTY:
        reserved |= 1 << 6
    return (
        cap & _CAP_MEMORY_TYPE.get(eptp & 7, 0) != 0
        and cap & _CAP_WALK.get(eptp >> 3 & 7, 0) != 0
        and eptp & reserved == 0
        and eptp >> config.maxphyaddr == 0
    )


def invept_supported(config: VmxConfig) -> bool:
    """The processor has INVEPT."""
    return config.ept_vpid_cap & _CAP_INVEPT != 0


def invept_type_supported(config: VmxConfig, kind: int) -> bool:
    """IA32_VMX_EPT_VPID_CAP lists this INVEPT type."""
    return kind in (SINGLE_CONTEXT, ALL_CONTEXT) and config.ept_vpid_cap >> (24 + kind) & 1 == 1


def invvpid_supported(config: VmxConfig) -> bool:
    """The processor has INVVPID."""
    return config.ept_vpid_cap & _CAP_INVVPID != 0


def invvpid_type_supported(config: VmxConfig, kind: int) -> bool:
    """IA32_VMX_EPT_VPID_CAP lists this INVVPID type."""
    return 0 <= kind <= SINGLE_CONTEXT_KEEP_GLOBALS and config.ept_vpid_cap >> (40 + kind) & 1 == 1


def invvpid_descriptor_valid(kind: int, desc_lo: int, linear: int) -> bool:
    """INVVPID would accept this descriptor: VPID in bits 15:0 of `desc_lo`, its other bits 0, then `linear`."""
    if desc_lo >> 16:
        return False
    if kind == ALL_CONTEXT:
        return True
    return desc_lo != 0 and (kind != INDIVIDUAL_ADDRESS or is_canonical(linear))
