"""Where SEAM touches VMX state: what SEAMCALL tests first, and what SEAMRET from the P-SEAMLDR leaves behind.

Source: Intel Trust Domain CPU Architectural Extensions (343754-002), SEAMCALL and SEAMRET.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ExitReason
from .lp import CodeMode, VmxMode
from .outcome import GENERAL_PROTECTION, UNDEFINED_OPCODE, Outcome
from .vmcs import NO_VMCS, LaunchState

if TYPE_CHECKING:
    from .unit import VmxUnit

SEAMRR_MASK_VALID = 1 << 11
SEAMCALL_LENGTH = 4

LAUNCH_KNOBS = ("preserve", "clear")
SCOPE_KNOBS = ("current_only", "all_active_on_lp")


def seamcall_check(unit: VmxUnit, rax: int) -> Outcome | None:
    """The tests of SEAMCALL that do not look at SEAM software: #UD, exit 76 in a guest, #GP; None = go on.

    `rax` is the leaf. Its bit 63 chooses between the P-SEAMLDR and the TDX module only after these tests, so that
    their result is the same for every leaf.
    """
    del rax
    if unit.mode is VmxMode.OUTSIDE or unit.in_seam or unit.code_mode is not CodeMode.LONG:
        return UNDEFINED_OPCODE
    if unit.mode is VmxMode.NON_ROOT:
        return unit.vm_exit(ExitReason.SEAMCALL, instruction_length=SEAMCALL_LENGTH)
    if unit.cpl or unit.mov_ss_blocking or not unit.config.seamrr_mask & SEAMRR_MASK_VALID:
        return GENERAL_PROTECTION
    return None


def seamret_check(unit: VmxUnit) -> Outcome | None:
    """The tests that SEAMRET begins with: #UD outside SEAM, outside 64-bit mode and in a guest, then #GP; None = go on.
    """
    if not unit.in_seam or unit.code_mode is not CodeMode.LONG or unit.mode is VmxMode.NON_ROOT:
        return UNDEFINED_OPCODE
    return GENERAL_PROTECTION if unit.cpl else None


def seamret_pseamldr(unit: VmxUnit, launch: str, scope: str) -> int:
    """The end of a P-SEAMLDR call, seen from the caller; returns the current-VMCS pointer that was lost, or NO_VMCS.

    With IA32_VMX_BASIC[60] = 1 nothing happens. Else the caller is left without a current VMCS, and the data of the
    VMCSs concerned is written back. `launch` "preserve": they stay active here and launched as they were; "clear":
    they are clear and not active here any more, as after VMCLEAR. `scope` "current_only": the VMCS that was current;
    "all_active_on_lp": every VMCS active here, even if none was current. Raises ValueError for other words.
    """
    if launch not in LAUNCH_KNOBS or scope not in SCOPE_KNOBS:
        raise ValueError(f"launch is one of {LAUNCH_KNOBS}, scope one of {SCOPE_KNOBS}")
    if unit.seamret_keeps_vmcs:
        return NO_VMCS
    lost = unit.cur
    current = [unit.current] if unit.current else []
    for vmcs in list(unit.active.values()) if scope == "all_active_on_lp" else current:
        if launch == "clear":
            vmcs.launch = LaunchState.CLEAR
            del unit.active[vmcs.pa]
        vmcs.write_back(unit.memory)
    unit.make_current(None)
    return lost
