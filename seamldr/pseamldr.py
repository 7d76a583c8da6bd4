"""P-SEAMLDR: dispatch, the small leaves, and the whole of its state. Pure: memory and randomness are given.

Source: Intel P-SEAMLDR (tdx-loader 1.5.02), pseamldr_dispatcher.c and api_calls. There is no lock inside: the caller
holds P_SEAMLDR_MUTEX (`seamldr.gate`), so there is one call at a time.
"""

from __future__ import annotations

import msgspec

from bus.memory import PhysicalMemory
from seamldr.cleanup import Cleaner
from seamldr.entropy import Entropy, RandomEntropy, RdrandUse
from seamldr.install import Installer, remaining_updates
from seamldr.platform import MAX_ADDRESSABLE_LPS, LoaderProfile, Platform, p_sys_info_table
from seamldr.seamextend import SeamExtend
from seamldr.state import InstalledModule, PSeamldrState
from seamldr.status import Flow, SeamldrLeaf, SeamldrStatus
from seamldr.structures import FEATURE_CLEANUP, INFO_SIZE, SEAMINFO_SIZE, SeamldrInfo

INTR_PENDING_INTR = 1 << 0
INTR_PENDING_NMI = 1 << 1
INTR_PENDING_SMI = 1 << 2
"""Bits of the INTR_PENDING MSR (9AH)."""


class Return(msgspec.Struct, frozen=True):
    """Registers after SEAMRET: RAX, and RDX unless it keeps its value. All others are preserved."""

    rax: SeamldrStatus
    rdx: int | None = None


class PSeamldr:
    """One P-SEAMLDR. Without a `state` it has just been launched over RAM that is zero."""

    def __init__(
        self,
        platform: Platform,
        memory: PhysicalMemory,
        state: PSeamldrState | None = None,
        hooks: Entropy | None = None,
    ) -> None:
        self.platform = platform
        self.memory = memory
        self.state = state or launch(platform, memory)
        entropy = hooks or RandomEntropy()
        self._entropy = entropy
        self._installer = Installer(platform, memory, self.state, entropy)
        self._cleaner = Cleaner(platform, memory, self.state, entropy)

    @property
    def seamextend(self) -> SeamExtend:
        """The live register."""
        return self.state.seamextend

    @property
    def seam_ready(self) -> bool:
        """Whether SEAMCALLs to the TDX module are admitted."""
        return bool(self.state.seamextend.seam_ready)

    @property
    def p_seamldr_ready(self) -> bool:
        """Whether SEAMCALLs to P-SEAMLDR are admitted."""
        return bool(self.state.seamextend.p_seamldr_ready)

    @property
    def installed(self) -> InstalledModule | None:
        """The module that is callable, or that will be again if the open session fails recoverably."""
        return self.state.installed

    @property
    def generation(self) -> int:
        """Successful installs so far."""
        return self.state.generation

    def call(
        self, lp: int, leaf: int, rcx: int, *, interrupts_pending: int = 0, caller_if: bool = True
    ) -> Return:
        """A SEAMCALL that was admitted, by the LP with x2APIC ID `lp`.

        `interrupts_pending` is the INTR_PENDING MSR, `caller_if` RFLAGS.IF at SEAMCALL. Raises Fatal, after which the
        state means nothing and the processor disables all SEAM software.
        """
        if not self._make_canary():
            return Return(SeamldrStatus.EUNSPECERR)
        match leaf:
            case SeamldrLeaf.INFO:
                return Return(self._info(rcx))
            case SeamldrLeaf.INSTALL:
                return Return(*self._installer.call(lp, rcx))
            case SeamldrLeaf.SHUTDOWN:
                return Return(self._shutdown(lp))
            case SeamldrLeaf.SEAMINFO:
                return Return(self._seaminfo(rcx))
            case SeamldrLeaf.CLEANUP if self.platform.profile is not LoaderProfile.P10:
                masked = 0 if caller_if else INTR_PENDING_INTR
                return Return(self._cleaner.call(lp, bool(interrupts_pending & ~masked)))
        return Return(SeamldrStatus.EBADPARAM)

    def _make_canary(self) -> bool:
        """One attempt to draw the stack canary, at the first call and after each failure; 0 is a failure."""
        self.state.canary_set = self.state.canary_set or bool(self._entropy.rdrand(RdrandUse.CANARY))
        return self.state.canary_set

    def _info(self, rcx: int) -> SeamldrStatus:
        if not self.platform.hpa_ok(rcx, INFO_SIZE):
            return SeamldrStatus.EBADPARAM
        self.memory.write(self.platform.strip_keyid(rcx), self.info().encode())
        return SeamldrStatus.SUCCESS

    def info(self) -> SeamldrInfo:
        """SEAMLDR_INFO as of now; asks SEAMDB again if no update is known to be left."""
        old = self.platform.profile is LoaderProfile.P10
        if not old and self.state.num_remaining_updates == 0:
            self.state.num_remaining_updates = remaining_updates(self.platform, self.state)
        version = self.platform.version
        return SeamldrInfo(
            version=0,
            attributes=0,
            vendor_id=0x8086,
            build_date=version.build_date,
            build_num=version.build_num,
            minor=version.minor,
            major=version.major,
            update=version.update,
            acm_x2apic_id=self.platform.acm_x2apic_id,
            num_remaining_updates=self.state.num_remaining_updates,
            seamextend=self.state.seamextend,
            features0=0 if old else FEATURE_CLEANUP,
        )

    def _seaminfo(self, rcx: int) -> SeamldrStatus:
        if not self.platform.hpa_ok(rcx, SEAMINFO_SIZE):
            return SeamldrStatus.EBADPARAM
        table = self.memory.read(self.platform.p_sys_info_table, SEAMINFO_SIZE)
        self.memory.write(self.platform.strip_keyid(rcx), table)
        return SeamldrStatus.SUCCESS

    def _shutdown(self, lp: int) -> SeamldrStatus:
        """Every LP calls, the one that ran the ACM last; then nothing answers any more."""
        state = self.state
        if lp >= MAX_ADDRESSABLE_LPS:
            return SeamldrStatus.EUNSPECERR
        if self.platform.profile is not LoaderProfile.P10:
            if state.current_flow in (Flow.INSTALL, Flow.CLEANUP):
                return SeamldrStatus.EBADCALL
            if state.dirty:
                return SeamldrStatus.ECLEANUPREQ
        state.shutdown_bitmap.add(lp)
        if len(state.shutdown_bitmap) == 1:
            state.seamextend = state.seamextend.with_ready(0)
            state.installed = None
            state.current_flow = Flow.SHUTDOWN
        if len(state.shutdown_bitmap) < self.platform.num_lps:
            return SeamldrStatus.SUCCESS
        if lp != self.platform.acm_x2apic_id:
            return SeamldrStatus.EBADCALL
        state.seamextend = SeamExtend()
        return SeamldrStatus.SUCCESS


def launch(platform: Platform, memory: PhysicalMemory) -> PSeamldrState:
    """What NP-SEAMLDR does: write P_SYS_INFO_TABLE, make P-SEAMLDR callable, no module."""
    memory.write(platform.p_sys_info_table, p_sys_info_table(platform))
    return PSeamldrState(SeamExtend(system_under_debug=int(platform.sgx_debug_unlocked), p_seamldr_ready=1))
