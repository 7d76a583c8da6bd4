"""Building a TD while the machine runs (arch/x86/kvm/vmx/tdx.c): what the ioctls of a VM's user space do, in order.

    tdx_td_init              KVM_CREATE_VM and KVM_TDX_INIT_VM
    tdx_td_vcpu_init         KVM_CREATE_VCPU and KVM_TDX_INIT_VCPU
    tdx_vcpu_init_mem_region KVM_TDX_INIT_MEM_REGION
    tdx_td_finalize          KVM_TDX_FINALIZE_VM

Each is many SEAMCALLs, and between any two of them, as between two ioctls, a module update may come.
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EINVAL, EIO

from bus.memory import PAGE_SIZE
from cpu.cpu import Cpu
from cpu.hotplug_lock import cpus_read_lock, cpus_read_unlock
from cpu.layout import KERNEL, TDX_STATE, td_page
from cpu.mutex import mutex_lock, mutex_unlock
from cpu.smp import smp_call_function_single
from cpu.struct import NONE
from kvm.td_destroy import one_cpu_per_package, tdx_hkid_free, tdx_vm_destroy
from kvm.tdx import VmxTdVcpu, pr_tdx_error, tdh
from kvm.vcpu import KvmTdx, TdState, TdVcpu, kvm_tdx_of, td_vcpu_of
from seamldr.seamcall import TDX_RND_NO_ENTROPY, TdxModuleArgs, seamcall_ret
from seamldr.tdx_host import tdx_guest_keyid_alloc
from seamldr.tdx_leaves import TdhLeaf
from seamldr.tdx_status import STATUS_MASK, TdxStatus
from seamldr.tdx_td import td_params

TDX_EXTENDMR_CHUNKSIZE = 256
SEPT_LEVELS = (3, 2, 1)
"""Tables of the Secure EPT between its root and a page of 4 KiB, the highest first."""
FIELD_MRTD = 0x1310_0003_0000_0000
MRTD_WORDS = 6


async def tdx_bug_on(cpu: Cpu, kvm_tdx: KvmTdx, td: int, leaf: TdhLeaf, status: int) -> int:
    """KVM_BUG_ON: 0 if the SEAMCALL succeeded; else -EIO, and the VM is good for nothing but its end."""
    if not status:
        return 0
    await cpu.store(kvm_tdx.vm_bugged, 1)
    pr_tdx_error(cpu, td, leaf, status)
    return -EIO


# KVM_TDX_INIT_VM


async def tdx_td_init(cpu: Cpu, td: int, params: int) -> int:
    """From nothing to a TD in build; `params` is a free page for TD_PARAMS. 0, or a negative errno and no TD."""
    kvm_tdx = kvm_tdx_of(td)
    if await cpu.load(kvm_tdx.state) != TdState.UNINITIALIZED or await cpu.load(kvm_tdx.hkid):
        return -EINVAL
    await cpu.store(kvm_tdx.vm_bugged, 0)
    await cpu.write_phys(params, td_params(max_vcpus=1))
    ret = await __tdx_td_init(cpu, kvm_tdx, td, params)
    if not ret:
        await cpu.store(kvm_tdx.state, TdState.INITIALIZED)
    return ret


async def __tdx_td_init(cpu: Cpu, kvm_tdx: KvmTdx, td: int, params: int) -> int:
    keyid = await tdx_guest_keyid_alloc(cpu)
    if keyid < 0:
        return keyid
    await cpu.store(kvm_tdx.hkid, keyid)
    await cpu.atomic_add(TDX_STATE.nr_keyids, 1)
    await cpus_read_lock(cpu)
    # TDH.MNG.CREATE wants the key ownership table for itself and does not wait for it.
    await mutex_lock(cpu, KERNEL.tdx_lock)
    err = await tdh(cpu, TdhLeaf.TDH_MNG_CREATE, rcx=td_page(td, 0), rdx=keyid)
    await mutex_unlock(cpu, KERNEL.tdx_lock)
    if err:
        await cpus_read_unlock(cpu)
        await tdx_hkid_free(cpu, kvm_tdx)
        if err == TDX_RND_NO_ENTROPY:
            return -EAGAIN
        return await tdx_bug_on(cpu, kvm_tdx, td, TdhLeaf.TDH_MNG_CREATE, err)
    await cpu.store(kvm_tdx.nr_pages, 1)
    ret = await _configure_key(cpu, kvm_tdx, td)
    await cpus_read_unlock(cpu)
    ret = ret or await _add_control_pages(cpu, kvm_tdx, td)
    ret = ret or await _mng_init(cpu, td, params)
    if ret:
        await tdx_vm_destroy(cpu, td)
    return ret


async def _configure_key(cpu: Cpu, kvm_tdx: KvmTdx, td: int) -> int:
    """The TD's key in the memory controller of each package."""
    for target in await one_cpu_per_package(cpu):
        await smp_call_function_single(cpu, target, "tdx_do_tdh_mng_key_config", td)
        err = await cpu.load(kvm_tdx.result)
        if err:
            return await tdx_bug_on(cpu, kvm_tdx, td, TdhLeaf.TDH_MNG_KEY_CONFIG, err)
    return 0


async def tdx_do_tdh_mng_key_config(cpu: Cpu, td: int) -> None:
    """On one CPU of a package. With no entropy left for a key the module wants to be asked again."""
    err = int(TdxStatus.TDX_KEY_GENERATION_FAILED)
    while err == TdxStatus.TDX_KEY_GENERATION_FAILED:
        err = await tdh(cpu, TdhLeaf.TDH_MNG_KEY_CONFIG, rcx=td_page(td, 0))
    await cpu.store(kvm_tdx_of(td).result, err)


async def _give_page(cpu: Cpu, kvm_tdx: KvmTdx, td: int, leaf: TdhLeaf, **registers: int) -> tuple[int, int]:
    """Status of a leaf that takes the TD's next page, which is the module's if it succeeds; and the page."""
    number = await cpu.load(kvm_tdx.nr_pages)
    page = td_page(td, number)
    name = "r8" if leaf in (TdhLeaf.TDH_MEM_SEPT_ADD, TdhLeaf.TDH_MEM_PAGE_ADD) else "rcx"
    err = await tdh(cpu, leaf, **{name: page, **registers})
    if not err:
        await cpu.store(kvm_tdx.nr_pages, number + 1)
    return err, page


async def _add_control_pages(cpu: Cpu, kvm_tdx: KvmTdx, td: int) -> int:
    for _ in range(await cpu.load(TDX_STATE.tdcs_base_size) // PAGE_SIZE):
        err, _ = await _give_page(cpu, kvm_tdx, td, TdhLeaf.TDH_MNG_ADDCX, rdx=td_page(td, 0))
        if err:
            if err == TDX_RND_NO_ENTROPY:
                return -EAGAIN
            pr_tdx_error(cpu, td, TdhLeaf.TDH_MNG_ADDCX, err)
            return -EIO
    return 0


async def _mng_init(cpu: Cpu, td: int, params: int) -> int:
    err = await tdh(cpu, TdhLeaf.TDH_MNG_INIT, rcx=td_page(td, 0), rdx=params)
    if not err:
        return 0
    pr_tdx_error(cpu, td, TdhLeaf.TDH_MNG_INIT, err)
    return -EINVAL if err & STATUS_MASK == TdxStatus.TDX_OPERAND_INVALID else -EIO


# KVM_TDX_INIT_VCPU


async def tdx_vcpu_init(cpu: Cpu, td: int, task: int) -> int:
    """The TD's vCPU, with the task number `task`; 0 or a negative errno."""
    kvm_tdx, state = kvm_tdx_of(td), td_vcpu_of(task)
    errno = await _usable(cpu, kvm_tdx, TdState.INITIALIZED)
    if errno or await cpu.load(kvm_tdx.vcpu):
        return errno or -EINVAL
    await _tdx_vcpu_create(cpu, state, td, task)
    await cpu.store(kvm_tdx.vcpu, state.address)
    vcpu = VmxTdVcpu(task, state)
    await vcpu.vcpu_load(cpu)
    ret = await tdx_td_vcpu_init(cpu, kvm_tdx, td, state)
    await vcpu.vcpu_put(cpu)
    return ret


async def _usable(cpu: Cpu, kvm_tdx: KvmTdx, state: TdState) -> int:
    """Every ioctl of a VM that is bugged fails, and one that does not fit the state of the TD."""
    if await cpu.load(kvm_tdx.vm_bugged):
        return -EIO
    return 0 if await cpu.load(kvm_tdx.state) == state else -EINVAL


async def _tdx_vcpu_create(cpu: Cpu, state: TdVcpu, td: int, task: int) -> None:
    """tdx_vcpu_create: KVM's own part, on no CPU."""
    chain = [(state.chain + 32 * at, 0) for at in range(4)]
    fresh = ((state.tdvpr, 0), (state.dead, 0), (state.exits, 0), (state.counter, 0), *chain)
    for word, value in ((state.number, task), (state.td, td), (state.cpu, NONE), *fresh):
        await cpu.store(word, value)


async def tdx_td_vcpu_init(cpu: Cpu, kvm_tdx: KvmTdx, td: int, state: TdVcpu) -> int:
    """TDVPR and control pages, then TDH.VP.INIT, which binds the vCPU to this LP."""
    err, tdvpr = await _give_page(cpu, kvm_tdx, td, TdhLeaf.TDH_VP_CREATE, rdx=td_page(td, 0))
    ret = await tdx_bug_on(cpu, kvm_tdx, td, TdhLeaf.TDH_VP_CREATE, err)
    pages = await cpu.load(TDX_STATE.tdvps_base_size) // PAGE_SIZE - 1
    for _ in range(pages if not ret else 0):
        err, _ = await _give_page(cpu, kvm_tdx, td, TdhLeaf.TDH_VP_ADDCX, rdx=tdvpr)
        ret = ret or await tdx_bug_on(cpu, kvm_tdx, td, TdhLeaf.TDH_VP_ADDCX, err)
    if ret:
        return ret
    err = await tdh(cpu, TdhLeaf.TDH_VP_INIT, rcx=tdvpr)
    if not err:
        await cpu.store(state.tdvpr, tdvpr)
    return await tdx_bug_on(cpu, kvm_tdx, td, TdhLeaf.TDH_VP_INIT, err)


# KVM_TDX_INIT_MEM_REGION and KVM_TDX_FINALIZE_VM


async def tdx_vcpu_init_mem_region(cpu: Cpu, td: int, gpa: int, sources: tuple[int, ...]) -> int:
    """Copy the pages at `sources` to guest-physical addresses from `gpa` on, and measure them; 0 or an errno."""
    kvm_tdx = kvm_tdx_of(td)
    errno = await _usable(cpu, kvm_tdx, TdState.INITIALIZED)
    if errno:
        return errno
    for level in SEPT_LEVELS:
        size = PAGE_SIZE << 9 * level
        where = {"rcx": gpa & -size | level, "rdx": td_page(td, 0)}
        err, _ = await _give_page(cpu, kvm_tdx, td, TdhLeaf.TDH_MEM_SEPT_ADD, **where)
        if err:
            return await _sept_error(cpu, kvm_tdx, td, TdhLeaf.TDH_MEM_SEPT_ADD, err)
    for index, source in enumerate(sources):
        ret = await tdx_gmem_post_populate(cpu, kvm_tdx, td, gpa + index * PAGE_SIZE, source)
        if ret:
            return ret
    return 0


async def tdx_gmem_post_populate(cpu: Cpu, kvm_tdx: KvmTdx, td: int, gpa: int, source: int) -> int:
    """One page: TDH.MEM.PAGE.ADD, then TDH.MR.EXTEND of each of its chunks."""
    tdr = td_page(td, 0)
    err, _ = await _give_page(cpu, kvm_tdx, td, TdhLeaf.TDH_MEM_PAGE_ADD, rcx=gpa, rdx=tdr, r9=source)
    if err:
        return await _sept_error(cpu, kvm_tdx, td, TdhLeaf.TDH_MEM_PAGE_ADD, err)
    for chunk in range(gpa, gpa + PAGE_SIZE, TDX_EXTENDMR_CHUNKSIZE):
        err = await tdh(cpu, TdhLeaf.TDH_MR_EXTEND, rcx=chunk, rdx=tdr)
        if err:
            return await tdx_bug_on(cpu, kvm_tdx, td, TdhLeaf.TDH_MR_EXTEND, err)
    return 0


async def _sept_error(cpu: Cpu, kvm_tdx: KvmTdx, td: int, leaf: TdhLeaf, err: int) -> int:
    if err & STATUS_MASK == TdxStatus.TDX_OPERAND_BUSY:
        return -EBUSY
    return await tdx_bug_on(cpu, kvm_tdx, td, leaf, err)


async def tdx_td_finalize(cpu: Cpu, td: int) -> int:
    """The measurement is final, the TD may run; 0 or a negative errno.

    If an update came in between and the new module cannot go on with the measurement, and was told to say so, this is
    where it does (TDX_INCOMPATIBLE_MRTD_CONTEXT). KVM has no way on from there but the end of the VM.
    """
    kvm_tdx = kvm_tdx_of(td)
    errno = await _usable(cpu, kvm_tdx, TdState.INITIALIZED)
    if errno:
        return errno
    err = await tdh(cpu, TdhLeaf.TDH_MR_FINALIZE, rcx=td_page(td, 0))
    if err & STATUS_MASK == TdxStatus.TDX_OPERAND_BUSY:
        return -EBUSY
    ret = await tdx_bug_on(cpu, kvm_tdx, td, TdhLeaf.TDH_MR_FINALIZE, err)
    if not ret:
        await cpu.store(kvm_tdx.state, TdState.RUNNABLE)
    return ret


async def td_measurement(cpu: Cpu, td: int) -> bytes:
    """MRTD, 48 bytes, as the TD's owner gets it in a quote; empty if it cannot be read."""
    words = []
    for index in range(MRTD_WORDS):
        args = TdxModuleArgs(rcx=td_page(td, 0), rdx=FIELD_MRTD + index)
        status, registers = await seamcall_ret(cpu, TdhLeaf.TDH_MNG_RD, args)
        if status:
            return b""
        words.append(registers[2].to_bytes(8, "little"))
    return b"".join(words)
