"""TDH.MEM.SEPT.ADD and REMOVE, TDH.MEM.PAGE.PROMOTE: tables of the Secure EPT, and large pages made of small ones.

Source: Intel TDX module, `src/vmm_dispatcher/api_calls/{tdh_mem_sept_add,tdh_mem_sept_remove,tdh_mem_page_promote}.c`.
"""

from __future__ import annotations

from seamldr.tdx_call import Call, Refused, operand_busy, operand_invalid
from seamldr.tdx_context import MAX_LEAF_LEVEL, ModuleContext
from seamldr.tdx_mem import (
    MAX_SEPT_LEVEL,
    entry_info,
    gpa_and_level,
    lock_entry,
    require_absent,
    require_blocked_and_tracked,
)
from seamldr.tdx_state import EntryState, OpState, PageData, PageType, TdData
from seamldr.tdx_status import OperandId, TdxStatus

ENTRIES = 512
"""Entries of a table."""

_SEPT_ADD = frozenset(OpState(state) for state in (1, 2, 3, 6, 7, 8, 9))


def mem_sept_add(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.SEPT.ADD: a free page becomes a table of the Secure EPT."""
    if c.version > 1:
        raise operand_invalid(OperandId.RAX)
    gpa, level = gpa_and_level(c, 1, MAX_SEPT_LEVEL)
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=False)
    m.check_td_state(c, td, _SEPT_ADD, lock_op_state=True)
    require_absent(m, td, gpa, level)
    m.lock_new_page(c, c.regs.r8, OperandId.R8)
    m.give_page(td, c.regs.r8, PageData(PageType.PT_EPT, gpa, level))
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def _lock_table(m: ModuleContext, c: Call, max_level: int) -> tuple[TdData, int, PageData]:
    """The table that RCX and RDX name: blocked, tracked, its page locked."""
    if c.version > 1:
        raise operand_invalid(OperandId.RAX)
    td, pa, table = lock_entry(m, c, min_level=1, max_level=max_level)
    if table.type != PageType.PT_EPT:
        raise Refused(TdxStatus.TDX_EPT_ENTRY_LEAF | OperandId.RCX, **entry_info(table))
    if table.state is EntryState.BLOCKED:
        c.lock(m.page_lock(pa), operand_busy(OperandId.RCX), exclusive=True)
    require_blocked_and_tracked(td, table)
    return td, pa, table


def _children(m: ModuleContext, td: TdData, table: PageData) -> list[tuple[int, PageData]]:
    """What the entries of a table map, by address: pages and tables of the level below, and pages below those."""
    inside = [
        (pa, page)
        for pa, page in m.tds.pages[td.tdr].entries.items()
        if page.type in (PageType.PT_REG, PageType.PT_EPT)
        and page.level < table.level
        and table.gpa <= page.gpa < table.gpa + table.range
    ]
    return sorted(inside, key=lambda child: child[1].gpa)


def mem_sept_remove(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.SEPT.REMOVE: take an empty, blocked and tracked table away; RCX its address."""
    td, pa, table = _lock_table(m, c, MAX_SEPT_LEVEL)
    if _children(m, td, table):
        raise Refused(TdxStatus.TDX_EPT_ENTRY_NOT_FREE | OperandId.RCX, **entry_info(table))
    m.take_page(pa)
    c.out = {"rcx": pa, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def mem_page_promote(m: ModuleContext, c: Call) -> int:
    """TDH.MEM.PAGE.PROMOTE: 512 pages behind a blocked and tracked table become one; RCX the table, now free."""
    td, pa, table = _lock_table(m, c, MAX_LEAF_LEVEL)
    children = _children(m, td, table)
    if not _may_merge(table, children):
        raise Refused(TdxStatus.TDX_EPT_INVALID_PROMOTE_CONDITIONS | OperandId.RCX, **entry_info(table))
    m.take_page(pa)
    for small, _ in children:
        m.take_page(small)
    m.give_page(td, children[0][0], PageData(PageType.PT_REG, table.gpa, table.level))
    c.out = {"rcx": pa, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def _may_merge(table: PageData, children: list[tuple[int, PageData]]) -> bool:
    """All entries map pages that the guest has accepted, and these make one aligned range of physical memory."""
    if len(children) != ENTRIES or children[0][0] % table.range:
        return False
    first = children[0][0]
    return all(
        page.type == PageType.PT_REG
        and page.level == table.level - 1
        and page.state == EntryState.MAPPED
        and pa - first == page.gpa - table.gpa
        for pa, page in children
    )
