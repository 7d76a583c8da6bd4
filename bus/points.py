"""Points of the work at which a fault can strike, and the watch for them in each process. A pure core.

A point is a record: the one that is written at that very moment, with the fields that make it this point. So kernel
code knows nothing of faults. A few moments have no record of their own at the default level; the process says them
aloud (`FaultPoints.see`) under a name with a star.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from bus.spec import SEAMLDR

CPU = "cpu"
CALL_FUNCTION_SINGLE = 0xFB
SEAMLDR_LOCK = "seamldr_lock"
SEAMLDR_INSTALL = 0x8000_0000_0000_0001

Fields = Mapping[str, Any]


class Point(msgspec.Struct, frozen=True):
    """A moment. `seen_by` is who can tell: the CPU itself, or the seamldr process about a CPU.

    `event` is the record, `where` are values that its fields have; a field in `subject` names the CPU. `p_seamldr`
    limits it to leaves of P-SEAMLDR (bit 63), `depth` to lock queues at least that long.
    """

    sentence: str
    event: str
    where: dict[str, Any] = {}
    seen_by: str = CPU
    subject: str = ""
    p_seamldr: bool = False
    depth: int = 0

    def matches(self, fields: Fields) -> bool:
        """Whether a record of this event is at this point."""
        return (
            all(fields.get(name) == value for name, value in self.where.items())
            and (not self.p_seamldr or bool(fields["leaf"] >> 63))
            and (not self.depth or fields["depth"] >= self.depth)
        )


_LOCK = {"lock": SEAMLDR_LOCK}

POINTS: dict[str, Point] = {
    "before-acquire": Point("seamldr_call begins; the lock is not asked for yet.", "strategy_begin"),
    "waiting": Point(
        "The CPU's request for seamldr_lock is in the queue behind another.",
        "lock_queue",
        _LOCK,
        SEAMLDR,
        "by",
        depth=2,
    ),
    "granted": Point(
        "The lock service grants seamldr_lock; the CPU has not heard of it.", "lock_grant", _LOCK, SEAMLDR, "to"
    ),
    "holding": Point("The CPU holds seamldr_lock; SEAMCALL is not executed yet.", "lock_hold", _LOCK),
    "resident": Point(
        "The CPU is inside P-SEAMLDR.", "seam_enter", {"admitted": 1}, SEAMLDR, "by", p_seamldr=True
    ),
    "mid-install": Point(
        "The CPU is inside SEAMLDR.INSTALL; nth = k is the kth LP of the update, the session is half open.",
        "seam_enter",
        {"admitted": 1, "leaf": SEAMLDR_INSTALL},
        SEAMLDR,
        "by",
    ),
    "after-seamret": Point(
        "P-SEAMLDR has returned; the strategy's repair has not begun.", "seamcall_return", p_seamldr=True
    ),
    "before-release": Point("seamldr_lock is about to be given back.", "lock_drop", _LOCK),
    "update-shutdown": Point("The CPU enters the stage SHUTDOWN of an update.", "state_enter", {"state": "SHUTDOWN"}),
    "between-shutdown-and-update": Point(
        "The old module is shut down, RUN_UPDATE has not begun: the CPU enters the stage CPU_INSTALL.",
        "state_enter",
        {"state": "CPU_INSTALL"},
    ),
    "update-init": Point("The CPU enters the stage CPU_INIT of an update.", "state_enter", {"state": "CPU_INIT"}),
    "run-update": Point("The CPU enters the stage RUN_UPDATE.", "state_enter", {"state": "RUN_UPDATE"}),
    "ipi-pending": Point(
        "A cross-call's IPI (a VMCLEAR, mostly) is pending here and not taken yet.",
        "ipi_deliver",
        {"vector": CALL_FUNCTION_SINGLE, "nmi": 0},
    ),
    "ipi-answer": Point(
        "A VMCLEAR for another CPU has run here; the caller has no answer yet.",
        "csd_run",
        {"func": "__loaded_vmcs_clear"},
    ),
    "migration": Point("A VMCS was cleared elsewhere and is not loaded here yet.", "list_add"),
    "in-guest": Point("A plain guest runs on the CPU.", "*guest"),
    "td-build": Point(
        "A TD is being built: its first pages are about to be added and measured.",
        "admin_begin",
        {"kind": "td_init_mem_region"},
    ),
    "in-td": Point("A TD runs on the CPU: it is inside the TDX module.", "*td", {}, SEAMLDR, "by"),
}


class Armed(msgspec.Struct):
    """An order to stand still at a point: how often it is still to be reached."""

    fault: int
    point: Point
    cpu: int
    left: int


class Reached(msgspec.Struct, frozen=True):
    """A point was reached for the nth time; it concerns `cpu`, -1 for none."""

    fault: int
    cpu: int


class FaultPoints:
    """The points that one process watches for; `own` is its CPU number, -1 if it is no CPU.

    `on_due`, if set, is called when a point is reached: `due` says which.
    """

    def __init__(self, own: int) -> None:
        self.own = own
        self.due: Reached | None = None
        self.on_due: Callable[[], None] | None = None
        self._armed: dict[str, list[Armed]] = {}

    def arm(self, fault: int, point: str, nth: int, cpu: int) -> bool:
        """Watch for it; False if there is no such point."""
        if point not in POINTS:
            return False
        armed = Armed(fault, POINTS[point], cpu, nth)
        self._armed.setdefault(armed.point.event, []).append(armed)
        return True

    def disarm(self, fault: int) -> None:
        """Watch for it no longer."""
        for event, armed in list(self._armed.items()):
            rest = [one for one in armed if one.fault != fault]
            if rest:
                self._armed[event] = rest
            else:
                del self._armed[event]
        if self.due is not None and self.due.fault == fault:
            self.due = None

    @property
    def any(self) -> bool:
        """Whether anything is watched for."""
        return bool(self._armed)

    def see(self, event: str, fields: Fields) -> None:
        """A record is written. One point at a time: a second one that is reached meanwhile counts from then on."""
        if self.due is not None:
            return
        for armed in self._armed.get(event, ()):
            cpu = int(fields[armed.point.subject]) if armed.point.subject else self.own
            if armed.cpu in (-1, cpu) and armed.point.matches(fields):
                armed.left -= 1
                if armed.left <= 0:
                    self.disarm(armed.fault)
                    self.due = Reached(armed.fault, cpu)
                    if self.on_due is not None:
                        self.on_due()
                    return
