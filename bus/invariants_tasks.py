"""Invariants about tasks and about CPUs that go and come: I56, I62."""

from __future__ import annotations

from bus.invariant import EXPLAINED_BY_DEATH, Invariant
from bus.records import Record
from bus.shadow import Shadow, cpu_node
from bus.waits import Ending

HOTPLUG = ("offline", "online")
REFUSALS = {-1: "EPERM", -4: "EINTR", -5: "EIO", -6: "ENXIO", -16: "EBUSY", -19: "ENODEV", -22: "EINVAL"}
"""What a CPU that is to go or come may answer instead of 0; EIO and ENODEV if the TDX module will not have it."""


class HotplugEnds(Invariant):
    """Judged by the requests of user space, of kind `offline` and `online`."""

    id = "I56"
    slug = "hotplug-ends"
    sentence = "Every request to take a CPU offline or online completes or is refused."
    source = "kernel cpu_down(), and tdx_offline_cpu(), which says -EBUSY"
    broken_by = "a hotplug writer that waits for an install that waits for the CPU on its way down"
    consequence_of = ("I50", "I51", "I52", "I58")

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[int, Record] = {}

    def on_admin_begin(self, record: Record, shadow: Shadow) -> None:
        if record["kind"] in HOTPLUG:
            self._open[record["request"]] = record

    def on_admin_end(self, record: Record, shadow: Shadow) -> None:
        begun = self._open.pop(record["request"], None)
        if begun is not None and record["errno"] and record["errno"] not in REFUSALS:
            self.violated(f"{record['kind']} ended with {record['errno']}", ("asked", begun), ("ended", record))

    def at_end(self, ending: Ending) -> None:
        dead = sorted(node for node in ending.shadow.dead if node.startswith("cpu"))
        for record in self._open.values():
            what = f"a request for {record['kind']} on {record['node']}"
            if dead:
                self.excused.append(f"{what} did not end, {dead[0]} is dead: {EXPLAINED_BY_DEATH[self.id]}")
            elif ending.shadow.finished or record["node"] in ending.stuck_nodes:
                self.violated(f"{what} never ended", ("asked", record), *ending.parts)
            else:
                self.suspects.append(f"{what} had not ended when the run was cut")


class OneRunQueue(Invariant):
    """Judged where a CPU puts a task on its run queue. What a dead CPU had is lost and never runs again."""

    id = "I62"
    slug = "one-run-queue"
    sentence = "A task is on the run queue of at most one CPU, and of none once it was lost with one."
    source = "kernel activate_task() and deactivate_task()"
    broken_by = "user space that is started again and does not know what runs; a message that arrives twice"

    def __init__(self) -> None:
        super().__init__()
        self._on: dict[int, Record] = {}
        self._lost: dict[int, Record] = {}

    def on_task_enqueue(self, record: Record, shadow: Shadow) -> None:
        task, node = record["task"], record["node"]
        before, lost = self._on.get(task), self._lost.get(task)
        if before is not None:
            self.violated(
                f"task {task} is on the run queues of {before['node']} and {node}", ("first", before), ("again", record)
            )
        elif lost is not None:
            self.violated(
                f"task {task} runs on {node} after it was lost with {cpu_node(lost['cpu'])}",
                ("lost", lost),
                ("again", record),
            )
        self._on[task] = record

    def on_task_dequeue(self, record: Record, shadow: Shadow) -> None:
        before = self._on.pop(record["task"], None)
        if before is None or before["node"] != record["node"]:
            self.violated(
                f"task {record['task']} leaves a run queue of {record['node']} that it was not on",
                ("on", before),
                ("left", record),
            )

    def on_task_lost(self, record: Record, shadow: Shadow) -> None:
        self._lost[record["task"]] = record
        self._on.pop(record["task"], None)


TASK_INVARIANTS: tuple[type[Invariant], ...] = (HotplugEnds, OneRunQueue)
