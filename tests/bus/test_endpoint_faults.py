"""Link faults over real sockets: frames are lost, doubled and late, messages arrive once and in order all the same."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from bus.clock import LamportClock
from bus.endpoint import Endpoint, open_endpoint
from bus.link import BACKLOG_NOTICE, WINDOW, Completion, Identity
from bus.linkfaults import LinkRule
from bus.messages import Ring

HOUR = 3600 * 10**9


@pytest.fixture
def directory() -> Iterator[str]:
    """Short, because a Unix socket path is."""
    path = tempfile.mkdtemp(prefix="bus", dir="/tmp")
    yield path
    shutil.rmtree(path)


def refuse_none(reason: str, head: bytes) -> None:
    raise AssertionError(f"refused: {reason} {head!r}")


@contextlib.asynccontextmanager
async def two(directory: str, first: str = "a", second: str = "b") -> AsyncIterator[tuple[Endpoint, Endpoint]]:
    """Two endpoints in this process that know each other."""
    async with (
        open_endpoint(Identity(first, 1), directory, b"k" * 16, LamportClock(), refuse_none) as one,
        open_endpoint(Identity(second, 1), directory, b"k" * 16, LamportClock(), refuse_none) as other,
    ):
        one.expect([second])
        other.expect([first])
        yield one, other


async def collect(endpoint: Endpoint, count: int) -> list[int]:
    """The words of so many messages."""
    got: list[int] = []
    while len(got) < count:
        await endpoint.wait()
        got += [delivery.body.word for delivery in endpoint.drain_nowait() if isinstance(delivery.body, Ring)]
    return got


async def hear(endpoint: Endpoint, words: list[int]) -> None:
    """Note the words of all messages."""
    while True:
        words += await collect(endpoint, 1)


@pytest.mark.parametrize(
    "rule",
    [
        LinkRule(drop=0.3),
        LinkRule(duplicate=1.0),
        LinkRule(reorder=0.3),
        LinkRule(jitter_ns=3_000_000),
        LinkRule(drop=0.2, duplicate=0.2, reorder=0.2, delay_ns=100_000, jitter_ns=1_000_000),
        LinkRule(bandwidth=50_000),
    ],
    ids=["drop", "duplicate", "reorder", "jitter", "everything", "bandwidth"],
)
async def test_messages_arrive_once_and_in_order_all_the_same(directory: str, rule: LinkRule) -> None:
    """Three hundred each way, acknowledged both ways, and then both ends come to rest."""
    async with two(directory) as ends:
        for seed, end in enumerate(ends):
            end.set_link_faults([rule], seed)
        for n in range(300):
            ends[0].send("b", Ring(n))
            ends[1].send("a", Ring(n))
        got: list[list[int]] = [[], []]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for end, heard in zip(ends, got, strict=True):
                    nursery.start_soon(hear, end, heard)
                for end in ends:
                    await end.flush()
                nursery.cancel_scope.cancel()
        for end, heard in zip(ends, got, strict=True):
            heard += await collect(end, 300 - len(heard))
            assert end.drain_nowait() == []
        assert got == [list(range(300))] * 2
        counts = [end.statistics() for end in ends]
    assert bool(rule.duplicate) <= bool(min(count.duplicated for count in counts))
    assert bool(rule.drop) <= bool(min(count.dropped for count in counts))
    assert bool(rule.reorder or rule.jitter_ns or rule.bandwidth) <= bool(min(count.delayed for count in counts))


async def test_control_links_are_exempt(directory: str) -> None:
    """To and from the launcher nothing is ever lost, whatever the rules say."""
    async with two(directory, "launcher") as (launcher, end):
        for one in (launcher, end):
            one.set_link_faults([LinkRule(drop=1.0, delay_ns=HOUR)], 1)
        launcher.send("b", Ring(1))
        end.send("launcher", Ring(2))
        with trio.fail_after(10):
            assert (await collect(end, 1), await collect(launcher, 1)) == ([1], [2])
        assert end.statistics().dropped == launcher.statistics().dropped == 0


async def test_a_partition_that_has_ended_is_noticed_at_once(directory: str) -> None:
    """Nothing gets through, however often; the end of it brings the messages without the pauses of a long silence."""
    async with two(directory) as (a, b):
        a.set_link_faults([LinkRule("a", "b", partition="one-way")], 1)
        ids = [a.send("b", Ring(n)) for n in range(20)]
        with trio.fail_after(20):
            while a.statistics().resent < 22:
                with trio.move_on_after(0.05):
                    await b.wait()
            assert b.drain_nowait() == []
            assert {a.completion(one) for one in ids} == {Completion.PENDING}
            a.set_link_faults([], 1)
            assert await collect(b, 20) == list(range(20))
            await a.flush()
        assert a.statistics().dropped >= 42


async def test_what_is_held_back_goes_when_its_rule_goes(directory: str) -> None:
    """Frames that were to come in an hour come when the rules are taken away, in order."""
    async with two(directory) as (a, b):
        a.set_link_faults([LinkRule(delay_ns=HOUR)], 1)
        for n in range(5):
            a.send("b", Ring(n))
        await trio.testing.wait_all_tasks_blocked()
        assert b.drain_nowait() == []
        a.set_link_faults([], 1)
        with trio.fail_after(10):
            assert await collect(b, 5) == list(range(5))
        assert (a.statistics().delayed, a.statistics().resent) == (5, 0)


async def test_what_is_held_back_for_the_dead_is_forgotten(directory: str) -> None:
    """A frame on its way to an incarnation that has died does not reach the next one, nor open a socket."""
    async with two(directory) as (a, b):
        a.set_link_faults([LinkRule(delay_ns=HOUR)], 1)
        lost = a.send("ghost", Ring(1))
        a.send("b", Ring(2))
        assert a.member("ghost", 1, "dead") == [lost]
        a.set_link_faults([], 1)
        assert a.statistics().connections == 1
        with trio.fail_after(10):
            assert await collect(b, 1) == [2]


async def test_one_who_leaves_does_not_take_along_what_is_held_back(directory: str) -> None:
    """The acknowledgement that a leaving process owes goes out, although it was to be delayed."""
    async with open_endpoint(Identity("a", 1), directory, b"k" * 16, LamportClock(), refuse_none) as a:
        message = a.send("b", Ring(1))
        async with open_endpoint(Identity("b", 1), directory, b"k" * 16, LamportClock(), refuse_none) as b:
            b.expect(["a"])
            b.set_link_faults([LinkRule(delay_ns=HOUR)], 1)
            with trio.fail_after(10):
                assert await collect(b, 1) == [1]
        with trio.fail_after(10):
            await a.flush()
        assert a.completion(message) is Completion.ACKNOWLEDGED


async def test_a_delayed_frame_wakes_its_process_once(directory: str) -> None:
    """The endpoint's timer serves the delay; when all is acknowledged nothing wakes up any more."""
    async with two(directory) as (a, b):
        a.set_link_faults([LinkRule(delay_ns=20_000_000)], 1)
        a.send("b", Ring(1))
        with trio.fail_after(10):
            assert await collect(b, 1) == [1]
            await a.flush()
        with trio.move_on_after(0.5):
            await b.wait()
        before = a.statistics().wakeups
        with trio.move_on_after(0.3):
            await b.wait()
        assert a.statistics().wakeups == before < 6


async def test_a_backlog_is_told(directory: str) -> None:
    """The owner hears of messages that pile up for a peer that takes none."""
    told: list[tuple[str, int]] = []
    async with open_endpoint(Identity("a", 1), directory, b"k" * 16, LamportClock(), refuse_none) as a:
        a.on_backlog = lambda node, waiting: told.append((node, waiting))
        for n in range(WINDOW + 2 * BACKLOG_NOTICE):
            a.send("ghost", Ring(n))
    assert told == [("ghost", BACKLOG_NOTICE), ("ghost", 2 * BACKLOG_NOTICE)]
