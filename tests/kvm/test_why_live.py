"""`why` and the watchdog on live machines: a deadlock, a stopped CPU, a long guest run; seen while the machine runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from live import records, small

import launcher
from bus.snapshot import look
from bus.spec import MachineSpec
from bus.why import Why
from cpu.layout import per_cpu
from kvm.compose import Knobs
from kvm.machine import Machine
from kvm.topology import machine_spec

ROOT = Path(__file__).resolve().parents[2]
WATCHED = Knobs(watchdog_thresh=1)
MINUTE_NS = 60_000_000_000
HARD = "watchdog: Watchdog detected hard LOCKUP on cpu 1"

CALLS_UNDER_THE_LOCK = """
from cpu.smp import smp_call_function_single
from seamldr.api import current_vmcs, seamcall_prerr, seamldr_lock

async def seamldr_call(cpu, fn, args):
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        await smp_call_function_single(cpu, 1 - cpu.number, "__loaded_vmcs_clear", 0)
        ret = await seamcall_prerr(cpu, fn, args)
        await cpu.this_cpu_write(current_vmcs, None)
    return ret
"""
"""Hazard D2: the other CPU spins for the lock with interrupts off, and never runs the call."""


def why_in_another_terminal(run_dir: Path) -> dict[str, Any]:
    """The answer of the command line, from a process that has nothing to do with the machine."""
    command = [sys.executable, str(ROOT / "launcher.py"), "why", str(run_dir), "--json"]
    answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
    return answer


class Watching:
    """A machine whose progress is watched: `until` waits for something to be so, and looks at each progress."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        self.machine = Machine(small(tmp_path, **settings), self._progressed)
        self._condition: Callable[[], bool] = lambda: False
        self._met = trio.Event()

    def _progressed(self, facts: dict[str, int]) -> None:
        if self._condition():
            self._met.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        self._condition, self._met = condition, trio.Event()
        await self._met.wait()

    def why(self) -> Why:
        return look(self.machine.run_dir)


def state(why: Why, node: str) -> tuple[str, str]:
    """State of a process and what it does."""
    return next((row.state, row.what) for row in why.processes if row.node == node)


@pytest.mark.slow
async def test_a_deadlock_is_seen_while_it_lasts_and_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two CPUs wait for each other: the cycle is there in the running machine, for anybody, and in its records."""
    monkeypatch.setattr("kvm.fleet.STOP_S", 0.5)
    file = tmp_path / "d2.py"
    file.write_text(CALLS_UNDER_THE_LOCK)
    watching = Watching(tmp_path, strategy=f"{file}:seamldr_call", seconds=60.0)
    machine = watching.machine
    with trio.fail_after(60):
        async with machine, trio.open_nursery() as nursery:
            nursery.start_soon(machine.run_workload)
            await watching.until(lambda: bool(watching.why().cycle))
            answer = await trio.to_thread.run_sync(why_in_another_terminal, machine.run_dir)
            nursery.cancel_scope.cancel()
    assert answer["running"] and set(answer["cycle"]) == {"cpu0", "cpu1"} and "kvm" in answer["behind_cycle"]
    waits = {edge["kind"]: (edge["node"], edge["on"]) for edge in answer["graph"] if edge["in_cycle"]}
    assert set(waits) == {"call", "lock"} and waits["call"] == waits["lock"][::-1]
    why = watching.why()
    assert not why.running and set(why.cycle) == {"cpu0", "cpu1"}
    judgement = machine.check()
    assert judgement.verdict == "unsafe" and {wait.node for wait in judgement.cycle} == {"cpu0", "cpu1"}


@pytest.mark.slow
async def test_a_stopped_cpu_is_seen_by_its_buddy(tmp_path: Path) -> None:
    """SIGSTOP: `why` says stopped, the buddy hard LOCKUP; after SIGCONT it is over, and no suspicion is left."""
    watching = Watching(tmp_path, knobs=WATCHED, seconds=2.0, updates=0)
    machine = watching.machine
    with trio.fail_after(60):
        async with machine, trio.open_nursery() as nursery:
            nursery.start_soon(machine.run_workload)
            await watching.until(lambda: machine.facts["done"] > 0)
            os.kill(machine.pids["cpu1"], signal.SIGSTOP)
            await watching.until(lambda: bool(records(machine.run_dir, "hard_lockup", cpu=1)))
            why = watching.why()
            os.kill(machine.pids["cpu1"], signal.SIGCONT)
            await watching.until(lambda: bool(records(machine.run_dir, "lockup_over", cpu=1, kind="hard_lockup")))
            went_on = watching.why()
            nursery.cancel_scope.cancel()
    assert why.running and why.newest_s < 1.0
    assert state(why, "cpu1")[0] == "stopped"
    assert [lockup.text for lockup in why.lockups if lockup.node == "cpu1"] == [HARD]
    assert "cpu1" in {root.node for root in why.roots if root.state == "stopped"}
    assert state(went_on, "cpu1")[0] in ("running", "asleep")
    judgement = machine.check()
    assert judgement.as_dict()["kernel_log"][HARD] == 1
    assert [suspect for suspect in judgement.suspects if suspect.startswith("cpu1 takes")] == []


@pytest.mark.slow
async def test_a_guest_that_runs_for_long_is_no_lockup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests that would run for a minute without an exit, undisturbed: every CPU goes on to take its ticks."""

    def long_guests(*arguments: Any) -> MachineSpec:
        spec = machine_spec(*arguments)
        workload = msgspec.structs.replace(spec.workload, guest_ns=MINUTE_NS, action_ns=MINUTE_NS)
        return msgspec.structs.replace(spec, workload=workload)

    monkeypatch.setattr("kvm.machine.machine_spec", long_guests)
    watching = Watching(tmp_path, knobs=WATCHED, seconds=60.0, updates=0)
    machine = watching.machine

    def ticks() -> int:
        return min(machine.memory.load(per_cpu(number).heartbeat)[0] for number in range(2))

    with trio.fail_after(60):
        async with machine, trio.open_nursery() as nursery:
            nursery.start_soon(machine.run_workload)
            await watching.until(lambda: ticks() >= 2)
            before = ticks()
            await watching.until(lambda: ticks() >= before + 3)
            await watching.until(lambda: "runs vcpu" in state(watching.why(), "cpu0")[1])
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Exit status 2, one line on stderr, nothing on stdout."""
    (tmp_path / "file").write_text("")
    assert launcher.main(["why", str(tmp_path / name)]) == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.count("\n") == 1 and errors.startswith(f"seamlab: {tmp_path / name} is not ")
