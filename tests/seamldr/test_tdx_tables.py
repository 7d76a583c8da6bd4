"""Tables of the Secure EPT, large pages, dynamic PAMT, and the leaf that gives everything back."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from tdx_bench import HV0, HV1, HV1_NEXT, SCRATCH, TDMR, Host, assert_no_locks

from seamldr.tdx_boot import TdHandle, boot, init_lps
from seamldr.tdx_leaves import TdhLeaf as L
from seamldr.tdx_module import ExitReason
from seamldr.tdx_state import PageType, SysState
from seamldr.tdx_status import TdxStatus as S

LARGE = 0x80_0000
"""A free range of 2 MiB that is aligned."""
RANGE = 0x20_0000
DYNAMIC_PAMT = 1 << 16
SYS_DISABLE = 1 << 53
TABLE = {"rcx": RANGE | 1}


def with_table() -> tuple[Host, TdHandle, int]:
    """A TD that can run with an empty table for one range of 2 MiB; also the table's page."""
    host = Host()
    td, page = host.td(associate=(1,)), next(host.pages)
    assert host.call(0, L.TDH_MEM_SEPT_ADD, **TABLE, rdx=td.tdr, r8=page) == 0
    return host, td, page


def blocked_and_tracked(host: Host, td: TdHandle) -> None:
    """Nobody can have a translation of the range any more."""
    assert host.call(0, L.TDH_MEM_RANGE_BLOCK, **TABLE, rdx=td.tdr) == 0
    assert host.call(0, L.TDH_MEM_TRACK, rcx=td.tdr) == 0


def test_an_empty_table_is_removed_after_block_and_track() -> None:
    """SEPT.REMOVE wants the table there, blocked, tracked and empty, in this order; RCX is the page, free again."""
    host, td, page = with_table()
    children = host.tdx.tds.tds[td.tdr].chldcnt

    def remove() -> int:
        return host.call(0, L.TDH_MEM_SEPT_REMOVE, **TABLE, rdx=td.tdr)

    assert host.call(0, L.TDH_MEM_SEPT_REMOVE, rcx=RANGE, rdx=td.tdr) == S.TDX_OPERAND_INVALID | 1
    assert host.call(0, L.TDH_MEM_SEPT_REMOVE, rcx=RANGE | 5, rdx=td.tdr) == S.TDX_OPERAND_INVALID | 1
    assert host.call(0, L.TDH_MEM_SEPT_REMOVE, 2, **TABLE, rdx=td.tdr) == S.TDX_OPERAND_INVALID
    assert host.call(0, L.TDH_MEM_SEPT_REMOVE, rcx=2 * RANGE | 1, rdx=td.tdr) == S.TDX_EPT_WALK_FAILED | 1
    assert remove() == S.TDX_GPA_RANGE_NOT_BLOCKED | 1
    assert host.call(0, L.TDH_MEM_RANGE_BLOCK, **TABLE, rdx=td.tdr) == 0
    assert remove() == S.TDX_TLB_TRACKING_NOT_DONE | 1
    assert host.call(0, L.TDH_MEM_TRACK, rcx=td.tdr) == 0
    assert host.call(0, L.TDH_MEM_PAGE_AUG, rcx=RANGE + 4096, rdx=td.tdr, r8=LARGE) == 0
    assert remove() == S.TDX_EPT_ENTRY_NOT_FREE | 1
    assert host.call(0, L.TDH_MEM_RANGE_BLOCK, rcx=RANGE + 4096, rdx=td.tdr) == 0
    assert host.call(0, L.TDH_MEM_TRACK, rcx=td.tdr) == 0
    assert host.call(0, L.TDH_MEM_PAGE_REMOVE, rcx=RANGE + 4096, rdx=td.tdr) == 0
    result = host.result(0, L.TDH_MEM_SEPT_REMOVE, **TABLE, rdx=td.tdr)
    assert (result.rax, result.out["rcx"]) == (0, page)
    assert host.tdx.page_type(page) == PageType.PT_NDA
    assert host.tdx.tds.tds[td.tdr].chldcnt == children - 1
    assert_no_locks(host.tdx)


@pytest.mark.parametrize("leaf", [L.TDH_MEM_SEPT_REMOVE, L.TDH_MEM_PAGE_PROMOTE])
def test_a_table_in_use_by_another_lp_is_busy(leaf: L) -> None:
    """The tree of the Secure EPT and the table's page are locks that may be held: BUSY, each with its operand."""
    host, td, page = with_table()
    blocked_and_tracked(host, td)
    tree = host.tdx.tds.tds[td.tdr].sept_lock
    tree.try_exclusive(3)
    assert host.call(0, leaf, **TABLE, rdx=td.tdr) == 0x8000_0200_0000_0092
    tree.release(3)
    host.tdx.page_lock(page).try_exclusive(3)
    assert host.call(0, leaf, **TABLE, rdx=td.tdr) == 0x8000_0200_0000_0001


def full_table(skip: int | None = None, base: int = LARGE) -> tuple[Host, TdHandle, int]:
    """A TD in build with 512 pages of 4 KiB that make one range of 2 MiB, or all but one; also their table."""
    host = Host()
    td, table = host.add_vcpu(host.new_td()), next(host.pages)
    assert host.call(0, L.TDH_MEM_SEPT_ADD, **TABLE, rdx=td.tdr, r8=table) == 0
    for index in range(512):
        if index != skip:
            where = {"rcx": RANGE + 4096 * index, "rdx": td.tdr, "r8": base + 4096 * index, "r9": SCRATCH}
            assert host.call(0, L.TDH_MEM_PAGE_ADD, **where) == 0
    return host, td, table


def test_512_small_pages_become_a_large_one() -> None:
    """PAGE.PROMOTE gives the table back; the range stays mapped, as one page that is removed as one."""
    host, td, table = full_table()
    before = host.tdx.tds.tds[td.tdr].chldcnt
    assert host.call(0, L.TDH_MEM_PAGE_PROMOTE, **TABLE, rdx=td.tdr) == S.TDX_GPA_RANGE_NOT_BLOCKED | 1
    blocked_and_tracked(host, td)
    result = host.result(0, L.TDH_MEM_PAGE_PROMOTE, **TABLE, rdx=td.tdr)
    assert (result.rax, result.out["rcx"]) == (0, table)
    assert host.tdx.tds.tds[td.tdr].chldcnt == before - 1
    metadata = host.result(0, L.TDH_PHYMEM_PAGE_RDMD, rcx=LARGE).out
    assert (metadata["rcx"], metadata["rdx"], metadata["r8"]) == (PageType.PT_REG, td.tdr, 1)
    inside = LARGE + 37 * 4096
    assert host.tdx.page_type(inside) == PageType.PT_REG
    assert host.call(0, L.TDH_MNG_CREATE, rcx=inside, rdx=34) == S.TDX_PAGE_METADATA_INCORRECT | 1
    taken = S.TDX_EPT_ENTRY_STATE_INCORRECT | 1
    assert host.call(0, L.TDH_MEM_PAGE_AUG, rcx=RANGE + 8192, rdx=td.tdr, r8=table) == taken
    assert host.call(0, L.TDH_MR_EXTEND, rcx=RANGE + 8192 + 256, rdx=td.tdr) == 0
    assert host.call(0, L.TDH_MEM_SEPT_REMOVE, **TABLE, rdx=td.tdr) == S.TDX_EPT_ENTRY_LEAF | 1
    blocked_and_tracked(host, td)
    assert host.call(0, L.TDH_MEM_PAGE_REMOVE, **TABLE, rdx=td.tdr) == 0
    assert host.tdx.tds.tds[td.tdr].chldcnt == before - 513
    assert host.tdx.page_type(inside) == PageType.PT_NDA


def missing(host: Host, td: TdHandle) -> None:
    """One page is not there."""


def pending(host: Host, td: TdHandle) -> None:
    """One page has not been accepted by the guest."""
    assert host.call(0, L.TDH_MEM_PAGE_AUG, rcx=RANGE + 4096 * 9, rdx=td.tdr, r8=LARGE + 4096 * 9) == 0


def elsewhere(host: Host, td: TdHandle) -> None:
    """One page is not beside the others."""
    where = {"rcx": RANGE + 4096 * 9, "rdx": td.tdr, "r8": LARGE + RANGE, "r9": SCRATCH}
    assert host.call(0, L.TDH_MEM_PAGE_ADD, **where) == 0


@pytest.mark.parametrize("spoil", [missing, pending, elsewhere], ids=lambda spoil: spoil.__name__)
def test_a_range_that_cannot_be_one_page(spoil: Callable[[Host, TdHandle], None]) -> None:
    """All 512 pages have to be there, accepted, and in one aligned range; else nothing changes."""
    host, td, _ = full_table(skip=9)
    spoil(host, td)
    blocked_and_tracked(host, td)
    before = msgspec.msgpack.encode(host.tdx.tds)
    status = host.call(0, L.TDH_MEM_PAGE_PROMOTE, **TABLE, rdx=td.tdr)
    assert status == S.TDX_EPT_INVALID_PROMOTE_CONDITIONS | 1
    assert msgspec.msgpack.encode(host.tdx.tds) == before


def test_a_large_page_is_aligned() -> None:
    """512 pages side by side that do not begin at 2 MiB cannot be one."""
    host, td, _ = full_table(base=LARGE + 4096)
    blocked_and_tracked(host, td)
    status = host.call(0, L.TDH_MEM_PAGE_PROMOTE, **TABLE, rdx=td.tdr)
    assert status == S.TDX_EPT_INVALID_PROMOTE_CONDITIONS | 1


def dynamic() -> Host:
    """A module that is configured for dynamic PAMT."""
    host = Host(HV1, up=False)
    boot(host.tdx, [TDMR], scratch_pa=SCRATCH, global_hkid=32 | DYNAMIC_PAMT)
    return host


PAIR = {"rcx": LARGE | 1, "rdx": 0xC0_0000, "r8": 0xC0_1000}


def test_pages_can_be_used_where_they_have_pamt() -> None:
    """Without a pair of PAMT pages for its range a page cannot be given; with it, it can; in use, the pair stays."""
    host = dynamic()
    create = {"rcx": LARGE + 0x10_0000, "rdx": 33}
    assert host.call(0, L.TDH_MNG_CREATE, **create) == 0x8000_0308_0000_0001
    assert host.call(0, L.TDH_PHYMEM_PAMT_REMOVE, rcx=LARGE | 1) == 0xC000_0305_0000_0001
    assert host.call(0, L.TDH_PHYMEM_PAMT_ADD, **PAIR) == 0
    assert host.call(0, L.TDH_PHYMEM_PAMT_ADD, **PAIR) == 0xC000_0304_0000_0001
    other = {**PAIR, "rcx": LARGE + RANGE | 1}
    assert host.call(0, L.TDH_PHYMEM_PAMT_ADD, **other) == 0xC000_0303_0000_0002
    assert host.call(0, L.TDH_PHYMEM_PAMT_ADD, **{**other, "rdx": 0xC0_2000, "r8": 0xC0_2000}) == 0xC000_0303_0000_0008
    assert host.call(0, L.TDH_MNG_CREATE, **create) == 0
    assert host.call(0, L.TDH_PHYMEM_PAMT_REMOVE, rcx=LARGE | 1) == 0xC000_0306_0000_0001
    assert host.call(0, L.TDH_MNG_KEY_CONFIG, rcx=create["rcx"]) == 0
    assert host.call(0, L.TDH_MNG_ADDCX, rcx=LARGE, rdx=create["rcx"]) == 0
    assert host.call(0, L.TDH_PHYMEM_PAMT_REMOVE, rcx=LARGE | 1) == 0xC000_0306_0000_0000


def test_a_pair_comes_back_when_its_range_is_empty() -> None:
    """PAMT.REMOVE returns the two pages that PAMT.ADD took; pages that hold PAMT are not free meanwhile."""
    host = dynamic()
    assert host.call(0, L.TDH_PHYMEM_PAMT_ADD, **PAIR) == 0
    assert host.call(0, L.TDH_MNG_CREATE, rcx=PAIR["rdx"], rdx=33) == S.TDX_PAGE_METADATA_INCORRECT | 1
    result = host.result(0, L.TDH_PHYMEM_PAMT_REMOVE, rcx=LARGE | 1)
    assert (result.rax, result.out) == (0, {"rdx": PAIR["rdx"], "r8": PAIR["r8"]})


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"rcx": LARGE}, 0xC000_0100_0000_0001),
        ({"rcx": LARGE + 4096 | 1}, 0xC000_0100_0000_0001),
        ({"rcx": LARGE | 1 << 46 | 1}, 0xC000_0100_0000_0001),
        ({"rcx": 1 << 32 | 1}, 0xC000_0101_0000_0001),
        ({"rdx": 0xC0_0008}, 0xC000_0100_0000_0002),
        ({"rdx": 1 << 32}, 0xC000_0101_0000_0002),
        ({"r8": 0xC0_0008}, 0xC000_0100_0000_0008),
        ({"r8": 1 << 32}, 0xC000_0101_0000_0008),
    ],
)
def test_operands_of_pamt_add(change: dict[str, int], status: int) -> None:
    """Range and pages are checked, and named."""
    assert dynamic().call(0, L.TDH_PHYMEM_PAMT_ADD, **{**PAIR, **change}) == status


def test_without_dynamic_pamt_its_leaves_are_refused() -> None:
    """A module that does not know them, and one that was not configured so, both blame RAX."""
    for identity in (HV0, HV1):
        for leaf in (L.TDH_PHYMEM_PAMT_ADD, L.TDH_PHYMEM_PAMT_REMOVE):
            assert Host(identity).call(0, leaf, **PAIR) == 0xC000_0100_0000_0000


def test_dynamic_pamt_survives_an_update() -> None:
    """The flag is handed over, the pairs lie in PAMT: a page with PAMT can be given after an update, another not."""
    host = dynamic()
    assert host.call(0, L.TDH_PHYMEM_PAMT_ADD, **PAIR) == 0
    host.update(HV1_NEXT)
    assert host.call(0, L.TDH_MNG_CREATE, rcx=LARGE + RANGE, rdx=33) == 0x8000_0308_0000_0001
    assert host.call(0, L.TDH_MNG_CREATE, rcx=LARGE, rdx=33) == 0


# TDH.SYS.DISABLE


def with_disable() -> Host:
    """A module that has TDH.SYS.DISABLE."""
    return Host(msgspec.structs.replace(HV1, tdx_features0=HV1.tdx_features0 | SYS_DISABLE))


def test_disable_gives_everything_back_and_the_cold_path_begins_anew() -> None:
    """All TDs and their keys are gone, no state is left; another kernel brings the module up as after power on."""
    host = with_disable()
    td = host.td(associate=(1,))
    host.td(34)
    assert host.call(0, L.TDH_SYS_DISABLE) == 0
    assert host.state is SysState.SYSINIT_PENDING
    assert (host.tdx.tds.tds, host.tdx.tds.pages, host.tdx.tds.vcpus, host.tdx.state.system.kot) == ({}, {}, {}, {})
    assert_no_locks(host.tdx)
    for leaf, status in (
        (L.TDH_VP_ENTER, 0xC000_0505_0000_0000),
        (L.TDH_SYS_DISABLE, 0xC000_0505_0000_0000),
        (L.TDH_SYS_LP_INIT, 0xC000_050B_0000_0000),
    ):
        assert host.call(1, leaf, rcx=td.vcpus[0]) == status
    boot(host.tdx, [TDMR], scratch_pa=SCRATCH)
    host.pages = iter(range(LARGE, LARGE + RANGE, 4096))
    assert host.run(2, host.td().vcpus[0]).out["r12"] == 1


def test_disable_waits_for_guests_and_for_the_global_lock() -> None:
    """A guest that runs elsewhere, or another SYS leaf under way, makes it busy; nothing is lost."""
    host = with_disable()
    td = host.td(associate=(1,))
    assert host.enter(1, td.vcpus[0]) == 0
    assert host.call(0, L.TDH_SYS_DISABLE) == 0x8000_0202_0000_0000
    host.tdx.td_exit(1, ExitReason.EXTERNAL_INTERRUPT)
    host.tdx.state.system.global_lock.try_exclusive(3)
    assert host.call(0, L.TDH_SYS_DISABLE) == 0x8000_0202_0000_0000
    host.tdx.state.system.global_lock.release(3)
    assert host.enter(1, td.vcpus[0]) == 0


def test_disable_goes_on_after_an_interrupt() -> None:
    """Each call frees at least one TD before a host interrupt makes it return, so that the caller's loop ends."""
    host = with_disable()
    for hkid in (33, 34, 35):
        host.td(hkid)
    host.hooks.interrupts = 100
    assert [host.call(0, L.TDH_SYS_DISABLE) for _ in range(3)] == [0x8000_0003_0000_0000] * 2 + [0]


@pytest.mark.parametrize("identity", [HV0, HV1])
def test_disable_is_unknown_to_modules_without_its_feature(identity: object) -> None:
    """Bit 53 of TDX_FEATURES0 says whether the leaf is there; without it RAX is at fault, in any profile."""
    assert Host(identity).call(0, L.TDH_SYS_DISABLE) == 0xC000_0100_0000_0000  # type: ignore[arg-type]
    fresh = Host(identity, up=False)  # type: ignore[arg-type]
    init_lps(fresh.tdx)
    assert fresh.call(0, L.TDH_SYS_DISABLE) == 0xC000_0505_0000_0000
