"""VMCS field encodings, and VMREAD and VMWRITE over all of them."""

from __future__ import annotations

import pytest
from vmcs_rows import ROWS, Row

from bus.memory import PhysicalMemory
from cpu.vmx import FIELD_TABLE, CodeMode, Field, FieldType, VmxConfig, VmxUnit, Width
from cpu.vmx.vmcs import DATA_OFFSET, SLOT

X, A = 0x1000, 0x2000
ALL_ONES = 0xFFFF_FFFF_FFFF_FFFF

VMWRITE_ANY = 1 << 29
"""Bit of IA32_VMX_MISC."""


def unit_in_root(config: VmxConfig | None = None) -> VmxUnit:
    """Root operation with an empty current VMCS."""
    memory = PhysicalMemory.private(1 << 16)
    unit = VmxUnit(config or VmxConfig(), memory)
    unit.reset_to_vmx_ready()
    memory.write32(X, unit.config.vmcs_revision_id)
    memory.write32(A, unit.config.vmcs_revision_id)
    assert unit.vmxon(X).ok and unit.vmclear(A).ok and unit.vmptrld(A).ok
    return unit


def test_no_field_is_missing_or_too_many() -> None:
    """The unit has exactly the fields of the architecture, in the order of their encodings."""
    assert [row.encoding for row in ROWS] == sorted(map(int, Field))


def test_table_follows_from_the_encoding() -> None:
    """Width, type and read-only rule of all 206 fields are the ones in their encoding's bits."""
    assert len(FIELD_TABLE) == len(Field) == 206
    for field, info in FIELD_TABLE.items():
        assert field & ~0b110_1111_1111_1110 == 0
        assert (info.width, info.type) == (Width(field >> 13), FieldType(field >> 10 & 3))
        assert info.read_only == (info.type is FieldType.EXIT_INFORMATION)
        assert info.bits == {Width.WORD: 16, Width.DOUBLEWORD: 32}.get(info.width, 64)
    assert FIELD_TABLE[Field.EPT_POINTER].feature == "EPT"
    assert FIELD_TABLE[Field.GUEST_RIP].feature == ""


def test_vmread_accepts_exactly_the_architectural_encodings() -> None:
    """Of all 32,768 encodings only the fields, and high halves of 64-bit fields, can be read."""
    unit = unit_in_root()
    named = {*map(int, Field), *(field | 1 for field in Field if FIELD_TABLE[field].width is Width.QUADWORD)}
    readable = {encoding for encoding in range(1 << 15) if unit.vmread(encoding).ok}
    assert readable == named
    assert {unit.vmread(encoding).error for encoding in range(1 << 15) if encoding not in named} == {12}


@pytest.mark.conformance("VMCS fields")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"row-{row.name}")
def test_field(row: Row) -> None:
    """Name, feature, width, high half and read-only rule are the row's; a processor without it gives error 12."""
    field = row.encoding
    assert (Field(field).name, FIELD_TABLE[Field(field)].feature) == (row.name, row.feature)
    unit = unit_in_root()
    assert unit.vmwrite(field, ALL_ONES).ok
    assert unit.vmread(field).value == (1 << row.bits) - 1
    assert [other for other in Field if other != field and unit.vmread(other).value] == []
    if row.has_high_half:
        assert unit.vmwrite(field | 1, 0x5_0000_0007).ok
        assert (unit.vmread(field).value, unit.vmread(field | 1).value) == (0x7_FFFF_FFFF, 7)
    else:
        assert (unit.vmwrite(field | 1, 1).error, unit.vmread(field | 1).error) == (12, 12)
    plain = VmxConfig()
    locked = unit_in_root(plain.with_caps({0x485: plain.misc & ~VMWRITE_ANY}))
    assert locked.vmwrite(field, 1).error == (13 if row.read_only else 0)
    without = unit_in_root(VmxConfig(supported_fields=frozenset(set(map(int, Field)) - {field})))
    assert (without.vmread(field).error, without.vmwrite(field, 1).error) == (12, 12)


def test_read_only_fields_refuse_vmwrite_where_misc_bit_29_is_clear() -> None:
    """Exit information gives error 13, an encoding that does not exist error 12 all the same."""
    unit = unit_in_root(VmxConfig().with_caps({0x485: VmxConfig().misc & ~VMWRITE_ANY}))
    for field, info in FIELD_TABLE.items():
        assert unit.vmwrite(field, 1).error == (13 if info.read_only else 0)
    assert unit.vmwrite(0x2401, 1).error == 13
    assert unit.vmwrite(0x4420, 1).error == 12


def test_high_half_leaves_the_low_half() -> None:
    """A VMWRITE through the high encoding takes the operand's low 32 bits into bits 63:32."""
    unit = unit_in_root()
    unit.vmwrite(Field.TSC_OFFSET, 0x1111_2222_3333_4444)
    unit.vmwrite(Field.TSC_OFFSET | 1, 0xAAAA_BBBB_CCCC_DDDD)
    assert unit.vmread(Field.TSC_OFFSET).value == 0xCCCC_DDDD_3333_4444
    assert unit.vmread(Field.TSC_OFFSET | 1).value == 0xCCCC_DDDD


def test_outside_64_bit_mode_operands_have_32_bits() -> None:
    """In 32-bit code VMREAD truncates a wide field and VMWRITE clears its upper part."""
    unit = unit_in_root()
    unit.vmwrite(Field.GUEST_RIP, 0x1234_5678_9ABC_DEF0)
    unit.code_mode = CodeMode.PROTECTED
    assert unit.vmread(Field.GUEST_RIP).value == 0x9ABC_DEF0
    unit.vmwrite(Field.GUEST_RIP, 0xFFFF_FFFF_0000_0001)
    unit.code_mode = CodeMode.LONG
    assert unit.vmread(Field.GUEST_RIP).value == 1


def test_supported_fields_are_configuration() -> None:
    """A processor has the fields it is given, also one that the architecture does not name, and no others."""
    fields = frozenset({int(Field.GUEST_RIP), int(Field.TSC_OFFSET), 0x2046})
    unit = unit_in_root(VmxConfig(supported_fields=fields))
    readable = {encoding for encoding in range(1 << 15) if unit.vmread(encoding).ok}
    assert readable == {0x681E, 0x2010, 0x2011, 0x2046, 0x2047}
    assert unit.vmwrite(0x2046, ALL_ONES).ok
    assert unit.vmclear(A).ok and unit.vmptrld(A).ok
    assert unit.vmread(0x2046).value == ALL_ONES


def test_impossible_fields_are_refused() -> None:
    """A configuration cannot name an encoding with reserved bits, nor more fields than a region holds."""
    memory = PhysicalMemory.private(4096)
    with pytest.raises(ValueError, match="0x1000"):
        VmxUnit(VmxConfig(supported_fields=frozenset({0x1000})), memory)
    with pytest.raises(ValueError, match="do not fit"):
        VmxUnit(VmxConfig(supported_fields=frozenset(range(0, 0x400, 2)) | frozenset(range(0x2000, 0x2400, 2))), memory)


def test_region_format() -> None:
    """Launch state at offset 8, fields behind it, nothing in the last 16 bytes of the region."""
    unit = unit_in_root()
    unit.memory.write(A + 4080, b"not the CPU's   ")
    unit.vmwrite(Field.GUEST_RIP, 0xABCD)
    unit.vmclear(A)
    assert unit.memory.read(A + DATA_OFFSET, 8) == b"clear\0\0\0"
    assert unit.memory.read64(A + DATA_OFFSET + 8 * SLOT[Field.GUEST_RIP]) == 0xABCD
    assert unit.memory.read(A + 4080, 16) == b"not the CPU's   "
    assert unit.memory.read32(A) == unit.config.vmcs_revision_id


def test_garbage_in_a_region_cannot_exceed_field_widths() -> None:
    """A VMCS loaded from memory that never saw a VMCLEAR reads as garbage, but as field-sized garbage."""
    unit = unit_in_root()
    unit.memory.write(0x3008, b"\xff" * 4000)
    unit.memory.write32(0x3000, unit.config.vmcs_revision_id)
    assert unit.vmptrld(0x3000).ok
    assert unit.vmread(Field.GUEST_CS_SELECTOR).value == 0xFFFF
    assert unit.vmread(Field.EXIT_REASON).value == 0xFFFF_FFFF
