"""Who waits for whom: the wait graph at the end of a history, and what in it can never move again.

A wait for a lock moves when its holder does. A wait for a cross-call moves when its target takes interrupts; so it is
stuck only if the target itself waits with interrupts off. What is stuck is judged by this graph, never by the clock.
"""

from __future__ import annotations

import msgspec

from bus.records import Record
from bus.shadow import Shadow, cpu_node


class Wait(msgspec.Struct, frozen=True):
    """`node` waits for `on`, as `record` shows. `kind` is "lock", "call" or "process"."""

    node: str
    on: str
    kind: str
    record: Record


class Ending:
    """The end of a history: the last shadow state, who waits for whom in it, and one cycle if there is one.

    `stuck_nodes` wait for ever; `parts` are labelled records of the cycle, for a story.
    """

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.waits = waits(shadow)
        left = stuck(self.waits)
        self.cycle = cycle(left)
        self.stuck_nodes = {wait.node for wait in left}
        self.parts = [("waits", wait.record) for wait in self.cycle[:3]]
        self._stuck = {id(wait.record) for wait in left}

    def is_stuck(self, record: Record) -> bool:
        """Whether the wait that this record began can never end."""
        return id(record) in self._stuck


def waits(shadow: Shadow) -> list[Wait]:
    """The waits that are open in the shadow."""
    found = []
    for (node, lock, request), record in shadow.requests.items():
        found += [Wait(node, holder, "lock", record) for holder in holders(shadow, lock, node, request)]
    found += [Wait(node, cpu_node(call["target"]), "call", call) for (node, _), call in shadow.calls.items()]
    found += [Wait(record["name"], record["on"], "process", record) for record in shadow.waiting if record["on"]]
    return found


def holders(shadow: Shadow, lock: str, node: str, request: int) -> list[str]:
    """Nodes that hold the lock for which `node` waits, as far as they or its service say.

    A grant of this very request does not count: it is on its way.
    """
    known = shadow.lock(lock)
    granted = {
        cpu_node(grant["to"])
        for grant in known.granted.values()
        if (cpu_node(grant["to"]), grant["request"]) != (node, request)
    }
    return sorted(known.held.keys() | granted)


def stuck(graph: list[Wait]) -> list[Wait]:
    """The waits that are part of a cycle or lead into one.

    Takes away, again and again, every wait whose way on is free; what is left moves no more.
    """
    left = graph
    while True:
        by_node: dict[str, list[Wait]] = {}
        for wait in left:
            by_node.setdefault(wait.node, []).append(wait)
        kept = [wait for wait in left if any(_blocks(wait, other) for other in by_node.get(wait.on, ()))]
        if len(kept) == len(left):
            return left
        left = kept


def cycle(graph: list[Wait]) -> list[Wait]:
    """One cycle of the graph, empty if there is none."""
    left = stuck(graph)
    path: list[Wait] = []
    while left:
        wait = path[-1] if path else left[0]
        follower = next(other for other in left if _blocks(wait, other))
        if follower in path:
            return path[path.index(follower) :]
        path.append(follower)
    return path


def _blocks(wait: Wait, other: Wait) -> bool:
    """Whether `wait` cannot end before `other` has."""
    return other.node == wait.on and (wait.kind != "call" or other.kind == "process" or not other.record.get("irqs", 1))
