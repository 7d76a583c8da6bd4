"""How the kernel makes a SEAMCALL (arch/x86/virt/vmx/tdx: seamcall.S, seamcall_internal.h).

Registers travel as `struct tdx_module_args`: rcx, rdx, r8 to r15, rbx, rdi, rsi. A status is RAX as SEAM left it, or
one of the kernel's software codes if the instruction itself failed.
"""

from __future__ import annotations

from errno import EACCES, EIO, ENODEV, EOPNOTSUPP

import msgspec

from cpu.core import SeamReply
from cpu.cpu import Cpu
from cpu.vmx import Status
from seamldr.leaves import leaf_name

TDX_SW_ERROR = 0x8000_FF00_0000_0000
TDX_SEAMCALL_VMFAILINVALID = TDX_SW_ERROR | 0xFFFF_0000
TDX_SEAMCALL_GP = TDX_SW_ERROR | 13
TDX_SEAMCALL_UD = TDX_SW_ERROR | 6
TDX_RND_NO_ENTROPY = 0x8000_0203_0000_0000
RDRAND_RETRY_LOOPS = 10

_LOGGED = ("RCX", "RDX", "R08", "R09", "R10", "R11")
_QUIET = {TDX_SEAMCALL_VMFAILINVALID: -ENODEV, TDX_SEAMCALL_GP: -EOPNOTSUPP, TDX_SEAMCALL_UD: -EACCES}


class TdxModuleArgs(msgspec.Struct):
    """`struct tdx_module_args`, thirteen u64."""

    rcx: int = 0
    rdx: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rbx: int = 0
    rdi: int = 0
    rsi: int = 0

    def registers(self) -> tuple[int, ...]:
        """The registers in the order of the bus message."""
        return msgspec.structs.astuple(self)


async def _seamcall_once(
    cpu: Cpu, fn: int, args: TdxModuleArgs, attempt: int, guest: bool
) -> tuple[int, tuple[int, ...]]:
    """__seamcall_dirty_cache: one SEAMCALL with preemption off; status and the registers after it."""
    await cpu.preempt_disable()
    answer = await cpu.seamcall(fn, args.registers(), name=leaf_name(fn), attempt=attempt, guest=guest)
    await cpu.preempt_enable()
    if isinstance(answer, SeamReply):
        if answer.entered:
            return answer.rax, answer.registers
        return TDX_SEAMCALL_VMFAILINVALID, args.registers()
    if answer.status is Status.EXCEPTION:
        return TDX_SW_ERROR | answer.vector, args.registers()
    return TDX_SEAMCALL_VMFAILINVALID, args.registers()


async def sc_retry(
    cpu: Cpu, fn: int, args: TdxModuleArgs, *, guest: bool = False
) -> tuple[int, tuple[int, ...]]:
    """Repeat while the module has no entropy, ten executions at most. Preemption is possible between two."""
    for attempt in range(1, RDRAND_RETRY_LOOPS + 1):
        status, registers = await _seamcall_once(cpu, fn, args, attempt, guest)
        if status != TDX_RND_NO_ENTROPY:
            break
    return status, registers


def seamcall_errno(status: int) -> int:
    """What seamcall_prerr makes of a status: 0 or a negative errno."""
    return 0 if status == 0 else _QUIET.get(status, -EIO)


async def seamcall_prerr(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """SEAMCALL with retry; 0 or a negative errno, logged unless SEAM was not there at all."""
    status, _ = await sc_retry(cpu, fn, args)
    return report_seamcall(cpu, fn, status)


def report_seamcall(cpu: Cpu, fn: int, status: int) -> int:
    """The errno of a status, logged if it is an error that SEAM itself returned."""
    errno = seamcall_errno(status)
    if errno == -EIO:
        prefix = "seamldr" if fn >> 63 else "virt/tdx"
        cpu.pr_err(f"{prefix}: SEAMCALL (0x{fn:016x}) failed: 0x{status:016x}")
    return errno


async def seamcall_ret(cpu: Cpu, fn: int, args: TdxModuleArgs) -> tuple[int, tuple[int, ...]]:
    """SEAMCALL with retry; status and registers."""
    return await sc_retry(cpu, fn, args)


async def seamcall_prerr_ret(cpu: Cpu, fn: int, args: TdxModuleArgs) -> tuple[int, tuple[int, ...]]:
    """As `seamcall_prerr`, with the registers, which are logged too if it fails: errno and registers."""
    status, registers = await sc_retry(cpu, fn, args)
    errno = report_seamcall(cpu, fn, status)
    if errno == -EIO:
        words = [f"{name} 0x{value:016x}" for name, value in zip(_LOGGED, registers, strict=False)]
        for line in (words[:3], words[3:]):
            cpu.pr_err(f"virt/tdx: {' '.join(line)}")
    return errno, registers
