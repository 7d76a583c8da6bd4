"""seamldr_call: the one door to P-SEAMLDR, whichever strategy is behind it."""

from __future__ import annotations

import traceback
from errno import EIO

from cpu.cpu import Cpu, RawSpinLock
from seamldr.leaves import leaf_name
from seamldr.seamcall import TdxModuleArgs

SEAMLDR_LEAF_BIT = 1 << 63
MAX_ERRNO = 4095

seamldr_lock = RawSpinLock("seamldr_lock")
"""Serializes every call to P-SEAMLDR, on the whole machine."""


def is_seamldr_call(fn: int) -> bool:
    """Whether the leaf goes to P-SEAMLDR: bit 63."""
    return bool(fn & SEAMLDR_LEAF_BIT)


async def seamldr_call(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Call P-SEAMLDR through the strategy of this machine; 0 or a negative errno.

    The strategy may be anybody's ten lines, so its contract is checked: it returns an errno and leaves interrupts,
    preemption and locks as it found them. What breaks the contract becomes a record, and -EIO.
    """
    before = (cpu.irqs_on, cpu.preempt_count, dict(cpu.tokens))
    cpu.emit("strategy_begin", leaf=fn, name=leaf_name(fn), cur=cpu.vmx.cur)
    errno = -EIO
    if cpu.nmi_due("before-vmptrst"):
        await cpu.boundary()
    try:
        answer = await cpu.static_call("seamldr_strategy", fn, args)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - a user's code; the record says where
        _broken(cpu, f"raised {type(error).__name__}: {error}".rstrip(": "), error)
    else:
        if isinstance(answer, int) and not isinstance(answer, bool) and -MAX_ERRNO <= answer <= 0:
            errno = answer
        else:
            _broken(cpu, f"returned {answer!r} instead of 0 or a negative errno")
    if (cpu.irqs_on, cpu.preempt_count, cpu.tokens) != before:
        _broken(cpu, "left interrupts, preemption or a lock other than it found them")
        await _restore(cpu, before)
    if cpu.nmi_due("after-repair"):
        await cpu.boundary()
    cpu.emit("strategy_end", leaf=fn, errno=errno, cur=cpu.vmx.cur)
    return errno


def _broken(cpu: Cpu, error: str, raised: BaseException | None = None) -> None:
    where = ""
    if raised is not None:
        own = cpu.kernel.static_calls["seamldr_strategy"].__code__.co_filename
        frames = [frame for frame in traceback.extract_tb(raised.__traceback__) if frame.filename == own]
        where = f"{own}:{frames[-1].lineno}" if frames else ""
    cpu.emit("strategy_error", error=error, where=where)


async def _restore(cpu: Cpu, before: tuple[bool, int, dict[str, tuple[int, int]]]) -> None:
    irqs_on, preempt_count, tokens = before
    for name, token in list(cpu.tokens.items()):
        if name not in tokens:
            cpu.give_lock_back(name, token)
    while cpu.preempt_count > preempt_count:
        await cpu.preempt_enable()
    while cpu.preempt_count < preempt_count:
        await cpu.preempt_disable()
    await cpu.local_irq_restore(irqs_on)
