"""The endpoint over real sockets: delivery, cancellation, strangers, and peers that stop or die."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
import zmq

from bus.clock import LamportClock
from bus.endpoint import Endpoint, open_endpoint
from bus.link import Completion, Delivery, Identity
from bus.messages import MAX_FRAME, Envelope, Query, Ring, encode
from bus.seal import Seal

ROOT = Path(__file__).resolve().parents[2]
KEY = b"k" * 16


@pytest.fixture
def directory() -> Iterator[str]:
    """Short, because a Unix socket path is."""
    path = tempfile.mkdtemp(prefix="bus", dir="/tmp")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(directory: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a helper script of this folder; what still runs at the end is killed."""
    children: list[subprocess.Popen[bytes]] = []

    def popen(script: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).with_name(script)), directory, *arguments]
        children.append(subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}))
        return children[-1]

    yield popen
    for child in children:
        child.kill()
        child.wait()


def refuse_none(reason: str, head: bytes) -> None:
    raise AssertionError(f"refused: {reason} {head!r}")


@contextlib.asynccontextmanager
async def mesh(directory: str, *nodes: str, connections: int = 64) -> AsyncIterator[list[Endpoint]]:
    """Endpoints in this process that know each other."""
    async with contextlib.AsyncExitStack() as stack:
        ends = [
            await stack.enter_async_context(
                open_endpoint(Identity(node, 1), directory, KEY, LamportClock(), refuse_none, connections)
            )
            for node in nodes
        ]
        for end in ends:
            for node in nodes:
                end.member(node, 1, "online")
        yield ends


async def collect(endpoint: Endpoint, count: int, limit: int = 256) -> list[Delivery]:
    got: list[Delivery] = []
    while len(got) < count:
        await endpoint.wait()
        got += endpoint.drain_nowait(limit)
    return got


def words(deliveries: list[Delivery]) -> list[int]:
    return [delivery.body.word for delivery in deliveries if isinstance(delivery.body, Ring)]


async def until(condition: Callable[[], bool]) -> None:
    """Give the other tasks their turn until something is so."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.005)


def stop(child: subprocess.Popen[bytes]) -> None:
    """SIGSTOP, and until it has taken effect."""
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)


def lines(file: Path) -> list[str]:
    return file.read_text().split()


async def test_a_message_reaches_its_node(directory: str) -> None:
    """It carries its id, its source and a clock that the receiver's own then passes."""
    async with mesh(directory, "a", "b") as (a, b):
        a.clock.merge(1000)
        message_id = a.send("b", Ring(7))
        with trio.fail_after(10):
            delivery = await b.receive()
        assert delivery == Delivery(message_id, Identity("a", 1), 1001, Ring(7))
        assert b.clock.now == 1002


async def test_messages_queued_before_the_wait_are_seen(directory: str) -> None:
    """A drain that leaves messages in the inbox uses the descriptor's signal up; the next wait still returns."""
    async with mesh(directory, "a", "b") as (a, b):
        for n in range(500):
            a.send("b", Ring(n))
        with trio.fail_after(10):
            assert words(await collect(b, 500, limit=3)) == list(range(500))


async def test_cancelled_receives_lose_nothing(directory: str) -> None:
    """Three thousand receives, most of them cancelled somewhere on the way; order is kept."""
    got: list[Delivery] = []
    async with mesh(directory, "a", "b") as (a, b):
        for n in range(3000):
            a.send("b", Ring(n))
            with trio.move_on_after((n % 7) * 2e-5):
                got.append(await b.receive())
        with trio.fail_after(10):
            got += await collect(b, 3000 - len(got))
            await a.flush()
    assert words(got) == list(range(3000))


async def test_both_ends_send_receive_and_flush_at_once(directory: str) -> None:
    """With several tasks at one endpoint no wake-up gets lost."""
    got: dict[str, list[Delivery]] = {}

    async def listen(name: str, end: Endpoint) -> None:
        got[name] = await collect(end, 2000)

    async def speak(end: Endpoint, target: str) -> None:
        for n in range(2000):
            end.send(target, Ring(n))
            if n % 100 == 0:
                await end.flush()
        await end.flush()

    async with mesh(directory, "a", "b") as (a, b):
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen, "a", a)
                nursery.start_soon(listen, "b", b)
                nursery.start_soon(speak, a, "b")
                nursery.start_soon(speak, b, "a")
        assert a.statistics().unacknowledged == b.statistics().unacknowledged == 0
    assert words(got["a"]) == words(got["b"]) == list(range(2000))


async def test_two_that_flush_do_not_wait_for_each_other(directory: str) -> None:
    """Both flush before either has drained; afterwards the messages are still there."""
    async with mesh(directory, "a", "b") as (a, b):
        a.send("b", Ring(1))
        b.send("a", Ring(2))
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.flush)
                nursery.start_soon(b.flush)
        assert words(a.drain_nowait()) == [2]
        assert words(b.drain_nowait()) == [1]


async def test_a_drain_does_not_take_the_signal_from_the_task_that_watches(directory: str) -> None:
    """One task is parked in a flush; drains of another must not read away the acknowledgement that would wake it."""
    async with mesh(directory, "a", "b") as (a, b):
        for n in range(64):
            a.send("b", Ring(n))
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.flush)
                await collect(b, 64)
                b.drain_nowait()
                for _ in range(10_000):
                    a.drain_nowait()


async def test_a_receiver_may_leave_at_once(directory: str) -> None:
    """What it owes goes out when it closes, so nobody waits for its acknowledgement."""
    async with mesh(directory, "a") as (a,):
        a.send("b", Ring(1))
        async with open_endpoint(Identity("b", 1), directory, KEY, LamportClock(), refuse_none) as b:
            b.member("a", 1, "online")
            with trio.fail_after(10):
                await b.receive()
        with trio.fail_after(10):
            await a.flush()


async def test_an_idle_endpoint_sleeps(directory: str) -> None:
    """After the last timer has run out nothing wakes up any more."""
    async with mesh(directory, "a", "b") as (a, b):
        a.send("b", Ring(1))
        await b.receive()
        with trio.fail_after(10):
            await a.flush()
        with trio.move_on_after(0.5):
            await b.wait()
        before = a.statistics().wakeups, b.statistics().wakeups
        with trio.move_on_after(0.7) as scope:
            await b.wait()
        assert scope.cancelled_caught
        assert (a.statistics().wakeups, b.statistics().wakeups) == before
        assert max(before) < 8


async def test_strangers_are_counted_and_harmless(directory: str) -> None:
    """Garbage, frames too long, other runs, multipart messages and connections that are not zmq's change nothing."""
    refused: list[tuple[str, bytes]] = []
    good = encode(Envelope("b", 1, "a", 1, 1, 0, 5, Query()))
    stranger = Seal(b"x" * 16).close(good)
    context = zmq.Context()
    async with open_endpoint(
        Identity("a", 1), directory, KEY, LamportClock(), lambda *what: refused.append(what)
    ) as endpoint:
        endpoint.member("b", 1, "online")
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(f"{directory}/a")
            raw.send(b"GET / HTTP/1.1\r\n\r\n" * 10)
        push = context.socket(zmq.PUSH)
        push.connect(f"ipc://{directory}/a")
        for frame in (b"", b"garbage", b"\xc1" * (MAX_FRAME + 1), bytes(5_000_000), stranger):
            push.send(frame)
        push.send_multipart([b"one", b"two"])
        push.send(Seal(KEY).close(good))
        with trio.fail_after(10):
            delivery = await endpoint.receive()
        context.destroy(linger=0)
        assert delivery.source == Identity("b", 1)
        assert [reason for reason, _ in refused] == (
            ["stranger"] * 2 + ["oversized"] * 2 + ["stranger"] * 3
        )
        assert max(len(head) for _, head in refused) <= 64
        assert endpoint.statistics().refused == {"oversized": 2, "stranger": 5}


async def test_frames_of_an_unannounced_node_are_refused_until_it_is_announced(directory: str) -> None:
    """The message then arrives by resend."""
    refused: list[str] = []
    async with (
        open_endpoint(Identity("a", 1), directory, KEY, LamportClock(), refuse_none) as a,
        open_endpoint(Identity("b", 1), directory, KEY, LamportClock(), lambda r, _: refused.append(r)) as b,
    ):
        a.send("b", Ring(1))
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.wait)
                await until(lambda: bool(refused))
                b.member("a", 1, "online")
        assert words(b.drain_nowait()) == [1]
        assert refused == ["unknown_incarnation"]


async def test_outgoing_sockets_are_capped(directory: str) -> None:
    """The least recently used one is closed and opened again at need; nothing is lost or reordered."""
    nodes = [f"b{n}" for n in range(6)]
    async with mesh(directory, "a", *nodes, connections=2) as (a, *others):
        for n in range(60):
            a.send(nodes[n * 7 % 6], Ring(n))
        with trio.fail_after(10):
            for m, other in enumerate(others):
                assert words(await collect(other, 10)) == [n for n in range(60) if n * 7 % 6 == m]
            await a.flush()
        assert a.statistics().connections == 2
        assert a.statistics().connected > 6


async def test_the_least_recently_used_socket_goes_first(directory: str) -> None:
    """A peer that was spoken to again stays connected."""
    async with mesh(directory, "a", "b", "c", "d", connections=2) as (a, *_):
        for node in ("b", "c", "b", "d", "b"):
            a.send(node, Ring(0))
        assert a.statistics().connected == 3


async def test_a_death_ends_a_flush(directory: str) -> None:
    """A flush that waits for a peer which is then declared dead returns; each message is complete as dead."""
    async with mesh(directory, "a") as (a,):
        first = a.send("ghost", Ring(1))
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.flush)
                await trio.testing.wait_all_tasks_blocked()
                assert a.member("ghost", 1, "dead") == [first]
        second = a.send("ghost", Ring(2))
        assert a.completion(first) is a.completion(second) is Completion.DEAD
        assert (a.statistics().dead, a.statistics().connections) == (2, 0)


async def test_a_new_incarnation_is_reached_at_the_same_address(directory: str) -> None:
    """It gets nothing that was meant for the old one."""
    refused: list[str] = []
    async with open_endpoint(Identity("a", 1), directory, KEY, LamportClock(), lambda r, _: refused.append(r)) as a:
        async with open_endpoint(Identity("b", 1), directory, KEY, LamportClock(), refuse_none) as b:
            b.member("a", 1, "online")
            a.send("b", Ring(1))
            with trio.fail_after(10):
                await b.receive()
                await a.flush()
        lost = a.send("b", Ring(2))
        assert a.member("b", 1, "dead") == [lost]
        async with open_endpoint(Identity("b", 2), directory, KEY, LamportClock(), refuse_none) as b:
            b.member("a", 1, "online")
            a.member("b", 2, "online")
            assert a.send("b", Ring(3)) == "a.1>b.2:1"
            with trio.fail_after(10):
                assert (await b.receive()).body == Ring(3)
                await a.flush()
        assert set(refused) <= {"stale_incarnation"}  # an acknowledgement of the old one may come late


async def test_a_sender_that_flushes_may_leave_at_once(
    directory: str, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Its process is gone right after its last acknowledgement; everything was delivered."""
    async with mesh(directory, "sink") as (sink,):
        sink.member("source", 1, "online")
        sender = start("soak_sender.py", "source", "sink", "3000")
        with trio.fail_after(20):
            got = await collect(sink, 3000)
            await until(lambda: sender.poll() is not None)
        assert words(got) == list(range(3000))
        assert sender.returncode == 0


async def test_a_stopped_receiver_gets_everything_when_it_continues(
    directory: str, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """SIGSTOP is silence, not death: the sender resends for as long as it takes."""
    file = Path(directory, "ids")
    async with mesh(directory, "a") as (a,):
        recorder = start("recorder.py", "b", "a", str(file))
        with trio.fail_after(20):
            ids = [a.send("b", Ring(0))]
            await a.flush()
            stop(recorder)
            ids += [a.send("b", Ring(n)) for n in range(1, 3000)]
            await until(lambda: a.statistics().resent > 0)
            assert a.statistics().unacknowledged == 2999
            recorder.send_signal(signal.SIGCONT)
            await a.flush()
    assert lines(file) == ids


async def test_a_killed_receiver_had_taken_what_it_acknowledged(
    directory: str, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """SIGKILL in the middle of a stream: each message completes once, and no acknowledgement was a lie."""
    file = Path(directory, "ids")
    refused: list[str] = []
    async with open_endpoint(Identity("a", 1), directory, KEY, LamportClock(), lambda r, _: refused.append(r)) as a:
        recorder = start("recorder.py", "b", "a", str(file))
        ids = [a.send("b", Ring(n)) for n in range(20_000)]
        with trio.fail_after(20):
            while a.statistics().acknowledged < 1000:
                with trio.move_on_after(0.005):
                    await a.flush()
            recorder.kill()
            recorder.wait()
            lost = a.member("b", 1, "dead")
            await a.flush()
        completions = [a.completion(message_id) for message_id in ids]
    assert set(refused) <= {"dead_incarnation"}  # an acknowledgement that was on its way
    acknowledged = ids[: completions.count(Completion.ACKNOWLEDGED)]
    assert lost == ids[len(acknowledged) :] != []
    assert completions[len(acknowledged) :] == [Completion.DEAD] * len(lost)
    written = lines(file)
    assert written == ids[: len(written)]
    assert written[: len(acknowledged)] == acknowledged


async def test_the_owners_exception_comes_out_as_it_is(directory: str) -> None:
    """The nursery inside does not wrap it, and the inbox can be bound again."""
    for _ in range(2):
        with pytest.raises(KeyError, match="own"):
            async with mesh(directory, "a") as (a,):
                a.send("nobody", Ring(1))
                raise KeyError("own")


async def test_a_path_that_no_socket_can_have_is_refused(directory: str) -> None:
    """Both the own inbox and a peer's; the message names the path and the limit."""
    with pytest.raises(ValueError, match=r"has 1\d\d bytes, more than 107"):
        async with mesh(directory, "n" * 107):
            pass
    with pytest.raises(FileNotFoundError, match="cannot bind the inbox"):
        async with mesh(f"{directory}/missing", "a"):
            pass
    async with mesh(directory, "a") as (a,):
        with pytest.raises(ValueError, match="more than 107"):
            a.send("n" * 107, Ring(1))
        assert a.statistics().sent == 0
