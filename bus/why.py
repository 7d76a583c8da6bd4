"""Why does it not move? What each process of a machine waits for, since when, and who waits for whom.

A pure core: records in causal order go in, with what the operating system says of the processes; `Why` comes out. It
works on a machine that runs as on one that has ended, since it needs nothing but what was written so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from bus.activities import Activities
from bus.records import Record
from bus.shadow import STAGES, Shadow, UpdateShadow, node_order
from bus.spec import KVM, SEAMLDR
from bus.waits import LAST_STAGE, Wait, cycle, holders, reach, waits
from bus.why_words import NO_ANSWER, UNABLE, LockState, Words


class Within(msgspec.Struct, frozen=True):
    """Something that a process is in the middle of, around what its row tells; times as in `Row`."""

    what: str
    since_s: float
    for_s: float


class Row(msgspec.Struct, frozen=True):
    """One process. `since_s` is in seconds since the machine began, `for_s` how long ago that was, `silent_s` how long
    ago its own work wrote a record; None where nothing is known. `on` are the nodes that it waits for; `said` is
    what it answered when its launcher asked it, in a machine that got stuck. Processes with the same `alike` do the
    same.
    """

    node: str
    pid: int
    state: str
    what: str
    alike: str
    on: tuple[str, ...]
    context: str
    since_s: float | None
    for_s: float | None
    silent_s: float | None
    within: tuple[Within, ...]
    said: str


class Edge(msgspec.Struct, frozen=True):
    """`node` waits for `on`, for the reason `what`. Either may be a stage of an update or a stop_machine."""

    node: str
    on: str
    kind: str
    what: str
    since_s: float
    for_s: float
    in_cycle: bool


class Root(msgspec.Struct, frozen=True):
    """Where waits lead to in the end: a process that waits for none, with its state, what it does, and who waits."""

    node: str
    state: str
    what: str
    waiting: tuple[str, ...]


class Progress(msgspec.Struct, frozen=True):
    """The update that is under way. `late` have not come to stop_machine, `missing` not acknowledged the stage."""

    update: int
    stage: str
    since_s: float
    for_s: float
    online: int
    failed: int
    late: tuple[str, ...]
    missing: tuple[str, ...]


class Lockup(msgspec.Struct, frozen=True):
    """A lockup that the watchdog reported and that is not over; `kind` is "soft_lockup" or "hard_lockup"."""

    kind: str
    node: str
    at_s: float
    text: str


class Why(msgspec.Struct, frozen=True):
    """The answer. `machine_s` is the time of the look in seconds since the machine began, `newest_s` the age of the
    newest record then. `ended` is why the machine ended: empty if in good order, None while it runs or if nobody knows.
    `cycle` are nodes that wait for each other, `behind_cycle` the processes that wait for these.
    """

    running: bool
    ended: str | None
    machine_s: float
    newest_s: float
    processes: tuple[Row, ...]
    graph: tuple[Edge, ...]
    cycle: tuple[str, ...]
    behind_cycle: tuple[str, ...]
    roots: tuple[Root, ...]
    locks: tuple[LockState, ...]
    update: Progress | None
    lockups: tuple[Lockup, ...]
    notes: tuple[str, ...]


class Inquiry:
    """Takes the records of a machine, then `conclude`s."""

    def __init__(self, machine: Record) -> None:
        self._machine = machine
        self._shadow = Shadow(machine.get("knobs") or {})
        self._did = Activities()
        self._online: dict[str, None] = {}
        self._strange: dict[str, None] = {}
        self._newest = self._begin = machine["ts"]
        self._now = 0
        self._graph: list[Wait] = []
        self._cycle: list[Wait] = []
        self._states: dict[str, str] = {}
        self._words: Words

    def see(self, record: Record) -> None:
        """The next record. One that is not as the event table says is passed over, with a note."""
        try:
            self._shadow.meet(record)
            self._shadow.apply(record)
            self._did.see(record)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"a {record['event']} record is not as the event table says: {error!r}"
            self._strange[f"{record['node']}: {what}"] = None
        self._newest = max(self._newest, record["ts"])
        if record["event"] == "process_online":
            self._online[record["name"]] = None

    @property
    def newest(self) -> int:
        """Time of the newest record, monotonic ns."""
        newest: int = self._newest
        return newest

    def pids(self) -> dict[str, int]:
        """The process that wrote the last record of each node."""
        return {node: record["pid"] for node, record in self._did.last.items()}

    def conclude(self, now: int, states: Mapping[str, str], running: bool, notes: Iterable[str] = ()) -> Why:
        """The answer as of `now`, monotonic ns. `states` is what the operating system says of the processes."""
        self._now = now
        locks = list(self._lock_states())
        nodes = sorted({*self._online, *self._did.last}, key=node_order)
        self._states = {node: self._state(node, states.get(node, "")) for node in nodes}
        self._graph = self._waits()
        self._cycle = cycle(self._graph)
        self._words = Words(self._shadow, self._did, locks, self._states)
        rows = {node: self._row(node) for node in nodes}
        return Why(
            running=running,
            ended=self._shadow.why_ended if self._shadow.ended else None,
            machine_s=self._at(now),
            newest_s=round((now - self._newest) / 1e9, 6),
            processes=tuple(rows.values()),
            graph=tuple(self._edge(wait) for wait in self._graph),
            cycle=tuple(wait.node for wait in self._cycle),
            behind_cycle=tuple(self._behind_cycle(rows)),
            roots=tuple(self._roots(rows)),
            locks=tuple(locks),
            update=self._progress(self._shadow.open_update()),
            lockups=tuple(
                Lockup(kind, node, self._at(record["ts"]), record["text"])
                for (kind, node), record in self._did.lockups.items()
            ),
            notes=(*notes, *self._strange),
        )

    # Time

    def _at(self, ts: int) -> float:
        begin: int = self._begin
        return round((ts - begin) / 1e9, 6)

    def _for(self, ts: int) -> float:
        return round((self._now - ts) / 1e9, 6)

    # The graph

    def _waits(self) -> list[Wait]:
        """All that the analyzer knows, and what only this question needs: waits for answers to requests, and for the
        seamldr process if it cannot serve.
        """
        shadow = self._shadow
        found = waits(shadow)
        known = {wait.node for wait in found if wait.kind != "process"}
        found = [wait for wait in found if wait.kind != "process" or wait.node not in known]
        if self._states.get(SEAMLDR) in UNABLE:
            for (node, lock, request), record in shadow.requests.items():
                if not holders(shadow, lock, node, request):
                    found.append(Wait(node, SEAMLDR, "lock", record))
            for node in self._did.last:
                found += [Wait(node, SEAMLDR, "seam", a.record) for a in self._did.open(node) if a.kind == "seam"]
        for record in self._did.requests.values():
            if record["cpu"] >= 0:
                found.append(Wait(KVM, f"cpu{record['cpu']}", "request", record))
        seen: dict[tuple[str, str, str], Wait] = {}
        for wait in found:
            seen.setdefault((wait.node, wait.on, wait.kind), wait)
        return list(seen.values())

    def _edge(self, wait: Wait) -> Edge:
        since, what = wait.record["ts"], _reason(wait)
        if wait.kind == "request":
            more = sum(record["cpu"] == wait.record["cpu"] for record in self._did.requests.values()) - 1
            what += f" and {more} more" if more else ""
        return Edge(wait.node, wait.on, wait.kind, what, self._at(since), self._for(since), wait in self._cycle)

    def _waiting_on(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for wait in self._graph:
            found.setdefault(wait.on, set()).add(wait.node)
        return found

    def _behind_cycle(self, rows: Mapping[str, Row]) -> list[str]:
        cycle, waiting_on = {wait.node for wait in self._cycle}, self._waiting_on()
        behind = {node for member in cycle for node in reach(waiting_on, member)}
        return sorted((behind - cycle) & rows.keys(), key=node_order)

    def _roots(self, rows: Mapping[str, Row]) -> Iterable[Root]:
        """For each node that waits for none, who waits for it, however far away; most waited for first."""
        waiting_on = self._waiting_on()
        blocked = {wait.node for wait in self._graph}
        found = []
        for root in waiting_on.keys() - blocked:
            row = rows.get(root)
            behind = sorted(reach(waiting_on, root) & rows.keys(), key=node_order)
            if row is not None and behind:
                found.append(Root(root, row.state, row.what, tuple(behind)))
        return sorted(found, key=lambda root: (-len(root.waiting), node_order(root.node)))

    # Processes

    def _state(self, node: str, said: str) -> str:
        """What the operating system says, and what only the records can tell."""
        record = self._did.standing.get(node)
        if node in self._shadow.gone:
            return "dead"
        if said == "stopped" or (not said and node in self._did.stopped):
            return "stopped"
        if record is not None and self._stands(node, record):
            return "stands still"
        if not said:
            answers = {wait["name"]: wait["what"] for wait in self._shadow.waiting}
            if answers.get(node) == NO_ANSWER:
                return "no answer"
            return "alive" if self._shadow.ended else "gone" if node in self._did.last else "unknown"
        return said

    def _stands(self, node: str, standing: Record) -> bool:
        """Whether the process has not gone on from a fault's point."""
        moved = self._did.moved.get(node)
        return moved is None or moved["ts"] < standing["ts"]

    def _row(self, node: str) -> Row:
        last, moved = self._did.last.get(node), self._did.moved.get(node)
        what, alike, since, context = self._words.doing(node)
        standing = self._did.standing.get(node)
        if standing is not None and self._stands(node, standing):
            what = f"{what}; stands still at the fault's point {standing['what']}"
        return Row(
            node=node,
            pid=last["pid"] if last is not None else 0,
            state=self._states[node],
            what=what,
            alike=alike or what,
            on=tuple(dict.fromkeys(wait.on for wait in self._graph if wait.node == node)),
            context=context,
            since_s=self._at(since["ts"]) if since is not None else None,
            for_s=self._for(since["ts"]) if since is not None else None,
            silent_s=self._for(moved["ts"]) if moved is not None else None,
            within=tuple(self._around(node)),
            said=next((_answer(record) for record in self._shadow.waiting if record["name"] == node), ""),
        )

    def _around(self, node: str) -> Iterable[Within]:
        """What is under way around that, the nearest first."""
        doing = self._did.open(node)
        top = next((activity for activity in reversed(doing) if activity.kind != "hold"), None)
        for activity in reversed(doing):
            if activity is not top:
                since = activity.record["ts"]
                yield Within(self._words.says(node, activity)[0], self._at(since), self._for(since))

    # Locks and the update

    def _lock_states(self) -> Iterable[LockState]:
        names = dict.fromkeys([*self._shadow.locks, *(lock for _, lock, _ in self._shadow.requests)])
        for name in names:
            known = self._shadow.lock(name)
            granted = [grant for token, grant in known.granted.items() if token not in known.dropped]
            hold = next(iter([*known.held.values(), *granted]), None)
            queue = [node for node, _ in self._did.queues.get(name, {})]
            asking = [node for node, lock, _ in self._shadow.requests if lock == name and node not in queue]
            waiting = (*queue, *sorted(asking, key=node_order))
            if hold is not None:
                holder = f"cpu{hold['to']}" if "to" in hold else hold["node"]
                token, ts = (hold["epoch"], hold["number"]), hold["ts"]
                yield LockState(name, holder, *token, self._at(ts), self._for(ts), waiting)
            elif waiting:
                yield LockState(name, "", 0, 0, None, None, waiting)

    def _progress(self, update: UpdateShadow | None) -> Progress | None:
        if update is None:
            return None
        since = (update.advance or update.begin)["ts"]
        return Progress(
            update=update.begin["update"],
            stage=STAGES[min(update.rank, LAST_STAGE)],
            since_s=self._at(since),
            for_s=self._for(since),
            online=update.size,
            failed=update.failed,
            late=tuple(update.late),
            missing=tuple(update.missing),
        )


def _answer(record: Record) -> str:
    return f"{record['what']}, after {record['operations']} operations"


def _reason(wait: Wait) -> str:
    record = wait.record
    match wait.kind:
        case "lock":
            return f"for {record['lock']}"
        case "call":
            return f"to run {record['func']}"
        case "seam":
            return f"to leave {record['name']}"
        case "request":
            return f"to answer request {record['request']} ({record['kind']})"
        case "stage":
            return "to be acknowledged by all" if wait.on.startswith("stage") else "to acknowledge it"
        case "stop":
            return "to be joined or left by all" if wait.on.startswith("stop") else "to join or leave it"
    return f'said "{record["what"]}"'
