"""Invariants about CPUs that do not move: I53."""

from __future__ import annotations

from bus.invariant import EXPLAINED_BY_DEATH, Invariant
from bus.records import Record
from bus.shadow import Shadow, cpu_node
from bus.waits import Ending, leads_to

_WORDS = {
    "hard_lockup": "takes no interrupt",
    "soft_lockup": "does not schedule",
}


class NoLockup(Invariant):
    """Reported by wall clock, so a suspicion. A violation if the wait graph proves that the CPU never moves again; no
    more than a line of the kernel log if it moved later or the machine came to its own end.
    """

    id = "I53"
    slug = "no-lockup"
    sentence = "No CPU keeps interrupts off, or the scheduler out, for longer than the watchdog's threshold, for good."
    source = "kernel watchdog.c: watchdog_thresh"
    broken_by = "CPUs that wait for each other with interrupts off; a stopped CPU; a long series of INSTALLs"
    consequence_of = ("I26", "I50", "I51", "I52")

    def __init__(self) -> None:
        super().__init__()
        self._reported: dict[tuple[str, str], Record] = {}

    def on_soft_lockup(self, record: Record, shadow: Shadow) -> None:
        self._reported[record["event"], cpu_node(record["cpu"])] = record

    on_hard_lockup = on_soft_lockup

    def on_lockup_over(self, record: Record, shadow: Shadow) -> None:
        self._reported.pop((record["kind"], cpu_node(record["cpu"])), None)

    def on_machine_reset(self, record: Record, shadow: Shadow) -> None:
        self._reported.clear()

    def at_end(self, ending: Ending) -> None:
        shadow = ending.shadow
        for (kind, node), record in self._reported.items():
            behind = {node} | leads_to(ending.waits, node)
            dead = sorted(shadow.gone & behind)
            what = f"{node} {_WORDS[kind]}"
            if shadow.finished:
                continue
            if dead:
                self.excused.append(f"{what}, {dead[0]} is dead: {EXPLAINED_BY_DEATH[self.id]}")
            elif node in ending.stuck_nodes:
                self.violated(f"{what}, for ever", ("watchdog", record), *ending.parts)
            else:
                self.suspects.append(f"{what}, says the watchdog after {record['stuck_s']} s: stuck or slow")


WATCHDOG_INVARIANTS: tuple[type[Invariant], ...] = (NoLockup,)
