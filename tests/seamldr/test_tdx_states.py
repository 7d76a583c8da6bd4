"""The system state machine: what every leaf answers in every state."""

from __future__ import annotations

import pytest
from tdx_bench import HV0, HV1, HV1_NEXT, PAMT, SCRATCH, TDMR, Host

from seamldr.tdx_boot import init_lps, must
from seamldr.tdx_leaves import BEFORE_READY, TdhLeaf
from seamldr.tdx_metadata import MODULE_HV
from seamldr.tdx_module import HANDLERS, ModuleDead, Registers, TdxModule
from seamldr.tdx_state import SysState
from seamldr.tdx_status import STATUS_MASK, TdxStatus

P, D, C, R, S = SysState

OK = TdxStatus.TDX_SUCCESS
NOT_READY = TdxStatus.TDX_SYS_NOT_READY
SHUT = TdxStatus.TDX_SYS_SHUTDOWN

# Leaf, argument registers, then status and state after it, started in P, D (every LP done), C, R, S.
TABLE: list[tuple[TdhLeaf, dict[str, int], list[tuple[TdxStatus, SysState]]]] = [
    (
        TdhLeaf.TDH_SYS_INIT,
        {},
        [(OK, D), *((TdxStatus.TDX_SYS_INIT_NOT_PENDING, state) for state in (D, C, R)), (SHUT, S)],
    ),
    (
        TdhLeaf.TDH_SYS_LP_INIT,
        {},
        [
            (TdxStatus.TDX_SYS_LP_INIT_NOT_PENDING, P),
            (TdxStatus.TDX_SYS_LP_INIT_DONE, D),
            (TdxStatus.TDX_SYS_LP_INIT_NOT_PENDING, C),
            (TdxStatus.TDX_SYS_LP_INIT_NOT_PENDING, R),
            (SHUT, S),
        ],
    ),
    (
        TdhLeaf.TDH_SYS_CONFIG,
        {"rcx": SCRATCH, "rdx": 1, "r8": 32},
        [
            (TdxStatus.TDX_SYS_CONFIG_NOT_PENDING, P),
            (OK, C),
            (TdxStatus.TDX_SYS_CONFIG_NOT_PENDING, C),
            (TdxStatus.TDX_SYS_CONFIG_NOT_PENDING, R),
            (SHUT, S),
        ],
    ),
    (
        TdhLeaf.TDH_SYS_KEY_CONFIG,
        {},
        [
            (TdxStatus.TDX_SYS_KEY_CONFIG_NOT_PENDING, P),
            (TdxStatus.TDX_SYS_KEY_CONFIG_NOT_PENDING, D),
            (OK, R),
            (TdxStatus.TDX_SYS_KEY_CONFIG_NOT_PENDING, R),
            (SHUT, S),
        ],
    ),
    (
        TdhLeaf.TDH_SYS_UPDATE,
        {},
        [
            (TdxStatus.TDX_SYS_STATE_INCORRECT, P),
            (TdxStatus.TDX_SYS_INVALID_HANDOFF, D),
            (TdxStatus.TDX_SYS_STATE_INCORRECT, C),
            (TdxStatus.TDX_SYS_STATE_INCORRECT, R),
            (SHUT, S),
        ],
    ),
    (
        TdhLeaf.TDH_SYS_TDMR_INIT,
        {"rcx": 0},
        [(NOT_READY, P), (NOT_READY, D), (NOT_READY, C), (OK, R), (SHUT, S)],
    ),
    (
        TdhLeaf.TDH_SYS_SHUTDOWN,
        {"rcx": 1},
        [(NOT_READY, P), (NOT_READY, D), (NOT_READY, C), (OK, S), (SHUT, S)],
    ),
    (
        TdhLeaf.TDH_SYS_INFO,
        {"rcx": 0x4000, "rdx": 1024, "r8": 0x5000, "r9": 32},
        [(TdxStatus.TDX_SYS_LP_INIT_NOT_DONE, P), (OK, D), (OK, C), (OK, R), (SHUT, S)],
    ),
    (
        TdhLeaf.TDH_SYS_RD,
        {"rdx": MODULE_HV},
        [(TdxStatus.TDX_SYS_LP_INIT_NOT_DONE, P), (OK, D), (OK, C), (OK, R), (SHUT, S)],
    ),
    (
        TdhLeaf.TDH_SYS_RDALL,
        {"rdx": 0x4000, "r8": 0xFFFF_FFFF_FFFF_FFFF},
        [(TdxStatus.TDX_SYS_LP_INIT_NOT_DONE, P), (OK, D), (OK, C), (OK, R), (SHUT, S)],
    ),
    (TdhLeaf.TDH_SYS_LP_SHUTDOWN, {}, [(OK, P), (OK, D), (OK, C), (OK, R), (OK, S)]),
]

CASES = [
    pytest.param(leaf, registers, state, status, after, id=f"row-{leaf.name}_{state.name}")
    for leaf, registers, outcomes in TABLE
    for state, (status, after) in zip(SysState, outcomes, strict=True)
]

OTHER_LEAVES = [leaf for leaf in HANDLERS if leaf not in BEFORE_READY and leaf != TdhLeaf.TDH_SYS_TDMR_INIT]


def host_in(state: SysState) -> Host:
    """A host whose cold module of handoff version 1 has come just so far; TDMRs are not initialised."""
    host = Host(HV1, up=False)
    info_pa = SCRATCH + 0x1000
    TDMR.write(host.memory, info_pa)
    host.memory.write64(SCRATCH, info_pa)
    if state >= D:
        init_lps(host.tdx)
    if state >= C:
        must(host.tdx, 0, TdhLeaf.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=32)
    if state >= R:
        must(host.tdx, 0, TdhLeaf.TDH_SYS_KEY_CONFIG)
    if state == S:
        must(host.tdx, 0, TdhLeaf.TDH_SYS_SHUTDOWN, rcx=1)
    assert host.state == state
    return host


@pytest.mark.conformance("TDX module states")
@pytest.mark.parametrize(("leaf", "registers", "state", "status", "after"), CASES)
def test_a_system_leaf_answers_by_state(
    leaf: TdhLeaf, registers: dict[str, int], state: SysState, status: TdxStatus, after: SysState
) -> None:
    """Each SYS leaf succeeds only in its state, moves it as documented, and elsewhere names what is wrong."""
    host = host_in(state)
    assert host.call(0, leaf, **registers) == status
    assert host.state == after


@pytest.mark.conformance("TDX module states")
@pytest.mark.parametrize("state", SysState, ids=lambda state: f"row-other_{state.name}")
def test_all_other_leaves_need_a_ready_system(state: SysState) -> None:
    """A TD leaf reaches its handler in SYS_READY only."""
    host = host_in(state)
    expected = {S: SHUT, R: None}.get(state, NOT_READY)
    for leaf in OTHER_LEAVES:
        status = host.call(1, leaf, rcx=0x123)
        if expected is None:
            assert status & STATUS_MASK not in (NOT_READY, SHUT)
        else:
            assert status == expected, leaf.name
        assert host.state == state


def test_an_initialized_lp_may_read_metadata_before_the_others_are() -> None:
    """In SYSINIT_DONE it is the caller's own LP.INIT that counts."""
    host = Host(HV1, up=False)
    assert host.call(0, TdhLeaf.TDH_SYS_INIT) == 0
    assert host.call(2, TdhLeaf.TDH_SYS_LP_INIT) == 0
    assert host.call(2, TdhLeaf.TDH_SYS_RD, rdx=MODULE_HV) == 0
    assert host.call(1, TdhLeaf.TDH_SYS_RD, rdx=MODULE_HV) == TdxStatus.TDX_SYS_LP_INIT_NOT_DONE


def test_the_last_package_makes_the_system_ready() -> None:
    """SYS.KEY.CONFIG has to run once on each package."""
    host = Host(HV1, lps=4, pkgs=2, up=False)
    init_lps(host.tdx)
    TDMR.write(host.memory, 0x2000)
    host.memory.write64(SCRATCH, 0x2000)
    assert host.call(0, TdhLeaf.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=32) == 0
    assert host.call(1, TdhLeaf.TDH_SYS_KEY_CONFIG) == 0
    assert host.state == C
    assert host.call(3, TdhLeaf.TDH_SYS_KEY_CONFIG) == 0
    assert host.state == R


@pytest.mark.parametrize(
    ("leaf", "status"),
    [
        (TdhLeaf.TDH_SYS_INIT, TdxStatus.TDX_RND_NO_ENTROPY),
        (TdhLeaf.TDH_SYS_LP_INIT, TdxStatus.TDX_RND_NO_ENTROPY),
        (TdhLeaf.TDH_SYS_KEY_CONFIG, TdxStatus.TDX_KEY_GENERATION_FAILED),
    ],
)
def test_a_dry_random_number_generator_changes_nothing(leaf: TdhLeaf, status: TdxStatus) -> None:
    """After an entropy failure the same call may simply be made again."""
    host = host_in({TdhLeaf.TDH_SYS_INIT: P, TdhLeaf.TDH_SYS_LP_INIT: P}.get(leaf, C))
    if leaf == TdhLeaf.TDH_SYS_LP_INIT:
        assert host.call(0, TdhLeaf.TDH_SYS_INIT) == 0
    host.hooks.dry = True
    state = host.state
    assert host.call(0, leaf) == status
    assert host.state == state
    host.hooks.dry = False
    assert host.call(0, leaf) == 0


def test_a_busy_key_engine_is_an_operand() -> None:
    """SYS.KEY.CONFIG names the key table as what is busy."""
    host = host_in(C)
    host.hooks.engine_busy = True
    assert host.call(0, TdhLeaf.TDH_SYS_KEY_CONFIG) == 0x8000_0200_0000_00BB
    host.hooks.engine_busy = False
    assert host.call(0, TdhLeaf.TDH_SYS_KEY_CONFIG) == 0


def test_lps_have_to_look_alike() -> None:
    """An LP whose CPUID or SEAM capabilities differ from those of SYS.INIT is not taken, and may try again."""
    host = Host(HV0, up=False)
    assert host.call(0, TdhLeaf.TDH_SYS_INIT) == 0
    host.hooks.fms[1] = 0xC06F1
    host.hooks.capabilities[2] = 0
    result = host.result(1, TdhLeaf.TDH_SYS_LP_INIT)
    assert result.rax == TdxStatus.TDX_INCONSISTENT_CPUID_FIELD
    assert result.out["rdx"] == 0xC06F1 ^ 0xC06F2
    assert host.call(2, TdhLeaf.TDH_SYS_LP_INIT) == TdxStatus.TDX_INCOMPATIBLE_SEAM_CAPABILITIES
    host.hooks.fms.clear()
    assert host.call(1, TdhLeaf.TDH_SYS_LP_INIT) == 0


def _tdmr_words(**changes: int) -> list[int]:
    words = [0, 1 << 30, PAMT, 0x1000, PAMT + 0x1000, 0x2000, PAMT + 0x3000, 0x40_0000]
    words += [0, 0x70_0000, 0x100_0000, (1 << 30) - 0x100_0000]
    for name, value in changes.items():
        words[int(name[1:])] = value
    return words


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, TdxStatus.TDX_SUCCESS),
        ({"w0": 0x1000}, TdxStatus.TDX_INVALID_TDMR),
        ({"w1": 0}, TdxStatus.TDX_INVALID_TDMR),
        ({"w11": 0}, TdxStatus.TDX_TDMR_OUTSIDE_CMRS),
        ({"w3": 0}, TdxStatus.TDX_INVALID_PAMT),
        ({"w6": PAMT + 0x3001}, TdxStatus.TDX_INVALID_PAMT),
        ({"w2": 1 << 35}, TdxStatus.TDX_PAMT_OUTSIDE_CMRS),
        ({"w4": PAMT}, TdxStatus.TDX_PAMT_OVERLAP),
        ({"w2": 0x80_0000}, TdxStatus.TDX_PAMT_OVERLAP),
        ({"w9": 0x70_0001}, TdxStatus.TDX_INVALID_RESERVED_IN_TDMR),
        ({"w11": 1 << 30}, TdxStatus.TDX_INVALID_RESERVED_IN_TDMR),
        ({"w10": 0x1000, "w11": 0x1000}, TdxStatus.TDX_NON_ORDERED_RESERVED_IN_TDMR),
    ],
)
def test_sys_config_checks_each_tdmr(changes: dict[str, int], status: TdxStatus) -> None:
    """A TDMR_INFO that does not fit memory or itself is refused under its own name, and nothing is configured."""
    host = host_in(D)
    host.memory.write(0x2000, b"".join(word.to_bytes(8, "little") for word in _tdmr_words(**changes)))
    assert host.call(0, TdhLeaf.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=1, r8=32) == status
    assert host.state == (C if status == 0 else D)


def test_tdmrs_are_given_in_order() -> None:
    """The same region twice is out of order; the index of the second is in the details."""
    host = host_in(D)
    host.memory.write64(SCRATCH + 8, 0x2000)
    assert host.call(0, TdhLeaf.TDH_SYS_CONFIG, rcx=SCRATCH, rdx=2, r8=32) == TdxStatus.TDX_NON_ORDERED_TDMR | 1


def test_a_buffer_must_be_shared_memory_outside_the_seam_range() -> None:
    """SYS.CONFIG takes neither a private key id in the address nor SEAM memory."""
    host = host_in(D)
    for rcx in (SCRATCH + 8, SCRATCH | 32 << 40, 0x10_0000, 1 << 46):
        assert host.call(0, TdhLeaf.TDH_SYS_CONFIG, rcx=rcx, rdx=1, r8=32) == 0xC000_0100_0000_0001
    assert host.call(0, TdhLeaf.TDH_SYS_CONFIG, rcx=SCRATCH | 31 << 40, rdx=1, r8=32) == 0


def test_a_dead_module_stays_dead() -> None:
    """After a failed assertion every call ends in ModuleDead, also after the state was saved and loaded."""
    host = Host(HV1)
    host.tdx.die()
    with pytest.raises(ModuleDead):
        host.call(0, TdhLeaf.TDH_SYS_LP_SHUTDOWN)
    again = TdxModule(HV1_NEXT, host.platform, host.memory, host.tdx.state, host.tdx.tds)
    with pytest.raises(ModuleDead):
        again.seamcall(0, TdhLeaf.TDH_SYS_LP_SHUTDOWN, Registers())
