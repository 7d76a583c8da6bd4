"""The little of ELF64 that a TDX module image needs: building one, and relocating it as P-SEAMLDR does.

Source: Intel P-SEAMLDR (tdx-loader 1.5.02), helpers/elf.c; System V ABI, AMD64 supplement, for the formats.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

SHT_PROGBITS = 1
SHT_RELA = 4
SHT_SEAMLAB_IDENTITY = 0x8000_5EA3
"""A section type of the range that is left to applications: the record of `seamldr.identity`."""
R_X86_64_RELATIVE = 8

EHDR_SIZE = 64
SHDR_SIZE = 64
RELA_SIZE = 24
_EHDR = struct.Struct("<4sBBB9xHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_RELA = struct.Struct("<QQQ")


class ElfError(ValueError):
    """The image breaks a rule of P-SEAMLDR's relocation; the text says which."""


class Section(msgspec.Struct, frozen=True):
    """The fields of a section header that the loader reads; address, offset and sizes in bytes."""

    type: int
    address: int
    offset: int
    size: int
    entry_size: int = 0


def build(pages: int, rip_offset: int, sections: list[tuple[Section, bytes]], fill: bytes) -> bytes:
    """A shared object of `pages` 4 KiB pages: header, section headers, the given contents, `fill` elsewhere."""
    image = bytearray(fill[: pages * 4096].ljust(pages * 4096, b"\xf4"))
    headers = [Section(0, 0, 0, 0), *(section for section, _ in sections)]
    image[:EHDR_SIZE] = _EHDR.pack(
        b"\x7fELF", 2, 1, 1, 3, 62, 1, rip_offset, 0, EHDR_SIZE, 0, EHDR_SIZE, 0, 0, SHDR_SIZE, len(headers), 0
    )
    for index, header in enumerate(headers):
        position = EHDR_SIZE + index * SHDR_SIZE
        image[position : position + SHDR_SIZE] = _SHDR.pack(
            0, header.type, 0, header.address, header.offset, header.size, 0, 0, 0, header.entry_size
        )
    for section, content in sections:
        image[section.offset : section.offset + len(content)] = content
    return bytes(image)


def pack_relocations(targets: list[tuple[int, int]], info: int = R_X86_64_RELATIVE) -> bytes:
    """RELA entries for (offset, addend) pairs."""
    return b"".join(_RELA.pack(offset, info, addend) for offset, addend in targets)


def section_headers(image: bytes | bytearray) -> Iterator[Section]:
    """The section headers, as P-SEAMLDR finds them. Raises ElfError on its own rules."""
    if len(image) < EHDR_SIZE or image[:7] != b"\x7fELF\x02\x01\x01":
        raise ElfError("not a little-endian ELF64 image of version 1")
    fields = _EHDR.unpack_from(image)
    shoff, shentsize, shnum = fields[9], fields[14], fields[15]
    for index in range(shnum):
        position = shoff + index * shentsize
        if position > len(image) - SHDR_SIZE:
            raise ElfError(f"section header {index} lies outside the image")
        _, kind, _, address, offset, size, _, _, _, entry_size = _SHDR.unpack_from(image, position)
        yield Section(kind, address, offset, size, entry_size)


def relocate(image: bytearray, base: int) -> int:
    """Apply every RELATIVE relocation for the linear address `base`; return how many. Raises ElfError."""
    count = 0
    for section in section_headers(image):
        if section.type != SHT_RELA:
            continue
        if section.entry_size == 0:
            raise ElfError("a relocation section has entries of 0 bytes")
        for index in range(section.size // section.entry_size):
            _relocate_one(image, base, section.address + index * section.entry_size)
            count += 1
    return count


def _relocate_one(image: bytearray, base: int, position: int) -> None:
    if position > len(image) - RELA_SIZE:
        raise ElfError("a relocation entry lies outside the image")
    offset, info, addend = _RELA.unpack_from(image, position)
    if info != R_X86_64_RELATIVE:
        raise ElfError(f"relocation {info:#x} is not R_X86_64_RELATIVE")
    if offset > len(image) - 8:
        raise ElfError("a relocation target lies outside the image")
    if addend >= len(image):
        raise ElfError("a relocation addend lies outside the image")
    struct.pack_into("<Q", image, offset, (base + addend) & 0xFFFF_FFFF_FFFF_FFFF)


def find_section(image: bytes, kind: int) -> bytes | None:
    """The content of the first section of type `kind`, or None; never raises on a malformed image."""
    try:
        for section in section_headers(image):
            if section.type == kind:
                return image[section.offset : section.offset + section.size]
    except ElfError:
        pass
    return None
