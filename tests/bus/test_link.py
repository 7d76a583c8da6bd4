"""The protocol of the links, rule by rule: numbering, acknowledgement, gaps, resend, membership."""

import msgspec
import pytest

from bus.link import (
    ACK_DELAY,
    ACK_EVERY,
    BACKLOG_LIMIT,
    BACKLOG_NOTICE,
    GAP_AGAIN,
    NEVER,
    RESEND_AFTER,
    RESEND_AT_MOST,
    RESEND_BURST,
    WINDOW,
    BacklogError,
    Completion,
    Identity,
    Refusal,
)
from bus.messages import MAX_FRAME, MAX_MISSING, Envelope, Query, Ring, Waits, decode, encode
from bus.peers import Peers
from bus.seal import SEAL_SIZE, Seal

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


def frame(key: bytes = KEY, **changes: object) -> bytes:
    """A good first frame from a to b, with changes."""
    good = Envelope("a", 1, "b", 1, 1, 0, 5, Query())
    return Seal(key).close(encode(msgspec.structs.replace(good, **changes)))


def opened(frame: bytes) -> Envelope:
    """What is in a frame."""
    return decode(frame[SEAL_SIZE:])


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


def sequences(frames: list[bytes]) -> list[int]:
    """Which messages these frames carry."""
    return [opened(one).sequence for one in frames]


def lossy(a: Peers, b: Peers, lost: set[int], now: int = 0) -> None:
    """Bring over what a puts out, but the messages `lost`; let b report what it misses."""
    for one in taken(a):
        if opened(one).sequence not in lost:
            b.receive(one, now)
    b.report_gaps(now)


def test_a_loss_under_traffic_costs_a_round_trip() -> None:
    """The frames behind the gap show it, the report names what is missing, exactly that comes again; no time passes."""
    a, b = pair()
    for n in range(1, 10):
        a.send("b", Ring(n), 0, 0)
    lossy(a, b, {3, 5, 6})
    (report,) = taken(b)
    assert (opened(report).sequence, opened(report).missing) == (0, (3, 5, 6))
    a.receive(report, 1)
    again = taken(a)
    assert sequences(again) == [3, 5, 6]
    for one in again:
        b.receive(one, 1)
    assert words(b) == list(range(1, 10))
    assert a.total("resent") == 3
    b.take()
    b.tick(ACK_DELAY)
    carry(b, a)
    for peers in (a, b):
        peers.tick(RESEND_AFTER)
        assert peers.due == NEVER


def test_a_gap_is_reported_once_and_then_again_after_a_while() -> None:
    """More frames behind the same gap report nothing; time does, at doubling intervals, for a while."""
    a, b = pair()
    for n in range(1, 4):
        a.send("b", Ring(n), 0, 0)
    lossy(a, b, {1})
    assert len(taken(b)) == 1
    a.send("b", Ring(4), 0, 0)
    lossy(a, b, set())
    assert taken(b) == []
    at, times = 0, []
    while b.due < NEVER:
        at = b.due
        b.tick(at)
        if frames := taken(b):
            times.append(at)
            assert [opened(one).missing for one in frames] == [(1,)]
    assert times == [GAP_AGAIN * (2**n - 1) for n in range(1, 6)]
    assert times[-1] > RESEND_AFTER


def test_a_new_gap_is_reported_at_once() -> None:
    """A second loss behind the first does not wait, and the report names both."""
    a, b = pair()
    for n in range(1, 7):
        a.send("b", Ring(n), 0, 0)
    frames = taken(a)
    b.receive(frames[1], 0)
    b.report_gaps(0)
    assert [opened(one).missing for one in taken(b)] == [(1,)]
    b.receive(frames[5], 0)
    b.report_gaps(0)
    assert [opened(one).missing for one in taken(b)] == [(1, 3, 4, 5)]


def test_a_frame_comes_early_again_only_after_a_while() -> None:
    """Reports that come twice, or late, or about what was acknowledged since, cost nothing."""
    a, b = pair()
    for n in range(1, 4):
        a.send("b", Ring(n), 0, 0)
    lossy(a, b, {2})
    (report,) = taken(b)
    for now, count in ((1, 1), (2, 0), (GAP_AGAIN, 0), (GAP_AGAIN + 1, 1), (GAP_AGAIN + 2, 0)):
        a.receive(report, now)
        again = taken(a)
        assert len(again) == count
    b.receive(again[0] if again else frame(sequence=2, body=Ring(2)), now)
    words(b)
    b.take()
    b.tick(ACK_DELAY)
    carry(b, a, now)
    assert a.unacknowledged == 0
    a.receive(report, 3 * GAP_AGAIN)
    assert a.outbox == []


def test_time_does_not_repeat_what_a_report_has_just_brought() -> None:
    """The resend of all that is overdue leaves out what went early a moment ago."""
    a, b = pair()
    for n in range(1, 4):
        a.send("b", Ring(n), 0, 0)
    lossy(a, b, {2})
    carry(b, a, RESEND_AFTER - 1)
    assert sequences(taken(a)) == [2]
    a.tick(RESEND_AFTER)
    assert sequences(taken(a)) == [1, 3]


def test_a_report_names_no_more_than_a_frame_may() -> None:
    """Of many missing frames the first ones; the rest when these have come."""
    a, b = pair()
    for n in range(WINDOW):
        a.send("b", Ring(n), 0, 0)
    lossy(a, b, set(range(1, WINDOW)))
    for _ in range(WINDOW // MAX_MISSING):
        (report,) = taken(b)
        a.receive(report, b.due)
        again = taken(a)
        assert len(again) <= MAX_MISSING
        for one in again:
            b.receive(one, b.due)
        while b.due < NEVER and not b.outbox:
            b.tick(b.due)
    assert words(b) == list(range(WINDOW))


def test_a_gap_report_acknowledges_only_what_was_taken() -> None:
    """What the owner has in hand when a gap shows is acknowledged later, by time, as ever."""
    a, b = pair()
    for n in range(1, 4):
        a.send("b", Ring(n), 0, 0)
    frames = taken(a)
    b.receive(frames[0], 0)
    assert words(b) == [1]
    b.receive(frames[2], 0)
    b.report_gaps(0)
    carry(b, a)
    assert a.unacknowledged == 3
    b.tick(ACK_DELAY)
    carry(b, a)
    assert a.unacknowledged == 2


def test_a_changed_channel_is_tried_soon() -> None:
    """After a silence that has stretched the intervals, `retry` brings the next resend, with all that is overdue."""
    a, _ = pair()
    for n in range(5):
        a.send("b", Ring(n), 0, 0)
    for _ in range(8):
        a.tick(a.due)
    now = a.due - RESEND_AT_MOST + RESEND_AFTER // 2
    taken(a)
    a.retry(now)
    assert a.due == now + RESEND_AFTER // 2
    a.tick(a.due)
    assert sequences(taken(a)) == [1, 2, 3, 4, 5]


def test_a_backlog_is_noticed_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices at 4096 waiting messages and each doubling; at the limit an error, and the message has no number."""
    limit = 5 * BACKLOG_NOTICE
    assert limit < BACKLOG_LIMIT
    monkeypatch.setattr("bus.link.BACKLOG_LIMIT", limit)
    a, _ = pair()
    for n in range(WINDOW + limit):
        a.send("b", Ring(n), 0, 0)
    assert a.crowded == [("b", BACKLOG_NOTICE << n) for n in range(3)]
    with pytest.raises(BacklogError, match=r"20,480 messages wait on the link a\.1>b\.1"):
        a.send("b", Ring(0), 0, 0)
    assert a.total("sent") == WINDOW + limit
    assert a.send("c", Ring(0), 0, 0) == "a.1>c.1:1"
    assert len(a.member("b", 1, "dead")) == WINDOW + limit
    a.send("b", Ring(0), 0, 0)


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
    assert [opened(f).sequence for f in taken(b)] == [0]
    for n in range(ACK_EVERY):
        a.send("b", Ring(n), 0, 0)
    carry(a, b)
    words(b)
    assert b.outbox == []
    b.take()
    assert [opened(f).acknowledged for f in taken(b)] == [1 + ACK_EVERY]


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
        (b"", Refusal.STRANGER),
        (b"GET / HTTP/1.1", Refusal.STRANGER),
        (b"\x91" * 5000, Refusal.STRANGER),
        (frame()[:-1], Refusal.STRANGER),
        (frame().replace(b"query", b"start"), Refusal.STRANGER),
        (frame()[:SEAL_SIZE], Refusal.STRANGER),
        (frame(key=b"x" * 16), Refusal.STRANGER),
        (Seal(KEY).close(encode(Envelope("a", 1, "b", 1, 1, 0, 5))[:-1]), Refusal.UNDECODABLE),
        (Seal(KEY).close(b"\x91" * 60_000), Refusal.UNDECODABLE),
        (frame(target="c"), Refusal.MISADDRESSED),
        (frame(target_incarnation=2), Refusal.MISADDRESSED),
        (frame(source="c"), Refusal.UNKNOWN_INCARNATION),
        (frame(source_incarnation=2), Refusal.UNKNOWN_INCARNATION),
        (frame(source_incarnation=0), Refusal.STALE_INCARNATION),
        (frame(acknowledged=1), Refusal.INCONSISTENT),
        (frame(sequence=WINDOW + 1), Refusal.INCONSISTENT),
        (frame(sequence=0), Refusal.INCONSISTENT),
        (frame(body=None), Refusal.INCONSISTENT),
        (frame(missing=(1,)), Refusal.INCONSISTENT),
        (frame(sequence=0, body=None, missing=(1,)), Refusal.INCONSISTENT),
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
