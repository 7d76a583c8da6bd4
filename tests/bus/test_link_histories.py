"""Random histories of three processes that talk, over a bad channel, while processes die and are replaced.

The model knows what every incarnation sent, took and was told by the launcher. The protocol must agree with it after
every step, and bring everything to its end once the channel has become good.
"""

from __future__ import annotations

from collections import defaultdict, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.link import (
    ACK_DELAY,
    ACK_EVERY,
    GAP_AGAIN,
    NEVER,
    RESEND_AFTER,
    RESEND_AT_MOST,
    Completion,
    Identity,
    Refusal,
)
from bus.messages import Ring, decode
from bus.peers import Peers
from bus.seal import SEAL_SIZE

KEY = b"k" * 16
NODES = ("a", "b", "c")
PASSED = (1, GAP_AGAIN, ACK_DELAY, RESEND_AFTER, RESEND_AT_MOST)

nodes = st.sampled_from(NODES)


class Process:
    """One incarnation: its end of the links, and what the model knows of it."""

    def __init__(self, node: str, incarnation: int) -> None:
        self.node = node
        self.identity = Identity(node, incarnation)
        self.peers = Peers(self.identity, KEY)
        self.alive = True
        self.news: deque[tuple[str, int, str]] = deque()  # what the launcher told it and it has not heard yet
        self.known: dict[str, tuple[int, str]] = {}
        self.sent: dict[Identity, list[int]] = defaultdict(list)  # words, by whom they were meant for
        self.ids: dict[Identity, list[str]] = defaultdict(list)
        self.acknowledged: dict[Identity, int] = defaultdict(int)  # how many of these, the first ones
        self.dead: set[str] = set()  # ids that are complete as dead
        self.heard: dict[Identity, list[int]] = defaultdict(list)
        self.taken: dict[Identity, int] = defaultdict(int)  # how many may be acknowledged

    def hear(self, node: str, incarnation: int, state: str) -> None:
        """Apply a record; what is lost with it was not complete before, and is now."""
        peer = self.peer(node) if node in self.known else None
        lost = self.peers.member(node, incarnation, state)
        assert len(set(lost)) == len(lost) and not self.dead & set(lost)
        open_before = [] if peer is None else self.ids[peer][self.acknowledged[peer] :]
        assert set(lost) <= set(open_before)
        self.known[node] = (incarnation, state)
        self.dead.update(lost)
        if peer is not None and (peer.incarnation < incarnation or state == "dead"):
            assert self.dead.issuperset(open_before)

    def came_back(self) -> None:
        """Its owner has taken all that it was handed."""
        for peer, words in self.heard.items():
            self.taken[peer] = max(self.taken[peer], len(words))

    def peer(self, node: str) -> Identity:
        """The incarnation of a node that it speaks with."""
        return Identity(node, self.known[node][0])

    def refusal(self, source: str, source_incarnation: int, target: Identity) -> Refusal | None:
        """What must become of a frame with this envelope."""
        incarnation, state = self.known[source]
        if target != self.identity:
            return Refusal.MISADDRESSED
        if source_incarnation != incarnation:
            newer = source_incarnation > incarnation
            return Refusal.UNKNOWN_INCARNATION if newer else Refusal.STALE_INCARNATION
        return Refusal.DEAD_INCARNATION if state == "dead" else None


class BadBus(RuleBasedStateMachine):
    """Any mix of drop, duplicate, delay, reorder, reconnect, partition, death and new incarnation."""

    @initialize()
    def connect(self) -> None:
        self.now = 0
        self.words = 0
        self.wire: list[tuple[str, str, bytes]] = []  # from, to, frame
        self.parted: set[tuple[str, str]] = set()
        self.every = [Process(node, 1) for node in NODES]
        self.last = {process.node: process for process in self.every}
        for process in self.every:
            for other in NODES:
                if other != process.node:
                    process.hear(other, 1, "online")

    def put(self, process: Process) -> None:
        """What a process puts out is on the wire, unless it is cut."""
        for target, frame in process.peers.outbox:
            if (process.node, target) not in self.parted:
                self.wire.append((process.node, target, frame))
        process.peers.outbox.clear()

    def receive(self, target: str, frame: bytes) -> None:
        process, envelope = self.last[target], decode(frame[SEAL_SIZE:])
        if process.alive:
            meant = Identity(envelope.target, envelope.target_incarnation)
            expected = process.refusal(envelope.source, envelope.source_incarnation, meant)
            assert process.peers.receive(frame, self.now) is expected
            process.peers.report_gaps(self.now)
            self.put(process)

    # What processes do

    @rule(node=nodes, other=nodes, count=st.integers(1, ACK_EVERY + 10))
    def send(self, node: str, other: str, count: int) -> None:
        process = self.last[node]
        if not process.alive or node == other:
            return
        peer = process.peer(other)
        for _ in range(count):
            self.words += 1
            message_id = process.peers.send(other, Ring(self.words), 0, self.now)
            process.sent[peer].append(self.words)
            process.ids[peer].append(message_id)
            if process.known[other][1] == "dead":
                process.dead.add(message_id)
        self.put(process)

    @rule(node=nodes, limit=st.integers(1, 200))
    def drain(self, node: str, limit: int) -> None:
        process = self.last[node]
        if not process.alive:
            return
        process.came_back()
        process.peers.take()
        for delivery in process.peers.hand_over(limit, self.now):
            assert isinstance(delivery.body, Ring)
            process.heard[delivery.source].append(delivery.body.word)
            assert process.known[delivery.source.node] == (delivery.source.incarnation, "online")
        self.put(process)

    @rule(node=nodes)
    def take_unseen(self, node: str) -> None:
        process = self.last[node]
        if process.alive:
            process.came_back()
            for link, envelope in process.peers.deliverable:
                process.taken[link.peer] = max(process.taken[link.peer], envelope.sequence)
            process.peers.take_unseen(self.now)
            self.put(process)

    @rule(node=nodes, passed=st.sampled_from(PASSED))
    def wait(self, node: str, passed: int) -> None:
        self.now += passed
        process = self.last[node]
        if process.alive:
            process.came_back()
            process.peers.tick(self.now)
            self.put(process)

    # What the channel does

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), copies=st.integers(0, 2), count=st.integers(1, 60))
    def deliver(self, data: st.DataObject, copies: int, count: int) -> None:
        """Frames arrive not at all, once or twice, and out of order."""
        for _ in range(min(count, len(self.wire))):
            _, target, frame = self.wire.pop(data.draw(st.integers(0, min(9, len(self.wire) - 1))))
            for _ in range(copies):
                self.receive(target, frame)

    @precondition(lambda self: self.wire)
    @rule(count=st.integers(1, 200))
    def deliver_well(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            _, target, frame = self.wire.pop(0)
            self.receive(target, frame)

    @rule(node=nodes, other=nodes)
    def reconnect(self, node: str, other: str) -> None:
        """A socket is closed with all that is in it."""
        self.wire = [one for one in self.wire if one[:2] != (node, other)]

    @rule(node=nodes, other=nodes, both=st.booleans())
    def part(self, node: str, other: str, both: bool) -> None:
        self.parted |= {(node, other), (other, node)} if both else {(node, other)}

    @rule()
    def heal(self) -> None:
        self.parted.clear()
        for process in self.last.values():
            if process.alive:
                process.peers.retry(self.now)

    # Death and birth

    def publish(self, process: Process, state: str) -> None:
        for other in self.last.values():
            if other.alive and other is not process:
                other.news.append((process.node, process.identity.incarnation, state))

    @rule(node=nodes, published=st.booleans())
    def kill(self, node: str, published: bool) -> None:
        """A death that is not published is told by the next incarnation, or at the end."""
        process = self.last[node]
        if process.alive:
            process.alive = False
            if published:
                self.publish(process, "dead")

    @rule(node=nodes)
    def start(self, node: str) -> None:
        """A fresh process is told what the launcher knows."""
        old = self.last[node]
        if old.alive:
            return
        process = self.last[node] = Process(node, old.identity.incarnation + 1)
        self.every.append(process)
        self.publish(process, "online")
        for name, other in self.last.items():
            if name != node:
                process.hear(name, other.identity.incarnation, "online" if other.alive else "dead")

    @rule(node=nodes, count=st.integers(1, 4))
    def hear(self, node: str, count: int) -> None:
        process = self.last[node]
        for _ in range(min(count, len(process.news)) if process.alive else 0):
            process.hear(*process.news.popleft())

    # What must hold

    @invariant()
    def in_order_and_once(self) -> None:
        """What an incarnation took from another is what that one sent to it, from the first on, without a gap."""
        for process in self.every:
            for source in self.every:
                words = process.heard[source.identity]
                assert words == source.sent[process.identity][: len(words)]

    @invariant()
    def acknowledged_is_taken(self) -> None:
        """Acknowledgements come in order, are true, and are never taken back; nothing else is complete but by death."""
        for process in self.every:
            if not process.alive:
                continue
            for peer, ids in process.ids.items():
                count = process.acknowledged[peer]
                while count < len(ids) and process.peers.completion(ids[count]) is Completion.ACKNOWLEDGED:
                    assert ids[count] not in process.dead
                    count += 1
                process.acknowledged[peer] = count
                target = next(one for one in self.every if one.identity == peer)
                assert count <= target.taken[process.identity]
                assert {process.peers.completion(one) for one in ids[:count]} <= {Completion.ACKNOWLEDGED}
                rest = [process.peers.completion(one) is Completion.DEAD for one in ids[count:]]
                assert rest == [one in process.dead for one in ids[count:]]

    def teardown(self) -> None:
        """Over a channel that has become good everything arrives, everyone is told, and all come to rest."""
        if not hasattr(self, "last"):
            return
        self.wire.clear()
        self.heal()
        for node in NODES:
            self.drain(node, 10_000)
        alive = [process for process in self.last.values() if process.alive]
        for process in self.last.values():
            if not process.alive:
                self.publish(process, "dead")
        for process in alive:
            self.hear(process.node, len(process.news))
        for _ in range(400):
            if self.wire == [] and all(process.peers.due == NEVER for process in alive):
                break
            for process in alive:
                self.wait(process.node, RESEND_AT_MOST)
            self.deliver_well(len(self.wire))
            for process in alive:
                self.drain(process.node, 10_000)
        for process in alive:
            for other in alive:
                assert process.heard[other.identity] == other.sent[process.identity]
            assert (process.peers.unacknowledged, process.peers.due) == (0, NEVER)
        self.in_order_and_once()
        self.acknowledged_is_taken()


BadBus.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, derandomize=True, deadline=None, database=None
)
TestBadBus = BadBus.TestCase
