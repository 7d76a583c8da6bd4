"""What the TDX module learns from firmware and from the loader that installed it."""

from __future__ import annotations

import struct

import msgspec

from bus.memory import PhysicalMemory
from seamldr.platform import Platform
from seamldr.range_layout import handoff_pa

_HANDOFF_FIELDS = struct.Struct("<HHBxH")
_HANDOFF_FIELDS_OFFSET = 2152


class HandoffParams(msgspec.Struct, frozen=True):
    """The handoff fields that P-SEAMLDR took from the signature structure and left in SYS_INFO_TABLE for the module."""

    module_hv: int
    min_update_hv: int
    no_downgrade: bool
    num_handoff_pages: int  # pages minus one


class ModulePlatform(msgspec.Struct, frozen=True):
    """The platform of one installed module: make a new one, with another SEAMDB index, for each install.

    Addresses and sizes are in bytes. `pkg_of_lp` names all LPs that firmware knows, by x2APIC id, with their
    packages.
    """

    pkg_of_lp: dict[int, int]
    handoff_pa: int
    seam_base: int
    seam_size: int
    first_private_hkid: int = 32
    num_private_hkids: int = 32
    cmrs: tuple[tuple[int, int], ...] = ((0, 1 << 40),)  # base and size of convertible memory ranges
    pa_bits: int = 40  # physical address bits below the key id
    keyid_bits: int = 6
    seamdb_index: int = 1
    seamdb_nonce: int = 0
    handoff_params: HandoffParams | None = None  # None: they agree with the image

    @classmethod
    def installed(cls, platform: Platform, memory: PhysicalMemory, seamdb_index: int) -> ModulePlatform:
        """What a module finds once P-SEAMLDR has installed it; `seamdb_index` counts installs."""
        fields = _HANDOFF_FIELDS.unpack(memory.read(platform.seamrr_base + _HANDOFF_FIELDS_OFFSET, 8))
        module_hv, min_update_hv, no_downgrade, pages = fields
        return cls(
            {lp: platform.package_of(lp) for lp in platform.x2apic_ids},
            handoff_pa(platform),
            platform.seamrr_base,
            platform.seamrr_size,
            first_private_hkid=platform.mktme_keyids + 1,
            num_private_hkids=platform.private_keyids,
            cmrs=platform.cmrs or ((0, 1 << platform.maxphyaddr - platform.keyid_bits),),
            pa_bits=platform.maxphyaddr - platform.keyid_bits,
            keyid_bits=platform.keyid_bits,
            seamdb_index=seamdb_index,
            handoff_params=HandoffParams(module_hv, min_update_hv, bool(no_downgrade), pages),
        )

    @property
    def lps(self) -> list[int]:
        """All LPs, ascending."""
        return sorted(self.pkg_of_lp)

    @property
    def num_lps(self) -> int:
        """Number of LPs; each has to do SYS.LP.INIT."""
        return len(self.pkg_of_lp)

    @property
    def num_pkgs(self) -> int:
        """Number of packages."""
        return len(set(self.pkg_of_lp.values()))

    def first_lps(self) -> list[int]:
        """The lowest LP of each package."""
        return sorted({self.pkg_of_lp[lp]: lp for lp in reversed(self.lps)}.values())

    def is_private_hkid(self, hkid: int) -> bool:
        """True if memory of this key id belongs to TDs or the module."""
        return self.first_private_hkid <= hkid < self.first_private_hkid + self.num_private_hkids

    def split(self, pa: int) -> tuple[int, int] | None:
        """Address and key id in `pa`; None if it has bits above the physical address width."""
        if pa >> self.pa_bits + self.keyid_bits:
            return None
        return pa & (1 << self.pa_bits) - 1, pa >> self.pa_bits
