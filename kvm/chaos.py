"""Chaos: a plan's faults strike a live machine while it works, each is undone, and the records are judged.

Every fault is a task with a deadline. Whatever way it ends (its time is over, the machine has come to its end, the
launcher is interrupted), it lets go of what it holds. What was killed is brought back by the plan's rule.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import trio

from bus.linkfaults import LinkRule
from kvm.fleet import MachineError
from kvm.machine import Machine
from kvm.operator import Standstill
from kvm.plan import SUBJECT, TIME, Fault, Plan
from kvm.processes import Process
from kvm.topology import Topology

READY_S = 0.2
"""A stop_machine that has not reached a CPU after this time never will."""


class Strike(msgspec.Struct):
    """What became of a fault: `node` is who it struck; `outcome` is "not reached", "struck", "undone" or an error."""

    fault: Fault
    node: str = ""
    outcome: str = "not reached"


def chaos_topology(plan: Plan, run_dir: Path) -> Topology:
    """The machine of a plan; raises what `Topology.validate` raises, and `KnobError`."""
    topology = Topology(
        cpus=plan.cpus,
        vcpus=2 * plan.cpus if plan.vcpus is None else plan.vcpus,
        tds=plan.tds,
        updates=plan.updates,
        seconds=plan.seconds,
        strategy=plan.strategy,
        knobs=plan.parsed_knobs(),
        seed=plan.seed,
        run_dir=str(run_dir),
    )
    topology.validate()
    return topology


def plan_of(topology: Topology, faults: tuple[Fault, ...]) -> Plan:
    """The plan of a machine that these faults strike."""
    return Plan(
        seed=topology.seed,
        cpus=topology.cpus,
        vcpus=topology.vcpus,
        tds=topology.tds,
        updates=topology.updates,
        seconds=topology.seconds,
        strategy=topology.strategy,
        knobs=msgspec.structs.asdict(topology.knobs),
        fault=faults,
    )


async def run_chaos(machine: Machine, faults: tuple[Fault, ...]) -> list[Strike]:
    """Run a machine to its end under these faults; what became of each. Raises `MachineError` if it does not start."""
    strikes = [Strike(fault) for fault in faults]
    async with machine, trio.open_nursery() as nursery:
        for strike in strikes:
            nursery.start_soon(_strike, machine, strike)
        await machine.run_workload()
        nursery.cancel_scope.cancel()
    return strikes


async def _strike(machine: Machine, strike: Strike) -> None:
    fault = strike.fault
    try:
        if fault.at == TIME:
            await trio.sleep(fault.after_ms / 1000)
            await _act(machine, strike, None)
            return
        standstill = machine.arm(fault.at, cpu=fault.cpu, nth=fault.nth)
        try:
            await standstill.reached.wait()
            await _act(machine, strike, standstill)
        finally:
            machine.proceed(standstill)
    except (MachineError, ValueError) as error:
        strike.outcome = str(error)


def _node(fault: Fault, standstill: Standstill | None) -> str:
    if fault.do == "links":
        return "the bus"
    if fault.target != SUBJECT or standstill is None:
        return fault.target
    return standstill.node if standstill.cpu is None else f"cpu{standstill.cpu}"


async def _act(machine: Machine, strike: Strike, standstill: Standstill | None) -> None:
    """Do it, let whoever stood still for it go on, and undo it when its time is over."""
    fault, seconds = strike.fault, strike.fault.for_ms / 1000
    node = strike.node = _node(fault, standstill)

    def strikes() -> None:
        strike.outcome = "struck"
        if standstill is not None:
            machine.proceed(standstill)

    match fault.do:
        case "kill":
            dead = machine.process(node)
            await machine.kill(node)
            strikes()
            await trio.sleep(seconds)
            await _bring_back(machine, dead, fault.brought_back_by)
        case "stop":
            await machine.stop(node)
            strikes()
            try:
                await trio.sleep(seconds)
            finally:
                with trio.CancelScope(shield=True):
                    await machine.resume(node)
        case "slow":
            async with machine.slowed(node, fault.share):
                strikes()
                await trio.sleep(seconds)
        case "links":
            await machine.set_link_faults(machine.link_rules + fault.links)
            strikes()
            try:
                await trio.sleep(seconds)
            finally:
                with trio.CancelScope(shield=True):
                    await machine.set_link_faults(_without(machine.link_rules, fault.links))
        case "offline":
            strikes()
            number = int(node.removeprefix("cpu"))
            errno = await machine.offline(number)
            await trio.sleep(seconds)
            if not errno:
                await machine.online(number)
    strike.outcome = "undone"


def _without(rules: tuple[LinkRule, ...], gone: tuple[LinkRule, ...]) -> tuple[LinkRule, ...]:
    """The rules in force less one each of these."""
    rest = list(rules)
    for rule in gone:
        rest.remove(rule)
    return tuple(rest)


async def _bring_back(machine: Machine, dead: Process, how: str) -> None:
    """Undo a kill; there is nothing to do where the power cycle of another fault came first."""
    node = dead.node
    try:
        if how == "reset":
            await machine.reset()
        elif how == "restart" and machine.process(node) is dead:
            await machine.restart(node)
        elif how == "replug" and machine.process(node) is dead:
            await _replug(machine, machine.number_of(node))
    except ValueError:
        if machine.process(node) is dead:
            raise


async def _replug(machine: Machine, cpu: int) -> None:
    """Give up the update that waits for the dead CPU, and one that began before the new process was ready for it."""
    machine.abort_update()
    await machine.replug(cpu)
    stop = machine.leaves_out(cpu)
    await trio.sleep(READY_S)
    if stop and machine.leaves_out(cpu) == stop:
        machine.abort_update()
