"""What becomes of seamldr_lock when a CPU dies that holds it or waits for it, on live processes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import trio
from live import records, small

from bus.snapshot import look
from kvm.compose import Knobs
from kvm.machine import Machine, MachineError


async def test_a_dead_waiter_leaves_the_queue(tmp_path: Path) -> None:
    """A CPU dies while it waits: its request is withdrawn, the others are granted, and the run is safe."""
    machine = Machine(small(tmp_path, cpus=4, vcpus=4, updates=0, seconds=1.0))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("waiting") as waiter:
            assert waiter is not None
            await machine.kill(waiter)
        assert await machine.read_version((waiter + 1) % 4)
    withdrawn = records(machine.run_dir, "lock_withdraw", lock="seamldr_lock")
    assert [record["by"] for record in withdrawn] == [waiter]
    assert machine.check().verdict == "safe"


async def test_with_hang_nobody_gets_the_lock_of_the_dead(tmp_path: Path) -> None:
    """As in Linux: the others spin for ever, the run is cut and excused, and `why` names the dead holder."""
    topology = small(
        tmp_path, cpus=3, vcpus=3, updates=0, seconds=0.5, grace_s=1.0, knobs=Knobs(lock_policy="hang")
    )
    machine = Machine(topology)
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("holding") as holder:
            assert holder is not None
            await machine.kill(holder)
        nursery.start_soon(_read, machine, (holder + 1) % 3)
    died = records(machine.run_dir, "process_exit", name=f"cpu{holder}")[0]["clock"]
    grants = records(machine.run_dir, "lock_grant", lock="seamldr_lock")
    assert grants and all(grant["clock"] < died for grant in grants)
    judgement = machine.check()
    assert (judgement.verdict, judgement.violations) == ("incomplete", ())
    assert any(excuse.startswith("I50") for excuse in judgement.excused)
    seen = look(machine.run_dir)
    (lock,) = [lock for lock in seen.locks if lock.lock == "seamldr_lock"]
    assert lock.holder == f"cpu{holder}"


async def _read(machine: Machine, cpu: int) -> None:
    """Read the version for as long as there is a machine."""
    with contextlib.suppress(MachineError):
        await machine.read_version(cpu)
