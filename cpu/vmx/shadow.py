"""VMCS shadowing: VMREAD and VMWRITE of a guest that go to its shadow VMCS instead of exiting."""

from __future__ import annotations

from operator import itemgetter

from .controls import Primary, Secondary
from .errors import ExitReason
from .fields import Field
from .lp import LogicalProcessor
from .vmcs import NO_VMCS, SLOT, Vmcs

_BITMAP_BITS = 1 << 15
_controls = itemgetter(SLOT[Field.PRIMARY_PROC_CONTROLS], SLOT[Field.SECONDARY_PROC_CONTROLS])
_SECONDARY_CONTROLS = int(Primary.SECONDARY_CONTROLS)
_VMCS_SHADOWING = int(Secondary.VMCS_SHADOWING)


def shadowing(vmcs: Vmcs) -> bool:
    """The "VMCS shadowing" control is in effect."""
    primary, secondary = _controls(vmcs.data)
    return bool(primary & _SECONDARY_CONTROLS and secondary & _VMCS_SHADOWING)


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
