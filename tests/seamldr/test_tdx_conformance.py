"""Input or wrong state to exact RAX, one row of the conformance table each."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from tdx_bench import HANDOFF, HV0, HV0_NEXT, HV1, HV1_NEXT, SCRATCH, TDMR, VMFAILINVALID, Host

from seamldr.tdx_boot import init_lps
from seamldr.tdx_handoff import HandoffHeader, write_header
from seamldr.tdx_leaves import TdhLeaf as L
from seamldr.tdx_module import ExitReason

Row = Callable[[], tuple[int, ...]]
ROWS: dict[int, list[tuple[tuple[int, ...], Row]]] = {}
ALL_ONES = 0xFFFF_FFFF_FFFF_FFFF


def row(number: int, *expected: int) -> Callable[[Row], Row]:
    """Register one row: the function makes the calls and returns their statuses."""

    def register(function: Row) -> Row:
        ROWS.setdefault(number, []).append((expected, function))
        return function

    return register


def fresh(**arguments: int) -> Host:
    """A module right after its install."""
    return Host(HV1, up=False, **arguments)


def inited(**arguments: int) -> Host:
    """A module in SYSINIT_DONE, all LPs initialised."""
    host = fresh(**arguments)
    init_lps(host.tdx)
    return host


def with_running_vcpu() -> tuple[Host, int, int]:
    """A TD whose vCPU is in its guest on LP 1; also TDR and TDVPR."""
    host = Host()
    td = host.td(associate=(1,))
    assert host.enter(1, td.vcpus[0]) == 0
    return host, td.tdr, td.vcpus[0]


@row(1, 0xC000_0100_0000_0000, 0xC000_0100_0000_0000)
def reserved_rax_bit() -> tuple[int, ...]:
    return Host().call(0, 1 << 24 | L.TDH_SYS_RD), fresh().call(0, 1 << 24 | 200)


@row(2, 0xC000_0100_0000_0000)
def version_of_shutdown() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_SYS_SHUTDOWN, 1, rcx=1),)


@row(3, 0xC000_0100_0000_0000)
def version_of_update_profile_a() -> tuple[int, ...]:
    return (Host(HV0, up=False).call(0, L.TDH_SYS_UPDATE, 1),)


@row(4, 0xC000_0100_0000_0000)
def version_2_of_update() -> tuple[int, ...]:
    host = shut_down_and_installed()
    return (host.call(0, L.TDH_SYS_UPDATE, 2),)


def shut_down_and_installed() -> Host:
    """A module in SYSINIT_DONE with a good handoff before it."""
    host = Host()
    assert host.shutdown() == 0
    host.install(HV1_NEXT)
    init_lps(host.tdx)
    return host


@row(5, 0xC000_0100_0000_0000)
def unknown_leaf_ready() -> tuple[int, ...]:
    return (Host().call(0, 200),)


@row(6, 0xC000_0505_0000_0000)
def unknown_leaf_not_ready() -> tuple[int, ...]:
    return (inited().call(0, 200),)


@row(7, 0xC000_0100_0000_0001)
def init_with_rcx() -> tuple[int, ...]:
    return (fresh().call(0, L.TDH_SYS_INIT, rcx=1),)


@row(8, 0, 0xC000_0500_0000_0000)
def init_twice() -> tuple[int, ...]:
    host = fresh()
    return host.call(0, L.TDH_SYS_INIT), host.call(1, L.TDH_SYS_INIT)


@row(9, 0xC000_0100_0000_0001)
def init_operand_before_state() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_SYS_INIT, rcx=1),)


@row(10, 0xC000_050B_0000_0000)
def lp_init_too_early() -> tuple[int, ...]:
    return (fresh().call(0, L.TDH_SYS_LP_INIT),)


@row(11, 0xC000_0503_0000_0000)
def lp_init_twice() -> tuple[int, ...]:
    return (inited().call(2, L.TDH_SYS_LP_INIT),)


@row(12, 0xC000_050B_0000_0000)
def lp_init_ready() -> tuple[int, ...]:
    return (Host().call(2, L.TDH_SYS_LP_INIT),)


@row(13, 0xC000_0502_0000_0000)
def rd_before_lp_init() -> tuple[int, ...]:
    host = fresh()
    host.call(0, L.TDH_SYS_INIT)
    return (host.call(0, L.TDH_SYS_RD, rdx=0x8900_0001_0000_0000),)


@row(14, 0xC000_0C00_0000_0000, ALL_ONES)
def rd_bad_field() -> tuple[int, ...]:
    result = Host().result(0, L.TDH_SYS_RD, rdx=0x0500_0000_0000_0077)
    return result.rax, result.out["rdx"]


@row(15, 0x0000_0C0B_0000_0000, 0x0000_0002_0000_0000)
def rd_first_field() -> tuple[int, ...]:
    result = Host().result(0, L.TDH_SYS_RD, rdx=ALL_ONES)
    return result.rax, result.out["rdx"]


@row(16, 0xC000_050C_0000_0000)
def config_with_an_lp_missing() -> tuple[int, ...]:
    host = fresh()
    host.call(0, L.TDH_SYS_INIT)
    for lp in range(3):
        host.call(lp, L.TDH_SYS_LP_INIT)
    return (host.call(0, L.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=32),)


@row(17, 0xC000_0100_0000_0002, 0xC000_0100_0000_0002)
def config_count() -> tuple[int, ...]:
    host = inited()
    return tuple(host.call(0, L.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=count, r8=32) for count in (0, 65))


@row(18, 0xC000_0100_0000_0008)
def config_shared_hkid() -> tuple[int, ...]:
    return (inited().call(0, L.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=31),)


@row(19, 0xC000_0507_0000_0000)
def key_config_too_early() -> tuple[int, ...]:
    return (inited().call(0, L.TDH_SYS_KEY_CONFIG),)


def configured(**arguments: int) -> Host:
    """A module in SYSCONFIG_DONE."""
    host = inited(**arguments)
    TDMR.write(host.memory, 0x2000)
    host.memory.write64(SCRATCH, 0x2000)
    assert host.call(0, L.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=32) == 0
    return host


@row(20, 0, 0x0000_0815_0000_0000)
def key_config_same_package() -> tuple[int, ...]:
    host = configured(pkgs=2)
    return host.call(0, L.TDH_SYS_KEY_CONFIG), host.call(1, L.TDH_SYS_KEY_CONFIG)


@row(21, 0xC000_0505_0000_0000)
def tdmr_init_too_early() -> tuple[int, ...]:
    return (configured().call(0, L.TDH_SYS_TDMR_INIT, rcx=0),)


@row(22, 0x0000_0A03_0000_0000)
def tdmr_init_finished() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_SYS_TDMR_INIT, rcx=0),)


@row(23, 0xC000_0505_0000_0000)
def shutdown_too_early() -> tuple[int, ...]:
    return (inited().shutdown(),)


@row(24, 0xC000_0100_0000_0001)
def shutdown_version_out_of_range() -> tuple[int, ...]:
    return (Host().shutdown(2),)


@row(25, 0xC000_0100_0000_0001)
def shutdown_reserved_bit() -> tuple[int, ...]:
    return (Host().shutdown(1 << 17 | 1),)


@row(26, 0x8000_0202_0000_0000)
def shutdown_with_another_lp_busy() -> tuple[int, ...]:
    host, _, _ = with_running_vcpu()
    return (host.shutdown(),)


@row(27, 0x8000_0512_0003_0000)
def shutdown_with_builds() -> tuple[int, ...]:
    host = Host()
    for hkid in (33, 34, 35):
        host.new_td(hkid)
    return (host.shutdown(1 << 16 | 1),)


@row(28, 0x8000_0512_0002_0001)
def shutdown_with_interrupted_migrations() -> tuple[int, ...]:
    host = Host()
    host.tdx.state.system.mig_interrupted_count = 2
    return (host.shutdown(1 << 16 | 1),)


@row(29, 0xC000_0506_0000_0000)
def shutdown_twice() -> tuple[int, ...]:
    host = Host()
    host.shutdown()
    return (host.shutdown(),)


@row(30, *[0xC000_0506_0000_0000] * 4)
def leaves_after_shutdown() -> tuple[int, ...]:
    host = Host()
    td = host.td(associate=(1,))
    host.shutdown()
    return (
        host.call(0, L.TDH_SYS_RD, rdx=ALL_ONES),
        host.enter(1, td.vcpus[0]),
        host.call(0, L.TDH_SYS_UPDATE),
        host.call(0, L.TDH_SYS_INIT),
    )


@row(31, 0)
def lp_shutdown_after_shutdown() -> tuple[int, ...]:
    host = Host()
    host.shutdown()
    return (host.call(3, L.TDH_SYS_LP_SHUTDOWN),)


@row(32, 0xC000_0508_0000_0000)
def update_ready() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_SYS_UPDATE),)


@row(33, 0xC000_0508_0000_0000)
def update_with_an_lp_missing() -> tuple[int, ...]:
    host = Host()
    host.shutdown()
    host.install(HV1_NEXT)
    host.call(0, L.TDH_SYS_INIT)
    for lp in range(3):
        host.call(lp, L.TDH_SYS_LP_INIT)
    return (host.call(0, L.TDH_SYS_UPDATE),)


@row(34, 0xC000_0509_0000_0000)
def update_without_handoff() -> tuple[int, ...]:
    return (inited().call(0, L.TDH_SYS_UPDATE),)


@row(35, 0xC000_0509_0000_0000)
def update_from_newer_handoff() -> tuple[int, ...]:
    host = shut_down_and_installed()
    write_header(host.memory, HANDOFF, HandoffHeader(1, 2, 57336))
    return (host.call(0, L.TDH_SYS_UPDATE),)


@row(36, 0x8000_0202_0000_0000, 0x8000_0202_0000_0000, 0x8000_0202_0000_0000)
def global_lock_held() -> tuple[int, ...]:
    host = shut_down_and_installed()
    host.tdx.state.system.global_lock.try_exclusive(3)
    return tuple(host.call(0, leaf) for leaf in (L.TDH_SYS_UPDATE, L.TDH_SYS_INIT, L.TDH_SYS_LP_INIT))


@row(37, 0xC000_0100_0000_000A)
def update_with_r10() -> tuple[int, ...]:
    return (shut_down_and_installed().call(0, L.TDH_SYS_UPDATE, 1, r10=1),)


@row(38, 0, 0xC000_0508_0000_0000)
def update_twice() -> tuple[int, ...]:
    host = shut_down_and_installed()
    return host.call(0, L.TDH_SYS_UPDATE), host.call(0, L.TDH_SYS_UPDATE)


@row(39, 0xC000_0820_0000_0000, 0xC000_0820_0000_0000)
def create_with_used_hkid() -> tuple[int, ...]:
    host = Host()
    host.new_td(33)
    page = next(host.pages)
    return tuple(host.call(0, L.TDH_MNG_CREATE, rcx=page, rdx=hkid) for hkid in (33, 32))


@row(40, 0xC000_0100_0000_0002, 0xC000_0100_0000_0002)
def create_with_bad_hkid() -> tuple[int, ...]:
    host = Host()
    page = next(host.pages)
    return tuple(host.call(0, L.TDH_MNG_CREATE, rcx=page, rdx=hkid) for hkid in (31, 1 << 16 | 33))


@row(41, 0xC000_0300_0000_0001)
def create_on_used_page() -> tuple[int, ...]:
    host = Host()
    td = host.new_td()
    return (host.call(0, L.TDH_MNG_CREATE, rcx=td.tdr, rdx=34),)


@row(42, 0xC000_0100_0000_0001)
def create_misaligned() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_MNG_CREATE, rcx=0x80_0008, rdx=33),)


@row(43, 0xC000_0101_0000_0001)
def create_outside_tdmrs() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_MNG_CREATE, rcx=1 << 32, rdx=33),)


@row(44, 0xC000_0607_0000_0000)
def key_config_twice() -> tuple[int, ...]:
    host = Host()
    return (host.call(0, L.TDH_MNG_KEY_CONFIG, rcx=host.new_td().tdr),)


@row(45, 0x8000_0810_0000_0000)
def addcx_before_key_config() -> tuple[int, ...]:
    host = Host()
    tdr, tdcx = next(host.pages), next(host.pages)
    host.call(0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33)
    return (host.call(0, L.TDH_MNG_ADDCX, rcx=tdcx, rdx=tdr),)


@row(46, 0xC000_0606_0000_0000)
def init_with_too_few_tdcx() -> tuple[int, ...]:
    host = Host()
    tdr = next(host.pages)
    host.call(0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33)
    host.call(0, L.TDH_MNG_KEY_CONFIG, rcx=tdr)
    for _ in range(5):
        host.call(0, L.TDH_MNG_ADDCX, rcx=next(host.pages), rdx=tdr)
    return (host.call(0, L.TDH_MNG_INIT, rcx=tdr, rdx=SCRATCH),)


@row(47, 0xC000_0608_0000_0000)
def mng_init_twice() -> tuple[int, ...]:
    host = Host()
    return (host.call(0, L.TDH_MNG_INIT, rcx=host.new_td().tdr, rdx=SCRATCH),)


@row(48, 0xC000_0609_0000_0000)
def finalize_without_vcpus() -> tuple[int, ...]:
    host = Host()
    return (host.call(0, L.TDH_MR_FINALIZE, rcx=host.new_td().tdr),)


@row(49, 0xC000_0608_0000_0000)
def enter_before_finalize() -> tuple[int, ...]:
    host = Host()
    td = host.add_vcpu(host.new_td())
    return (host.enter(0, td.vcpus[0]),)


@row(50, 0xC000_0608_0000_0000)
def vp_create_after_finalize() -> tuple[int, ...]:
    host = Host()
    td = host.td()
    return (host.call(0, L.TDH_VP_CREATE, rcx=next(host.pages), rdx=td.tdr),)


@row(51, 0xC000_0700_0000_0000)
def vp_init_twice() -> tuple[int, ...]:
    host = Host()
    td = host.add_vcpu(host.new_td())
    return (host.call(0, L.TDH_VP_INIT, rcx=td.vcpus[0]),)


@row(52, 0x8000_0701_0000_0000)
def enter_idle_vcpu_elsewhere() -> tuple[int, ...]:
    host = Host()
    td = host.td(associate=(1,))
    return (host.enter(2, td.vcpus[0]),)


@row(53, 0xC000_0700_0000_0000)
def enter_running_vcpu_elsewhere() -> tuple[int, ...]:
    host, _, tdvpr = with_running_vcpu()
    return (host.enter(2, tdvpr),)


@row(54, 0xC000_0100_0000_0001, 0xC000_0100_0000_0001)
def enter_reserved_bits() -> tuple[int, ...]:
    host = Host()
    tdvpr = host.td().vcpus[0]
    return host.enter(0, tdvpr | 1), host.enter(0, tdvpr | 1 << 60)


@row(55, 0x8000_0702_0000_0000)
def flush_on_wrong_lp() -> tuple[int, ...]:
    host = Host()
    return (host.flush(2, host.td(associate=(1,)).vcpus[0]),)


@row(56, 0x8000_0200_0000_0001)
def flush_of_running_vcpu() -> tuple[int, ...]:
    host, _, tdvpr = with_running_vcpu()
    return (host.flush(2, tdvpr),)


@row(57, 0x8000_0701_0000_0000)
def vp_rd_elsewhere() -> tuple[int, ...]:
    host = Host()
    td = host.td(associate=(1,))
    return (host.call(0, L.TDH_VP_RD, rcx=td.vcpus[0], rdx=0xA020_0002_0000_0002),)


@row(58, 0, 0x8000_0201_0000_0000)
def track_twice() -> tuple[int, ...]:
    host, tdr, _ = with_running_vcpu()
    return host.call(0, L.TDH_MEM_TRACK, rcx=tdr), host.call(0, L.TDH_MEM_TRACK, rcx=tdr)


@row(59, 0x8000_0824_0000_0000)
def vpflushdone_with_bound_vcpu() -> tuple[int, ...]:
    host = Host()
    return (host.call(0, L.TDH_MNG_VPFLUSHDONE, rcx=host.td(associate=(1,)).tdr),)


@row(60, 0x8000_0200_0000_0001, 0x8000_0200_0000_0001)
def exclusive_leaves_with_running_vcpu() -> tuple[int, ...]:
    host, tdr, _ = with_running_vcpu()
    return tuple(host.call(0, leaf, rcx=tdr) for leaf in (L.TDH_MNG_VPFLUSHDONE, L.TDH_MR_FINALIZE))


@row(61, 0x8000_0810_0000_0000)
def flush_after_vpflushdone() -> tuple[int, ...]:
    host = Host()
    td = host.td()
    assert host.call(0, L.TDH_MNG_VPFLUSHDONE, rcx=td.tdr) == 0
    return (host.flush(0, td.vcpus[0]),)


@row(62, 0x0000_0821_0000_0000)
def nothing_to_write_back() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_PHYMEM_CACHE_WB),)


@row(63, 0xC000_0823_0000_0000)
def nothing_to_resume() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_PHYMEM_CACHE_WB, rcx=1),)


@row(64, 0xC000_0100_0000_0001)
def bad_write_back_command() -> tuple[int, ...]:
    return (Host().call(0, L.TDH_PHYMEM_CACHE_WB, rcx=2),)


@row(65, 0x8000_0817_0000_0000)
def freeid_before_write_back() -> tuple[int, ...]:
    host = Host()
    td = host.td()
    assert host.call(0, L.TDH_MNG_VPFLUSHDONE, rcx=td.tdr) == 0
    return (host.call(0, L.TDH_MNG_KEY_FREEID, rcx=td.tdr),)


@row(66, 0xC000_0607_0000_0000)
def freeid_of_living_td() -> tuple[int, ...]:
    host = Host()
    return (host.call(0, L.TDH_MNG_KEY_FREEID, rcx=host.td().tdr),)


@row(67, 0xC000_0607_0000_0000)
def reclaim_from_living_td() -> tuple[int, ...]:
    host = Host()
    return (host.call(0, L.TDH_PHYMEM_PAGE_RECLAIM, rcx=host.td().tdcx[0]),)


@row(68, 0xC000_0400_0000_0000)
def reclaim_tdr_with_children() -> tuple[int, ...]:
    host = Host()
    td = host.td()
    host.teardown(msgspec.structs.replace(td, tdcx=td.tdcx[1:]), keep_tdr=True)
    return (host.call(0, L.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.tdr),)


@row(69, 0xC000_0300_0000_0001)
def reclaim_free_page() -> tuple[int, ...]:
    host = Host()
    return (host.call(0, L.TDH_PHYMEM_PAGE_RECLAIM, rcx=next(host.pages)),)


@row(70, 1)
def reenter_after_update() -> tuple[int, ...]:
    host = Host()
    td = host.td(associate=(1,))
    host.run(1, td.vcpus[0])
    host.update(HV1_NEXT)
    assert host.enter(1, td.vcpus[0]) == 0
    return (host.tdx.td_exit(1, ExitReason.EXTERNAL_INTERRUPT).rax,)


@row(71, 0x8000_0003_0000_0000, 0, 0)
def write_back_across_update() -> tuple[int, ...]:
    host = Host(HV0)
    td = host.td()
    assert host.call(0, L.TDH_MNG_VPFLUSHDONE, rcx=td.tdr) == 0
    host.hooks.interrupts = 1
    interrupted = host.call(0, L.TDH_PHYMEM_CACHE_WB)
    host.update(HV0_NEXT)
    resumed = host.call(0, L.TDH_PHYMEM_CACHE_WB, rcx=1)
    return interrupted, resumed, host.call(0, L.TDH_MNG_KEY_FREEID, rcx=td.tdr)


@row(72, VMFAILINVALID)
def half_replaced() -> tuple[int, ...]:
    host = Host()
    host.shutdown()
    host.module = None
    return (host.call(1, L.TDH_SYS_LP_SHUTDOWN),)


CASES = [
    pytest.param(expected, function, id=f"row-{number:02}-{function.__name__}")
    for number, functions in ROWS.items()
    for expected, function in functions
]


@pytest.mark.conformance("TDX module calls")
@pytest.mark.parametrize(("expected", "function"), CASES)
def test_status(expected: tuple[int, ...], function: Row) -> None:
    """The call of the row ends with exactly the RAX of the row."""
    assert [hex(status) for status in function()] == [hex(status) for status in expected]


def test_every_row_is_there() -> None:
    """The table has 72 rows."""
    assert sorted(ROWS) == list(range(1, 73))
