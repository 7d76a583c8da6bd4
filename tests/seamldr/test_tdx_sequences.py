"""The life of a module and its TDs from first boot through an update to teardown, and the ways an update fails."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Generator

import msgspec
import pytest
from tdx_bench import (
    HV0,
    HV0_NEXT,
    HV1,
    HV1_NEXT,
    SCRATCH,
    TDMR,
    VMFAILINVALID,
    Host,
    Snapshot,
    assert_update_invariants,
)

from seamldr.identity import ModuleIdentity
from seamldr.tdx_boot import init_lps
from seamldr.tdx_call import Registers
from seamldr.tdx_leaves import TdhLeaf as L
from seamldr.tdx_metadata import HANDOFF_DATA_VALID, MODULE_HV, TDX_FEATURES0, UPDATE_VERSION
from seamldr.tdx_module import ExitReason, Point, Result
from seamldr.tdx_platform import HandoffParams
from seamldr.tdx_state import NO_LP, GuestMemory, LifeCycle, SysState
from seamldr.tdx_status import TdxStatus

pytestmark = pytest.mark.conformance("TDX module calls")
"""Of the functions whose name says which sequence they show."""

UPGRADES = [
    pytest.param(HV0, HV0_NEXT, id="hv0-to-hv0"),
    pytest.param(HV0, HV1, id="hv0-to-hv1"),
    pytest.param(HV1, HV1_NEXT, id="hv1-to-hv1"),
]
PROFILES = [pytest.param(HV0, id="hv0"), pytest.param(HV1, id="hv1")]


@pytest.mark.parametrize(("old", "new"), UPGRADES)
def test_the_happy_path(old: ModuleIdentity, new: ModuleIdentity) -> None:
    """A TD is built, runs, survives an update on its LP, moves, and is torn down; its key id is free again."""
    host = Host(old, up=False)
    assert host.call(0, L.TDH_SYS_INIT) == 0
    assert [host.call(lp, L.TDH_SYS_LP_INIT) for lp in range(4)] == [0] * 4
    assert host.rd(TDX_FEATURES0) & 1 << 1
    TDMR.write(host.memory, 0x2000)
    host.memory.write64(SCRATCH, 0x2000)
    assert host.call(0, L.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=32) == 0
    assert host.call(0, L.TDH_SYS_KEY_CONFIG) == 0
    while (result := host.result(0, L.TDH_SYS_TDMR_INIT, rcx=0)).out["rdx"] < 1 << 30:
        assert result.rax == 0
    assert host.call(0, L.TDH_SYS_TDMR_INIT, rcx=0) == TdxStatus.TDX_TDMR_ALREADY_INITIALIZED

    td = host.add_page(host.add_vcpu(host.new_td(hkid=33), lp=1))
    assert host.tdx.state.system.td_build_count == (1 if old.profile == "B" else 0)
    assert host.call(0, L.TDH_MR_FINALIZE, rcx=td.tdr) == 0
    assert host.tdx.state.system.td_build_count == 0
    tdvpr = td.vcpus[0]
    for _ in range(3):
        assert host.enter(1, tdvpr) == 0
        host.tdx.guest_step(1)
        assert host.tdx.td_exit(1, ExitReason.EXTERNAL_INTERRUPT).rax == 1
    counter = host.tdx.tds.vcpus[tdvpr].guest.counter
    assert counter == 3

    before = Snapshot(host)
    hv = host.rd(MODULE_HV)
    assert host.shutdown(hv | (1 << 16 if old.profile == "B" else 0)) == 0
    assert host.enter(1, tdvpr) == TdxStatus.TDX_SYS_SHUTDOWN
    gone, host.module = host.tdx, None
    assert host.enter(1, tdvpr) == VMFAILINVALID
    host.module = gone
    host.install(new)
    init_lps(host.tdx)
    assert host.rd(HANDOFF_DATA_VALID) == 1
    assert host.call(0, L.TDH_SYS_UPDATE) == 0
    assert host.rd(UPDATE_VERSION) == new.update
    assert_update_invariants(before, host)

    assert host.enter(1, tdvpr) == 0
    host.tdx.guest_step(1)
    assert host.tdx.td_exit(1, ExitReason.EXTERNAL_INTERRUPT).rax == 1
    assert host.tdx.tds.vcpus[tdvpr].guest.counter == counter + 1
    assert host.enter(2, tdvpr) == TdxStatus.TDX_VCPU_ASSOCIATED
    assert host.flush(1, tdvpr) == 0
    assert host.enter(2, tdvpr) == 0
    assert host.tdx.td_exit(2, ExitReason.EXTERNAL_INTERRUPT).rax == 1
    assert host.flush(1, tdvpr) == TdxStatus.TDX_VCPU_NOT_ASSOCIATED
    host.teardown(td)
    assert host.call(0, L.TDH_MNG_CREATE, rcx=td.tdr, rdx=33) == 0


def test_f1_an_lp_in_a_guest_holds_off_the_shutdown() -> None:
    """SHUTDOWN backs out while an LP is in a guest, the module goes on, and after the exit it succeeds."""
    host = Host()
    td = host.td(associate=(1,))
    assert host.enter(1, td.vcpus[0]) == 0
    assert host.shutdown() == TdxStatus.TDX_SYS_BUSY
    assert host.state == SysState.SYS_READY
    assert host.call(0, L.TDH_MNG_RD, rcx=td.tdr, rdx=0x9010_0002_0000_0001) == 0
    assert host.tdx.td_exit(1, ExitReason.EXTERNAL_INTERRUPT).rax == 1
    assert host.shutdown() == 0


def test_f2_a_td_in_build_can_hold_off_the_shutdown() -> None:
    """With bit 16 TDs in build are counted and the module stays ready; without it the count is handed over."""
    host = Host()
    first = host.add_vcpu(host.new_td(33))
    assert host.shutdown(0x10001) == 0x8000_0512_0001_0000
    second = host.add_vcpu(host.new_td(34))
    assert host.shutdown(0x10001) == 0x8000_0512_0002_0000
    assert host.state == SysState.SYS_READY
    assert host.call(0, L.TDH_MR_FINALIZE, rcx=first.tdr) == 0
    host.update(HV1_NEXT)
    assert host.tdx.state.system.td_build_count == 1
    assert host.call(0, L.TDH_MR_FINALIZE, rcx=second.tdr) == 0
    assert host.shutdown(0x10001) == 0


def test_f2_tearing_down_a_half_built_td_lets_updates_go_on() -> None:
    """VPFLUSHDONE takes an unfinished TD out of the count, and its interrupted migrations too."""
    host = Host()
    td = host.new_td()
    host.tdx.tds.tds[td.tdr].mig_interrupted_count = 2
    host.tdx.state.system.mig_interrupted_count = 3
    host.teardown(td)
    assert host.shutdown(0x10001) == 0x8000_0512_0001_0001


@pytest.mark.parametrize(
    ("identity", "rcx"), [(HV1, 0), (HV1, 2), (HV1, 0x20001), (HV1, 1 << 63 | 1), (HV0, 0x10000), (HV0, 1)]
)
def test_f3_f11_a_bad_handoff_version_is_an_operand_error(identity: ModuleIdentity, rcx: int) -> None:
    """Nothing changes, nothing is locked. On a module of handoff version 0 the avoid bit is such an error as well."""
    host = Host(identity)
    assert host.shutdown(rcx) == 0xC000_0100_0000_0001
    assert host.state == SysState.SYS_READY
    assert host.shutdown() == 0


def test_f4_an_update_waits_for_every_lp() -> None:
    """UPDATE before SYS.INIT, and with one LP missing, is a wrong state; once that LP is there it succeeds."""
    host = Host()
    host.shutdown()
    host.install(HV1_NEXT)
    assert host.call(0, L.TDH_SYS_UPDATE) == TdxStatus.TDX_SYS_STATE_INCORRECT
    host.call(0, L.TDH_SYS_INIT)
    for lp in (0, 1, 3):
        assert host.call(lp, L.TDH_SYS_LP_INIT) == 0
    assert host.call(0, L.TDH_SYS_UPDATE) == TdxStatus.TDX_SYS_STATE_INCORRECT
    assert host.call(2, L.TDH_SYS_LP_INIT) == 0
    assert host.call(0, L.TDH_SYS_UPDATE) == 0


def test_f5_a_cold_load_loses_all_tds() -> None:
    """Without a handoff UPDATE fails, SYS.CONFIG works, and a TD of old is first out of range, then no TD any more."""
    host = Host()
    td = host.td(associate=(1,))
    host.shutdown()
    host.install_cold(HV1_NEXT)
    init_lps(host.tdx)
    assert host.call(0, L.TDH_SYS_UPDATE) == TdxStatus.TDX_SYS_INVALID_HANDOFF
    TDMR.write(host.memory, 0x2000)
    host.memory.write64(SCRATCH, 0x2000)
    assert host.call(0, L.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=32) == 0
    assert host.call(0, L.TDH_SYS_KEY_CONFIG) == 0
    assert host.enter(1, td.vcpus[0]) == TdxStatus.TDX_OPERAND_ADDR_RANGE_ERROR | 1
    while host.result(0, L.TDH_SYS_TDMR_INIT, rcx=0).out["rdx"] < 1 << 30:
        pass
    assert host.enter(1, td.vcpus[0]) == TdxStatus.TDX_PAGE_METADATA_INCORRECT | 1
    assert (host.tdx.tds.tds, host.tdx.tds.vcpus, host.tdx.tds.pages) == ({}, {}, {})
    assert host.call(0, L.TDH_MNG_CREATE, rcx=td.tdr, rdx=td.hkid) == 0


def test_f6_a_downgrade_fails_and_yet_another_module_saves_the_tds() -> None:
    """Handoff 1 is too new for a module of version 0; it stays valid, and a module that understands it takes over."""
    host = Host(HV1)
    td = host.td(associate=(1,))
    host.run(1, td.vcpus[0], 3)
    before = Snapshot(host)
    assert host.shutdown(1) == 0
    host.install(HV0)
    init_lps(host.tdx)
    assert host.call(0, L.TDH_SYS_UPDATE) == TdxStatus.TDX_SYS_INVALID_HANDOFF
    assert host.rd(HANDOFF_DATA_VALID) == 1
    host.install(HV1_NEXT)
    init_lps(host.tdx)
    assert host.call(0, L.TDH_SYS_UPDATE) == 0
    assert_update_invariants(before, host)
    assert host.run(1, td.vcpus[0]).out["r12"] == 4


def test_f7_one_lp_with_another_tsc_adjust() -> None:
    """The LP is refused by MSR number and UPDATE by state; with the cause removed both succeed."""
    host = Host()
    host.shutdown()
    host.install(HV1_NEXT)
    host.hooks.adjust[3] = 0x1000
    host.call(0, L.TDH_SYS_INIT)
    assert [host.call(lp, L.TDH_SYS_LP_INIT) for lp in range(4)] == [0, 0, 0, 0xC000_0920_0000_003B]
    assert host.call(0, L.TDH_SYS_UPDATE) == TdxStatus.TDX_SYS_STATE_INCORRECT
    host.hooks.adjust.clear()
    assert host.call(3, L.TDH_SYS_LP_INIT) == 0
    assert host.call(0, L.TDH_SYS_UPDATE) == 0


@pytest.mark.parametrize(
    "params",
    [
        HandoffParams(2, 0, True, 13),
        HandoffParams(1, 0, False, 13),
        HandoffParams(1, 0, True, 12),
    ],
    ids=["other-version", "downgrade-allowed", "too-few-pages"],
)
def test_f8_signature_data_that_contradict_the_image(params: HandoffParams) -> None:
    """SYS.INIT fails and the module stays where it was; a stricter minimum is no contradiction."""
    host = Host()
    host.shutdown()
    host.install(HV1_NEXT, handoff_params=params)
    assert host.call(0, L.TDH_SYS_INIT) == TdxStatus.TDX_SYS_INCOMPATIBLE_SIGSTRUCT
    assert host.state == SysState.SYSINIT_PENDING
    assert host.call(0, L.TDH_SYS_LP_INIT) == TdxStatus.TDX_SYS_LP_INIT_NOT_PENDING
    host.install(HV1_NEXT, handoff_params=HandoffParams(1, 1, True, 20))
    assert host.call(0, L.TDH_SYS_INIT) == 0


def _mrtd_of_build(host: Host, *, new: ModuleIdentity | None, r9: int = 0) -> tuple[int, bytes]:
    """Build a TD, with an update before its last page; status of MR.FINALIZE and the measurement."""
    td = host.add_vcpu(host.new_td())
    td = host.add_page(td)
    if new is not None:
        host.update(new, version=1, r9=r9)
    td = host.add_page(td, gpa=0x1000)
    status = host.call(0, L.TDH_MR_FINALIZE, rcx=td.tdr)
    if status:
        assert host.call(0, L.TDH_MR_FINALIZE, rcx=td.tdr) == status
        host.teardown(td)
    return status, host.tdx.tds.tds[td.tdr].mrtd if not status else b""


def test_f9_detecting_an_update_during_a_td_build() -> None:
    """With another crypto library the measurement is silently wrong, unless UPDATE switched on FINALIZE's check."""
    other = msgspec.structs.replace(HV1_NEXT, crypto_version=2)
    expected = _mrtd_of_build(Host(), new=None)
    assert expected[0] == 0
    assert _mrtd_of_build(Host(), new=HV1_NEXT, r9=1 << 47) == expected
    status, mrtd = _mrtd_of_build(Host(), new=other)
    assert status == 0
    assert mrtd != expected[1]
    assert _mrtd_of_build(Host(), new=other, r9=1 << 47) == (TdxStatus.TDX_INCOMPATIBLE_MRTD_CONTEXT, b"")


def test_f10_bad_update_flags_can_be_corrected() -> None:
    """A flag that FEATURES0 does not have is refused in SYSINIT_DONE, and version 0 then succeeds."""
    host = Host()
    host.shutdown()
    host.install(HV1_NEXT)
    init_lps(host.tdx)
    assert host.call(0, L.TDH_SYS_UPDATE, 1, r9=1 << 62) == 0xC000_0100_0000_0009
    assert host.state == SysState.SYSINIT_DONE
    assert host.call(0, L.TDH_SYS_UPDATE) == 0


def _interleave(order: tuple[bool, ...], left: Steps, right: Steps) -> tuple[int, int]:
    """Advance two calls in the given order (True: the left one) to their statuses."""
    statuses: dict[bool, int] = {}
    for side in order:
        try:
            next(left if side else right)
        except StopIteration as end:
            statuses[side] = end.value.rax
    return statuses[True], statuses[False]


Steps = Generator[Point, None, Result]


def test_f12_every_interleaving_of_shutdown_and_another_call() -> None:
    """The handshake of busy flag and state leaves exactly four outcomes; SHUTDOWN never succeeds over a call inside."""
    outcomes: Counter[tuple[int, int]] = Counter()
    host = Host()
    td = host.td()
    snapshot = msgspec.msgpack.encode(host.tdx.state)
    for places in itertools.combinations(range(7), 4):
        order = tuple(step in places for step in range(7))
        host.tdx.state = msgspec.msgpack.decode(snapshot, type=type(host.tdx.state))
        shutdown = host.tdx.seamcall_steps(0, L.TDH_SYS_SHUTDOWN, Registers(rcx=1))
        read = host.tdx.seamcall_steps(1, L.TDH_MNG_RD, Registers(rcx=td.tdr, rdx=0x9010_0002_0000_0001))
        outcome = _interleave(order, shutdown, read)
        outcomes[outcome] += 1
        assert host.state == (SysState.SYS_SHUTDOWN if outcome[0] == 0 else SysState.SYS_READY)
        assert host.tdx.busy_lps() == 0
    assert set(outcomes) == {
        (0, TdxStatus.TDX_SYS_SHUTDOWN),
        (TdxStatus.TDX_SYS_BUSY, 0),
        (TdxStatus.TDX_SYS_BUSY, TdxStatus.TDX_SYS_SHUTDOWN),
        (0, 0),
    }
    assert sum(outcomes.values()) == 35


@pytest.mark.parametrize("identity", PROFILES)
def test_fifty_updates_in_a_row(identity: ModuleIdentity) -> None:
    """Two TDs run between 50 updates and move between LPs; no guest ever loses a unit of work, no key id, no page."""
    host = Host(identity)
    tds = [host.td(33, vcpus=2, associate=(0, 1)), host.td(34, associate=(2,))]
    homes = {tds[0].vcpus[0]: 0, tds[0].vcpus[1]: 1, tds[1].vcpus[0]: 2}
    copies = {tdvpr: GuestMemory() for tdvpr in homes}
    for update in range(1, 51):
        for tdvpr, home in homes.items():
            if update % 5 == 0:
                assert host.flush(home, tdvpr) == 0
                homes[tdvpr] = home = (home + 1) % 4
            copy = copies[tdvpr]
            for _ in range(update % 3 + 1):
                copy.unit()
            out = host.run(home, tdvpr, update % 3 + 1).out
            assert (out["r10"], out["r12"], out["r13"]) == (0, copy.counter, copy.chain_low)
        host.update(msgspec.structs.replace(identity, update=identity.update + update))
    assert host.rd(UPDATE_VERSION) == identity.update + 50
    assert copies[tds[0].vcpus[0]].counter == sum(update % 3 + 1 for update in range(1, 51))
    for td in tds:
        host.teardown(td)
    assert not host.tdx.tds.tds
    assert set(host.tdx.state.system.kot) == {32}


def test_an_update_may_come_in_the_middle_of_everything() -> None:
    """A TD half keyed, one blocked with half its caches written back, one in teardown: all go on afterwards."""
    host = Host(HV1, lps=4, pkgs=2)
    tdr = next(host.pages)
    assert host.call(0, L.TDH_MNG_CREATE, rcx=tdr, rdx=40) == 0
    assert host.call(0, L.TDH_MNG_KEY_CONFIG, rcx=tdr) == 0
    blocked = host.td(41)
    assert host.call(0, L.TDH_MNG_VPFLUSHDONE, rcx=blocked.tdr) == 0
    assert host.call(0, L.TDH_PHYMEM_CACHE_WB) == 0
    host.update(HV1_NEXT)
    assert host.call(0, L.TDH_MNG_KEY_CONFIG, rcx=tdr) == TdxStatus.TDX_KEY_CONFIGURED
    assert host.call(2, L.TDH_MNG_KEY_CONFIG, rcx=tdr) == 0
    assert host.tdx.tds.tds[tdr].lifecycle == LifeCycle.TD_KEYS_CONFIGURED
    assert host.call(0, L.TDH_MNG_KEY_FREEID, rcx=blocked.tdr) == TdxStatus.TDX_WBCACHE_NOT_COMPLETE
    assert host.call(3, L.TDH_PHYMEM_CACHE_WB) == 0
    assert host.call(0, L.TDH_MNG_KEY_FREEID, rcx=blocked.tdr) == 0
    host.update(HV1)
    assert host.call(0, L.TDH_PHYMEM_PAGE_RECLAIM, rcx=blocked.tdcx[0]) == 0


def test_a_partly_initialized_tdmr_goes_on_after_an_update() -> None:
    """The progress of TDMR.INIT is handed over."""
    host = Host(HV1, up=False)
    init_lps(host.tdx)
    TDMR.write(host.memory, 0x2000)
    host.memory.write64(SCRATCH, 0x2000)
    host.call(0, L.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=32)
    host.call(0, L.TDH_SYS_KEY_CONFIG)
    for _ in range(100):
        assert host.result(0, L.TDH_SYS_TDMR_INIT, rcx=0) == Result(0, {"rdx": 0})
    host.update(HV1_NEXT)
    for _ in range(155):
        assert host.result(0, L.TDH_SYS_TDMR_INIT, rcx=0).out["rdx"] == 0
    assert host.result(0, L.TDH_SYS_TDMR_INIT, rcx=0).out["rdx"] == 1 << 30


def test_association_and_vmcs_host_state_over_an_update() -> None:
    """The association outlives the module; the first entry under the next one rewrites the VMCS host state."""
    host = Host()
    td = host.td(associate=(1,))
    vcpu = host.tdx.tds.vcpus[td.vcpus[0]]
    host.run(1, vcpu.tdvpr)
    assert (vcpu.assoc_lpid, vcpu.host_state_stale, vcpu.last_seamdb_index) == (1, False, 1)
    host.update(HV1_NEXT)
    assert vcpu.last_seamdb_index == 1
    assert host.call(1, L.TDH_VP_RD, rcx=vcpu.tdvpr, rdx=0xA020_0002_0000_0004) == 0
    assert (vcpu.assoc_lpid, vcpu.host_state_stale, vcpu.last_seamdb_index) == (1, True, 2)
    host.run(1, vcpu.tdvpr)
    assert not vcpu.host_state_stale
    assert host.flush(1, vcpu.tdvpr) == 0
    assert vcpu.assoc_lpid == NO_LP
