"""What is refused changes nothing, is counted, and costs little: seals, roles, the inbox."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import stat
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any, get_args

import msgspec
import pytest
import trio
import zmq
from hypothesis import given
from hypothesis import strategies as st

from bus.admission import CPU, MAY_SEND, Admission, role_of
from bus.clock import LamportClock
from bus.endpoint import INBOX_LIMIT, LARGEST_READ, Endpoint, open_endpoint
from bus.link import WINDOW, Identity, Link, Refusal
from bus.messages import (
    AdminDone,
    Body,
    BuildTd,
    Envelope,
    Fenced,
    InstallModule,
    Ipi,
    LockAcquire,
    LockGrant,
    Member,
    MoveTask,
    ReadVersion,
    Ring,
    RunTask,
    Seamcall,
    Stop,
    TaskEnded,
    encode,
)
from bus.peers import Peers
from bus.refusals import Refusals
from bus.seal import KEY_SIZE, SEAL_SIZE, Seal
from bus.spec import KVM, LAUNCHER, SEAMLDR, MachineSpec, Workload, cpu_number

KEY = b"k" * KEY_SIZE
PAGE, END = 0x1000_0000, 0x1010_0000
SPEC = MachineSpec(
    run_dir="", socket_dir="", key=KEY, memory_fd=-1, cpus=4, vcpus=6, tds=2, strategy="none", knobs={}, seed=1,
    trace=False, workload=Workload(1, 1, 1), boot_image="", images=(), trusted_signers=(),
    buffers=(PAGE, END),
)  # fmt: skip
ROLES = (LAUNCHER, SEAMLDR, KVM, CPU)


# The seal


@given(st.binary(max_size=300))
def test_a_sealed_frame_opens_and_gives_its_content(content: bytes) -> None:
    """Closing and opening with one key is the identity; the key is not in the frame."""
    frame = Seal(KEY).close(content)
    opened = Seal(KEY).open(frame)
    assert opened is not None and bytes(opened) == content
    assert len(frame) == SEAL_SIZE + len(content) and KEY not in frame.removesuffix(content)


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_frame_that_was_changed_does_not_open(content: bytes, data: st.DataObject) -> None:
    """One bit anywhere, a byte less or more, another key."""
    frame = bytearray(Seal(KEY).close(content))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    good = Seal(KEY).close(content)
    for wrong in (bytes(frame), good[:-1], good[1:], good + b"\0", Seal(bytes(KEY_SIZE)).close(content)):
        assert Seal(KEY).open(wrong) is None


@pytest.mark.parametrize("length", [0, 15, 17, 33])
def test_a_key_has_one_length(length: int) -> None:
    """Any other raises ValueError."""
    with pytest.raises(ValueError, match="bytes, not 16"):
        Seal(bytes(length))


# Roles


def test_every_message_has_senders_and_receivers() -> None:
    """The table is complete, names known roles, and nothing is sent by its only receiver but between CPUs."""
    assert MAY_SEND.keys() == set(get_args(Body))
    for senders, receivers in MAY_SEND.values():
        assert senders and receivers and senders | receivers <= set(ROLES)
        assert not senders & receivers or senders & receivers == {CPU}


def admitted(source: str, target: str, body: Body) -> Refusal | None:
    return Admission(SPEC, target)(source, body)


@pytest.mark.parametrize(
    ("source", "target", "body"),
    [
        ("cpu1", "cpu0", Stop()),
        (KVM, "cpu0", Stop()),
        (SEAMLDR, "cpu0", Member("cpu1", 1, "dead")),
        (LAUNCHER, "cpu0", LockGrant("seamldr_lock", 1, 1, 1)),
        ("cpu1", "cpu0", LockGrant("seamldr_lock", 1, 1, 1)),
        (KVM, SEAMLDR, Seamcall(1, 1 << 63, (0,) * 13, 0, 0, False)),
        (LAUNCHER, SEAMLDR, LockAcquire("seamldr_lock", 0, 1)),
        (LAUNCHER, "cpu0", RunTask(0)),
        (SEAMLDR, "cpu0", Ipi(0xFB)),
        ("cpu1", LAUNCHER, Fenced(0)),
        (SEAMLDR, KVM, AdminDone(1, 0, "")),
        ("cpu1", KVM, Ipi(0xFB)),
    ],
)
def test_a_message_in_the_role_of_another_is_forbidden(source: str, target: str, body: Body) -> None:
    """Who claims to be itself may not say what only another may, nor to whom it is not for."""
    assert admitted(source, target, body) is Refusal.FORBIDDEN


@pytest.mark.parametrize(
    ("source", "target", "good", "bad"),
    [
        (LAUNCHER, SEAMLDR, Member("cpu3", 2, "dead"), [Member("cpu4", 1, "dead"), Member(LAUNCHER, 1, "online")]),
        (KVM, "cpu0", RunTask(7), [RunTask(8), RunTask(2**32 - 1)]),
        (KVM, "cpu0", MoveTask(7, 3), [MoveTask(8, 3), MoveTask(7, 4)]),
        ("cpu3", KVM, TaskEnded(0, ""), [TaskEnded(8, "")]),
        (SEAMLDR, LAUNCHER, Fenced(3), [Fenced(4)]),
        ("cpu3", SEAMLDR, LockAcquire("any", 2, 1), [LockAcquire("any", 3, 1)]),
        ("cpu3", KVM, AdminDone(1, -22, ""), [AdminDone(1, 22, ""), AdminDone(1, -4096, "")]),
        (KVM, "cpu0", ReadVersion(1, PAGE), [ReadVersion(1, pa) for pa in (0, PAGE - 4096, PAGE + 8, END)]),
        (
            KVM,
            "cpu0",
            InstallModule(1, 1, (PAGE, PAGE + 4096), PAGE),
            [InstallModule(1, 1, (), PAGE), InstallModule(1, 1, (PAGE,), 0), InstallModule(1, 1, (PAGE, 0), PAGE)],
        ),
        (
            KVM,
            "cpu0",
            BuildTd(1, "init_vm", 2, 8, (PAGE,)),
            [BuildTd(1, "init_vm", 2, 8, (0,)), BuildTd(1, "run", 1, 7), BuildTd(1, "run", 2, 7)],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, msgspec.Struct) else None,
)
def test_a_message_about_what_the_machine_has_not_is_impossible(
    source: str, target: str, good: Body, bad: list[Body]
) -> None:
    """A CPU, task, page, TD, context or errno that there is none of; the same message about what there is goes."""
    assert admitted(source, target, good) is None
    assert {admitted(source, target, body) for body in bad} == {Refusal.IMPOSSIBLE}


def test_a_name_that_only_looks_like_a_cpu_is_none() -> None:
    """Digits of other scripts are letters here."""
    assert [cpu_number(node) for node in ("cpu\u00b2", "cpu\u0663", "cpu", "cpu-1", "cpu 1")] == [None] * 5
    assert [role_of(node) for node in ("cpu12", KVM)] == [CPU, KVM]


# Nothing changes


def state(peers: Peers) -> Any:
    """Everything that a process knows of its links."""
    slots = [name for name in Link.__slots__ if name not in ("_own", "_seal", "_outbox", "_crowded", "peer")]
    links = {name: [repr(getattr(link, slot)) for slot in slots] for name, link in peers._every.items()}
    return links, list(peers.outbox), repr(peers.deliverable), peers.due, len(peers._active)


def cpu0() -> Peers:
    """A CPU in the middle of things: frames of two links waiting, early, acknowledged and not."""
    own, other, kvm = Identity("cpu0", 1), Identity("cpu1", 1), Identity(KVM, 1)
    peers = Peers(own, KEY, Admission(SPEC, "cpu0"))
    for identity in (other, kvm):
        peers.member(identity.node, 1, "online")
        end = Peers(identity, KEY)
        end.member("cpu0", 1, "online")
        bodies = [Ring(n) for n in range(6)] if identity is other else [RunTask(n) for n in range(6)]
        for n, body in enumerate(bodies):
            end.send("cpu0", body, n, 0)
        for n in (0, 1, 3, 5):
            assert peers.receive(end.outbox[n][1], 0) is None
        for n in range(3):
            peers.send(identity.node, Ring(n), n, 0)
    peers.hand_over(1, 0)
    return peers


def frame(body: Body | None, **changes: Any) -> bytes:
    good = Envelope("cpu1", 1, "cpu0", 1, 3, 0, 5, body)
    return Seal(KEY).close(encode(msgspec.structs.replace(good, **changes)))


WRONG = {
    "forbidden, with the next number": frame(Stop()),
    "forbidden, and it acknowledges": frame(LockGrant("l", 1, 1, 1), acknowledged=3),
    "forbidden, of another": frame(Stop(), source=KVM),
    "impossible, with the next number": frame(RunTask(99)),
    "impossible, early": frame(RunTask(99), sequence=5),
    "beyond the window": frame(Ring(1), sequence=WINDOW + 3),
    "far beyond it": frame(Ring(1), sequence=2**64 - 1),
    "acknowledges the unsent": frame(Ring(1), acknowledged=4),
    "acknowledges without end": frame(None, sequence=0, acknowledged=2**64 - 1),
    "misses the unsent": frame(None, sequence=0, missing=(1, 2**63)),
    "a number and no message": frame(None),
    "a message and no number": frame(Ring(1), sequence=0),
    "its next incarnation": frame(Ring(1), source_incarnation=2),
    "its last incarnation": frame(Ring(1), source_incarnation=0),
    "for my next incarnation": frame(Ring(1), target_incarnation=2),
    "for another": frame(Ring(1), target="cpu2"),
    "from myself": frame(Ring(1), source="cpu0"),
    "of nobody": frame(Ring(1), source="cpu2"),
    "sealed noise": Seal(KEY).close(b"\x91" * 60_000),
    "sealed nothing": Seal(KEY).close(b""),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_refused_frame_leaves_no_trace_in_the_links(wrong: bytes) -> None:
    """Each wrong frame with the run's key is refused, and all links are as they were, to the last counter."""
    peers = cpu0()
    before = state(peers)
    assert peers.receive(wrong, 7) is not None
    assert state(peers) == before
    assert sum(peers.refused.values()) == 1


def test_no_flipped_bit_of_a_real_frame_is_taken_in() -> None:
    """All bits of a real frame, each flipped by itself."""
    peers, good = cpu0(), frame(Ring(9))
    before = state(peers)
    for bit in range(8 * len(good)):
        wrong = bytearray(good)
        wrong[bit // 8] ^= 1 << bit % 8
        assert peers.receive(bytes(wrong), 7) is Refusal.STRANGER
    assert state(peers) == before
    assert peers.receive(good, 7) is None


# Records


def test_a_flood_of_refusals_makes_few_records() -> None:
    """Of a million, 20 records and the totals; another reason is on record at once."""
    written: list[tuple[str, dict[str, Any]]] = []
    refusals = Refusals(lambda event, **fields: written.append((event, fields)))
    for _ in range(1_000_000):
        refusals.add("stranger", "00")
    refusals.add("forbidden", "Stop")
    assert [fields["count"] for _, fields in written] == [*(1 << n for n in range(20)), 1]
    refusals.conclude()
    assert written[-1] == ("refused_totals", {"counts": {"stranger": 1_000_000, "forbidden": 1}})


def test_nothing_refused_is_nothing_recorded() -> None:
    """A process that has refused nothing says nothing about it."""
    written: list[str] = []
    Refusals(lambda event, **_: written.append(event)).conclude()
    assert written == []


# The inbox


@pytest.fixture
def directory() -> Iterator[str]:
    """Short, because a Unix socket path is."""
    path = tempfile.mkdtemp(prefix="bus", dir="/tmp")
    yield path
    shutil.rmtree(path)


@contextlib.asynccontextmanager
async def two(directory: str, refused: Counter[str]) -> AsyncIterator[tuple[Endpoint, Endpoint]]:
    """Endpoints "a", which counts what it refuses, and "b"."""

    def count(reason: str, head: bytes) -> None:
        refused[reason] += 1

    async with (
        open_endpoint(Identity("a", 1), directory, KEY, LamportClock(), count) as a,
        open_endpoint(Identity("b", 1), directory, KEY, LamportClock(), count) as b,
    ):
        a.member("b", 1, "online")
        b.member("a", 1, "online")
        yield a, b


@contextlib.contextmanager
def pushing(path: str) -> Iterator[zmq.Socket[bytes]]:
    """A connection of somebody's own."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.set(zmq.LINGER, 0)
        push.connect(f"ipc://{path}")
        yield push


async def test_a_full_inbox_makes_the_flooder_wait_and_nobody_else(directory: str) -> None:
    """While its owner is busy the inbox takes so many frames of a connection; then a peer's message comes at once."""
    refused: Counter[str] = Counter()
    most = INBOX_LIMIT + 1000 + 4096  # his own queue, and what the kernel's socket buffers hold
    async with two(directory, refused) as (a, b):
        with pushing(f"{directory}/a") as push:
            sent = quiet = 0
            while quiet < 20 and sent < 10 * most:
                try:
                    push.send(bytes(512), zmq.NOBLOCK)
                    sent, quiet = sent + 1, 0
                except zmq.Again:
                    quiet += 1
                    await trio.sleep(0.01)
            assert INBOX_LIMIT <= sent < most
            b.send("a", Ring(7))
            with trio.fail_after(10):
                delivery = await a.receive()
            assert delivery.body == Ring(7)
            with trio.fail_after(30):
                while refused[Refusal.STRANGER] < sent:
                    with trio.move_on_after(0.01):
                        await a.wait()
        assert refused == {Refusal.STRANGER: sent}


async def test_who_sends_an_endless_frame_is_cut_off(directory: str) -> None:
    """A frame longer than LARGEST_READ never arrives, one as long as that is refused; the links go on."""
    refused: Counter[str] = Counter()
    async with two(directory, refused) as (a, b):
        for size, count in ((LARGEST_READ, 1), (LARGEST_READ + 1, 1)):
            with pushing(f"{directory}/a") as push:
                push.send(bytes(size))
                b.send("a", Ring(size))
                with trio.fail_after(10):
                    assert (await a.receive()).body == Ring(size)
                    while size == LARGEST_READ and not refused:
                        with trio.move_on_after(0.01):
                            await a.wait()
            assert refused == {Refusal.OVERSIZED: count}


async def test_connections_that_are_not_of_zmq_hurt_nobody(directory: str) -> None:
    """A thousand of them, with noise of any length instead of a greeting, or with half a greeting."""
    rng, refused = random.Random(3), Counter[str]()
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    async with two(directory, refused) as (a, b):
        for n in range(1000):
            with socket.socket(socket.AF_UNIX) as raw, contextlib.suppress(OSError):
                raw.connect(f"{directory}/a")
                raw.send(greeting[: rng.randrange(64)] + rng.randbytes(rng.randrange(200)))
            if n % 100 == 0:
                b.send("a", Ring(n))
                with trio.fail_after(10):
                    assert (await a.receive()).body == Ring(n)
    assert refused.keys() <= {Refusal.STRANGER}


async def test_the_socket_is_for_its_owner_alone(directory: str) -> None:
    """Mode 0600, whatever the umask."""
    async with two(directory, Counter()):
        for node in ("a", "b"):
            assert stat.S_IMODE(os.stat(f"{directory}/{node}").st_mode) == 0o600
