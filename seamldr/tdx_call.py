"""One SEAMCALL inside the TDX module: its registers, its locks, the ways it ends, and the hardware it may ask.

A leaf raises `Refused` to end at once; the dispatcher turns that into RAX and drops whatever locks the call still
holds, so a leaf checks first and changes last.
"""

from __future__ import annotations

import msgspec

from seamldr.tdx_locks import Lock
from seamldr.tdx_state import VcpuData
from seamldr.tdx_status import OperandId, TdxStatus


class Registers(msgspec.Struct, frozen=True):
    """General purpose registers of a SEAMCALL that leaves use as inputs, u64 each; RAX is passed beside them."""

    rcx: int = 0
    rdx: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0


class Hooks:
    """What the hardware around the module answers: by default nothing goes wrong; override to inject."""

    def entropy(self, lp: int) -> bool:
        """False if RDRAND or RDSEED on `lp` runs dry now."""
        return True

    def key_engine_ready(self, lp: int) -> bool:
        """False if another agent programs the memory encryption engine of the package of `lp` now."""
        return True

    def interrupt_pending(self, lp: int) -> bool:
        """True if a host interrupt waits on `lp`, which makes PHYMEM.CACHE.WB return early."""
        return False

    def tsc_adjust(self, lp: int) -> int:
        """IA32_TSC_ADJUST (MSR 3BH) of `lp`."""
        return 0

    def tsc(self, lp: int) -> int:
        """The time stamp counter of `lp`, for the roll-back check of VP.ENTER."""
        return 0

    def cpuid_fms(self, lp: int) -> int:
        """CPUID.1:EAX of `lp`: family, model, stepping."""
        return 0x000C_06F2

    def seam_capabilities(self, lp: int) -> int:
        """SEAMOPS capabilities of `lp`: bit 2 SEAMREPORT, bit 3 SEAMDB_GETREF."""
        return 0b1100


class ModuleDead(Exception):
    """The module has stopped on a failed internal assertion; every SEAMCALL gets VMfailInvalid until a reboot."""


class Refused(Exception):
    """Ends a leaf with `status` in RAX and `out` in other registers."""

    def __init__(self, status: int, **out: int) -> None:
        super().__init__(status)
        self.status = status
        self.out = out


def operand_invalid(operand: OperandId) -> Refused:
    """TDX_OPERAND_INVALID naming `operand`."""
    return Refused(TdxStatus.TDX_OPERAND_INVALID | operand)


def operand_busy(operand: OperandId) -> Refused:
    """TDX_OPERAND_BUSY naming `operand`."""
    return Refused(TdxStatus.TDX_OPERAND_BUSY | operand)


class Call:
    """One SEAMCALL while it is inside the module."""

    def __init__(self, lp: int, version: int, regs: Registers) -> None:
        self.lp = lp
        self.version = version
        self.regs = regs
        self.out: dict[str, int] = {}
        self.entered: VcpuData | None = None
        self._held: list[Lock] = []

    def lock(self, lock: Lock, busy: Refused, *, exclusive: bool) -> None:
        """Take `lock` until the call ends, or end the call with `busy`."""
        taken = lock.try_exclusive(self.lp) if exclusive else lock.try_shared(self.lp)
        if not taken:
            raise busy
        self._held.append(lock)

    def keep(self, *locks: Lock) -> None:
        """Leave these locks held when the call ends."""
        self._held = [lock for lock in self._held if all(lock is not kept for kept in locks)]

    def release(self) -> None:
        """Drop all locks of the call."""
        for lock in reversed(self._held):
            lock.release(self.lp)
        self._held.clear()
