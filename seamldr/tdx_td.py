"""TDH.MNG.* and TDH.MR.*: the life of a trust domain from CREATE to FREEID, and its measurement.

The running MRTD context is emulated as a hash chain. The crypto library keeps it in a layout of its own; a library
that finds another's layout reads garbage, which is the published erratum of an update during a TD build.

Source: Intel TDX module, `src/vmm_dispatcher/api_calls/{tdh_mng_*,tdh_mr_*}.c`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

from bus.memory import PhysicalMemory
from seamldr import tdx_metadata
from seamldr.tdx_call import Call, Refused, operand_invalid
from seamldr.tdx_context import ModuleContext
from seamldr.tdx_state import (
    PAGE_SIZE,
    KotEntry,
    KotState,
    LifeCycle,
    OpState,
    PageData,
    PageType,
    TdData,
)
from seamldr.tdx_status import OperandId, TdxStatus

EXTRA_TDCX_PAGES = 4
EXTEND_SIZE = 256
TD_PARAMS_SIZE = 1024
_TD_PARAMS = struct.Struct("<QQHB5xQQH")
_EPTP_4_LEVELS = 0x1E
_EPTP_5_LEVELS = 0x26
MAX_VCPUS_A = 0xFFFF
MAX_L2_VMS = 3


def mng_create(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.CREATE: a free page becomes a TDR and a free key id is assigned to it."""
    hkid = c.regs.rdx
    if not m.platform.is_private_hkid(hkid):
        raise operand_invalid(OperandId.RDX)
    m.lock_new_page(c, c.regs.rcx, OperandId.RCX)
    m.lock_kot(c, exclusive=True)
    if m.kot_entry(hkid).state != KotState.FREE:
        raise Refused(TdxStatus.TDX_HKID_NOT_FREE)
    m.need_entropy(c)
    system = m.state.system
    system.kot[hkid] = KotEntry(KotState.ASSIGNED)
    m.touch_system()
    td = TdData(c.regs.rcx, hkid, m.identity.module_hv, system.seamdb_index, system.seamdb_nonce)
    m.tds.tds[td.tdr] = td
    m.give_page(td, td.tdr, PageData(PageType.PT_TDR))
    return TdxStatus.TDX_SUCCESS


def mng_key_config(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.KEY.CONFIG: the TD's key on the caller's package; all packages done, the TD's keys are configured."""
    td = m.lock_td(c, c.regs.rcx, OperandId.RCX, exclusive=True)
    if td.fatal:
        raise Refused(TdxStatus.TDX_TD_FATAL)
    if td.lifecycle != LifeCycle.TD_HKID_ASSIGNED:
        raise Refused(TdxStatus.TDX_LIFECYCLE_STATE_INCORRECT)
    bit = 1 << m.platform.pkg_of_lp[c.lp]
    if td.pkg_config_bitmap & bit:
        raise Refused(TdxStatus.TDX_KEY_CONFIGURED)
    m.configure_key(c)
    td.pkg_config_bitmap |= bit
    if td.pkg_config_bitmap == m.state.system.pkg_config_bitmap:
        td.lifecycle = LifeCycle.TD_KEYS_CONFIGURED
    m.touch_td(td)
    return TdxStatus.TDX_SUCCESS


def mng_addcx(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.ADDCX: a free page becomes a TDCS page."""
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=True)
    if td.fatal:
        raise Refused(TdxStatus.TDX_TD_FATAL)
    if td.lifecycle != LifeCycle.TD_KEYS_CONFIGURED:
        raise Refused(TdxStatus.TDX_TD_KEYS_NOT_CONFIGURED)
    if td.num_tdcx >= m.tdcs_base_pages + EXTRA_TDCX_PAGES:
        raise Refused(TdxStatus.TDX_TDCX_NUM_INCORRECT)
    if td.num_tdcx >= m.tdcs_base_pages and td.op_state != OpState.UNINITIALIZED:
        raise Refused(TdxStatus.TDX_OP_STATE_INCORRECT)
    m.lock_new_page(c, c.regs.rcx, OperandId.RCX)
    if td.num_tdcx + 1 == m.tdcs_base_pages:
        m.need_entropy(c)  # for the migration key
    td.num_tdcx += 1
    m.give_page(td, c.regs.rcx, PageData(PageType.PT_TDCX))
    return TdxStatus.TDX_SUCCESS


def td_params(
    *, max_vcpus: int, attributes: int = 0, xfam: int = tdx_metadata.XFAM_FIXED1, tsc_frequency: int = 80
) -> bytes:
    """`struct td_params`, 1024 bytes; `tsc_frequency` is in units of 25 MHz."""
    packed = _TD_PARAMS.pack(attributes, xfam, max_vcpus, 0, _EPTP_4_LEVELS, 0, tsc_frequency)
    return packed.ljust(TD_PARAMS_SIZE, b"\0")


def write_td_params(memory: PhysicalMemory, pa: int, **params: int) -> None:
    """Store `td_params` at `pa`."""
    memory.write(pa, td_params(**params))


def mng_init(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.INIT: the TD gets its parameters; from here until MR.FINALIZE it is in build."""
    td = m.lock_td(c, c.regs.rcx, OperandId.RCX, exclusive=True)
    m.check_td_state(c, td, (OpState.UNINITIALIZED,), lock_op_state=False)
    params_pa = m.check_shared_pa(c.regs.rdx, 1024, OperandId.RDX)
    _read_td_params(m, td, m.memory.read(params_pa, _TD_PARAMS.size))
    td.num_vcpus = td.num_assoc_vcpus = 0
    td.epoch = 1
    td.refcount = [0, 0]
    td.mrtd = bytes(48)
    td.mrtd_layout = m.identity.crypto_version
    td.op_state = OpState.INITIALIZED
    if m.profile_b:
        td.mrtd_context_version = m.identity.crypto_version
        m.state.system.td_build_count += 1
        m.touch_system()
    m.touch_td(td)
    c.out = {"rcx": 0}
    return TdxStatus.TDX_SUCCESS


def _read_td_params(m: ModuleContext, td: TdData, params: bytes) -> None:
    attributes, xfam, max_vcpus, l2_vms, eptp, flags, tsc_frequency = _TD_PARAMS.unpack(params)
    if attributes & ~tdx_metadata.ATTRIBUTES_FIXED0:
        raise operand_invalid(OperandId.ATTRIBUTES)
    if xfam & ~tdx_metadata.XFAM_FIXED0 or xfam & tdx_metadata.XFAM_FIXED1 != tdx_metadata.XFAM_FIXED1:
        raise operand_invalid(OperandId.XFAM)
    if not 1 <= max_vcpus <= (tdx_metadata.MAX_VCPUS_PER_TD_B if m.profile_b else MAX_VCPUS_A):
        raise operand_invalid(OperandId.MAX_VCPUS)
    if l2_vms > MAX_L2_VMS:
        raise operand_invalid(OperandId.NUM_L2_VMS)
    if flags & ~tdx_metadata.CONFIG_FLAGS_FIXED0:
        raise operand_invalid(OperandId.EXEC_CONTROLS)
    if eptp not in (_EPTP_4_LEVELS, _EPTP_5_LEVELS):
        raise operand_invalid(OperandId.EPTP_CONTROLS)
    if not 4 <= tsc_frequency <= 400:
        raise operand_invalid(OperandId.TSC_FREQUENCY)
    td.attributes, td.xfam, td.max_vcpus, td.tsc_frequency = attributes, xfam, max_vcpus, tsc_frequency


def extend_mrtd(m: ModuleContext, td: TdData, data: bytes) -> None:
    """Feed `data` to the running measurement."""
    context = td.mrtd
    if td.mrtd_layout != m.identity.crypto_version:
        context = hashlib.sha384(b"misread context" + context).digest()
        td.mrtd_layout = m.identity.crypto_version
    td.mrtd = hashlib.sha384(context + data).digest()
    m.touch_td(td)


def mrtd_of(pages: Mapping[int, bytes]) -> bytes:
    """What a TD's owner computes: MRTD of a TD that is built of these pages (GPA to 4 KiB), in this order."""
    context = bytes(48)

    def extend(data: bytes) -> None:
        nonlocal context
        context = hashlib.sha384(context + data).digest()

    for gpa, content in pages.items():
        extend(b"MEM.PAGE.ADD" + gpa.to_bytes(8, "little"))
        for at in range(0, PAGE_SIZE, EXTEND_SIZE):
            extend(b"MR.EXTEND" + (gpa + at).to_bytes(8, "little") + content[at : at + EXTEND_SIZE])
    extend(b"MR.FINALIZE")
    return context


def page_at(m: ModuleContext, td: TdData, gpa: int) -> tuple[int, PageData] | None:
    """The page of the TD, of any size, that is mapped at `gpa`."""
    for pa, page in m.tds.pages[td.tdr].entries.items():
        if page.type == PageType.PT_REG and page.gpa <= gpa < page.gpa + page.size:
            return pa, page
    return None


def mr_extend(m: ModuleContext, c: Call) -> int:
    """TDH.MR.EXTEND: measure 256 bytes of a page that was added."""
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=True)
    m.check_td_state(c, td, (OpState.INITIALIZED,), lock_op_state=False)
    gpa = c.regs.rcx
    if gpa % EXTEND_SIZE:
        raise operand_invalid(OperandId.RCX)
    found = page_at(m, td, gpa)
    if found is None:
        raise Refused(TdxStatus.TDX_EPT_WALK_FAILED | OperandId.RCX, rcx=0, rdx=0)
    pa, page = found
    extend_mrtd(m, td, b"MR.EXTEND" + gpa.to_bytes(8, "little") + m.memory.read(pa + gpa - page.gpa, EXTEND_SIZE))
    c.out = {"rcx": 0, "rdx": 0}
    return TdxStatus.TDX_SUCCESS


def mr_finalize(m: ModuleContext, c: Call) -> int:
    """TDH.MR.FINALIZE: the measurement is final, the TD may run."""
    td = m.lock_td(c, c.regs.rcx, OperandId.RCX, exclusive=True)
    m.check_td_state(c, td, (OpState.INITIALIZED,), lock_op_state=False)
    if td.num_vcpus == 0:
        raise Refused(TdxStatus.TDX_NO_VCPUS)
    if m.state.system.update_compatibility and td.mrtd_context_version != m.identity.crypto_version:
        raise Refused(TdxStatus.TDX_INCOMPATIBLE_MRTD_CONTEXT)
    extend_mrtd(m, td, b"MR.FINALIZE")
    td.op_state = OpState.RUNNABLE
    end_build(m, td)
    return TdxStatus.TDX_SUCCESS


def end_build(m: ModuleContext, td: TdData) -> None:
    """The TD holds no measurement context any more."""
    if m.profile_b and td.mrtd_context_version:
        td.mrtd_context_version = 0
        m.state.system.td_build_count -= 1
        m.touch_system()


def mng_vpflushdone(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.VPFLUSHDONE: no LP holds a vCPU; the key id waits for cache write-back."""
    td = m.lock_td(c, c.regs.rcx, OperandId.RCX, exclusive=True)
    m.lock_kot(c, exclusive=True)
    if td.lifecycle not in (LifeCycle.TD_HKID_ASSIGNED, LifeCycle.TD_KEYS_CONFIGURED):
        raise Refused(TdxStatus.TDX_LIFECYCLE_STATE_INCORRECT)
    if td.num_assoc_vcpus:
        raise Refused(TdxStatus.TDX_FLUSHVP_NOT_DONE)
    m.state.system.kot[td.hkid] = KotEntry(KotState.FLUSHED, m.all_pkgs)
    td.lifecycle = LifeCycle.TD_BLOCKED
    # An unfinished TD must not keep refusing updates once it is being torn down.
    end_build(m, td)
    m.state.system.mig_interrupted_count -= td.mig_interrupted_count
    td.mig_interrupted_count = 0
    m.touch_system()
    m.touch_td(td)
    return TdxStatus.TDX_SUCCESS


def mng_key_freeid(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.KEY.FREEID: caches are written back everywhere, the key id is free again."""
    td = m.lock_td(c, c.regs.rcx, OperandId.RCX, exclusive=True)
    if td.lifecycle != LifeCycle.TD_BLOCKED:
        raise Refused(TdxStatus.TDX_LIFECYCLE_STATE_INCORRECT)
    m.lock_kot(c, exclusive=True)
    if m.kot_entry(td.hkid).wb_bitmap:
        raise Refused(TdxStatus.TDX_WBCACHE_NOT_COMPLETE)
    del m.state.system.kot[td.hkid]
    td.lifecycle = LifeCycle.TD_TEARDOWN
    m.touch_system()
    m.touch_td(td)
    return TdxStatus.TDX_SUCCESS


def mng_key_reclaimid(m: ModuleContext, c: Call) -> int:
    """TDH.MNG.KEY.RECLAIMID: does nothing, kept for old hosts."""
    return TdxStatus.TDX_SUCCESS
