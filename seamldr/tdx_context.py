"""What all leaves share: the module's state, and the checks of operands, in the module's order.

A leaf is a function of (ModuleContext, Call) that returns a status.
"""

from __future__ import annotations

from collections.abc import Collection

from bus.memory import PhysicalMemory
from seamldr.identity import ModuleIdentity
from seamldr.tdx_call import Call, Hooks, ModuleDead, Refused, operand_busy, operand_invalid
from seamldr.tdx_locks import Lock
from seamldr.tdx_platform import ModulePlatform
from seamldr.tdx_state import (
    NO_LP,
    NO_PA,
    PAGE_SIZE,
    PAMT_RANGE,
    TDMR_GRANULE,
    KotEntry,
    KotState,
    LifeCycle,
    LpData,
    ModuleState,
    OpState,
    PageData,
    PageType,
    SysState,
    TdData,
    TdMemory,
    TdPages,
    VcpuData,
    VcpuState,
    WbtEntry,
)
from seamldr.tdx_status import OperandId, TdxStatus

TDVPS_BASE_PAGES = 6
MAX_LEAF_LEVEL = 2


class ModuleContext:
    """The module's state with the lookups and checks that leaves are made of."""

    def __init__(
        self,
        identity: ModuleIdentity,
        platform: ModulePlatform,
        memory: PhysicalMemory,
        state: ModuleState | None = None,
        tds: TdMemory | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.identity = identity
        self.platform = platform
        self.memory = memory
        self.state = state if state is not None else ModuleState()
        self.tds = tds if tds is not None else TdMemory()
        self.hooks = hooks if hooks is not None else Hooks()
        self.dirty: set[str] = set()
        self._page_locks: dict[int, Lock] = {}
        self._owners: dict[int, int] = {}
        self.index_pages()
        system = self.state.system
        if not system.wbt:
            system.wbt = [WbtEntry() for _ in range(platform.num_pkgs)]
        for lp in platform.pkg_of_lp:
            self.state.lps.setdefault(lp, LpData())

    # Properties of the build

    @property
    def profile_b(self) -> bool:
        """True if this build has handoff version 1 and update compatibility checks."""
        return self.identity.profile == "B"

    @property
    def tdcs_base_pages(self) -> int:
        """TDCX pages that a TD needs before MNG.INIT."""
        return 6 if self.identity.major < 2 else 9

    # Records that changed since somebody last cleared `dirty`

    def touch_system(self) -> None:
        """Globals, KOT, WBT or TDMRs changed."""
        self.dirty.add("system")

    def touch_lp(self, lp: int) -> None:
        """Data of `lp` changed."""
        self.dirty.add(f"lp:{lp}")

    def touch_td(self, td: TdData) -> None:
        """TDR or TDCS changed."""
        self.dirty.add(f"td:{td.tdr:x}")

    def touch_vcpu(self, vcpu: VcpuData) -> None:
        """TDVPS changed."""
        self.dirty.add(f"vcpu:{vcpu.tdvpr:x}")

    # Pages

    def index_pages(self) -> None:
        """Build the reverse map from page to owner again, after records were put in place from outside."""
        self._owners = {pa: tdr for tdr, pages in self.tds.pages.items() for pa in pages.entries}

    def page(self, pa: int) -> PageData | None:
        """PAMT entry of the page at `pa`; None if no TD owns it."""
        owner = self._owners.get(pa)
        return None if owner is None else self.tds.pages[owner].entries[pa]

    def owner_of(self, pa: int) -> TdData:
        """The TD that owns the page at `pa`. Raises KeyError if none does."""
        return self.tds.tds[self._owners[pa]]

    def page_type(self, pa: int) -> PageType:
        """PAMT.PT of the page at `pa`, which must lie in a TDMR."""
        for level in range(MAX_LEAF_LEVEL + 1):
            page = self.page(pa & -(PAGE_SIZE << 9 * level))
            if page is not None and (level == 0 or (page.type == PageType.PT_REG and page.level >= level)):
                return page.type
        if self.tds.pamt.taken(pa):
            return PageType.PT_RSVD
        for tdmr in self.state.system.tdmrs:
            for offset, size in tdmr.reserved:
                if tdmr.base + offset <= pa < tdmr.base + offset + size:
                    return PageType.PT_RSVD
        return PageType.PT_NDA

    def give_page(self, td: TdData, pa: int, page: PageData) -> None:
        """Make the page at `pa` one of `td`'s; all but the TDR count as its children."""
        self.tds.pages.setdefault(td.tdr, TdPages()).entries[pa] = page
        self._owners[pa] = td.tdr
        td.chldcnt += page.children
        self.touch_td(td)
        self.dirty.add(f"pages:{td.tdr:x}")

    def take_page(self, pa: int) -> None:
        """Make the page at `pa` free, with the record that lives in it."""
        tdr = self._owners.pop(pa)
        page = self.tds.pages[tdr].entries.pop(pa)
        self.dirty |= {f"pages:{tdr:x}", f"td:{tdr:x}"}
        if page.type == PageType.PT_TDR:
            del self.tds.tds[tdr]
            for rest in self.tds.pages.pop(tdr).entries:
                del self._owners[rest]
                self._drop_vcpu(rest)
            return
        self.tds.tds[tdr].chldcnt -= page.children
        self._drop_vcpu(pa)

    def _drop_vcpu(self, pa: int) -> None:
        if self.tds.vcpus.pop(pa, None) is not None:
            self.dirty.add(f"vcpu:{pa:x}")

    def forget_pages(self, start: int, end: int) -> None:
        """PAMT entries of [start, end) are initialised: whatever TD had pages there has lost them."""
        for pa in [pa for pa in self._owners if start <= pa < end]:
            if pa in self._owners:
                self.take_page(pa)
        pairs = self.tds.pamt.pairs
        for base in [base for base in pairs if start <= base < end]:
            del pairs[base]
            self.dirty.add("pamt")

    def in_tdmr(self, pa: int) -> bool:
        """True if `pa` lies in an initialised part of a TDMR."""
        return any(
            tdmr.base <= pa < tdmr.base + tdmr.initialized // TDMR_GRANULE * TDMR_GRANULE
            for tdmr in self.state.system.tdmrs
        )

    def page_lock(self, pa: int) -> Lock:
        """The try-lock in the PAMT entry of the page at `pa`."""
        if (td := self.tds.tds.get(pa)) is not None:
            return td.page_lock
        if (vcpu := self.tds.vcpus.get(pa)) is not None:
            return vcpu.page_lock
        return self._page_locks.setdefault(pa, Lock())

    def drop_free_page_locks(self) -> None:
        """Forget page locks that nobody holds; called at the end of each call."""
        if self._page_locks:
            self._page_locks = {pa: lock for pa, lock in self._page_locks.items() if not lock.free}

    # Operand checks, in the order of the module

    def check_private_pa(self, pa: int, operand: OperandId) -> None:
        """Page operand: 4 KiB aligned, no key id bits, inside an initialised TDMR."""
        if pa % PAGE_SIZE or pa >> self.platform.pa_bits:
            raise operand_invalid(operand)
        if not self.in_tdmr(pa):
            raise Refused(TdxStatus.TDX_OPERAND_ADDR_RANGE_ERROR | operand)

    def check_shared_pa(self, pa: int, alignment: int, operand: OperandId) -> int:
        """Buffer operand: aligned, shared key id, outside the SEAM range. Returns the address without its key id."""
        plain, hkid = self.platform.split(pa) or (0, self.platform.first_private_hkid)
        in_seam = self.platform.seam_base <= plain < self.platform.seam_base + self.platform.seam_size
        if pa % alignment or in_seam or self.platform.is_private_hkid(hkid):
            raise operand_invalid(operand)
        return plain

    def lock_page(self, call: Call, pa: int, operand: OperandId, expected: PageType, *, exclusive: bool) -> None:
        """The generic checks of an explicit page operand: address, lock, type."""
        self.check_private_pa(pa, operand)
        call.lock(self.page_lock(pa), operand_busy(operand), exclusive=exclusive)
        if self.page_type(pa) != expected:
            raise Refused(TdxStatus.TDX_PAGE_METADATA_INCORRECT | operand)
        if expected == PageType.PT_NDA and not self._has_pamt(pa):
            raise Refused(TdxStatus.TDX_MISSING_PAMT_PAGE_PAIR | operand)

    def _has_pamt(self, pa: int) -> bool:
        """Whether there is a PAMT entry for the 4 KiB page at `pa`."""
        return not self.state.system.dynamic_pamt or pa & -PAMT_RANGE in self.tds.pamt.pairs

    def lock_new_page(self, call: Call, pa: int, operand: OperandId) -> None:
        """A page that the leaf is going to use: it must be free."""
        self.lock_page(call, pa, operand, PageType.PT_NDA, exclusive=True)

    def lock_td(self, call: Call, pa: int, operand: OperandId, *, exclusive: bool) -> TdData:
        """The TD whose TDR page is an explicit operand."""
        self.lock_page(call, pa, operand, PageType.PT_TDR, exclusive=exclusive)
        return self.tds.tds[pa]

    def lock_vcpu(
        self, call: Call, pa: int, operand: OperandId, *, exclusive: bool, td_exclusive: bool = False
    ) -> tuple[VcpuData, TdData]:
        """The vCPU whose TDVPR page is an explicit operand, and its TD, which is locked implicitly."""
        self.lock_page(call, pa, operand, PageType.PT_TDVPR, exclusive=exclusive)
        vcpu = self.tds.vcpus[pa]
        td = self.tds.tds[vcpu.tdr]
        call.lock(td.page_lock, operand_busy(OperandId.TDR), exclusive=td_exclusive)
        return vcpu, td

    def check_td_state(self, call: Call, td: TdData, allowed: Collection[OpState], *, lock_op_state: bool) -> None:
        """Fatal flag, keys, TDCS pages and OP_STATE."""
        if td.fatal:
            raise Refused(TdxStatus.TDX_TD_FATAL)
        if td.lifecycle != LifeCycle.TD_KEYS_CONFIGURED:
            raise Refused(TdxStatus.TDX_TD_KEYS_NOT_CONFIGURED)
        if td.num_tdcx < self.tdcs_base_pages:
            raise Refused(TdxStatus.TDX_TDCS_NOT_ALLOCATED)
        if lock_op_state:
            call.lock(td.op_state_lock, operand_busy(OperandId.OP_STATE), exclusive=False)
        if td.op_state not in allowed:
            raise Refused(TdxStatus.TDX_OP_STATE_INCORRECT)

    def check_vcpu_pages(self, vcpu: VcpuData) -> None:
        """All TDVPS pages must be there."""
        if vcpu.num_tdcx < TDVPS_BASE_PAGES - 1:
            raise Refused(TdxStatus.TDX_TDCX_NUM_INCORRECT)

    # Association

    def associate(self, vcpu: VcpuData, td: TdData, lp: int, states: Collection[VcpuState]) -> None:
        """Bind the vCPU to `lp`, whose TLB and VMCS cache it may use from now on, until VP.FLUSH there."""
        if vcpu.state not in states:
            raise Refused(TdxStatus.TDX_VCPU_STATE_INCORRECT)
        if vcpu.assoc_lpid not in (NO_LP, lp):
            raise Refused(TdxStatus.TDX_VCPU_ASSOCIATED)
        if vcpu.last_seamdb_index != self.state.system.seamdb_index:  # the first time since an update
            vcpu.host_state_stale = True
            vcpu.last_seamdb_index = self.state.system.seamdb_index
            self.touch_vcpu(vcpu)
        if vcpu.assoc_lpid == NO_LP:
            self.bind(vcpu, td, lp)

    def bind(self, vcpu: VcpuData, td: TdData, lp: int) -> None:
        """Bind a vCPU that no LP holds."""
        vcpu.assoc_lpid = lp
        vcpu.host_state_stale = True
        td.num_assoc_vcpus += 1
        self.touch_vcpu(vcpu)
        self.touch_td(td)

    # Key ids, entropy, assertions

    def kot_entry(self, hkid: int) -> KotEntry:
        """The KOT entry of a private key id; what was never used is FREE."""
        return self.state.system.kot.get(hkid) or KotEntry(KotState.FREE)

    def lock_kot(self, call: Call, *, exclusive: bool) -> None:
        """The lock of the whole KOT."""
        call.lock(self.state.system.kot_lock, operand_busy(OperandId.KOT), exclusive=exclusive)

    def lock_global(self, call: Call, *, exclusive: bool) -> None:
        """The lock of the SYS leaves."""
        call.lock(self.state.system.global_lock, Refused(TdxStatus.TDX_SYS_BUSY), exclusive=exclusive)

    def need_entropy(self, call: Call) -> None:
        """TDX_RND_NO_ENTROPY if the random number generator runs dry."""
        if not self.hooks.entropy(call.lp):
            raise Refused(TdxStatus.TDX_RND_NO_ENTROPY)

    def configure_key(self, call: Call) -> None:
        """PCONFIG on the package of the caller with a key of fresh entropy."""
        if not self.hooks.key_engine_ready(call.lp):
            raise operand_busy(OperandId.KET)
        if not self.hooks.entropy(call.lp):
            raise Refused(TdxStatus.TDX_KEY_GENERATION_FAILED)

    @property
    def all_pkgs(self) -> int:
        """Bitmap of all packages."""
        return (1 << self.platform.num_pkgs) - 1

    def forget_configuration(self) -> None:
        """Back to where an install leaves the module, but for the LPs that are inside it right now."""
        system = self.state.system
        system.kot, system.tdmrs = {}, []
        system.wbt = [WbtEntry() for _ in range(self.platform.num_pkgs)]
        system.sys_state = SysState.SYSINIT_PENDING
        system.num_init_lps = system.pkg_config_bitmap = system.td_build_count = system.mig_interrupted_count = 0
        system.dynamic_pamt = system.update_compatibility = False
        for lp, data in self.state.lps.items():
            data.is_init, data.last_tdvpr = False, NO_PA
            self.touch_lp(lp)
        self.touch_system()
        self.dirty.add("pamt")

    def assert_alive(self) -> None:
        """Raises ModuleDead after `die`."""
        if self.state.system.dead:
            raise ModuleDead("the TDX module has failed an internal assertion")

    def die(self) -> None:
        """A run-time assertion fails: the module executes an undefined instruction and is gone for good."""
        self.state.system.dead = True
        self.touch_system()

    def busy_lps(self) -> int:
        """LPs that are inside the module or one of its guests."""
        return sum(lp.is_busy for lp in self.state.lps.values())

    def last_vcpu_gone(self, lp: int, tdvpr: int) -> None:
        """`lp` forgets the vCPU that it ran last, if it was this one."""
        data = self.state.lps[lp]
        if data.last_tdvpr == tdvpr:
            data.last_tdvpr = NO_PA
            self.touch_lp(lp)
