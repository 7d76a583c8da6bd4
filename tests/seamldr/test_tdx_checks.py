"""The checks that the leaves of the TDX module make, as tables: pages, states, locks, versions, handoff versions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import msgspec
import pytest
from tdx_bench import HANDOFF, HV0, HV1, HV1_NEXT, SCRATCH, TDMR, Host

from seamldr.identity import ModuleIdentity
from seamldr.tdx_boot import TdHandle, init_lps, must
from seamldr.tdx_call import Hooks
from seamldr.tdx_call import Registers as ModuleRegisters
from seamldr.tdx_handoff import HandoffHeader, write_header
from seamldr.tdx_leaves import TdhLeaf as L
from seamldr.tdx_locks import Lock
from seamldr.tdx_module import HANDLERS, TdxModule
from seamldr.tdx_platform import ModulePlatform
from seamldr.tdx_state import LifeCycle, OpState, SysState
from seamldr.tdx_status import TdxStatus

RCX, RDX, R8, TDR, OP_STATE = 1, 2, 8, 128, 172
OPERAND = {"rcx": RCX, "rdx": RDX, "r8": R8}
GPA = 0x40_0000

Registers = dict[str, int]
Case = Callable[[], tuple[Host, TdHandle, Registers]]


# A host and the registers with which a leaf succeeds


def keyed() -> tuple[Host, TdHandle]:
    """A TD with its keys and without control pages."""
    host = Host()
    tdr = next(host.pages)
    must(host.tdx, 0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33)
    must(host.tdx, 0, L.TDH_MNG_KEY_CONFIG, rcx=tdr)
    return host, TdHandle(33, tdr, (), (), (), ())


def created() -> tuple[Host, TdHandle, int]:
    """A TD in build with one vCPU, and the TDVPR of a second that has all its pages."""
    host = Host()
    td = host.add_vcpu(host.new_td())
    tdvpr = next(host.pages)
    must(host.tdx, 0, L.TDH_VP_CREATE, rcx=tdvpr, rdx=td.tdr)
    for _ in range(5):
        must(host.tdx, 0, L.TDH_VP_ADDCX, rcx=next(host.pages), rdx=tdvpr)
    return host, td, tdvpr


def add_control_page() -> tuple[Host, TdHandle, Registers]:
    host, td = keyed()
    return host, td, {"rcx": next(host.pages), "rdx": td.tdr}


def mng_init() -> tuple[Host, TdHandle, Registers]:
    host, td = keyed()
    for _ in range(6):
        must(host.tdx, 0, L.TDH_MNG_ADDCX, rcx=next(host.pages), rdx=td.tdr)
    host.new_td(40)  # leaves TD_PARAMS in the scratch page
    return host, td, {"rcx": td.tdr, "rdx": SCRATCH}


def in_build(**registers: str | int) -> Case:
    """A leaf for a TD in build; names stand for its pages."""

    def case() -> tuple[Host, TdHandle, Registers]:
        host, td, tdvpr = created()
        td = host.add_page(td)
        names = {"tdr": td.tdr, "new": tdvpr, "free": next(host.pages), "vcpu": td.vcpus[0]}
        return host, td, {name: names[v] if isinstance(v, str) else v for name, v in registers.items()}

    return case


def runnable(**registers: str | int) -> Case:
    """A leaf for a TD that can run, with a page at GPA 0 and one that is blocked and tracked at GPA."""

    def case() -> tuple[Host, TdHandle, Registers]:
        host = Host()
        td = host.td(associate=(0,))
        where = {"rcx": GPA, "rdx": td.tdr}
        must(host.tdx, 0, L.TDH_MEM_PAGE_AUG, **where, r8=next(host.pages))
        must(host.tdx, 0, L.TDH_MEM_RANGE_BLOCK, **where)
        must(host.tdx, 0, L.TDH_MEM_TRACK, rcx=td.tdr)
        names = {"tdr": td.tdr, "free": next(host.pages), "vcpu": td.vcpus[0]}
        return host, td, {name: names[v] if isinstance(v, str) else v for name, v in registers.items()}

    return case


def create() -> tuple[Host, TdHandle, Registers]:
    host, td = keyed()
    return host, td, {"rcx": next(host.pages), "rdx": 40}


def key_config() -> tuple[Host, TdHandle, Registers]:
    host = Host()
    tdr = next(host.pages)
    must(host.tdx, 0, L.TDH_MNG_CREATE, rcx=tdr, rdx=33)
    return host, TdHandle(33, tdr, (), (), (), ()), {"rcx": tdr}


def vpflushdone() -> tuple[Host, TdHandle, Registers]:
    host = Host()
    td = host.td()
    return host, td, {"rcx": td.tdr}


def freeid() -> tuple[Host, TdHandle, Registers]:
    host, td, registers = vpflushdone()
    must(host.tdx, 0, L.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)
    must(host.tdx, 0, L.TDH_PHYMEM_CACHE_WB)
    return host, td, registers


CASES: dict[L, Case] = {
    L.TDH_MNG_CREATE: create,
    L.TDH_MNG_KEY_CONFIG: key_config,
    L.TDH_MNG_ADDCX: add_control_page,
    L.TDH_MNG_INIT: mng_init,
    L.TDH_VP_CREATE: in_build(rcx="free", rdx="tdr"),
    L.TDH_VP_ADDCX: in_build(rcx="free", rdx="new"),
    L.TDH_VP_INIT: in_build(rcx="new"),
    L.TDH_MEM_SEPT_ADD: in_build(rcx=1, rdx="tdr", r8="free"),
    L.TDH_MEM_PAGE_ADD: in_build(rcx=GPA, rdx="tdr", r8="free", r9=SCRATCH),
    L.TDH_MR_EXTEND: in_build(rcx=0, rdx="tdr"),
    L.TDH_MR_FINALIZE: in_build(rcx="tdr"),
    L.TDH_MEM_PAGE_AUG: runnable(rcx=0x1000, rdx="tdr", r8="free"),
    L.TDH_MEM_RANGE_BLOCK: runnable(rcx=0, rdx="tdr"),
    L.TDH_MEM_RANGE_UNBLOCK: runnable(rcx=GPA, rdx="tdr"),
    L.TDH_MEM_PAGE_REMOVE: runnable(rcx=GPA, rdx="tdr"),
    L.TDH_MEM_TRACK: runnable(rcx="tdr"),
    L.TDH_MNG_RD: runnable(rcx="tdr", rdx=0x9010_0002_0000_0004),
    L.TDH_VP_RD: runnable(rcx="vcpu", rdx=0xA020_0002_0000_0002),
    L.TDH_VP_WR: runnable(rcx="vcpu", rdx=0x2020_0000_0000_000B),
    L.TDH_VP_ENTER: runnable(rcx="vcpu"),
    L.TDH_VP_FLUSH: runnable(rcx="vcpu"),
    L.TDH_MNG_VPFLUSHDONE: vpflushdone,
    L.TDH_MNG_KEY_FREEID: freeid,
}


@pytest.mark.parametrize("leaf", CASES, ids=lambda leaf: leaf.name)
def test_every_case_below_succeeds_if_nothing_is_wrong(leaf: L) -> None:
    """So that what the tables change is what the status tells of."""
    host, _, registers = CASES[leaf]()
    assert host.call(0, leaf, **registers) == 0


# Page operands


PAGES: list[tuple[L, str, str]] = [
    (leaf, register, kind)
    for leaf, registers in {
        L.TDH_MNG_CREATE: {"rcx": "free"},
        L.TDH_MNG_KEY_CONFIG: {"rcx": "tdr"},
        L.TDH_MNG_ADDCX: {"rdx": "tdr", "rcx": "free"},
        L.TDH_MNG_INIT: {"rcx": "tdr"},
        L.TDH_VP_CREATE: {"rdx": "tdr", "rcx": "free"},
        L.TDH_VP_ADDCX: {"rdx": "tdvpr", "rcx": "free"},
        L.TDH_VP_INIT: {"rcx": "tdvpr"},
        L.TDH_MEM_SEPT_ADD: {"rdx": "tdr", "r8": "free"},
        L.TDH_MEM_PAGE_ADD: {"rdx": "tdr", "r8": "free"},
        L.TDH_MEM_PAGE_AUG: {"rdx": "tdr", "r8": "free"},
        L.TDH_MEM_RANGE_BLOCK: {"rdx": "tdr"},
        L.TDH_MEM_RANGE_UNBLOCK: {"rdx": "tdr"},
        L.TDH_MEM_PAGE_REMOVE: {"rdx": "tdr"},
        L.TDH_MEM_TRACK: {"rcx": "tdr"},
        L.TDH_MR_EXTEND: {"rdx": "tdr"},
        L.TDH_MR_FINALIZE: {"rcx": "tdr"},
        L.TDH_MNG_RD: {"rcx": "tdr"},
        L.TDH_VP_RD: {"rcx": "tdvpr"},
        L.TDH_VP_WR: {"rcx": "tdvpr"},
        L.TDH_VP_ENTER: {"rcx": "tdvpr"},
        L.TDH_VP_FLUSH: {"rcx": "tdvpr"},
        L.TDH_MNG_VPFLUSHDONE: {"rcx": "tdr"},
        L.TDH_MNG_KEY_FREEID: {"rcx": "tdr"},
    }.items()
    for register, kind in registers.items()
]


@pytest.mark.parametrize(("leaf", "register", "kind"), PAGES, ids=lambda value: getattr(value, "name", value))
def test_a_page_operand_is_checked_in_four_steps(leaf: L, register: str, kind: str) -> None:
    """Address, range, lock, type: each has its status, with the operand that is at fault; nothing changes."""
    host, _, registers = CASES[leaf]()
    page, operand = registers[register], OPERAND[register]
    other, free = host.new_td(41), next(host.pages)
    before = msgspec.msgpack.encode((host.tdx.state, host.tdx.tds))

    def call(value: int) -> int:
        return host.call(0, leaf, **{**registers, register: value})

    for bad in (page + 8, page | 33 << 40, page | 1 << 47):
        assert call(bad) == TdxStatus.TDX_OPERAND_INVALID | operand
    assert call(1 << 32) == TdxStatus.TDX_OPERAND_ADDR_RANGE_ERROR | operand
    held = host.tdx.page_lock(page)
    assert held.try_exclusive(3)
    assert call(page) == TdxStatus.TDX_OPERAND_BUSY | operand
    held.release(3)
    pages = {"free": free, "tdr": other.tdr, "tdcx": other.tdcx[0]}
    for wrong in (pa for name, pa in pages.items() if name != kind):
        assert call(wrong) == TdxStatus.TDX_PAGE_METADATA_INCORRECT | operand
    assert msgspec.msgpack.encode((host.tdx.state, host.tdx.tds)) == before
    assert call(page) == 0


# State of the TD


BUILD_STATE = [leaf for leaf in CASES if leaf not in (
    L.TDH_MNG_CREATE, L.TDH_MNG_KEY_CONFIG, L.TDH_MNG_ADDCX, L.TDH_MNG_VPFLUSHDONE, L.TDH_MNG_KEY_FREEID,
    L.TDH_VP_FLUSH,
)]  # fmt: skip


@pytest.mark.parametrize("leaf", BUILD_STATE, ids=lambda leaf: leaf.name)
def test_the_build_state_of_a_td_is_checked_in_order(leaf: L) -> None:
    """Fatal before keys, keys before control pages, control pages before OP_STATE."""
    host, handle, registers = CASES[leaf]()
    td = host.tdx.tds.tds[handle.tdr]
    wrong_state = OpState.FAILED_IMPORT if leaf not in (L.TDH_MNG_RD, L.TDH_VP_RD, L.TDH_VP_WR) else OpState(0)
    op_state, td.op_state = td.op_state, wrong_state
    for attribute, wrong, status in (
        ("num_tdcx", 5, TdxStatus.TDX_TDCS_NOT_ALLOCATED),
        ("lifecycle", LifeCycle.TD_HKID_ASSIGNED, TdxStatus.TDX_TD_KEYS_NOT_CONFIGURED),
        ("fatal", True, TdxStatus.TDX_TD_FATAL),
    ):
        right = getattr(td, attribute)
        setattr(td, attribute, wrong)
        assert host.call(0, leaf, **registers) == status
        setattr(td, attribute, right)
    assert host.call(0, leaf, **registers) == TdxStatus.TDX_OP_STATE_INCORRECT
    td.op_state = op_state
    assert host.call(0, leaf, **registers) == 0


ALLOWED: dict[L, set[int]] = {
    L.TDH_MNG_INIT: {0},
    L.TDH_MEM_PAGE_ADD: {1},
    L.TDH_MR_EXTEND: {1},
    L.TDH_MR_FINALIZE: {1},
    L.TDH_VP_INIT: {1},
    L.TDH_VP_CREATE: {1, 7},
    L.TDH_VP_ADDCX: {1, 7},
    L.TDH_MEM_SEPT_ADD: {1, 2, 3, 6, 7, 8, 9},
    L.TDH_MEM_PAGE_AUG: {1, 2, 3, 9},
    L.TDH_MEM_RANGE_BLOCK: {1, 2, 3, 4, 5, 8, 9},
    L.TDH_MEM_RANGE_UNBLOCK: {1, 2, 3, 4, 5, 8, 9},
    L.TDH_VP_ENTER: {2, 3, 9},
    L.TDH_MEM_TRACK: set(range(1, 10)),
    L.TDH_MNG_RD: set(range(1, 11)),
    L.TDH_VP_RD: set(range(1, 11)),
    L.TDH_VP_WR: {1, 2, 3, 6, 7, 8, 9, 10},
    L.TDH_VP_FLUSH: set(range(11)),
}


@pytest.mark.parametrize("leaf", ALLOWED, ids=lambda leaf: leaf.name)
def test_which_states_of_a_td_allow_a_leaf(leaf: L) -> None:
    """In all eleven states: allowed, or TDX_OP_STATE_INCORRECT."""
    found = set()
    for state in OpState:
        host, td, registers = CASES[leaf]()
        host.tdx.tds.tds[td.tdr].op_state = state
        status = host.call(0, leaf, **registers)
        assert status in (0, TdxStatus.TDX_OP_STATE_INCORRECT)
        if status == 0:
            found.add(int(state))
    assert found == ALLOWED[leaf]


def test_a_tdcx_page_beyond_the_minimum_is_added_before_init_only() -> None:
    """MNG.ADDCX: any state up to the minimum, UNINITIALIZED for one more page."""
    host, td, registers = mng_init()
    for state in OpState:
        host.tdx.tds.tds[td.tdr].op_state = state
        expected = 0 if state == OpState.UNINITIALIZED else TdxStatus.TDX_OP_STATE_INCORRECT
        assert host.call(0, L.TDH_MNG_ADDCX, rcx=next(host.pages), rdx=registers["rcx"]) == expected


@pytest.mark.parametrize("leaf", [L.TDH_VP_INIT, L.TDH_VP_ENTER, L.TDH_VP_RD, L.TDH_VP_WR, L.TDH_VP_FLUSH])
def test_a_vcpu_needs_all_its_pages(leaf: L) -> None:
    """With one TDCX page less than five, TDX_TDCX_NUM_INCORRECT."""
    host, _, registers = CASES[leaf]()
    host.tdx.tds.vcpus[registers["rcx"]].num_tdcx = 4
    assert host.call(0, leaf, **registers) == TdxStatus.TDX_TDCX_NUM_INCORRECT


# Locks


LOCKS: dict[L, tuple[str, str, str]] = {
    L.TDH_MNG_KEY_CONFIG: ("exclusive", "", ""),
    L.TDH_MNG_ADDCX: ("exclusive", "", ""),
    L.TDH_MNG_INIT: ("exclusive", "", ""),
    L.TDH_MR_EXTEND: ("exclusive", "", ""),
    L.TDH_MR_FINALIZE: ("exclusive", "", ""),
    L.TDH_MEM_PAGE_ADD: ("exclusive", "", ""),
    L.TDH_MNG_VPFLUSHDONE: ("exclusive", "", ""),
    L.TDH_MNG_KEY_FREEID: ("exclusive", "", ""),
    L.TDH_VP_CREATE: ("shared", "", "shared"),
    L.TDH_VP_ADDCX: ("implicit", "exclusive", "shared"),
    L.TDH_VP_INIT: ("implicit", "exclusive", "shared"),
    L.TDH_VP_ENTER: ("implicit", "shared", "shared"),
    L.TDH_VP_FLUSH: ("implicit", "exclusive", ""),
    L.TDH_VP_RD: ("implicit", "shared", "shared"),
    L.TDH_VP_WR: ("implicit", "shared", "shared"),
    L.TDH_MNG_RD: ("shared", "", "shared"),
    L.TDH_MEM_SEPT_ADD: ("shared", "", "shared"),
    L.TDH_MEM_PAGE_AUG: ("shared", "", "shared"),
    L.TDH_MEM_TRACK: ("shared", "", "shared"),
}
"""How a leaf takes the locks of TDR, TDVPR and OP_STATE; implicit is shared, with an operand id of its own."""


@pytest.mark.parametrize("leaf", LOCKS, ids=lambda leaf: leaf.name)
def test_what_a_leaf_locks(leaf: L) -> None:
    """Held by another LP, shared or exclusively, each lock makes the leaf busy just as the table says, by its id."""
    tdr_mode, tdvpr_mode, op_state_mode = LOCKS[leaf]

    def status(pick: Callable[[Host, TdHandle, Registers], Lock], exclusive: bool) -> int:
        host, td, registers = CASES[leaf]()
        lock = pick(host, td, registers)
        assert lock.try_exclusive(3) if exclusive else lock.try_shared(3)
        return host.call(0, leaf, **registers)

    def tdr(host: Host, td: TdHandle, _: Registers) -> Lock:
        return host.tdx.tds.tds[td.tdr].page_lock

    def op_state(host: Host, td: TdHandle, _: Registers) -> Lock:
        return host.tdx.tds.tds[td.tdr].op_state_lock

    operand = TDR if tdr_mode == "implicit" else OPERAND[_register_of_td(leaf)]
    assert status(tdr, True) == TdxStatus.TDX_OPERAND_BUSY | operand
    assert status(tdr, False) == (TdxStatus.TDX_OPERAND_BUSY | operand if tdr_mode == "exclusive" else 0)
    assert status(op_state, True) == (TdxStatus.TDX_OPERAND_BUSY | OP_STATE if op_state_mode else 0)
    assert status(op_state, False) == 0
    if tdvpr_mode:
        register = _register_of_td(leaf)

        def tdvpr(host: Host, _: TdHandle, registers: Registers) -> Lock:
            return host.tdx.tds.vcpus[registers[register]].page_lock

        busy = TdxStatus.TDX_OPERAND_BUSY | OPERAND[register]
        assert status(tdvpr, True) == busy
        assert status(tdvpr, False) == (busy if tdvpr_mode == "exclusive" else 0)


def _register_of_td(leaf: L) -> str:
    """The register that names the TDR, or the TDVPR."""
    return next(register for other, register, kind in PAGES if other is leaf and kind in ("tdr", "tdvpr"))


def test_vp_init_version_1_takes_the_td_for_itself() -> None:
    """Version 0 shares the TDR with others, version 1 does not."""
    for version, expected in ((0, 0), (1, TdxStatus.TDX_OPERAND_BUSY | TDR)):
        host, td, registers = CASES[L.TDH_VP_INIT]()
        host.tdx.tds.tds[td.tdr].page_lock.try_shared(3)
        assert host.call(0, L.TDH_VP_INIT, version, **registers) == expected


# Versions


VERSIONED = {HV0: {3, 11, 23, 26, 30}, HV1: {3, 11, 23, 26, 30, 22, 33, 45, 53}}


@pytest.mark.parametrize("identity", VERSIONED, ids=["A", "B"])
def test_which_leaves_have_a_version_1(identity: ModuleIdentity) -> None:
    """Any other leaf refuses it whatever the rest; none of those that have one knows a version 2."""
    for leaf in range(70):
        status = Host(identity).call(0, leaf | 1 << 16, rcx=0x123)
        assert (status == TdxStatus.TDX_OPERAND_INVALID) == (leaf not in VERSIONED[identity]), leaf
    for leaf in VERSIONED[identity] - {45, 53}:
        assert Host(identity).call(0, leaf | 2 << 16) == TdxStatus.TDX_OPERAND_INVALID, leaf


# Bring-up


def configured_by(host: Host, version: int = 0, **registers: int) -> int:
    """SYS.CONFIG of a module in SYSINIT_DONE with one good TDMR."""
    init_lps(host.tdx)
    TDMR.write(host.memory, 0x2000)
    host.memory.write64(SCRATCH, 0x2000)
    return host.call(0, L.TDH_SYS_CONFIG, version, **{"rcx": SCRATCH, "rdx": 1, "r8": 32, **registers})


@pytest.mark.parametrize(
    ("identity", "version", "registers", "status"),
    [
        (HV1, 1, {"r9": 1 << 47}, 0),
        (HV1, 1, {"r9": 1 << 3 | 1 << 46}, 0xC000_0100_0000_0009),
        (HV1, 1, {"r10": 1}, 0xC000_0100_0000_000A),
        (HV1, 0, {"r9": 1 << 46, "r10": 1}, 0),
        (HV1, 0, {"r8": 32 | 1 << 16}, 0),
        (HV1, 0, {"r8": 32 | 1 << 17}, 0xC000_0100_0000_0008),
        (HV0, 0, {"r8": 32 | 1 << 16}, 0xC000_0100_0000_0008),
        (HV0, 1, {}, 0xC000_0100_0000_0000),
    ],
)
def test_flags_of_sys_config(identity: ModuleIdentity, version: int, registers: Registers, status: int) -> None:
    """Version 1 takes enabling flags that are features of the module; bit 16 of R8 is dynamic PAMT, in profile B."""
    host = Host(identity, up=False)
    assert configured_by(host, version, **registers) == status
    assert host.state == (SysState.SYSINIT_DONE if status else SysState.SYSCONFIG_DONE)
    if status == 0:
        assert host.tdx.state.system.update_compatibility == bool(version and registers.get("r9"))


@pytest.mark.parametrize("rcx", [0x1000, 1 << 30, 1 << 46, 33 << 40])
def test_tdmr_init_takes_the_base_of_a_tdmr(rcx: int) -> None:
    """Anything else is OPERAND_INVALID in RCX; a TDMR that another LP initialises is busy."""
    host = Host(HV1, up=False)
    assert configured_by(host) == 0
    must(host.tdx, 0, L.TDH_SYS_KEY_CONFIG)
    assert host.call(0, L.TDH_SYS_TDMR_INIT, rcx=rcx) == 0xC000_0100_0000_0001
    host.tdx.state.system.tdmrs[0].mutex.try_exclusive(2)
    assert host.call(0, L.TDH_SYS_TDMR_INIT, rcx=0) == 0x8000_0200_0000_0001
    host.tdx.state.system.tdmrs[0].mutex.release(2)
    assert host.call(0, L.TDH_SYS_TDMR_INIT, rcx=0) == 0


def module_on(**platform: object) -> TdxModule:
    """A fresh module on another platform."""
    host = Host(HV1, up=False)
    changed: ModulePlatform = msgspec.structs.replace(host.platform, **platform)
    return TdxModule(HV1, changed, host.memory, hooks=Hooks())


@pytest.mark.parametrize("cmrs", [((0x1000, 0x1000), (0, 0x1000)), ((0, 0x2000), (0x1000, 0x1000)), ((0, 0x800),)])
def test_sys_init_wants_memory_ranges_that_make_sense(cmrs: tuple[tuple[int, int], ...]) -> None:
    """CMRs out of order, overlapping or not made of pages are TDX_CMR_LIST_INVALID."""
    assert module_on(cmrs=cmrs).seamcall(0, L.TDH_SYS_INIT, ModuleRegisters()).rax == 0xC000_0A22_0000_0000


def test_lp_init_knows_eight_packages() -> None:
    """An LP of a ninth is refused under its number."""
    module = module_on(pkg_of_lp={0: 0, 1: 8})
    assert module.seamcall(0, L.TDH_SYS_INIT, ModuleRegisters()).rax == 0
    assert module.seamcall(1, L.TDH_SYS_LP_INIT, ModuleRegisters()).rax == 0xC000_0906_0000_0008


# Handoff versions


@functools.cache
def identities() -> list[ModuleIdentity]:
    """Modules with every combination of handoff versions up to 2."""
    return [
        msgspec.structs.replace(HV1, module_hv=native, min_update_hv=least, no_downgrade=strict)
        for native, least, strict in itertools.product(range(3), range(3), (False, True))
        if least <= native
    ]


def test_which_handoff_version_a_module_produces() -> None:
    """From the oldest that it knows to its own, or only its own if it does not downgrade; else RCX is at fault."""
    for identity, wanted in itertools.product(identities(), range(4)):
        least = identity.module_hv if identity.no_downgrade else identity.min_update_hv
        expected = 0 if least <= wanted <= identity.module_hv else 0xC000_0100_0000_0001
        assert Host(identity).shutdown(wanted) == expected, (identity.module_hv, identity.min_update_hv, wanted)


def test_which_handoff_version_a_module_takes() -> None:
    """From the oldest that it knows to its own; else TDX_SYS_INVALID_HANDOFF, and the handoff stays for another."""
    for identity, offered in itertools.product(identities(), range(4)):
        host = Host()
        assert host.shutdown() == 0
        host.install(identity)
        init_lps(host.tdx)
        write_header(host.memory, HANDOFF, HandoffHeader(1, offered, 57336 if offered else 53386))
        good = identity.min_update_hv <= offered <= identity.module_hv
        assert host.call(0, L.TDH_SYS_UPDATE) == (0 if good else 0xC000_0509_0000_0000)
        assert host.memory.read(HANDOFF, 1) == (b"\0" if good else b"\1")


# Status codes


STATUSES = """
TDX_SUCCESS 0x0000000000000000
TDX_NON_RECOVERABLE_VCPU 0x4000000100000000
TDX_NON_RECOVERABLE_TD 0x6000000200000000
TDX_INTERRUPTED_RESUMABLE 0x8000000300000000
TDX_INTERRUPTED_RESTARTABLE 0x8000000400000000
TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE 0x6000000500000000
TDX_INVALID_RESUMPTION 0xC000000600000000
TDX_OPERAND_INVALID 0xC000010000000000
TDX_OPERAND_ADDR_RANGE_ERROR 0xC000010100000000
TDX_OPERAND_BUSY 0x8000020000000000
TDX_PREVIOUS_TLB_EPOCH_BUSY 0x8000020100000000
TDX_SYS_BUSY 0x8000020200000000
TDX_RND_NO_ENTROPY 0x8000020300000000
TDX_OPERAND_BUSY_HOST_PRIORITY 0x8000020400000000
TDX_HOST_PRIORITY_BUSY_TIMEOUT 0x9000020500000000
TDX_INTERRUPTED_BUSY 0x8000020600000000
TDX_PAGE_METADATA_INCORRECT 0xC000030000000000
TDX_PAGE_ALREADY_FREE 0x0000030100000000
TDX_PAGE_NOT_OWNED_BY_TD 0xC000030200000000
TDX_PAGE_NOT_FREE 0xC000030300000000
TDX_TD_ASSOCIATED_PAGES_EXIST 0xC000040000000000
TDX_SYS_INIT_NOT_PENDING 0xC000050000000000
TDX_SYS_LP_INIT_NOT_DONE 0xC000050200000000
TDX_SYS_LP_INIT_DONE 0xC000050300000000
TDX_SYS_NOT_READY 0xC000050500000000
TDX_SYS_SHUTDOWN 0xC000050600000000
TDX_SYS_KEY_CONFIG_NOT_PENDING 0xC000050700000000
TDX_SYS_STATE_INCORRECT 0xC000050800000000
TDX_SYS_INVALID_HANDOFF 0xC000050900000000
TDX_SYS_INCOMPATIBLE_SIGSTRUCT 0xC000050A00000000
TDX_SYS_LP_INIT_NOT_PENDING 0xC000050B00000000
TDX_SYS_CONFIG_NOT_PENDING 0xC000050C00000000
TDX_INCOMPATIBLE_SEAM_CAPABILITIES 0xC000050D00000000
TDX_CRYPTO_SELF_TEST_FAILED 0xC000051100000000
TDX_UPDATE_COMPATIBILITY_SENSITIVE 0x8000051200000000
TDX_TD_FATAL 0xE000060400000000
TDX_TD_NON_DEBUG 0xC000060500000000
TDX_TDCS_NOT_ALLOCATED 0xC000060600000000
TDX_LIFECYCLE_STATE_INCORRECT 0xC000060700000000
TDX_OP_STATE_INCORRECT 0xC000060800000000
TDX_NO_VCPUS 0xC000060900000000
TDX_TDCX_NUM_INCORRECT 0xC000061000000000
TDX_X2APIC_ID_NOT_UNIQUE 0xC000062100000000
TDX_INCOMPATIBLE_MRTD_CONTEXT 0xC000062200000000
TDX_VCPU_STATE_INCORRECT 0xC000070000000000
TDX_VCPU_ASSOCIATED 0x8000070100000000
TDX_VCPU_NOT_ASSOCIATED 0x8000070200000000
TDX_MAX_VCPUS_EXCEEDED 0xC000070500000000
TDX_TSC_ROLLBACK 0xC000070600000000
TDX_KEY_GENERATION_FAILED 0x8000080000000000
TDX_TD_KEYS_NOT_CONFIGURED 0x8000081000000000
TDX_KEY_STATE_INCORRECT 0xC000081100000000
TDX_KEY_CONFIGURED 0x0000081500000000
TDX_WBCACHE_NOT_COMPLETE 0x8000081700000000
TDX_HKID_NOT_FREE 0xC000082000000000
TDX_NO_HKID_READY_TO_WBCACHE 0x0000082100000000
TDX_WBCACHE_RESUME_ERROR 0xC000082300000000
TDX_FLUSHVP_NOT_DONE 0x8000082400000000
TDX_INCORRECT_CPUID_VALUE 0xC000090000000000
TDX_INCONSISTENT_CPUID_FIELD 0xC000090200000000
TDX_INVALID_PKG_ID 0xC000090600000000
TDX_INCONSISTENT_MSR 0xC000092000000000
TDX_INCORRECT_MSR_VALUE 0xC000092100000000
TDX_INVALID_TDMR 0xC0000A0000000000
TDX_TDMR_ALREADY_INITIALIZED 0x00000A0300000000
TDX_INVALID_PAMT 0xC0000A1000000000
TDX_CMR_LIST_INVALID 0xC0000A2200000000
TDX_EPT_WALK_FAILED 0xC0000B0000000000
TDX_GPA_RANGE_NOT_BLOCKED 0xC0000B0600000000
TDX_TLB_TRACKING_NOT_DONE 0xC0000B0800000000
TDX_EPT_ENTRY_STATE_INCORRECT 0xC0000B0D00000000
TDX_METADATA_FIELD_ID_INCORRECT 0xC0000C0000000000
TDX_METADATA_FIELD_NOT_WRITABLE 0xC0000C0100000000
TDX_METADATA_FIELD_NOT_READABLE 0xC0000C0200000000
TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT 0x00000C0B00000000
TDX_INCOMPATIBLE_MBMD_MAC_CONTEXT 0xC0000E2200000000
TDX_CONNECT_INVALID_STATE 0xC0000F4600000000
"""


def test_the_values_of_all_status_codes() -> None:
    """Name and value as the module's header has them."""
    for line in STATUSES.split("\n"):
        if line:
            name, value = line.split()
            assert TdxStatus[name] == int(value, 16)


def test_every_leaf_is_reached_by_a_test_of_its_states() -> None:
    """No leaf is known to the dispatcher that the tables above or those of the SYS leaves leave out."""
    elsewhere = {
        L.TDH_MNG_WR, L.TDH_MNG_KEY_RECLAIMID, L.TDH_PHYMEM_PAGE_RDMD, L.TDH_PHYMEM_PAGE_RECLAIM, L.TDH_PHYMEM_CACHE_WB,
        L.TDH_PHYMEM_PAGE_WBINVD, L.TDH_MEM_SEPT_REMOVE, L.TDH_MEM_PAGE_PROMOTE, L.TDH_PHYMEM_PAMT_ADD,
        L.TDH_PHYMEM_PAMT_REMOVE,
    }  # fmt: skip
    system = {leaf for leaf in HANDLERS if L(leaf).name.startswith("TDH_SYS_")}
    assert set(HANDLERS) == set(CASES) | elsewhere | system


def test_the_next_module_may_be_the_same_build() -> None:
    """An update to the very version that runs is one like any other."""
    host = Host()
    td = host.td(associate=(1,))
    host.update(HV1)
    host.update(HV1_NEXT)
    assert host.run(1, td.vcpus[0]).out["r12"] == 1
