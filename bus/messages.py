"""Everything that may travel on the bus: one closed, tagged union, one encoder, one strict decoder.

A frame is a seal (`bus.seal`) and an `Envelope` around at most one body. An unknown tag, a wrong type or a frame that
is too long is refused by `decode`, whole. Who may send what is in `bus.admission`. New fields go last and have a
default; the type of a field never changes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from bus.clock import Clock
from bus.linkfaults import MAX_RULES, LinkRule

MAX_FRAME = 64 * 1024
"""Longest frame in bytes that an endpoint reads."""

MAX_MISSING = 128
"""Sequence numbers that one frame can report missing."""

Text = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
U8 = Annotated[int, Meta(ge=0, lt=256)]
U32 = Annotated[int, Meta(ge=0, lt=2**32)]
U64 = Annotated[int, Meta(ge=0)]
"""msgspec cannot bound by 2**64; msgpack itself holds no longer integer."""
CpuNumber = Annotated[int, Meta(ge=0, lt=4096)]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of every body."""


# Life of a process and of the machine


class Hello(Message, frozen=True, tag="hello"):
    """A process to the launcher: its endpoint is bound and its signal handlers are in place."""

    pid: U32


class Member(Message, frozen=True, tag="member"):
    """The launcher to all: this incarnation of a node is now `state`: online, offline or dead."""

    node: Name
    incarnation: U32
    state: Annotated[str, Meta(pattern=r"^(online|offline|dead)\Z")]


class Start(Message, frozen=True, tag="start"):
    """The launcher to the KVM process: every process is online, the machine may run."""


class Stop(Message, frozen=True, tag="stop"):
    """The launcher to a process: bring your work to an end, then say `Stopped` and leave."""


class Stopped(Message, frozen=True, tag="stopped"):
    """A process to the launcher: my work has ended, my records are written."""

    facts: dict[Name, int] = {}


class Progress(Message, frozen=True, tag="progress"):
    """The KVM process to the launcher: counts for the live display."""

    facts: dict[Name, int]


class Finished(Message, frozen=True, tag="finished"):
    """The KVM process to the launcher: the workload of the run is done."""


class Do(Message, frozen=True, tag="do"):
    """The launcher to the KVM process, as an operator types it: `what` is to be done, to `cpu` or with the file `path`.

    update: install the module image `path`, the worker on `cpu` if it is online; offline, online: take `cpu` out of or
    into the online mask; read: read `seamldr_version` on `cpu`.
    """

    request: U64
    what: Annotated[str, Meta(pattern=r"^(update|offline|online|read)\Z")]
    cpu: CpuNumber = 0
    path: Text = ""


class Done(Message, frozen=True, tag="done"):
    """The KVM process to the launcher: a `Do` has ended with `errno` (0 or negative)."""

    request: U64
    errno: int
    text: Text = ""


class Query(Message, frozen=True, tag="query"):
    """The launcher to a process: what do you wait for?"""


class Waits(Message, frozen=True, tag="waits"):
    """Answer to `Query`: a sentence, the node waited for if one is known, and operations done so far."""

    what: Text
    on: Text
    operations: U64


# Injected faults


class ArmFault(Message, frozen=True, tag="arm_fault"):
    """The launcher to a process: stand still when `point` is reached for the `nth` time, by `cpu` if it is not -1."""

    fault: U32
    point: Name
    nth: U32
    cpu: Annotated[int, Meta(ge=-1, lt=4096)] = -1


class FaultReached(Message, frozen=True, tag="fault_reached"):
    """A process to the launcher: the point of the fault is reached, I stand still; it concerns `cpu`, -1 for none."""

    fault: U32
    cpu: Annotated[int, Meta(ge=-1, lt=4096)] = -1


class Proceed(Message, frozen=True, tag="proceed"):
    """The launcher to a process: whatever the fault did is done, or the fault is taken back; go on."""

    fault: U32


class SetLinkFaults(Message, frozen=True, tag="set_link_faults"):
    """The launcher to a process: from now on these rules for the frames that leave you, and no others."""

    rules: Annotated[tuple[LinkRule, ...], Meta(max_length=MAX_RULES)]
    seed: U64


# What processors send each other


class Ipi(Message, frozen=True, tag="ipi"):
    """One interrupt message: a fixed vector sets its bit in the target's IRR, an NMI is latched."""

    vector: U8
    nmi: bool = False


class Ring(Message, frozen=True, tag="ring"):
    """A word that you sleep on was stored: look again."""

    word: U64


# The lock service


class LockAcquire(Message, frozen=True, tag="lock_acquire"):
    """A CPU asks for a lock. `level`: 0 task, 1 interrupt, 2 NMI; one CPU may wait at each."""

    lock: Name
    level: U8
    request: U64


class LockGrant(Message, frozen=True, tag="lock_grant"):
    """The service to a CPU: you hold it, under fencing token (epoch, number)."""

    lock: Name
    request: U64
    epoch: U32
    number: U64


class LockRelease(Message, frozen=True, tag="lock_release"):
    """The holder gives the lock back. A token that is not the holder's does nothing."""

    lock: Name
    epoch: U32
    number: U64


class LockClaim(Message, frozen=True, tag="lock_claim"):
    """A CPU to a lock service that has started again: I hold the lock under this token, or wait for it (token 0, 0).

    `clock` is the Lamport time of the request.
    """

    lock: Name
    level: U8
    request: U64
    clock: Clock
    epoch: U32 = 0
    number: U64 = 0


class ClaimsEnd(Message, frozen=True, tag="claims_end"):
    """A CPU to a lock service that has started again: that was all that I hold and wait for."""


class Fenced(Message, frozen=True, tag="fenced"):
    """The lock service to the launcher: this CPU called P-SEAMLDR under a lease that had ended; halt it."""

    cpu: CpuNumber


# SEAM

Registers = tuple[U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64]
"""rcx, rdx, r8 to r15, rbx, rdi, rsi: `struct tdx_module_args`."""


class Seamcall(Message, frozen=True, tag="seamcall"):
    """A CPU executes SEAMCALL; its own checks (VMX operation, CPL) have passed.

    `token` is the fencing token of seamldr_lock that this CPU holds, (0, 0) if it holds none.
    """

    call: U64
    rax: U64
    registers: Registers
    epoch: U32
    number: U64
    interrupts_on: bool


class SeamcallEvent(Message, frozen=True, tag="seamcall_event"):
    """An interrupt is pending at a CPU whose SEAMCALL runs a guest: leave the guest."""

    call: U64
    nmi: bool = False


class Seamret(Message, frozen=True, tag="seamret"):
    """The SEAM side to the CPU: entered and returned, or `entered` False for VMfailInvalid."""

    call: U64
    entered: bool
    rax: U64
    registers: Registers


# KVM, user space and the CPUs


class RunTask(Message, frozen=True, tag="run_task"):
    """Put a vCPU thread (its task number) on your run queue."""

    task: U32


class MoveTask(Message, frozen=True, tag="move_task"):
    """Take the task off your run queue at its next safe place and hand it to CPU `to`."""

    task: U32
    to: CpuNumber


class TaskMoved(Message, frozen=True, tag="task_moved"):
    """A CPU to the KVM process: the task left me for CPU `to`, or cannot move (`moved` False)."""

    task: U32
    to: CpuNumber
    moved: bool


class TaskEnded(Message, frozen=True, tag="task_ended"):
    """A CPU to the KVM process: this vCPU thread is over, for the reason given."""

    task: U32
    reason: Text


class StopTask(Message, frozen=True, tag="stop_task"):
    """End the task at its next safe place and destroy its vCPU."""

    task: U32


class ReadVersion(Message, frozen=True, tag="read_version"):
    """User space reads `seamldr_version` on this CPU; `buffer` is a free page for SEAMLDR_INFO."""

    request: U64
    buffer: U64


class InstallModule(Message, frozen=True, tag="install_module"):
    """User space uploaded a module image of `length` bytes into these pages; `params` is one for SEAMLDR_PARAMS."""

    request: U64
    length: U32
    pages: tuple[U64, ...]
    params: U64


class Hotplug(Message, frozen=True, tag="hotplug"):
    """User space writes to the `online` file of CPU `cpu`; a worker on the CPU that gets this takes it in or out."""

    request: U64
    cpu: CpuNumber
    online: bool


class Preempt(Message, frozen=True, tag="preempt"):
    """Something short runs on this CPU now: whatever vCPU is there is scheduled out and in again."""


class BuildTd(Message, frozen=True, tag="build_td"):
    """User space asks KVM for one step in the life of TD `td`, whose vCPU is `task`; `pages` are its buffers."""

    request: U64
    command: Annotated[str, Meta(pattern=r"^(init_vm|init_vcpu|init_mem_region|finalize_vm|run|destroy)\Z")]
    td: Annotated[int, Meta(ge=0, lt=128)]
    task: U32
    pages: tuple[U64, ...] = ()


class AdminDone(Message, frozen=True, tag="admin_done"):
    """A CPU to the KVM process: the request ended with `errno` (0 or negative) and this text."""

    request: U64
    errno: int
    text: Text


class Finish(Message, frozen=True, tag="finish"):
    """The launcher to the KVM process: bring the workload to its end now."""


Body = (
    Hello
    | Member
    | Start
    | Stop
    | Stopped
    | Progress
    | Finished
    | Do
    | Done
    | ArmFault
    | FaultReached
    | Proceed
    | SetLinkFaults
    | Query
    | Waits
    | Ipi
    | Ring
    | LockAcquire
    | LockGrant
    | LockRelease
    | LockClaim
    | ClaimsEnd
    | Fenced
    | Seamcall
    | SeamcallEvent
    | Seamret
    | RunTask
    | MoveTask
    | TaskMoved
    | TaskEnded
    | StopTask
    | ReadVersion
    | InstallModule
    | Hotplug
    | BuildTd
    | Preempt
    | AdminDone
    | Finish
)


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is in a frame. Sequence numbers belong to the pair of incarnations, not to a socket.

    `sequence` counts from 1; 0 means that the frame carries nothing but an acknowledgement. `acknowledged` is the
    highest sequence number up to which the sender has everything that the receiver sent to it; `missing` are numbers
    that it does not have although it has later ones, in a frame that carries no message.
    """

    source: Name
    source_incarnation: U32
    target: Name
    target_incarnation: U32
    sequence: U64
    acknowledged: U64
    clock: Clock
    body: Body | None = None
    missing: Annotated[tuple[U64, ...], Meta(max_length=MAX_MISSING)] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(envelope: Envelope) -> bytes:
    """The envelope as bytes."""
    return _encoder.encode(envelope)


def decode(content: bytes | memoryview) -> Envelope:
    """The envelope in `content`; raises `ValueError` on anything that is not exactly one, however deep it is nested."""
    if len(content) > MAX_FRAME:
        raise ValueError(f"{len(content)} bytes are more than {MAX_FRAME}")
    try:
        return _decoder.decode(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
