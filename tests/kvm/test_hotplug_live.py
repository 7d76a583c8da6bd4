"""CPUs that go offline and come back on a live machine, with guests, readers and updates."""

from __future__ import annotations

from pathlib import Path

import trio
from live import records, small

from cpu.layout import per_cpu
from kvm.compose import Knobs
from kvm.machine import Machine

KNOBS = Knobs(offline_irqs="off")
"""With interrupts on in the callback a clear IPI may come in the middle of its sweep, a hazard of its own."""


async def test_cpus_go_and_come_under_load(tmp_path: Path) -> None:
    """Every CPU but the first goes and comes; its guests run on elsewhere, and the run is safe.

    What cannot be done is refused: an image that is not there, a CPU that is online already, a CPU whose TDX module an
    update with a CPU offline has lost.
    """
    machine = Machine(small(tmp_path, cpus=3, vcpus=6, tds=1, updates=0, knobs=KNOBS, seconds=20.0))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        with trio.fail_after(60):
            for cpu in (1, 2, 1):
                assert await machine.offline(cpu) == 0
                assert await machine.offline(cpu) == -22
                words = per_cpu(cpu).online, per_cpu(cpu).active, per_cpu(cpu).nr_tasks
                assert [machine.memory.load(word)[0] for word in words] == [0, 0, 0]
                assert await machine.read_version(cpu)
                assert await machine.online(cpu) == 0
            asked = ("offline", 0, ""), ("online", 1, ""), ("update", 1, "/nowhere.bin"), ("read", 1, "")
            assert [(await machine.do(*what)).errno for what in asked] == [-1, -22, -2, 0]
            assert await machine.update() == 0
            assert await machine.offline(2) == 0
            assert (await machine.update(), await machine.online(2)) == (-19, -19)
        await machine.finish()
    judgement = machine.check()
    assert judgement.verdict == "safe", (judgement.violations, judgement.why)
    assert len(records(machine.run_dir, "cpu_offline", node="cpu1", ctx="migration/1")) == 2
    assert records(machine.run_dir, "task_enqueue", node="cpu1")


async def test_hotplug_and_updates_wait_for_each_other(tmp_path: Path) -> None:
    """Asked for at the same time, an update and an offline both end, and no CPU goes while the update runs (I37)."""
    machine = Machine(small(tmp_path, cpus=3, vcpus=3, updates=0, knobs=KNOBS, seconds=20.0))
    results: dict[str, int] = {}

    async def ask(what: str, cpu: int) -> None:
        results[what] = await (machine.update(cpu=cpu) if what == "update" else machine.offline(cpu))

    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        with trio.fail_after(60):
            async with trio.open_nursery() as both:
                both.start_soon(ask, "update", 0)
                both.start_soon(ask, "offline", 2)
        await machine.finish()
    assert results["offline"] == 0 and results["update"] in (0, -19)
    judgement = machine.check()
    assert judgement.violations == ()
    assert results["update"] == 0 or judgement.as_dict()["updates"]["failed"] == 1
