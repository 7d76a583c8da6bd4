"""TDH.SYS.*: bring-up, shutdown and the take-over of a handoff.

Source: Intel TDX module, `src/vmm_dispatcher/api_calls/tdh_sys_*.c`. The order of checks is the module's.
"""

from __future__ import annotations

import enum
from collections.abc import Generator

from seamldr import tdx_handoff
from seamldr.tdx_call import Call, Refused, operand_busy, operand_invalid
from seamldr.tdx_context import ModuleContext
from seamldr.tdx_handoff import HandoffHeader
from seamldr.tdx_platform import HandoffParams
from seamldr.tdx_state import (
    MAX_PKGS,
    MAX_TDMRS,
    NO_PA,
    TDMR_GRANULE,
    KotEntry,
    KotState,
    SysState,
)
from seamldr.tdx_status import OperandId, TdxStatus
from seamldr.tdx_tdmr import read_tdmrs

AVOID_COMPAT_SENSITIVE = 1 << 16
UPDATE_COMPATIBILITY = 1 << 47
DYNAMIC_PAMT = 1 << 16
SEAMREPORT_AND_GETREF = 0b1100
IA32_TSC_ADJUST = 0x3B
TDMR_INIT_STEP = 4 << 20  # bytes of a TDMR whose PAMT one TDH.SYS.TDMR.INIT initialises


class Point(enum.Enum):
    """Where in a SEAMCALL other LPs may act; see `TdxModule.seamcall_steps`."""

    LP_BUSY = "the LP is marked busy, the system state is not yet read"
    STATE_CHECKED = "the system state was read, the leaf has not begun"
    STATE_STORED = "SYS.SHUTDOWN has stored its state, busy LPs are not yet counted"


def sys_init(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.INIT: once in the life of a module instance, on any LP."""
    m.lock_global(c, exclusive=True)
    system = m.state.system
    if c.version > 1:
        raise operand_invalid(OperandId.RAX)
    if c.regs.rcx:
        raise operand_invalid(OperandId.RCX)
    if system.sys_state != SysState.SYSINIT_PENDING:
        raise Refused(TdxStatus.TDX_SYS_INIT_NOT_PENDING)
    _check_cmrs(m)
    if m.hooks.seam_capabilities(c.lp) & SEAMREPORT_AND_GETREF != SEAMREPORT_AND_GETREF:
        raise Refused(TdxStatus.TDX_INCOMPATIBLE_SEAM_CAPABILITIES)
    _check_handoff_params(m)
    m.need_entropy(c)
    system.seamdb_index = m.platform.seamdb_index
    system.seamdb_nonce = m.platform.seamdb_nonce
    system.init_tsc_adjust = m.hooks.tsc_adjust(c.lp)
    system.init_cpuid = m.hooks.cpuid_fms(c.lp)
    system.num_init_lps = 0
    system.pkg_config_bitmap = 0
    system.td_build_count = 0
    system.mig_interrupted_count = 0
    system.sys_state = SysState.SYSINIT_DONE
    m.touch_system()
    c.out = dict.fromkeys(("rcx", "rdx", "r8", "r9", "r10"), 0)
    return TdxStatus.TDX_SUCCESS


def _check_cmrs(m: ModuleContext) -> None:
    end = 0
    for base, size in m.platform.cmrs:
        if base % 4096 or size % 4096 or size == 0 or base < end:
            raise Refused(TdxStatus.TDX_CMR_LIST_INVALID)
        end = base + size


def _check_handoff_params(m: ModuleContext) -> None:
    """What the signature structure says about handoff must not contradict what is built in."""
    built_in = m.identity
    given = m.platform.handoff_params or HandoffParams(
        built_in.module_hv, built_in.min_update_hv, built_in.no_downgrade, built_in.num_handoff_pages
    )
    if (
        given.module_hv != built_in.module_hv
        or given.min_update_hv < built_in.min_update_hv
        or (built_in.no_downgrade and not given.no_downgrade)
        or given.num_handoff_pages + 1 < tdx_handoff.HANDOFF_PAGES
    ):
        raise Refused(TdxStatus.TDX_SYS_INCOMPATIBLE_SIGSTRUCT)


def sys_lp_init(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.LP.INIT: once on each LP, in parallel."""
    m.lock_global(c, exclusive=False)
    system = m.state.system
    lp = m.state.lps[c.lp]
    if system.sys_state != SysState.SYSINIT_DONE:
        raise Refused(TdxStatus.TDX_SYS_LP_INIT_NOT_PENDING)
    if lp.is_init:
        raise Refused(TdxStatus.TDX_SYS_LP_INIT_DONE)
    lp.last_tdvpr = NO_PA
    m.need_entropy(c)
    if m.hooks.seam_capabilities(c.lp) & SEAMREPORT_AND_GETREF != SEAMREPORT_AND_GETREF:
        raise Refused(TdxStatus.TDX_INCOMPATIBLE_SEAM_CAPABILITIES)
    if m.hooks.tsc_adjust(c.lp) != system.init_tsc_adjust:
        raise Refused(TdxStatus.TDX_INCONSISTENT_MSR | IA32_TSC_ADJUST)
    difference = m.hooks.cpuid_fms(c.lp) ^ system.init_cpuid
    if difference:
        raise Refused(TdxStatus.TDX_INCONSISTENT_CPUID_FIELD, rcx=1 | 0xFFFF_FFFF << 32, rdx=difference, r8=0)
    if m.platform.pkg_of_lp[c.lp] >= MAX_PKGS:
        raise Refused(TdxStatus.TDX_INVALID_PKG_ID | m.platform.pkg_of_lp[c.lp])
    lp.is_init = True
    system.num_init_lps += 1
    m.touch_system()
    m.touch_lp(c.lp)
    c.out = dict.fromkeys(("rcx", "rdx", "r8"), 0)
    return TdxStatus.TDX_SUCCESS


def _all_lps_done(m: ModuleContext) -> bool:
    system = m.state.system
    return system.sys_state == SysState.SYSINIT_DONE and system.num_init_lps >= m.platform.num_lps


def _check_enabling_flags(m: ModuleContext, c: Call) -> None:
    """R9 and R10 of version 1 of SYS.CONFIG and SYS.UPDATE."""
    if c.version > 1:
        raise operand_invalid(OperandId.RAX)
    if c.regs.r9 & ~m.identity.tdx_features0:
        raise operand_invalid(OperandId.R9)
    if c.regs.r10:
        raise operand_invalid(OperandId.R10)


def sys_config(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.CONFIG: the memory regions and the global key id, on the cold path only."""
    m.lock_global(c, exclusive=True)
    system = m.state.system
    if not _all_lps_done(m):
        raise Refused(TdxStatus.TDX_SYS_CONFIG_NOT_PENDING)
    array_pa = m.check_shared_pa(c.regs.rcx, 512, OperandId.RCX)
    if not 1 <= c.regs.rdx <= MAX_TDMRS:
        raise operand_invalid(OperandId.RDX)
    hkid = c.regs.r8 & 0xFFFF
    allowed = 0xFFFF | (DYNAMIC_PAMT if m.profile_b else 0)
    if c.regs.r8 & ~allowed or not m.platform.is_private_hkid(hkid):
        raise operand_invalid(OperandId.R8)
    if c.version:
        _check_enabling_flags(m, c)
    system.tdmrs = read_tdmrs(m, array_pa, c.regs.rdx)
    system.global_hkid = hkid
    system.kot[hkid] = KotEntry(KotState.RESERVED)
    system.dynamic_pamt = bool(c.regs.r8 & DYNAMIC_PAMT)
    system.update_compatibility = bool(c.version and c.regs.r9 & UPDATE_COMPATIBILITY)
    system.sys_state = SysState.SYSCONFIG_DONE
    m.touch_system()
    return TdxStatus.TDX_SUCCESS


def sys_key_config(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.KEY.CONFIG: the global key on the caller's package; the last package makes the system ready."""
    m.lock_global(c, exclusive=True)
    system = m.state.system
    if system.sys_state != SysState.SYSCONFIG_DONE:
        raise Refused(TdxStatus.TDX_SYS_KEY_CONFIG_NOT_PENDING)
    bit = 1 << m.platform.pkg_of_lp[c.lp]
    if system.pkg_config_bitmap & bit:
        raise Refused(TdxStatus.TDX_KEY_CONFIGURED)
    m.configure_key(c)
    system.pkg_config_bitmap |= bit
    if system.pkg_config_bitmap == m.all_pkgs:
        system.sys_state = SysState.SYS_READY
    m.touch_system()
    return TdxStatus.TDX_SUCCESS


def sys_tdmr_init(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.TDMR.INIT: initialise the PAMT of the next 4 MiB of a TDMR."""
    tdmr = next((t for t in m.state.system.tdmrs if t.base == c.regs.rcx), None)
    if tdmr is None:
        raise operand_invalid(OperandId.RCX)
    c.lock(tdmr.mutex, operand_busy(OperandId.RCX), exclusive=True)
    if tdmr.initialized >= tdmr.size:
        raise Refused(TdxStatus.TDX_TDMR_ALREADY_INITIALIZED)
    start = tdmr.base + tdmr.initialized
    m.forget_pages(start, start + TDMR_INIT_STEP)
    tdmr.initialized += TDMR_INIT_STEP
    m.touch_system()
    c.out = {"rdx": tdmr.base + tdmr.initialized // TDMR_GRANULE * TDMR_GRANULE}
    return TdxStatus.TDX_SUCCESS


def sys_lp_shutdown(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.LP.SHUTDOWN: does nothing since TDX 1.5."""
    return TdxStatus.TDX_SUCCESS


def sys_shutdown(m: ModuleContext, c: Call) -> Generator[Point, None, int]:
    """TDH.SYS.SHUTDOWN: write the handoff and answer no more.

    Storing the state before looking at the busy flags is one half of a handshake; the dispatcher, which marks its LP
    busy before it reads the state, is the other.
    """
    system = m.state.system
    requested = c.regs.rcx & 0xFFFF
    _check_requested_handoff(m, c.regs.rcx)
    m.lock_global(c, exclusive=True)
    system.sys_state = SysState.SYS_SHUTDOWN
    yield Point.STATE_STORED
    try:
        if m.busy_lps() > 1:
            raise Refused(TdxStatus.TDX_SYS_BUSY)
        if c.regs.rcx & AVOID_COMPAT_SENSITIVE:
            _check_compat_sensitive(m)
    except Refused:
        system.sys_state = SysState.SYS_READY
        raise
    tdx_handoff.write_payload(m.memory, m.platform.handoff_pa, requested, system)
    header = HandoffHeader(1, requested, tdx_handoff.payload_size(requested))
    tdx_handoff.write_header(m.memory, m.platform.handoff_pa, header)
    m.touch_system()
    return TdxStatus.TDX_SUCCESS


def _check_requested_handoff(m: ModuleContext, rcx: int) -> None:
    identity = m.identity
    version = rcx & ~AVOID_COMPAT_SENSITIVE if m.profile_b else rcx
    if not identity.min_update_hv <= version <= identity.module_hv:
        raise operand_invalid(OperandId.RCX)
    if identity.no_downgrade and version != identity.module_hv:
        raise operand_invalid(OperandId.RCX)


def _check_compat_sensitive(m: ModuleContext) -> None:
    """The count of what an update would disturb goes to bits 31:16, its kind to bits 15:0."""
    system = m.state.system
    for kind, count in enumerate((system.td_build_count, system.mig_interrupted_count)):
        if count:
            raise Refused(TdxStatus.TDX_UPDATE_COMPATIBILITY_SENSITIVE | count << 16 | kind)


def sys_update(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.UPDATE: take over the handoff instead of being configured; a failure may be retried."""
    m.lock_global(c, exclusive=True)
    system = m.state.system
    if not _all_lps_done(m):
        raise Refused(TdxStatus.TDX_SYS_STATE_INCORRECT)
    header = tdx_handoff.read_header(m.memory, m.platform.handoff_pa)
    if not header.valid or not m.identity.min_update_hv <= header.hv <= m.identity.module_hv:
        raise Refused(TdxStatus.TDX_SYS_INVALID_HANDOFF)
    if c.version:
        _check_enabling_flags(m, c)
    tdx_handoff.read_payload(m.memory, m.platform.handoff_pa, header.hv, m.platform.num_pkgs, system)
    system.update_compatibility = bool(c.version and c.regs.r9 & UPDATE_COMPATIBILITY)
    tdx_handoff.write_header(m.memory, m.platform.handoff_pa, HandoffHeader(0, header.hv, 0))
    system.sys_state = SysState.SYS_READY
    m.touch_system()
    return TdxStatus.TDX_SUCCESS


def sys_disable(m: ModuleContext, c: Call) -> int:
    """TDH.SYS.DISABLE: free all that TDs have and forget every configuration, so that another kernel may begin anew.

    A host interrupt may come between two TDs; then the host calls again.
    """
    m.lock_global(c, exclusive=True)
    if m.busy_lps() > 1:
        raise Refused(TdxStatus.TDX_SYS_BUSY)
    for tdr in list(m.tds.tds):
        m.take_page(tdr)
        if m.tds.tds and m.hooks.interrupt_pending(c.lp):
            raise Refused(TdxStatus.TDX_INTERRUPTED_RESUMABLE)
    m.tds.pamt.pairs.clear()
    tdx_handoff.write_header(m.memory, m.platform.handoff_pa, HandoffHeader())
    m.forget_configuration()
    return TdxStatus.TDX_SUCCESS
