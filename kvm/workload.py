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


class Build(msgspec.Struct, frozen=True):
    """User space builds a TD, runs it and ends it. `over_update`: it finishes the build only after the next update."""

    over_update: bool


Action = Read | Move | Kick | Update | Build

BUILDS = 8
"""TDs that are built in a run, at most."""


def placement(tasks: int, cpus: int) -> list[int]:
    """The CPU that each task starts on: round robin."""
    return [task % cpus for task in range(tasks)]


def timeline(
    workload: Workload, seed: int, tasks: int, cpus: int, *, builds: bool = False
) -> Iterator[tuple[int, Action]]:
    """Actions with the time at which they are due, ns from the start, in order. Follows from its arguments alone.

    Updates lie evenly in the run. With `builds` a TD is begun a little before some of them; by turns its build waits
    for the update, or goes on whatever comes. Of the rest, half are reads of the version, the others moves and
    preemptions.
    """
    rng = random.Random(seed)
    step = workload.duration_ns // (workload.updates + 1)
    updates = [(step * (index + 1), Update(index, rng.randrange(cpus))) for index in range(workload.updates)]
    planned: list[tuple[int, Action]] = sorted([*updates, *_builds(workload, step, builds)], key=lambda due: due[0])
    at = 0
    while True:
        at += int(workload.action_ns * rng.uniform(0.5, 1.5))
        while planned and planned[0][0] <= at:
            yield planned.pop(0)
        if at >= workload.duration_ns:
            yield from planned
            return
        yield at, _action(rng, tasks, cpus)


def _builds(workload: Workload, step: int, builds: bool) -> Iterator[tuple[int, Build]]:
    """Builds with their times: each begins half a step before an update, or in the middle of a run without updates."""
    every = max(1, -(-workload.updates // BUILDS))
    for number, index in enumerate(range(0, max(workload.updates, 1), every) if builds else ()):
        yield step * index + step // 2, Build(over_update=bool(workload.updates) and number % 2 == 0)


def _action(rng: random.Random, tasks: int, cpus: int) -> Action:
    draw = rng.random()
    if draw < 0.35:
        return Read((rng.randrange(cpus),))
    if draw < 0.5:
        return Read(tuple(rng.sample(range(cpus), min(BURST, cpus))))
    if draw < 0.75 and tasks and cpus > 1:
        return Move(rng.randrange(tasks), rng.randrange(cpus))
    return Kick(rng.randrange(cpus))
