"""Leaves one by one: metadata, pages, vCPUs, locks, and the bytes of the handoff area."""

from __future__ import annotations

import msgspec
import pytest
from tdx_bench import HANDOFF, HV0, HV0_NEXT, HV1, HV1_NEXT, SCRATCH, Host

from seamldr.identity import ModuleIdentity
from seamldr.platform import Platform
from seamldr.range_layout import handoff_pa
from seamldr.tdx_boot import BootError, init_lps, must, pages_needed
from seamldr.tdx_leaves import TdhLeaf as L
from seamldr.tdx_metadata import ALL_ONES, SYSTEM_FIELDS_A, SYSTEM_FIELDS_B, TD_FIELDS, VCPU_FIELDS, FieldTable
from seamldr.tdx_module import ExitInfo, ExitReason, Registers
from seamldr.tdx_platform import HandoffParams, ModulePlatform
from seamldr.tdx_state import GuestMemory, PageType, VcpuState
from seamldr.tdx_status import TdxStatus, is_error, status_name
from seamldr.tdx_td import write_td_params

OPERAND_INVALID = TdxStatus.TDX_OPERAND_INVALID
OPERAND_BUSY = TdxStatus.TDX_OPERAND_BUSY
ASSOC_LPID = 0xA020_0002_0000_0004
VCPU_STATE = 0xA020_0000_0000_0000
PEND_NMI = 0x2020_0000_0000_000B


# Metadata


@pytest.mark.parametrize(("identity", "table"), [(HV0, SYSTEM_FIELDS_A), (HV1, SYSTEM_FIELDS_B)], ids=["hv0", "hv1"])
def test_sys_rd_walks_all_fields(identity: ModuleIdentity, table: FieldTable[None]) -> None:
    """From the all-ones id, RDX leads through every field once and ends in all ones; RDALL lists the same."""
    host = Host(identity)
    walked = {}
    field_id = host.result(0, L.TDH_SYS_RD, rdx=ALL_ONES).out["rdx"]
    while field_id != ALL_ONES:
        result = host.result(0, L.TDH_SYS_RD, rdx=field_id)
        assert result.rax == 0
        walked[field_id], field_id = result.out["r8"], result.out["rdx"]
    assert list(walked) == [field.id for field in table.all()]
    result = host.result(0, L.TDH_SYS_RDALL, rdx=0x4000, r8=ALL_ONES)
    assert (result.rax, result.out) == (0, {"r8": ALL_ONES})
    count = int.from_bytes(host.memory.read(0x4002, 2), "little")
    words = [host.memory.read64(0x4008 + 8 * index) for index in range(2 * count)]
    assert dict(zip(words[::2], words[1::2], strict=True)) == walked


@pytest.mark.parametrize(
    ("field_id", "value"),
    [
        (0x8900_0001_0000_0000, 1),
        (0x8900_0000_0000_0002, 1),
        (0x8900_0001_0000_0003, 13),
        (0x0A00_0003_0000_0008, 0x8022_6F3F_0FBF),
        (0x0800_0002_0000_0000, 0x8086),
        (0x9000_0003_0000_0100, 0x100_0000),
        (0x9000_0003_0000_0101, 0),
        (0x9100_0001_0000_0012, 16),
        (0x9800_0001_0000_0100, 6 * 4096),
        (0x9900_0001_0000_0008, 576),
        (0x0000_0002_0000_0001, 0xC06F2),
        (0x0000_0002_0000_0002, 0),
    ],
)
def test_system_fields(field_id: int, value: int) -> None:
    """Fields are found by class and code, whatever the size and context bits say."""
    host = Host(HV1)
    assert host.rd(field_id) == value
    assert host.rd(field_id ^ 3 << 32 ^ 1 << 50 ^ 5 << 52 ^ 1 << 63) == value


@pytest.mark.parametrize("bit", [24, 31, 34, 38, 47, 55, 62])
def test_reserved_bits_of_a_field_id(bit: int) -> None:
    """Reserved and sequence bits must be clear."""
    result = Host().result(0, L.TDH_SYS_RD, rdx=0x8900_0001_0000_0000 | 1 << bit)
    assert (result.rax, result.out) == (TdxStatus.TDX_METADATA_FIELD_ID_INCORRECT, {"rdx": ALL_ONES, "r8": 0})


def test_max_vcpus_per_td_is_a_field_of_newer_modules_only() -> None:
    """A module of handoff version 0 does not know the field."""
    assert Host(HV0).call(0, L.TDH_SYS_RD, rdx=0x9900_0001_0000_0008) == TdxStatus.TDX_METADATA_FIELD_ID_INCORRECT


def test_sys_info_fills_two_buffers() -> None:
    """TDSYSINFO_STRUCT and the CMR array, with their sizes checked."""
    host = Host()
    buffers = {"rcx": 0x4000, "rdx": 1024, "r8": 0x5000, "r9": 32}
    assert host.result(0, L.TDH_SYS_INFO, **buffers).out == {"rdx": 1024, "r9": 32}
    assert host.memory.read32(0x4004) == 0x8086
    assert host.memory.read(0x4000 + 48, 2) == (6 * 4096).to_bytes(2, "little")
    assert host.memory.read64(0x5008) == 0x100_0000
    for register, value, operand in (("rcx", 0x4200, 1), ("rdx", 1023, 2), ("r8", 0x5100, 8), ("r9", 31, 9)):
        assert host.call(0, L.TDH_SYS_INFO, **{**buffers, register: value}) == OPERAND_INVALID | operand


def test_mng_rd_reads_td_fields() -> None:
    """Version 0 gives the value, version 1 also the next id; the measurement shows once it is final."""
    host = Host()
    td = host.add_vcpu(host.new_td(), lp=2)
    mrtd = 0x1310_0003_0000_0000
    assert host.result(0, L.TDH_MNG_RD, rcx=td.tdr, rdx=mrtd).out == {"r8": 0}
    assert host.call(0, L.TDH_MR_FINALIZE, rcx=td.tdr) == 0
    words = [host.result(0, L.TDH_MNG_RD, rcx=td.tdr, rdx=mrtd + word).out["r8"] for word in range(6)]
    assert b"".join(word.to_bytes(8, "little") for word in words) == host.tdx.tds.tds[td.tdr].mrtd
    values = {}
    field_id = host.result(0, L.TDH_MNG_RD, 1, rcx=td.tdr, rdx=ALL_ONES).out["rdx"]
    while field_id != ALL_ONES:
        out = host.result(0, L.TDH_MNG_RD, 1, rcx=td.tdr, rdx=field_id).out
        values[field_id], field_id = out["r8"], out["rdx"]
    assert len(values) == len(TD_FIELDS.all())
    assert values[0x8010_0003_0000_0004] == 12  # 6 TDCX, TDVPR and its 5 TDCX
    assert (values[0x9010_0002_0000_0004], values[0x9010_0002_0000_0002]) == (2, 1)
    assert host.result(0, L.TDH_MNG_RD, rcx=td.tdr, rdx=ALL_ONES).out == {"r8": 0}
    assert host.call(0, L.TDH_MNG_RD, 2, rcx=td.tdr, rdx=mrtd) == OPERAND_INVALID


def test_nothing_of_a_td_is_writable() -> None:
    """MNG.WR tells unknown fields from known ones."""
    host = Host()
    td = host.td()
    known = host.call(0, L.TDH_MNG_WR, rcx=td.tdr, rdx=0x9010_0002_0000_0004, r8=1, r9=1)
    unknown = host.call(0, L.TDH_MNG_WR, rcx=td.tdr, rdx=0x7F00_0000_0000_0000)
    assert known == TdxStatus.TDX_METADATA_FIELD_NOT_WRITABLE
    assert unknown == TdxStatus.TDX_METADATA_FIELD_ID_INCORRECT


def test_vp_rd_and_wr_bind_the_vcpu() -> None:
    """Reading a vCPU field associates; secrets are for debug TDs; a pending NMI is delivered at the next entry."""
    host = Host()
    tdvpr = host.td().vcpus[0]
    assert host.result(3, L.TDH_VP_RD, rcx=tdvpr, rdx=ASSOC_LPID).out == {"r8": 3}
    assert host.call(3, L.TDH_VP_RD, rcx=tdvpr, rdx=VCPU_STATE) == TdxStatus.TDX_METADATA_FIELD_NOT_READABLE
    assert host.result(3, L.TDH_VP_WR, rcx=tdvpr, rdx=PEND_NMI, r8=1, r9=1).out == {"r8": 0}
    assert host.result(3, L.TDH_VP_RD, rcx=tdvpr, rdx=PEND_NMI).out == {"r8": 1}
    assert host.call(3, L.TDH_VP_WR, rcx=tdvpr, rdx=ASSOC_LPID) == TdxStatus.TDX_METADATA_FIELD_NOT_WRITABLE
    assert host.call(2, L.TDH_VP_WR, rcx=tdvpr, rdx=PEND_NMI) == TdxStatus.TDX_VCPU_ASSOCIATED
    host.run(3, tdvpr)
    assert host.result(3, L.TDH_VP_RD, 1, rcx=tdvpr, rdx=PEND_NMI).out == {
        "r8": 0,
        "rdx": VCPU_FIELDS.all()[-1].id,
    }


# TD build


@pytest.mark.parametrize(
    ("changes", "operand"),
    [
        ({"attributes": 2}, 64),
        ({"xfam": 1}, 65),
        ({"xfam": 1 << 40 | 3}, 65),
        ({"max_vcpus": 0}, 68),
        ({"max_vcpus": 577}, 68),
        ({"tsc_frequency": 3}, 70),
        ({"tsc_frequency": 401}, 70),
    ],
)
def test_td_params_are_checked(changes: dict[str, int], operand: int) -> None:
    """A bad parameter is named by its operand id, and the TD stays uninitialised and uncounted."""
    host = Host()
    tdr = next(host.pages)
    must(host.tdx, 0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33)
    must(host.tdx, 0, L.TDH_MNG_KEY_CONFIG, rcx=tdr)
    for _ in range(6):
        must(host.tdx, 0, L.TDH_MNG_ADDCX, rcx=next(host.pages), rdx=tdr)
    write_td_params(host.memory, SCRATCH, **{"max_vcpus": 4, **changes})
    assert host.call(0, L.TDH_MNG_INIT, rcx=tdr, rdx=SCRATCH) == OPERAND_INVALID | operand
    assert host.tdx.state.system.td_build_count == 0
    assert host.call(0, L.TDH_MNG_INIT, rcx=tdr, rdx=SCRATCH + 8) == OPERAND_INVALID | 2
    write_td_params(host.memory, SCRATCH, max_vcpus=4)
    assert host.call(0, L.TDH_MNG_INIT, rcx=tdr, rdx=SCRATCH) == 0


@pytest.mark.parametrize(("offset", "value", "operand"), [(18, 4, 71), (24, 5, 67), (32, 1 << 40, 66)])
def test_td_controls_are_checked(offset: int, value: int, operand: int) -> None:
    """So are the number of L2 VMs, EPTP_CONTROLS and CONFIG_FLAGS."""
    host = Host()
    with pytest.raises(BootError, match=f"TDX_OPERAND_INVALID .0x{OPERAND_INVALID | operand:x}"):
        _create_with(host, offset, value)


def _create_with(host: Host, offset: int, value: int) -> None:
    tdr = next(host.pages)
    must(host.tdx, 0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33)
    must(host.tdx, 0, L.TDH_MNG_KEY_CONFIG, rcx=tdr)
    for _ in range(6):
        must(host.tdx, 0, L.TDH_MNG_ADDCX, rcx=next(host.pages), rdx=tdr)
    write_td_params(host.memory, SCRATCH, max_vcpus=4)
    host.memory.write(SCRATCH + offset, value.to_bytes(1 if offset == 18 else 8, "little"))
    must(host.tdx, 0, L.TDH_MNG_INIT, rcx=tdr, rdx=SCRATCH)


def test_key_config_runs_on_each_package() -> None:
    """The second call on a package is told so, and only the last package configures the TD's keys."""
    host = Host(pkgs=2)
    tdr, page = next(host.pages), next(host.pages)
    must(host.tdx, 0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33)
    assert host.call(0, L.TDH_MNG_KEY_CONFIG, rcx=tdr) == 0
    assert host.call(1, L.TDH_MNG_KEY_CONFIG, rcx=tdr) == TdxStatus.TDX_KEY_CONFIGURED
    host.hooks.engine_busy = True
    assert host.call(2, L.TDH_MNG_KEY_CONFIG, rcx=tdr) == OPERAND_BUSY | 0xBB
    host.hooks.engine_busy, host.hooks.dry = False, True
    assert host.call(2, L.TDH_MNG_KEY_CONFIG, rcx=tdr) == TdxStatus.TDX_KEY_GENERATION_FAILED
    host.hooks.dry = False
    assert host.call(0, L.TDH_MNG_ADDCX, rcx=page, rdx=tdr) == TdxStatus.TDX_TD_KEYS_NOT_CONFIGURED
    assert host.call(2, L.TDH_MNG_KEY_CONFIG, rcx=tdr) == 0
    assert host.call(0, L.TDH_MNG_ADDCX, rcx=page, rdx=tdr) == 0


def test_entropy_is_needed_for_a_td_and_its_migration_key() -> None:
    """MNG.CREATE and the last ADDCX of the minimum may have to be called again."""
    host = Host()
    tdr, *tdcx = (next(host.pages) for _ in range(8))
    host.hooks.dry = True
    assert host.call(0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33) == TdxStatus.TDX_RND_NO_ENTROPY
    host.hooks.dry = False
    must(host.tdx, 0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33)
    must(host.tdx, 0, L.TDH_MNG_KEY_CONFIG, rcx=tdr)
    host.hooks.dry = True
    results = [host.call(0, L.TDH_MNG_ADDCX, rcx=page, rdx=tdr) for page in tdcx[:6]]
    assert results == [0] * 5 + [TdxStatus.TDX_RND_NO_ENTROPY]
    host.hooks.dry = False
    assert host.call(0, L.TDH_MNG_ADDCX, rcx=tdcx[5], rdx=tdr) == 0


def test_page_counts_have_limits() -> None:
    """Too many TDCX pages, too few TDVPS pages and too many vCPUs each have their status."""
    host = Host()
    td = host.new_td(max_vcpus=1)
    assert host.call(0, L.TDH_MNG_ADDCX, rcx=next(host.pages), rdx=td.tdr) == TdxStatus.TDX_OP_STATE_INCORRECT
    tdvpr = next(host.pages)
    must(host.tdx, 0, L.TDH_VP_CREATE, rcx=tdvpr, rdx=td.tdr)
    assert host.call(0, L.TDH_VP_INIT, rcx=tdvpr) == TdxStatus.TDX_TDCX_NUM_INCORRECT
    results = [host.call(0, L.TDH_VP_ADDCX, rcx=next(host.pages), rdx=tdvpr) for _ in range(16)]
    assert results == [0] * 15 + [TdxStatus.TDX_TDCX_NUM_INCORRECT]
    assert host.call(0, L.TDH_VP_INIT, rcx=tdvpr) == 0
    assert host.call(0, L.TDH_VP_ADDCX, rcx=next(host.pages), rdx=tdvpr) == TdxStatus.TDX_VCPU_STATE_INCORRECT
    with pytest.raises(BootError, match="TDH_VP_INIT on LP 0 failed: TDX_MAX_VCPUS_EXCEEDED"):
        host.add_vcpu(td)


def test_vp_init_version_1_gives_an_x2apic_id() -> None:
    """The id is unique in its TD and has 32 bits; modules of handoff version 0 have no such version."""
    host = Host()
    td = host.new_td()
    tdvprs = []
    for _ in range(2):
        tdvprs.append(next(host.pages))
        must(host.tdx, 0, L.TDH_VP_CREATE, rcx=tdvprs[-1], rdx=td.tdr)
        for _ in range(5):
            must(host.tdx, 0, L.TDH_VP_ADDCX, rcx=next(host.pages), rdx=tdvprs[-1])
    assert host.call(0, L.TDH_VP_INIT, 1, rcx=tdvprs[0], r8=7) == 0
    assert host.call(0, L.TDH_VP_INIT, 1, rcx=tdvprs[1], r8=7) == TdxStatus.TDX_X2APIC_ID_NOT_UNIQUE | 7
    assert host.call(0, L.TDH_VP_INIT, 1, rcx=tdvprs[1], r8=1 << 32) == OPERAND_INVALID | 8
    assert host.call(0, L.TDH_VP_INIT, 2, rcx=tdvprs[1], r8=8) == OPERAND_INVALID
    assert host.call(0, L.TDH_VP_INIT, 1, rcx=tdvprs[1], r8=8) == 0
    assert Host(HV0).call(0, L.TDH_VP_INIT, 1, rcx=tdvprs[1]) == OPERAND_INVALID


def test_the_measurement_is_of_contents_and_addresses() -> None:
    """Two TDs with the same pages measure the same; another byte, or another address, does not."""

    def mrtd(content: bytes, gpa: int) -> bytes:
        host = Host()
        td = host.add_vcpu(host.new_td())
        host.memory.write(SCRATCH, content)
        td = host.add_page(td, gpa)
        must(host.tdx, 0, L.TDH_MR_FINALIZE, rcx=td.tdr)
        assert host.memory.read(td.memory[0], len(content)) == content
        return host.tdx.tds.tds[td.tdr].mrtd

    assert mrtd(b"\1" * 4096, 0) == mrtd(b"\1" * 4096, 0)
    assert len({mrtd(b"\1" * 4096, 0), mrtd(b"\1" * 4095 + b"\2", 0), mrtd(b"\1" * 4096, 0x1000)}) == 3


def test_mr_extend_needs_its_page() -> None:
    """An address without a page is a failed walk, one inside a chunk a bad operand."""
    host = Host()
    td = host.add_page(host.new_td())
    assert host.call(0, L.TDH_MR_EXTEND, rcx=0x1000, rdx=td.tdr) == TdxStatus.TDX_EPT_WALK_FAILED | 1
    assert host.call(0, L.TDH_MR_EXTEND, rcx=0x80, rdx=td.tdr) == OPERAND_INVALID | 1


# Pages


def test_page_add_and_its_refusals() -> None:
    """A mapped address, a page in use, a private source and a bad address are each refused by operand."""
    host = Host()
    td = host.add_page(host.new_td())
    page = next(host.pages)
    good = {"rcx": 0x1000, "rdx": td.tdr, "r8": page, "r9": SCRATCH}
    for register, value, status in (
        ("rcx", 0, TdxStatus.TDX_EPT_ENTRY_STATE_INCORRECT | 1),
        ("rcx", 0x1001, OPERAND_INVALID | 1),
        ("rcx", 1 << 47, OPERAND_INVALID | 1),
        ("r8", td.tdr, OPERAND_BUSY | 8),
        ("r8", td.tdcx[0], TdxStatus.TDX_PAGE_METADATA_INCORRECT | 8),
        ("r9", SCRATCH | 40 << 40, OPERAND_INVALID | 9),
    ):
        assert host.call(0, L.TDH_MEM_PAGE_ADD, **{**good, register: value}) == status
    assert host.call(0, L.TDH_MEM_PAGE_ADD, **good) == 0


def test_a_page_is_removed_after_block_and_track() -> None:
    """No removal before the block, none before every vCPU of the older epoch has left."""
    host = Host()
    td = host.td(associate=(1,))
    page = next(host.pages)
    where = {"rcx": 0x8000, "rdx": td.tdr}
    assert host.call(0, L.TDH_MEM_SEPT_ADD, rcx=0x20_0000 | 1, rdx=td.tdr, r8=next(host.pages)) == 0
    assert host.call(0, L.TDH_MEM_SEPT_ADD, rcx=0x20_0000, rdx=td.tdr, r8=page) == OPERAND_INVALID | 1
    assert host.call(0, L.TDH_MEM_PAGE_AUG, **where, r8=page) == 0
    assert host.call(0, L.TDH_MEM_PAGE_REMOVE, **where) == TdxStatus.TDX_GPA_RANGE_NOT_BLOCKED | 1
    assert host.enter(1, td.vcpus[0]) == 0
    assert host.call(0, L.TDH_MEM_RANGE_BLOCK, **where) == 0
    assert host.call(0, L.TDH_MEM_RANGE_BLOCK, **where) == TdxStatus.TDX_EPT_ENTRY_STATE_INCORRECT | 1
    assert host.call(0, L.TDH_MEM_PAGE_REMOVE, **where) == TdxStatus.TDX_TLB_TRACKING_NOT_DONE | 1
    assert host.call(0, L.TDH_MEM_TRACK, rcx=td.tdr) == 0
    assert host.call(0, L.TDH_MEM_RANGE_UNBLOCK, **where) == TdxStatus.TDX_TLB_TRACKING_NOT_DONE | 1
    host.tdx.td_exit(1, ExitReason.EPT_VIOLATION)
    assert host.call(0, L.TDH_MEM_RANGE_UNBLOCK, **where) == 0
    assert host.call(0, L.TDH_MEM_RANGE_BLOCK, **where) == 0
    assert host.call(0, L.TDH_MEM_TRACK, rcx=td.tdr) == 0
    assert host.call(0, L.TDH_MEM_PAGE_REMOVE, **where) == 0
    assert host.result(0, L.TDH_PHYMEM_PAGE_RDMD, rcx=page).out["rcx"] == PageType.PT_NDA
    assert host.call(0, L.TDH_MEM_PAGE_REMOVE, **where) == TdxStatus.TDX_EPT_WALK_FAILED | 1


def test_page_metadata_and_cache_line_write_back() -> None:
    """RDMD tells type and owner; WBINVD takes free pages of any key id; reserved areas are no pages for TDs."""
    host = Host()
    td = host.td()
    out = host.result(0, L.TDH_PHYMEM_PAGE_RDMD, rcx=td.vcpus[0]).out
    assert (out["rcx"], out["rdx"]) == (PageType.PT_TDVPR, td.tdr)
    assert host.result(0, L.TDH_PHYMEM_PAGE_RDMD, rcx=SCRATCH).out["rcx"] == PageType.PT_RSVD
    assert host.call(0, L.TDH_MNG_CREATE, rcx=SCRATCH, rdx=40) == TdxStatus.TDX_PAGE_METADATA_INCORRECT | 1
    free = next(host.pages)
    assert host.call(0, L.TDH_PHYMEM_PAGE_WBINVD, rcx=free | 33 << 40) == 0
    assert host.call(0, L.TDH_PHYMEM_PAGE_WBINVD, rcx=td.tdr) == TdxStatus.TDX_PAGE_METADATA_INCORRECT | 1
    assert host.call(0, L.TDH_PHYMEM_PAGE_WBINVD, rcx=1 << 46) == OPERAND_INVALID | 1
    assert host.call(0, L.TDH_MNG_KEY_RECLAIMID, rcx=td.tdr) == 0


def test_reclaim_tells_what_the_page_was() -> None:
    """RCX type, RDX owner; a second reclaim finds the page free."""
    host = Host()
    td = host.td()
    host.teardown(msgspec.structs.replace(td, vcpus=()), keep_tdr=True)
    out = host.result(0, L.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.vcpus[0]).out
    assert out == {"rcx": PageType.PT_TDVPR, "rdx": td.tdr, "r8": 0, "r9": 0, "r10": 0, "r11": 0}
    again = host.call(0, L.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.vcpus[0])
    assert again == TdxStatus.TDX_PAGE_METADATA_INCORRECT | 1
    assert host.call(0, L.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.tdr) == 0
    assert not host.tdx.tds.vcpus


# vCPUs


def test_exit_registers() -> None:
    """An asynchronous exit reports in RCX to R9; a TDVMCALL passes the guest's registers; HLT is its default."""
    host = Host()
    tdvpr = host.td().vcpus[0]
    result = host.result(0, L.TDH_VP_ENTER, rcx=tdvpr)
    assert (result.rax, result.running) == (0, tdvpr)
    exit_ = host.tdx.td_exit(0, ExitReason.EPT_VIOLATION, ExitInfo(qualification=0x82, gpa=0x1234000))
    assert (exit_.rax, exit_.running) == (48, None)
    assert exit_.out == {"rcx": 0x82, "rdx": 0, "r8": 0x1234000, "r9": 0, "r10": 0, "r11": 0, "r12": 0, "r13": 0}
    assert host.enter(0, tdvpr) == 0
    nmi = host.tdx.td_exit(0, ExitReason.EXCEPTION_NMI)
    assert (nmi.rax, nmi.out["r9"]) == (0, 0x8000_0202)
    copy = GuestMemory()
    copy.unit()
    call = host.run(0, tdvpr)
    assert (call.rax, call.out) == (77, {"rcx": 0x3C00, "r10": 0, "r11": 12, "r12": 1, "r13": copy.chain_low})
    must(host.tdx, 0, L.TDH_VP_ENTER, rcx=tdvpr, r10=0, r11=5)
    assert host.tdx.tds.vcpus[tdvpr].gprs["r11"] == 5


@pytest.mark.parametrize(
    ("status", "reenter"),
    [
        (TdxStatus.TDX_NON_RECOVERABLE_VCPU, TdxStatus.TDX_VCPU_STATE_INCORRECT),
        (TdxStatus.TDX_NON_RECOVERABLE_TD, TdxStatus.TDX_TD_FATAL),
    ],
)
def test_an_exit_may_be_the_last(status: TdxStatus, reenter: TdxStatus) -> None:
    """A disabled vCPU and a fatal TD are not entered again, but can be torn down."""
    host = Host()
    td = host.td()
    assert host.enter(0, td.vcpus[0]) == 0
    result = host.tdx.td_exit(0, ExitReason.TRIPLE_FAULT, ExitInfo(status=status))
    assert result.rax == status | 2
    assert host.enter(0, td.vcpus[0]) == reenter
    host.teardown(td)


def test_other_vcpus_and_reads_go_on_beside_a_running_vcpu() -> None:
    """A running vCPU shares the TD: another enters elsewhere, MNG.RD and MEM.TRACK work, exclusive leaves do not."""
    host = Host()
    td = host.td(vcpus=2)
    assert [host.enter(1, td.vcpus[0]), host.enter(2, td.vcpus[1])] == [0, 0]
    assert host.call(0, L.TDH_MNG_RD, rcx=td.tdr, rdx=0x9010_0002_0000_0002) == 0
    assert host.call(0, L.TDH_MEM_TRACK, rcx=td.tdr) == 0
    for leaf in (L.TDH_MNG_KEY_CONFIG, L.TDH_MNG_KEY_FREEID, L.TDH_MNG_VPFLUSHDONE, L.TDH_PHYMEM_PAGE_RECLAIM):
        assert host.call(0, leaf, rcx=td.tdr) == OPERAND_BUSY | 1
    assert host.tdx.tds.tds[td.tdr].page_lock.shared == [1, 2]
    assert host.tdx.tds.vcpus[td.vcpus[0]].state == VcpuState.VCPU_ACTIVE
    assert [host.tdx.td_exit(lp, ExitReason.EXTERNAL_INTERRUPT).rax for lp in (2, 1)] == [1, 1]
    assert host.tdx.tds.tds[td.tdr].refcount == [0, 0]


def test_enter_checks_the_clock() -> None:
    """A changed TSC_ADJUST and a TSC that went back are refused; the vCPU is bound all the same."""
    host = Host()
    tdvpr = host.td().vcpus[0]
    host.hooks.clock = 100
    host.run(0, tdvpr)
    host.hooks.clock = 99
    assert host.enter(0, tdvpr) == TdxStatus.TDX_TSC_ROLLBACK
    assert host.flush(0, tdvpr) == 0
    host.hooks.clock, host.hooks.adjust[2] = 101, 1
    assert host.enter(2, tdvpr) == TdxStatus.TDX_INCONSISTENT_MSR | 0x3B
    assert host.enter(1, tdvpr) == TdxStatus.TDX_VCPU_ASSOCIATED
    for bit in (52, 53):
        assert host.enter(2, tdvpr | 1 << bit) == OPERAND_INVALID | 1


@pytest.mark.parametrize(
    ("lock", "exclusive", "status"),
    [
        ("page_lock", True, OPERAND_BUSY | 128),
        ("op_state_lock", True, OPERAND_BUSY | 172),
        ("epoch_lock", True, OPERAND_BUSY | 169),
        ("sept_lock", True, OPERAND_BUSY | 146),
    ],
)
def test_enter_names_the_lock_that_it_could_not_get(lock: str, exclusive: bool, status: int) -> None:
    """A lock held by another LP makes VP.ENTER busy under its own operand id, and leaves nothing locked behind."""
    host = Host()
    td = host.td()
    vcpu = host.tdx.tds.vcpus[td.vcpus[0]]
    vcpu.zero_step_defence = True
    held = getattr(host.tdx.tds.tds[td.tdr], lock)
    assert held.try_exclusive(3)
    assert host.enter(0, vcpu.tdvpr) == status
    assert held.exclusive == 3
    held.release(3)
    host.run(0, vcpu.tdvpr)


def test_locks_of_keys_caches_and_free_pages() -> None:
    """KOT, write-back and page locks have busy codes of their own."""
    host = Host()
    td = host.td()
    page = next(host.pages)
    system = host.tdx.state.system
    system.kot_lock.try_exclusive(2)
    assert host.call(0, L.TDH_MNG_CREATE, rcx=page, rdx=40) == OPERAND_BUSY | 0xBA
    assert host.call(0, L.TDH_MNG_VPFLUSHDONE, rcx=td.tdr) == OPERAND_BUSY | 0xBA
    assert host.call(0, L.TDH_PHYMEM_CACHE_WB) == OPERAND_BUSY | 0xBA
    system.kot_lock.release(2)
    system.wbt[0].mutex.try_exclusive(2)
    assert host.call(0, L.TDH_PHYMEM_CACHE_WB) == OPERAND_BUSY | 0xBC
    host.tdx.page_lock(page).try_shared(2)
    assert host.call(0, L.TDH_MNG_CREATE, rcx=page, rdx=40) == OPERAND_BUSY | 1
    host.tdx.page_lock(page).release(2)
    assert host.call(0, L.TDH_MNG_CREATE, rcx=page, rdx=40) == 0


def test_an_lp_cannot_call_from_inside_a_guest() -> None:
    """That is a mistake of the machine around the module, not a status; so is an exit without a guest."""
    host = Host()
    tdvpr = host.td().vcpus[0]
    assert host.enter(0, tdvpr) == 0
    assert host.tdx.running(0) == tdvpr
    with pytest.raises(ValueError, match="already inside"):
        host.call(0, L.TDH_SYS_RD)
    host.tdx.td_exit(0, ExitReason.EXTERNAL_INTERRUPT)
    for misuse in (host.tdx.guest_step, lambda lp: host.tdx.td_exit(lp, ExitReason.TDCALL)):
        with pytest.raises(ValueError, match="runs no TD vCPU"):
            misuse(0)


# Handoff, platform, boot


@pytest.mark.parametrize(("identity", "size"), [(HV0, 53386), (HV1, 57336)], ids=["hv0", "hv1"])
def test_the_bytes_of_the_handoff_area(identity: ModuleIdentity, size: int) -> None:
    """Header, key ids, TDMRs and scalars stand where the format says."""
    host = Host(identity)
    host.new_td(40)
    host.tdx.state.system.mig_interrupted_count = 5
    assert host.shutdown() == 0
    read = host.memory.read
    assert read(HANDOFF, 8) == bytes([1, 0, identity.module_hv, 0]) + size.to_bytes(4, "little")
    assert read(HANDOFF + 8 + 8 * 32 + 4, 1) == b"\3"
    assert read(HANDOFF + 8 + 8 * 40, 8) == bytes([0, 0, 0, 0, 1, 0, 0, 0])
    assert host.memory.read64(HANDOFF + 0x8088 + 8) == 1 << 30
    assert read(HANDOFF + 0xD088, 10) == bytes([1, 0, 0, 0, 32, 0, 1, 0, 0, 0])
    counts = bytes([0, 1, 0, 5, 0]) if identity is HV1 else bytes(5)
    assert read(HANDOFF + 0xD092, 5) == counts


def test_a_handoff_of_version_0_leaves_no_counts() -> None:
    """What lies behind the payload of an older module is not read, whatever it is."""
    host = Host(HV0)
    td = host.add_vcpu(host.new_td())
    host.shutdown()
    host.memory.write(HANDOFF + 0xD092, b"\xff" * 5)
    host.install(HV1)
    init_lps(host.tdx)
    assert host.call(0, L.TDH_SYS_UPDATE) == 0
    system = host.tdx.state.system
    assert (system.dynamic_pamt, system.td_build_count, system.mig_interrupted_count) == (False, 0, 0)
    assert host.call(0, L.TDH_MR_FINALIZE, rcx=td.tdr) == 0
    assert system.td_build_count == 0


def test_handoff_versions_of_a_module_that_may_downgrade() -> None:
    """Without NO_DOWNGRADE any version from the minimum on may be asked for, and an older module takes it."""
    both = msgspec.structs.replace(HV1, no_downgrade=False)
    host = Host(both)
    td = host.td(associate=(1,))
    assert host.shutdown(0) == 0
    host.install(HV0_NEXT)
    init_lps(host.tdx)
    assert host.call(0, L.TDH_SYS_UPDATE) == 0
    assert host.run(1, td.vcpus[0]).out["r12"] == 1
    picky = msgspec.structs.replace(HV1_NEXT, min_update_hv=1)
    assert host.shutdown() == 0
    host.install(picky)
    init_lps(host.tdx)
    assert host.call(0, L.TDH_SYS_UPDATE) == TdxStatus.TDX_SYS_INVALID_HANDOFF


def test_the_platform_after_an_install() -> None:
    """Ids, packages, ranges and key ids come from the loader's platform; handoff fields from SYS_INFO_TABLE."""
    loader = Platform(num_lps=6, fms=(0xC06F2, 0xC06F2), seamrr_base=0x10_0000, seamrr_size=0x400_0000,
                      p_seamldr_base=0x300_0000, p_seamldr_size=0x10_0000)  # fmt: skip
    host = Host()
    host.memory.write(0x10_0000 + 2152, bytes([1, 0, 0, 0, 1, 0, 13, 0]))
    platform = ModulePlatform.installed(loader, host.memory, seamdb_index=9)
    assert platform.lps == [0, 1, 2, 4, 5, 6]
    assert (platform.num_lps, platform.num_pkgs, platform.first_lps()) == (6, 2, [0, 4])
    assert (platform.handoff_pa, platform.seamdb_index) == (handoff_pa(loader), 9)
    assert platform.handoff_params == HandoffParams(1, 0, True, 13)
    assert (platform.is_private_hkid(31), platform.is_private_hkid(32), platform.is_private_hkid(64)) == (
        False,
        True,
        False,
    )
    assert platform.split(5 << 40 | 0x1000) == (0x1000, 5)
    assert platform.split(1 << 46) is None


def test_status_names() -> None:
    """A status is named without its details; what is not the module's stays hexadecimal."""
    assert status_name(0xC000_0920_0000_003B) == "TDX_INCONSISTENT_MSR"
    assert status_name(0x8000_FF00_FFFF_0000) == "0x8000ff00ffff0000"
    assert is_error(0x8000_0203_0000_0000)
    assert not is_error(TdxStatus.TDX_KEY_CONFIGURED)


def test_born_finalized_says_what_it_takes() -> None:
    """Bindings are as asked, and `pages_needed` is exact."""
    host = Host()
    start = next(host.pages)
    td = host.td(vcpus=3, associate=(2, None))
    assert next(host.pages) == start + 4096 * (1 + pages_needed(host.tdx, vcpus=3))
    bound = [host.tdx.tds.vcpus[tdvpr].assoc_lpid for tdvpr in td.vcpus]
    assert bound == [2, 0xFFFF_FFFF, 0xFFFF_FFFF]
    with pytest.raises(BootError, match="TDX_HKID_NOT_FREE"):
        host.td(td.hkid)


def test_a_result_holds_only_the_outputs_of_the_leaf() -> None:
    """Leaves without outputs leave all registers as they were."""
    host = Host()
    result = host.tdx.seamcall(1, L.TDH_SYS_LP_SHUTDOWN, Registers(rcx=1, rdx=2))
    assert (result.rax, result.out, result.running) == (0, {}, None)
