"""Who may send what to whom, and about which things: asked about every message before its link takes it in. Pure.

The key says that a frame comes from a process of this run, its name which one that claims to be. What that one has not
to send, to such a receiver, is a bug or an attack; so is what speaks of a CPU, a task or a page that the machine has
not. Either is refused whole: its number stays free for the message that the link is waiting for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bus.link import Refusal
from bus.memory import PAGE_SIZE
from bus.messages import (
    AdminDone,
    ArmFault,
    Body,
    BuildTd,
    ClaimsEnd,
    Do,
    Done,
    FaultReached,
    Fenced,
    Finish,
    Finished,
    Hello,
    Hotplug,
    InstallModule,
    Ipi,
    LockAcquire,
    LockClaim,
    LockGrant,
    LockRelease,
    Member,
    Message,
    MoveTask,
    Preempt,
    Proceed,
    Progress,
    Query,
    ReadVersion,
    Ring,
    RunTask,
    Seamcall,
    SeamcallEvent,
    Seamret,
    SetLinkFaults,
    Start,
    Stop,
    Stopped,
    StopTask,
    TaskEnded,
    TaskMoved,
    Waits,
)
from bus.spec import KVM, LAUNCHER, SEAMLDR, MachineSpec, cpu_number

CPU = "cpu"
"""The role of every CPU; the others have their node's name."""

Roles = frozenset[str]

_LAUNCHER, _SEAMLDR, _KVM, _CPU = frozenset([LAUNCHER]), frozenset([SEAMLDR]), frozenset([KVM]), frozenset([CPU])
_OTHERS = _SEAMLDR | _KVM | _CPU

MAY_SEND: dict[type[Message], tuple[Roles, Roles]] = {
    Hello: (_OTHERS, _LAUNCHER),
    Member: (_LAUNCHER, _OTHERS),
    Start: (_LAUNCHER, _KVM),
    Stop: (_LAUNCHER, _OTHERS),
    Stopped: (_OTHERS, _LAUNCHER),
    Progress: (_KVM, _LAUNCHER),
    Finished: (_KVM, _LAUNCHER),
    Do: (_LAUNCHER, _KVM),
    Done: (_KVM, _LAUNCHER),
    Query: (_LAUNCHER, _OTHERS),
    Waits: (_OTHERS, _LAUNCHER),
    ArmFault: (_LAUNCHER, _OTHERS),
    FaultReached: (_OTHERS, _LAUNCHER),
    Proceed: (_LAUNCHER, _OTHERS),
    SetLinkFaults: (_LAUNCHER, _OTHERS),
    Ipi: (_CPU, _CPU),
    Ring: (_CPU | _LAUNCHER, _CPU),
    LockAcquire: (_CPU, _SEAMLDR),
    LockGrant: (_SEAMLDR, _CPU),
    LockRelease: (_CPU, _SEAMLDR),
    LockClaim: (_CPU, _SEAMLDR),
    ClaimsEnd: (_CPU, _SEAMLDR),
    Fenced: (_SEAMLDR, _LAUNCHER),
    Seamcall: (_CPU, _SEAMLDR),
    SeamcallEvent: (_CPU, _SEAMLDR),
    Seamret: (_SEAMLDR, _CPU),
    RunTask: (_KVM | _CPU, _CPU),
    MoveTask: (_KVM, _CPU),
    TaskMoved: (_CPU, _KVM),
    TaskEnded: (_CPU, _KVM),
    StopTask: (_KVM, _CPU),
    ReadVersion: (_KVM, _CPU),
    InstallModule: (_KVM, _CPU),
    Hotplug: (_KVM, _CPU),
    Preempt: (_KVM, _CPU),
    BuildTd: (_KVM, _CPU),
    AdminDone: (_CPU, _KVM),
    Finish: (_LAUNCHER, _KVM),
}
"""Senders and receivers of each kind of message."""

LEVELS = 3
"""Contexts of a CPU that may ask for a lock: task, interrupt, NMI."""

MAX_ERRNO = 4095


def role_of(node: str) -> str:
    """ "cpu" for every CPU, else the node's name."""
    return CPU if cpu_number(node) is not None else node


class Admission:
    """What the process `own` of a machine takes from others."""

    def __init__(self, spec: MachineSpec, own: str) -> None:
        self._role = role_of(own)
        self._kinds: dict[str, frozenset[type[Message]]] = {}
        self._cpus = spec.cpus
        self._tds = spec.tds
        self._vcpus = spec.vcpus
        self._buffers = range(*spec.buffers, PAGE_SIZE)
        self._nodes = frozenset(spec.nodes())
        self._checks: dict[type[Message], Callable[[Any], bool]] = {
            Member: self._has_node,
            Do: self._has_cpu,
            Done: _is_errno,
            ArmFault: self._has_cpu,
            FaultReached: self._has_cpu,
            Fenced: self._has_cpu,
            LockAcquire: _is_level,
            LockClaim: _is_level,
            RunTask: self._has_task,
            MoveTask: self._has_task_and_target,
            TaskMoved: self._has_task_and_target,
            TaskEnded: self._has_task,
            StopTask: self._has_task,
            ReadVersion: self._has_buffer,
            InstallModule: self._has_image,
            Hotplug: self._has_cpu,
            BuildTd: self._has_td,
            AdminDone: _is_errno,
        }

    def __call__(self, source: str, body: Body) -> Refusal | None:
        """Why the message is refused, or None: it may come from `source`, and the machine has what it is about."""
        kind = type(body)
        if source not in self._kinds:
            self._kinds[source] = self._kinds_of(role_of(source))
        if kind not in self._kinds[source]:
            return Refusal.FORBIDDEN
        check = self._checks.get(kind)
        return None if check is None or check(body) else Refusal.IMPOSSIBLE

    def _kinds_of(self, role: str) -> frozenset[type[Message]]:
        return frozenset(kind for kind, (by, to) in MAY_SEND.items() if role in by and self._role in to)

    def _has_node(self, body: Member) -> bool:
        return body.node in self._nodes

    def _has_cpu(self, body: Do | ArmFault | FaultReached | Fenced | Hotplug) -> bool:
        return body.cpu < self._cpus

    def _has_task(self, body: RunTask | MoveTask | TaskMoved | TaskEnded | StopTask) -> bool:
        return body.task < self._vcpus + self._tds

    def _has_task_and_target(self, body: MoveTask | TaskMoved) -> bool:
        return self._has_task(body) and body.to < self._cpus

    def _has_buffer(self, body: ReadVersion) -> bool:
        return body.buffer in self._buffers

    def _has_image(self, body: InstallModule) -> bool:
        return bool(body.pages) and body.params in self._buffers and all(page in self._buffers for page in body.pages)

    def _has_td(self, body: BuildTd) -> bool:
        """TDs that user space builds come after those that firmware built."""
        known = body.td >= self._tds and body.task == self._vcpus + body.td
        return known and all(page in self._buffers for page in body.pages)


def _is_errno(body: Done | AdminDone) -> bool:
    return -MAX_ERRNO <= body.errno <= 0


def _is_level(body: LockAcquire | LockClaim) -> bool:
    return body.level < LEVELS
