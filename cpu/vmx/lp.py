"""State of one logical processor as far as VMX sees it.

Nothing here is shared between logical processors; only the memory given to them is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from bus.memory import PhysicalMemory

from .config import (
    BASIC_ADDRESS_32,
    BASIC_NO_SEAMRET_INVD_VMCS,
    PAGE_MASK,
    U64_MAX,
    Msr,
    VmxConfig,
)
from .controls import Activity, Cr0, Cr4, Efer, FeatureControl, Rflags, Secondary
from .outcome import FAIL_INVALID, FAIL_VALID, Outcome
from .vmcs import ERROR_SLOT, NO_VMCS, SLOT, Layout, Vmcs


class VmxMode(enum.Enum):
    """Where the processor is with regard to VMX."""

    OUTSIDE = "outside"
    ROOT = "root"
    NON_ROOT = "non-root"


class CodeMode(enum.Enum):
    """How the processor executes code. VMX instructions work in PROTECTED (32-bit) and LONG (64-bit) only."""

    REAL = "real"
    VIRTUAL_8086 = "virtual-8086"
    PROTECTED = "protected"
    COMPATIBILITY = "compatibility"
    LONG = "64-bit"


VMX_CODE_MODES = frozenset({CodeMode.PROTECTED, CodeMode.LONG})
_LONG_CR0 = Cr0.PG | Cr0.WP | Cr0.NE | Cr0.ET | 1 << 1 | Cr0.PE
_INIT_CR0 = Cr0.CD | Cr0.NW | Cr0.ET
_PLAIN_MSRS: dict[int, int] = {
    Msr.IA32_SYSENTER_CS: 0,
    Msr.IA32_SYSENTER_ESP: 0,
    Msr.IA32_SYSENTER_EIP: 0,
    Msr.IA32_DEBUGCTL: 0,
    Msr.IA32_PAT: 0x0007_0406_0007_0406,
    Msr.IA32_PERF_GLOBAL_CTRL: 0,
    Msr.IA32_STAR: 0,
    Msr.IA32_LSTAR: 0,
    Msr.IA32_FMASK: 0,
    Msr.IA32_FS_BASE: 0,
    Msr.IA32_GS_BASE: 0,
    Msr.IA32_KERNEL_GS_BASE: 0,
    Msr.IA32_TSC_AUX: 0,
}


class LogicalProcessor:
    """Registers and VMX state. A new one runs 64-bit code at CPL 0, CR4.VMXE and IA32_FEATURE_CONTROL still zero.

    `memory` is the physical memory that holds the VMXON and VMCS regions. Attributes that the machine may set at any
    time: `cpl`, `code_mode`, `mov_ss_blocking` (holds for the next instruction), `a20m`, `in_seam`, `on_inject`
    (called with the interruption information of each event that a VM entry injects; returns the VM exit that
    delivering it to the guest causes, if any).
    """

    def __init__(self, config: VmxConfig, memory: PhysicalMemory) -> None:
        self.config = config
        self.memory = memory
        self.layout = Layout(config)
        self.cr0_fixed = config.cr0_fixed
        self.cr4_fixed = config.cr4_fixed
        self._full = self.layout.full
        self._writable = self.layout.writable
        self._revision = config.vmcs_revision_id
        self._bad_address = PAGE_MASK | U64_MAX & -1 << config.maxphyaddr
        if config.basic & BASIC_ADDRESS_32:
            self._bad_address |= U64_MAX & -1 << 32
        self.seamret_keeps_vmcs = bool(config.basic & BASIC_NO_SEAMRET_INVD_VMCS)
        self._shadowing = bool(config.control_limits(Msr.IA32_VMX_PROCBASED_CTLS2).may & Secondary.VMCS_SHADOWING)
        self.on_inject: Callable[[int], Outcome | None] | None = None
        self.reset()

    # Reset, INIT, start-up

    def reset(self) -> None:
        """RESET, and the way up to a 64-bit kernel: VMX operation, active VMCSs and IA32_FEATURE_CONTROL are gone."""
        self.feature_control = 0
        self.msrs: dict[int, int] = dict(_PLAIN_MSRS)
        self.a20m = False
        self.in_seam = False
        self._power_on_vmx()
        self.enter_long_mode()

    def _power_on_vmx(self) -> None:
        self._mode = VmxMode.OUTSIDE
        self._cpl = 0
        self._code_mode = CodeMode.REAL
        self.vmxon_ptr = NO_VMCS
        self.cur = NO_VMCS
        self.active: dict[int, Vmcs] = {}
        self._current: Vmcs | None = None
        self._plain = False
        self.init_pending = False
        self.nmi_blocked = False
        self.mov_ss_blocking = False
        self.activity = Activity.ACTIVE
        self.cr0, self.cr3, self.cr4 = int(_INIT_CR0), 0, 0
        self.efer = 0
        self.rip, self.rsp, self.rflags = 0xFFF0, 0, int(Rflags.FIXED)

    def take_init(self) -> None:
        """INIT outside VMX operation: registers as after power on, waiting for a SIPI; IA32_FEATURE_CONTROL and the
        other MSRs stay."""
        self._power_on_vmx()
        self.activity = Activity.WAIT_FOR_SIPI

    def enter_long_mode(self) -> None:
        """What a kernel's start-up code does: 64-bit mode with paging, CPL 0, CR4.VMXE clear."""
        self.cr0 = int(_LONG_CR0)
        self.cr4 = int(Cr4.PAE)
        self.efer = Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE
        self.code_mode = CodeMode.LONG

    def reset_to_vmx_ready(self) -> None:
        """RESET, then what firmware and kernel do before VMXON: IA32_FEATURE_CONTROL locked with VMXON enabled, CR0
        and CR4 as their fixed bits want them, CR4.VMXE set.
        """
        self.reset()
        self.feature_control = FeatureControl.LOCK | FeatureControl.VMX_OUTSIDE_SMX
        self.cr0 = self.cr0_fixed.adjust(self.cr0)
        self.cr4 = self.cr4_fixed.adjust(self.cr4 | Cr4.VMXE)

    # Modes

    @property
    def mode(self) -> VmxMode:
        """Outside VMX operation, in root, or in non-root operation."""
        return self._mode

    @mode.setter
    def mode(self, mode: VmxMode) -> None:
        self._mode = mode
        self._update_plain()

    @property
    def cpl(self) -> int:
        """Current privilege level, 0 to 3."""
        return self._cpl

    @cpl.setter
    def cpl(self, cpl: int) -> None:
        self._cpl = cpl
        self._update_plain()

    @property
    def code_mode(self) -> CodeMode:
        """How code executes."""
        return self._code_mode

    @code_mode.setter
    def code_mode(self, code_mode: CodeMode) -> None:
        self._code_mode = code_mode
        self._update_plain()

    def enter_root(self, code_mode: CodeMode) -> None:
        """VMX root operation at CPL 0, as after a VM exit."""
        self._mode = VmxMode.ROOT
        self._cpl = 0
        self.code_mode = code_mode

    def _update_plain(self) -> None:
        # The one test of the hot path: VMX root operation, 64-bit code, CPL 0.
        self._plain = self._mode is VmxMode.ROOT and self._cpl == 0 and self._code_mode is CodeMode.LONG

    # Current VMCS

    @property
    def current(self) -> Vmcs | None:
        """This processor's copy of the current VMCS."""
        return self._current

    def make_current(self, vmcs: Vmcs | None) -> None:
        """Set the current-VMCS pointer; None = there is none."""
        self._current = vmcs
        self.cur = NO_VMCS if vmcs is None else vmcs.pa

    def activate(self, pa: int) -> Vmcs:
        """This processor's copy of the VMCS at `pa`, read from memory if it is not active here yet."""
        vmcs = self.active.get(pa)
        if vmcs is None:
            vmcs = self.active[pa] = Vmcs(pa, self.layout.load(self.memory, pa))
        return vmcs

    def guest_read(self, field: int) -> int:
        """A field of the current VMCS, read by the guest or by the processor itself: no checks of VMREAD.

        Raises RuntimeError if there is no current VMCS."""
        return self.require_current().data[SLOT[field]]

    def guest_write(self, field: int, value: int) -> None:
        """Change a field of the current VMCS as guest execution does. Raises RuntimeError without a current VMCS."""
        self.require_current()[field] = value

    def require_current(self) -> Vmcs:
        """The current VMCS; RuntimeError if there is none."""
        if self._current is None:
            raise RuntimeError("no current VMCS")
        return self._current

    def fail(self, error: int) -> Outcome:
        """VMfail: the error number goes to the current VMCS, if there is one."""
        vmcs = self._current
        if vmcs is None:
            return FAIL_INVALID
        vmcs.data[ERROR_SLOT] = error
        return FAIL_VALID[error]
