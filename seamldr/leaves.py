"""Names of SEAMCALL leaves, for records and summaries."""

from __future__ import annotations

from seamldr.status import SeamldrLeaf
from seamldr.tdx_leaves import LEAF_MASK, TdhLeaf


def leaf_name(rax: int) -> str:
    """What the documents call the leaf in RAX: "SEAMLDR.INFO", "TDH.SYS.SHUTDOWN", or its number.

    >>> leaf_name(0x8000000000000001), leaf_name(53)
    ('SEAMLDR.INSTALL', 'TDH.SYS.UPDATE')
    """
    try:
        if rax >> 63:
            return "SEAMLDR." + SeamldrLeaf(rax).name
        return TdhLeaf(rax & LEAF_MASK).name.replace("_", ".")
    except ValueError:
        return f"{rax:#x}"
