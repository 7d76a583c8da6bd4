"""Who waits for whom: the wait graph at the end of a history, and what in it can never move again.

A wait for a lock moves when its holder does. A wait for a cross-call moves when its target takes interrupts; so it is
stuck only if the target itself waits with interrupts off. A wait in the lock-step of an update moves when every CPU
has acknowledged the stage. What is stuck is judged by this graph, never by the clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from bus.records import Record
from bus.shadow import STAGES, Shadow, UpdateShadow, cpu_node, node_order

LAST_STAGE = STAGES.index("DONE")


class Wait(msgspec.Struct, frozen=True):
    """`node` waits for `on`, as `record` shows.

    `kind` is "lock", "call", "stage" (to and from a stage of an update that has to be acknowledged), "stop" (to and
    from a stop_machine that has to be joined or left) or "process" (the process says so itself).
    """

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
    update = shadow.open_update()
    if update is not None:
        found += _update_waits(update)
    found += [Wait(record["name"], record["on"], "process", record) for record in shadow.waiting if record["on"]]
    return found


def holders(shadow: Shadow, lock: str, node: str, request: int) -> list[str]:
    """Nodes that hold the lock for which `node` waits, as far as they or its service say.

    A grant of this very request does not count: it is on its way. Nor does one whose holder has let go.
    """
    known = shadow.lock(lock)
    granted = {
        cpu_node(grant["to"])
        for token, grant in known.granted.items()
        if token not in known.dropped and (cpu_node(grant["to"]), grant["request"]) != (node, request)
    }
    return sorted(known.held.keys() | granted)


def _update_waits(update: UpdateShadow) -> Iterator[Wait]:
    """CPUs in stop_machine wait for those that have not come; in the callback, for those that have not acknowledged
    the stage; after it, for those that are still inside. What they wait for stands between them as a node of its own.
    """
    begin, rank = update.begin, update.rank
    stop, stage = (f"{what} of update {begin['update']}" for what in ("stop_machine", f"stage {_stage(rank)}"))
    if update.late:
        yield from _together(stop, "stop", begin, update.came, update.late)
        return
    left = {
        node: ack for node, ack in update.waiting.items() if update.failed or ack["state"] == STAGES[LAST_STAGE]
    }
    at_stage = {node: ack for node, ack in update.waiting.items() if node not in left and ack["state"] == _stage(rank)}
    yield from _together(stage, "stage", update.advance or begin, at_stage, update.missing)
    yield from _together(stop, "stop", begin, left, sorted(update.came.keys() - left, key=node_order))


def _stage(rank: int) -> str:
    return STAGES[min(rank, LAST_STAGE)]


def _together(
    what: str, kind: str, since: Record, waiting: Mapping[str, Record], missing: Sequence[str]
) -> Iterator[Wait]:
    """Each of `waiting` waits for all that are `missing`."""
    if waiting:
        yield from (Wait(node, what, kind, record) for node, record in waiting.items())
        yield from (Wait(what, node, kind, since) for node in missing)


def leads_to(graph: Sequence[Wait], node: str) -> set[str]:
    """All that `node` waits for, through others too."""
    waits_for: dict[str, list[str]] = {}
    for wait in graph:
        waits_for.setdefault(wait.node, []).append(wait.on)
    return reach(waits_for, node)


def reach(steps: Mapping[str, Iterable[str]], node: str) -> set[str]:
    """The nodes to which steps lead from `node`, itself only if they come back to it."""
    found: set[str] = set()
    left = [node]
    while left:
        new = set(steps.get(left.pop(), ())) - found
        found |= new
        left += new
    return found


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
    if other.node != wait.on:
        return False
    match wait.kind:
        case "call":
            return other.kind == "process" or not other.record.get("irqs", 1)
        case "stage" | "stop":  # the stopper goes before a thread that sleeps for a lock
            return other.kind != "lock" or not other.record.get("irqs", 1)
    return True
