"""The live machine: real processes, from online to the end of their work, and what happens when one is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio
from live import Remains, log, parent_of, records, small

from kvm.machine import Machine

KILLED_HOLDER = """
import os, signal, time
from seamldr.api import current_vmcs, seamcall_prerr, seamldr_lock

async def seamldr_call(cpu, fn, args):
    held, wanted = {flags!r} + "/held", {flags!r} + "/wanted"
    if cpu.number == 0:
        async with cpu.raw_spin_lock_irqsave(seamldr_lock):
            open(held, "w").close()
            while not os.path.exists(wanted):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
    while not os.path.exists(held):
        time.sleep(0.001)
    open(wanted, "w").close()
    async with cpu.raw_spin_lock_irqsave(seamldr_lock):
        ret = await seamcall_prerr(cpu, fn, args)
        await cpu.this_cpu_write(current_vmcs, None)
    return ret
"""


@pytest.mark.slow
async def test_every_cpu_is_a_process_of_its_own(tmp_path: Path) -> None:
    """32 CPUs are 32 processes, all children of one parent, all online before the block begins; 3 updates succeed."""
    remains = Remains()
    async with Machine(small(tmp_path, cpus=32, vcpus=32, tds=2, updates=3, seconds=2.0)) as machine:
        pids = machine.pids
        assert set(pids) == {f"cpu{number}" for number in range(32)}
        assert len(set(pids.values())) == 32
        assert {parent_of(pid) for pid in pids.values()} == {machine.parent_pid}
        online = {record["name"] for record in records(machine.run_dir, "process_online")}
        assert online == {"launcher", "kvm", "seamldr", *pids}
        assert await machine.run_workload()
    remains.nothing_of(machine)
    judgement = machine.check()
    assert (judgement.verdict, judgement.why) == ("safe", ())
    assert judgement.statistics.updates.succeeded == 3


async def test_a_good_run_ends_in_good_order(tmp_path: Path) -> None:
    """Every process says its last word before it leaves with status 0; nothing is refused, nothing printed."""
    async with Machine(small(tmp_path)) as machine:
        assert await machine.run_workload()
    exits = records(machine.run_dir, "process_exit")
    assert {(exit["name"], exit["status"], exit["wanted"]) for exit in exits} == {
        (name, 0, 1) for name in ("cpu0", "cpu1", "kvm", "seamldr")
    }
    assert all(process.totals is not None for process in machine.processes.values())
    assert records(machine.run_dir, "refused") == []
    assert records(machine.run_dir, "process_end_step") == []
    assert log(machine.run_dir) == ""
    (end,) = records(machine.run_dir, "machine_end")
    assert (end["finished"], end["why"]) == (1, "")


async def test_online_means_ready(tmp_path: Path) -> None:
    """SIGTERM right after "online" finds its handler: the process leaves with status 0, not by the signal."""
    async with Machine(small(tmp_path, vcpus=1)) as machine:
        os.kill(machine.pids["cpu1"], signal.SIGTERM)
        await machine.processes["cpu1"].exited.wait()
        assert machine.processes["cpu1"].status == 0


@pytest.mark.parametrize("name", ["kvm", "seamldr"])
async def test_a_killed_service_ends_the_run(tmp_path: Path, name: str) -> None:
    """SIGKILL in the middle of the work: the death is recorded, the run is incomplete, nothing is blamed or left."""
    remains = Remains()

    def kill(facts: dict[str, int]) -> None:
        if facts["done"] and not machine.processes[name].gone.is_set():
            machine.processes[name].signal(signal.SIGKILL)

    with trio.fail_after(30):
        async with Machine(small(tmp_path, seconds=20.0), kill) as machine:
            assert not await machine.run_workload()
    remains.nothing_of(machine)
    (exit,) = records(machine.run_dir, "process_exit", name=name)
    assert (exit["status"], exit["wanted"]) == (-signal.SIGKILL, 0)
    judgement = machine.check()
    assert (judgement.verdict, judgement.violations) == ("incomplete", ())
    assert f"the machine did not come to its own end: process {name} was killed by SIGKILL" in judgement.why


async def test_the_lock_of_a_dead_holder_goes_to_the_next(tmp_path: Path) -> None:
    """A CPU dies with seamldr_lock: its grant is withdrawn, and the CPU that waits is granted under a higher token."""
    file = tmp_path / "killed.py"
    file.write_text(KILLED_HOLDER.format(flags=str(tmp_path)))
    with trio.fail_after(30):
        async with Machine(small(tmp_path, strategy=f"{file}:seamldr_call", seconds=1.5, updates=0)) as machine:
            await machine.run_workload()
    (withdrawn,) = records(machine.run_dir, "lock_withdraw", lock="seamldr_lock")
    first, second = records(machine.run_dir, "lock_grant", lock="seamldr_lock")[:2]
    assert (withdrawn["by"], first["to"], second["to"]) == (0, 0, 1)
    assert first["seq"] < withdrawn["seq"] < second["seq"]
    assert (first["epoch"], first["number"]) < (second["epoch"], second["number"])
    assert machine.check().violations == ()
