"""User space's view of its tasks. Where each is says one word in shared memory, which a CPU keeps; what user space
remembers besides is only which have not ended. So a user space that is started again knows as much as the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from bus.clock import LamportClock
from bus.memory import PhysicalMemory
from bus.messages import Body, RunTask
from cpu.layout import per_cpu
from cpu.struct import NONE
from kvm.run_queue import ON_RQ, on_its_way_to, place_word


class Tasks:
    """`live` are the tasks that have not ended. `send` and `emit` are those of the process."""

    def __init__(
        self,
        total: int,
        memory: PhysicalMemory,
        clock: LamportClock,
        send: Callable[[str, Body], object],
        emit: Callable[..., object],
    ) -> None:
        self.live = set(range(total))
        self._memory = memory
        self._clock = clock
        self._send = send
        self._emit = emit

    def _place(self, task: int) -> int:
        place, stamp = self._memory.load(place_word(task))
        self._clock.merge(stamp)
        return place

    def _store(self, task: int, place: int) -> None:
        self._memory.store(place_word(task), place, self._clock.tick())

    def put(self, task: int, cpu: int) -> None:
        """A task that no CPU has is on its way to one; `look` sends it."""
        self._emit("task_place", task=task, cpu=cpu)
        self._store(task, on_its_way_to(cpu))

    def owner(self, task: int) -> int | None:
        """The CPU that has the task, or gets it; None if it has ended."""
        place = self._place(task)
        return None if place == NONE else place >> 2

    def runs_on(self, task: int) -> int | None:
        """The CPU that has the task on its run queue; None while it is on its way, or if it has ended."""
        place = self._place(task)
        return None if place == NONE or not place & ON_RQ else place >> 2

    def look(self, usable: Collection[int]) -> int:
        """See what has become of the live tasks; how many have ended, or were lost with a CPU.

        What is on its way to a live CPU is sent again, to a dead one redirected: the CPU takes it if its word says so.
        """
        before = len(self.live)
        for task in sorted(self.live):
            place = self._place(task)
            cpu = place >> 2
            if place == NONE:
                self.live.discard(task)
            elif self._memory.load(per_cpu(cpu).dead)[0]:
                self._dead(task, place, usable)
            elif not place & ON_RQ:
                self._send(f"cpu{cpu}", RunTask(task))
        return before - len(self.live)

    def _dead(self, task: int, place: int, usable: Collection[int]) -> None:
        if place & ON_RQ:
            self._emit("task_lost", task=task, cpu=place >> 2)
            self._store(task, NONE)
            self.live.discard(task)
        elif usable:
            cpu = min(usable)
            self.put(task, cpu)
            self._send(f"cpu{cpu}", RunTask(task))
