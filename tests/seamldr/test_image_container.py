"""Module image files: rows 114 to 123 of the kernel's checks, version 1, conversion, and the identity inside."""

from __future__ import annotations

import errno
import hashlib
import struct
from typing import Any

import msgspec
import pytest
from pseamldr_bench import KEY, PUBLISHED_SHAPES, manifest, published

from seamldr import elf
from seamldr.identity import PUBLISHED, ModuleIdentity, encode_identity, identity_of, make_identity
from seamldr.image import PAGE, ImageError, ModuleImage, build_v1, build_v2, check_framing, checksum, parse, reframe
from seamldr.module_maker import make_module, resign
from seamldr.sigstruct import SIGSTRUCT_SIZE, SigStruct

IMAGE = published("1.5.08")
V1, V2 = build_v1(IMAGE), build_v2(IMAGE)


def put(blob: bytes, offset: int, data: bytes) -> bytes:
    return blob[:offset] + data + blob[offset + len(data) :]


def counts(sigstruct_pages: int, module_pages: int) -> bytes:
    """The good file with other page counts in its header."""
    return put(V2, 12, struct.pack("<II", sigstruct_pages, module_pages))


KERNEL_REFUSES = {
    "row-114": (V2[:4095], "header page"),
    "row-114-empty": (b"", "header page"),
    "row-115": (V1, "size of the file"),
    "row-116-byte-long": (V2 + b"\0", "size of the file"),
    "row-116-byte-short": (V2[:-1], "size of the file"),
    "row-116-page-long": (V2 + bytes(PAGE), "size of the file"),
    "row-116-page-short": (V2[:-PAGE], "size of the file"),
    "row-117": (put(V2, 0, b"\1\2"), "version"),
    "row-118": (put(build_v2(ModuleImage(IMAGE.sigstruct * 2, IMAGE.module)), 0, b"\0\2"), "at most"),
    "row-119": (build_v2(ModuleImage(IMAGE.sigstruct, bytes(497 * PAGE))), "at most"),
    "row-120": (put(V2, 4, b"TDX-BLOb"), "signature"),
    "row-121-first": (put(V2, 20, b"\1"), "reserved"),
    "row-121-last": (put(V2, 4095, b"\1"), "reserved"),
    "row-123": (counts(0x10_0001, 101), "at most"),
    "row-123-module": (counts(1, 0x10_0000 + 101), "at most"),
    "order-size-before-version": (put(V2, 0, b"\1\2") + b"\0", "size of the file"),
    "order-version-before-signature": (put(put(V2, 0, b"\1\2"), 4, b"TDX-BLOb"), "version"),
}


@pytest.mark.conformance("Image files")
@pytest.mark.parametrize(("blob", "rule"), KERNEL_REFUSES.values(), ids=KERNEL_REFUSES.keys())
def test_kernel_refuses(blob: bytes, rule: str) -> None:
    """The kernel answers -EINVAL, by the first check that fails."""
    with pytest.raises(ImageError, match=rule) as caught:
        check_framing(blob)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.conformance("Image files")
@pytest.mark.parametrize(
    "blob",
    [
        pytest.param(V2, id="good"),
        pytest.param(put(V2, 2, b"\x55\xaa"), id="row-122"),
        pytest.param(build_v2(ModuleImage(IMAGE.sigstruct, b"")), id="row-124"),
        pytest.param(build_v2(ModuleImage(b"", IMAGE.module)), id="row-125"),
        pytest.param(put(V2, 3 * PAGE, b"\x55\xaa"), id="row-126"),
        pytest.param(build_v2(ModuleImage(IMAGE.sigstruct, bytes(496 * PAGE))), id="496-pages"),
    ],
)
def test_kernel_accepts(blob: bytes) -> None:
    """What the kernel does not look at passes, and the sections are where the header says."""
    image = check_framing(blob)
    assert blob[PAGE:] == image.sigstruct + image.module


def test_v1_header() -> None:
    """The shipped form: version, offset, signature, length, and a zero-sum checksum."""
    version, _, offset, signature, length, reserved = struct.unpack_from("<HHI8sII", V1)
    assert (version, offset, signature, length, reserved) == (0x0100, 0x2000, b"TDX-BLOB", 103 * PAGE, 0)
    assert checksum(V1) == 0


def test_reframe() -> None:
    """Conversion writes a new header page and keeps everything behind it."""
    converted = reframe(V1)
    assert converted == V2
    assert converted[PAGE:] == V1[PAGE:]
    assert parse(V1) == msgspec.structs.replace(parse(V2), version=0x0100)


@pytest.mark.parametrize(
    ("blob", "rule"),
    [
        (put(V1, 8, b"TDX-BLOb"), "signature"),
        (put(V1, 16, struct.pack("<I", len(V1) - PAGE)), "LENGTH"),
        (put(V1, 20, b"\1"), "reserved"),
        (put(V1, 4095, b"\1"), "reserved"),
        (put(V1, 4, struct.pack("<I", 0x1800)), "whole pages"),
        (put(V1, 4, struct.pack("<I", PAGE)), "whole pages"),
        (put(V1, 4, struct.pack("<I", 103 * PAGE)), "whole pages"),
        (put(V1, 4, struct.pack("<I", 0x3000)), "more than"),
        (build_v1(ModuleImage(IMAGE.sigstruct, bytes(497 * PAGE))), "more than"),
        (put(V1, 2, b"\0\0"), "add up"),
        (put(V2, 2, b"\0\0"), "add up"),
        (V1[:100], "header page"),
    ],
)
def test_parse_refuses(blob: bytes, rule: str) -> None:
    """A reader of both forms refuses what neither format allows."""
    with pytest.raises(ImageError, match=rule):
        parse(blob)


@pytest.mark.parametrize("version", PUBLISHED_SHAPES)
def test_identity_inside(version: str) -> None:
    """A made image names itself, in an image of the published size."""
    image = published(version)
    assert image.module_pages == PUBLISHED_SHAPES[version][1]
    assert identity_of(manifest(image), image.module) == make_identity(version)


def test_identity_survives_every_field() -> None:
    """All fields of a record come back."""
    identity = ModuleIdentity(3, 14, 15, 20991231, 9, "B", 7, 5, True, 30, 1 << 63, 2, 65535)
    image = make_module(identity, key=KEY)
    assert identity_of(manifest(image), image.module) == identity
    assert manifest(image).date == 0x20991231
    assert (manifest(image).module_hv, manifest(image).min_update_hv, manifest(image).no_downgrade) == (7, 5, 1)


@pytest.mark.parametrize(("version", "features0"), PUBLISHED)
def test_identity_of_published(version: str, features0: int) -> None:
    """An image without a record is known by its hash."""
    sigstruct = SigStruct(seamhash=bytes.fromhex(PUBLISHED[version, features0]), date=0x20240407, num_handoff_pages=9)
    identity = identity_of(sigstruct, b"\x7fELF")
    assert (identity.version, identity.tdx_features0, identity.profile) == (version, features0, "A")
    assert (identity.build_date, identity.num_handoff_pages) == (20240407, 9)


@pytest.mark.parametrize(
    "record",
    [
        b"", b"SEAMLAB\0", b"OTHER..\0\0\0\0\0", b"SEAMLAB\0\xff\xff\xff\xff\xc1",
        encode_identity(ModuleIdentity())[:-1], b"SEAMLAB\0\2\0\0\0\xa1\xff", b"SEAMLAB\0\1\0\0\0\x90",
    ],
    ids=["none", "short", "magic", "msgpack", "cut", "utf-8", "type"],
)  # fmt: skip
def test_unknown_identity(record: bytes) -> None:
    """A missing or malformed record and an unknown hash leave what the manifest says, and version 0.0.0."""
    sections = [(elf.Section(elf.SHT_SEAMLAB_IDENTITY, 0x800, 0x800, len(record)), record)] if record else []
    identity = identity_of(SigStruct(date=0xABCDEF01, module_hv=3), elf.build(4, 0x1000, sections, b""))
    assert (identity.version, identity.build_date, identity.module_hv) == ("0.0.00", 0, 3)


@pytest.mark.parametrize("version", ["1.5", "1.5.x", "1.5.8.1", "", "1.-5.0", "1.5.65536", "1.5.²"])
def test_bad_version(version: str) -> None:
    """A version is three numbers that fit u16."""
    with pytest.raises(ValueError, match=r"major\.minor\.update"):
        make_identity(version)


def test_profiles() -> None:
    """Profile B is the module with handoff version 1, no downgrade and update compatibility."""
    old, new = make_identity("1.5.08"), make_identity("1.5.17", "B")
    assert (old.module_hv, old.no_downgrade, old.tdx_features0 >> 47) == (0, False, 0)
    assert (new.module_hv, new.min_update_hv, new.no_downgrade, new.tdx_features0 >> 47) == (1, 0, True, 1)


@pytest.mark.parametrize("pages", [3, 497])
def test_image_sizes(pages: int) -> None:
    """An image has 4 to 496 pages."""
    with pytest.raises(ValueError, match="4 to 496"):
        make_module(key=KEY, pages=pages)


def test_made_module() -> None:
    """The default image: a page of manifest, 49 relocations, no two pages alike, F4H at the end, SEAMHASH right."""
    image = make_module(key=KEY)
    assert (len(image.sigstruct), image.module_pages) == (PAGE, 6)
    assert image.sigstruct[SIGSTRUCT_SIZE:] == bytes(PAGE - SIGSTRUCT_SIZE)
    assert elf.relocate(bytearray(image.module), 0x1000) == 49
    assert len({image.module[i : i + PAGE] for i in range(0, 6 * PAGE, PAGE)}) == 6
    assert image.module[-PAGE // 2 :] == b"\xf4" * (PAGE // 2)
    assert manifest(image).seamhash == hashlib.sha384(image.module).digest()


def test_resign_keeps_the_rest() -> None:
    """Signing again changes the named fields and the signature only."""
    old, new = manifest(IMAGE), manifest(resign(IMAGE, KEY, date=0x20250101))
    changed = [name for name in old.__struct_fields__ if getattr(old, name) != getattr(new, name)]
    assert changed == ["date", "signature"]


ELF_DEFECTS: dict[str, tuple[int, bytes]] = {
    "magic": (0, b"\x7fELG"),
    "class-32": (4, b"\1"),
    "big-endian": (5, b"\2"),
    "ident-version": (6, b"\0"),
    "headers-outside": (40, struct.pack("<Q", 6 * PAGE - 63)),
    "headers-far-outside": (40, b"\xff" * 8),
    "entry-size-0": (64 + 2 * 64 + 56, bytes(8)),
    "entries-outside": (64 + 2 * 64 + 16, struct.pack("<Q", 6 * PAGE - 23)),
    "wrong-type": (0x408, struct.pack("<Q", 1)),
    "symbol": (0x408, struct.pack("<Q", 1 << 32 | 8)),
    "target-outside": (0x400, struct.pack("<Q", 6 * PAGE - 7)),
    "addend-outside": (0x410, struct.pack("<Q", 6 * PAGE)),
    "addend-negative": (0x410, b"\xff" * 8),
}


@pytest.mark.parametrize("defect", ELF_DEFECTS)
def test_relocation_refuses(defect: str) -> None:
    """Each rule of the relocation on its own."""
    offset, data = ELF_DEFECTS[defect]
    module = put(make_module(key=KEY).module, offset, data)
    with pytest.raises(elf.ElfError):
        elf.relocate(bytearray(module), 0)


def test_relocation_writes_base_plus_addend() -> None:
    """RELATIVE: the u64 at the offset becomes base + addend."""
    module = bytearray(make_module(key=KEY).module)
    elf.relocate(module, 0xFFFF_8000_0000_0000)
    assert struct.unpack_from("<2Q", module, 2 * PAGE) == (0xFFFF_8000_0000_1000, 0xFFFF_8000_0000_1010)


def test_relocation_reaches_the_last_word() -> None:
    """A target in the last 8 bytes, with the largest addend, is in order."""
    module = bytearray(put(make_module(key=KEY).module, 0x400, struct.pack("<QQQ", 6 * PAGE - 8, 8, 6 * PAGE - 1)))
    elf.relocate(module, 1)
    assert struct.unpack_from("<Q", module, 6 * PAGE - 8) == (6 * PAGE,)


def test_too_short_for_elf() -> None:
    """An image shorter than a header is refused, and has no sections to find."""
    with pytest.raises(elf.ElfError):
        elf.relocate(bytearray(b"\x7fELF\2\1\1"), 0)
    found: Any = elf.find_section(b"\x7fELF\2\1\1", elf.SHT_RELA)
    assert found is None
