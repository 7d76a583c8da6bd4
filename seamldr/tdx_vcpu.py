"""TDH.VP.*: creation, entry, flush; and the TD exit that ends an entry.

Source: Intel TDX module, `src/vmm_dispatcher/api_calls/tdh_vp_*.c`, `src/td_transitions/{tdh_vp_enter,td_exit}.c`.
"""

from __future__ import annotations

import enum

import msgspec

from seamldr.tdx_call import Call, Refused, operand_busy, operand_invalid
from seamldr.tdx_context import TDVPS_BASE_PAGES, ModuleContext
from seamldr.tdx_state import (
    NO_LP,
    NO_PA,
    LifeCycle,
    OpState,
    PageData,
    PageType,
    TdData,
    VcpuData,
    VcpuState,
)
from seamldr.tdx_status import OperandId, TdxStatus

ENTER_PA_MASK = 0x000F_FFFF_FFFF_F000
ENTER_RECOVERABILITY_HINT = 1 << 52
ENTER_RESUME_L1 = 1 << 53
IA32_TSC_ADJUST = 0x3B
MAX_TDCX_OF_VCPU = 15
HLT = 12
VMCALL_MASK = 0b1111 << 10  # R10 to R13
VMCALL_GPRS = ("r10", "r11", "r12", "r13")
NMI_INTERRUPTION = 0x8000_0202

_BUILDING = (OpState.INITIALIZED, OpState.STATE_IMPORT)
_RUNNABLE = (OpState.RUNNABLE, OpState.LIVE_EXPORT, OpState.LIVE_IMPORT)


class ExitReason(enum.IntEnum):
    """Basic VM exit reasons that end a TDH.VP.ENTER (SDM volume 3, appendix "VMX basic exit reasons")."""

    EXCEPTION_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    EPT_VIOLATION = 48
    TDCALL = 77


class ExitInfo(msgspec.Struct, frozen=True):
    """What a TD exit tells the host beside its reason.

    `status` is TDX_SUCCESS, or a TDX_NON_RECOVERABLE_* that makes the vCPU or the TD unusable. `vmcall`
    is R11 of a TDVMCALL: the sub-function that the guest asks for.
    """

    qualification: int = 0
    extended_qualification: int = 0
    gpa: int = 0
    interruption: int | None = None  # None: that of an NMI for EXCEPTION_NMI, else 0
    status: TdxStatus = TdxStatus.TDX_SUCCESS
    vmcall: int = HLT


def vp_create(m: ModuleContext, c: Call) -> int:
    """TDH.VP.CREATE: a free page becomes the TDVPR of a new vCPU."""
    td = m.lock_td(c, c.regs.rdx, OperandId.RDX, exclusive=False)
    m.check_td_state(c, td, _BUILDING, lock_op_state=True)
    m.lock_new_page(c, c.regs.rcx, OperandId.RCX)
    m.give_page(td, c.regs.rcx, PageData(PageType.PT_TDVPR))
    vcpu = VcpuData(c.regs.rcx, td.tdr)
    m.tds.vcpus[vcpu.tdvpr] = vcpu
    m.touch_vcpu(vcpu)
    return TdxStatus.TDX_SUCCESS


def vp_addcx(m: ModuleContext, c: Call) -> int:
    """TDH.VP.ADDCX: a free page becomes a control page of the vCPU."""
    vcpu, td = m.lock_vcpu(c, c.regs.rdx, OperandId.RDX, exclusive=True)
    m.check_td_state(c, td, _BUILDING, lock_op_state=True)
    if vcpu.state != VcpuState.VCPU_UNINITIALIZED:
        raise Refused(TdxStatus.TDX_VCPU_STATE_INCORRECT)
    if vcpu.num_tdcx >= MAX_TDCX_OF_VCPU:
        raise Refused(TdxStatus.TDX_TDCX_NUM_INCORRECT)
    m.lock_new_page(c, c.regs.rcx, OperandId.RCX)
    m.give_page(td, c.regs.rcx, PageData(PageType.PT_TDCX))
    vcpu.num_tdcx += 1
    m.touch_vcpu(vcpu)
    return TdxStatus.TDX_SUCCESS


def vp_init(m: ModuleContext, c: Call) -> int:
    """TDH.VP.INIT: the vCPU becomes ready, and is associated with the caller's LP."""
    if c.version > 1:
        raise operand_invalid(OperandId.RAX)
    vcpu, td = m.lock_vcpu(c, c.regs.rcx, OperandId.RCX, exclusive=True, td_exclusive=bool(c.version))
    m.check_td_state(c, td, (OpState.INITIALIZED,), lock_op_state=True)
    m.check_vcpu_pages(vcpu)
    if vcpu.state != VcpuState.VCPU_UNINITIALIZED:
        raise Refused(TdxStatus.TDX_VCPU_STATE_INCORRECT)
    if td.num_vcpus >= td.max_vcpus:
        raise Refused(TdxStatus.TDX_MAX_VCPUS_EXCEEDED)
    if c.version:
        vcpu.x2apic_id = _unique_x2apic_id(m, td, c.regs.r8)
    vcpu.index = td.num_vcpus
    vcpu.gprs = {"rcx": c.regs.rdx}
    vcpu.state = VcpuState.VCPU_READY
    vcpu.last_seamdb_index = m.state.system.seamdb_index
    td.num_vcpus += 1
    m.bind(vcpu, td, c.lp)
    return TdxStatus.TDX_SUCCESS


def _unique_x2apic_id(m: ModuleContext, td: TdData, x2apic_id: int) -> int:
    if x2apic_id >> 32:
        raise operand_invalid(OperandId.R8)
    if any(other.tdr == td.tdr and other.x2apic_id == x2apic_id for other in m.tds.vcpus.values()):
        raise Refused(TdxStatus.TDX_X2APIC_ID_NOT_UNIQUE | x2apic_id)
    return x2apic_id


def vp_enter(m: ModuleContext, c: Call) -> int:
    """TDH.VP.ENTER: on success the LP is in the guest, holding TDR and TDVPR shared, until `td_exit`."""
    rcx = c.regs.rcx
    if rcx & ~(ENTER_PA_MASK | ENTER_RECOVERABILITY_HINT | ENTER_RESUME_L1):
        raise operand_invalid(OperandId.RCX)
    vcpu, td = m.lock_vcpu(c, rcx & ENTER_PA_MASK, OperandId.RCX, exclusive=False)
    m.check_td_state(c, td, _RUNNABLE, lock_op_state=True)
    m.check_vcpu_pages(vcpu)
    m.associate(vcpu, td, c.lp, (VcpuState.VCPU_READY,))
    # Neither trap-like exits with a recoverability question nor L2 guests exist here.
    if rcx & (ENTER_RECOVERABILITY_HINT | ENTER_RESUME_L1):
        raise operand_invalid(OperandId.RCX)
    if m.hooks.tsc_adjust(c.lp) != m.state.system.init_tsc_adjust:
        raise Refused(TdxStatus.TDX_INCONSISTENT_MSR | IA32_TSC_ADJUST)
    if m.hooks.tsc(c.lp) < vcpu.last_exit_tsc:
        raise Refused(TdxStatus.TDX_TSC_ROLLBACK)
    c.lock(td.epoch_lock, operand_busy(OperandId.TD_EPOCH), exclusive=False)
    if vcpu.zero_step_defence:
        c.lock(td.sept_lock, operand_busy(OperandId.SEPT_TREE), exclusive=False)
    _enter_guest(m, c, vcpu, td)
    return TdxStatus.TDX_SUCCESS


def _enter_guest(m: ModuleContext, c: Call, vcpu: VcpuData, td: TdData) -> None:
    lp = m.state.lps[c.lp]
    lp.last_tdvpr = lp.running = vcpu.tdvpr
    vcpu.state = VcpuState.VCPU_ACTIVE
    vcpu.host_state_stale = False
    vcpu.pend_nmi = False  # delivered to the guest
    vcpu.epoch = td.epoch
    td.refcount[td.epoch & 1] += 1
    for number, name in enumerate(VMCALL_GPRS, 10):
        if vcpu.vmcall_mask >> number & 1:
            vcpu.gprs[name] = getattr(c.regs, name)
    vcpu.vmcall_mask = 0
    c.keep(td.page_lock, vcpu.page_lock)
    c.entered = vcpu
    m.touch_lp(c.lp)
    m.touch_vcpu(vcpu)
    m.touch_td(td)


def exit_guest(m: ModuleContext, lp: int, reason: ExitReason, info: ExitInfo) -> tuple[int, dict[str, int]]:
    """End the guest that runs on `lp`: RAX and the registers that the host sees. Raises ValueError if none runs."""
    data = m.state.lps[lp]
    if data.running == NO_PA:
        raise ValueError(f"LP {lp} runs no TD vCPU")
    vcpu = m.tds.vcpus[data.running]
    td = m.tds.tds[vcpu.tdr]
    disabled = info.status == TdxStatus.TDX_NON_RECOVERABLE_VCPU
    vcpu.state = VcpuState.VCPU_DISABLED if disabled else VcpuState.VCPU_READY
    if info.status in (TdxStatus.TDX_NON_RECOVERABLE_TD, TdxStatus.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE):
        td.fatal = True
    vcpu.last_exit_tsc = m.hooks.tsc(lp)
    td.refcount[vcpu.epoch & 1] -= 1
    td.page_lock.release(lp)
    vcpu.page_lock.release(lp)
    data.running = NO_PA
    data.is_busy = False
    m.touch_lp(lp)
    m.touch_vcpu(vcpu)
    m.touch_td(td)
    if reason == ExitReason.TDCALL:
        return int(reason), _vmcall_registers(vcpu, info)
    return info.status | reason, _exit_registers(reason, info)


def _vmcall_registers(vcpu: VcpuData, info: ExitInfo) -> dict[str, int]:
    """Synchronous exit: the guest's mask in RCX, and the GPRs that it selects."""
    vcpu.vmcall_mask = VMCALL_MASK
    values = (0, info.vmcall, vcpu.guest.counter, vcpu.guest.chain_low)
    return {"rcx": VMCALL_MASK, **dict(zip(VMCALL_GPRS, values, strict=True))}


def _exit_registers(reason: ExitReason, info: ExitInfo) -> dict[str, int]:
    """Asynchronous exit: RCX qualification, RDX extended qualification, R8 GPA, R9 interruption, the rest 0."""
    interruption = info.interruption
    if interruption is None:
        interruption = NMI_INTERRUPTION if reason == ExitReason.EXCEPTION_NMI else 0
    return {
        "rcx": info.qualification & 0xFFFF_FFFF,
        "rdx": info.extended_qualification,
        "r8": info.gpa,
        "r9": interruption,
        **dict.fromkeys(("r10", "r11", "r12", "r13"), 0),
    }


def vp_flush(m: ModuleContext, c: Call) -> int:
    """TDH.VP.FLUSH: drop the vCPU's translations and VMCS on the LP that holds it, which is the caller's."""
    vcpu, td = m.lock_vcpu(c, c.regs.rcx, OperandId.RCX, exclusive=True)
    if td.lifecycle != LifeCycle.TD_KEYS_CONFIGURED:
        raise Refused(TdxStatus.TDX_TD_KEYS_NOT_CONFIGURED)
    if vcpu.num_tdcx < TDVPS_BASE_PAGES - 1:
        raise Refused(TdxStatus.TDX_TDCX_NUM_INCORRECT)
    if vcpu.assoc_lpid != c.lp:
        raise Refused(TdxStatus.TDX_VCPU_NOT_ASSOCIATED)
    vcpu.assoc_lpid = NO_LP
    td.num_assoc_vcpus -= 1
    m.last_vcpu_gone(c.lp, vcpu.tdvpr)
    m.touch_vcpu(vcpu)
    m.touch_td(td)
    return TdxStatus.TDX_SUCCESS
