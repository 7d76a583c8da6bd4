"""Any host at all: random legal and illegal calls on several LPs, updates between them, and the records kept."""

from __future__ import annotations

from collections import Counter
from random import Random

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tdx_bench import FREE_PAGES, HANDOFF, HV0, HV0_NEXT, HV1, HV1_NEXT, SCRATCH, Host

from seamldr.identity import ModuleIdentity
from seamldr.tdx_boot import BootError, TdHandle, init_lps, must
from seamldr.tdx_leaves import TdhLeaf
from seamldr.tdx_metadata import TD_FIELDS, VCPU_FIELDS
from seamldr.tdx_module import ExitReason, ModuleState, TdMemory, TdxModule, all_records, decode
from seamldr.tdx_state import NO_LP, NO_PA, GuestMemory, KotState, LifeCycle, PageType, SysState, VcpuState
from seamldr.tdx_status import TdxStatus, status_name

LPS = 3
PAGE_SLOTS = [FREE_PAGES[0] + 4096 * index for index in range(60)]
SEEN: Counter[tuple[TdhLeaf, str]] = Counter()

# What each leaf expects in RCX, RDX, R8, R9; an operand of another kind slips in now and then.
OPERANDS = {
    TdhLeaf.TDH_VP_ENTER: ("vcpu",),
    TdhLeaf.TDH_MNG_ADDCX: ("page", "td"),
    TdhLeaf.TDH_MEM_PAGE_ADD: ("gpa", "td", "page", "buffer"),
    TdhLeaf.TDH_MEM_SEPT_ADD: ("gpa", "td", "page"),
    TdhLeaf.TDH_VP_ADDCX: ("page", "vcpu"),
    TdhLeaf.TDH_MEM_PAGE_AUG: ("gpa", "td", "page"),
    TdhLeaf.TDH_MEM_RANGE_BLOCK: ("gpa", "td"),
    TdhLeaf.TDH_MNG_KEY_CONFIG: ("td",),
    TdhLeaf.TDH_MNG_CREATE: ("page", "hkid"),
    TdhLeaf.TDH_VP_CREATE: ("page", "td"),
    TdhLeaf.TDH_MNG_RD: ("td", "field"),
    TdhLeaf.TDH_MNG_WR: ("td", "field", "number", "number"),
    TdhLeaf.TDH_MR_EXTEND: ("gpa", "td"),
    TdhLeaf.TDH_MR_FINALIZE: ("td",),
    TdhLeaf.TDH_VP_FLUSH: ("vcpu",),
    TdhLeaf.TDH_MNG_VPFLUSHDONE: ("td",),
    TdhLeaf.TDH_MNG_KEY_FREEID: ("td",),
    TdhLeaf.TDH_MNG_INIT: ("td", "buffer"),
    TdhLeaf.TDH_VP_INIT: ("vcpu", "number"),
    TdhLeaf.TDH_PHYMEM_PAGE_RDMD: ("page",),
    TdhLeaf.TDH_VP_RD: ("vcpu", "field"),
    TdhLeaf.TDH_MNG_KEY_RECLAIMID: (),
    TdhLeaf.TDH_PHYMEM_PAGE_RECLAIM: ("page",),
    TdhLeaf.TDH_MEM_PAGE_REMOVE: ("gpa", "td"),
    TdhLeaf.TDH_SYS_KEY_CONFIG: (),
    TdhLeaf.TDH_SYS_INFO: ("buffer", "number", "buffer", "number"),
    TdhLeaf.TDH_SYS_INIT: (),
    TdhLeaf.TDH_SYS_RD: ("number", "field"),
    TdhLeaf.TDH_SYS_LP_INIT: (),
    TdhLeaf.TDH_SYS_TDMR_INIT: (),
    TdhLeaf.TDH_SYS_RDALL: ("number", "buffer", "field"),
    TdhLeaf.TDH_MEM_TRACK: ("td",),
    TdhLeaf.TDH_MEM_RANGE_UNBLOCK: ("gpa", "td"),
    TdhLeaf.TDH_PHYMEM_CACHE_WB: ("number",),
    TdhLeaf.TDH_PHYMEM_PAGE_WBINVD: ("page",),
    TdhLeaf.TDH_VP_WR: ("vcpu", "field", "number", "number"),
    TdhLeaf.TDH_SYS_LP_SHUTDOWN: (),
    TdhLeaf.TDH_SYS_CONFIG: ("buffer", "number", "hkid"),
    TdhLeaf.TDH_SYS_UPDATE: (),
    TdhLeaf.TDH_MEM_PAGE_PROMOTE: ("gpa", "td"),
    TdhLeaf.TDH_MEM_SEPT_REMOVE: ("gpa", "td"),
    TdhLeaf.TDH_PHYMEM_PAMT_ADD: ("page", "page", "page"),
    TdhLeaf.TDH_PHYMEM_PAMT_REMOVE: ("page",),
}
KINDS = ("td", "vcpu", "page", "gpa", "hkid", "field", "number", "buffer")
FIELDS = [field.id for table in (TD_FIELDS, VCPU_FIELDS) for field in table.all()]
CONSTANTS = {
    "gpa": [0, 0x1000, 0x2000, 0x2001, 1 << 47, 0x20_0001],
    "hkid": [31, 32, *range(33, 40), 64],
    "field": [*FIELDS, (1 << 64) - 1, 1 << 62],
    "number": [0, 1, 2, 32, 1024, 0x10001, 1 << 60],
    "buffer": [SCRATCH, 0x4000, 0x4100, HANDOFF],
    "page": [*PAGE_SLOTS, PAGE_SLOTS[0] + 8, 1 << 40, 1 << 33],
}
LPS_ = st.integers(0, LPS - 1)
PICK = st.integers(0, 1 << 20)


def registers(module: TdxModule, leaf: TdhLeaf, picks: list[int]) -> dict[str, int]:
    """Plausible inputs of a leaf: operands of the kinds that it expects, except that one pick in eight is odd."""
    live = {"td": list(module.tds.tds), "vcpu": list(module.tds.vcpus)}
    inputs = {}
    for name, kind, pick in zip(("rcx", "rdx", "r8", "r9"), OPERANDS[leaf], picks, strict=False):
        chosen = KINDS[pick // 8 % len(KINDS)] if pick % 8 == 0 else kind
        values = live.get(chosen) or CONSTANTS.get(chosen, PAGE_SLOTS)
        inputs[name] = values[pick // 64 % len(values)]
    return inputs


class AnyHost(RuleBasedStateMachine):
    """A module, a host that calls whatever it likes, and a copy of the state kept from dirty records only."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(HV1, lps=LPS, pkgs=1)
        self.tds: list[TdHandle] = []
        self.copies: dict[int, GuestMemory] = {}
        self.kept_state, self.kept_tds = ModuleState(), TdMemory()
        self.keep_all()

    def keep_all(self) -> None:
        """After an install the records of the old module are void."""
        self.kept_state = ModuleState()
        self.host.tdx.dirty |= set(all_records(self.host.tdx.state, self.host.tdx.tds))

    def idle(self, lp: int) -> bool:
        """True if the LP may call."""
        return self.host.tdx.running(lp) is None

    def vcpu(self, td: int, vcpu: int) -> int:
        """The TDVPR of some vCPU of some TD."""
        handle = self.tds[td % len(self.tds)]
        return handle.vcpus[vcpu % len(handle.vcpus)]

    @rule(lp=LPS_, leaf=st.sampled_from(list(OPERANDS)), picks=st.lists(PICK, min_size=4, max_size=4))
    def any_leaf(self, lp: int, leaf: TdhLeaf, picks: list[int]) -> None:
        """Whatever the registers, the module answers with a status of its own."""
        if self.idle(lp):
            self.answer(lp, leaf, picks)

    @rule(seed=st.integers(0, 1 << 32))
    def many_leaves(self, seed: int) -> None:
        """The same, a hundred times."""
        random = Random(seed)
        for _ in range(100):
            lp, leaf = random.randrange(LPS), random.choice(list(OPERANDS))
            if self.idle(lp):
                self.answer(lp, leaf, [random.randrange(1 << 20) for _ in range(4)])
                if random.randrange(2) and not self.idle(lp):
                    self.leave(lp, ExitReason.EXTERNAL_INTERRUPT)

    def answer(self, lp: int, leaf: TdhLeaf, picks: list[int]) -> None:
        """One call; a guest that it starts works one unit."""
        result = self.host.result(lp, leaf, **registers(self.host.tdx, leaf, picks))
        assert status_name(result.rax).startswith("TDX_")
        SEEN[leaf, status_name(result.rax)] += 1
        if result.running is not None:
            self.host.tdx.guest_step(lp)
            self.copies.setdefault(result.running, GuestMemory()).unit()
        self.forget_dead_vcpus()

    def forget_dead_vcpus(self) -> None:
        """A page that was a TDVPR may be reclaimed and become another vCPU's."""
        for tdvpr in [tdvpr for tdvpr in self.copies if tdvpr not in self.host.tdx.tds.vcpus]:
            del self.copies[tdvpr]

    @rule(lp=LPS_, rax=st.integers(0, (1 << 63) - 1))
    def any_rax(self, lp: int, rax: int) -> None:
        """Reserved bits and unknown versions are refused."""
        if self.idle(lp) and rax & 0xFFFF != TdhLeaf.TDH_SYS_SHUTDOWN:
            assert status_name(self.host.call(lp, rax)).startswith("TDX_")

    @precondition(lambda self: len(self.tds) < 3)
    @rule(hkid=st.integers(33, 36), lp=st.one_of(st.none(), st.integers(0, LPS - 1)))
    def build(self, hkid: int, lp: int | None) -> None:
        """A TD ready to run, unless random calls took what it needs."""
        if all(map(self.idle, range(LPS))):
            try:
                self.tds.append(self.host.td(hkid, vcpus=2, associate=(lp,)))
            except BootError:
                return

    @precondition(lambda self: len(self.tds) < 3)
    @rule(hkid=st.integers(33, 36), lp=LPS_)
    def begin_build(self, hkid: int, lp: int) -> None:
        """A TD in build with one vCPU, and a second one that is only created, unless random calls took the pages."""
        if all(map(self.idle, range(LPS))):
            try:
                td = self.host.add_vcpu(self.host.new_td(hkid), lp=lp)
                self.tds.append(td)
                must(self.host.tdx, lp, TdhLeaf.TDH_VP_CREATE, rcx=next(self.host.pages), rdx=td.tdr)
            except BootError:
                return

    @precondition(lambda self: self.tds)
    @rule(lp=LPS_, td=st.integers(0, 2), vcpu=st.integers(0, 1), units=st.integers(0, 3))
    def enter(self, lp: int, td: int, vcpu: int, units: int) -> None:
        """A guest goes on where it was."""
        tdvpr = self.vcpu(td, vcpu)
        if self.idle(lp) and self.host.enter(lp, tdvpr) == 0:
            self.host.tdx.guest_step(lp, units)
            copy = self.copies.setdefault(tdvpr, GuestMemory())
            for _ in range(units):
                copy.unit()

    @rule(lp=LPS_, reason=st.sampled_from(ExitReason))
    def leave(self, lp: int, reason: ExitReason) -> None:
        """An exit reports the reason, and for a TDVMCALL the guest's own words."""
        tdvpr = self.host.tdx.running(lp)
        if tdvpr is None:
            return
        result = self.host.tdx.td_exit(lp, reason)
        assert result.rax == reason
        if reason == ExitReason.TDCALL:
            assert (result.out["r12"], result.out["r13"]) == (self.copies[tdvpr].counter, self.copies[tdvpr].chain_low)

    @precondition(lambda self: self.tds)
    @rule(td=st.integers(0, 2), lp=LPS_, vcpu=st.integers(0, 1))
    def flush(self, td: int, lp: int, vcpu: int) -> None:
        """A vCPU may move afterwards."""
        if self.idle(lp):
            self.host.flush(lp, self.vcpu(td, vcpu))

    @precondition(lambda self: self.tds)
    @rule(td=st.integers(0, 2))
    def destroy(self, td: int) -> None:
        """Teardown of a TD that no LP runs; it may have lost pages to random calls."""
        handle = self.tds[td % len(self.tds)]
        data = self.host.tdx.tds.tds.get(handle.tdr)
        if data is None:
            self.tds.remove(handle)
        elif data.lifecycle == LifeCycle.TD_KEYS_CONFIGURED and all(map(self.idle, range(LPS))):
            self.tds.remove(handle)
            pages = self.host.tdx.tds.pages[handle.tdr].entries
            children = tuple(pa for pa, page in pages.items() if page.type != PageType.PT_TDR)
            self.host.teardown(self._as_owned(handle, children))
            self.forget_dead_vcpus()

    def _as_owned(self, handle: TdHandle, children: tuple[int, ...]) -> TdHandle:
        """The handle with the pages that the TD really has."""
        vcpus = tuple(pa for pa in children if pa in self.host.tdx.tds.vcpus)
        rest = tuple(pa for pa in children if pa not in vcpus)
        return TdHandle(handle.hkid, handle.tdr, rest, vcpus, (), ())

    @rule(rcx=st.sampled_from([1, 0x10001, 2]), identity=st.sampled_from([HV1, HV1_NEXT]))
    def update(self, rcx: int, identity: ModuleIdentity) -> None:
        """An update happens exactly if every LP is out of its guests and the request is one that the module knows."""
        if not self.idle(0):
            return
        builds = self.host.tdx.state.system.td_build_count
        ready = self.host.state == SysState.SYS_READY
        status = self.host.shutdown(rcx)
        if not ready or rcx == 2:
            assert status & 1
        elif not all(map(self.idle, range(LPS))):
            assert status == TdxStatus.TDX_SYS_BUSY
        elif rcx == 0x10001 and builds:
            assert status == TdxStatus.TDX_UPDATE_COMPATIBILITY_SENSITIVE | builds << 16
        else:
            assert status == 0
            self.host.install(identity)
            init_lps(self.host.tdx)
            assert self.host.call(0, TdhLeaf.TDH_SYS_UPDATE) == 0
            self.keep_all()

    @rule()
    def restart(self) -> None:
        """A module made of kept records is the same module."""
        self.keep()
        host = self.host
        host.module = TdxModule(
            host.tdx.identity, host.platform, host.memory, self.kept_state, self.kept_tds, host.hooks
        )
        self.kept_state = msgspec.msgpack.decode(msgspec.msgpack.encode(self.kept_state), type=ModuleState)
        self.kept_tds = msgspec.msgpack.decode(msgspec.msgpack.encode(self.kept_tds), type=TdMemory)

    def keep(self) -> None:
        """What a service does after each call."""
        module = self.host.tdx
        for record in module.dirty:
            decode(self.kept_state, self.kept_tds, record, module.encode(record))
        module.dirty.clear()

    @invariant()
    def dirty_records_are_enough(self) -> None:
        """The state kept from dirty records is the state."""
        self.keep()
        assert self.kept_state == self.host.tdx.state
        assert self.kept_tds == self.host.tdx.tds

    @invariant()
    def books_balance(self) -> None:
        """Counts, locks and key ids agree with the records that they count."""
        module = self.host.tdx
        running = [lp.running for lp in module.state.lps.values() if lp.running != NO_PA]
        assert len(set(running)) == len(running)
        vcpus = module.tds.vcpus.values()
        assert {v.tdvpr for v in vcpus if v.state == VcpuState.VCPU_ACTIVE} == set(running)
        bound = Counter(v.tdr for v in vcpus if v.assoc_lpid != NO_LP)
        inside = Counter(module.tds.vcpus[tdvpr].tdr for tdvpr in running)
        for tdr, td in module.tds.tds.items():
            assert td.num_assoc_vcpus == bound[tdr]
            assert td.chldcnt == len(module.tds.pages[tdr].entries) - 1
            assert sum(td.refcount) == len(td.page_lock.shared) == inside[tdr]
            assert td.op_state_lock.free
            assert td.epoch_lock.free
        in_use = {td.hkid for td in module.tds.tds.values() if td.lifecycle != LifeCycle.TD_TEARDOWN}
        states = {hkid: entry.state for hkid, entry in module.state.system.kot.items()}
        assert {hkid for hkid, state in states.items() if state != KotState.RESERVED} == in_use
        builds = sum(td.mrtd_context_version != 0 for td in module.tds.tds.values())
        assert module.state.system.td_build_count == builds
        for tdvpr, copy in self.copies.items():
            assert module.tds.vcpus[tdvpr].guest == copy


AnyHost.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, derandomize=True, deadline=None, database=None
)


def test_any_host() -> None:
    """Random calls raise nothing, lose nothing and keep the books; and they are not all refused at the door."""
    SEEN.clear()
    run_state_machine_as_test(AnyHost)
    assert {leaf for leaf, _ in SEEN} == set(OPERANDS)
    assert len({leaf for leaf, status in SEEN if status == "TDX_SUCCESS"}) >= 18
    assert len({status for _, status in SEEN}) >= 25


def test_records_round_trip_over_two_profiles() -> None:
    """All of state and TD memory survives encoding, and the update that follows works on the decoded copy."""
    host = Host(HV0)
    td = host.td(associate=(1,))
    host.run(1, td.vcpus[0])
    state, tds = ModuleState(), TdMemory()
    for record in all_records(host.tdx.state, host.tdx.tds):
        decode(state, tds, record, host.tdx.encode(record))
    assert (state, tds) == (host.tdx.state, host.tdx.tds)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=ModuleState) == state
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(tds), type=TdMemory) == tds
    host.module = TdxModule(HV0, host.platform, host.memory, state, tds)
    host.update(HV0_NEXT)
    assert host.run(1, td.vcpus[0]).out["r12"] == 2


def test_common_calls_change_small_records() -> None:
    """Entry and exit touch the LP, the TD and the vCPU, and nothing that grows with the machine."""
    host = Host(HV1)
    for hkid in range(33, 41):
        td = host.td(hkid, associate=(1,))
    host.tdx.dirty.clear()
    host.run(1, td.vcpus[0])
    assert host.tdx.dirty == {"lp:1", f"td:{td.tdr:x}", f"vcpu:{td.vcpus[0]:x}"}
    assert sum(len(host.tdx.encode(record)) for record in host.tdx.dirty) < 400
    host.tdx.dirty.clear()
    assert host.call(2, TdhLeaf.TDH_MNG_RD, rcx=td.tdr, rdx=TD_FIELDS.first_id()) == 0
    assert host.tdx.dirty == set()


def test_bad_records_are_refused() -> None:
    """An unknown name and bytes of another shape are errors of the caller."""
    with pytest.raises(ValueError, match="unknown record 'disk:1'"):
        decode(ModuleState(), TdMemory(), "disk:1", b"")
    with pytest.raises(msgspec.ValidationError):
        decode(ModuleState(), TdMemory(), "lp:1", msgspec.msgpack.encode("no"))
