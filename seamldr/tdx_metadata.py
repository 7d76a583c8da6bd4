"""Metadata fields that the host may read: SYS.RD, SYS.RDALL, SYS.INFO, MNG.RD, VP.RD, and what it may write.

A field id is matched by class (bits 61:56) and field code (bits 23:0) only; size, context and write-mask bits are
ignored. Source: Intel TDX module ABI, "Metadata access"; `src/common/metadata_handlers/*.c`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec

from seamldr.tdx_call import Call, Refused, operand_invalid
from seamldr.tdx_context import TDVPS_BASE_PAGES, ModuleContext
from seamldr.tdx_handoff import read_header
from seamldr.tdx_state import (
    MAX_PKGS,
    MAX_RESERVED_PER_TDMR,
    MAX_TDMRS,
    PAGE_SIZE,
    OpState,
    SysState,
    TdData,
    VcpuData,
    VcpuState,
)
from seamldr.tdx_status import OperandId, TdxStatus
from seamldr.tdx_tdmr import PAMT_ENTRY_SIZE

ALL_ONES = 0xFFFF_FFFF_FFFF_FFFF
_CONTEXT_BITS = 7 << 52
_RESERVED_BITS = 0xFF << 24 | 7 << 47 | 1 << 55 | 1 << 62
_SEQUENCE_BITS = 0xF << 34 | 0x1FF << 38

ATTRIBUTES_FIXED0 = 0x8000_0000_7000_0001  # bits that may be 1
ATTRIBUTES_FIXED1 = 0
ATTRIBUTES_DEBUG = 1
XFAM_FIXED0 = 0x0006_DBE7
XFAM_FIXED1 = 0x0000_0003
CONFIG_FLAGS_FIXED0 = 0x0000_000F
MAX_VCPUS_PER_TD_B = 576
MAX_CMRS = 32

MODULE_HV = 0x8900_0001_0000_0000
HANDOFF_DATA_VALID = 0x8900_0000_0000_0004
TDX_FEATURES0 = 0x0A00_0003_0000_0008
MAJOR_VERSION = 0x0800_0001_0000_0004
MINOR_VERSION = 0x0800_0001_0000_0003
UPDATE_VERSION = 0x0800_0001_0000_0005

OwnerT = TypeVar("OwnerT")


class Field(msgspec.Struct, Generic[OwnerT], frozen=True):
    """One field: how to read it, and if the host may write it, how to do that."""

    id: int
    read: Callable[[ModuleContext, OwnerT], int]
    debug_only: bool = False
    write: Callable[[OwnerT, int], None] | None = None


class FieldTable(Generic[OwnerT]):
    """The fields of one context in their order."""

    def __init__(self, fields: Sequence[Field[OwnerT]]) -> None:
        self._fields = list(fields)
        self._places = {_key(field.id): place for place, field in enumerate(fields)}

    def first_id(self) -> int:
        """The field id where enumeration begins."""
        return self._fields[0].id

    def all(self) -> list[Field[OwnerT]]:
        """All fields, in order."""
        return self._fields

    def find(self, field_id: int, error_out: dict[str, int]) -> Field[OwnerT]:
        """The field of `field_id`, or TDX_METADATA_FIELD_ID_INCORRECT with `error_out`."""
        place = self._places.get(_key(field_id))
        if place is None or field_id & (_RESERVED_BITS | _SEQUENCE_BITS):
            raise Refused(TdxStatus.TDX_METADATA_FIELD_ID_INCORRECT, **error_out)
        return self._fields[place]

    def next_id(self, field: Field[OwnerT]) -> int:
        """The field id after `field`; all ones after the last."""
        place = self._places[_key(field.id)] + 1
        return self._fields[place].id if place < len(self._fields) else ALL_ONES

    def read_next(self, m: ModuleContext, owner: OwnerT, field_id: int, debug: bool = True) -> dict[str, int]:
        """Outputs of a read that also says what comes next: RDX next id, R8 value."""
        error = {"rdx": ALL_ONES, "r8": 0}
        if field_id | _CONTEXT_BITS == ALL_ONES:
            raise Refused(TdxStatus.TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT, rdx=self.first_id(), r8=0)
        field = self.find(field_id, error)
        if field.debug_only and not debug:
            raise Refused(TdxStatus.TDX_METADATA_FIELD_NOT_READABLE, **error)
        return {"rdx": self.next_id(field), "r8": field.read(m, owner)}

    def write(self, m: ModuleContext, owner: OwnerT, field_id: int, value: int, mask: int) -> int:
        """Write the bits of `mask`; returns the previous value."""
        field = self.find(field_id, {"r8": 0})
        if field.write is None:
            raise Refused(TdxStatus.TDX_METADATA_FIELD_NOT_WRITABLE, r8=0)
        previous = field.read(m, owner)
        field.write(owner, previous & ~mask | value & mask)
        return previous


def _key(field_id: int) -> tuple[int, int]:
    return field_id >> 56 & 0x3F, field_id & 0xFF_FFFF


def _constant(field_id: int, value: int) -> Field[None]:
    return Field(field_id, lambda m, _: value)


def _cmr(index: int, part: int) -> Callable[[ModuleContext, None], int]:
    return lambda m, _: m.platform.cmrs[index][part] if index < len(m.platform.cmrs) else 0


def _pkg_fms(pkg: int) -> Callable[[ModuleContext, None], int]:
    return lambda m, _: m.state.system.init_cpuid if pkg < m.platform.num_pkgs else 0


def _system_fields(profile_b: bool) -> list[Field[None]]:
    fields: list[Field[None]] = [
        Field(0x0000_0002_0000_0000, lambda m, _: m.platform.num_pkgs),
        *(Field(0x0000_0002_0000_0001 + pkg, _pkg_fms(pkg)) for pkg in range(MAX_PKGS)),
        _constant(0x0800_0002_0000_0000, 0x8086),
        Field(0x8800_0002_0000_0001, lambda m, _: m.identity.build_date),
        Field(0x8800_0001_0000_0002, lambda m, _: m.identity.build_num),
        Field(MINOR_VERSION, lambda m, _: m.identity.minor),
        Field(MAJOR_VERSION, lambda m, _: m.identity.major),
        Field(UPDATE_VERSION, lambda m, _: m.identity.update),
        Field(0x0800_0001_0000_0006, lambda m, _: m.identity.internal_version),
        Field(MODULE_HV, lambda m, _: m.identity.module_hv),
        Field(0x8900_0001_0000_0001, lambda m, _: m.identity.min_update_hv),
        Field(0x8900_0000_0000_0002, lambda m, _: int(m.identity.no_downgrade)),
        Field(0x8900_0001_0000_0003, lambda m, _: m.identity.num_handoff_pages),
        Field(HANDOFF_DATA_VALID, lambda m, _: read_header(m.memory, m.platform.handoff_pa).valid),
        Field(0x8900_0001_0000_0005, lambda m, _: read_header(m.memory, m.platform.handoff_pa).hv),
        Field(0x8900_0002_0000_0006, lambda m, _: read_header(m.memory, m.platform.handoff_pa).size),
        _constant(0x0A00_0002_0000_0000, 0),
        _constant(0x0A00_0000_0000_0001, 1),
        Field(TDX_FEATURES0, lambda m, _: m.identity.tdx_features0),
        Field(0x9000_0001_0000_0000, lambda m, _: len(m.platform.cmrs)),
        *(Field(0x9000_0003_0000_0080 + index, _cmr(index, 0)) for index in range(MAX_CMRS)),
        *(Field(0x9000_0003_0000_0100 + index, _cmr(index, 1)) for index in range(MAX_CMRS)),
        _constant(0x9100_0001_0000_0008, MAX_TDMRS),
        _constant(0x9100_0001_0000_0009, MAX_RESERVED_PER_TDMR),
        *(_constant(0x9100_0001_0000_0010 + size, PAMT_ENTRY_SIZE) for size in range(3)),
        _constant(0x9800_0001_0000_0000, PAGE_SIZE),
        Field(0x9800_0001_0000_0100, lambda m, _: m.tdcs_base_pages * PAGE_SIZE),
        _constant(0x9800_0001_0000_0200, TDVPS_BASE_PAGES * PAGE_SIZE),
        _constant(0x1900_0003_0000_0000, ATTRIBUTES_FIXED0),
        _constant(0x1900_0003_0000_0001, ATTRIBUTES_FIXED1),
        _constant(0x1900_0003_0000_0002, XFAM_FIXED0),
        _constant(0x1900_0003_0000_0003, XFAM_FIXED1),
        _constant(0x9900_0001_0000_0004, 0),
        _constant(0x9900_0003_0000_0006, CONFIG_FLAGS_FIXED0),
        _constant(0x9900_0003_0000_0007, 0),
    ]
    if profile_b:
        fields.append(_constant(0x9900_0001_0000_0008, MAX_VCPUS_PER_TD_B))
    return fields


def _mrtd(word: int) -> Callable[[ModuleContext, TdData], int]:
    def read(m: ModuleContext, td: TdData) -> int:
        if td.op_state < OpState.RUNNABLE:
            return 0
        return int.from_bytes(td.mrtd[8 * word : 8 * word + 8], "little")

    return read


def _set_pend_nmi(vcpu: VcpuData, value: int) -> None:
    vcpu.pend_nmi = bool(value & 1)


SYSTEM_FIELDS_A: FieldTable[None] = FieldTable(_system_fields(profile_b=False))
SYSTEM_FIELDS_B: FieldTable[None] = FieldTable(_system_fields(profile_b=True))

TD_FIELDS: FieldTable[TdData] = FieldTable(
    [
        Field(0x8010_0000_0000_0001, lambda m, td: int(td.fatal)),
        Field(0x8010_0003_0000_0004, lambda m, td: td.chldcnt),
        Field(0x8010_0002_0000_0005, lambda m, td: td.lifecycle),
        Field(0x8110_0001_0000_0001, lambda m, td: td.hkid),
        Field(0x8110_0003_0000_0002, lambda m, td: td.pkg_config_bitmap),
        Field(0x8210_0001_0000_0000, lambda m, td: td.handoff_version),
        Field(0x8210_0003_0000_0001, lambda m, td: td.seamdb_index),
        Field(0x9010_0002_0000_0001, lambda m, td: td.num_vcpus),
        Field(0x9010_0002_0000_0002, lambda m, td: td.num_assoc_vcpus),
        Field(0x9010_0002_0000_0004, lambda m, td: td.op_state),
        Field(0x1110_0003_0000_0000, lambda m, td: td.attributes),
        Field(0x1110_0003_0000_0001, lambda m, td: td.xfam),
        Field(0x1110_0002_0000_0002, lambda m, td: td.max_vcpus),
        Field(0x9210_0003_0000_0000, lambda m, td: td.epoch),
        Field(0x9210_0001_0000_0001, lambda m, td: td.refcount[0]),
        Field(0x9210_0001_0000_0002, lambda m, td: td.refcount[1]),
        *(Field(0x1310_0003_0000_0000 + word, _mrtd(word)) for word in range(6)),
    ]
)

VCPU_FIELDS: FieldTable[VcpuData] = FieldTable(
    [
        Field(0xA020_0000_0000_0000, lambda m, vcpu: vcpu.state, debug_only=True),
        Field(0xA020_0002_0000_0002, lambda m, vcpu: vcpu.index),
        Field(0xA020_0002_0000_0004, lambda m, vcpu: vcpu.assoc_lpid),
        Field(0xA020_0003_0000_0006, lambda m, vcpu: vcpu.epoch),
        Field(0x2020_0000_0000_000B, lambda m, vcpu: int(vcpu.pend_nmi), write=_set_pend_nmi),
        Field(0xA020_0003_0000_0032, lambda m, vcpu: vcpu.last_seamdb_index, debug_only=True),
    ]
)


def _system_table(m: ModuleContext) -> FieldTable[None]:
    return SYSTEM_FIELDS_B if m.profile_b else SYSTEM_FIELDS_A


def _check_lp_initialized(m: ModuleContext, c: Call) -> None:
    if not m.state.lps[c.lp].is_init or m.state.system.sys_state == SysState.SYSINIT_PENDING:
        raise Refused(TdxStatus.TDX_SYS_LP_INIT_NOT_DONE)


def sys_rd(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.RD: one global field, and the id of the next."""
    _check_lp_initialized(m, c)
    c.out = _system_table(m).read_next(m, None, c.regs.rdx)
    return TdxStatus.TDX_SUCCESS


def sys_rdall(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.RDALL: as many global fields as fit a page, as sequences of one element: id u64, value u64.

    The page starts with {u16 bytes used, u16 number of sequences, 4 pad}.
    """
    _check_lp_initialized(m, c)
    list_pa = m.check_shared_pa(c.regs.rdx, PAGE_SIZE, OperandId.RDX)
    table = _system_table(m)
    field_id = table.first_id() if c.regs.r8 | _CONTEXT_BITS == ALL_ONES else c.regs.r8
    elements: list[bytes] = []
    while field_id != ALL_ONES and len(elements) < (PAGE_SIZE - 8) // 16:
        field = table.find(field_id, {"r8": ALL_ONES})
        elements.append(field.id.to_bytes(8, "little") + field.read(m, None).to_bytes(8, "little"))
        field_id = table.next_id(field)
    header = (8 + 16 * len(elements)).to_bytes(2, "little") + len(elements).to_bytes(2, "little") + bytes(4)
    m.memory.write(list_pa, header + b"".join(elements))
    c.out = {"r8": field_id}
    return TdxStatus.TDX_SUCCESS


def sys_info(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.INFO: `struct tdsysinfo_struct` (1024 bytes) and the array of CMRs (32 of 16 bytes)."""
    _check_lp_initialized(m, c)
    info_pa = m.check_shared_pa(c.regs.rcx, 1024, OperandId.RCX)
    if c.regs.rdx < 1024:
        raise operand_invalid(OperandId.RDX)
    cmr_pa = m.check_shared_pa(c.regs.r8, 512, OperandId.R8)
    if c.regs.r9 < MAX_CMRS:
        raise operand_invalid(OperandId.R9)
    m.memory.write(info_pa, _tdsysinfo(m))
    cmrs = b"".join(word.to_bytes(8, "little") for cmr in m.platform.cmrs for word in cmr)
    m.memory.write(cmr_pa, cmrs.ljust(16 * MAX_CMRS, b"\0"))
    c.out = {"rdx": 1024, "r9": MAX_CMRS}
    return TdxStatus.TDX_SUCCESS


def _tdsysinfo(m: ModuleContext) -> bytes:
    info = bytearray(1024)
    identity = m.identity
    places = (
        (4, 4, 0x8086),
        (8, 4, identity.build_date),
        (12, 2, identity.build_num),
        (14, 2, identity.minor),
        (16, 2, identity.major),
        (32, 2, MAX_TDMRS),
        (34, 2, MAX_RESERVED_PER_TDMR),
        (36, 2, PAMT_ENTRY_SIZE),
        (48, 2, m.tdcs_base_pages * PAGE_SIZE),
        (52, 2, TDVPS_BASE_PAGES * PAGE_SIZE),
        (64, 8, ATTRIBUTES_FIXED0),
        (72, 8, ATTRIBUTES_FIXED1),
        (80, 8, XFAM_FIXED0),
        (88, 8, XFAM_FIXED1),
    )
    for offset, size, value in places:
        info[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(info)


_READABLE = frozenset(OpState(state) for state in range(1, 11))
_WRITABLE = _READABLE - {OpState.PAUSED_EXPORT, OpState.POST_EXPORT}


def _version_outputs(c: Call, outputs: dict[str, int]) -> dict[str, int]:
    """Version 0 of MNG.RD and VP.RD has no RDX output."""
    return outputs if c.version else {"r8": outputs["r8"]}


def _read(m: ModuleContext, c: Call, table: FieldTable[OwnerT], owner: OwnerT, td: TdData) -> int:
    if c.version == 0 and c.regs.rdx | _CONTEXT_BITS == ALL_ONES:
        raise Refused(TdxStatus.TDX_METADATA_FIELD_ID_INCORRECT, r8=0)
    debug = bool(td.attributes & ATTRIBUTES_DEBUG)
    try:
        outputs = table.read_next(m, owner, c.regs.rdx, debug)
    except Refused as refusal:
        refusal.out = _version_outputs(c, refusal.out)
        raise
    c.out = _version_outputs(c, outputs)
    return TdxStatus.TDX_SUCCESS


def mng_rd(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.RD: one field of TDR or TDCS."""
    if c.version > 1:
        raise operand_invalid(OperandId.RAX)
    td = m.lock_td(c, c.regs.rcx, OperandId.RCX, exclusive=False)
    m.check_td_state(c, td, _READABLE, lock_op_state=True)
    return _read(m, c, TD_FIELDS, td, td)


def mng_wr(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.WR: no field of TDR or TDCS of ours is the host's to write."""
    td = m.lock_td(c, c.regs.rcx, OperandId.RCX, exclusive=False)
    m.check_td_state(c, td, _WRITABLE, lock_op_state=True)
    c.out = {"r8": TD_FIELDS.write(m, td, c.regs.rdx, c.regs.r8, c.regs.r9)}
    return TdxStatus.TDX_SUCCESS


def vp_rd(m: ModuleContext, c: Call) -> int:
    """TDH.VP.RD: one field of TDVPS; associates the vCPU with the caller's LP."""
    if c.version > 1:
        raise operand_invalid(OperandId.RAX)
    vcpu, td = m.lock_vcpu(c, c.regs.rcx, OperandId.RCX, exclusive=False)
    m.check_td_state(c, td, _READABLE, lock_op_state=True)
    m.check_vcpu_pages(vcpu)
    m.associate(vcpu, td, c.lp, (VcpuState.VCPU_READY, VcpuState.VCPU_DISABLED))
    return _read(m, c, VCPU_FIELDS, vcpu, td)


def vp_wr(m: ModuleContext, c: Call) -> int:
    """TDH.VP.WR: write the bits of R9 in one field of TDVPS; associates the vCPU with the caller's LP."""
    vcpu, td = m.lock_vcpu(c, c.regs.rcx, OperandId.RCX, exclusive=False)
    m.check_td_state(c, td, _WRITABLE, lock_op_state=True)
    m.check_vcpu_pages(vcpu)
    m.associate(vcpu, td, c.lp, (VcpuState.VCPU_READY,))
    c.out = {"r8": VCPU_FIELDS.write(m, vcpu, c.regs.rdx, c.regs.r8, c.regs.r9)}
    m.touch_vcpu(vcpu)
    return TdxStatus.TDX_SUCCESS
