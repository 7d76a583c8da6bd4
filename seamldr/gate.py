"""The processor's side of SEAMCALL: who may enter SEAM software, and what a crash inside does.

Source: Intel Trust Domain CPU Architectural Extensions, 343754-002, SEAMCALL and SEAMRET. The checks of the calling
LP itself (VMX operation, CPL, MOV-SS) come before and are the LP's own. Nobody waits here: a busy P_SEAMLDR_MUTEX is
VMfailInvalid, as is everything else that refuses.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import msgspec

from seamldr.seamextend import SeamExtend


class Admission(enum.Enum):
    """Why a SEAMCALL got in, or why it ended in VMfailInvalid."""

    ADMITTED = "admitted"
    MUTEX_HELD = "P_SEAMLDR_MUTEX held"
    NOT_LOADED = "not loaded or disabled"
    SEAM_DEAD = "an LP shut down inside SEAM"


class GateState(msgspec.Struct):
    """P_SEAMLDR_MUTEX (`owner`, an x2APIC ID), the LPs inside the TDX module, the latch that only a reset clears."""

    owner: int | None = None
    in_module: set[int] = msgspec.field(default_factory=set)
    dead: bool = False


class SeamGate:
    """Admission to SEAM. `seamextend` returns the live register at each call."""

    def __init__(self, seamextend: Callable[[], SeamExtend], state: GateState | None = None) -> None:
        self.state = state or GateState()
        self._seamextend = seamextend

    def enter(self, lp: int, rax: int) -> Admission:
        """SEAMCALL by an LP that is outside SEAM; RAX bit 63 chooses P-SEAMLDR. All but ADMITTED is VMfailInvalid."""
        if rax >> 63:
            return self._enter_p_seamldr(lp)
        if self.state.dead:
            return Admission.SEAM_DEAD
        if not self._seamextend().seam_ready:
            return Admission.NOT_LOADED
        self.state.in_module.add(lp)
        return Admission.ADMITTED

    def _enter_p_seamldr(self, lp: int) -> Admission:
        if self.state.owner is not None:
            return Admission.MUTEX_HELD
        if self.state.dead:
            return Admission.SEAM_DEAD
        if not self._seamextend().p_seamldr_ready:
            return Admission.NOT_LOADED
        self.state.owner = lp
        return Admission.ADMITTED

    def leave(self, lp: int) -> None:
        """SEAMRET: the LP is out, and the mutex free if it was its."""
        if self.state.owner == lp:
            self.state.owner = None
        self.state.in_module.discard(lp)

    def shutdown(self, lp: int) -> bool:
        """The LP entered shutdown or died. If it was in SEAM, both components are gone until reset; then True."""
        inside = self.state.owner == lp or lp in self.state.in_module
        self.state.dead = self.state.dead or inside
        self.leave(lp)
        return inside
