"""The TDX module: a pure state machine that answers SEAMCALLs with bit 63 of RAX clear.

    module = TdxModule(identity, platform, memory)          # right after an install
    result = module.seamcall(lp, TdhLeaf.TDH_SYS_INIT, Registers())

A TDH.VP.ENTER that succeeds leaves the LP *in the guest*: `Result.running` names the vCPU, its locks stay held and
the LP stays busy, `guest_step` lets the guest work, and `td_exit` ends it. Everything else is over when `seamcall`
returns.

An update makes a new `TdxModule` from the new image's identity, the same memory (the handoff area is in it) and the
same `tds`; a restart of the emulator makes one from the saved state too. `dirty` names the records that changed:

    system          globals, key ownership, write-back and TDMR tables
    lp:N            one logical processor
    td:PA           one TD (TDR and TDCS), by hexadecimal TDR address
    pages:PA        the pages of that TD (PAMT and Secure EPT)
    vcpu:PA         one vCPU, by TDVPR address
    pamt            pages that hold PAMT entries (dynamic PAMT)

Source: Intel TDX module, `src/vmm_dispatcher/tdx_vmm_dispatcher.c`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

import msgspec

from seamldr import tdx_mem, tdx_metadata, tdx_pamt, tdx_phymem, tdx_sept, tdx_sys, tdx_td, tdx_vcpu
from seamldr.tdx_call import Call, Hooks, ModuleDead, Refused, Registers, operand_invalid
from seamldr.tdx_context import ModuleContext
from seamldr.tdx_leaves import (
    BEFORE_READY,
    LEAF_MASK,
    RESERVED_MASK,
    VERSION_MASK,
    VERSION_SHIFT,
    VERSIONED_A,
    VERSIONED_B,
    TdhLeaf,
)
from seamldr.tdx_platform import ModulePlatform
from seamldr.tdx_state import (
    NO_PA,
    LpData,
    ModuleState,
    PamtPairs,
    SysState,
    SystemData,
    TdData,
    TdMemory,
    TdPages,
    VcpuData,
)
from seamldr.tdx_status import OperandId, TdxStatus
from seamldr.tdx_sys import Point
from seamldr.tdx_vcpu import ExitInfo, ExitReason

__all__ = [
    "ExitInfo",
    "ExitReason",
    "Hooks",
    "ModuleDead",
    "ModulePlatform",
    "ModuleState",
    "Point",
    "Registers",
    "Result",
    "TdMemory",
    "TdxModule",
]

HANDLERS: dict[int, Callable[[ModuleContext, Call], int]] = {
    TdhLeaf.TDH_VP_ENTER: tdx_vcpu.vp_enter,
    TdhLeaf.TDH_MNG_ADDCX: tdx_td.mng_addcx,
    TdhLeaf.TDH_MEM_PAGE_ADD: tdx_mem.mem_page_add,
    TdhLeaf.TDH_MEM_SEPT_ADD: tdx_sept.mem_sept_add,
    TdhLeaf.TDH_VP_ADDCX: tdx_vcpu.vp_addcx,
    TdhLeaf.TDH_MEM_PAGE_AUG: tdx_mem.mem_page_aug,
    TdhLeaf.TDH_MEM_RANGE_BLOCK: tdx_mem.mem_range_block,
    TdhLeaf.TDH_MNG_KEY_CONFIG: tdx_td.mng_key_config,
    TdhLeaf.TDH_MNG_CREATE: tdx_td.mng_create,
    TdhLeaf.TDH_VP_CREATE: tdx_vcpu.vp_create,
    TdhLeaf.TDH_MNG_RD: tdx_metadata.mng_rd,
    TdhLeaf.TDH_MNG_WR: tdx_metadata.mng_wr,
    TdhLeaf.TDH_MR_EXTEND: tdx_td.mr_extend,
    TdhLeaf.TDH_MR_FINALIZE: tdx_td.mr_finalize,
    TdhLeaf.TDH_VP_FLUSH: tdx_vcpu.vp_flush,
    TdhLeaf.TDH_MNG_VPFLUSHDONE: tdx_td.mng_vpflushdone,
    TdhLeaf.TDH_MNG_KEY_FREEID: tdx_td.mng_key_freeid,
    TdhLeaf.TDH_MNG_INIT: tdx_td.mng_init,
    TdhLeaf.TDH_VP_INIT: tdx_vcpu.vp_init,
    TdhLeaf.TDH_MEM_PAGE_PROMOTE: tdx_sept.mem_page_promote,
    TdhLeaf.TDH_PHYMEM_PAGE_RDMD: tdx_phymem.phymem_page_rdmd,
    TdhLeaf.TDH_VP_RD: tdx_metadata.vp_rd,
    TdhLeaf.TDH_MNG_KEY_RECLAIMID: tdx_td.mng_key_reclaimid,
    TdhLeaf.TDH_PHYMEM_PAGE_RECLAIM: tdx_phymem.phymem_page_reclaim,
    TdhLeaf.TDH_MEM_PAGE_REMOVE: tdx_mem.mem_page_remove,
    TdhLeaf.TDH_MEM_SEPT_REMOVE: tdx_sept.mem_sept_remove,
    TdhLeaf.TDH_SYS_KEY_CONFIG: tdx_sys.sys_key_config,
    TdhLeaf.TDH_SYS_INFO: tdx_metadata.sys_info,
    TdhLeaf.TDH_SYS_INIT: tdx_sys.sys_init,
    TdhLeaf.TDH_SYS_RD: tdx_metadata.sys_rd,
    TdhLeaf.TDH_SYS_LP_INIT: tdx_sys.sys_lp_init,
    TdhLeaf.TDH_SYS_TDMR_INIT: tdx_sys.sys_tdmr_init,
    TdhLeaf.TDH_SYS_RDALL: tdx_metadata.sys_rdall,
    TdhLeaf.TDH_MEM_TRACK: tdx_mem.mem_track,
    TdhLeaf.TDH_MEM_RANGE_UNBLOCK: tdx_mem.mem_range_unblock,
    TdhLeaf.TDH_PHYMEM_CACHE_WB: tdx_phymem.phymem_cache_wb,
    TdhLeaf.TDH_PHYMEM_PAGE_WBINVD: tdx_phymem.phymem_page_wbinvd,
    TdhLeaf.TDH_VP_WR: tdx_metadata.vp_wr,
    TdhLeaf.TDH_SYS_LP_SHUTDOWN: tdx_sys.sys_lp_shutdown,
    TdhLeaf.TDH_SYS_CONFIG: tdx_sys.sys_config,
    TdhLeaf.TDH_SYS_UPDATE: tdx_sys.sys_update,
    TdhLeaf.TDH_PHYMEM_PAMT_ADD: tdx_pamt.phymem_pamt_add,
    TdhLeaf.TDH_PHYMEM_PAMT_REMOVE: tdx_pamt.phymem_pamt_remove,
    TdhLeaf.TDH_SYS_DISABLE: tdx_sys.sys_disable,
}


FEATURE_SYS_DISABLE = 1 << 53
"""Bit of TDX_FEATURES0: TDH.SYS.DISABLE is there."""

RecordT = TypeVar("RecordT")


class Result(msgspec.Struct, frozen=True):
    """What the host sees after a SEAMCALL: RAX, and only those registers that the leaf writes.

    `running` is the TDVPR of the vCPU that is in its guest now: then there is no RAX yet, `td_exit` brings it.
    """

    rax: int
    out: dict[str, int] = {}
    running: int | None = None


class TdxModule(ModuleContext):
    """One installed TDX module. `seamcall` raises only ModuleDead, which is VMfailInvalid for the caller."""

    def seamcall(self, lp: int, rax: int, args: Registers) -> Result:
        """Make one call on `lp`, which must not be in a guest (ValueError) and must exist (KeyError)."""
        steps = self.seamcall_steps(lp, rax, args)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: Result = end.value
                return result

    def seamcall_steps(self, lp: int, rax: int, args: Registers) -> Generator[Point, None, Result]:
        """The same call, stopped at every point where calls of other LPs may come in between."""
        self.assert_alive()
        data = self.state.lps[lp]
        if data.is_busy:
            raise ValueError(f"LP {lp} is already inside the module or a guest")
        data.is_busy = True
        yield Point.LP_BUSY
        call = Call(lp, rax >> VERSION_SHIFT & VERSION_MASK, args)
        refusal = self._check(rax)
        yield Point.STATE_CHECKED
        try:
            if refusal is not None:
                raise refusal
            if rax & LEAF_MASK == TdhLeaf.TDH_SYS_SHUTDOWN:
                status = yield from tdx_sys.sys_shutdown(self, call)
            else:
                status = HANDLERS[rax & LEAF_MASK](self, call)
        except Refused as end:
            status, call.out = end.status, end.out
        call.release()
        self.drop_free_page_locks()
        data.is_busy = call.entered is not None
        return Result(int(status), call.out, call.entered.tdvpr if call.entered is not None else None)

    def _check(self, rax: int) -> Refused | None:
        """What the dispatcher refuses before any leaf sees the call, in its order."""
        leaf = rax & LEAF_MASK
        if rax & RESERVED_MASK:
            return operand_invalid(OperandId.RAX)
        versioned = VERSIONED_B if self.profile_b else VERSIONED_A
        if rax >> VERSION_SHIFT & VERSION_MASK and leaf not in versioned:
            return operand_invalid(OperandId.RAX)
        state = self.state.system.sys_state
        if state == SysState.SYS_SHUTDOWN and leaf != TdhLeaf.TDH_SYS_LP_SHUTDOWN:
            return Refused(TdxStatus.TDX_SYS_SHUTDOWN)
        if state != SysState.SYS_READY and leaf not in BEFORE_READY:
            return Refused(TdxStatus.TDX_SYS_NOT_READY)
        if not self._has_leaf(leaf):
            return operand_invalid(OperandId.RAX)
        return None

    def _has_leaf(self, leaf: int) -> bool:
        """Whether this build knows the leaf."""
        if leaf in (TdhLeaf.TDH_PHYMEM_PAMT_ADD, TdhLeaf.TDH_PHYMEM_PAMT_REMOVE):
            return self.profile_b
        if leaf == TdhLeaf.TDH_SYS_DISABLE:
            return bool(self.identity.tdx_features0 & FEATURE_SYS_DISABLE)
        return leaf in HANDLERS or leaf == TdhLeaf.TDH_SYS_SHUTDOWN

    def running(self, lp: int) -> int | None:
        """TDVPR of the vCPU whose guest runs on `lp`."""
        tdvpr = self.state.lps[lp].running
        return None if tdvpr == NO_PA else tdvpr

    def guest_step(self, lp: int, units: int = 1) -> None:
        """Let the guest on `lp` do some units of work. Raises ValueError if none runs there."""
        self.assert_alive()
        tdvpr = self.running(lp)
        if tdvpr is None:
            raise ValueError(f"LP {lp} runs no TD vCPU")
        vcpu = self.tds.vcpus[tdvpr]
        for _ in range(units):
            vcpu.guest.unit()
        self.touch_vcpu(vcpu)

    def td_exit(self, lp: int, reason: ExitReason, info: ExitInfo | None = None) -> Result:
        """End the TDH.VP.ENTER of `lp`: an asynchronous exit, or for ExitReason.TDCALL the guest's TDVMCALL.

        Raises ValueError if no guest runs on `lp`, ModuleDead if the module is gone.
        """
        self.assert_alive()
        rax, out = tdx_vcpu.exit_guest(self, lp, reason, info if info is not None else ExitInfo())
        return Result(int(rax), out)

    # Records

    def encode(self, record: str) -> bytes:
        """The bytes of a record to keep; empty if what it names is gone."""
        value = self._value(record)
        return b"" if value is None else msgspec.msgpack.encode(value)

    def _value(self, record: str) -> msgspec.Struct | None:
        kind, _, key = record.partition(":")
        if kind == "system":
            return self.state.system
        if kind == "lp":
            return self.state.lps[int(key)]
        if kind == "pamt":
            return self.tds.pamt
        tables: dict[str, dict[int, TdData] | dict[int, VcpuData] | dict[int, TdPages]] = {
            "td": self.tds.tds,
            "vcpu": self.tds.vcpus,
            "pages": self.tds.pages,
        }
        return tables[kind].get(int(key, 16))


def all_records(state: ModuleState, tds: TdMemory) -> list[str]:
    """Names of every record of `state` and `tds`."""
    return [
        "system",
        *(f"lp:{lp}" for lp in state.lps),
        *(f"td:{pa:x}" for pa in tds.tds),
        *(f"pages:{pa:x}" for pa in tds.pages),
        *(f"vcpu:{pa:x}" for pa in tds.vcpus),
        "pamt",
    ]


def decode(state: ModuleState, tds: TdMemory, record: str, data: bytes) -> None:
    """Put a record of `TdxModule.encode` in its place in `state` or `tds`, before a module is made of them.

    Raises msgspec.DecodeError (ValidationError) on bytes of another shape, ValueError on an unknown record name.
    """
    kind, _, key = record.partition(":")
    if kind == "system":
        state.system = msgspec.msgpack.decode(data, type=SystemData)
    elif kind == "lp":
        state.lps[int(key)] = msgspec.msgpack.decode(data, type=LpData)
    elif kind == "td":
        _place(tds.tds, int(key, 16), data, TdData)
    elif kind == "vcpu":
        _place(tds.vcpus, int(key, 16), data, VcpuData)
    elif kind == "pamt":
        tds.pamt = msgspec.msgpack.decode(data, type=PamtPairs)
    elif kind == "pages":
        _place(tds.pages, int(key, 16), data, TdPages)
    else:
        raise ValueError(f"unknown record {record!r}")


def _place(table: dict[int, RecordT], key: int, data: bytes, kind: type[RecordT]) -> None:
    if data:
        table[key] = msgspec.msgpack.decode(data, type=kind)
    else:
        table.pop(key, None)
