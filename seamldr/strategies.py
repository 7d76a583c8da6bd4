"""The catalogue: every way of calling P-SEAMLDR that was shipped, posted or proposed, and a few more.

Each reads like the patch that it stands for. The docstrings say where it comes from and what to expect of it on a CPU
whose SEAMRET invalidates the current VMCS; `docs/strategies.md` compares them.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path

from seamldr.api import (
    EINVAL,
    EIO,
    ENODEV,
    NO_VMCS,
    Cpu,
    SeamldrLeaf,
    TdxModuleArgs,
    boot_cpu_has_bug,
    current_vmcs,
    for_each_loaded_vmcs,
    is_seamldr_call,
    loaded_vmcs_clear_current,
    scratch_vmcs,
    seamcall_prerr,
    seamldr_lock,
    vmclear,
    vmclear_local_loaded_vmcss,
    vmptrld,
    vmptrst,
)

Strategy = Callable[[Cpu, int, TdxModuleArgs], Awaitable[int]]

RETRIES_WHEN_BUSY = 10_000
MAX_SOURCE = 1 << 20
"""Bytes of a file of strategies."""


async def none(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Lock and call, nothing else (v4 main series). KVM keeps believing in a VMCS that is not current any more."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        return await seamcall_prerr(cpu, fn, args)


async def clear_current_vmcs(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Chao Gao's answer of 2026-02-03: forget the cached pointer, so that KVM reloads by itself."""
    cpu.warn_on_once(not is_seamldr_call(fn))
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        ret = await seamcall_prerr(cpu, fn, args)
        await cpu.this_cpu_write(current_vmcs, None)
    return ret


async def save_restore(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """v4 24/24, for testing only: VMPTRST before, VMPTRLD after; the SEAMCALL's own result is never masked."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        saved = await vmptrst(cpu)
        cpu.warn_on_once(saved is None, "VMPTRST faulted")
        ret = await seamcall_prerr(cpu, fn, args)
        if saved is not None and saved != NO_VMCS:
            cpu.warn_on_once(await vmptrld(cpu, saved) != 0, "VMPTRLD failed")
    return ret


async def save_restore_v3(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """As shipped in v3: interrupts off, the lock around INSTALL only; readers of the version come unserialized."""
    if not is_seamldr_call(fn):
        return -EINVAL
    if fn == SeamldrLeaf.INSTALL:
        async with cpu.raw_spin_lock(seamldr_lock):
            return await _save_restore_v3(cpu, fn, args)
    return await _save_restore_v3(cpu, fn, args)


async def _save_restore_v3(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    flags = await cpu.local_irq_save()
    saved = await vmptrst(cpu)
    failed = saved is None
    ret = -EIO if failed else await seamcall_prerr(cpu, fn, args)
    if saved is not None and saved != NO_VMCS:
        failed = await vmptrld(cpu, saved) != 0
    await cpu.local_irq_restore(flags)
    if cpu.warn_on_once(failed, "Failed to save/restore the current VMCS"):
        return -EIO
    return ret


async def sweep_naive(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Dave Hansen's sketch of 2026-01-28: VMCLEAR every VMCS of this CPU, and leave KVM's tracking as it is."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        async for v in for_each_loaded_vmcs(cpu):
            await vmclear(cpu, await cpu.load(v.vmcs))
        return await seamcall_prerr(cpu, fn, args)


async def vmclear_local(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Chao Gao, 2026-01-30: KVM's own sweep before the call, through a callback; tracking stays true."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        await vmclear_local_loaded_vmcss(cpu)
        return await seamcall_prerr(cpu, fn, args)


async def refuse_on_erratum(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """What was merged: on a CPU with the erratum no call at all; the lock is taken with interrupts as they are."""
    if boot_cpu_has_bug(cpu):
        cpu.warn("seamldr_call() on a CPU whose SEAMRET invalidates the current VMCS")
        return -EINVAL
    async with cpu.raw_spin_lock(seamldr_lock):
        return await seamcall_prerr(cpu, fn, args)


async def retry_on_busy(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """No lock: call again as long as P-SEAMLDR is busy (VMfailInvalid), bounded since that also means "not loaded".
    """
    flags = await cpu.local_irq_save()
    for _ in range(RETRIES_WHEN_BUSY):
        ret = await seamcall_prerr(cpu, fn, args)
        if ret != -ENODEV:
            break
    await cpu.this_cpu_write(current_vmcs, None)
    await cpu.local_irq_restore(flags)
    return ret


async def unserialized(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """`clear-current-vmcs` without its lock."""
    flags = await cpu.local_irq_save()
    ret = await seamcall_prerr(cpu, fn, args)
    await cpu.this_cpu_write(current_vmcs, None)
    await cpu.local_irq_restore(flags)
    return ret


async def decoy(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Enter with no current VMCS, made so by loading and clearing a scratch one; then load the old one again."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        saved = await vmptrst(cpu)
        await vmptrld(cpu, scratch_vmcs(cpu.number), "decoy")
        await vmclear(cpu, scratch_vmcs(cpu.number), "decoy")
        ret = await seamcall_prerr(cpu, fn, args)
        if saved is not None and saved != NO_VMCS:
            await vmptrld(cpu, saved)
    return ret


async def vmclear_current(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Clear only the VMCS that KVM believes is current, through KVM's tracking."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        await loaded_vmcs_clear_current(cpu)
        return await seamcall_prerr(cpu, fn, args)


async def clear_current_and_launched(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """`clear-current-vmcs`, and forget that the current VMCS was launched."""
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        current = await cpu.this_cpu_read(current_vmcs)
        ret = await seamcall_prerr(cpu, fn, args)
        async for v in for_each_loaded_vmcs(cpu):
            if await cpu.load(v.vmcs) == current:
                await cpu.store_recorded(v.launched, 0, "launched_store", vmcs=current)
        await cpu.this_cpu_write(current_vmcs, None)
    return ret


DEFAULT = "clear-current-vmcs"

STRATEGIES: dict[str, Strategy] = {
    "none": none,
    "save-restore": save_restore,
    "save-restore-v3": save_restore_v3,
    "sweep-naive": sweep_naive,
    "vmclear-local": vmclear_local,
    "clear-current-vmcs": clear_current_vmcs,
    "refuse-on-erratum": refuse_on_erratum,
    "retry-on-busy": retry_on_busy,
    "unserialized": unserialized,
    "decoy": decoy,
    "vmclear-current": vmclear_current,
    "clear-current-and-launched": clear_current_and_launched,
}


class StrategyError(ValueError):
    """The strategy cannot be used; the message says what was seen and what to do."""


def find_strategy(name: str) -> Strategy:
    """A strategy by its name, or from a user's file as FILE.py:FUNCTION; raises `StrategyError`."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise StrategyError(f"no strategy {name!r}; there are {', '.join(STRATEGIES)}, or give FILE.py:FUNCTION")
    return _from_file(Path(path), function)


def _from_file(path: Path, function: str) -> Strategy:
    if not path.is_file():
        raise StrategyError(f"strategy file {path} does not exist")
    if path.stat().st_size > MAX_SOURCE:
        raise StrategyError(f"strategy file {path} has more than {MAX_SOURCE} bytes")
    spec = importlib.util.spec_from_file_location("seamlab_user_strategy", path)
    if spec is None or spec.loader is None:
        raise StrategyError(f"strategy file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise StrategyError(f"strategy file {path} does not load: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if found is None:
        own = [n for n, f in vars(module).items() if inspect.iscoroutinefunction(f) and f.__module__ == module.__name__]
        has = ", ".join(own) or "no async function of its own"
        raise StrategyError(f"strategy file {path} has no function {function!r}; it has: {has}")
    if not inspect.iscoroutinefunction(found) or len(inspect.signature(found).parameters) != 3:
        raise StrategyError(f"{path}:{function} must be `async def {function}(cpu, fn, args)`")
    strategy: Strategy = found
    return strategy
