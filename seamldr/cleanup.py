"""SEAMLDR.CLEANUP: every LP calls; the last of each package renews private keys and flushes caches.

Source: Intel P-SEAMLDR (tdx-loader 1.5.02), seamldr_cleanup.c. The cache domain is taken to be the package.
"""

from __future__ import annotations

import msgspec

from bus.memory import PhysicalMemory
from seamldr.entropy import Entropy, PconfigStatus
from seamldr.install import clear_seamdb
from seamldr.platform import MAX_ADDRESSABLE_LPS, MAX_PACKAGES, Platform
from seamldr.range_layout import handoff_pa
from seamldr.state import PSeamldrState
from seamldr.status import Fatal, Flow, SeamldrStatus


class Cleaner:
    """The CLEANUP leaf over a loader's state and memory."""

    def __init__(
        self, platform: Platform, memory: PhysicalMemory, state: PSeamldrState, entropy: Entropy
    ) -> None:
        self.platform = platform
        self.memory = memory
        self.state = state
        self.entropy = entropy

    def call(self, lp: int, interrupted: bool) -> SeamldrStatus:
        """One LP's call; `interrupted` says that an event is pending. Progress survives an error. Raises Fatal."""
        refusal = self._refusal(lp)
        if refusal:
            return refusal
        package = self.platform.package_of(lp)
        if package >= MAX_PACKAGES:
            raise Fatal(f"package {package} in CLEANUP")
        if self.state.current_flow is Flow.READY:
            self._open_session()
        status = self._clean_package(package, interrupted) if self._is_last_of(package) else SeamldrStatus.SUCCESS
        if status:
            return status
        self.state.cleanup_bitmap.add(lp)
        if len(self.state.cleanup_bitmap) == self.platform.num_lps:
            self._close_session()
        return SeamldrStatus.SUCCESS

    def _refusal(self, lp: int) -> SeamldrStatus:
        state = self.state
        if lp >= MAX_ADDRESSABLE_LPS:
            return SeamldrStatus.EUNSPECERR
        open_elsewhere = state.current_flow in (Flow.INSTALL, Flow.SHUTDOWN)
        if open_elsewhere or lp in state.cleanup_bitmap or not state.init_done:
            return SeamldrStatus.EBADCALL
        return SeamldrStatus.SUCCESS

    def _open_session(self) -> None:
        """The module is gone for good: not callable, no SVN to compare with, nothing to hand off."""
        self.state.current_flow = Flow.CLEANUP
        self.state.seamextend = msgspec.structs.replace(self.state.seamextend, seam_ready=0, tee_tcb_svn=bytes(16))
        self.state.installed = None
        self.memory.write(handoff_pa(self.platform), b"\0")

    def _is_last_of(self, package: int) -> bool:
        finished = sum(self.platform.package_of(lp) == package for lp in self.state.cleanup_bitmap)
        return finished + 1 == self.state.max_pkg_lps[package]

    def _clean_package(self, package: int, interrupted: bool) -> SeamldrStatus:
        status = SeamldrStatus.SUCCESS
        if self.state.key_dirty[package]:
            status = self._renew_keys(package, interrupted)
        if not status and self.state.cache_dirty[package]:
            status = self._flush_caches(package, interrupted)
        return status

    def _renew_keys(self, package: int, interrupted: bool) -> SeamldrStatus:
        next_kid = self.state.next_kid
        while next_kid[package] < self.platform.private_keyids:
            result = self.entropy.pconfig(package, next_kid[package])
            if result is PconfigStatus.ENTROPY_ERROR:
                return SeamldrStatus.ENOENTROPY
            if result is not PconfigStatus.SUCCESS:
                raise Fatal(f"PCONFIG returned {result.name}")
            next_kid[package] += 1
            if interrupted:
                return SeamldrStatus.EINTERRUPT
        self.state.key_dirty[package] = False
        return SeamldrStatus.SUCCESS

    def _flush_caches(self, package: int, interrupted: bool) -> SeamldrStatus:
        next_block = self.state.next_block
        while next_block[package] < self.platform.cache_sub_blocks:
            next_block[package] += 1
            if interrupted:
                return SeamldrStatus.EINTERRUPT
        self.state.cache_dirty[package] = False
        return SeamldrStatus.SUCCESS

    def _close_session(self) -> None:
        self.state.seamextend = self.state.seamextend.without_module(keep_se_svn=False)
        clear_seamdb(self.platform, self.state, self.entropy)
        self.state.cleanup_bitmap = set()
        self.state.current_flow = Flow.READY
