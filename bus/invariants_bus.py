"""Invariants about interrupts and cross-calls: I26, I51, I58, I59.

Three counts are kept apart. Each interrupt message that is sent sets its pending bit once (I58). Interrupts of one
vector may coalesce, so for n messages a handler runs between once and n times, which no invariant counts. Each
function that is queued for another CPU runs exactly once (I59).
"""

from __future__ import annotations

from bus.invariant import EXPLAINED_BY_DEATH, Invariant
from bus.records import Record
from bus.shadow import Shadow, cpu_node
from bus.waits import Ending

GRACE_NS = 1_000_000_000
"""A message sent less than this long, in ns, before the end of its target may still have been on its way."""


class NoCallsWithInterruptsOff(Invariant):
    """Judged where a cross-call is queued."""

    id = "I26"
    slug = "calls-with-irqs-on"
    sentence = "No CPU starts to wait for a cross-call to another CPU with its interrupts off."
    source = "kernel smp_call_function_single(): WARN_ON_ONCE(irqs_disabled())"
    broken_by = "clearing a VMCS from sched_out or under a lock taken with irqsave"

    def on_csd_lock(self, record: Record, shadow: Shadow) -> None:
        if record["wait"] and not record["irqs"] and cpu_node(record["target"]) != record["node"]:
            self.violated(
                f"{record['node']} waits for {cpu_node(record['target'])} with interrupts off", ("call", record)
            )


class CallsComplete(Invariant):
    """Judged when the history is over, by what can still move."""

    id = "I51"
    slug = "calls-complete"
    sentence = "Every cross-call that is waited for completes."
    source = "kernel csd_lock_wait()"
    broken_by = "two CPUs that wait for each other with interrupts off; a lock held over a call; a lost interrupt"
    consequence_of = ("I25", "I26", "I58")

    def at_end(self, ending: Ending) -> None:
        shadow = ending.shadow
        for (node, _), record in shadow.calls.items():
            target = cpu_node(record["target"])
            if node in shadow.gone or target in shadow.dead:
                self.excused.append(f"a call of {node} to {target} has no end: {EXPLAINED_BY_DEATH[self.id]}")
            elif shadow.finished or ending.is_stuck(record):
                self.violated(
                    f"{node} waits for {target} to run {record['func']}, for ever", ("call", record), *ending.parts
                )
            else:
                self.suspects.append(f"{node} was waiting for a call to {target} when the run was cut")


class InterruptsArrive(Invariant):
    """Judged by message id. Excused: what was on its way at the very end, or to or from a CPU ended by a signal.

    A run that was cut can leave messages on their way for longer; there only one that a later one overtook is lost.
    """

    id = "I58"
    slug = "ipis-arrive-once"
    sentence = "Every interrupt message to a CPU that stays alive is delivered exactly once."
    source = "the bus's promise: exactly once in effect, to a live peer"
    broken_by = "a bus that loses or repeats messages"

    def __init__(self) -> None:
        super().__init__()
        self._sent: dict[tuple[str, object], Record] = {}
        self._delivered: set[tuple[str, object]] = set()
        self._latest: dict[tuple[str, int], int] = {}
        self._strays: dict[tuple[str, object], Record] = {}
        self._end: dict[str, int] = {}
        self._cut: set[str] = set()
        self._run_end = 0

    def on_ipi_send(self, record: Record, shadow: Shadow) -> None:
        key = (record["node"], record["id"])
        if self._strays.pop(key, None) is not None:
            self._arrived(key, record)
        else:
            self._delivered.discard(key)
            self._sent[key] = record

    def _arrived(self, key: tuple[str, object], sent: Record) -> None:
        self._delivered.add(key)
        link = (sent["node"], sent["target"])
        self._latest[link] = max(sent["seq"], self._latest.get(link, 0))

    def on_ipi_deliver(self, record: Record, shadow: Shadow) -> None:
        # The sender may write its record just after the message left, so a delivery may come first.
        key = (record["source"], record["id"])
        sent = self._sent.pop(key, None)
        if sent is not None:
            self._arrived(key, sent)
        elif key in self._delivered or key in self._strays:
            self.violated(f"an interrupt from {record['source']} was delivered twice", ("again", record))
        else:
            self._strays[key] = record

    def on_process_exit(self, record: Record, shadow: Shadow) -> None:
        self._end[record["name"]] = record["ts"]
        if record["status"] < 0:
            self._cut.add(record["name"])

    def on_machine_end(self, record: Record, shadow: Shadow) -> None:
        self._run_end = record["ts"]

    def at_end(self, ending: Ending) -> None:
        dead = ending.shadow.dead
        for record in self._strays.values():
            if record["source"] not in dead:
                self.violated(f"an interrupt that {record['source']} never sent was delivered", ("stray", record))
        excused = 0
        fragile = dead | self._cut
        for record in self._sent.values():
            target = cpu_node(record["target"])
            late = record["ts"] > self._end.get(target, self._run_end) - GRACE_NS
            if target in fragile or record["node"] in fragile or late:
                excused += 1
            elif not ending.shadow.finished and record["seq"] > self._latest.get((record["node"], record["target"]), 0):
                self.suspects.append(f"an interrupt to {target} was on its way when the run was cut")
            else:
                self.violated(f"an interrupt to {target} was never delivered", ("sent", record))
        if excused:
            self.excused.append(f"{excused} interrupts sent at the very end, or to or from a dead CPU, did not arrive")


class CallsRunOnce(Invariant):
    """Judged by call number; the calls that never ran are judged where the machine came to its own end."""

    id = "I59"
    slug = "calls-run-once"
    sentence = "Every function queued for another CPU runs exactly once."
    source = "kernel __flush_smp_call_function_queue()"
    broken_by = "a queue word that is lost or read twice"
    consequence_of = ("I58", "I51")

    def __init__(self) -> None:
        super().__init__()
        self._queued: dict[tuple[str, int], Record] = {}
        self._ran: dict[tuple[str, int], Record] = {}

    def on_csd_lock(self, record: Record, shadow: Shadow) -> None:
        if not shadow.ended:
            self._queued[record["node"], record["call"]] = record

    def on_csd_run(self, record: Record, shadow: Shadow) -> None:
        key = (cpu_node(record["source"]), record["call"])
        if key[0] == record["node"]:
            return
        before = self._ran.get(key)
        if before is not None:
            self.violated(f"{record['func']} ran twice for one call", ("first", before), ("again", record))
        self._ran[key] = record
        self._queued.pop(key, None)

    def at_end(self, ending: Ending) -> None:
        shadow = ending.shadow
        for (node, _), record in self._queued.items():
            target = cpu_node(record["target"])
            if target in shadow.dead or node in shadow.dead:
                self.excused.append(f"{record['func']} of {node} never ran: {EXPLAINED_BY_DEATH[self.id]}")
            elif shadow.finished and target != node:
                self.violated(f"{record['func']} of {node} never ran on {target}", ("queued", record))


BUS_INVARIANTS: tuple[type[Invariant], ...] = (
    NoCallsWithInterruptsOff,
    CallsComplete,
    InterruptsArrive,
    CallsRunOnce,
)
