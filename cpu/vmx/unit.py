"""The VMX unit: VMX instructions of one logical processor, checks in the order of the Intel SDM (vol. 3C, "VMX
Instruction Reference").

Methods that take a memory operand's content (a physical address, a descriptor) have no fault of their own; with
`unmapped` the operand's page is not mapped and the access ends in #PF at the step where it happens.
"""

from __future__ import annotations

from . import entry, registers, seam, shadow, translations
from .controls import Cr4, FeatureControl
from .errors import ExitReason
from .errors import VmInstructionError as Error
from .exit import VmExit, leave_guest
from .lp import VMX_CODE_MODES, CodeMode, LogicalProcessor, VmxMode
from .outcome import (
    FAIL_INVALID,
    GENERAL_PROTECTION,
    PAGE_FAULT,
    SUCCEED,
    UNDEFINED_OPCODE,
    Outcome,
    Status,
)
from .vmcs import NO_VMCS, SHADOW_VMCS, SLOT, LaunchState, Vmcs

_SUCCEED = Status.SUCCEED
_NON_ROOT = VmxMode.NON_ROOT
_VMLAUNCH, _VMRESUME = ExitReason.VMLAUNCH, ExitReason.VMRESUME
_LAUNCHED = int(LaunchState.LAUNCHED)
_REVISION_BITS = 0x7FFF_FFFF


class VmxUnit(LogicalProcessor):
    """VMX of one logical processor. Every instruction returns an `Outcome`."""

    def vmxon(self, pa: int, unmapped: bool = False) -> Outcome:
        """Enter VMX operation with the VMXON region at `pa`."""
        if not self.cr4 & Cr4.VMXE or self._code_mode not in VMX_CODE_MODES:
            return UNDEFINED_OPCODE
        if self._mode is VmxMode.NON_ROOT:
            return self.vm_exit(ExitReason.VMXON, instruction_length=4)
        if self._cpl:
            return GENERAL_PROTECTION
        if self._mode is VmxMode.ROOT:
            return self.fail(Error.VMXON_IN_VMX_ROOT)
        if not self._may_vmxon():
            return GENERAL_PROTECTION
        if unmapped:
            return PAGE_FAULT
        if pa & self._bad_address or self.memory.read32(pa) != self._revision:
            return FAIL_INVALID
        self.vmxon_ptr = pa
        self.make_current(None)
        self.mode = VmxMode.ROOT
        return SUCCEED

    def _may_vmxon(self) -> bool:
        enabled = FeatureControl.LOCK | FeatureControl.VMX_OUTSIDE_SMX
        return (
            not self.a20m
            and self.cr0_fixed.allow(self.cr0)
            and self.cr4_fixed.allow(self.cr4)
            and self.feature_control & enabled == enabled
        )

    def vmxoff(self) -> Outcome:
        """Leave VMX operation. What was not VMCLEARed is lost, a pending INIT is taken."""
        if refused := self._refuse(ExitReason.VMXOFF, 3):
            return refused
        for vmcs in self.active.values():
            self.memory.write64(vmcs.pa + 8, LaunchState.CORRUPTED)
        self.active.clear()
        self.make_current(None)
        self.vmxon_ptr = NO_VMCS
        self.mode = VmxMode.OUTSIDE
        if self.init_pending:
            self.take_init()
        return SUCCEED

    def vmptrld(self, pa: int, unmapped: bool = False) -> Outcome:
        """Make the VMCS at `pa` active here and current; read it from memory unless it is active already."""
        if not self._plain and (refused := self._refuse(ExitReason.VMPTRLD, 3)):
            return refused
        if unmapped:
            return PAGE_FAULT
        if pa & self._bad_address:
            return self.fail(Error.VMPTRLD_INVALID_ADDRESS)
        if pa == self.vmxon_ptr:
            return self.fail(Error.VMPTRLD_VMXON_POINTER)
        word = self.memory.read64(pa) & 0xFFFF_FFFF
        if word != self._revision and (word & _REVISION_BITS != self._revision or not self._shadowing):
            return self.fail(Error.VMPTRLD_INCORRECT_REVISION)
        vmcs = self.active.get(pa)
        self._current = self.activate(pa) if vmcs is None else vmcs
        self.cur = pa
        return SUCCEED

    def vmptrst(self, unmapped: bool = False) -> Outcome:
        """The current-VMCS pointer, NO_VMCS if there is none."""
        if not self._plain and (refused := self._refuse(ExitReason.VMPTRST, 3)):
            return refused
        return PAGE_FAULT if unmapped else Outcome(_SUCCEED, 0, self.cur)

    def vmclear(self, pa: int, unmapped: bool = False) -> Outcome:
        """Write the VMCS at `pa` back, make its launch state clear; it is neither active nor current here any more."""
        if not self._plain and (refused := self._refuse(ExitReason.VMCLEAR, 4)):
            return refused
        if unmapped:
            return PAGE_FAULT
        if pa & self._bad_address:
            return self.fail(Error.VMCLEAR_INVALID_ADDRESS)
        if pa == self.vmxon_ptr:
            return self.fail(Error.VMCLEAR_VMXON_POINTER)
        self._clear(pa)
        return SUCCEED

    def _clear(self, pa: int) -> None:
        vmcs = self.active.pop(pa, None)
        if vmcs is None:
            self.memory.write64(pa + 8, LaunchState.CLEAR)
        else:
            vmcs.launch = LaunchState.CLEAR
            vmcs.write_back(self.memory)
        if pa == self.cur:
            self.make_current(None)

    def vmread(self, encoding: int, unmapped: bool = False) -> Outcome:
        """A field of the current VMCS, zero-extended."""
        if self._plain and not unmapped:
            slot = self._full.get(encoding)
            if slot is not None and (vmcs := self._current) is not None:
                return Outcome(_SUCCEED, 0, vmcs.data[slot])
        return self._vmread(encoding, unmapped)

    def _vmread(self, encoding: int, unmapped: bool) -> Outcome:
        vmcs = self._field_source(encoding, ExitReason.VMREAD)
        if not isinstance(vmcs, Vmcs):
            return vmcs
        if encoding in self._full:
            value = vmcs.data[self._full[encoding]]
        elif encoding in self.layout.high:
            value = vmcs.data[self.layout.high[encoding]] >> 32
        else:
            return self._fail_in(vmcs, Error.UNSUPPORTED_COMPONENT)
        if unmapped:
            return PAGE_FAULT
        return Outcome(_SUCCEED, 0, value & self._operand_mask)

    def vmwrite(self, encoding: int, value: int, unmapped: bool = False) -> Outcome:
        """Store into a field of the current VMCS; bits above the field's width are ignored."""
        if self._plain and not unmapped:
            target = self._writable.get(encoding)
            if target is not None and (vmcs := self._current) is not None:
                vmcs.data[target[0]] = value & target[1]
                return SUCCEED
        return self._vmwrite(encoding, value, unmapped)

    def _vmwrite(self, encoding: int, value: int, unmapped: bool) -> Outcome:
        vmcs = self._field_source(encoding, ExitReason.VMWRITE)
        if not isinstance(vmcs, Vmcs):
            return vmcs
        if unmapped:
            return PAGE_FAULT
        slot = self.layout.high.get(encoding)
        if encoding not in self._full and slot is None:
            return self._fail_in(vmcs, Error.UNSUPPORTED_COMPONENT)
        if encoding & ~1 not in self._writable:
            return self._fail_in(vmcs, Error.VMWRITE_READ_ONLY_COMPONENT)
        value &= self._operand_mask
        if slot is None:
            slot, mask = self._writable[encoding]
            vmcs.data[slot] = value & mask
        else:
            vmcs.data[slot] = vmcs.data[slot] & 0xFFFF_FFFF | (value & 0xFFFF_FFFF) << 32
        return SUCCEED

    @property
    def _operand_mask(self) -> int:
        return NO_VMCS if self._code_mode is CodeMode.LONG else 0xFFFF_FFFF

    def _field_source(self, encoding: int, reason: ExitReason) -> Vmcs | Outcome:
        """The VMCS that VMREAD or VMWRITE works on: the current one, or the guest's shadow VMCS; else the failure."""
        if self._mode is VmxMode.NON_ROOT and self._code_mode in VMX_CODE_MODES:
            if not shadow.intercepted(self, encoding, reason):
                return GENERAL_PROTECTION if self._cpl else shadow.linked_vmcs(self) or FAIL_INVALID
            return self.vm_exit(reason, instruction_length=3)
        return self._refuse(reason, 3) or self._current or FAIL_INVALID

    def _fail_in(self, vmcs: Vmcs, error: Error) -> Outcome:
        outcome = Outcome(Status.FAIL_VALID, error=error)
        vmcs.data[SLOT[0x4400]] = error
        return outcome

    def vmlaunch(self) -> Outcome:
        """Enter the guest of the current VMCS, whose launch state has to be clear. See `vmresume` for the result."""
        return self._enter(_VMLAUNCH)

    def vmresume(self) -> Outcome:
        """Enter the guest of the current VMCS, whose launch state has to be launched.

        SUCCEED: the unit is in VMX non-root operation, the guest runs. VM_EXIT: the entry failed on guest state (bit
        31 of the reason) or an event that was waiting ended the guest at once; the unit is in root operation.
        """
        return self._enter(_VMRESUME)

    def _enter(self, reason: ExitReason) -> Outcome:
        if not self._plain and (refused := self._refuse(reason, 3)):
            return refused
        vmcs = self._current
        if vmcs is None or self.memory.read64(vmcs.pa) & SHADOW_VMCS:
            return FAIL_INVALID
        if self.mov_ss_blocking:
            return self.fail(Error.ENTRY_BLOCKED_BY_MOV_SS)
        launch = vmcs.data[0]
        if reason is _VMLAUNCH:
            if launch != LaunchState.CLEAR:
                return self.fail(Error.VMLAUNCH_NOT_CLEAR)
        elif launch != _LAUNCHED:
            corrupted = launch == LaunchState.CORRUPTED
            return self.fail(Error.VMRESUME_AFTER_VMXOFF if corrupted else Error.VMRESUME_NOT_LAUNCHED)
        return entry.enter_guest(self, vmcs)

    def vm_exit(
        self,
        reason: int,
        qualification: int = 0,
        instruction_length: int = 0,
        intr_info: int = 0,
        details: VmExit | None = None,
    ) -> Outcome:
        """Leave VMX non-root operation: exit information into the current VMCS, host state loaded, root operation.

        `details` has the exit information beside the four arguments. An exit due to an NMI blocks NMIs.
        Raises RuntimeError outside VMX non-root operation.
        """
        if self._mode is not _NON_ROOT:
            raise RuntimeError("a VM exit happens in VMX non-root operation only")
        return leave_guest(self, reason, qualification, instruction_length, intr_info, details)

    def vmcall(self) -> Outcome:
        """Call the monitor: an exit in a guest, error 1 in root operation, for there is no SMM monitor."""
        if self._mode is VmxMode.NON_ROOT:
            return self.vm_exit(ExitReason.VMCALL, instruction_length=3)
        return self._refuse(ExitReason.VMCALL, 3) or self.fail(Error.VMCALL_IN_VMX_ROOT)

    def invept(self, kind: int, eptp: int, reserved: int = 0, unmapped: bool = False) -> Outcome:
        """Invalidate translations derived from EPT; the descriptor is `eptp` and an ignored `reserved`."""
        if not translations.invept_supported(self.config):
            return UNDEFINED_OPCODE
        if refused := self._refuse(ExitReason.INVEPT, 5):
            return refused
        if not translations.invept_type_supported(self.config, kind):
            return self.fail(Error.INVALID_INVEPT_INVVPID_OPERAND)
        if unmapped:
            return PAGE_FAULT
        if kind == translations.SINGLE_CONTEXT and not translations.eptp_valid(self.config, eptp):
            return self.fail(Error.INVALID_INVEPT_INVVPID_OPERAND)
        return SUCCEED

    def invvpid(self, kind: int, desc_lo: int, desc_hi: int = 0, unmapped: bool = False) -> Outcome:
        """Invalidate translations of a VPID; `desc_lo` has the VPID in bits 15:0, `desc_hi` is the linear address."""
        if not translations.invvpid_supported(self.config):
            return UNDEFINED_OPCODE
        if refused := self._refuse(ExitReason.INVVPID, 5):
            return refused
        if not translations.invvpid_type_supported(self.config, kind):
            return self.fail(Error.INVALID_INVEPT_INVVPID_OPERAND)
        if unmapped:
            return PAGE_FAULT
        if not translations.invvpid_descriptor_valid(kind, desc_lo, desc_hi):
            return self.fail(Error.INVALID_INVEPT_INVVPID_OPERAND)
        return SUCCEED

    def _refuse(self, reason: ExitReason, length: int) -> Outcome | None:
        """The checks that VMX instructions begin with; None = go on."""
        if self._mode is VmxMode.OUTSIDE or self._code_mode not in VMX_CODE_MODES:
            return UNDEFINED_OPCODE
        if self._mode is VmxMode.NON_ROOT:
            return self.vm_exit(reason, instruction_length=length)
        return GENERAL_PROTECTION if self._cpl else None

    # Registers, and SEAM

    def rdmsr(self, msr: int) -> Outcome:
        """RDMSR; #GP for an MSR that does not exist, an exit in a guest unless the MSR bitmaps let it through."""
        return registers.rdmsr(self, msr)

    def wrmsr(self, msr: int, value: int) -> Outcome:
        """WRMSR; #GP for capability MSRs, for a locked IA32_FEATURE_CONTROL, and for reserved bits."""
        return registers.wrmsr(self, msr, value)

    def mov_cr0(self, value: int) -> Outcome:
        """MOV to CR0; in VMX operation #GP for a value that the fixed bits forbid."""
        return registers.mov_cr0(self, value)

    def mov_cr4(self, value: int) -> Outcome:
        """MOV to CR4; in VMX operation #GP for a value that the fixed bits forbid."""
        return registers.mov_cr4(self, value)

    def seamcall_check(self, rax: int) -> Outcome | None:
        """What SEAMCALL tests before it looks for SEAM software; None = it may go on. See `seam.seamcall_check`."""
        return seam.seamcall_check(self, rax)

    def seamret_check(self) -> Outcome | None:
        """What SEAMRET tests first; None = it may go on. See `seam.seamret_check`."""
        return seam.seamret_check(self)

    def seamret_pseamldr(self, launch: str, scope: str) -> int:
        """What SEAMRET from the P-SEAMLDR does to the caller's VMCSs. See `seam.seamret_pseamldr`."""
        return seam.seamret_pseamldr(self, launch, scope)


