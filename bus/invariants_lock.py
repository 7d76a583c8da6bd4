"""Invariants about P-SEAMLDR and locks: I19, I20, I21, I24, I50, I57, I60.

What the lock service and the SEAM side decide is judged by their own records in their own order.
"""

from __future__ import annotations

from bus.invariant import EXPLAINED_BY_DEATH, Invariant
from bus.records import Record
from bus.shadow import P_SEAMLDR, Shadow, cpu_node
from bus.spec import SEAMLDR
from bus.waits import Ending, holders

SEAMLDR_LOCK = "seamldr_lock"


class OneInside(Invariant):
    """Counted from the records of the SEAM side, and compared with its own count."""

    id = "I19"
    slug = "one-in-seamldr"
    sentence = "At most one CPU is inside P-SEAMLDR."
    source = "TDX CPU Architectural Extensions, SEAMCALL: P_SEAMLDR_MUTEX"
    broken_by = "a processor whose mutex does not work"

    def __init__(self) -> None:
        super().__init__()
        self._inside: dict[str, Record] = {}

    def on_seam_enter(self, record: Record, shadow: Shadow) -> None:
        if not record["leaf"] & P_SEAMLDR or not record["admitted"]:
            return
        by = cpu_node(record["by"])
        others = [enter for node, enter in self._inside.items() if node != by]
        if others or record["inside"] > 1:
            self.violated(
                f"{by} entered P-SEAMLDR while another CPU was inside",
                ("inside", others[0] if others else None),
                ("second", record),
            )
        self._inside[by] = record

    def on_seam_return(self, record: Record, shadow: Shadow) -> None:
        if record["leaf"] & P_SEAMLDR:
            self._inside.pop(cpu_node(record["by"]), None)

    def on_seam_dead(self, record: Record, shadow: Shadow) -> None:
        self._inside.pop(cpu_node(record["by"]), None)

    def on_service_restart(self, record: Record, shadow: Shadow) -> None:
        """SEAM goes on as it was; a return that its old process did not live to write shows in who is inside."""
        inside = cpu_node(record["inside"])
        self._inside = {node: enter for node, enter in self._inside.items() if node == inside}
        if record["inside"] >= 0:
            self._inside.setdefault(inside, record)


class HolderCalls(Invariant):
    """Two halves: grants against releases, and the token of each call against that of the holder.

    A holder loses the lock only by a release, by its death, or by the end of a lease, and that not while it is in
    P-SEAMLDR. After a restart of the service the CPUs say who holds it, and they name one.
    """

    id = "I20"
    slug = "calls-by-holder"
    sentence = "At most one CPU holds seamldr_lock, and every P-SEAMLDR call is made by its holder."
    source = "kernel seamldr_call(): raw_spin_lock(&seamldr_lock)"
    broken_by = "a strategy that calls without the lock; a lock service that grants twice"

    def __init__(self) -> None:
        super().__init__()
        self._inside: dict[str, Record] = {}
        self._expired: set[tuple[int, int]] = set()
        self._claimed: Record | None = None

    def on_service_restart(self, record: Record, shadow: Shadow) -> None:
        self._claimed = None
        inside = cpu_node(record["inside"])
        self._inside = {node: enter for node, enter in self._inside.items() if node == inside}

    def on_lock_claim(self, record: Record, shadow: Shadow) -> None:
        token = (record["epoch"], record["number"])
        if record["lock"] != SEAMLDR_LOCK or token == (0, 0) or token in self._expired:
            return
        if self._claimed is not None:
            self.violated(
                f"{cpu_node(self._claimed['by'])} and {cpu_node(record['by'])} both hold seamldr_lock",
                ("holder", self._claimed),
                ("second", record),
            )
        self._claimed = record

    def on_lock_expire(self, record: Record, shadow: Shadow) -> None:
        self._expired.add((record["epoch"], record["number"]))
        by = cpu_node(record["by"])
        if record["lock"] == SEAMLDR_LOCK and by in self._inside:
            self.violated(
                f"{by} lost seamldr_lock while it was in P-SEAMLDR", ("inside", self._inside[by]), ("lost", record)
            )

    def on_seam_return(self, record: Record, shadow: Shadow) -> None:
        self._inside.pop(cpu_node(record["by"]), None)

    on_seam_dead = on_seam_return

    def on_lock_grant(self, record: Record, shadow: Shadow) -> None:
        granted = shadow.lock(record["lock"]).granted
        if record["lock"] == SEAMLDR_LOCK and (granted or record.get("holders", 1) > 1):
            self.violated(
                f"seamldr_lock was granted to {cpu_node(record['to'])} while it was held",
                ("holder", next(iter(granted.values()), None)),
                ("second", record),
            )

    on_lock_restore = on_lock_grant

    def on_seam_enter(self, record: Record, shadow: Shadow) -> None:
        token = (record["epoch"], record["number"])
        holder = (record["holder_epoch"], record["holder_number"])
        if not record["leaf"] & P_SEAMLDR:
            return
        if record["admitted"]:
            self._inside[cpu_node(record["by"])] = record
        if token == (0, 0) or token != holder:
            self.violated(
                f"{cpu_node(record['by'])} called P-SEAMLDR without holding seamldr_lock",
                ("holder", next(iter(shadow.lock(SEAMLDR_LOCK).granted.values()), None)),
                ("strategy", shadow.cpu(cpu_node(record["by"])).begun),
                ("caller", record),
            )


class NeverBusy(Invariant):
    """Judged on the SEAM side, which knows whether P-SEAMLDR is there at all."""

    id = "I21"
    slug = "never-busy"
    sentence = "No P-SEAMLDR call gets VMfailInvalid while P-SEAMLDR is loaded and alive."
    source = "TDX CPU Architectural Extensions, SEAMCALL: failure to take P_SEAMLDR_MUTEX"
    broken_by = "two callers at once"

    def __init__(self) -> None:
        super().__init__()
        self._inside: Record | None = None

    def on_seam_enter(self, record: Record, shadow: Shadow) -> None:
        if not record["leaf"] & P_SEAMLDR:
            return
        if record["admitted"]:
            self._inside = record
        elif record["alive"]:
            self.violated(
                f"{cpu_node(record['by'])} found P-SEAMLDR busy and got VMfailInvalid",
                ("inside", self._inside),
                ("refused", record),
            )


class FirstComeFirstServed(Invariant):
    """Order of first receipt within one incarnation of the service.

    Those who waited when it was started again queue first, by the Lamport time of their requests, then by CPU.
    """

    id = "I24"
    slug = "fifo-lock"
    sentence = "A lock is granted in the order in which it was asked for."
    source = "kernel queued spinlock: MCS queue"
    broken_by = "an unfair lock service"

    def __init__(self) -> None:
        super().__init__()
        self._queues: dict[str, dict[tuple[str, int], Record]] = {}
        self._claims: dict[str, dict[tuple[str, int], Record]] = {}

    def on_service_restart(self, record: Record, shadow: Shadow) -> None:
        self._queues.clear()
        self._claims.clear()

    def on_lock_claim(self, record: Record, shadow: Shadow) -> None:
        if record["epoch"] == 0:
            key = (cpu_node(record["by"]), record["request"])
            self._claims.setdefault(record["lock"], {})[key] = record

    def on_lock_queue(self, record: Record, shadow: Shadow) -> None:
        lock, key = record["lock"], (cpu_node(record["by"]), record["request"])
        claims = self._claims.get(lock)
        if claims:
            first = min(claims, key=lambda claim: (claims[claim]["asked"], claims[claim]["by"]))
            if first != key:
                self.violated(
                    f"{first[0]} asked for {lock} first, and {key[0]} queued again before it",
                    ("first", claims[first]),
                    ("queued", record),
                )
            claims.pop(key, None)
        self._queues.setdefault(lock, {}).setdefault(key, record)

    def on_lock_grant(self, record: Record, shadow: Shadow) -> None:
        queue = self._queues.setdefault(record["lock"], {})
        key = (cpu_node(record["to"]), record["request"])
        first = next(iter(queue), None)
        if first != key:
            self.violated(
                f"{record['lock']} was granted to {key[0]} before its turn",
                ("first", queue[first] if first is not None else None),
                ("asked", queue.get(key)),
                ("granted", record),
            )
        queue.pop(key, None)

    def on_lock_withdraw(self, record: Record, shadow: Shadow) -> None:
        self._queues.get(record["lock"], {}).pop((cpu_node(record["by"]), record["request"]), None)


class TokensGrow(Invariant):
    """Per lock, over all incarnations of its service. A holder is restored under the last token, never an older one."""

    id = "I57"
    slug = "tokens-grow"
    sentence = "The fencing tokens (epoch, number) of the grants of a lock strictly increase."
    source = "definition of a fencing token"
    broken_by = "a lock service that forgets its epoch when it is restarted"

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, Record] = {}

    def on_lock_grant(self, record: Record, shadow: Shadow) -> None:
        last = self._last.get(record["lock"])
        if last is not None and (record["epoch"], record["number"]) <= (last["epoch"], last["number"]):
            self.violated(
                f"token ({record['epoch']}, {record['number']}) of {record['lock']} does not follow "
                f"({last['epoch']}, {last['number']})",
                ("before", last),
                ("then", record),
            )
        else:
            self._last[record["lock"]] = record

    def on_lock_restore(self, record: Record, shadow: Shadow) -> None:
        last = self._last.get(record["lock"])
        if last is None or (record["epoch"], record["number"]) != (last["epoch"], last["number"]):
            self.violated(
                f"{cpu_node(record['to'])} holds {record['lock']} again under token ({record['epoch']}, "
                f"{record['number']}), which is not the last",
                ("last", last),
                ("restored", record),
            )


class RequestsGranted(Invariant):
    """Judged when the history is over, by what can still move. A dead holder is an excuse if the policy is to hang."""

    id = "I50"
    slug = "lock-granted"
    sentence = "Every request of a live CPU for a lock is granted, if holders are live."
    source = "liveness of a fair lock; hazards: a holder that waits for its waiter, an owner in the interrupted context"
    broken_by = "a lock taken twice by one CPU; a cross-call under the lock; a lost grant"
    consequence_of = ("I25",)

    def at_end(self, ending: Ending) -> None:
        shadow = ending.shadow
        for (node, lock, request), record in shadow.requests.items():
            holding = holders(shadow, lock, node, request)
            needed = [node, SEAMLDR, *(holding if shadow.hangs else ())]
            dead = [name for name in needed if name in shadow.gone]
            if dead:
                self.excused.append(f"{node} waits for {lock}, {dead[0]} is dead: {EXPLAINED_BY_DEATH[self.id]}")
            elif shadow.finished or ending.is_stuck(record):
                by = f", held by {holding[0]}" if holding else ""
                held = shadow.lock(lock).held.get(holding[0]) if holding else None
                self.violated(f"{node} never gets {lock}{by}", ("holds", held), ("waits", record), *ending.parts)
            else:
                self.suspects.append(f"{node} was waiting for {lock} when the run was cut")


class ContractKept(Invariant):
    """A strategy is user code: it may raise, return nonsense, or wait for ever."""

    id = "I60"
    slug = "strategy-contract"
    sentence = "The strategy keeps its contract: it returns an errno, leaves the lock free and raises nothing."
    source = "kernel seamldr_call()"
    broken_by = "a mistake in a strategy"

    def on_strategy_error(self, record: Record, shadow: Shadow) -> None:
        where = f" at {record['where']}" if record["where"] else ""
        self.violated(f"the strategy {record['error']}{where}", ("strategy", record))


LOCK_INVARIANTS: tuple[type[Invariant], ...] = (
    OneInside,
    HolderCalls,
    NeverBusy,
    FirstComeFirstServed,
    RequestsGranted,
    TokensGrow,
    ContractKept,
)
