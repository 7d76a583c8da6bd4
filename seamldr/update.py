"""The runtime update of the TDX module (arch/x86/virt/vmx/tdx: seamldr.c, tdx.c), as merged.

`seamldr_install_module` runs in a worker. It checks the image's framing, fills SEAMLDR_PARAMS, and has every online
CPU run `do_seamldr_install_module` under stop_machine: a lock-step through five stages that each CPU acknowledges.
"""

from __future__ import annotations

import enum
from errno import EBUSY, EINTR, EINVAL, EIO, ENODEV

import msgspec

from bus.memory import PAGE_SIZE
from cpu.cpu import Cpu, RawSpinLock
from cpu.hotplug_lock import cpus_read_lock, cpus_read_unlock
from cpu.layout import KERNEL, TDX_STATE, UPDATE_CTRL, per_cpu
from cpu.stop_machine import online_cpus, stop_machine
from seamldr.api import boot_cpu_has_bug
from seamldr.call import seamldr_call
from seamldr.image import Framing, ImageError, obey_framing
from seamldr.seamcall import TdxModuleArgs, report_seamcall, seamcall_prerr, seamcall_prerr_ret, seamcall_ret
from seamldr.status import Scenario, SeamldrLeaf
from seamldr.structures import INFO_SIZE, SeamldrInfo, SeamldrParams
from seamldr.tdx_leaves import TdhLeaf, leaf_rax
from seamldr.tdx_status import TdxStatus

FIELD_MODULE_HV = 0x8900_0001_0000_0000
VERSION_FIELDS = (0x0800_0001_0000_0004, 0x0800_0001_0000_0003, 0x0800_0001_0000_0005)
"""MAJOR_VERSION, MINOR_VERSION, UPDATE_VERSION."""

FIELD_TDX_FEATURES0 = 0x0A00_0003_0000_0008
FEATURE_UPDATE_COMPATIBILITY = 1 << 47
AVOID_COMPAT_SENSITIVE = 1 << 16
"""Flag in RCX of TDH.SYS.SHUTDOWN."""
STATUS_MASK = 0xFFFF_FFFF_0000_0000
TDX_UPDATE_COMPAT_SENSITIVE = 0x8000_0512_0000_0000

LEAD_CPU = 0
CACHE_LINE = 64

update_lock = RawSpinLock("update_ctrl.lock")
sysinit_lock = RawSpinLock("sysinit_lock")


class ModuleUpdateState(enum.IntEnum):
    """Stages of an update, in order."""

    START = 0
    SHUTDOWN = 1
    CPU_INSTALL = 2
    CPU_INIT = 3
    RUN_UPDATE = 4
    DONE = 5


def version_word(major: int, minor: int, update: int) -> int:
    """A module version in one word of shared memory."""
    return major << 32 | minor << 16 | update


def version_text(word: int) -> str:
    """As sysfs shows it: "1.5.08"."""
    return f"{word >> 32}.{word >> 16 & 0xFFFF}.{word & 0xFFFF:02}"


async def seamldr_install_module(cpu: Cpu, pages: tuple[int, ...], length: int, params_page: int) -> int:
    """Replace the running module by the image of `length` bytes in `pages`; 0 or a negative errno.

    `params_page` is a free page for SEAMLDR_PARAMS. On a CPU with the erratum and the gate on, nothing begins at all.
    """
    if boot_cpu_has_bug(cpu) and cpu.kernel.knobs["enforce_gate"]:
        cpu.warn("module update refused: SEAMRET invalidates the current VMCS on this CPU")
        cpu.emit("update_refused", errno=-EINVAL, why="the CPU has the SEAMRET erratum and the gate is on")
        return -EINVAL
    header = await cpu.read_phys(pages[0], PAGE_SIZE)
    try:
        image = check_header(header[:length], length)
        if length > len(pages) * PAGE_SIZE:
            raise ImageError("the pages end before the image does")
    except ImageError as error:
        cpu.pr_err(f"seamldr: {error}")
        cpu.emit("update_refused", errno=-error.errno, why=str(error))
        return -error.errno
    await cpu.write_phys(params_page, _seamldr_params(image, pages))
    await cpus_read_lock(cpu)
    update = await cpu.atomic_add(KERNEL.next_update, 1)
    online = await online_cpus(cpu)
    await cpu.store(UPDATE_CTRL.params, params_page)
    await cpu.store(UPDATE_CTRL.update, update)
    await cpu.store(UPDATE_CTRL.online, len(online))
    await cpu.store(UPDATE_CTRL.num_ack, 0)
    await cpu.store(UPDATE_CTRL.num_failed, 0)
    cpu.emit("update_begin", update=update, online=online)
    await cpu.store(UPDATE_CTRL.state, ModuleUpdateState.SHUTDOWN)
    ret = await stop_machine(cpu, "do_seamldr_install_module", params_page)
    cpu.emit("update_end", update=update, ret=ret)
    await cpus_read_unlock(cpu)
    return ret


def check_header(header: bytes, length: int) -> Framing:
    """The kernel's checks on an image of `length` bytes, from its first page alone; raises ImageError."""
    framing = msgspec.structs.replace(Framing.decode(header), file_size=length)
    obey_framing(framing)
    return framing


def _seamldr_params(image: Framing, pages: tuple[int, ...]) -> bytes:
    """SEAMLDR_PARAMS of an update, 4096 bytes."""
    first = 1 + image.sigstruct_pages
    sigstruct = pages[1] if image.sigstruct_pages else 0
    return SeamldrParams(sigstruct, image.module_pages, pages[first:], Scenario.UPDATE).encode()


async def do_seamldr_install_module(cpu: Cpu, params: int) -> int:
    """The rendezvous loop: one instance on every online CPU, interrupts off.

    -EINTR if an operator gives up an update that waits for a dead CPU (`update_abort`), which is not Linux: there the
    others spin for ever.
    """
    ctrl = UPDATE_CTRL
    update = await cpu.load(ctrl.update)
    current, ret = ModuleUpdateState.START, 0
    while True:
        new = await cpu.load(ctrl.state)
        if new == current:
            if await cpu.load(KERNEL.update_abort):
                cpu.waits_for = ("", "")
                return -EINTR
            cpu.waits_for = (f"waits for the stage after {current.name}", "")
            await cpu.cpu_relax()
        else:
            current = ModuleUpdateState(new)
            cpu.emit("state_enter", update=update, state=current.name)
            ret = await _run_stage(cpu, current, params)
            await _ack_state(cpu, update, current, ret)
        if current is ModuleUpdateState.DONE or await cpu.load(ctrl.num_failed):
            cpu.waits_for = ("", "")
            return ret


async def _run_stage(cpu: Cpu, state: ModuleUpdateState, params: int) -> int:
    lead = cpu.number == LEAD_CPU
    match state:
        case ModuleUpdateState.SHUTDOWN:
            return await tdx_module_shutdown(cpu) if lead else 0
        case ModuleUpdateState.CPU_INSTALL:
            return await seamldr_call(cpu, SeamldrLeaf.INSTALL, TdxModuleArgs(rcx=params))
        case ModuleUpdateState.CPU_INIT:
            return await tdx_cpu_enable(cpu)
        case ModuleUpdateState.RUN_UPDATE:
            return await tdx_module_run_update(cpu) if lead else 0
    return 0


async def _ack_state(cpu: Cpu, update: int, state: ModuleUpdateState, ret: int) -> None:
    """Say that this CPU has done the stage; the last one to say so advances it, unless anybody failed."""
    ctrl = UPDATE_CTRL
    async with cpu.raw_spin_lock(update_lock):
        failed = await cpu.load(ctrl.num_failed) + bool(ret)
        if ret:
            await cpu.store(ctrl.num_failed, failed)
        acks = await cpu.load(ctrl.num_ack) + 1
        cpu.emit("ack", update=update, state=state.name, ret=ret, num_ack=acks, num_failed=failed)
        await cpu.store(ctrl.num_ack, acks)
        if acks == await cpu.load(ctrl.online) and not failed:
            await cpu.store(ctrl.num_ack, 0)
            following = state + 1
            name = ModuleUpdateState(following).name if following <= ModuleUpdateState.DONE else "END"
            cpu.emit("state_advance", update=update, state=name)
            await cpu.store(ctrl.state, following)


async def tdx_module_shutdown(cpu: Cpu) -> int:
    """Lead CPU: ask the running module for its handoff data in its own version, and forget that TDX is initialized."""
    ret, registers = await seamcall_prerr_ret(cpu, TdhLeaf.TDH_SYS_RD, TdxModuleArgs(rdx=FIELD_MODULE_HV))
    if ret:
        return ret
    handoff_version = registers[2]
    args = TdxModuleArgs(rcx=handoff_version | await _shutdown_flags(cpu))
    status, _ = await seamcall_ret(cpu, TdhLeaf.TDH_SYS_SHUTDOWN, args)
    if status & STATUS_MASK == TDX_UPDATE_COMPAT_SENSITIVE:
        return -EBUSY
    if status:
        return report_seamcall(cpu, TdhLeaf.TDH_SYS_SHUTDOWN, status)
    await _set_initialized(cpu, 0, await cpu.load(TDX_STATE.version))
    await cpu.store(TDX_STATE.sysinit_done, 0)
    await cpu.store(TDX_STATE.sysinit_ret, 0)
    for number in range(cpu.kernel.num_cpus):
        await cpu.store(per_cpu(number).lp_initialized, 0)
    return 0


async def _shutdown_flags(cpu: Cpu) -> int:
    """Whether the module is asked to refuse while a TD is being built; merged Linux does not ask."""
    ask = cpu.kernel.knobs["avoid_compat_sensitive"]
    if ask == "always" or (ask == "if_supported" and await _has_update_compatibility(cpu)):
        return AVOID_COMPAT_SENSITIVE
    return 0


async def _has_update_compatibility(cpu: Cpu) -> bool:
    """Whether the module that is there can refuse an update during a TD build, or notice one."""
    ret, registers = await seamcall_prerr_ret(cpu, TdhLeaf.TDH_SYS_RD, TdxModuleArgs(rdx=FIELD_TDX_FEATURES0))
    return not ret and bool(registers[2] & FEATURE_UPDATE_COMPATIBILITY)


async def tdx_cpu_enable(cpu: Cpu) -> int:
    """TDH.SYS.INIT by whoever comes first, then TDH.SYS.LP.INIT here."""
    if await cpu.load(cpu.percpu.lp_initialized):
        return 0
    ret = await _tdx_sysinit_once(cpu)
    if ret:
        return ret
    status, _ = await seamcall_ret(cpu, TdhLeaf.TDH_SYS_LP_INIT, TdxModuleArgs())
    # A process of this CPU that died right after its call has left no word of it.
    done_before = cpu.lives > 1 and status == TdxStatus.TDX_SYS_LP_INIT_DONE
    ret = 0 if done_before else report_seamcall(cpu, TdhLeaf.TDH_SYS_LP_INIT, status)
    if ret:
        return ret
    await cpu.store(cpu.percpu.lp_initialized, 1)
    return 0


async def _tdx_sysinit_once(cpu: Cpu) -> int:
    async with cpu.raw_spin_lock(sysinit_lock):
        if await cpu.load(TDX_STATE.sysinit_done):
            cached = await cpu.load(TDX_STATE.sysinit_ret)
            return -cached
        ret = await seamcall_prerr(cpu, TdhLeaf.TDH_SYS_INIT, TdxModuleArgs())
        await cpu.store(TDX_STATE.sysinit_ret, -ret)
        await cpu.store(TDX_STATE.sysinit_done, 1)
        if ret == -ENODEV:
            cpu.pr_err("virt/tdx: module not loaded")
        return ret


async def tdx_module_run_update(cpu: Cpu) -> int:
    """Lead CPU: the new module takes the handoff over. Of its metadata only the version is read again.

    With `detect_compat_sensitive` the module is told to notice a measurement of a TD that it cannot go on with, if the
    features that were read at boot have that; Linux does not tell it.
    """
    rax, args = leaf_rax(TdhLeaf.TDH_SYS_UPDATE), TdxModuleArgs()
    features0 = await cpu.load(TDX_STATE.features0)
    if cpu.kernel.knobs["detect_compat_sensitive"] == "if_supported" and features0 & FEATURE_UPDATE_COMPATIBILITY:
        rax, args = leaf_rax(TdhLeaf.TDH_SYS_UPDATE, version=1), TdxModuleArgs(r9=FEATURE_UPDATE_COMPATIBILITY)
    ret = await seamcall_prerr(cpu, rax, args)
    if ret:
        return ret
    version = await read_module_version(cpu)
    cpu.warn_on_once(version is None, "the version of the new TDX module cannot be read")
    await _set_initialized(cpu, 1, version or 0)
    return 0


async def read_module_version(cpu: Cpu) -> int | None:
    """The running module's version as one word, or None if it cannot be read."""
    parts = []
    for field in VERSION_FIELDS:
        ret, registers = await seamcall_prerr_ret(cpu, TdhLeaf.TDH_SYS_RD, TdxModuleArgs(rdx=field))
        if ret:
            return None
        parts.append(registers[2])
    return version_word(*parts)


async def _set_initialized(cpu: Cpu, initialized: int, version: int) -> None:
    await cpu.store(TDX_STATE.version, version)
    await cpu.store(TDX_STATE.initialized, initialized)
    cpu.emit("module_init_flag", initialized=initialized, version=version_text(version))


async def seamldr_get_info(cpu: Cpu, buffer: int) -> tuple[int, SeamldrInfo | None]:
    """SEAMLDR.INFO into the page at `buffer`, then a copy of it, a cache line at a time; errno and the copy."""
    ret = await seamldr_call(cpu, SeamldrLeaf.INFO, TdxModuleArgs(rcx=buffer))
    if ret:
        return ret, None
    lines = [await cpu.read_phys(at, CACHE_LINE) for at in range(buffer, buffer + INFO_SIZE, CACHE_LINE)]
    return 0, SeamldrInfo.decode(b"".join(lines))


async def seamldr_version_show(cpu: Cpu, buffer: int) -> tuple[int, str]:
    """Read `seamldr_version` by way of the page at `buffer`; errno and the text, "1.5.02"."""
    ret, info = await seamldr_get_info(cpu, buffer)
    if info is None:
        return ret, ""
    if info.version:
        return -EIO, ""
    return 0, f"{info.major}.{info.minor}.{info.update:02}"
