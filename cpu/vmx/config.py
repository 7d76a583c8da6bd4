"""Which processor the VMX unit behaves as: address width, VMCS revision, capability MSRs, fields.

All of it is data. The defaults describe a current TDX server of the Sapphire Rapids generation, with
IA32_VMX_BASIC[60] = 0: SEAMRET from the P-SEAMLDR invalidates the current VMCS.
"""

from __future__ import annotations

import enum

import msgspec

U32_MAX = 0xFFFF_FFFF
U64_MAX = 0xFFFF_FFFF_FFFF_FFFF
PAGE_MASK = 0xFFF


class Msr(enum.IntEnum):
    """Model-specific registers that the unit knows."""

    IA32_FEATURE_CONTROL = 0x3A
    IA32_SYSENTER_CS = 0x174
    IA32_SYSENTER_ESP = 0x175
    IA32_SYSENTER_EIP = 0x176
    IA32_DEBUGCTL = 0x1D9
    IA32_PAT = 0x277
    IA32_PERF_GLOBAL_CTRL = 0x38F
    IA32_VMX_BASIC = 0x480
    IA32_VMX_PINBASED_CTLS = 0x481
    IA32_VMX_PROCBASED_CTLS = 0x482
    IA32_VMX_EXIT_CTLS = 0x483
    IA32_VMX_ENTRY_CTLS = 0x484
    IA32_VMX_MISC = 0x485
    IA32_VMX_CR0_FIXED0 = 0x486
    IA32_VMX_CR0_FIXED1 = 0x487
    IA32_VMX_CR4_FIXED0 = 0x488
    IA32_VMX_CR4_FIXED1 = 0x489
    IA32_VMX_VMCS_ENUM = 0x48A
    IA32_VMX_PROCBASED_CTLS2 = 0x48B
    IA32_VMX_EPT_VPID_CAP = 0x48C
    IA32_VMX_TRUE_PINBASED_CTLS = 0x48D
    IA32_VMX_TRUE_PROCBASED_CTLS = 0x48E
    IA32_VMX_TRUE_EXIT_CTLS = 0x48F
    IA32_VMX_TRUE_ENTRY_CTLS = 0x490
    IA32_VMX_VMFUNC = 0x491
    IA32_VMX_PROCBASED_CTLS3 = 0x492
    IA32_VMX_EXIT_CTLS2 = 0x493
    IA32_SEAMRR_MASK = 0x1401
    IA32_EFER = 0xC000_0080
    IA32_STAR = 0xC000_0081
    IA32_LSTAR = 0xC000_0082
    IA32_FMASK = 0xC000_0084
    IA32_FS_BASE = 0xC000_0100
    IA32_GS_BASE = 0xC000_0101
    IA32_KERNEL_GS_BASE = 0xC000_0102
    IA32_TSC_AUX = 0xC000_0103


CAPABILITY_MSRS = range(0x480, 0x500)

BASIC_REVISION = 0x7FFF_FFFF
BASIC_ADDRESS_32 = 1 << 48
BASIC_TRUE_CONTROLS = 1 << 55
BASIC_ANY_ERROR_CODE = 1 << 56
BASIC_NO_SEAMRET_INVD_VMCS = 1 << 60

MISC_SAVE_LMA = 1 << 5
MISC_ACTIVITY_SHIFT = 6
MISC_VMWRITE_ANY = 1 << 29
MISC_ZERO_LENGTH_INJECTION = 1 << 30

# Without the TRUE MSRs these controls have to be 1 (SDM vol. 3D, appendix "Reserved Controls and Default Settings").
DEFAULT1 = {
    Msr.IA32_VMX_PINBASED_CTLS: 0x0000_0016,
    Msr.IA32_VMX_PROCBASED_CTLS: 0x0401_E172,
    Msr.IA32_VMX_EXIT_CTLS: 0x0003_6DFF,
    Msr.IA32_VMX_ENTRY_CTLS: 0x0000_11FF,
}

DEFAULT_REVISION = 0x13

DEFAULT_CAPS: dict[int, int] = {
    0x480: 0x01D8_1000_0000_0000 | DEFAULT_REVISION,
    0x481: 0x0000_00FF_0000_0016,
    0x482: 0xFFFB_FFFE_0401_E172,
    0x483: 0xF77F_FFFF_0003_6DFF,
    0x484: 0x0076_FFFF_0000_11FF,
    0x485: 0x0000_0000_7004_C1E7,
    0x486: 0x0000_0000_8000_0021,
    0x487: 0x0000_0000_FFFF_FFFF,
    0x488: 0x0000_0000_0000_2000,
    0x489: 0x0000_0000_03F7_7FFF,
    0x48A: 0x0000_0000_0000_0052,
    0x48B: 0x7F7F_FFFF_0000_0000,
    0x48C: 0x0000_0F01_06F3_41C1,
    0x48D: 0x0000_00FF_0000_0016,
    0x48E: 0xFFFB_FFFE_0400_6172,
    0x48F: 0xF77F_FFFF_0003_6DFB,
    0x490: 0x0076_FFFF_0000_11FB,
    0x491: 0x0000_0000_0000_0001,
    0x492: 0x0000_0000_0000_003E,
    0x493: 0x0000_0000_0000_0008,
}


class Limits(msgspec.Struct, frozen=True):
    """What one 32-bit control field may hold: each bit of `must` is 1, no bit outside `may` is."""

    must: int
    may: int

    def allow(self, value: int) -> bool:
        """Every allowed-0 and allowed-1 bit is respected."""
        return value & self.must == self.must and value & ~self.may == 0

    def adjust(self, wanted: int) -> int:
        """`wanted` with the bits set and cleared that have to be."""
        return (wanted | self.must) & self.may


class VmxConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One processor model.

    `maxphyaddr` is CPUID.80000008H:EAX[7:0]. `caps` maps the index of a capability MSR (480H and up) to its value;
    one that is missing does not exist. `supported_fields` holds full-access encodings, None for every architectural
    one; encodings the architecture does not name are stored by the width and type in their bits. `seamrr_mask` is
    IA32_SEAMRR_MASK, whose bit 11 (valid) SEAMCALL wants.
    """

    maxphyaddr: int = 52
    vmcs_revision_id: int = DEFAULT_REVISION
    caps: dict[int, int] = msgspec.field(default_factory=lambda: dict(DEFAULT_CAPS))
    supported_fields: frozenset[int] | None = None
    seamrr_mask: int = 0x000F_FFFF_E000_0C00

    @property
    def basic(self) -> int:
        """IA32_VMX_BASIC."""
        return self.caps.get(Msr.IA32_VMX_BASIC, 0)

    @property
    def misc(self) -> int:
        """IA32_VMX_MISC."""
        return self.caps.get(Msr.IA32_VMX_MISC, 0)

    @property
    def ept_vpid_cap(self) -> int:
        """IA32_VMX_EPT_VPID_CAP; 0 where it does not exist."""
        return self.caps.get(Msr.IA32_VMX_EPT_VPID_CAP, 0)

    @property
    def cr0_fixed(self) -> Limits:
        """What CR0 may hold in VMX operation."""
        return Limits(
            self.caps.get(Msr.IA32_VMX_CR0_FIXED0, 0x8000_0021), self.caps.get(Msr.IA32_VMX_CR0_FIXED1, U32_MAX)
        )

    @property
    def cr4_fixed(self) -> Limits:
        """What CR4 may hold in VMX operation."""
        return Limits(
            self.caps.get(Msr.IA32_VMX_CR4_FIXED0, 0x2000), self.caps.get(Msr.IA32_VMX_CR4_FIXED1, U32_MAX)
        )

    def with_caps(self, changes: dict[int, int | None]) -> VmxConfig:
        """The same processor with some capability MSRs changed; None takes one away."""
        caps = {msr: value for msr, value in (self.caps | changes).items() if value is not None}
        return msgspec.structs.replace(self, caps=caps)

    def with_basic_bit60(self, fixed: bool) -> VmxConfig:
        """The same processor with (True) or without the promise that SEAMRET from the P-SEAMLDR keeps the VMCS."""
        bit = BASIC_NO_SEAMRET_INVD_VMCS
        return self.with_caps({Msr.IA32_VMX_BASIC: self.basic | bit if fixed else self.basic & ~bit})

    def control_limits(self, msr: Msr) -> Limits:
        """Limits of the controls that `msr` reports (481H to 484H, by way of the TRUE MSR if there is one; 48BH).

        A processor without secondary controls allows none; one without the other MSRs has only the default settings.
        """
        if msr is Msr.IA32_VMX_PROCBASED_CTLS2:
            value = self.caps.get(msr, 0)
        else:
            true_msr = msr + (Msr.IA32_VMX_TRUE_PINBASED_CTLS - Msr.IA32_VMX_PINBASED_CTLS)
            plain = self.caps.get(msr, U32_MAX << 32 | DEFAULT1[msr])
            value = self.caps.get(true_msr, plain) if self.basic & BASIC_TRUE_CONTROLS else plain
        return Limits(value & U32_MAX, value >> 32)
