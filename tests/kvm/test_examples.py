"""The worked examples of docs/chaos.md, as people would write them with the fixture `machine`."""

from __future__ import annotations

import pytest
import trio

from bus.linkfaults import LinkRule
from kvm.machine import Machine


@pytest.mark.machine(cpus=4, vcpus=8, updates=0, seconds=1.0)
async def test_the_lock_outlives_its_holder(machine: Machine) -> None:
    """A holder dies, the lock goes on, the CPU comes back."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("holding") as holder:
            assert holder is not None
            await machine.kill(holder)
        await machine.replug(holder)
    await machine.end()
    assert machine.check().violations == ()


@pytest.mark.machine(cpus=4, vcpus=8, tds=1, updates=1, seconds=1.0)
async def test_the_lock_service_may_die(machine: Machine) -> None:
    """A service is killed and started again while CPUs wait for it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        async with machine.standing("waiting"):
            await machine.restart("seamldr")
    await machine.end()
    assert machine.check().verdict == "safe"


@pytest.mark.machine(cpus=4, vcpus=8, updates=0, seconds=2.0)
async def test_an_update_over_a_bad_bus(machine: Machine) -> None:
    """Ten percent of all frames are lost, and ten come twice, during an update."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        await machine.set_link_faults([LinkRule(drop=0.1, duplicate=0.1)])
        assert await machine.update() == 0
        await machine.set_link_faults([])
    await machine.end()
    assert machine.check().verdict == "safe"
