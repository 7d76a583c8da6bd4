"""TDH.MEM.*: pages of a TD, and the tracking of stale translations.

The Secure EPT is a map from page to guest-physical address; parent tables may be added (SEPT.ADD) but are not
required. Bytes of an added page are copied in physical memory. Only 4 KiB pages are mapped.

Source: Intel TDX module, `src/vmm_dispatcher/api_calls/tdh_mem_*.c`.
"""

from __future__ import annotations

from seamldr.tdx_call import Call, Refused, operand_busy, operand_invalid
from seamldr.tdx_context import ModuleContext
from seamldr.tdx_state import PAGE_SIZE, EntryState, OpState, PageData, PageType, TdData
from seamldr.tdx_status import OperandId, TdxStatus
from seamldr.tdx_td import extend_mrtd

GPA_BITS = 47
MAX_SEPT_LEVEL = 4

_SEPT_ADD = frozenset(OpState(state) for state in (1, 2, 3, 6, 7, 8, 9))
_PAGE_AUG = frozenset(OpState(state) for state in (1, 2, 3, 9))
_BLOCK = frozenset(OpState(state) for state in (1, 2, 3, 4, 5, 8, 9))
_TRACK = frozenset(OpState(state) for state in range(1, 10))
_BLOCKED = {
    EntryState.MAPPED: EntryState.BLOCKED,
    EntryState.PENDING: EntryState.PENDING_BLOCKED,
}
_UNBLOCKED = {blocked: state for state, blocked in _BLOCKED.items()}


def _gpa(c: Call, max_level: int = 0) -> tuple[int, int]:
    """GPA and level of RCX."""
    gpa, level = c.regs.rcx & ~0xFFF, c.regs.rcx & 0b111
    page_size = PAGE_SIZE << 9 * level
    if level > max_level or c.regs.rcx & 0xFF8 or gpa >> GPA_BITS or gpa % page_size:
        raise operand_invalid(OperandId.RCX)
    return gpa, level


def _find(m: ModuleContext, td: TdData, gpa: int, level: int, kind: PageType) -> tuple[int, PageData] | None:
    for pa, page in m.tds.pages[td.tdr].entries.items():
        if page.type == kind and page.gpa == gpa and page.level == level:
            return pa, page
    return None


def _entry_info(page: PageData | None) -> dict[str, int]:
    """RCX: level and type of the entry; RDX: its state."""
    return {"rcx": page.level if page else 0, "rdx": page.state << 8 if page else 0}


def _require_absent(m: ModuleContext, td: TdData, gpa: int, level: int, kind: PageType) -> None:
    found = _find(m, td, gpa, level, kind)
    if found is not None:
        raise Refused(TdxStatus.TDX_EPT_ENTRY_STATE_INCORRECT | OperandId.RCX, **_entry_info(found[1]))


def mem_sept_add(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.SEPT.ADD: a free page becomes a table of the Secure EPT."""
    if c.version > 1:
        raise operand_invalid(OperandId.RAX)
    gpa, level = _gpa(c, MAX_SEPT_LEVEL)
    if level == 0:
        raise operand_invalid(OperandId.RCX)
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=False)
    m.check_td_state(c, td, _SEPT_ADD, lock_op_state=True)
    _require_absent(m, td, gpa, level, PageType.PT_EPT)
    m.lock_new_page(c, c.regs.r8, OperandId.R8)
    m.give_page(td, c.regs.r8, PageData(PageType.PT_EPT, gpa, level))
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def mem_page_add(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.PAGE.ADD: copy a page into a TD in build; its GPA, not its content, is measured."""
    gpa, _ = _gpa(c)
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=True)
    m.check_td_state(c, td, (OpState.INITIALIZED,), lock_op_state=False)
    source_pa = m.check_shared_pa(c.regs.r9, PAGE_SIZE, OperandId.R9)
    _require_absent(m, td, gpa, 0, PageType.PT_REG)
    m.lock_new_page(c, c.regs.r8, OperandId.R8)
    m.memory.write(c.regs.r8, m.memory.read(source_pa, PAGE_SIZE))
    m.give_page(td, c.regs.r8, PageData(PageType.PT_REG, gpa))
    extend_mrtd(m, td, b"MEM.PAGE.ADD" + gpa.to_bytes(8, "little"))
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def mem_page_aug(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.PAGE.AUG: give a TD a zeroed page that its guest has to accept."""
    gpa, _ = _gpa(c)
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=False)
    m.check_td_state(c, td, _PAGE_AUG, lock_op_state=True)
    _require_absent(m, td, gpa, 0, PageType.PT_REG)
    m.lock_new_page(c, c.regs.r8, OperandId.R8)
    m.memory.write(c.regs.r8, bytes(PAGE_SIZE))
    m.give_page(td, c.regs.r8, PageData(PageType.PT_REG, gpa, state=EntryState.PENDING))
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def _lock_entry(m: ModuleContext, c: Call) -> tuple[TdData, int, PageData]:
    """The mapped page that RCX (GPA) and RDX (TDR) name."""
    gpa, level = _gpa(c)
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=False)
    m.check_td_state(c, td, _BLOCK, lock_op_state=True)
    c.lock(td.sept_lock, operand_busy(OperandId.SEPT_TREE), exclusive=True)
    found = _find(m, td, gpa, level, PageType.PT_REG)
    if found is None:
        raise Refused(TdxStatus.TDX_EPT_WALK_FAILED | OperandId.RCX, **_entry_info(None))
    return td, *found


def _is_tracked(td: TdData, page: PageData) -> bool:
    """True if no vCPU can still hold a translation from before the page was blocked."""
    age = td.epoch - page.block_epoch
    return age > 1 or (age == 1 and td.refcount[page.block_epoch & 1] == 0)


def mem_range_block(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.RANGE.BLOCK: no new translation of the page is made."""
    td, _, page = _lock_entry(m, c)
    if page.state not in _BLOCKED:
        raise Refused(TdxStatus.TDX_EPT_ENTRY_STATE_INCORRECT | OperandId.RCX, **_entry_info(page))
    page.state = _BLOCKED[page.state]
    page.block_epoch = td.epoch
    m.dirty.add(f"pages:{td.tdr:x}")
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def _require_blocked_and_tracked(td: TdData, page: PageData) -> None:
    if page.state not in _UNBLOCKED:
        raise Refused(TdxStatus.TDX_GPA_RANGE_NOT_BLOCKED, **_entry_info(page))
    if not _is_tracked(td, page):
        raise Refused(TdxStatus.TDX_TLB_TRACKING_NOT_DONE, **_entry_info(page))


def mem_range_unblock(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.RANGE.UNBLOCK: undo a block once old translations are gone."""
    td, _, page = _lock_entry(m, c)
    _require_blocked_and_tracked(td, page)
    page.state = _UNBLOCKED[page.state]
    m.dirty.add(f"pages:{td.tdr:x}")
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def mem_page_remove(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.PAGE.REMOVE: take a blocked and tracked page away from the TD."""
    td, pa, page = _lock_entry(m, c)
    _require_blocked_and_tracked(td, page)
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
