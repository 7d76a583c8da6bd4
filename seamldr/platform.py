"""The platform as P-SEAMLDR sees it: processors, ranges, KeyIDs, trusted signers, and the table that describes them.

Sources: Intel P-SEAMLDR and NP-SEAMLDR (tdx-loader 1.5.02), pseamldr_data_types.h, helpers.c, SeamldrCore64.c.
"""

from __future__ import annotations

import enum
import struct

import msgspec

from seamldr.sigstruct import PRODUCTION_SIGNER

PAGE = 4096
CODE_REGION_SIZE = 0x20_0000
MAX_ADDRESSABLE_LPS = 1024
MAX_PACKAGES = 8


class LoaderProfile(enum.StrEnum):
    """Which P-SEAMLDR: the first one, the 1.5 one, or a 1.5 one that takes the manifests of 2.0 modules."""

    P10 = "P10"
    P15 = "P15"
    P20 = "P20"


class LoaderVersion(msgspec.Struct, frozen=True):
    """Version fields of SEAMLDR_INFO; `build_date` is decimal yyyymmdd."""

    major: int
    minor: int
    update: int
    build_date: int = 20240130
    build_num: int = 212


LOADER_VERSIONS = {
    LoaderProfile.P10: LoaderVersion(1, 0, 0),
    LoaderProfile.P15: LoaderVersion(1, 5, 2),
    LoaderProfile.P20: LoaderVersion(2, 0, 0),
}


class Platform(msgspec.Struct, frozen=True):
    """What firmware and fuses fixed. Addresses and sizes in bytes; one CPUID.1.EAX in `fms` for each socket.

    Logical processors are named by x2APIC ID: socket s holds s x P to s x P + n - 1, with P the power of two that
    fits its n. Raises ValueError if the sockets, the ranges or the ids do not fit together.
    """

    profile: LoaderProfile = LoaderProfile.P15
    num_lps: int = 4
    fms: tuple[int, ...] = (0x000C_06F2,)
    maxphyaddr: int = 46
    keyid_bits: int = 6
    tdx_reserved_keyid_bits: int = 1
    mktme_keyids: int = 31
    seamrr_base: int = 0x4000_0000
    seamrr_size: int = 0x0400_0000
    p_seamldr_base: int = 0x4200_0000
    p_seamldr_size: int = 0x0200_0000
    acm_x2apic_id: int = 0
    sgx_debug_unlocked: bool = False
    seamdb_size: int = 16
    cache_sub_blocks: int = 4
    cmrs: tuple[tuple[int, int], ...] = ()
    trusted_signers: tuple[str, ...] = ()
    loader_version: LoaderVersion | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.fms) <= MAX_PACKAGES or self.num_lps < 1 or self.num_lps % len(self.fms):
            raise ValueError(f"{self.num_lps} LPs do not spread evenly over {len(self.fms)} sockets (1 to 8)")
        if self.addressable_lps > MAX_ADDRESSABLE_LPS:
            raise ValueError(f"x2APIC IDs up to {self.addressable_lps - 1} exceed {MAX_ADDRESSABLE_LPS - 1}")
        end = self.seamrr_base + self.seamrr_size
        if not self.seamrr_base < self.p_seamldr_base <= end - self.p_seamldr_size:
            raise ValueError("P_SEAMLDR_RANGE does not lie in SEAMRR, above a module range")
        if any(value % PAGE for value in (self.seamrr_base, self.p_seamldr_base, self.p_seamldr_size)):
            raise ValueError("SEAM ranges are made of whole pages")

    @property
    def lps_per_package(self) -> int:
        """Enabled LPs of one socket (MSR 0x35)."""
        return self.num_lps // len(self.fms)

    @property
    def addressable_per_package(self) -> int:
        """x2APIC IDs that one socket takes: a power of two."""
        return 1 << (self.lps_per_package - 1).bit_length()

    @property
    def addressable_lps(self) -> int:
        """x2APIC IDs of the platform: the length of the transfer VMCS array."""
        return len(self.fms) * self.addressable_per_package

    @property
    def x2apic_ids(self) -> tuple[int, ...]:
        """The ids of the enabled LPs, ascending."""
        stride = self.addressable_per_package
        return tuple(s * stride + i for s in range(len(self.fms)) for i in range(self.lps_per_package))

    def package_of(self, x2apic_id: int) -> int:
        """The package that the id belongs to (CPUID.1FH shift)."""
        return x2apic_id // self.addressable_per_package

    @property
    def private_keyids(self) -> int:
        """TDX private KeyIDs: all but 0 and the MKTME ones."""
        return (1 << self.keyid_bits) - 1 - self.mktme_keyids

    @property
    def p_sys_info_table(self) -> int:
        """PA of P_SYS_INFO_TABLE, the last page of P_SEAMLDR_RANGE."""
        return self.p_seamldr_base + self.p_seamldr_size - PAGE

    @property
    def version(self) -> LoaderVersion:
        """The version that SEAMLDR.INFO reports."""
        return self.loader_version or LOADER_VERSIONS[self.profile]

    def trusts(self, signer: str) -> bool:
        """Whether modules by this signer (SHA-384 of the modulus, hex) are accepted."""
        return signer == PRODUCTION_SIGNER or signer in self.trusted_signers

    def strip_keyid(self, pa: int) -> int:
        """The address without KeyID bits, PA[MAXPHYADDR-1 : MAXPHYADDR-keyid_bits]."""
        return pa & ((1 << (self.maxphyaddr - self.keyid_bits)) - 1)

    def hpa_ok(self, pa: int, alignment: int) -> bool:
        """The check that P-SEAMLDR makes on every address it is given; `alignment` is a power of two."""
        if pa % alignment or pa >> self.maxphyaddr:
            return False
        if self.seamrr_base <= self.strip_keyid(pa) < self.seamrr_base + self.seamrr_size:
            return False
        return pa >> (self.maxphyaddr - self.keyid_bits) < self._first_refused_keyid()

    def _first_refused_keyid(self) -> int:
        if self.profile is LoaderProfile.P10:
            return min(self.mktme_keyids, 1 << (self.keyid_bits - self.tdx_reserved_keyid_bits))
        return self.mktme_keyids + 1


def p_sys_info_table(platform: Platform) -> bytes:
    """P_SYS_INFO_TABLE as NP-SEAMLDR leaves it, 4096 bytes; the regions of P-SEAMLDR itself are not modelled."""
    page = bytearray(PAGE)
    struct.pack_into("<QII", page, 0, 0, platform.num_lps, len(platform.fms))
    struct.pack_into(f"<{len(platform.fms)}I", page, 16, *platform.fms)
    struct.pack_into("<QQ", page, 48, platform.p_seamldr_base, platform.p_seamldr_size)
    for index, (base, size) in enumerate(platform.cmrs[:32]):
        struct.pack_into("<QQ", page, 128 + 16 * index, base, size)
    struct.pack_into("<II", page, 2144, platform.acm_x2apic_id, 1)
    return bytes(page)
