"""The end of a TD that KVM has built, or half built (arch/x86/kvm/vmx/tdx.c): its key id first, then its pages."""

from __future__ import annotations

from cpu.cpu import Cpu
from cpu.hotplug_lock import cpus_read_lock, cpus_read_unlock
from cpu.layout import KERNEL, TDX_STATE, per_cpu, td_page
from cpu.mutex import mutex_lock, mutex_unlock
from cpu.smp import smp_call_function_single
from cpu.stop_machine import online_cpus
from cpu.struct import NONE
from kvm.tdx import flush_on, pr_tdx_error, tdh
from kvm.vcpu import KvmTdx, TdState, TdVcpu, kvm_tdx_of
from seamldr.tdx_host import tdx_guest_keyid_free
from seamldr.tdx_leaves import TdhLeaf
from seamldr.tdx_status import STATUS_MASK, TdxStatus

MAX_RESUMES = 10_000
"""How often an interrupted cache write-back is resumed."""


async def tdx_vm_destroy(cpu: Cpu, td: int) -> bool:
    """Release the key id, reclaim all pages, the TDR last; False if something of the TD is leaked for good."""
    kvm_tdx = kvm_tdx_of(td)
    await tdx_mmu_release_hkid(cpu, kvm_tdx, td)
    return await tdx_reclaim_td_pages(cpu, kvm_tdx, td)


async def one_cpu_per_package(cpu: Cpu) -> list[int]:
    """The lowest online CPU of each package."""
    first: dict[int, int] = {}
    for number in await online_cpus(cpu):
        first.setdefault(await cpu.load(per_cpu(number).package), number)
    return list(first.values())


async def tdx_hkid_free(cpu: Cpu, kvm_tdx: KvmTdx) -> None:
    """The TD has no key id any more."""
    await tdx_guest_keyid_free(cpu, await cpu.load(kvm_tdx.hkid))
    await cpu.store(kvm_tdx.hkid, 0)
    await cpu.atomic_add(TDX_STATE.nr_keyids, -1)


async def tdx_mmu_release_hkid(cpu: Cpu, kvm_tdx: KvmTdx, td: int) -> None:
    """No LP holds a vCPU, no cache a line of the TD: then its key id is free. If the module refuses, it is leaked."""
    if not await cpu.load(kvm_tdx.hkid):
        return
    await cpus_read_lock(cpu)
    await tdx_flush_vp_on_cpu(cpu, kvm_tdx)
    # Two TDs at once would find the key ownership table busy.
    await mutex_lock(cpu, KERNEL.tdx_lock)
    if await _may_free_key(cpu, kvm_tdx, td):
        await tdx_hkid_free(cpu, kvm_tdx)
    await mutex_unlock(cpu, KERNEL.tdx_lock)
    await cpus_read_unlock(cpu)


async def _may_free_key(cpu: Cpu, kvm_tdx: KvmTdx, td: int) -> bool:
    tdr = td_page(td, 0)
    err = await tdh(cpu, TdhLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    if err & STATUS_MASK == TdxStatus.TDX_FLUSHVP_NOT_DONE:
        return False
    if err:
        return await _leaked(cpu, kvm_tdx, td, TdhLeaf.TDH_MNG_VPFLUSHDONE, err)
    for target in await one_cpu_per_package(cpu):
        await smp_call_function_single(cpu, target, "smp_func_do_phymem_cache_wb", td)
    err = await tdh(cpu, TdhLeaf.TDH_MNG_KEY_FREEID, rcx=tdr)
    return not err or await _leaked(cpu, kvm_tdx, td, TdhLeaf.TDH_MNG_KEY_FREEID, err)


async def _leaked(cpu: Cpu, kvm_tdx: KvmTdx, td: int, leaf: TdhLeaf, err: int) -> bool:
    pr_tdx_error(cpu, td, leaf, err)
    cpu.pr_err(f"kvm_intel: HKID {await cpu.load(kvm_tdx.hkid)} is leaked.")
    return False


async def tdx_flush_vp_on_cpu(cpu: Cpu, kvm_tdx: KvmTdx) -> None:
    """Flush the TD's vCPU where it is."""
    vcpu = await cpu.load(kvm_tdx.vcpu)
    if not vcpu:
        return
    owner = await cpu.load(TdVcpu(vcpu).cpu)
    if owner != NONE:
        await flush_on(cpu, TdVcpu(vcpu), owner)


async def smp_func_do_phymem_cache_wb(cpu: Cpu, td: int) -> None:
    """On one CPU of a package: write its caches back, again and again if interrupts come."""
    err = await tdh(cpu, TdhLeaf.TDH_PHYMEM_CACHE_WB, rcx=0)
    for _ in range(MAX_RESUMES):
        if err & STATUS_MASK != TdxStatus.TDX_INTERRUPTED_RESUMABLE:
            break
        err = await tdh(cpu, TdhLeaf.TDH_PHYMEM_CACHE_WB, rcx=1)
    if err & STATUS_MASK not in (0, TdxStatus.TDX_NO_HKID_READY_TO_WBCACHE):
        cpu.warn_on_once(True, f"TDH.PHYMEM.CACHE.WB failed: {err:#018x}")
        pr_tdx_error(cpu, td, TdhLeaf.TDH_PHYMEM_CACHE_WB, err)


async def tdx_reclaim_td_pages(cpu: Cpu, kvm_tdx: KvmTdx, td: int) -> bool:
    """TDH.PHYMEM.PAGE.RECLAIM of every page, the TDR last. With the key id leaked the pages are, too."""
    if await cpu.load(kvm_tdx.hkid):
        return False
    for number in reversed(range(await cpu.load(kvm_tdx.nr_pages))):
        if not await _give_back(cpu, td, TdhLeaf.TDH_PHYMEM_PAGE_RECLAIM, td_page(td, number)):
            return False
        await cpu.store(kvm_tdx.nr_pages, number)
        if number == 0:
            tdr = await mk_keyed_paddr(cpu, td_page(td, 0))
            if not await _give_back(cpu, td, TdhLeaf.TDH_PHYMEM_PAGE_WBINVD, tdr):
                return False
    await cpu.store(kvm_tdx.vcpu, 0)
    await cpu.store(kvm_tdx.state, TdState.UNINITIALIZED)
    return True


async def _give_back(cpu: Cpu, td: int, leaf: TdhLeaf, page: int) -> bool:
    err = await tdh(cpu, leaf, rcx=page)
    if err:
        pr_tdx_error(cpu, td, leaf, err)
    return not err


async def mk_keyed_paddr(cpu: Cpu, pa: int) -> int:
    """The address under the module's own key id, with which it wrote the TDR."""
    return pa | await cpu.load(TDX_STATE.global_keyid) << await cpu.load(TDX_STATE.phys_bits)
