"""Leaf numbers of the TDX module's host interface (SEAMCALL with bit 63 of RAX clear) and how RAX is taken apart.

Source: Intel TDX module, `include/tdx_api_defs.h` and `src/vmm_dispatcher/tdx_vmm_dispatcher.c`.
"""

from __future__ import annotations

import enum

LEAF_MASK = 0xFFFF
VERSION_SHIFT = 16
VERSION_MASK = 0xFF
RESERVED_MASK = 0xFFFF_FFFF_FF00_0000
SEAMLDR_LEAF_BIT = 1 << 63


class TdhLeaf(enum.IntEnum):
    """TDH.* leaves; the name is the document's with dots as underscores."""

    TDH_VP_ENTER = 0
    TDH_MNG_ADDCX = 1
    TDH_MEM_PAGE_ADD = 2
    TDH_MEM_SEPT_ADD = 3
    TDH_VP_ADDCX = 4
    TDH_MEM_PAGE_AUG = 6
    TDH_MEM_RANGE_BLOCK = 7
    TDH_MNG_KEY_CONFIG = 8
    TDH_MNG_CREATE = 9
    TDH_VP_CREATE = 10
    TDH_MNG_RD = 11
    TDH_MNG_WR = 13
    TDH_MR_EXTEND = 16
    TDH_MR_FINALIZE = 17
    TDH_VP_FLUSH = 18
    TDH_MNG_VPFLUSHDONE = 19
    TDH_MNG_KEY_FREEID = 20
    TDH_MNG_INIT = 21
    TDH_VP_INIT = 22
    TDH_MEM_PAGE_PROMOTE = 23
    TDH_PHYMEM_PAGE_RDMD = 24
    TDH_VP_RD = 26
    TDH_MNG_KEY_RECLAIMID = 27
    TDH_PHYMEM_PAGE_RECLAIM = 28
    TDH_MEM_PAGE_REMOVE = 29
    TDH_MEM_SEPT_REMOVE = 30
    TDH_SYS_KEY_CONFIG = 31
    TDH_SYS_INFO = 32
    TDH_SYS_INIT = 33
    TDH_SYS_RD = 34
    TDH_SYS_LP_INIT = 35
    TDH_SYS_TDMR_INIT = 36
    TDH_SYS_RDALL = 37
    TDH_MEM_TRACK = 38
    TDH_MEM_RANGE_UNBLOCK = 39
    TDH_PHYMEM_CACHE_WB = 40
    TDH_PHYMEM_PAGE_WBINVD = 41
    TDH_VP_WR = 43
    TDH_SYS_LP_SHUTDOWN = 44
    TDH_SYS_CONFIG = 45
    TDH_SYS_SHUTDOWN = 52
    TDH_SYS_UPDATE = 53
    TDH_PHYMEM_PAMT_ADD = 58
    TDH_PHYMEM_PAMT_REMOVE = 59
    TDH_SYS_DISABLE = 69


# Versions: the dispatcher lets a non-zero version pass only to these leaves.
VERSIONED_A = frozenset({3, 11, 23, 26, 30})
VERSIONED_B = VERSIONED_A | {22, 33, 45, 53}

# Leaves that reach their handler although the system is not ready.
BEFORE_READY = frozenset({31, 32, 33, 34, 35, 37, 44, 45, 53})


def leaf_rax(leaf: TdhLeaf, version: int = 0) -> int:
    """RAX that calls version `version` of `leaf`.

    >>> hex(leaf_rax(TdhLeaf.TDH_SYS_UPDATE, 1))
    '0x10035'
    """
    return leaf | version << VERSION_SHIFT
