"""Strategies from a user's file, on live machines: right ones, and every way to get ten lines wrong."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio
from live import log, records, small

from bus.judge import Judgement
from kvm.machine import Machine

HEAD = """
from seamldr.api import current_vmcs, is_seamldr_call, seamcall_prerr, seamldr_lock

async def seamldr_call(cpu, fn, args):
"""

RIGHT = """
    cpu.warn_on_once(not is_seamldr_call(fn))
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        ret = await seamcall_prerr(cpu, fn, args)
        await cpu.this_cpu_write(current_vmcs, None)
    return ret
"""


async def run(tmp_path: Path, body: str) -> tuple[Machine, Judgement]:
    """A machine with the strategy whose body this is, run to its end; bounded whatever the strategy does."""
    file = tmp_path / "idea.py"
    file.write_text(HEAD + body)
    with trio.fail_after(40):
        async with Machine(small(tmp_path, strategy=f"{file}:seamldr_call", grace_s=1.0)) as machine:
            await machine.run_workload()
    assert "Traceback" not in log(machine.run_dir)
    return machine, machine.check()


async def test_ten_right_lines_are_safe(tmp_path: Path) -> None:
    """The mail's answer from a user's file: put to the test, and safe."""
    machine, judgement = await run(tmp_path, RIGHT)
    assert (judgement.verdict, judgement.why) == ("safe", ())
    assert judgement.exposures.lost_vmcs > 0
    assert judgement.statistics.updates.succeeded == 1
    assert log(machine.run_dir) == ""


BROKEN = {
    "raises": (
        "    async with cpu.raw_spin_lock_irqsave(seamldr_lock):\n        raise ValueError('no idea')\n",
        {"raised ValueError: no idea"},
    ),
    "exits": ("    raise SystemExit(3)\n", {"raised SystemExit: 3"}),
    "nonsense": (
        "    answers = ['abc', None, 5, True]\n    return answers[cpu.count.operations % 4]\n",
        {f"returned {answer} instead of 0 or a negative errno" for answer in ("'abc'", "None", "5", "True")},
    ),
    "sleeps": (
        "    import trio\n    await trio.sleep(1)\n    return 0\n",
        {"raised NotAnOperation: awaited a WaitTaskRescheduled, which is no operation of a CPU"},
    ),
    "irqs-off": (
        "    await cpu.local_irq_disable()\n" + RIGHT,
        {"left interrupts, preemption or a lock other than it found them"},
    ),
    "keeps-lock": (
        "    await cpu.raw_spin_lock_irqsave(seamldr_lock).__aenter__()\n    return 0\n",
        {"left interrupts, preemption or a lock other than it found them"},
    ),
}


@pytest.mark.parametrize(("body", "errors"), BROKEN.values(), ids=BROKEN)
async def test_a_broken_contract_is_a_violation(tmp_path: Path, body: str, errors: set[str]) -> None:
    """What the strategy did is a record each time; the machine goes on to its own end, and the verdict is unsafe."""
    machine, judgement = await run(tmp_path, body)
    broken = records(machine.run_dir, "strategy_error")
    assert {record["error"] for record in broken} <= errors
    assert broken
    for record in broken:
        assert not record["error"].startswith("raised") or record["where"].startswith(f"{tmp_path}/idea.py:")
    (end,) = records(machine.run_dir, "machine_end")
    assert end["finished"] == 1
    assert judgement.verdict == "unsafe"
    assert "I60" in {violation.invariant for violation in judgement.violations}


async def test_a_lock_taken_twice_is_a_deadlock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I50, with the CPU that waits for itself as the cycle."""
    monkeypatch.setattr("kvm.fleet.TERMINATE_S", 0.5)
    lock = "    async with cpu.raw_spin_lock_irqsave(seamldr_lock):\n"
    machine, judgement = await run(tmp_path, lock + "    " + lock + "            return 0\n")
    assert judgement.verdict == "unsafe"
    (violation,) = judgement.violations
    assert violation.invariant == "I50"
    assert {(wait.node, wait.on) for wait in judgement.cycle} in ({("cpu0", "cpu0")}, {("cpu1", "cpu1")})
    assert {record["what"] for record in records(machine.run_dir, "process_waits")} >= {"spins on seamldr_lock"}


@pytest.mark.parametrize(
    ("body", "says", "steps"),
    [
        ("    while True:\n        await cpu.cpu_relax()\n", "runs reader", {"SIGTERM"}),
        ("    while True:\n        await cpu.this_cpu_read(current_vmcs)\n", "runs reader", {"SIGTERM"}),
        ("    while True:\n        pass\n", "does not answer", {"SIGTERM", "SIGKILL"}),
    ],
    ids=["relaxes", "works", "spins"],
)
async def test_an_endless_loop_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str, steps: set[str]
) -> None:
    """The machine counts as stuck; each CPU says what it does, if it can; ending it takes what it takes."""
    monkeypatch.setattr("kvm.fleet.TERMINATE_S", 0.5)
    machine, judgement = await run(tmp_path, body)
    assert (judgement.verdict, judgement.violations) == ("incomplete", ())
    assert "the machine did not come to its own end: nothing has moved for 1 s after the planned end" in judgement.why
    assert says in {record["what"] for record in records(machine.run_dir, "process_waits")}
    assert {record["step"] for record in records(machine.run_dir, "process_end_step")} == steps
    statuses = {record["status"] for record in records(machine.run_dir, "process_exit")}
    assert statuses <= {0, -signal.SIGKILL}
