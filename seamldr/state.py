"""All that P-SEAMLDR, SEAMEXTEND and the module history database remember: one structure that MessagePack carries."""

from __future__ import annotations

import msgspec

from seamldr.identity import ModuleIdentity
from seamldr.platform import MAX_PACKAGES
from seamldr.seamextend import SeamExtend
from seamldr.status import Flow


class InstalledModule(msgspec.Struct, frozen=True):
    """The module in the SEAM range: who it is, what its manifest said. `num_handoff_pages` is the count minus one."""

    identity: ModuleIdentity
    seamhash: bytes
    seamsvn: int
    module_hv: int
    min_update_hv: int
    no_downgrade: bool
    num_handoff_pages: int
    generation: int


class PSeamldrState(msgspec.Struct):
    """One copy for the platform. Bitmaps are sets of x2APIC IDs; lists have one entry for each of 8 packages.

    `range_in_use` lists the [start, end) parts of the module range that SEAM software may have written since it was
    last wiped; nothing else can write there.
    """

    seamextend: SeamExtend
    seamextend_snapshot: SeamExtend = SeamExtend()
    current_flow: Flow = Flow.READY
    update_bitmap: set[int] = msgspec.field(default_factory=set)
    shutdown_bitmap: set[int] = msgspec.field(default_factory=set)
    cleanup_bitmap: set[int] = msgspec.field(default_factory=set)
    canary_set: bool = False
    init_done: bool = False
    max_pkg_lps: list[int] = msgspec.field(default_factory=lambda: [0] * MAX_PACKAGES)
    key_dirty: list[bool] = msgspec.field(default_factory=lambda: [False] * MAX_PACKAGES)
    cache_dirty: list[bool] = msgspec.field(default_factory=lambda: [False] * MAX_PACKAGES)
    next_kid: list[int] = msgspec.field(default_factory=lambda: [0] * MAX_PACKAGES)
    next_block: list[int] = msgspec.field(default_factory=lambda: [0] * MAX_PACKAGES)
    num_remaining_updates: int = 0
    seamdb_entries: int = 0
    seamdb_nonce: bytes = bytes(32)
    range_in_use: list[tuple[int, int]] = []
    installed: InstalledModule | None = None
    generation: int = 0

    @property
    def dirty(self) -> bool:
        """Keys or caches of some package may still hold what a module left there."""
        return any(self.key_dirty) or any(self.cache_dirty)
