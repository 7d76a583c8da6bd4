"""TDX module image files: the container that ships today (version 1) and the one that Linux reads (version 2).

Sources: Intel TDX module binaries, blob_structure.txt, for version 1; Linux, arch/x86/virt/vmx/tdx/seamldr.c, for
version 2 and its checks. A container holds pages of SEAM_SIGSTRUCT, then pages of module; neither is looked into
here.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import msgspec

PAGE = 4096
MAX_SIGSTRUCT_PAGES = 1
MAX_MODULE_PAGES = 496
VERSION_1 = 0x0100
VERSION_2 = 0x0200
SIGNATURE = b"TDX-BLOB"
MAX_FILE = 16 << 20
"""Bytes of a file that is read at all; no image of either version is that long."""

_V1 = struct.Struct("<HHI8sII")
_V2 = struct.Struct("<HH8sII")


class ImageError(Exception):
    """A container was refused. `errno` is what the kernel returns, positive; `rule` is the check that failed."""

    errno = errno.EINVAL

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


class ModuleImage(msgspec.Struct, frozen=True):
    """What a container carries; both parts are whole pages. `version` is that of the file it came from."""

    sigstruct: bytes
    module: bytes
    version: int = VERSION_2

    @property
    def module_pages(self) -> int:
        """Pages of the module alone."""
        return len(self.module) // PAGE


def parse(blob: bytes, *, with_checksum: bool = True) -> ModuleImage:
    """Read a container of either version, checking all that its format says. Raises ImageError."""
    if len(blob) < PAGE:
        raise ImageError("the file is shorter than its header page")
    image = _parse_v1(blob) if struct.unpack_from("<H", blob)[0] == VERSION_1 else check_framing(blob)
    if with_checksum and checksum(blob):
        raise ImageError("the 16-bit words of the file do not add up to 0")
    return image


def _parse_v1(blob: bytes) -> ModuleImage:
    _, _, offset, signature, length, reserved = _V1.unpack_from(blob)
    if signature != SIGNATURE:
        raise ImageError("version 1 signature is not TDX-BLOB")
    if length != len(blob):
        raise ImageError("version 1 LENGTH is not the size of the file")
    if reserved or any(blob[_V1.size : PAGE]):
        raise ImageError("version 1 reserved bytes are not zero")
    if offset % PAGE or not 2 * PAGE <= offset < length or length % PAGE:
        raise ImageError("version 1 OFFSET_OF_MODULE does not leave whole pages")
    if offset != (1 + MAX_SIGSTRUCT_PAGES) * PAGE or length - offset > MAX_MODULE_PAGES * PAGE:
        raise ImageError("version 1 holds more than 1 sigstruct page or 496 module pages")
    return ModuleImage(blob[PAGE:offset], blob[offset:], VERSION_1)


class Framing(msgspec.Struct, frozen=True):
    """What the kernel looks at in a version 2 file: header fields and the size of the file."""

    file_size: int
    version: int
    signature: bytes
    sigstruct_pages: int
    module_pages: int
    reserved: bytes

    @classmethod
    def decode(cls, blob: bytes) -> Framing:
        """From a whole file. Raises ImageError if the header page is not complete (the kernel's first check)."""
        if len(blob) < PAGE:
            raise ImageError("the file is shorter than its header page")
        version, _, signature, sigstruct_pages, module_pages = _V2.unpack_from(blob)
        return cls(len(blob), version, signature, sigstruct_pages, module_pages, blob[_V2.size : PAGE])

    def size_fits(self) -> bool:
        """Each length is a u32 in the kernel, so page counts from 2^20 on wrap; the limit on counts catches them."""
        return PAGE + _u32(self.sigstruct_pages * PAGE) + _u32(self.module_pages * PAGE) == self.file_size


def _u32(value: int) -> int:
    return value & 0xFFFF_FFFF


FRAMING_RULES: tuple[tuple[str, Callable[[Framing], bool]], ...] = (
    ("header, sigstruct and module pages add up to the size of the file", Framing.size_fits),
    ("the version is 0x200", lambda f: f.version == VERSION_2),
    (
        "at most 1 sigstruct page and 496 module pages",
        lambda f: f.sigstruct_pages <= MAX_SIGSTRUCT_PAGES and f.module_pages <= MAX_MODULE_PAGES,
    ),
    ("the signature is TDX-BLOB", lambda f: f.signature == SIGNATURE),
    ("reserved header bytes are zero", lambda f: not f.reserved.strip(b"\0")),
)
"""The kernel's checks on a header that is complete, in its order: what must hold, and the test."""


def obey_framing(framing: Framing) -> None:
    """Raises ImageError for the first rule that a header breaks."""
    for rule, holds in FRAMING_RULES:
        if not holds(framing):
            raise ImageError(f"broken: {rule}")


def check_framing(blob: bytes) -> ModuleImage:
    """Accept a firmware file exactly if the kernel does; zero pages of either part pass. Raises ImageError."""
    framing = Framing.decode(blob)
    obey_framing(framing)
    split = (1 + framing.sigstruct_pages) * PAGE
    return ModuleImage(blob[PAGE:split], blob[split:])


def checksum(blob: bytes) -> int:
    """The sum of all little-endian u16 words modulo 65536; 0 for an intact file. An odd last byte counts alone."""
    padded = blob + b"\0" * (len(blob) % 2)
    return sum(memoryview(padded).cast("H")) & 0xFFFF


def build_v1(image: ModuleImage) -> bytes:
    """The version 1 file."""
    offset = PAGE + len(image.sigstruct)
    header = _V1.pack(VERSION_1, 0, offset, SIGNATURE, offset + len(image.module), 0)
    return _seal(header, image)


def build_v2(image: ModuleImage) -> bytes:
    """The version 2 file, with a zero-sum checksum as in version 1 (the kernel does not look at it)."""
    header = _V2.pack(VERSION_2, 0, SIGNATURE, len(image.sigstruct) // PAGE, image.module_pages)
    return _seal(header, image)


def reframe(blob: bytes) -> bytes:
    """A file of either version as version 2. Raises ImageError."""
    return build_v2(parse(blob))


def _seal(header: bytes, image: ModuleImage) -> bytes:
    blob = header.ljust(PAGE, b"\0") + image.sigstruct + image.module
    return blob[:2] + struct.pack("<H", -checksum(blob) & 0xFFFF) + blob[4:]
