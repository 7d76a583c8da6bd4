"""VMCS shadowing: VMREAD and VMWRITE of a guest that go to its shadow VMCS instead of exiting."""

from __future__ import annotations

from .controls import Primary, Secondary
from .errors import ExitReason
from .fields import Field
from .lp import LogicalProcessor
from .vmcs import NO_VMCS, Vmcs

_BITMAP_BITS = 1 << 15


def shadowing(vmcs: Vmcs) -> bool:
    """The "VMCS shadowing" control is in effect."""
    return (
        vmcs[Field.PRIMARY_PROC_CONTROLS] & Primary.SECONDARY_CONTROLS != 0
        and vmcs[Field.SECONDARY_PROC_CONTROLS] & Secondary.VMCS_SHADOWING != 0
    )


def intercepted(lp: LogicalProcessor, encoding: int, reason: ExitReason) -> bool:
    """A guest's VMREAD or VMWRITE of `encoding` exits."""
    vmcs = lp.require_current()
    if not shadowing(vmcs) or not 0 <= encoding < _BITMAP_BITS:
        return True
    reads = reason is ExitReason.VMREAD
    bitmap = vmcs[Field.VMREAD_BITMAP_ADDR if reads else Field.VMWRITE_BITMAP_ADDR]
    return lp.memory.read(bitmap + encoding // 8, 1)[0] >> encoding % 8 & 1 == 1


def linked_vmcs(lp: LogicalProcessor) -> Vmcs | None:
    """The shadow VMCS of the guest; None if the VMCS link pointer names none."""
    pointer = lp.require_current()[Field.VMCS_LINK_POINTER]
    return None if pointer == NO_VMCS else lp.activate(pointer)
