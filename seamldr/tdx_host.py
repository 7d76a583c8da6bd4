"""What the kernel offers KVM of TDX besides SEAMCALLs (arch/x86/virt/vmx/tdx/tdx.c): key ids of guests, and the end."""

from __future__ import annotations

from errno import ENOSPC

from cpu.cpu import Cpu, RawSpinLock
from cpu.layout import TDX_STATE
from seamldr.seamcall import TDX_SW_ERROR, TdxModuleArgs, seamcall_ret
from seamldr.tdx_leaves import TdhLeaf
from seamldr.tdx_status import TdxStatus

KEYIDS = 64
"""Key ids in the pool at most: the bits of its word."""

tdx_guest_keyid_pool = RawSpinLock("tdx_guest_keyid_pool")


async def tdx_guest_keyid_alloc(cpu: Cpu) -> int:
    """A private key id for a guest, or -ENOSPC."""
    async with cpu.raw_spin_lock_irqsave(tdx_guest_keyid_pool):
        used = await cpu.load(TDX_STATE.guest_keyid_pool)
        for index in range(min(await cpu.load(TDX_STATE.nr_guest_keyids), KEYIDS)):
            if not used >> index & 1:
                await cpu.store(TDX_STATE.guest_keyid_pool, used | 1 << index)
                return await cpu.load(TDX_STATE.guest_keyid_start) + index
    return -ENOSPC


async def tdx_guest_keyid_free(cpu: Cpu, keyid: int) -> None:
    """The key id may be given out again."""
    async with cpu.raw_spin_lock_irqsave(tdx_guest_keyid_pool):
        index = keyid - await cpu.load(TDX_STATE.guest_keyid_start)
        used = await cpu.load(TDX_STATE.guest_keyid_pool)
        await cpu.store(TDX_STATE.guest_keyid_pool, used & ~(1 << index))


async def tdx_sys_disable(cpu: Cpu) -> None:
    """Before another kernel takes over: the module gives all memory back, if it has this leaf; else that is logged.

    TDX_INTERRUPTED_RESUMABLE comes only after some progress; TDX_SYS_BUSY ends when other TDH.SYS leaves do.
    """
    status = int(TdxStatus.TDX_SYS_BUSY)
    while status in (TdxStatus.TDX_INTERRUPTED_RESUMABLE, TdxStatus.TDX_SYS_BUSY):
        status, _ = await seamcall_ret(cpu, TdhLeaf.TDH_SYS_DISABLE, TdxModuleArgs())
    if status and status & TDX_SW_ERROR != TDX_SW_ERROR:
        cpu.pr_err(f"virt/tdx: TDH.SYS.DISABLE failed: 0x{status:016x}")
