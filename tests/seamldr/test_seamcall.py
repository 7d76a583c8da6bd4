"""How the kernel makes a SEAMCALL: retries, status to errno, what is logged; and what every strategy is held to."""

from __future__ import annotations

from collections.abc import Coroutine
from errno import EACCES, EIO, ENODEV, EOPNOTSUPP
from typing import Any, cast

import pytest

from cpu.core import SeamReply
from cpu.cpu import Cpu
from cpu.vmx import Outcome, Status
from seamldr.call import is_seamldr_call
from seamldr.leaves import leaf_name
from seamldr.seamcall import (
    RDRAND_RETRY_LOOPS,
    TDX_RND_NO_ENTROPY,
    TDX_SEAMCALL_GP,
    TDX_SEAMCALL_UD,
    TDX_SEAMCALL_VMFAILINVALID,
    TdxModuleArgs,
    sc_retry,
    seamcall_prerr,
    seamcall_prerr_ret,
    seamcall_ret,
)
from seamldr.status import SeamldrLeaf
from seamldr.tdx_leaves import TdhLeaf

ARGS = TdxModuleArgs(rcx=1, rsi=13)
SEEN = tuple(range(100, 113))


class ScriptedCpu:
    """Answers SEAMCALLs from a list, and notes what it is asked."""

    def __init__(self, *answers: SeamReply | Outcome) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[int, tuple[int, ...], int]] = []
        self.log: list[str] = []
        self.preempt_count = 0

    async def preempt_disable(self) -> None:
        self.preempt_count += 1

    async def preempt_enable(self) -> None:
        self.preempt_count -= 1

    async def seamcall(self, rax: int, registers: tuple[int, ...], **named: Any) -> SeamReply | Outcome:
        assert self.preempt_count == 1, "SEAMCALL with preemption on"
        assert named["name"] == leaf_name(rax)
        self.calls.append((rax, registers, named["attempt"]))
        return self.answers.pop(0)

    def pr_err(self, text: str) -> None:
        self.log.append(text)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def entered(status: int) -> SeamReply:
    """SEAM answered with this status."""
    return SeamReply(True, status, SEEN)


BUSY = SeamReply(False, 0x1234, SEEN)
FAULT_UD, FAULT_GP = Outcome(Status.EXCEPTION, vector=6), Outcome(Status.EXCEPTION, vector=13)

STATUS = {
    "success": (entered(0), 0, 0),
    "VMfailInvalid": (BUSY, TDX_SEAMCALL_VMFAILINVALID, -ENODEV),
    "#GP": (FAULT_GP, TDX_SEAMCALL_GP, -EOPNOTSUPP),
    "#UD": (FAULT_UD, TDX_SEAMCALL_UD, -EACCES),
    "P-SEAMLDR refuses": (entered(0x8000_0000_0000_0003), 0x8000_0000_0000_0003, -EIO),
    "the module refuses": (entered(0xC000_0100_0000_0000), 0xC000_0100_0000_0000, -EIO),
    "P-SEAMLDR has no entropy": (entered(0x8000_0000_0003_0001), 0x8000_0000_0003_0001, -EIO),
    "a warning of the module": (entered(0x0000_0815_0000_0000), 0x0000_0815_0000_0000, -EIO),
}


@pytest.mark.parametrize("answer, status, errno", STATUS.values(), ids=STATUS.keys())
def test_status_and_errno(answer: SeamReply | Outcome, status: int, errno: int) -> None:
    """What the instruction did becomes a status, a status becomes an errno, and only -EIO is logged."""
    cpu = ScriptedCpu(answer)
    assert run(seamcall_prerr(cast(Cpu, cpu), SeamldrLeaf.INFO, ARGS)) == errno
    assert cpu.log == ([f"seamldr: SEAMCALL (0x8000000000000000) failed: 0x{status:016x}"] if errno == -EIO else [])
    assert (cpu.preempt_count, len(cpu.calls)) == (0, 1)
    after = run(seamcall_ret(cast(Cpu, ScriptedCpu(answer)), SeamldrLeaf.INFO, ARGS))
    assert after == (status, SEEN if isinstance(answer, SeamReply) and answer.entered else ARGS.registers())


def test_module_calls_are_logged_under_their_own_name() -> None:
    """A failed call to the TDX module is a line of virt/tdx."""
    cpu = ScriptedCpu(entered(1))
    assert run(seamcall_prerr(cast(Cpu, cpu), TdhLeaf.TDH_SYS_UPDATE, ARGS)) == -EIO
    assert cpu.log == ["virt/tdx: SEAMCALL (0x0000000000000035) failed: 0x0000000000000001"]


def test_the_form_with_registers_logs_them_too() -> None:
    """An error of SEAM is three lines: the status, then the registers as they came back; VMfailInvalid is none."""
    answer = SeamReply(True, 1, (0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77))
    cpu = ScriptedCpu(answer)
    assert run(seamcall_prerr_ret(cast(Cpu, cpu), 0x22, ARGS)) == (-EIO, answer.registers)
    assert cpu.log == [
        "virt/tdx: SEAMCALL (0x0000000000000022) failed: 0x0000000000000001",
        "virt/tdx: RCX 0x0000000000000011 RDX 0x0000000000000022 R08 0x0000000000000033",
        "virt/tdx: R09 0x0000000000000044 R10 0x0000000000000055 R11 0x0000000000000066",
    ]
    quiet = ScriptedCpu(SeamReply(False, 0x22, ()))
    assert run(seamcall_prerr_ret(cast(Cpu, quiet), 0x22, ARGS))[0] == -ENODEV
    assert quiet.log == []


@pytest.mark.parametrize("dry", [0, 1, RDRAND_RETRY_LOOPS - 1])
def test_no_entropy_is_tried_again(dry: int) -> None:
    """The same call with the same registers, numbered, until it is answered otherwise."""
    cpu = ScriptedCpu(*[entered(TDX_RND_NO_ENTROPY)] * dry, entered(0))
    assert run(sc_retry(cast(Cpu, cpu), TdhLeaf.TDH_SYS_INIT, ARGS)) == (0, SEEN)
    assert cpu.calls == [(TdhLeaf.TDH_SYS_INIT, ARGS.registers(), attempt) for attempt in range(1, dry + 2)]


def test_ten_executions_are_the_most() -> None:
    """If entropy never comes, the tenth answer is the result: -EIO."""
    cpu = ScriptedCpu(*[entered(TDX_RND_NO_ENTROPY)] * 20)
    assert run(seamcall_prerr(cast(Cpu, cpu), TdhLeaf.TDH_SYS_INIT, ARGS)) == -EIO
    assert len(cpu.calls) == RDRAND_RETRY_LOOPS == 10


@pytest.mark.parametrize("answer", [BUSY, FAULT_GP, entered(0x8000_0203_0000_0001)], ids=["busy", "#GP", "with detail"])
def test_nothing_else_is_tried_again(answer: SeamReply | Outcome) -> None:
    """Busy, faults, and a status that only resembles it are answers."""
    cpu = ScriptedCpu(answer, entered(0))
    run(sc_retry(cast(Cpu, cpu), TdhLeaf.TDH_SYS_INIT, ARGS))
    assert len(cpu.calls) == 1


def test_registers_travel_in_the_order_of_the_message() -> None:
    """struct tdx_module_args: rcx, rdx, r8 to r15, rbx, rdi, rsi."""
    names = ("rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rbx", "rdi", "rsi")
    assert TdxModuleArgs(**{name: index for index, name in enumerate(names)}).registers() == tuple(range(13))


def test_bit_63_chooses_p_seamldr() -> None:
    """Every P-SEAMLDR leaf has it, no TDX module leaf has."""
    assert all(is_seamldr_call(leaf) for leaf in SeamldrLeaf)
    assert not any(is_seamldr_call(leaf) for leaf in TdhLeaf)


def test_leaves_have_their_names_in_records() -> None:
    """A leaf that no document names is shown as its number; a version in RAX does not hide a module leaf's name."""
    names = [leaf_name(rax) for rax in (1 << 63, 1 << 63 | 9, TdhLeaf.TDH_SYS_INIT, 2 << 16 | 26, 999)]
    assert names == ["SEAMLDR.INFO", "0x8000000000000009", "TDH.SYS.INIT", "TDH.VP.RD", "0x3e7"]
