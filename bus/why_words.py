"""What `bus.why` says of one process: the words for what it waits for or does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from bus.activities import Activities, Activity
from bus.records import Record
from bus.shadow import P_SEAMLDR, STAGES, Shadow, node_order
from bus.spec import KVM, LAUNCHER, SEAMLDR
from bus.waits import LAST_STAGE, holders

NO_ANSWER = "does not answer"
"""What the launcher writes of a process that did not say what it waits for."""

UNABLE = ("dead", "gone", "stopped", "stands still", "no answer")
"""States of a process for which there is no use to wait."""


class LockState(msgspec.Struct, frozen=True):
    """A lock that is held or asked for. `queue` is in the order of the lock service."""

    lock: str
    holder: str
    epoch: int
    number: int
    since_s: float | None
    for_s: float | None
    queue: tuple[str, ...]


class Words:
    """`states` are those of the processes."""

    def __init__(
        self, shadow: Shadow, did: Activities, locks: Sequence[LockState], states: Mapping[str, str]
    ) -> None:
        self._shadow = shadow
        self._did = did
        self._locks = {lock.lock: lock for lock in locks}
        self._states = states

    def doing(self, node: str) -> tuple[str, str, Record | None, str]:
        """What the process waits for or does, the same without its own names, since which record, and in which
        context.
        """
        if node == LAUNCHER:
            return "has ended the run" if self._shadow.ended else "waits for the workload to end", "", None, ""
        if node == KVM:
            return self._asks(), "", min(self._did.requests.values(), key=_time, default=None), ""
        if node == SEAMLDR:
            return self._serves(), "", None, ""
        doing = [activity for activity in self._did.open(node) if activity.kind != "hold"]
        if doing:
            what, alike = self.says(node, doing[-1])
            record = doing[-1].record
            return what, alike, record, record.get("ctx", "")
        last = self._did.last.get(node)
        if last is not None and last.get("ctx", "").startswith("td"):
            return f"ran {last['ctx']} last", "ran a TD last", last, last["ctx"]
        return "idle: nothing is under way", "", last, "idle"

    def _asks(self) -> str:
        asked = [f"{r['request']} ({r['kind']}, cpu{r['cpu']})" for r in self._did.requests.values()]
        if not asked:
            return "no request of user space is open"
        more = f" and {len(asked) - 3} more" if len(asked) > 3 else ""
        return f"waits for answers to requests {', '.join(asked[:3])}{more}"

    def _serves(self) -> str:
        inside = [
            f"{node} is in SEAM ({activity.record['name']})"
            for node in sorted(self._did.last, key=node_order)
            for activity in self._did.open(node)
            if activity.kind == "seam"
        ]
        held = [f"{lock.lock} is held by {lock.holder}" for lock in self._locks.values() if lock.holder]
        return "serves: " + ("; ".join([*held[:3], *inside[:3]]) or "no lock is held, nobody is in SEAM")

    def says(self, node: str, activity: Activity) -> tuple[str, str]:
        """What an activity is, and the same without names of its own."""
        record = activity.record
        off = "" if record.get("irqs", 1) else ", interrupts off"
        match activity.kind:
            case "lock":
                return f"waits for {record['lock']}{self._held_by(node, record)}{off}", ""
            case "call":
                return f"waits for cpu{record['target']} to run {record['func']}{off}", ""
            case "hold":
                return f"holds {record['lock']}, token {record['epoch']}.{record['number']}", f"holds {record['lock']}"
            case "seam":
                where = "P-SEAMLDR" if record["leaf"] & P_SEAMLDR else "the TDX module"
                return f"in {where}: {record['name']}", ""
            case "stage":
                return f"works at stage {record['state']} of update {record['update']}", ""
            case "acked":
                return self._acknowledged(record), ""
            case "stop":
                return self._in_stop_machine(), ""
            case "strategy":
                what = f"in seamldr_call({record['name']})"
                return f"{what}, in {record.get('ctx')}", what
            case "request":
                doing = f"serves request {record['request']} ({record['kind']})"
                return f"{doing} in {record.get('ctx')}", f"serves a request ({record['kind']})"
            case "update":
                return f"runs update {record['update']}", ""
            case "irq":
                return f"handles interrupt {record['vector']:#x}", ""
            case "nmi":
                return "handles an NMI", ""
            case "offline":
                return "is offline", ""
        return _vcpu(activity)

    def _held_by(self, node: str, request: Record) -> str:
        shadow, lock = self._shadow, request["lock"]
        for holder in holders(shadow, lock, node, request["request"]):
            state = self._locks[lock]
            who = "itself" if holder == node else holder + _alas(self._states.get(holder, ""))
            return f", held by {who} under token {state.epoch}.{state.number} for {_seconds(state.for_s)}"
        known = shadow.lock(lock)
        for token, grant in known.granted.items():
            if (f"cpu{grant['to']}", grant["request"]) == (node, request["request"]):
                return ", which is granted and on its way"
            if token in known.dropped:
                return f", given back by cpu{grant['to']}: its service has to take it"
        return ", which nobody holds: its service has to answer"

    def _acknowledged(self, ack: Record) -> str:
        update = self._shadow.open_update()
        did = f"has acknowledged {ack['state']} of update {ack['update']}"
        if update is None or update.failed or ack["state"] == STAGES[LAST_STAGE]:
            return f"{did}, leaves the callback"
        return f"{did}, waits for {_some(update.missing)}" if update.missing else did

    def _in_stop_machine(self) -> str:
        update = self._shadow.open_update()
        late = update.late if update is not None else []
        return f"in stop_machine, waits for {_some(late)} to come" if late else "in stop_machine"


def _time(record: Record) -> int:
    ts: int = record["ts"]
    return ts


def _vcpu(activity: Activity) -> tuple[str, str]:
    vcpu = f"vcpu{activity.record['vcpu']}"
    if activity.entered:
        return f"runs {vcpu}: in guest mode, or between two entries", "runs a vCPU"
    return f"{vcpu} is loaded, not entered yet", "a vCPU is loaded"


def _alas(state: str) -> str:
    return f" ({state})" if state in UNABLE else ""


def _some(nodes: list[str]) -> str:
    return ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")


def _seconds(seconds: float | None) -> str:
    return f"{seconds or 0:.1f} s"
