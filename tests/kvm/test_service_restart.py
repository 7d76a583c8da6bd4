"""The lock and SEAM service of a live machine is killed at any point of its work and started again: nobody notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from live import Remains, log, records, small

from bus.judge import Judgement
from kvm.compose import Knobs
from kvm.machine import Machine

INSTALL = 1 << 63 | 1
SEAMLDR_LOCK = "seamldr_lock"


async def restarted_at(machine: Machine, point: str, nth: int) -> Judgement:
    """Run the workload; kill and restart the service when it stands at the point."""
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing(point, nth=nth):
            await machine.restart("seamldr")
    return machine.check()


def the_restart(machine: Machine) -> dict[str, Any]:
    """The one record of a service that took over."""
    (restart,) = records(machine.run_dir, "service_restart")
    return restart


@pytest.mark.parametrize(
    ("point", "nth"), [("waiting", 1), ("granted", 4), ("resident", 2), ("mid-install", 3), ("in-td", 9)]
)
async def test_the_run_ends_safe(tmp_path: Path, point: str, nth: int) -> None:
    """Whatever was under way, holder, waiters and calls go on; the update is done, once, and all locks are granted."""
    remains = Remains()
    machine = Machine(small(tmp_path, cpus=4, vcpus=4, tds=1, seconds=0.5, residence_us=2000))
    judgement = await restarted_at(machine, point, nth)
    assert (judgement.verdict, judgement.why) == ("safe", ())
    assert judgement.statistics.updates.succeeded == 1
    assert log(machine.run_dir) == ""
    restart = the_restart(machine)
    assert (restart["epoch"], restart["asked"]) == (2, [0, 1, 2, 3])
    assert len(records(machine.run_dir, "lock_recovered")) == 1
    epochs = [grant["epoch"] for grant in records(machine.run_dir, "lock_grant")]
    assert epochs == sorted(epochs) and 2 in epochs
    remains.nothing_of(machine)


async def test_a_call_in_flight_goes_on(tmp_path: Path) -> None:
    """In the middle of INSTALL: the holder is restored, its call resumed, waiters queue, each LP installs once."""
    machine = Machine(small(tmp_path, cpus=4, vcpus=4, seconds=0.3, residence_us=5000))
    judgement = await restarted_at(machine, "mid-install", 2)
    assert judgement.verdict == "safe"
    inside = the_restart(machine)["inside"]
    assert inside >= 0
    (restored,) = records(machine.run_dir, "lock_restore", lock=SEAMLDR_LOCK)
    (resumed,) = records(machine.run_dir, "seam_resume")
    assert restored["to"] == resumed["by"] == inside and restored["epoch"] == 1
    waited = records(machine.run_dir, "lock_claim", lock=SEAMLDR_LOCK, epoch=0)
    order = [claim["by"] for claim in sorted(waited, key=lambda claim: (claim["asked"], claim["by"]))]
    grants = records(machine.run_dir, "lock_grant", lock=SEAMLDR_LOCK, epoch=2)
    assert inside not in order and [grant["to"] for grant in grants[: len(order)]] == order
    returns = records(machine.run_dir, "seam_return", leaf=INSTALL)
    assert sorted(record["by"] for record in returns) == [0, 1, 2, 3]
    assert {record["status"] for record in returns} == {0}


async def test_a_cpu_that_dies_with_the_service(tmp_path: Path) -> None:
    """The holder is killed while there is no service: nobody claims its lock, and the next waiter gets it."""
    machine = Machine(small(tmp_path, cpus=4, vcpus=4, updates=0, seconds=0.5))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("holding") as holder:
            await machine.kill("seamldr")
            assert holder is not None
            await machine.kill(holder)
            await machine.restart("seamldr")
    judgement = machine.check()
    assert judgement.violations == ()
    assert records(machine.run_dir, "lock_restore", lock=SEAMLDR_LOCK) == []
    assert holder not in the_restart(machine)["asked"]
    assert {grant["to"] for grant in records(machine.run_dir, "lock_grant", epoch=2)} >= {0, 1, 2, 3} - {holder}


async def test_a_cpu_that_dies_inside_while_there_is_no_service(tmp_path: Path) -> None:
    """SEAM is gone with it: the service that takes over says so, and admits nobody."""
    machine = Machine(small(tmp_path, cpus=4, vcpus=4, updates=0, seconds=0.5))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("resident") as inside:
            await machine.kill("seamldr")
            assert inside is not None
            await machine.kill(inside)
            await machine.restart("seamldr")
    assert machine.check().violations == ()
    assert the_restart(machine)["inside"] == inside
    (dead,) = records(machine.run_dir, "seam_dead")
    assert dead["by"] == inside
    after = [enter for enter in records(machine.run_dir, "seam_enter") if enter["clock"] > dead["clock"]]
    assert after and {(enter["admitted"], enter["alive"]) for enter in after} == {(0, 0)}


async def test_the_service_dies_again_and_again(tmp_path: Path) -> None:
    """Each time before it has done much; tokens only grow, and the run ends safe."""
    machine = Machine(small(tmp_path, cpus=3, vcpus=3, tds=1, updates=1, seconds=0.5))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        for point in ("granted", "resident", "in-td", "waiting", "granted", "resident"):
            async with machine.standing(point):
                await machine.restart("seamldr")
    judgement = machine.check()
    assert (judgement.verdict, judgement.why) == ("safe", ())
    assert judgement.statistics.updates.succeeded == 1
    assert [restart["epoch"] for restart in records(machine.run_dir, "service_restart")] == [2, 3, 4, 5, 6, 7]


async def test_a_holder_that_sleeps_over_its_lease_is_fenced(tmp_path: Path) -> None:
    """With a lease the others go on; when the holder calls P-SEAMLDR at last, it is not let in, and is halted."""
    knobs = Knobs(lock_policy="lease", lease_ms=100)
    machine = Machine(small(tmp_path, cpus=3, vcpus=3, updates=0, seconds=1.0, knobs=knobs))
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("holding") as holder, machine.standing("granted") as follower:
            assert follower != holder
        assert holder is not None
        await machine.process(holder).gone.wait()
    judgement = machine.check()
    assert judgement.violations == ()
    (lost,) = records(machine.run_dir, "lock_expire", by=holder)
    (fenced,) = records(machine.run_dir, "seam_fenced", by=holder)
    assert (lost["epoch"], lost["number"]) == (fenced["epoch"], fenced["number"])
    assert lost["held_ns"] >= 100_000_000
    assert (fenced["holder_epoch"], fenced["holder_number"]) != (fenced["epoch"], fenced["number"])
    calls = records(machine.run_dir, "seam_enter", by=holder)
    assert not [call for call in calls if call["clock"] > lost["clock"]]
