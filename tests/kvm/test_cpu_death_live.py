"""CPUs of a live machine that are killed, and what their successors find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio
from live import records, small

from cpu.layout import KERNEL
from kvm.machine import Machine


def machine_of(tmp_path: Path, **settings: Any) -> Machine:
    """Four CPUs with guests on each, which run until the test says."""
    return Machine(small(tmp_path, **({"cpus": 4, "vcpus": 8, "tds": 2, "updates": 0, "seconds": 30.0} | settings)))


async def test_the_others_go_on_and_the_run_comes_to_its_end(tmp_path: Path) -> None:
    """A CPU dies for good: what it ran is lost and said so, its requests fail, everything else ends in good order."""
    machine = machine_of(tmp_path, seconds=1.0)
    async with machine, trio.open_nursery() as nursery, machine.standing("in-guest", cpu=2):
        nursery.start_soon(machine.run_workload)
        await machine.kill(2)
    judgement = machine.check()
    assert judgement.verdict == "safe", (judgement.violations, judgement.why)
    lost = {record["task"] for record in records(machine.run_dir, "task_lost", cpu=2)}
    assert lost
    dequeued = {record["task"] for record in records(machine.run_dir, "task_dequeue", to=-1)}
    assert dequeued | lost == set(range(10))


async def test_a_fresh_process_over_the_old_memory(tmp_path: Path) -> None:
    """Killed in the middle of a migration or of an IPI, and replugged: it runs tasks, goes and comes, and updates.

    The last time all others stand still meanwhile, by SIGSTOP, and find their calls over when they go on.
    """
    machine = machine_of(tmp_path, vcpus=16)
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        with trio.fail_after(60):
            for point in ("migration", "ipi-answer", "ipi-pending"):
                async with machine.standing(point) as cpu:
                    assert cpu is not None
                    others = [number for number in range(4) if number != cpu and point == "ipi-pending"]
                    for number in others:
                        await machine.stop(number)
                    await machine.kill(cpu)
                    await machine.replug(cpu)
                    for number in others:
                        await machine.resume(number)
                assert await machine.update(cpu=cpu) == 0
                assert await machine.read_version(cpu)
                if cpu:
                    assert (await machine.offline(cpu), await machine.online(cpu)) == (0, 0)
                assert machine.memory.load(KERNEL.num_online)[0] == 4
        await machine.finish()
    judgement = machine.check()
    assert judgement.verdict == "safe", (judgement.violations, judgement.why)
    assert len({record["pid"] for record in records(machine.run_dir, "cpu_online")}) == 7


async def test_an_update_is_stuck_until_it_is_given_up(tmp_path: Path) -> None:
    """A CPU is dead when the update begins, then one dies whose worker began another: nothing ends until the abort."""
    machine = machine_of(tmp_path, cpus=3, vcpus=3, tds=1)
    results: list[int] = []

    async def update(worker: int) -> None:
        results.append(await machine.update(cpu=worker))

    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        with trio.fail_after(60):
            await machine.kill(1)
            async with trio.open_nursery() as waiting:
                waiting.start_soon(update, 0)
                while not machine.memory.load(KERNEL.stop_mutex)[0]:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                assert machine.abort_update() and not results
            await machine.replug(1)
            assert await machine.update() == 0
            async with trio.open_nursery() as waiting:
                standstill = machine.arm("update-shutdown", cpu=2)
                waiting.start_soon(update, 1)
                await standstill.reached.wait()
                await machine.kill(1)
                machine.proceed(standstill)
                assert machine.abort_update()
            await machine.replug(1)
            assert results == [-4, -6]
            again = await machine.update()
            assert again == 0 or len(records(machine.run_dir, "module_init_flag", initialized=0)) == 2
        await machine.finish()
    assert machine.check().violations == ()
    assert {record["ret"] for record in records(machine.run_dir, "update_end")} >= {-4, 0}
