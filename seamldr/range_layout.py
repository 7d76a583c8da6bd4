"""Where P-SEAMLDR puts a module in the SEAM range, and whether it fits.

Source: Intel P-SEAMLDR (tdx-loader 1.5.02), seamldr_install.c, seam_memory_map.c. From SEAMRR.base upwards:
SYS_INFO_TABLE, transfer VMCSs, data region (handoff, TLS, global). From P_SEAMLDR_RANGE.base downwards: 2 MB of code,
stacks, PML4, page tables. The linear layout has random bits in common.
"""

from __future__ import annotations

import msgspec

from seamldr.platform import CODE_REGION_SIZE, PAGE, LoaderProfile, Platform
from seamldr.sigstruct import SigStruct

HANDOFF_HEADER_SIZE = 8
_2M = 0x20_0000
_1G = 0x4000_0000


class LinearBases(msgspec.Struct, frozen=True):
    """Linear addresses of the regions; all carry the same random bits 46:34."""

    keyhole_edit: int
    code: int
    stack: int
    keyhole: int
    data: int
    sysinfo: int

    @classmethod
    def randomize(cls, rdrand: int) -> LinearBases:
        """From one 64-bit random number."""
        aslr = (rdrand & 0x7FFC) << 32
        return cls(
            keyhole_edit=aslr | 0x0000_0001_0000_0000,
            code=aslr | 0xFFFF_8000_0000_0000,
            stack=aslr | 0xFFFF_8001_0000_0000,
            keyhole=aslr | 0xFFFF_8002_0000_0000,
            data=aslr | 0xFFFF_8003_0000_0000,
            sysinfo=aslr | 0xFFFF_8003_FFFF_0000,
        )


class RangeLayout(msgspec.Struct, frozen=True):
    """Sizes in bytes and physical addresses for one manifest and number of image pages."""

    addressable_lps: int
    tls_per_lp: int
    handoff_size: int
    data_size: int
    stack_per_lp: int
    keyhole_size: int
    edit_size: int
    code_size: int
    vmcs_pa: int
    data_pa: int
    stack_pa: int
    code_pa: int
    minimum: int
    available: int
    tables_before_keyhole: int
    tables: int
    spare_table_pages: int

    @property
    def pml4_pa(self) -> int:
        """Just below the stacks; page tables go on downwards from there."""
        return self.stack_pa - PAGE

    @property
    def extents(self) -> list[tuple[int, int]]:
        """The [start, end) parts of the module range that this module and its loading write to."""
        base = self.vmcs_pa - PAGE
        low = self.pml4_pa - self.tables * PAGE
        return [(base, self.data_pa + self.data_size), (low, self.code_pa + self.code_size)]


def handoff_pa(platform: Platform) -> int:
    """PA of the handoff data header: the start of the data region, the same for every module."""
    return platform.seamrr_base + PAGE + PAGE * platform.addressable_lps


def plan_range(platform: Platform, sigstruct: SigStruct, module_pages: int) -> RangeLayout:
    """The layout of a module. Whether it fits is `minimum` against `available`, then tables against spare pages."""
    lps = platform.addressable_lps
    tls = (sigstruct.num_tls_pages + 1) * PAGE
    handoff = 0 if platform.profile is LoaderProfile.P10 else (sigstruct.num_handoff_pages + 1) * PAGE
    data = tls * lps + (sigstruct.num_global_data_pages + 1) * PAGE + handoff
    stack_per_lp = (sigstruct.num_stack_pages + 1) * PAGE + PAGE
    stack = stack_per_lp * lps
    keyhole = (sigstruct.num_keyhole_pages + 1) * PAGE * lps
    edit = -(-keyhole // PAGE * 8 // PAGE) * PAGE
    code = module_pages * PAGE
    estimate = 1 + sum(_estimated_tables(size) for size in (PAGE, stack, data, keyhole, edit, code))
    code_pa = platform.p_seamldr_base - CODE_REGION_SIZE
    spare = (code_pa - stack - PAGE - handoff_pa(platform) - data) // PAGE
    # One PDPT serves the upper half; code, data, stacks and sysinfo lie in different 1 GB parts of it.
    before_keyhole = 1 + sum(_tables_below_pdpt(size) for size in (code, data, stack, PAGE))
    return RangeLayout(
        addressable_lps=lps,
        tls_per_lp=tls,
        handoff_size=handoff,
        data_size=data,
        stack_per_lp=stack_per_lp,
        keyhole_size=keyhole,
        edit_size=edit,
        code_size=code,
        vmcs_pa=platform.seamrr_base + PAGE,
        data_pa=handoff_pa(platform),
        stack_pa=code_pa - stack,
        code_pa=code_pa,
        minimum=PAGE + PAGE * lps + stack + data + PAGE * estimate + CODE_REGION_SIZE,
        available=platform.p_seamldr_base - platform.seamrr_base,
        tables_before_keyhole=before_keyhole,
        tables=before_keyhole + _tables_below_pdpt(keyhole) + 1 + _tables_below_pdpt(edit),
        # The first loader also refuses a table that would touch the data region.
        spare_table_pages=spare - (platform.profile is LoaderProfile.P10),
    )


def _estimated_tables(size: int) -> int:
    """P-SEAMLDR's own estimate, which forgets the page directories of regions below 2 MB."""
    return sum(-(-(size // unit) * 8 // PAGE) for unit in (PAGE, _2M, _1G))


def _tables_below_pdpt(size: int) -> int:
    """Page directories and page tables that mapping `size` bytes from a 1 GB boundary really takes."""
    return -(-size // _1G) + -(-size // _2M)
