"""What the TDX module remembers, in two parts that an update treats differently.

`ModuleState` lives in the module's own range: an install wipes it, and only the tables of the handoff area
come back. `TdMemory` lives in TD-private memory and PAMT: an install does not touch it. Both are plain `msgspec`
structures; records that change at every call (`LpData`, `TdData`, `VcpuData`) are small and kept apart from those
that do not (`SystemData`, `TdPages`).

Source: Intel TDX module, `src/common/data_structures/*.h`.
"""

from __future__ import annotations

import enum
import hashlib

import msgspec

from seamldr.tdx_locks import Lock

PAGE_SIZE = 4096
NO_LP = 0xFFFF_FFFF
NO_PA = 0xFFFF_FFFF_FFFF_FFFF
MAX_KEYIDS = 2048
MAX_PKGS = 8
MAX_TDMRS = 64
MAX_RESERVED_PER_TDMR = 16
TDMR_GRANULE = 1 << 30
PAMT_RANGE = 1 << 21


class SysState(enum.IntEnum):
    """Life of a module instance; zeroed memory means SYSINIT_PENDING."""

    SYSINIT_PENDING = 0
    SYSINIT_DONE = 1
    SYSCONFIG_DONE = 2
    SYS_READY = 3
    SYS_SHUTDOWN = 4  # left only by an install


class KotState(enum.IntEnum):
    """State of a private key id in the key ownership table."""

    FREE = 0
    ASSIGNED = 1
    FLUSHED = 2  # no vCPU caches it any more; caches are not written back yet
    RESERVED = 3  # the module's own global key


class LifeCycle(enum.IntEnum):
    """TDR.LIFECYCLE_STATE."""

    TD_HKID_ASSIGNED = 0
    TD_KEYS_CONFIGURED = 1
    TD_BLOCKED = 2
    TD_TEARDOWN = 3


class OpState(enum.IntEnum):
    """TDCS.OP_STATE; the states after RUNNABLE belong to migration."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2
    LIVE_EXPORT = 3
    PAUSED_EXPORT = 4
    POST_EXPORT = 5
    MEMORY_IMPORT = 6
    STATE_IMPORT = 7
    POST_IMPORT = 8
    LIVE_IMPORT = 9
    FAILED_IMPORT = 10


class VcpuState(enum.IntEnum):
    """TDVPS.VCPU_STATE."""

    VCPU_UNINITIALIZED = 0
    VCPU_READY = 2
    VCPU_ACTIVE = 4
    VCPU_DISABLED = 8


class PageType(enum.IntEnum):
    """PAMT.PT."""

    PT_NDA = 0
    PT_RSVD = 1
    PT_REG = 3
    PT_TDR = 4
    PT_TDCX = 5
    PT_TDVPR = 6
    PT_EPT = 8


class EntryState(enum.IntEnum):
    """State of a leaf entry of the Secure EPT."""

    MAPPED = 0
    PENDING = 1
    BLOCKED = 2
    PENDING_BLOCKED = 3


class KotEntry(msgspec.Struct, array_like=True):
    """One key id; a key id without an entry is FREE."""

    state: KotState
    wb_bitmap: int = 0  # packages whose caches still hold lines of it


class WbtEntry(msgspec.Struct, array_like=True):
    """Cache write-back of one package."""

    resume_block: int = 0  # 0: nothing was interrupted
    hkids: list[int] = msgspec.field(default_factory=list)  # those that were FLUSHED at start
    mutex: Lock = msgspec.field(default_factory=Lock)


class Tdmr(msgspec.Struct, array_like=True):
    """A TD memory region; pages below `base + initialized` are usable, whole GiB only."""

    base: int
    size: int
    pamt: tuple[int, int, int]  # bases of the 1 GiB, 2 MiB and 4 KiB PAMT
    reserved: list[tuple[int, int]]  # offset and size
    initialized: int = 0
    mutex: Lock = msgspec.field(default_factory=Lock)


class SystemData(msgspec.Struct, array_like=True):
    """Globals of one module instance."""

    sys_state: SysState = SysState.SYSINIT_PENDING
    dead: bool = False
    num_init_lps: int = 0
    pkg_config_bitmap: int = 0
    global_lock: Lock = msgspec.field(default_factory=Lock)
    global_hkid: int = 0
    dynamic_pamt: bool = False
    seamdb_index: int = 0
    seamdb_nonce: int = 0
    init_tsc_adjust: int = 0
    init_cpuid: int = 0
    td_build_count: int = 0
    mig_interrupted_count: int = 0
    update_compatibility: bool = False
    kot: dict[int, KotEntry] = msgspec.field(default_factory=dict)
    kot_lock: Lock = msgspec.field(default_factory=Lock)
    wbt: list[WbtEntry] = msgspec.field(default_factory=list)
    tdmrs: list[Tdmr] = msgspec.field(default_factory=list)


class LpData(msgspec.Struct, array_like=True):
    """The module's data of one LP."""

    is_init: bool = False
    is_busy: bool = False
    last_tdvpr: int = NO_PA
    running: int = NO_PA  # TDVPR of the vCPU that is in its guest here


class ModuleState(msgspec.Struct, array_like=True):
    """All that lives in the module's range; a fresh one is the module right after an install."""

    system: SystemData = msgspec.field(default_factory=SystemData)
    lps: dict[int, LpData] = msgspec.field(default_factory=dict)


class TdData(msgspec.Struct, array_like=True):
    """TDR and TDCS of one TD."""

    tdr: int
    hkid: int
    handoff_version: int
    seamdb_index: int
    seamdb_nonce: int
    lifecycle: LifeCycle = LifeCycle.TD_HKID_ASSIGNED
    fatal: bool = False
    pkg_config_bitmap: int = 0
    chldcnt: int = 0
    num_tdcx: int = 0
    op_state: OpState = OpState.UNINITIALIZED
    attributes: int = 0
    xfam: int = 0
    max_vcpus: int = 0
    tsc_frequency: int = 0
    num_vcpus: int = 0
    num_assoc_vcpus: int = 0
    epoch: int = 0
    refcount: list[int] = msgspec.field(default_factory=lambda: [0, 0])  # by parity of the epoch
    mrtd: bytes = bytes(48)  # running context until MR.FINALIZE, the measurement after it
    mrtd_layout: int = 0  # crypto library whose layout the running context has
    mrtd_context_version: int = 0  # the tag that profile B writes; 0: no context to protect
    mig_interrupted_count: int = 0
    page_lock: Lock = msgspec.field(default_factory=Lock)
    op_state_lock: Lock = msgspec.field(default_factory=Lock)
    epoch_lock: Lock = msgspec.field(default_factory=Lock)
    sept_lock: Lock = msgspec.field(default_factory=Lock)


class GuestMemory(msgspec.Struct, array_like=True):
    """The private words of one vCPU's guest: a counter and a hash chain over all its values."""

    counter: int = 0
    chain: bytes = bytes(32)

    def unit(self) -> None:
        """One unit of guest work: chain := SHA-256(chain, counter as u64 LE), after counter := counter + 1."""
        self.counter += 1
        self.chain = hashlib.sha256(self.chain + self.counter.to_bytes(8, "little")).digest()

    @property
    def chain_low(self) -> int:
        """The low 64 bits of the chain, as R13 of a TDVMCALL carries them."""
        return int.from_bytes(self.chain[:8], "little")


class VcpuData(msgspec.Struct, array_like=True):
    """TDVPS of one vCPU."""

    tdvpr: int
    tdr: int
    state: VcpuState = VcpuState.VCPU_UNINITIALIZED
    assoc_lpid: int = NO_LP
    index: int = 0
    num_tdcx: int = 0
    epoch: int = 0
    x2apic_id: int | None = None
    last_seamdb_index: int = 0
    host_state_stale: bool = True  # the VMCS host state is rewritten at the next entry
    last_exit_tsc: int = 0
    vmcall_mask: int = 0  # GPRs that the next VP.ENTER hands to the guest
    pend_nmi: bool = False
    zero_step_defence: bool = False
    gprs: dict[str, int] = msgspec.field(default_factory=dict)
    guest: GuestMemory = msgspec.field(default_factory=GuestMemory)
    page_lock: Lock = msgspec.field(default_factory=Lock)


class PageData(msgspec.Struct, array_like=True):
    """PAMT entry of a page, and the Secure EPT entry that maps it if it is a REG or EPT page.

    `level` is that of the Secure EPT entry: 0 is a page of 4 KiB, 1 one of 2 MiB or the table of such a range.
    """

    type: PageType
    gpa: int = 0
    level: int = 0
    state: EntryState = EntryState.MAPPED
    block_epoch: int = 0

    @property
    def range(self) -> int:
        """Bytes of guest-physical memory behind the Secure EPT entry."""
        return PAGE_SIZE << 9 * self.level

    @property
    def size(self) -> int:
        """Bytes of physical memory that the page takes."""
        return self.range if self.type == PageType.PT_REG else PAGE_SIZE

    @property
    def children(self) -> int:
        """What the page counts in TDR.CHLDCNT, which counts pages of 4 KiB."""
        return 0 if self.type == PageType.PT_TDR else self.size // PAGE_SIZE


class TdPages(msgspec.Struct, array_like=True):
    """All pages that one TD owns, by physical address, its TDR included."""

    entries: dict[int, PageData] = msgspec.field(default_factory=dict)


class PamtPairs(msgspec.Struct, array_like=True):
    """Dynamic PAMT: the two pages that hold the PAMT entries of a range of 2 MiB, by its base."""

    pairs: dict[int, tuple[int, int]] = msgspec.field(default_factory=dict)

    def taken(self, pa: int) -> bool:
        """Whether the page at `pa` holds PAMT entries."""
        return any(pa in pair for pair in self.pairs.values())


class TdMemory(msgspec.Struct, array_like=True):
    """All that lives in TD-private memory and PAMT: keyed by TDR PA, TDVPR PA and TDR PA."""

    tds: dict[int, TdData] = msgspec.field(default_factory=dict)
    vcpus: dict[int, VcpuData] = msgspec.field(default_factory=dict)
    pages: dict[int, TdPages] = msgspec.field(default_factory=dict)
    pamt: PamtPairs = msgspec.field(default_factory=PamtPairs)
