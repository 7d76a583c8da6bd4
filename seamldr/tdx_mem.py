"""TDH.MEM.*: pages of a TD, and the tracking of stale translations.

The Secure EPT is a map from page to guest-physical address; its tables (see `tdx_sept`) may be there but are not
required. Bytes of an added page are copied in physical memory. Pages are added with 4 KiB.

Source: Intel TDX module, `src/vmm_dispatcher/api_calls/tdh_mem_*.c`.
"""

from __future__ import annotations

from seamldr.tdx_call import Call, Refused, operand_busy, operand_invalid
from seamldr.tdx_context import MAX_LEAF_LEVEL, ModuleContext
from seamldr.tdx_state import PAGE_SIZE, EntryState, OpState, PageData, PageType, TdData
from seamldr.tdx_status import OperandId, TdxStatus
from seamldr.tdx_td import extend_mrtd, page_at

GPA_BITS = 47
MAX_SEPT_LEVEL = 4

_PAGE_AUG = frozenset(OpState(state) for state in (1, 2, 3, 9))
BLOCK_STATES = frozenset(OpState(state) for state in (1, 2, 3, 4, 5, 8, 9))
_TRACK = frozenset(OpState(state) for state in range(1, 10))
_BLOCKED = {
    EntryState.MAPPED: EntryState.BLOCKED,
    EntryState.PENDING: EntryState.PENDING_BLOCKED,
}
_UNBLOCKED = {blocked: state for state, blocked in _BLOCKED.items()}


def gpa_and_level(c: Call, min_level: int = 0, max_level: int = 0) -> tuple[int, int]:
    """GPA and level of RCX."""
    gpa, level = c.regs.rcx & ~0xFFF, c.regs.rcx & 0b111
    page_size = PAGE_SIZE << 9 * level
    if not min_level <= level <= max_level or c.regs.rcx & 0xFF8 or gpa >> GPA_BITS or gpa % page_size:
        raise operand_invalid(OperandId.RCX)
    return gpa, level


def find_entry(m: ModuleContext, td: TdData, gpa: int, level: int) -> tuple[int, PageData] | None:
    """The page that the Secure EPT entry for `gpa` at `level` maps: a table, or a page of the TD."""
    for pa, page in m.tds.pages[td.tdr].entries.items():
        if page.type in (PageType.PT_REG, PageType.PT_EPT) and page.gpa == gpa and page.level == level:
            return pa, page
    return None


def entry_info(page: PageData | None) -> dict[str, int]:
    """RCX: level and type of the entry; RDX: its state."""
    return {"rcx": page.level if page else 0, "rdx": page.state << 8 if page else 0}


def require_absent(m: ModuleContext, td: TdData, gpa: int, level: int = 0) -> None:
    """TDX_EPT_ENTRY_STATE_INCORRECT if the entry is in use, or a large page covers its range."""
    found = find_entry(m, td, gpa, level) or page_at(m, td, gpa)
    if found is not None and found[1].level >= level:
        raise Refused(TdxStatus.TDX_EPT_ENTRY_STATE_INCORRECT | OperandId.RCX, **entry_info(found[1]))


def mem_page_add(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.PAGE.ADD: copy a page into a TD in build; its GPA, not its content, is measured."""
    gpa, _ = gpa_and_level(c)
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=True)
    m.check_td_state(c, td, (OpState.INITIALIZED,), lock_op_state=False)
    source_pa = m.check_shared_pa(c.regs.r9, PAGE_SIZE, OperandId.R9)
    require_absent(m, td, gpa)
    m.lock_new_page(c, c.regs.r8, OperandId.R8)
    m.memory.write(c.regs.r8, m.memory.read(source_pa, PAGE_SIZE))
    m.give_page(td, c.regs.r8, PageData(PageType.PT_REG, gpa))
    extend_mrtd(m, td, b"MEM.PAGE.ADD" + gpa.to_bytes(8, "little"))
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def mem_page_aug(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.PAGE.AUG: give a TD a zeroed page that its guest has to accept."""
    gpa, _ = gpa_and_level(c)
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=False)
    m.check_td_state(c, td, _PAGE_AUG, lock_op_state=True)
    require_absent(m, td, gpa)
    m.lock_new_page(c, c.regs.r8, OperandId.R8)
    m.memory.write(c.regs.r8, bytes(PAGE_SIZE))
    m.give_page(td, c.regs.r8, PageData(PageType.PT_REG, gpa, state=EntryState.PENDING))
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def lock_entry(
    m: ModuleContext, c: Call, *, min_level: int = 0, max_level: int = MAX_LEAF_LEVEL
) -> tuple[TdData, int, PageData]:
    """The page, or table, that RCX (GPA and level) and RDX (TDR) name, under the lock of the Secure EPT."""
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=False)
    m.check_td_state(c, td, BLOCK_STATES, lock_op_state=True)
    gpa, level = gpa_and_level(c, min_level, max_level)
    c.lock(td.sept_lock, operand_busy(OperandId.SEPT_TREE), exclusive=True)
    found = find_entry(m, td, gpa, level)
    if found is None:
        raise Refused(TdxStatus.TDX_EPT_WALK_FAILED | OperandId.RCX, **entry_info(None))
    return td, *found


def _is_tracked(td: TdData, page: PageData) -> bool:
    """True if no vCPU can still hold a translation from before the page was blocked."""
    age = td.epoch - page.block_epoch
    return age > 1 or (age == 1 and td.refcount[page.block_epoch & 1] == 0)


def mem_range_block(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.RANGE.BLOCK: no new translation of the page is made."""
    td, _, page = lock_entry(m, c, max_level=MAX_SEPT_LEVEL)
    if page.state not in _BLOCKED:
        raise Refused(TdxStatus.TDX_EPT_ENTRY_STATE_INCORRECT | OperandId.RCX, **entry_info(page))
    page.state = _BLOCKED[page.state]
    page.block_epoch = td.epoch
    m.dirty.add(f"pages:{td.tdr:x}")
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def require_blocked_and_tracked(td: TdData, page: PageData) -> None:
    """The range is blocked, and no LP holds a translation from before."""
    if page.state not in _UNBLOCKED:
        raise Refused(TdxStatus.TDX_GPA_RANGE_NOT_BLOCKED | OperandId.RCX, **entry_info(page))
    if not _is_tracked(td, page):
        raise Refused(TdxStatus.TDX_TLB_TRACKING_NOT_DONE | OperandId.RCX, **entry_info(page))


def mem_range_unblock(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.RANGE.UNBLOCK: undo a block once old translations are gone."""
    td, _, page = lock_entry(m, c, max_level=MAX_SEPT_LEVEL)
    require_blocked_and_tracked(td, page)
    page.state = _UNBLOCKED[page.state]
    m.dirty.add(f"pages:{td.tdr:x}")
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def mem_page_remove(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.PAGE.REMOVE: take a blocked and tracked page away from the TD."""
    td, pa, page = lock_entry(m, c)
    if page.type != PageType.PT_REG:
        raise Refused(TdxStatus.TDX_EPT_WALK_FAILED | OperandId.RCX, **entry_info(page))
    require_blocked_and_tracked(td, page)
    m.take_page(pa)
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def mem_track(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.TRACK: start a new TLB epoch, once nobody is inside since the one before the last."""
    td = m.lock_td(c, c.regs.rcx, OperandId.RCX, exclusive=False)
    m.check_td_state(c, td, _TRACK, lock_op_state=True)
    c.lock(td.epoch_lock, operand_busy(OperandId.TD_EPOCH), exclusive=True)
    if td.refcount[(td.epoch - 1) & 1]:
        raise Refused(TdxStatus.TDX_PREVIOUS_TLB_EPOCH_BUSY)
    td.epoch += 1
    m.touch_td(td)
    return TdxStatus.TDX_SUCCESS
