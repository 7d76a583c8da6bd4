"""The checks that the leaves of the TDX module make, as tables: pages, states and locks of a TD."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from tdx_bench import SCRATCH, Host

from seamldr.tdx_boot import TdHandle, must
from seamldr.tdx_leaves import TdhLeaf as L
from seamldr.tdx_locks import Lock
from seamldr.tdx_module import HANDLERS
from seamldr.tdx_state import LifeCycle, OpState
from seamldr.tdx_status import TdxStatus

RCX, RDX, R8, TDR, OP_STATE = 1, 2, 8, 128, 172
OPERAND = {"rcx": RCX, "rdx": RDX, "r8": R8}
GPA = 0x40_0000

Registers = dict[str, int]
Case = Callable[[], tuple[Host, TdHandle, Registers]]


def row(table: str) -> Callable[[L], str]:
    """The id of a leaf's row in a table."""
    return lambda leaf: f"row-{table}_{leaf.name}"


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


@pytest.mark.conformance("TDX module checks")
@pytest.mark.parametrize(("leaf", "register", "kind"), PAGES, ids=[f"row-page_{p[0].name}_{p[1]}" for p in PAGES])
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


@pytest.mark.conformance("TDX module checks")
@pytest.mark.parametrize("leaf", BUILD_STATE, ids=row("state"))
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


@pytest.mark.conformance("TDX module checks")
@pytest.mark.parametrize("leaf", ALLOWED, ids=row("op_state"))
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


@pytest.mark.conformance("TDX module checks")
@pytest.mark.parametrize(
    "leaf", [L.TDH_VP_INIT, L.TDH_VP_ENTER, L.TDH_VP_RD, L.TDH_VP_WR, L.TDH_VP_FLUSH], ids=row("vcpu")
)
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


@pytest.mark.conformance("TDX module checks")
@pytest.mark.parametrize("leaf", LOCKS, ids=row("locks"))
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


def test_every_leaf_is_reached_by_a_test_of_its_states() -> None:
    """No leaf is known to the dispatcher that the tables above or those of the SYS leaves leave out."""
    elsewhere = {
        L.TDH_MNG_WR, L.TDH_MNG_KEY_RECLAIMID, L.TDH_PHYMEM_PAGE_RDMD, L.TDH_PHYMEM_PAGE_RECLAIM, L.TDH_PHYMEM_CACHE_WB,
        L.TDH_PHYMEM_PAGE_WBINVD, L.TDH_MEM_SEPT_REMOVE, L.TDH_MEM_PAGE_PROMOTE, L.TDH_PHYMEM_PAMT_ADD,
        L.TDH_PHYMEM_PAMT_REMOVE,
    }  # fmt: skip
    system = {leaf for leaf in HANDLERS if L(leaf).name.startswith("TDH_SYS_")}
    assert set(HANDLERS) == set(CASES) | elsewhere | system
