"""TDH.PHYMEM.*: cache write-back by key id, and pages on their way back to the host.

Source: Intel TDX module, `src/vmm_dispatcher/api_calls/tdh_phymem_*.c`.
"""

from __future__ import annotations

from seamldr.tdx_call import Call, Refused, operand_busy, operand_invalid
from seamldr.tdx_context import ModuleContext
from seamldr.tdx_state import KotState, LifeCycle, PageType
from seamldr.tdx_status import OperandId, TdxStatus

WB_BLOCKS = 4  # pieces of a package's caches; host interrupts are looked for between them


def phymem_cache_wb(m: ModuleContext, c: Call) -> int:
    """TDH.PHYMEM.CACHE.WB: write back the caller's package for all FLUSHED key ids; may be interrupted and resumed."""
    resume = c.regs.rcx
    if resume > 1:
        raise operand_invalid(OperandId.RCX)
    wbt = m.state.system.wbt[m.platform.pkg_of_lp[c.lp]]
    c.lock(wbt.mutex, operand_busy(OperandId.WBCACHE), exclusive=True)
    m.lock_kot(c, exclusive=False)
    if resume:
        if not wbt.resume_block:
            raise Refused(TdxStatus.TDX_WBCACHE_RESUME_ERROR)
        block = wbt.resume_block
    else:
        wbt.hkids = [hkid for hkid, entry in m.state.system.kot.items() if entry.state == KotState.FLUSHED]
        wbt.resume_block = block = 0
        m.touch_system()
        if not wbt.hkids:
            raise Refused(TdxStatus.TDX_NO_HKID_READY_TO_WBCACHE)
    m.touch_system()
    for done in range(block + 1, WB_BLOCKS):
        if m.hooks.interrupt_pending(c.lp):
            wbt.resume_block = done
            raise Refused(TdxStatus.TDX_INTERRUPTED_RESUMABLE)
    _package_is_clean(m, c)
    return TdxStatus.TDX_SUCCESS


def _package_is_clean(m: ModuleContext, c: Call) -> None:
    pkg = m.platform.pkg_of_lp[c.lp]
    wbt = m.state.system.wbt[pkg]
    for hkid in wbt.hkids:
        entry = m.state.system.kot.get(hkid)
        if entry is not None and entry.state == KotState.FLUSHED:
            entry.wb_bitmap &= ~(1 << pkg)
    wbt.resume_block = 0
    wbt.hkids = []


def phymem_page_reclaim(m: ModuleContext, c: Call) -> int:
    """TDH.PHYMEM.PAGE.RECLAIM: a page of a TD in teardown becomes free; RCX type, RDX owner, R8 level."""
    pa = c.regs.rcx
    m.check_private_pa(pa, OperandId.RCX)
    c.lock(m.page_lock(pa), operand_busy(OperandId.RCX), exclusive=True)
    page = m.page(pa)
    if page is None:
        raise Refused(TdxStatus.TDX_PAGE_METADATA_INCORRECT | OperandId.RCX)
    td = m.owner_of(pa)
    if page.type != PageType.PT_TDR:
        c.lock(td.page_lock, operand_busy(OperandId.TDR), exclusive=False)
    if td.lifecycle != LifeCycle.TD_TEARDOWN:
        raise Refused(TdxStatus.TDX_LIFECYCLE_STATE_INCORRECT)
    if page.type == PageType.PT_TDR and td.chldcnt:
        raise Refused(TdxStatus.TDX_TD_ASSOCIATED_PAGES_EXIST)
    m.take_page(pa)
    level = page.level if page.type == PageType.PT_REG else 0
    c.out = {"rcx": page.type, "rdx": td.tdr, "r8": level, "r9": 0, "r10": 0, "r11": 0}
    return TdxStatus.TDX_SUCCESS


def phymem_page_rdmd(m: ModuleContext, c: Call) -> int:
    """TDH.PHYMEM.PAGE.RDMD: PAMT entry of a page: RCX type, RDX owner, R8 level."""
    pa = c.regs.rcx
    m.check_private_pa(pa, OperandId.RCX)
    c.lock(m.page_lock(pa), operand_busy(OperandId.RCX), exclusive=False)
    page = m.page(pa)
    owner = m.owner_of(pa).tdr if page is not None else 0
    level = page.level if page is not None and page.type == PageType.PT_REG else 0
    c.out = {"rcx": m.page_type(pa), "rdx": owner, "r8": level, "r9": 0, "r10": 0, "r11": 0}
    return TdxStatus.TDX_SUCCESS


def phymem_page_wbinvd(m: ModuleContext, c: Call) -> int:
    """TDH.PHYMEM.PAGE.WBINVD: write back the cache lines of a free page under the key id in its address."""
    parts = m.platform.split(c.regs.rcx)
    if parts is None:
        raise operand_invalid(OperandId.RCX)
    pa, _ = parts
    m.check_private_pa(pa, OperandId.RCX)
    if m.page_type(pa) != PageType.PT_NDA:
        raise Refused(TdxStatus.TDX_PAGE_METADATA_INCORRECT | OperandId.RCX)
    return TdxStatus.TDX_SUCCESS
