"""What each process is in the middle of: what its records say it has begun and not ended, the innermost last."""

from __future__ import annotations

import msgspec

from bus.records import Record
from bus.shadow import cpu_node
from bus.spec import SEAMLDR

_BEGINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "admin_begin": ("request", ("request",)),
    "update_begin": ("update", ("update",)),
    "stop_enter": ("stop", ()),
    "state_enter": ("stage", ()),
    "ack": ("acked", ()),
    "strategy_begin": ("strategy", ("ctx",)),
    "lock_request": ("lock", ("lock", "request")),
    "lock_hold": ("hold", ("lock",)),
    "csd_lock": ("call", ("call",)),
    "seamcall_enter": ("seam", ("ctx",)),
    "irq_enter": ("irq", ("vector",)),
    "nmi_enter": ("nmi", ()),
    "vcpu_load": ("vcpu", ("vcpu",)),
    "cpu_offline": ("offline", ()),
}
"""What a record begins: its kind, and the fields that tell it from others of this kind on the same CPU."""

_ENDS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "admin_end": (("request", ("request",)),),
    "update_end": (("update", ("update",)),),
    "stop_exit": (("stop", ()), ("stage", ()), ("acked", ())),
    "state_enter": (("acked", ()),),
    "ack": (("stage", ()),),
    "strategy_end": (("strategy", ("ctx",)),),
    "strategy_error": (("strategy", ("ctx",)),),
    "lock_hold": (("lock", ("lock", "request")),),
    "lock_drop": (("hold", ("lock",)),),
    "csd_done": (("call", ("call",)),),
    "seamcall_return": (("seam", ("ctx",)),),
    "irq_exit": (("irq", ("vector",)),),
    "nmi_exit": (("nmi", ()),),
    "vcpu_put": (("vcpu", ("vcpu",)),),
    "cpu_online": (("offline", ()),),
}
"""What a record ends, in the same way. Ends come before beginnings."""

NOT_ITS_OWN = ("ipi_deliver", "soft_lockup", "hard_lockup", "lockup_over", "refused")
"""Events that a CPU's process writes while its kernel code stands still."""


class Activity(msgspec.Struct):
    """Something that is under way since `record`; `entered`: the vCPU has been in the guest since it was loaded."""

    kind: str
    record: Record
    entered: bool = False


class Activities:
    """`last` and `moved` are the last record of each node, and the last that its own work has written."""

    def __init__(self) -> None:
        self.last: dict[str, Record] = {}
        self.moved: dict[str, Record] = {}
        self.requests: dict[int, Record] = {}
        """Requests of user space without an end."""
        self.queues: dict[str, dict[tuple[str, int], None]] = {}
        """By lock, who waits in its queue: node and request number, the first one first."""
        self.lockups: dict[tuple[str, str], Record] = {}
        """Lockups that were reported and are not over, by kind and node."""
        self.stopped: dict[str, Record] = {}
        """Nodes that a fault has stopped, with its record."""
        self.standing: dict[str, Record] = {}
        """Nodes that stand still at a fault's point, with its record."""
        self._open: dict[str, dict[tuple[object, ...], Activity]] = {}

    def open(self, node: str) -> list[Activity]:
        """What is under way, the innermost last."""
        return list(self._open.get(node, {}).values())

    def see(self, record: Record) -> None:
        """The next record in causal order."""
        node, event = record["node"], record["event"]
        last = self.last.get(node)
        if last is not None and last["pid"] != record["pid"]:
            self._open.pop(node, None)
            if node == SEAMLDR:  # a new lock service: its queues are made again
                self.queues.clear()
        self.last[node] = record
        if event not in NOT_ITS_OWN:
            self.moved[node] = record
        known = self._open.setdefault(node, {})
        for kind, fields in _ENDS.get(event, ()):
            known.pop(_key(kind, fields, record), None)
        if event in _BEGINS and record.get("wait", 1):
            kind, fields = _BEGINS[event]
            key = _key(kind, fields, record)
            known.pop(key, None)
            known[key] = Activity(kind, record)
        elif event == "vmentry":
            activity = known.get(("vcpu", record["vcpu"]))
            if activity is not None:
                activity.entered = True
        self._see_service(event, record)
        self._see_machine(event, record)

    def _see_service(self, event: str, record: Record) -> None:
        match event:
            case "lock_queue":
                self.queues.setdefault(record["lock"], {})[cpu_node(record["by"]), record["request"]] = None
            case "lock_claim" if not record["number"]:
                self.queues.setdefault(record["lock"], {})[cpu_node(record["by"]), record["request"]] = None
            case "lock_grant":
                self.queues.get(record["lock"], {}).pop((cpu_node(record["to"]), record["request"]), None)
            case "lock_withdraw":
                self.queues.get(record["lock"], {}).pop((cpu_node(record["by"]), record["request"]), None)
            case "request":
                self.requests[record["request"]] = record
            case "admin_end":
                self.requests.pop(record["request"], None)

    def _see_machine(self, event: str, record: Record) -> None:
        match event:
            case "soft_lockup" | "hard_lockup":
                self.lockups[event, cpu_node(record["cpu"])] = record
            case "lockup_over":
                self.lockups.pop((record["kind"], cpu_node(record["cpu"])), None)
            case "fault" if record["kind"] == "stop":
                self.stopped[record["name"]] = record
            case "fault" if record["kind"] == "standstill":
                self.standing[record["name"]] = record
            case "fault" if record["kind"] in ("resume", "kill", "replug", "restart"):
                self.stopped.pop(record["name"], None)
                self.standing.pop(record["name"], None)
            case "machine_reset":
                self._open.clear()
                self.requests.clear()
                self.queues.clear()
                self.stopped.clear()
                self.standing.clear()


def _key(kind: str, fields: tuple[str, ...], record: Record) -> tuple[object, ...]:
    return kind, *(record.get(field) for field in fields)
