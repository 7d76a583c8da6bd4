"""The two pages that the kernel and P-SEAMLDR exchange: SEAMLDR_PARAMS and SEAMLDR_INFO.

Layouts: Intel P-SEAMLDR (tdx-loader 1.5.02), pseamldr_api_defs.h; Linux, arch/x86/include/asm/seamldr.h.
"""

from __future__ import annotations

import struct

import msgspec

from seamldr.image import MAX_MODULE_PAGES
from seamldr.seamextend import SEAMEXTEND_SIZE, SeamExtend
from seamldr.status import Scenario

PARAMS_SIZE = 4096
INFO_SIZE = 256
SEAMINFO_SIZE = 2048
FEATURE_CLEANUP = 1 << 1

_PARAMS = struct.Struct(f"<IIQ104sQ{MAX_MODULE_PAGES}Q")
_INFO = struct.Struct(f"<4I4H2I{SEAMEXTEND_SIZE}sQ80x")


class SeamldrParams(msgspec.Struct, frozen=True):
    """SEAMLDR_PARAMS. `pages` is what the list of 496 addresses starts with; the rest is 0."""

    sigstruct_pa: int
    num_module_pages: int
    pages: tuple[int, ...]
    scenario: int = Scenario.UPDATE
    version: int = 0
    reserved: bytes = bytes(104)

    def encode(self) -> bytes:
        """The 4096 bytes."""
        pages = self.pages + (0,) * (MAX_MODULE_PAGES - len(self.pages))
        head = (self.version, self.scenario, self.sigstruct_pa, self.reserved, self.num_module_pages)
        return _PARAMS.pack(*head, *pages)

    @classmethod
    def decode(cls, data: bytes) -> SeamldrParams:
        """From 4096 bytes, with all 496 addresses; every content decodes."""
        version, scenario, sigstruct_pa, reserved, count, *pages = _PARAMS.unpack_from(data)
        return cls(sigstruct_pa, count, tuple(pages), scenario, version, reserved)


class SeamldrInfo(msgspec.Struct, frozen=True):
    """SEAMLDR_INFO. `build_date` is decimal yyyymmdd; SEAMEXTEND is the live register."""

    version: int
    attributes: int
    vendor_id: int
    build_date: int
    build_num: int
    minor: int
    major: int
    update: int
    acm_x2apic_id: int
    num_remaining_updates: int
    seamextend: SeamExtend
    features0: int

    def encode(self) -> bytes:
        """The 256 bytes."""
        *head, seamextend, features0 = msgspec.structs.astuple(self)
        return _INFO.pack(*head, seamextend.encode(), features0)

    @classmethod
    def decode(cls, data: bytes) -> SeamldrInfo:
        """From the first 256 bytes of `data`."""
        fields = list(_INFO.unpack_from(data))
        fields[10] = SeamExtend.decode(fields[10])
        return cls(*fields)
