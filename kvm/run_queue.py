"""Which CPU has a task, and where a task goes that may not stay (kernel/sched/core.c).

The truth is one word per task in shared memory (`Task.place`). Whoever hands a task to a CPU writes that it is on its
way there; the CPU takes it only if the word says so. So a message that comes twice, or too late, puts no task on two
run queues.
"""

from __future__ import annotations

from errno import EBUSY

from cpu.cpu import Cpu
from cpu.layout import Task, per_cpu, task_address
from cpu.struct import NONE

ON_RQ = 2


def place_word(task: int) -> int:
    """Address of the word that says where the task is."""
    return Task(task_address(task)).place


def on_its_way_to(number: int) -> int:
    """The place of a task that was sent to a CPU and has not been taken there."""
    return number * 4


def on_run_queue_of(number: int) -> int:
    """The place of a task that a CPU has."""
    return number * 4 + ON_RQ


def _put(cpu: Cpu, word: int, value: int) -> None:
    if cpu.memory.store(word, value, cpu.clock.tick()):
        cpu.ring_watchers(word)


def count_task(cpu: Cpu, change: int) -> None:
    """One thread more, or less, that keeps this CPU from going offline."""
    word = cpu.percpu.nr_tasks
    _put(cpu, word, cpu.memory.load(word)[0] + change)


def enqueue_task(cpu: Cpu, task: int) -> bool:
    """Put a task that was sent here on this CPU's run queue; False if it was not, or is no more on its way here."""
    place, stamp = cpu.memory.load(place_word(task))
    cpu.clock.merge(stamp)
    if place != on_its_way_to(cpu.number):
        return False
    cpu.emit("task_enqueue", task=task)
    _put(cpu, place_word(task), on_run_queue_of(cpu.number))
    count_task(cpu, 1)
    return True


def dequeue_task(cpu: Cpu, task: int, to: int | None) -> None:
    """The task leaves this CPU's run queue, for the CPU `to` or for good."""
    cpu.emit("task_dequeue", task=task, to=-1 if to is None else to)
    _put(cpu, place_word(task), NONE if to is None else on_its_way_to(to))
    count_task(cpu, -1)


def redirect_task(cpu: Cpu, task: int) -> int | None:
    """Where a task goes on to that was sent here, where it may not run; None if it is no more on its way here."""
    to = select_fallback_rq(cpu, but=cpu.number)
    if to is None or cpu.memory.load(place_word(task))[0] != on_its_way_to(cpu.number):
        return None
    _put(cpu, place_word(task), on_its_way_to(to))
    return to


def is_active(cpu: Cpu, number: int) -> bool:
    """Whether tasks may run on a CPU, as far as anybody can tell."""
    percpu = per_cpu(number)
    return bool(cpu.memory.load(percpu.active)[0]) and not cpu.memory.load(percpu.dead)[0]


def select_fallback_rq(cpu: Cpu, but: int | None = None) -> int | None:
    """Where a task goes that may not be on the CPU `but`, or None: of its package first, then the least busy."""
    load = cpu.memory.load
    package = load(cpu.percpu.package)[0]
    candidates = [number for number in range(cpu.kernel.num_cpus) if number != but and is_active(cpu, number)]

    def badness(number: int) -> tuple[bool, int, int]:
        return load(per_cpu(number).package)[0] != package, load(per_cpu(number).nr_tasks)[0], number

    return min(candidates, key=badness, default=None)


def lose_tasks(cpu: Cpu, tasks: int) -> None:
    """A new process of this CPU: what the one that died had is lost. What was only on its way here may still come."""
    for task in range(tasks):
        if cpu.memory.load(place_word(task))[0] == on_run_queue_of(cpu.number):
            cpu.emit("task_lost", task=task, cpu=cpu.number)
            _put(cpu, place_word(task), NONE)


async def resume_user_mode(cpu: Cpu) -> bool:
    """The head of a vCPU thread's loop: False if it is to leave, as all do from a CPU that is not active."""
    if not await cpu.load(cpu.percpu.active):
        cpu.thread.move_to = select_fallback_rq(cpu, but=cpu.number)
    return await cpu.resume_user_mode()


async def sched_cpu_deactivate(cpu: Cpu) -> int:
    """The first teardown of a CPU that goes offline: no task comes any more, and those that are here leave.

    0, or -EBUSY if they have nowhere to go.
    """
    if select_fallback_rq(cpu, but=cpu.number) is None:
        return -EBUSY
    await cpu.store(cpu.percpu.active, 0)
    while await cpu.load(cpu.percpu.nr_tasks):
        await cpu.schedule()
    return 0


async def sched_cpu_activate(cpu: Cpu) -> None:
    """The last callback of a CPU that comes online."""
    await cpu.store(cpu.percpu.active, 1)
