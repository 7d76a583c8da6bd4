"""What user space and the load balancer do during a run, decided by a seed. A pure core."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec

from bus.spec import Workload

BURST = 4
"""CPUs that read the version at once in a burst."""


class Read(msgspec.Struct, frozen=True):
    """User space reads `seamldr_version` on these CPUs at once."""

    cpus: tuple[int, ...]


class Move(msgspec.Struct, frozen=True):
    """The load balancer moves a task."""

    task: int
    to: int


class Kick(msgspec.Struct, frozen=True):
    """Something short preempts what runs on a CPU."""

    cpu: int


class Update(msgspec.Struct, frozen=True):
    """User space uploads image `index`; the worker runs on `cpu`."""

    index: int
    cpu: int


Action = Read | Move | Kick | Update


def placement(tasks: int, cpus: int) -> list[int]:
    """The CPU that each task starts on: round robin."""
    return [task % cpus for task in range(tasks)]


def timeline(workload: Workload, seed: int, tasks: int, cpus: int) -> Iterator[tuple[int, Action]]:
    """Actions with the time at which they are due, ns from the start, in order. Follows from its arguments alone.

    Updates lie evenly in the run. Of the rest, half are reads of the version, the others moves and preemptions.
    """
    rng = random.Random(seed)
    step = workload.duration_ns // (workload.updates + 1)
    updates = [(step * (index + 1), Update(index, rng.randrange(cpus))) for index in range(workload.updates)]
    at = 0
    while True:
        at += int(workload.action_ns * rng.uniform(0.5, 1.5))
        while updates and updates[0][0] <= at:
            yield updates.pop(0)
        if at >= workload.duration_ns:
            yield from updates
            return
        yield at, _action(rng, tasks, cpus)


def _action(rng: random.Random, tasks: int, cpus: int) -> Action:
    draw = rng.random()
    if draw < 0.35:
        return Read((rng.randrange(cpus),))
    if draw < 0.5:
        return Read(tuple(rng.sample(range(cpus), min(BURST, cpus))))
    if draw < 0.75 and tasks and cpus > 1:
        return Move(rng.randrange(tasks), rng.randrange(cpus))
    return Kick(rng.randrange(cpus))
