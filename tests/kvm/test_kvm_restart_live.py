"""The KVM process of a live machine is killed, and another takes over what it has left."""

from __future__ import annotations

from pathlib import Path

import trio
from live import records, small

from kvm.machine import Machine


async def test_a_new_kvm_process_goes_on_where_the_old_one_was(tmp_path: Path) -> None:
    """Tasks run on meanwhile and are on one run queue each; the planned updates are made, each once; all ends well."""
    machine = Machine(small(tmp_path, cpus=3, vcpus=6, tds=1, updates=2, seconds=2.4))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("update-init", cpu=1):
            pass
        for _ in range(2):
            await machine.restart("kvm")
            assert await machine.read_version()
    judgement = machine.check()
    assert judgement.verdict == "safe", (judgement.violations, judgement.why)
    assert judgement.finished and judgement.as_dict()["updates"]["succeeded"] == 2
    resumed = records(machine.run_dir, "workload_resume")
    assert [record["tasks"] for record in resumed] == [7, 7]
    assert 0 < resumed[0]["elapsed_ns"] < resumed[1]["elapsed_ns"]
    requests = [record["request"] for record in records(machine.run_dir, "request")]
    assert len(requests) == len(set(requests)) and max(requests) >> 32 == 2


async def test_what_the_dead_kvm_process_left(tmp_path: Path) -> None:
    """Its install goes on, the next one waits for it in the kernel; a CPU of whose death nobody heard is noticed."""
    machine = Machine(small(tmp_path, cpus=3, vcpus=6, updates=0, seconds=30.0))
    results: list[int] = []

    async def update() -> None:
        results.append(await machine.update())

    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        with trio.fail_after(60):
            standstill = machine.arm("update-shutdown", cpu=1)
            nursery.start_soon(update)
            await standstill.reached.wait()
            await machine.restart("kvm")
            async with trio.open_nursery() as second:
                second.start_soon(update)
                machine.proceed(standstill)
                while not results:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            async with machine.standing("in-guest", cpu=1):
                await machine.kill("kvm")
                await machine.kill(1)
            await machine.restart("kvm")
        await machine.finish()
        nursery.cancel_scope.cancel()
    assert machine.check().violations == ()
    began, ended = (records(machine.run_dir, event) for event in ("update_begin", "update_end"))
    assert [record["ret"] for record in ended] == [0, 0] and began[1]["clock"] > ended[0]["clock"]
    assert {record["cpu"] for record in records(machine.run_dir, "task_lost")} == {1}
