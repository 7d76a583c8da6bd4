"""TDH.PHYMEM.PAMT.ADD and REMOVE: with dynamic PAMT the entries of 4 KiB pages get their memory in pairs of pages.

Source: Intel TDX module, `src/vmm_dispatcher/api_calls/tdh_phymem_pamt_{add,remove}.c`.
"""

from __future__ import annotations

from seamldr.tdx_call import Call, Refused, operand_busy, operand_invalid
from seamldr.tdx_context import ModuleContext
from seamldr.tdx_state import PAMT_RANGE, PageType
from seamldr.tdx_status import OperandId, TdxStatus

LEVEL_2M = 1


def _check_range(m: ModuleContext, c: Call) -> int:
    """Base of the 2 MiB range that RCX names."""
    if not m.state.system.dynamic_pamt:
        raise operand_invalid(OperandId.RAX)
    base = c.regs.rcx & ~0xFFF
    if c.regs.rcx & 0xFFF != LEVEL_2M or base % PAMT_RANGE or base >> m.platform.pa_bits:
        raise operand_invalid(OperandId.RCX)
    return base


def _lock(m: ModuleContext, c: Call, base: int) -> None:
    """The lock of the range's PAMT entry."""
    m.check_private_pa(base, OperandId.RCX)
    c.lock(m.page_lock(base), operand_busy(OperandId.RCX), exclusive=True)


def phymem_pamt_add(m: ModuleContext, c: Call) -> int:
    """TDH.PHYMEM.PAMT.ADD: the pages RDX and R8 hold the PAMT entries of the range RCX from now on."""
    base = _check_range(m, c)
    pages = ((c.regs.rdx, OperandId.RDX), (c.regs.r8, OperandId.R8))
    for pa, operand in pages:
        m.check_private_pa(pa, operand)
    _lock(m, c, base)
    pairs = m.tds.pamt.pairs
    if base in pairs or m.page_type(base) == PageType.PT_REG:
        raise Refused(TdxStatus.TDX_HPA_RANGE_NOT_FREE | OperandId.RCX)
    for pa, operand in pages:
        if m.page_type(pa) != PageType.PT_NDA or (operand is OperandId.R8 and pa == c.regs.rdx):
            raise Refused(TdxStatus.TDX_PAGE_NOT_FREE | operand)
    pairs[base] = (c.regs.rdx, c.regs.r8)
    m.dirty.add("pamt")
    return TdxStatus.TDX_SUCCESS


def phymem_pamt_remove(m: ModuleContext, c: Call) -> int:
    """TDH.PHYMEM.PAMT.REMOVE: the two pages of a range in which no page is used come back in RDX and R8."""
    base = _check_range(m, c)
    _lock(m, c, base)
    pair = m.tds.pamt.pairs.get(base)
    if pair is None:
        raise Refused(TdxStatus.TDX_NO_PAMT_PAGE_PAIR | OperandId.RCX)
    used = [pa for pa in range(base, base + PAMT_RANGE, 4096) if m.page(pa) is not None]
    if used:
        half = (used[0] - base) // (PAMT_RANGE // 2)
        raise Refused(TdxStatus.TDX_PAMT_PAGE_NOT_EMPTY | half)
    del m.tds.pamt.pairs[base]
    m.dirty.add("pamt")
    c.out = {"rdx": pair[0], "r8": pair[1]}
    return TdxStatus.TDX_SUCCESS
