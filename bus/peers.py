"""Peers: all links of one process, and the gate that every frame passes before it reaches one.

Membership decides who is spoken with: a record (node, incarnation, state) of the launcher makes, replaces or ends a
link. Pure like `bus.link`: frames come in as bytes, frames to transmit collect in `Peers.outbox`, time is passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable

from bus.link import NEVER, Completion, Crowded, Delivery, Identity, Link, Outbox, Refusal
from bus.messages import MAX_FRAME, Body, Envelope, decode
from bus.seal import Seal

Admit = Callable[[str, Body], Refusal | None]
"""Whether a message may come from that node, and can be meant."""

MEMBER_STATES = ("online", "offline", "dead")


class Peers:
    """The links of `own`. `admit`, if given, is asked about every message.

    A link exists from the first `member` record of its peer's incarnation, or from the first `send` to a node that no
    record has named yet, which is taken for incarnation 1. Nodes that are expected may speak first.
    """

    def __init__(self, own: Identity, key: bytes, admit: Admit | None = None) -> None:
        self.own = own
        self._seal = Seal(key)
        self._admit = admit
        self.outbox: Outbox = []
        self.crowded: Crowded = []
        self.refused: dict[str, int] = {}
        self.delivered = 0
        self.due = NEVER
        self.deliverable: deque[tuple[Link, Envelope]] = deque()
        self._expected: frozenset[str] = frozenset()
        self._current: dict[str, Link] = {}
        self._every: dict[str, Link] = {}
        self._active: list[Link] = []
        self._in_hand: list[Link] = []

    def expect(self, nodes: Iterable[str]) -> None:
        """These nodes are online in incarnation 1; their links are made when they are needed."""
        self._expected = frozenset(nodes) - {self.own.node}

    def member(self, node: str, incarnation: int, state: str) -> list[str]:
        """Apply a membership record; returns the ids of the messages that now complete as dead.

        A newer incarnation ends the link of the older one. A record of an older incarnation changes nothing.
        """
        if state not in MEMBER_STATES:
            raise ValueError(f"member state {state!r} is not one of {', '.join(MEMBER_STATES)}")
        lost: list[str] = []
        link = self._current.get(node)
        if link is None or incarnation > link.peer.incarnation:
            if link is not None:
                lost = link.end()
            link = self._create(Identity(node, incarnation))
        if state == "dead" and incarnation == link.peer.incarnation:
            lost += link.end()
        return lost

    def incarnation(self, node: str) -> int | None:
        """The incarnation that is spoken with now; None if there is no link or it is dead."""
        link = self._current.get(node)
        return None if link is None or link.ended else link.peer.incarnation

    def _create(self, peer: Identity) -> Link:
        link = Link(self.own, peer, self._seal, self.outbox, self.crowded)
        self._current[peer.node] = link
        self._every[link.outward] = link
        return link

    def send(self, node: str, body: Body, clock: int, now: int) -> str:
        """Send `body`, stamped with Lamport time `clock`; returns the message id.

        Raises `ValueError` if it is too long, `BacklogError` if too many wait for this peer.
        """
        link = self._current.get(node)
        if link is None:
            link = self._create(Identity(node, 1))
        message_id = link.send(body, clock, now)
        self._note(link)
        return message_id

    def receive(self, frame: bytes | memoryview, now: int) -> Refusal | None:
        """Take in one frame; what becomes deliverable waits for `hand_over`. A refused frame changes nothing."""
        refusal = self._receive(frame, now)
        if refusal is not None:
            self._count(refusal)
        return refusal

    def _receive(self, frame: bytes | memoryview, now: int) -> Refusal | None:
        if len(frame) > MAX_FRAME:
            return Refusal.OVERSIZED
        content = self._seal.open(frame)
        if content is None:
            return Refusal.STRANGER
        try:
            envelope = decode(content)
        except ValueError:
            return Refusal.UNDECODABLE
        if envelope.target != self.own.node or envelope.target_incarnation != self.own.incarnation:
            return Refusal.MISADDRESSED
        link = self._current.get(envelope.source)
        if link is None and envelope.source in self._expected:
            link = self._create(Identity(envelope.source, 1))
        if link is None or envelope.source_incarnation > link.peer.incarnation:
            return Refusal.UNKNOWN_INCARNATION
        if envelope.source_incarnation < link.peer.incarnation:
            return Refusal.STALE_INCARNATION
        if link.ended:
            return Refusal.DEAD_INCARNATION
        if self._admit is not None and envelope.body is not None:
            refusal = self._admit(envelope.source, envelope.body)
            if refusal is not None:
                return refusal
        if not link.receive(envelope, now, self.deliverable):
            return Refusal.INCONSISTENT
        self._note(link)
        return None

    def _count(self, refusal: Refusal) -> None:
        self.refused[refusal] = self.refused.get(refusal, 0) + 1

    def _note(self, link: Link) -> None:
        due = link.due
        if due < NEVER:
            if not link.active:
                link.active = True
                self._active.append(link)
            if due < self.due:
                self.due = due

    def hand_over(self, limit: int, now: int) -> list[Delivery]:
        """Up to `limit` messages, in order per link. Nothing of an incarnation that is dead by now."""
        deliverable = self.deliverable
        batch: list[Delivery] = []
        while deliverable and len(batch) < limit:
            link, envelope = deliverable.popleft()
            if link.ended:
                self._count(Refusal.DEAD_INCARNATION)
                continue
            sequence, body = envelope.sequence, envelope.body
            assert body is not None
            if link.handed_over(sequence, now):
                self._in_hand.append(link)
                self._note(link)
            batch.append(Delivery(f"{link.inward}:{sequence}", link.peer, envelope.clock, body))
        self.delivered += len(batch)
        return batch

    def take(self) -> None:
        """The owner came back: what `hand_over` returned before has been taken."""
        for link in self._in_hand:
            link.take()
        self._in_hand.clear()

    def take_unseen(self, now: int) -> None:
        """Let what is deliverable, but not handed over, be acknowledged as if it were taken."""
        for link, envelope in self.deliverable:
            if not link.ended and link.handed_over(envelope.sequence, now):
                self._in_hand.append(link)
                self._note(link)
        self.take()

    def tick(self, now: int) -> None:
        """Do what is due; call it at time `due` or later."""
        for link in self._active:
            if link.due <= now:
                link.tick(now)
            link.active = link.due < NEVER
        self._active = [link for link in self._active if link.active]
        self.due = min((link.due for link in self._active), default=NEVER)

    def report_gaps(self, now: int) -> None:
        """Tell the peers which frames are missing, if what was just received shows that."""
        if self.due <= now:
            for link in self._active:
                link.report_gap(now)

    def retry(self, now: int) -> None:
        """The channel has changed: resend soon, however long peers have been silent."""
        for link in self._active:
            link.retry(now)
            self._note(link)

    def settle(self) -> None:
        """Transmit every acknowledgement that is owed: the process is about to leave."""
        for link in self._current.values():
            if link.owes:
                link.acknowledge()

    def completion(self, message_id: str) -> Completion:
        """What became of a message sent from here; `KeyError` if `message_id` was never given out."""
        outward, _, number = message_id.rpartition(":")
        link = self._every[outward]
        if not 0 < int(number) <= link.sent:
            raise KeyError(message_id)
        if int(number) <= link.acknowledged:
            return Completion.ACKNOWLEDGED
        return Completion.DEAD if link.ended else Completion.PENDING

    @property
    def unacknowledged(self) -> int:
        """Messages that are neither acknowledged nor dead."""
        return sum(link.sent - link.acknowledged for link in self._active if not link.ended)

    def pending(self, nodes: Collection[str]) -> int:
        """Messages to these nodes that are neither acknowledged nor dead."""
        links = (link for link in self._active if link.peer.node in nodes and not link.ended)
        return sum(link.sent - link.acknowledged for link in links)

    def oldest(self, now: int) -> int:
        """Nanoseconds that the oldest message on the wire has waited for its acknowledgement; 0 if none waits."""
        return max((link.oldest(now) for link in self._active), default=0)

    def total(self, counter: str) -> int:
        """Sum of a counter of `Link` over all links, ended ones too."""
        return sum(getattr(link, counter) for link in self._every.values())

    @property
    def dead(self) -> int:
        """Messages that completed as dead."""
        return sum(link.sent - link.acknowledged for link in self._every.values() if link.ended)
