"""What P-SEAMLDR writes into the module range, and reads back from it at the next update.

Source: Intel P-SEAMLDR (tdx-loader 1.5.02), pseamldr_data_types.h, seam_vmcs_setup.c, seamldr_install.c.
"""

from __future__ import annotations

import struct

import msgspec

from bus.memory import PhysicalMemory
from seamldr.platform import PAGE, Platform
from seamldr.range_layout import LinearBases, RangeLayout
from seamldr.sigstruct import SigStruct

HANDOFF_FIELDS_AT = 2152
_HANDOFF_FIELDS = struct.Struct("<HHBBH")
_HANDOFF = struct.Struct("<BBHI")
_REGIONS = struct.Struct("<12Q")
_TRANSFER_VMCS = struct.Struct("<II7Q")
_GATE = struct.Struct("<HHBBHII")
IDT_GATES = 32
GDT_FROM_IDT = 2048


class Handoff(msgspec.Struct, frozen=True):
    """The header before the handoff data: `size` is that of the data behind it, in bytes."""

    valid: int
    hv: int
    size: int

    @classmethod
    def decode(cls, data: bytes) -> Handoff:
        """From its 8 bytes."""
        valid, _, hv, size = _HANDOFF.unpack(data)
        return cls(valid, hv, size)

    def encode(self) -> bytes:
        """The 8 bytes."""
        return _HANDOFF.pack(self.valid, 0, self.hv, self.size)


class TransferVmcs(msgspec.Struct, frozen=True):
    """What of a module's per-LP transfer VMCS is kept: linear addresses, at the start of its page."""

    rip: int
    fs_base: int
    gs_base: int
    rsp: int
    ssp: int
    idtr_base: int
    gdtr_base: int

    def encode(self) -> bytes:
        """64 bytes: revision identifier 0, abort indicator 0, the fields."""
        return _TRANSFER_VMCS.pack(0, 0, *msgspec.structs.astuple(self))

    @classmethod
    def decode(cls, data: bytes) -> TransferVmcs:
        """From the first 64 bytes of `data`."""
        return cls(*_TRANSFER_VMCS.unpack_from(data)[2:])


def zero(memory: PhysicalMemory, start: int, end: int, keep: tuple[int, int]) -> None:
    """Zero [start, end) but for [keep)."""
    first, last = max(start, min(keep[0], end)), min(end, max(keep[1], start))
    if first >= last:
        memory.write(start, bytes(end - start))
        return
    memory.write(start, bytes(first - start))
    memory.write(last, bytes(end - last))


def running_handoff_pages(platform: Platform, memory: PhysicalMemory) -> int:
    """NUM_HANDOFF_PAGES of the module in place, count minus one, from its SYS_INFO_TABLE."""
    data = memory.read(platform.seamrr_base + HANDOFF_FIELDS_AT, _HANDOFF_FIELDS.size)
    return int(_HANDOFF_FIELDS.unpack(data)[4])


def write_handoff_fields(platform: Platform, memory: PhysicalMemory, s: SigStruct) -> None:
    """The last fields of SYS_INFO_TABLE, written only when an install has succeeded."""
    fields = _HANDOFF_FIELDS.pack(s.module_hv, s.min_update_hv, s.no_downgrade, 0, s.num_handoff_pages)
    memory.write(platform.seamrr_base + HANDOFF_FIELDS_AT, fields)


def write_sys_info_table(
    platform: Platform, memory: PhysicalMemory, s: SigStruct, layout: RangeLayout, bases: LinearBases
) -> None:
    """SYS_INFO_TABLE: the platform's half of P_SYS_INFO_TABLE, then the module's regions."""
    page = bytearray(memory.read(platform.p_sys_info_table, 2048).ljust(PAGE, b"\0"))
    stack_size = layout.stack_per_lp * layout.addressable_lps
    _REGIONS.pack_into(
        page,
        2056,
        *(bases.code, layout.code_size),
        *(bases.data, layout.data_size),
        *(bases.stack, stack_size),
        *(bases.keyhole, layout.keyhole_size),
        *(bases.keyhole_edit, layout.edit_size),
        *(s.num_stack_pages, s.num_tls_pages),
    )
    memory.write(platform.seamrr_base, bytes(page))


def write_transfer_vmcss(memory: PhysicalMemory, s: SigStruct, layout: RangeLayout, bases: LinearBases) -> None:
    """One transfer VMCS for every x2APIC ID there can be."""
    table = bases.code + s.gdt_idt_offset if s.gdt_idt_offset else 0
    for lp in range(layout.addressable_lps):
        stack = bases.stack + lp * layout.stack_per_lp
        vmcs = TransferVmcs(
            rip=bases.code + s.rip_offset,
            fs_base=bases.sysinfo,
            gs_base=bases.data + layout.handoff_size + lp * layout.tls_per_lp,
            rsp=stack + layout.stack_per_lp - PAGE - 8,
            ssp=stack + layout.stack_per_lp - 8,
            idtr_base=table,
            gdtr_base=table and table + GDT_FROM_IDT,
        )
        memory.write(layout.vmcs_pa + lp * PAGE, vmcs.encode())


def patch_idt(image: bytearray, s: SigStruct, code_base: int) -> None:
    """Aim the first 32 gates at the fault wrapper's entries, 16 bytes apart."""
    for vector in range(IDT_GATES):
        handler = code_base + s.fault_wrapper_offset + 16 * vector
        position = s.gdt_idt_offset + 16 * vector
        _, selector, ist, kind, _, _, reserved = _GATE.unpack_from(image, position)
        _GATE.pack_into(
            image, position, handler & 0xFFFF, selector, ist, kind, handler >> 16 & 0xFFFF, handler >> 32, reserved
        )
