"""Frames that no process of a machine should take in, each with the reason for which it is refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import msgspec

from bus.admission import MAX_ERRNO, MAY_SEND, role_of
from bus.link import Refusal
from bus.messages import (
    MAX_FRAME,
    AdminDone,
    ArmFault,
    Body,
    BuildTd,
    Do,
    Done,
    Envelope,
    FaultReached,
    Fenced,
    Hotplug,
    InstallModule,
    LockAcquire,
    LockClaim,
    Member,
    Message,
    MoveTask,
    Query,
    ReadVersion,
    RunTask,
    StopTask,
    TaskEnded,
    TaskMoved,
    Waits,
    encode,
)
from bus.seal import SEAL_SIZE, Seal
from bus.spec import KVM, LAUNCHER, SEAMLDR, MachineSpec

REPLAY = "replay"
"""Kind of the frames that are no refusal: real ones that come again, which links drop as duplicates."""

HUGE_EVERY = 1000
"""One frame in so many is longer than any may be."""

LONGEST = 4 << 20


class Frames:
    """Hostile frames for the process `target`, by a seed. `real` are frames with messages that it has taken before.

    `expected` counts what became of those made so far, by `Refusal` or as REPLAY.
    """

    def __init__(self, spec: MachineSpec, target: str, real: list[bytes], seed: int) -> None:
        self.spec = spec
        self.target = target
        self.real = real
        self.expected: Counter[str] = Counter()
        self._rng = random.Random(f"{seed} {target}")
        self._seal = Seal(spec.key)
        self._sources = [node for node in (LAUNCHER, SEAMLDR, KVM, "cpu1") if node != target]
        self._allowed: Body = Waits("", "", 0) if target == LAUNCHER else Query()
        self._peer = KVM if target == LAUNCHER else LAUNCHER
        self._forbidden = [
            (source, kind)
            for source in self._sources
            for kind, (by, to) in MAY_SEND.items()
            if role_of(source) not in by or role_of(target) not in to
        ]
        self._impossible = _impossible(spec, target)
        self._kinds: list[Callable[[], tuple[str, bytes]]] = [
            self._noise, self._flipped, self._cut, self._spliced, self._foreign, self._shape, self._sealed_shape,
            self._misaddressed, self._unknown, self._inconsistent, self._bad_body, self._bad_body, self._replay,
        ]  # fmt: skip

    def make(self) -> bytes:
        """The next one."""
        rng = self._rng
        kind, frame = self._huge() if rng.randrange(HUGE_EVERY) == 0 else rng.choice(self._kinds)()
        self.expected[kind] += 1
        return frame

    def last(self) -> bytes:
        """One of a kind that `make` makes none of: when it is on record, all before it have been read."""
        self.expected[Refusal.STALE_INCARNATION] += 1
        return self._sealed(self._allowed, source_incarnation=0)

    # Without the key

    def _noise(self) -> tuple[str, bytes]:
        return Refusal.STRANGER, self._rng.randbytes(self._rng.randrange(300))

    def _flipped(self) -> tuple[str, bytes]:
        frame = bytearray(self._rng.choice(self.real))
        for bit in self._rng.sample(range(8 * len(frame)), self._rng.randint(1, 4)):
            frame[bit // 8] ^= 1 << bit % 8
        return Refusal.STRANGER, bytes(frame)

    def _cut(self) -> tuple[str, bytes]:
        frame = self._rng.choice(self.real)
        return Refusal.STRANGER, frame[: self._rng.randrange(len(frame))]

    def _spliced(self) -> tuple[str, bytes]:
        one, other = self._rng.choice(self.real), self._rng.choice(self.real)
        at = self._rng.randrange(1, len(one))
        spliced = one[:at] + other[at:]
        return Refusal.STRANGER, spliced + b"\0" if spliced in (one, other) else spliced

    def _foreign(self) -> tuple[str, bytes]:
        return Refusal.STRANGER, Seal(self._rng.randbytes(16)).close(self._rng.choice(self.real)[SEAL_SIZE:])

    def _shape(self) -> tuple[str, bytes]:
        return Refusal.STRANGER, _shape(self._rng)

    def _huge(self) -> tuple[str, bytes]:
        return Refusal.OVERSIZED, bytes(self._rng.choice((MAX_FRAME + 1, 1 << 20, LONGEST)))

    # With the key

    def _sealed(self, allowed: Body, /, **changes: Any) -> bytes:
        good = Envelope(self._peer, 1, self.target, 1, 1, 0, self._rng.getrandbits(48), allowed)
        return self._seal.close(encode(msgspec.structs.replace(good, **changes)))

    def _sealed_shape(self) -> tuple[str, bytes]:
        return Refusal.UNDECODABLE, self._seal.close(_shape(self._rng))

    def _misaddressed(self) -> tuple[str, bytes]:
        changes = self._rng.choice(({"target": "cpu77"}, {"target_incarnation": 2}, {"target": self._peer}))
        return Refusal.MISADDRESSED, self._sealed(self._allowed, **changes)

    def _unknown(self) -> tuple[str, bytes]:
        changes: dict[str, Any] = self._rng.choice(
            ({"source": "cpu77"}, {"source": "x" * 64}, {"source_incarnation": 2}, {"source_incarnation": 2**32 - 1})
        )
        return Refusal.UNKNOWN_INCARNATION, self._sealed(self._allowed, **changes)

    def _inconsistent(self) -> tuple[str, bytes]:
        far = 1 << self._rng.randint(40, 63)
        changes: dict[str, Any] = self._rng.choice(
            (
                {"sequence": far},
                {"acknowledged": far},
                {"sequence": 0},
                {"body": None},
                {"missing": (1,)},
                {"sequence": 0, "body": None, "missing": (far,)},
            )
        )
        return Refusal.INCONSISTENT, self._sealed(self._allowed, **changes)

    def _bad_body(self) -> tuple[str, bytes]:
        """With a number that may be the next, of a sender that may be the one: only the message is wrong."""
        number = self._rng.randint(1, 1000)
        if self._impossible and self._rng.randrange(2):
            source, body = self._rng.choice(self._impossible)
            return Refusal.IMPOSSIBLE, self._sealed(body, source=source, sequence=number)
        source, kind = self._rng.choice(self._forbidden)
        return Refusal.FORBIDDEN, self._sealed(_some(kind, self._rng), source=source, sequence=number)

    def _replay(self) -> tuple[str, bytes]:
        return REPLAY, self._rng.choice(self.real)


def _shape(rng: random.Random) -> bytes:
    """Good msgpack, but no envelope."""
    pack = msgspec.msgpack.encode
    deep = rng.choice((10, 500, 5000, 30_000))
    head = [LAUNCHER, 1, "cpu0", 1, 1, 0, 5]
    return rng.choice(
        (
            pack(rng.choice((None, True, -1, 1.5, "text", b"bytes", [], {}, [1, 2, 3], {"source": "cpu0"}))),
            pack([*head[:-1], "5", None, []]),
            pack([*head, ["no such tag"], []]),
            pack([*head, ["ring", -1], []]),
            pack([*head, ["run_task", 2**40], []]),
            pack([*head, ["member", "cpu0", 1, "undead"], []]),
            pack([*head, {"query": 1}, []]),
            pack([*head, ["query"], [1] * 129]),
            pack([*head, ["query"], [], 1]),
            b"\x91" * deep,
            b"\x81\x01" * deep,
            pack(head)[:-1] + b"\x91" * deep,
            b"\xdd\xff\xff\xff\xff",
            b"\xdf\xff\xff\xff\xff\x01",
            b"\xc6\xff\xff\xff\xff",
        )
    )


def _some(kind: type[Message], rng: random.Random) -> Body:
    """A message of a kind with values that pass the types."""
    values = {field.name: _value(field.name, field.type, rng) for field in msgspec.structs.fields(kind)}
    return kind(**values)  # type: ignore[return-value]


def _value(name: str, kind: Any, rng: random.Random) -> Any:
    words = {"state": "dead", "what": "update", "command": "run", "node": "cpu0"}
    if name in words:
        return words[name]
    if name == "registers":
        return tuple(rng.getrandbits(64) for _ in range(13))
    if name in ("pages", "rules"):
        return ()
    if name == "facts":
        return {"ended": 1}
    base = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    return {int: rng.randrange(3), bool: True, str: "seamldr_lock"}[base]


def _impossible(spec: MachineSpec, target: str) -> list[tuple[str, Body]]:
    """Messages that may come from their senders, about what the machine has not."""
    cpus, tasks, (page, end) = spec.cpus, spec.vcpus + spec.tds, spec.buffers
    bad_page = (0, page - 4096, page + 1, end, 2**64 - 4096)
    td = spec.tds
    by_target: dict[str, list[tuple[str, Body]]] = {
        LAUNCHER: [
            *((node, FaultReached(1, cpus)) for node in (SEAMLDR, KVM, "cpu0")),
            (SEAMLDR, Fenced(cpus)),
            (SEAMLDR, Fenced(4095)),
            (KVM, Done(1, 1)),
            (KVM, Done(1, -MAX_ERRNO - 1)),
        ],
        SEAMLDR: [
            (LAUNCHER, Member("cpu77", 1, "dead")),
            (LAUNCHER, Member("cpu\u00b2", 1, "dead")),
            (LAUNCHER, Member(LAUNCHER, 1, "dead")),
            (LAUNCHER, ArmFault(1, "waiting", 1, cpus)),
            ("cpu1", LockAcquire("seamldr_lock", 3, 1)),
            ("cpu1", LockClaim("seamldr_lock", 255, 1, 1)),
        ],
        KVM: [
            (LAUNCHER, Do(1, "offline", cpus)),
            ("cpu1", TaskEnded(tasks, "")),
            ("cpu1", TaskMoved(0, cpus, True)),
            ("cpu1", TaskMoved(2**32 - 1, 0, True)),
            ("cpu1", AdminDone(1, 5, "")),
        ],
    }
    cpu: list[tuple[str, Body]] = [
        *((source, RunTask(number)) for source in (KVM, "cpu1") for number in (tasks, 2**32 - 1)),
        (KVM, MoveTask(0, cpus)),
        (KVM, MoveTask(tasks, 0)),
        (KVM, StopTask(tasks)),
        (KVM, Hotplug(1, cpus, False)),
        *((KVM, ReadVersion(1, bad)) for bad in bad_page),
        *((KVM, InstallModule(1, 4096, (page, bad), page)) for bad in bad_page),
        *((KVM, InstallModule(1, 4096, (page,), bad)) for bad in bad_page),
        *((KVM, BuildTd(1, "init_vm", td, spec.vcpus + td, (bad,))) for bad in bad_page),
        (KVM, InstallModule(1, 0, (), page)),
        (KVM, BuildTd(1, "run", td, spec.vcpus + td + 1)),
        *([(KVM, BuildTd(1, "destroy", td - 1, spec.vcpus + td - 1))] if td else []),
    ]
    return by_target.get(target, cpu)
