"""The catalogue of strategies, strategies from a user's file, and the contract that all of them are held to."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from cpu.cpu import Cpu
from cpu.layout import BUFFERS
from kvm.stepped import Stepped
from seamldr import api
from seamldr.call import seamldr_call
from seamldr.seamcall import TdxModuleArgs
from seamldr.status import SeamldrLeaf
from seamldr.strategies import DEFAULT, STRATEGIES, StrategyError, find_strategy

INFO_PAGE = BUFFERS + 0x10_0000
LOCKED = set(STRATEGIES) - {"save-restore-v3", "retry-on-busy", "unserialized", "refuse-on-erratum"}

GOOD = """
from seamldr.api import current_vmcs, is_seamldr_call, seamcall_prerr, seamldr_lock

async def seamldr_call(cpu, fn, args):
    cpu.warn_on_once(not is_seamldr_call(fn))
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        ret = await seamcall_prerr(cpu, fn, args)
        await cpu.this_cpu_write(current_vmcs, None)
    return ret
"""


async def call(cpu: Cpu) -> int:
    """SEAMLDR.INFO through the machine's strategy."""
    return await seamldr_call(cpu, SeamldrLeaf.INFO, TdxModuleArgs(rcx=INFO_PAGE))


def file_with(folder: Path, text: str) -> str:
    """FILE:FUNCTION of a strategy with this text."""
    path = folder / "mine.py"
    path.write_text(text)
    return f"{path}:seamldr_call"


# The catalogue


def test_the_catalogue() -> None:
    """Twelve names, each a function of its own with a sentence of its own; the default is one of them."""
    assert len(STRATEGIES) == len(set(STRATEGIES.values())) == 12
    assert len({strategy.__doc__ for strategy in STRATEGIES.values()} - {None}) == 12
    assert DEFAULT == "clear-current-vmcs" in STRATEGIES
    for name, strategy in STRATEGIES.items():
        assert find_strategy(name) is strategy
        assert strategy.__name__ == name.replace("-", "_")
        assert list(inspect.signature(strategy).parameters) == ["cpu", "fn", "args"]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("vmcs", ["none", "one"])
def test_every_strategy_keeps_its_contract(name: str, vmcs: str) -> None:
    """Alone, with or without a current VMCS, it returns 0 or refuses, and leaves interrupts and locks as they were."""
    stepped = Stepped(name)
    if vmcs == "one":
        vcpu = stepped.new_vcpu(0)
        stepped.run(vcpu.vcpu_load)
    stepped.machine.records.clear()
    assert stepped.run(call) == (-22 if name == "refuse-on-erratum" else 0)
    assert stepped.count("strategy_error") == 0
    assert stepped.count("strategy_begin") == stepped.count("strategy_end") == 1
    cpu = stepped.cpu()
    assert (cpu.irqs_on, cpu.preempt_count, cpu.tokens) == (True, 0, {})


@pytest.mark.parametrize("name", STRATEGIES)
def test_who_holds_the_lock_around_the_call(name: str) -> None:
    """The SEAMCALL carries the token of seamldr_lock, IRQs off, except in strategies that are known to do without."""
    stepped = Stepped(name)
    stepped.machine.records.clear()
    stepped.run(call)
    calls = stepped.events("seamcall_enter")
    assert [bool(r["number"]) for r in calls] == ([] if name == "refuse-on-erratum" else [name in LOCKED])
    assert all(not r["irqs"] for r in calls)
    assert stepped.count("lock_hold") == stepped.count("lock_drop") == (name in LOCKED)


def test_what_was_merged_calls_with_the_lock_on_a_fixed_cpu() -> None:
    """`refuse-on-erratum` refuses only where the erratum is."""
    stepped = Stepped("refuse-on-erratum", vmx_basic_bit60=1)
    assert stepped.run(call) == 0
    assert [bool(r["number"]) for r in stepped.events("seamcall_enter")] == [True]


def test_retry_on_busy_calls_again_until_it_gets_in() -> None:
    """While another LP is inside, the call is made again; when it has left, it succeeds."""
    stepped = Stepped("retry-on-busy", cpus=2)
    stepped.seam.enter(1, SeamldrLeaf.INFO, (INFO_PAGE + 4096, *(0,) * 12))
    thread = stepped.start(call)
    for _ in range(100):
        stepped.machine.step(0)
    busy = stepped.count("seamcall_return", entered=0)
    assert busy > 3 and thread.result is None
    stepped.seam.leave(1)
    stepped.machine.run()
    assert thread.result == 0 and stepped.count("seamcall_return", entered=1) == 1


# A user's file


def test_a_users_file_is_a_strategy(tmp_path: Path) -> None:
    """FILE:FUNCTION is found, and behaves as the same code in the catalogue."""
    records = []
    for name in (file_with(tmp_path, GOOD), "clear-current-vmcs"):
        stepped = Stepped(name)
        stepped.run(stepped.new_vcpu(0).vcpu_load)
        stepped.machine.records.clear()
        assert stepped.run(call) == 0
        records.append(stepped.machine.records)
    assert records[0] == records[1]


WRONG_NAMES = {
    "typo": ("clear-curent-vmcs", "no strategy 'clear-curent-vmcs'; there are none, save-restore"),
    "empty": ("", "no strategy ''"),
    "no function": ("mine.py", "give FILE.py:FUNCTION"),
    "not a Python file": ("mine.txt:f", "no strategy 'mine.txt:f'"),
    "no file": ("/nowhere/mine.py:f", "strategy file /nowhere/mine.py does not exist"),
    "a folder": ("/:f", "no strategy"),
}


@pytest.mark.parametrize("name, says", WRONG_NAMES.values(), ids=WRONG_NAMES.keys())
def test_a_name_that_is_none_says_what_there_is(name: str, says: str) -> None:
    """The error names what was seen and what to write instead, in one line."""
    with pytest.raises(StrategyError) as raised:
        find_strategy(name)
    assert says in str(raised.value) and "\n" not in str(raised.value)


WRONG_FILES = {
    "syntax": ("async def seamldr_call(cpu, fn, args:\n", "does not load: SyntaxError"),
    "import": ("import nothing_like_this\n", "does not load: ModuleNotFoundError: No module named 'nothing_like_this'"),
    "raises": ("raise RuntimeError('no')\n", "does not load: RuntimeError: no"),
    "other name": (
        "async def seamldr_cal(cpu, fn, args): ...\nasync def helper(): ...\n",
        "has no function 'seamldr_call'; it has: seamldr_cal, helper",
    ),
    "nothing": ("X = 1\n", "it has: no async function"),
    "not async": ("def seamldr_call(cpu, fn, args): ...\n", "must be `async def seamldr_call(cpu, fn, args)`"),
    "not a function": ("seamldr_call = 5\n", "must be `async def seamldr_call(cpu, fn, args)`"),
    "two parameters": ("async def seamldr_call(cpu, fn): ...\n", "must be `async def seamldr_call(cpu, fn, args)`"),
}


@pytest.mark.parametrize("text, says", WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_file_that_is_no_strategy_says_why(text: str, says: str, tmp_path: Path) -> None:
    """The error names the file and what is wrong with it."""
    with pytest.raises(StrategyError) as raised:
        find_strategy(file_with(tmp_path, text))
    assert says in str(raised.value) and "mine.py" in str(raised.value)


# The contract

LEFT = "left interrupts, preemption or a lock"
BROKEN = {
    "raises": ("    raise KeyError('x')", "raised KeyError: 'x'"),
    "returns nothing": ("    pass", "returned None instead of 0 or a negative errno"),
    "returns a status": ("    return 1 << 63", "instead of 0 or a negative errno"),
    "returns a bool": ("    return False", "returned False instead of 0 or a negative errno"),
    "leaves interrupts off": ("    await cpu.local_irq_disable()\n    return 0", LEFT),
    "leaves preemption off": ("    await cpu.preempt_disable()\n    return 0", LEFT),
    "keeps the lock": ("    await cpu.raw_spin_lock(seamldr_lock).__aenter__()\n    return 0", LEFT),
}


@pytest.mark.parametrize("body, error", BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_the_contract_is_a_record_and_repaired(body: str, error: str, tmp_path: Path) -> None:
    """The record says what was wrong; interrupts, preemption and locks are put back, so that the machine goes on."""
    text = f"from seamldr.api import *\nasync def seamldr_call(cpu, fn, args):\n{body}\n"
    stepped = Stepped(file_with(tmp_path, text))

    async def two_calls(cpu: Cpu) -> list[Any]:
        errnos = [await call(cpu), await call(cpu)]
        return [*errnos, cpu.irqs_on, cpu.preempt_count, cpu.tokens]

    errno = 0 if body.endswith("return 0") else -5
    assert stepped.run(two_calls) == [errno, errno, True, 0, {}]
    errors = stepped.events("strategy_error")
    assert len(errors) == 2 and error in errors[0]["error"]
    assert errors[0]["where"] == (f"{tmp_path / 'mine.py'}:3" if "raise" in body else "")
    assert stepped.arbiter.locks.get("seamldr_lock") is None or stepped.arbiter.locks["seamldr_lock"].holder is None


def test_the_api_has_what_it_promises() -> None:
    """Every name of `seamldr.api.__all__` is there, and the catalogue needs nothing else."""
    assert all(hasattr(api, name) for name in api.__all__)
    assert sorted(api.__all__, key=str.lower) == sorted(set(api.__all__), key=str.lower)
