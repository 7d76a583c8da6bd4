"""Making TDX module images: a small, valid ELF64 image that names itself, and its signed manifest.

The shape is that of Intel's modules (one text, RELATIVE relocations, an interrupt table that the loader patches, a
tail of F4H bytes); the text itself is filler, since the emulated module runs from its identity.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa

from seamldr import elf
from seamldr.identity import ModuleIdentity, encode_identity
from seamldr.image import MAX_MODULE_PAGES, PAGE, ModuleImage
from seamldr.sigstruct import SigStruct, new_key, pack_cpuid_table, sign

XEON_CPUIDS = {1: (0x806F8, 0xC06F0, 0xA06F0), 2: (0xA06D0, 0xA06E0)}
"""By major version, CPUID.1.EAX of the processors that Intel's modules list."""
SVNS = {1: (1, 7), 2: (3, 5)}
"""By major version, SEAMSVN of one of Intel's modules: 1.5.08 and 2.0.08."""
FAULT_WRAPPER_DISTANCE = 0x160
MIN_PAGES = 4
_RELA_AT = 0x400
_IDENTITY_AT = 0xC00


def make_module(
    identity: ModuleIdentity | None = None,
    *,
    key: rsa.RSAPrivateKey | None = None,
    svn: tuple[int, int] | None = None,
    pages: int = 6,
    cpuid_table: tuple[int, ...] | None = None,
    relocations: int = 49,
    gdt_idt_offset: int | None = None,
    rip_offset: int = PAGE,
    image: bytes | None = None,
    **fields: Any,
) -> ModuleImage:
    """A module of `pages` pages with SEAMSVN `svn` (major, minor), signed with `key` or a fresh one.

    SEAMSVN and CPUID table are those of Intel's modules of the same series, 1.5 or 2.0, unless they are given. `image`
    replaces the ELF image; `fields` override any field of the manifest before it is signed, so that an image with one
    chosen defect can be made. The interrupt table lies in the last page unless `gdt_idt_offset` says
    otherwise; 0 means no table. Raises ValueError for fewer than 4 or more than 496 pages.
    """
    if image is None and not MIN_PAGES <= pages <= MAX_MODULE_PAGES:
        raise ValueError(f"a module image has {MIN_PAGES} to {MAX_MODULE_PAGES} pages, not {pages}")
    identity = identity or ModuleIdentity()
    series = 1 if identity.major < 2 else 2
    svn_major, svn_minor = svn or SVNS[series]
    cpuids = XEON_CPUIDS[series] if cpuid_table is None else cpuid_table
    table = (pages - 1) * PAGE if gdt_idt_offset is None else gdt_idt_offset
    module = image if image is not None else make_elf(identity, pages, rip_offset, relocations)
    manifest = SigStruct(
        date=int(str(identity.build_date), 16),
        seamhash=hashlib.sha384(module).digest(),
        svn_major=svn_major,
        svn_minor=svn_minor,
        rip_offset=rip_offset,
        module_hv=identity.module_hv,
        min_update_hv=identity.min_update_hv,
        no_downgrade=int(identity.no_downgrade),
        num_handoff_pages=identity.num_handoff_pages,
        num_global_data_pages=0x15 if series == 1 else 0x21,
        reserved3=_version_bytes(identity) if series == 2 else bytes(24),
        gdt_idt_offset=table,
        fault_wrapper_offset=rip_offset + FAULT_WRAPPER_DISTANCE if table else 0,
        cpuid_table_size=len(cpuids),
        cpuid_table=pack_cpuid_table(cpuids),
    )
    return resign(ModuleImage(manifest.encode().ljust(PAGE, b"\0"), module), key or new_key(), **fields)


def _version_bytes(identity: ModuleIdentity) -> bytes:
    """The last reserved field of the manifest, in which Intel's modules from 2.0 on carry update, minor, major, build.
    """
    version = struct.pack("<4BH", identity.update & 0xFF, 0, identity.minor & 0xFF, identity.major & 0xFF,
                          identity.build_num)  # fmt: skip
    return version.ljust(24, b"\0")


def resign(image: ModuleImage, key: rsa.RSAPrivateKey, **fields: Any) -> ModuleImage:
    """The same module with some manifest fields changed and a new signature by `key`."""
    manifest = msgspec.structs.replace(SigStruct.decode(image.sigstruct), **fields)
    encoded = sign(manifest, key).encode()
    return ModuleImage(encoded + image.sigstruct[len(encoded) :], image.module, image.version)


def make_elf(identity: ModuleIdentity, pages: int, rip_offset: int = PAGE, relocations: int = 49) -> bytes:
    """The ELF64 image: relocations aim at the data page behind the text and point into the text."""
    record = encode_identity(identity)
    targets = [(2 * PAGE + 8 * index, rip_offset + 16 * index) for index in range(relocations)]
    rela = elf.pack_relocations(targets)
    sections = [
        (elf.Section(elf.SHT_PROGBITS, rip_offset, rip_offset, PAGE), b""),
        (elf.Section(elf.SHT_RELA, _RELA_AT, _RELA_AT, len(rela), elf.RELA_SIZE), rela),
        (elf.Section(elf.SHT_SEAMLAB_IDENTITY, _IDENTITY_AT, _IDENTITY_AT, len(record)), record),
    ]
    # No two pages are alike, so pages in a wrong order never hash right; the last one ends in F4H, as Intel's do.
    fill = hashlib.shake_128(record).digest((pages - 1) * PAGE + PAGE // 2)
    return elf.build(pages, rip_offset, sections, fill)
