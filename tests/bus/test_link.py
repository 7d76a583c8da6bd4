"""The protocol of the links: numbering, acknowledgement, resend, membership, and a channel that misbehaves."""

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus.link import (
    ACK_DELAY,
    ACK_EVERY,
    NEVER,
    RESEND_AFTER,
    RESEND_AT_MOST,
    RESEND_BURST,
    WINDOW,
    Completion,
    Identity,
    Refusal,
)
from bus.messages import MAX_FRAME, Envelope, Query, Ring, Waits, decode, encode
from bus.peers import Peers

KEY = b"k" * 16
A, B = Identity("a", 1), Identity("b", 1)


def pair() -> tuple[Peers, Peers]:
    """Two ends that know each other."""
    a, b = Peers(A, KEY), Peers(B, KEY)
    a.member("b", 1, "online")
    b.member("a", 1, "online")
    return a, b


def taken(peers: Peers) -> list[bytes]:
    """The frames that an end put out since the last call."""
    frames = [frame for _, frame in peers.outbox]
    peers.outbox.clear()
    return frames


def carry(source: Peers, target: Peers, now: int = 0) -> list[Refusal | None]:
    """Bring every frame over."""
    return [target.receive(frame, now) for frame in taken(source)]


def words(peers: Peers, limit: int = 10_000, now: int = 0) -> list[int]:
    """What is handed over, as the numbers in `Ring`."""
    return [delivery.body.word for delivery in peers.hand_over(limit, now) if isinstance(delivery.body, Ring)]


def frame(**changes: object) -> bytes:
    """A good first frame from a to b, with changes."""
    good = Envelope(KEY, "a", 1, "b", 1, 1, 0, 5, Query())
    return encode(msgspec.structs.replace(good, **changes))


def test_a_message_arrives_with_its_id_source_and_clock() -> None:
    """A delivery names the message as the sender does."""
    a, b = pair()
    message_id = a.send("b", Ring(7), 41, 0)
    assert carry(a, b) == [None]
    (delivery,) = b.hand_over(10, 0)
    assert message_id == delivery.id == "a.1>b.1:1"
    assert (delivery.source, delivery.clock, delivery.body) == (A, 41, Ring(7))


def test_reordered_and_repeated_frames_are_delivered_once_in_order() -> None:
    """The reorder buffer fills gaps and drops what came before."""
    a, b = pair()
    for n in range(5):
        a.send("b", Ring(n), 0, 0)
    frames = taken(a)
    for n in (3, 1, 3, 4):
        b.receive(frames[n], 0)
    assert words(b) == []
    for n in (0, 0, 2, 1):
        b.receive(frames[n], 0)
    assert words(b) == [0, 1, 2, 3, 4]
    assert (b.total("duplicates"), b.total("reordered")) == (3, 3)


def test_handing_over_is_not_acknowledging() -> None:
    """A reply carries the acknowledgement of a message only after the owner came back for more."""
    a, b = pair()
    message_id = a.send("b", Ring(0), 0, 0)
    carry(a, b)
    assert words(b) == [0]
    b.send("a", Ring(1), 0, 0)
    carry(b, a)
    assert a.completion(message_id) is Completion.PENDING
    b.take()
    b.send("a", Ring(2), 0, 0)
    carry(b, a)
    assert a.completion(message_id) is Completion.ACKNOWLEDGED


def test_an_acknowledgement_waits_for_company() -> None:
    """It travels alone only after its delay, or at once when enough messages were taken."""
    a, b = pair()
    a.send("b", Ring(0), 0, 0)
    carry(a, b)
    words(b, now=100)
    b.take()
    b.tick(100 + ACK_DELAY - 1)
    assert b.outbox == []
    assert b.due == 100 + ACK_DELAY
    b.tick(b.due)
    assert [decode(f).sequence for f in taken(b)] == [0]
    for n in range(ACK_EVERY):
        a.send("b", Ring(n), 0, 0)
    carry(a, b)
    words(b)
    assert b.outbox == []
    b.take()
    assert [decode(f).acknowledged for f in taken(b)] == [1 + ACK_EVERY]


def test_reverse_traffic_carries_the_acknowledgement() -> None:
    """After a reply nothing is owed and nothing is due but the reply's own resend."""
    a, b = pair()
    a.send("b", Ring(0), 0, 0)
    carry(a, b)
    words(b)
    b.take()
    b.send("a", Ring(1), 0, 0)
    b.tick(ACK_DELAY)
    assert carry(b, a) == [None]
    assert a.unacknowledged == 0
    assert b.due == RESEND_AFTER


def test_an_idle_table_has_nothing_due() -> None:
    """When all is acknowledged no timer remains."""
    a, b = pair()
    a.send("b", Ring(0), 0, 0)
    carry(a, b)
    words(b)
    b.take()
    b.tick(ACK_DELAY)
    carry(b, a)
    for peers in (a, b):
        peers.tick(RESEND_AFTER)
        assert peers.due == NEVER


def test_resends_back_off_and_never_end() -> None:
    """A silent peer is tried at doubling intervals for ever, after the first time with one frame only."""
    a, _ = pair()
    for n in range(RESEND_BURST + 6):
        a.send("b", Ring(n), 0, 0)
    taken(a)
    intervals, counts, now = [], [], 0
    for _ in range(40):
        intervals.append(a.due - now)
        now = a.due
        a.tick(now)
        counts.append(len(taken(a)))
    assert intervals[:5] == [RESEND_AFTER << n for n in range(5)]
    assert set(intervals[5:]) == {RESEND_AT_MOST}
    assert counts == [RESEND_BURST] + [1] * 39


def test_recovery_does_not_wait_for_the_backoff() -> None:
    """As soon as the peer is heard again, the next overdue frames follow at once."""
    a, b = pair()
    for n in range(3 * RESEND_BURST):
        a.send("b", Ring(n), 0, 0)
    taken(a)
    now = 0
    for _ in range(6):
        now = a.due
        a.tick(now)
        frames = taken(a)
    for _ in range(4):
        for one in frames:
            b.receive(one, now)
        words(b)
        b.take()
        b.tick(now + ACK_DELAY)
        carry(b, a, now)
        a.tick(now)
        frames = taken(a)
    assert a.unacknowledged == 0


def test_the_window_bounds_what_is_on_the_wire() -> None:
    """Messages beyond the window wait, and go out in order as acknowledgements come in."""
    a, b = pair()
    for n in range(2 * WINDOW + 10):
        a.send("b", Ring(n), 0, 0)
    assert len(a.outbox) == WINDOW
    seen: list[int] = []
    while a.outbox:
        carry(a, b)
        seen += words(b)
        b.take()
        b.tick(ACK_DELAY)
        carry(b, a)
    assert seen == list(range(2 * WINDOW + 10))


def test_full_windows_both_ways_do_not_hold_acknowledgements_back() -> None:
    """A frame that waits for the window carries nothing to the peer, so the acknowledgement goes alone."""
    a, b = pair()
    for n in range(WINDOW):
        a.send("b", Ring(n), 0, 0)
        b.send("a", Ring(n), 0, 0)
    carry(a, b)
    words(b, 10)
    b.take()
    b.send("a", Ring(0), 0, 0)
    b.tick(ACK_DELAY)
    carry(b, a)
    assert a.unacknowledged == WINDOW - 10


def test_a_reply_does_not_cancel_the_acknowledgement_that_is_still_to_come() -> None:
    """The message in hand is acknowledged by the timer although its owner never came back for more."""
    a, b = pair()
    a.send("b", Ring(0), 0, 0)
    carry(a, b)
    words(b)
    b.send("a", Ring(1), 0, 5)
    b.tick(5 + ACK_DELAY)
    carry(b, a)
    assert a.unacknowledged == 0


def test_a_lost_acknowledgement_is_repeated_when_its_message_comes_again() -> None:
    """A duplicate is answered at once, even if nothing new was taken."""
    a, b = pair()
    a.send("b", Ring(0), 0, 0)
    carry(a, b)
    words(b)
    b.tick(ACK_DELAY)
    taken(b)
    a.tick(RESEND_AFTER)
    carry(a, b, RESEND_AFTER)
    assert b.due == RESEND_AFTER
    b.tick(RESEND_AFTER)
    carry(b, a)
    assert a.unacknowledged == 0


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"\x00" * (MAX_FRAME + 1), Refusal.OVERSIZED),
        (b"", Refusal.UNDECODABLE),
        (b"GET / HTTP/1.1", Refusal.UNDECODABLE),
        (b"\x91" * 5000, Refusal.UNDECODABLE),
        (frame()[:-1], Refusal.UNDECODABLE),
        (frame().replace(b"query", b"quern"), Refusal.UNDECODABLE),
        (frame(key=b"x" * 16), Refusal.STRANGER),
        (frame(target="c"), Refusal.MISADDRESSED),
        (frame(target_incarnation=2), Refusal.MISADDRESSED),
        (frame(source="c"), Refusal.UNKNOWN_INCARNATION),
        (frame(source_incarnation=2), Refusal.UNKNOWN_INCARNATION),
        (frame(source_incarnation=0), Refusal.STALE_INCARNATION),
        (frame(acknowledged=1), Refusal.INCONSISTENT),
        (frame(sequence=WINDOW + 1), Refusal.INCONSISTENT),
        (frame(sequence=0), Refusal.INCONSISTENT),
        (frame(body=None), Refusal.INCONSISTENT),
    ],
)
def test_a_bad_frame_is_refused_whole(data: bytes, refusal: Refusal) -> None:
    """Each kind is counted under its reason, and the good frame is still accepted after it."""
    _, b = pair()
    assert b.receive(data, 0) is refusal
    assert b.refused == {refusal: 1}
    assert b.receive(frame(), 0) is None
    assert len(b.hand_over(10, 0)) == 1


def test_a_message_that_is_too_long_is_not_numbered() -> None:
    """`send` raises and the link is as before."""
    a, _ = pair()
    with pytest.raises(ValueError, match="Waits makes a frame"):
        a.send("b", Waits("x" * MAX_FRAME, "", 0), 0, 0)
    assert a.send("b", Query(), 0, 0) == "a.1>b.1:1"


def test_death_completes_what_was_not_acknowledged() -> None:
    """Exactly one completion: acknowledged stays, the rest and whatever is sent later is dead."""
    a, b = pair()
    first = a.send("b", Ring(0), 0, 0)
    carry(a, b)
    words(b)
    b.take()
    b.tick(ACK_DELAY)
    carry(b, a)
    second = a.send("b", Ring(1), 0, 0)
    assert a.completion(second) is Completion.PENDING
    assert a.member("b", 1, "dead") == [second]
    taken(a)
    third = a.send("b", Ring(2), 0, 0)
    assert a.outbox == []
    assert [a.completion(one) for one in (first, second, third)] == [
        Completion.ACKNOWLEDGED,
        Completion.DEAD,
        Completion.DEAD,
    ]
    assert (a.unacknowledged, a.dead, a.member("b", 1, "dead")) == (0, 2, [])
    with pytest.raises(KeyError):
        a.completion("a.1>b.1:4")


def test_nothing_is_taken_from_the_dead() -> None:
    """Neither what waits to be handed over nor what still arrives."""
    a, b = pair()
    a.send("b", Ring(0), 0, 0)
    carry(a, b)
    a.send("b", Ring(1), 0, 0)
    b.member("a", 1, "dead")
    assert carry(a, b) == [Refusal.DEAD_INCARNATION]
    b.take_unseen(0)
    assert b.hand_over(10, 0) == []
    assert b.refused == {Refusal.DEAD_INCARNATION: 2}
    b.tick(ACK_DELAY)
    assert b.outbox == []


def test_the_dead_are_told_nothing() -> None:
    """What was in hand when its sender died is taken without an acknowledgement."""
    a, b = pair()
    for n in range(ACK_EVERY):
        a.send("b", Ring(n), 0, 0)
    carry(a, b)
    words(b)
    b.member("a", 1, "dead")
    b.take()
    b.settle()
    b.tick(ACK_DELAY)
    assert b.outbox == []


def test_a_new_incarnation_starts_anew() -> None:
    """Numbers start at 1 again; frames of the old one, from it or to it, are refused."""
    a, b = pair()
    old = a.send("b", Ring(0), 0, 0)
    late = taken(a)[0]
    assert a.member("b", 2, "online") == [old]
    second = Peers(Identity("b", 2), KEY)
    second.member("a", 1, "online")
    assert second.receive(late, 0) is Refusal.MISADDRESSED
    assert a.send("b", Ring(1), 0, 0) == "a.1>b.2:1"
    carry(a, second)
    assert words(second) == [1]
    b.send("a", Ring(9), 0, 0)
    assert carry(b, a) == [Refusal.STALE_INCARNATION]
    assert a.member("b", 1, "dead") == []
    assert a.incarnation("b") == 2


def test_a_send_to_an_unnamed_node_assumes_its_first_incarnation() -> None:
    """The answer of a node that was spoken to is heard before any record names it."""
    a, b = Peers(A, KEY), Peers(B, KEY)
    a.send("b", Ring(0), 0, 0)
    assert carry(a, b) == [Refusal.UNKNOWN_INCARNATION]
    b.send("a", Ring(1), 0, 0)
    assert carry(b, a) == [None]
    a.tick(a.due)
    assert carry(a, b) == [None]
    assert words(b) == [0]


def test_a_node_may_write_to_itself() -> None:
    """A link whose two ends are the same works as any other."""
    a = Peers(A, KEY)
    for n in range(3):
        a.send("a", Ring(n), 0, 0)
    carry(a, a)
    assert words(a) == [0, 1, 2]
    a.take()
    a.tick(ACK_DELAY)
    carry(a, a)
    assert a.unacknowledged == 0


def test_flushing_ends_may_acknowledge_what_they_have_not_handed_over() -> None:
    """`take_unseen` acknowledges, and the messages are still handed over afterwards, and taken once."""
    a, b = pair()
    for n in range(3):
        a.send("b", Ring(n), 0, 0)
    carry(a, b)
    b.take_unseen(0)
    b.tick(ACK_DELAY)
    carry(b, a)
    assert a.unacknowledged == 0
    assert words(b) == [0, 1, 2]
    b.take()
    b.tick(NEVER - 1)
    assert b.outbox == []


def test_leaving_tells_what_is_owed() -> None:
    """`settle` puts out the acknowledgements that still wait for their delay."""
    a, b = pair()
    a.send("b", Ring(0), 0, 0)
    carry(a, b)
    words(b)
    b.take()
    b.settle()
    carry(b, a)
    assert a.unacknowledged == 0


def test_a_misspelt_member_state_or_key_is_an_error() -> None:
    """The launcher's own mistakes are not silent."""
    with pytest.raises(ValueError, match="member state 'Dead'"):
        Peers(A, KEY).member("b", 1, "Dead")
    with pytest.raises(ValueError, match="the key has 3 bytes"):
        Peers(A, b"abc")


class BadChannel(RuleBasedStateMachine):
    """Two ends that talk both ways over a channel that drops, repeats, delays and reorders at will."""

    @initialize()
    def connect(self) -> None:
        self.now = 0
        self.ends = dict(zip("ab", pair(), strict=True))
        self.sent: dict[str, list[int]] = {"a": [], "b": []}
        self.heard: dict[str, list[int]] = {"a": [], "b": []}
        self.wire: list[tuple[str, bytes]] = []

    def put(self, name: str) -> None:
        peers = self.ends[name]
        self.wire += peers.outbox
        peers.outbox.clear()

    @rule(name=st.sampled_from("ab"), count=st.integers(1, ACK_EVERY + 10))
    def send(self, name: str, count: int) -> None:
        other = "b" if name == "a" else "a"
        for _ in range(count):
            number = len(self.sent[name])
            self.ends[name].send(other, Ring(number), 0, self.now)
            self.sent[name].append(number)
        self.put(name)

    @rule(data=st.data(), copies=st.integers(0, 2), count=st.integers(1, 40))
    def deliver(self, data: st.DataObject, copies: int, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            target, one = self.wire.pop(data.draw(st.integers(0, min(9, len(self.wire) - 1))))
            for _ in range(copies):
                assert self.ends[target].receive(one, self.now) is None

    @rule(name=st.sampled_from("ab"), limit=st.integers(1, 100))
    def drain(self, name: str, limit: int) -> None:
        self.ends[name].take()
        self.heard[name] += words(self.ends[name], limit, self.now)
        self.put(name)

    @rule(name=st.sampled_from("ab"), passed=st.sampled_from([1, ACK_DELAY, RESEND_AFTER, RESEND_AT_MOST]))
    def wait(self, name: str, passed: int) -> None:
        self.now += passed
        self.ends[name].tick(self.now)
        self.put(name)

    @invariant()
    def in_order_and_once(self) -> None:
        for name, other in ("ab", "ba"):
            assert self.heard[name] == self.sent[other][: len(self.heard[name])]
            acknowledged = len(self.sent[other]) - self.ends[other].unacknowledged
            assert acknowledged <= len(self.heard[name])

    def teardown(self) -> None:
        """Over a channel that has become good, everything arrives and both ends come to rest."""
        self.wire.clear()
        for _ in range(400):
            self.now += RESEND_AT_MOST
            for name in "ab":
                self.ends[name].tick(self.now)
                self.put(name)
                wire, self.wire = self.wire, []
                for target, one in wire:
                    self.ends[target].receive(one, self.now)
                for end in "ab":
                    self.drain(end, 10_000)
        assert self.heard == {"a": self.sent["b"], "b": self.sent["a"]}
        assert [end.unacknowledged for end in self.ends.values()] == [0, 0]
        assert [end.due for end in self.ends.values()] == [NEVER, NEVER]


BadChannel.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, derandomize=True, deadline=None, database=None
)
TestBadChannel = BadChannel.TestCase
