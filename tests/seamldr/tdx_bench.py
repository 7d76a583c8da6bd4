"""A host for one TDX module in memory: makes calls, builds TDs, installs other modules. Not a test."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import msgspec

from bus.memory import PhysicalMemory
from seamldr.identity import ModuleIdentity, make_identity
from seamldr.tdx_boot import TdHandle, add_page, add_vcpu, boot, born_finalized, create_td, init_lps
from seamldr.tdx_call import Hooks, Registers
from seamldr.tdx_leaves import TdhLeaf, leaf_rax
from seamldr.tdx_metadata import HANDOFF_DATA_VALID
from seamldr.tdx_module import ExitInfo, ExitReason, Result, TdxModule
from seamldr.tdx_platform import ModulePlatform
from seamldr.tdx_state import KotState, SysState, TdMemory
from seamldr.tdx_tdmr import plan_tdmr

VMFAILINVALID = 0x8000_FF00_FFFF_0000  # what Linux makes of CF = 1 after SEAMCALL
SCRATCH = 0x1000
SEAM_BASE = 0x10_0000
SEAM_SIZE = 0x10_0000
HANDOFF = 0x10_5000
PAMT = 0x20_0000
FREE_PAGES = (0x70_0000, 0x100_0000)
MEMORY_SIZE = 0x100_0000
TDMR = plan_tdmr(0, 1 << 30, PAMT, FREE_PAGES)

HV0 = make_identity("1.5.08", "A")
HV0_NEXT = make_identity("1.5.09", "A")
HV1 = make_identity("1.5.16", "B")
HV1_NEXT = make_identity("1.5.17", "B")


class FaultyHooks(Hooks):
    """Hardware whose answers a test sets."""

    def __init__(self) -> None:
        self.dry = False
        self.engine_busy = False
        self.interrupts = 0
        self.adjust: dict[int, int] = {}
        self.fms: dict[int, int] = {}
        self.capabilities: dict[int, int] = {}
        self.clock = 0

    def entropy(self, lp: int) -> bool:
        return not self.dry

    def key_engine_ready(self, lp: int) -> bool:
        return not self.engine_busy

    def interrupt_pending(self, lp: int) -> bool:
        self.interrupts -= 1
        return self.interrupts >= 0

    def tsc_adjust(self, lp: int) -> int:
        return self.adjust.get(lp, 0)

    def tsc(self, lp: int) -> int:
        return self.clock

    def cpuid_fms(self, lp: int) -> int:
        return self.fms.get(lp, super().cpuid_fms(lp))

    def seam_capabilities(self, lp: int) -> int:
        return self.capabilities.get(lp, super().seam_capabilities(lp))


class Host:
    """The host's side of a module: `module` is None while no LP but some have installed the next one."""

    def __init__(self, identity: ModuleIdentity = HV1, *, lps: int = 4, pkgs: int = 1, up: bool = True) -> None:
        self.memory = PhysicalMemory.private(MEMORY_SIZE)
        self.hooks = FaultyHooks()
        self.platform = ModulePlatform(
            {lp: lp * pkgs // lps for lp in range(lps)}, HANDOFF, SEAM_BASE, SEAM_SIZE, cmrs=((0, MEMORY_SIZE),)
        )
        self.pages: Iterator[int] = iter(range(*FREE_PAGES, 4096))
        self.module: TdxModule | None = TdxModule(identity, self.platform, self.memory, hooks=self.hooks)
        if up:
            boot(self.tdx, [TDMR], scratch_pa=SCRATCH)

    @property
    def tdx(self) -> TdxModule:
        """The module that is there."""
        assert self.module is not None
        return self.module

    @property
    def state(self) -> SysState:
        """The system state of the module."""
        return self.tdx.state.system.sys_state

    def result(self, lp: int, leaf: int, version: int = 0, **registers: int) -> Result:
        """Make a call."""
        rax = leaf_rax(leaf, version) if isinstance(leaf, TdhLeaf) else leaf
        return self.tdx.seamcall(lp, rax, Registers(**registers))

    def call(self, lp: int, leaf: int, version: int = 0, **registers: int) -> int:
        """Make a call and look at RAX only."""
        return VMFAILINVALID if self.module is None else self.result(lp, leaf, version, **registers).rax

    def rd(self, field_id: int, lp: int = 0) -> int:
        """SYS.RD that has to succeed."""
        result = self.result(lp, TdhLeaf.TDH_SYS_RD, rdx=field_id)
        assert result.rax == 0
        return result.out["r8"]

    # TDs

    def new_td(self, hkid: int = 33, max_vcpus: int = 4) -> TdHandle:
        """A TD after MNG.INIT."""
        return create_td(self.tdx, hkid=hkid, pages=self.pages, scratch_pa=SCRATCH, max_vcpus=max_vcpus)

    def add_vcpu(self, td: TdHandle, lp: int = 0) -> TdHandle:
        """One more vCPU, bound to `lp`."""
        return add_vcpu(self.tdx, td, pages=self.pages, lp=lp)

    def add_page(self, td: TdHandle, gpa: int = 0) -> TdHandle:
        """One more measured page."""
        return add_page(self.tdx, td, pages=self.pages, gpa=gpa, source_pa=SCRATCH)

    def td(self, hkid: int = 33, vcpus: int = 1, associate: tuple[int | None, ...] = ()) -> TdHandle:
        """A TD that can run."""
        return born_finalized(
            self.tdx, hkid=hkid, pages=self.pages, scratch_pa=SCRATCH, vcpus=vcpus, associate=associate
        )

    def enter(self, lp: int, tdvpr: int) -> int:
        """VP.ENTER; 0 if the guest runs now."""
        return self.call(lp, TdhLeaf.TDH_VP_ENTER, rcx=tdvpr)

    def run(self, lp: int, tdvpr: int, units: int = 1) -> Result:
        """VP.ENTER, some guest work, TDVMCALL."""
        assert self.enter(lp, tdvpr) == 0
        self.tdx.guest_step(lp, units)
        return self.tdx.td_exit(lp, ExitReason.TDCALL, ExitInfo())

    def flush(self, lp: int, tdvpr: int) -> int:
        """VP.FLUSH."""
        return self.call(lp, TdhLeaf.TDH_VP_FLUSH, rcx=tdvpr)

    def teardown(self, td: TdHandle, keep_tdr: bool = False) -> None:
        """Key id release and page reclaim, as KVM does when a VM is destroyed."""
        for tdvpr in td.vcpus:
            holder = self.tdx.tds.vcpus[tdvpr].assoc_lpid
            if holder in self.platform.pkg_of_lp:
                assert self.flush(holder, tdvpr) == 0
        assert self.call(0, TdhLeaf.TDH_MNG_VPFLUSHDONE, rcx=td.tdr) == 0
        for lp in self.platform.first_lps():
            assert self.call(lp, TdhLeaf.TDH_PHYMEM_CACHE_WB) == 0
        assert self.call(0, TdhLeaf.TDH_MNG_KEY_FREEID, rcx=td.tdr) == 0
        for page in td.children if keep_tdr else (*td.children, td.tdr):
            assert self.call(0, TdhLeaf.TDH_PHYMEM_PAGE_RECLAIM, rcx=page) == 0

    # Updates

    def shutdown(self, rcx: int | None = None, lp: int = 0) -> int:
        """SYS.SHUTDOWN with the running module's own handoff version, as Linux does."""
        return self.call(lp, TdhLeaf.TDH_SYS_SHUTDOWN, rcx=self.tdx.identity.module_hv if rcx is None else rcx)

    def install(self, identity: ModuleIdentity, **changes: Any) -> None:
        """P-SEAMLDR's update scenario: another module in the same memory, TD memory untouched."""
        changes.setdefault("seamdb_index", self.platform.seamdb_index + 1)
        self.platform = msgspec.structs.replace(self.platform, **changes)
        self.module = TdxModule(identity, self.platform, self.memory, tds=self.tdx.tds, hooks=self.hooks)

    def install_cold(self, identity: ModuleIdentity) -> None:
        """P-SEAMLDR's load scenario: the handoff area is wiped too."""
        self.memory.write(HANDOFF, bytes(14 * 4096))
        self.install(identity)

    def update(self, identity: ModuleIdentity, version: int = 0, r9: int = 0) -> None:
        """A whole update that has to succeed, with all its invariants."""
        before = Snapshot(self)
        assert self.shutdown() == 0
        self.install(identity)
        init_lps(self.tdx)
        assert self.call(0, TdhLeaf.TDH_SYS_UPDATE, version, r9=r9) == 0
        assert_update_invariants(before, self)


class Snapshot:
    """What an update has to preserve."""

    def __init__(self, host: Host) -> None:
        system = host.tdx.state.system
        self.kot = copy.deepcopy(system.kot)
        self.wbt = copy.deepcopy(system.wbt)
        self.tdmrs = copy.deepcopy(system.tdmrs)
        self.globals = (system.global_hkid, system.pkg_config_bitmap)
        self.tds: TdMemory = copy.deepcopy(host.tdx.tds)
        self.page_types = {pa: host.tdx.page_type(pa) for pages in self.tds.pages.values() for pa in pages.entries}
        self.seamdb_index = system.seamdb_index
        self.td_build_count = system.td_build_count
        self.profile = host.tdx.identity.profile


def assert_update_invariants(before: Snapshot, host: Host) -> None:
    """Keys, pages, TDs and vCPUs are as before; the module is another one, ready, and holds no lock."""
    module = host.tdx
    system = module.state.system
    assert system.kot == before.kot
    assert {hkid for hkid, entry in system.kot.items() if entry.state == KotState.FREE} == set()
    assert (system.wbt, system.tdmrs) == (before.wbt, before.tdmrs)
    assert (system.global_hkid, system.pkg_config_bitmap) == before.globals
    assert module.tds == before.tds
    assert {pa: module.page_type(pa) for pa in before.page_types} == before.page_types
    assert system.sys_state == SysState.SYS_READY
    assert system.seamdb_index != before.seamdb_index
    assert system.td_build_count == (before.td_build_count if before.profile == "B" else 0)
    assert host.rd(HANDOFF_DATA_VALID) == 0
    assert_no_locks(module)


def assert_no_locks(module: TdxModule) -> None:
    """Nobody holds any lock of the module."""
    system = module.state.system
    locks = [system.global_lock, system.kot_lock, *(wbt.mutex for wbt in system.wbt)]
    locks += [tdmr.mutex for tdmr in system.tdmrs]
    for td in module.tds.tds.values():
        locks += [td.page_lock, td.op_state_lock, td.epoch_lock, td.sept_lock]
    locks += [vcpu.page_lock for vcpu in module.tds.vcpus.values()]
    assert all(lock.free for lock in locks)
