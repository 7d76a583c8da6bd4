"""What can be done to a live machine: stand still at every point, stop, slow down, kill, replug, reset."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from live import records, small

from bus.points import POINTS
from bus.spec import SEAMLDR
from kvm.machine import Machine

UPDATE = {name for name, point in POINTS.items() if point.event == "state_enter"} | {"mid-install"}
BUILD = {"td-build"}


async def test_every_point_is_reached_and_nothing_is_hurt(tmp_path: Path) -> None:
    """At each point somebody stands still while the launcher looks on; the machine then goes on and is safe."""
    machine = Machine(small(tmp_path, cpus=4, vcpus=8, tds=1, updates=0, seconds=6.0))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        with trio.fail_after(60):
            for name in POINTS:
                if name not in UPDATE | BUILD:
                    async with machine.standing(name) as cpu:
                        assert cpu in range(4)
            for name in sorted(UPDATE):
                await _during_an_update(machine, name)
        await machine.finish()
    assert machine.check().verdict == "safe"
    stood = records(machine.run_dir, "fault", kind="standstill")
    assert {record["what"] for record in stood} == POINTS.keys() - BUILD
    assert all((record["name"] == SEAMLDR) == (POINTS[record["what"]].seen_by == SEAMLDR) for record in stood)


async def _during_an_update(machine: Machine, name: str) -> None:
    results: list[int] = []

    async def update() -> None:
        results.append(await machine.update())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(update)
        async with machine.standing(name):
            assert not results
    assert results == [0]


async def test_stopped_and_slow_processes_lose_nothing(tmp_path: Path) -> None:
    """SIGSTOP of a CPU, of the lock service and of the KVM process, and a CPU with a tenth of the time: all is safe."""
    machine = Machine(small(tmp_path, cpus=3, vcpus=6, updates=1, seconds=1.5))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        for target in (1, "seamldr", "kvm"):
            await machine.stop(target)
            assert machine.process(target).is_stopped()
            await machine.resume(target)
        async with machine.slowed(2, 0.1), machine.standing("holding", cpu=2):
            pass
    judgement = machine.check()
    assert judgement.verdict == "safe"
    assert judgement.as_dict()["processes"]["stopped"] == 3


async def test_a_power_cycle_brings_seam_back(tmp_path: Path) -> None:
    """A CPU dies inside P-SEAMLDR: no call is possible until the reset; after it the next update succeeds."""
    machine = Machine(small(tmp_path, cpus=3, vcpus=3, updates=0, seconds=1.0))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("resident") as cpu:
            assert cpu is not None
            await machine.kill(cpu)
        with pytest.raises(OSError, match="seamldr_version"):
            await machine.read_version((cpu + 1) % 3)
        await machine.reset()
        assert await machine.update() == 0
        assert await machine.read_version(cpu)
    assert machine.check().violations == ()
    assert [record["why"] for record in records(machine.run_dir, "seam_dead")] == ["the CPU died inside SEAM"]


async def test_a_power_cycle_and_a_replug_come_one_after_the_other(tmp_path: Path) -> None:
    """A CPU that is on its way up when somebody cycles the power is not killed unasked: the machine goes on."""
    machine = Machine(small(tmp_path, cpus=2, updates=0, seconds=1.0))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        await machine.kill(1)
        nursery.start_soon(machine.replug, 1)
        await trio.testing.wait_all_tasks_blocked()
        await machine.process(1).born.wait()
        await machine.reset()
        assert await machine.update() == 0
    assert machine.check().verdict == "safe"
    assert machine.process(1).incarnation == 3


async def test_a_cpu_that_comes_up_can_be_killed(tmp_path: Path) -> None:
    """Before its first word, too: it stays dead until it is replugged once more."""
    machine = Machine(small(tmp_path, cpus=2, updates=0, seconds=1.0))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        await machine.kill(1)
        async with trio.open_nursery() as replug:
            replug.start_soon(machine.replug, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert not machine.process(1).hello
            await machine.kill(1)
        assert machine.process(1).gone.is_set()
        await machine.replug(1)
        assert machine.process(1).online
    assert machine.check().verdict == "safe"
    assert machine.process(1).incarnation == 3


async def test_unknown_targets_and_points_are_refused(tmp_path: Path) -> None:
    """A process or a point that does not exist is a `ValueError`, and nothing happens."""
    async with Machine(small(tmp_path)) as machine:
        for wrong in ("cpu7", "launcher", ""):
            with pytest.raises(ValueError, match="has no process"):
                await machine.kill(wrong)
        with pytest.raises(ValueError, match="no point 'lunch'"):
            machine.arm("lunch")
        with pytest.raises(ValueError, match="is not dead"):
            await machine.replug(1)
        with pytest.raises(ValueError, match="a share is above 0"):
            async with machine.slowed(1, 1.5):
                pass
    assert machine.process(1).incarnation == 1
