"""Links: the delivery promise of the bus, as a state machine without sockets or a clock of its own.

A *link* joins one incarnation of this process with one incarnation of a peer, in both directions. On it every message
arrives in order and exactly once in effect, whatever the channel below drops, repeats, delays or reorders: sequence
numbers from 1, cumulative acknowledgement, resend, deduplication, a reorder buffer and a window. No timeout ends a
link; only a membership record does.

A frame that comes before an earlier one shows a *gap*. The receiver reports at once what is missing, and the sender
transmits just that again: a loss under traffic costs about a round trip. If nothing follows the lost frame, or the
report is lost too, time brings it back (`GAP_AGAIN`, then `RESEND_AFTER`).

A message is acknowledged when its owner *took* it: it was handed over, and the owner came back for more, or gave the
timer its turn some time later. So a message that was acknowledged was not merely read by a process that then died.

Times are integers in nanoseconds of any monotonic clock, passed in. Frames to transmit are appended to an outbox that
all links of a process share. `bus.peers` keeps those links.
"""

from __future__ import annotations

import enum
from collections import deque
from itertools import islice
from typing import TypeAlias

import msgspec

from bus.messages import MAX_FRAME, MAX_MISSING, Body, Envelope, encode
from bus.seal import Seal

WINDOW = 1024
"""Frames of one link that may be unacknowledged on the wire; what is sent beyond it waits in order."""

ACK_EVERY = 64
"""Taken messages after which an acknowledgement travels at once."""

ACK_DELAY = 20_000_000
"""Nanoseconds that an acknowledgement waits for reverse traffic to carry it."""

RESEND_AFTER = 250_000_000
"""Nanoseconds until the oldest unacknowledged frame is sent again; doubles while the peer stays silent."""

RESEND_AT_MOST = 4_000_000_000
"""Longest time in nanoseconds between two resends."""

RESEND_BURST = 64
"""Frames of a link sent again at once, at the first silence; later ones send the oldest frame only."""

GAP_AGAIN = 10_000_000
"""Nanoseconds until a gap that is still there is reported again, doubling up to `RESEND_AFTER`; and the least time
between two early resends of one frame."""

BACKLOG_NOTICE = 4096
"""Messages of one link waiting beyond the window that are worth a notice; so is each doubling of their number."""

BACKLOG_LIMIT = 262_144
"""Most messages of one link that wait beyond the window: about 50 MB."""

NEVER = 2**63


class BacklogError(RuntimeError):
    """More messages than `BACKLOG_LIMIT` wait for a peer that takes none. The message was not sent."""


class Identity(msgspec.Struct, frozen=True):
    """A process of the machine. The launcher numbers the incarnations of a node from 1."""

    node: str
    incarnation: int


class Delivery(msgspec.Struct, frozen=True):
    """One message, delivered. `clock` is the sender's Lamport time; the receiver's own is past it."""

    id: str
    source: Identity
    clock: int
    body: Body


class Refusal(enum.StrEnum):
    """Why a frame was dropped. None of these is an error of the process that received it."""

    OVERSIZED = "oversized"
    STRANGER = "stranger"
    """Not sealed with this run's key: noise, another run's, or changed on the way."""
    UNDECODABLE = "undecodable"
    """Sealed, but no message."""
    MISADDRESSED = "misaddressed"
    """Meant for another node, or for another incarnation of this one."""
    STALE_INCARNATION = "stale_incarnation"
    """From an incarnation that a newer one has replaced."""
    UNKNOWN_INCARNATION = "unknown_incarnation"
    """From an incarnation that membership has not announced and that was never spoken to."""
    DEAD_INCARNATION = "dead_incarnation"
    INCONSISTENT = "inconsistent"
    """Numbers that this link cannot have: an acknowledgement of the unsent, a message beyond the window."""
    FORBIDDEN = "forbidden"
    """A message that such a sender has not to send, or not to this process."""
    IMPOSSIBLE = "impossible"
    """A message about what this machine has not: a CPU, a task, a page."""


class Completion(enum.StrEnum):
    """What became of a message that was sent."""

    PENDING = "pending"
    ACKNOWLEDGED = "acknowledged"
    DEAD = "dead"
    """Its target died before it acknowledged; the message took effect at most once."""


Outbox: TypeAlias = list[tuple[str, bytes]]
"""Frames to transmit, each with the node that it is for."""

Crowded: TypeAlias = list[tuple[str, int]]
"""Notices of a backlog: the node that it is for, and how many messages wait."""


class Flight(msgspec.Struct, gc=False):
    """A frame on the wire, with the times of its first and of its last transmission."""

    frame: bytes
    first: int
    last: int


class Link:
    """One pair of incarnations. The counters are for reading only."""

    __slots__ = (
        "_ack_at", "_crowded", "_early", "_flying", "_gap_at", "_gap_wait", "_handed", "_highest", "_notice", "_outbox",
        "_own", "_seal", "_taken", "_timeout", "_told", "_waiting", "acknowledged", "active", "due", "duplicates",
        "ended", "inward", "outward", "peer", "received", "reordered", "resent", "sent",
    )  # fmt: skip

    def __init__(self, own: Identity, peer: Identity, seal: Seal, outbox: Outbox, crowded: Crowded) -> None:
        self.peer = peer
        self.outward = f"{own.node}.{own.incarnation}>{peer.node}.{peer.incarnation}"
        self.inward = f"{peer.node}.{peer.incarnation}>{own.node}.{own.incarnation}"
        self.ended = False
        self.active = False  # whether `Peers` has it among those with something due
        self.due = NEVER  # nothing is to be done for this link before this time
        self._own = own
        self._seal = seal
        self._outbox = outbox
        self._crowded = crowded

        self.sent = 0  # the highest sequence number given out
        self.acknowledged = 0  # the highest that the peer has taken
        self.resent = 0
        self._flying: deque[Flight] = deque()
        self._waiting: deque[bytes] = deque()  # beyond the window
        self._notice = BACKLOG_NOTICE
        self._timeout = RESEND_AFTER

        self.received = 0  # the highest sequence number below which nothing is missing
        self.duplicates = 0
        self.reordered = 0
        self._early: dict[int, Envelope] = {}
        self._highest = 0  # the highest that ever came early
        self._gap_at = NEVER
        self._gap_wait = GAP_AGAIN
        self._handed = 0  # the highest handed to the owner
        self._taken = 0  # the highest that the owner took
        self._told = 0  # the highest that the peer was told of
        self._ack_at = NEVER

    # Sending

    def send(self, body: Body, clock: int, now: int) -> str:
        """Number the message, transmit it or let it wait for the window; returns its id.

        Raises `ValueError` if the frame is too long, `BacklogError` if too many wait, before anything changed.
        """
        if self.ended:
            self.sent += 1
            return f"{self.outward}:{self.sent}"
        frame = self._encode(self.sent + 1, clock, body)
        if len(frame) > MAX_FRAME:
            raise ValueError(f"{type(body).__name__} makes a frame of {len(frame)} bytes, longer than {MAX_FRAME}")
        if len(self._flying) < WINDOW:
            self._transmit(frame, now)
            self._told = self._taken
            self._ack_at = NEVER if self._handed == self._taken else now + ACK_DELAY
        else:
            self._wait_for_window(frame)
        self.sent += 1
        return f"{self.outward}:{self.sent}"

    def _wait_for_window(self, frame: bytes) -> None:
        waiting = self._waiting
        if len(waiting) >= BACKLOG_LIMIT:
            raise BacklogError(f"{len(waiting):,} messages wait on the link {self.outward}, which takes none")
        waiting.append(frame)
        if len(waiting) >= self._notice:
            self._notice *= 2
            self._crowded.append((self.peer.node, len(waiting)))

    def _encode(self, sequence: int, clock: int, body: Body | None, missing: tuple[int, ...] = ()) -> bytes:
        own, peer = self._own, self.peer
        return self._seal.close(
            encode(
                Envelope(
                    own.node, own.incarnation, peer.node, peer.incarnation, sequence, self._taken, clock, body, missing
                )
            )
        )

    def _transmit(self, frame: bytes, now: int) -> None:
        self._flying.append(Flight(frame, now, now))
        self._outbox.append((self.peer.node, frame))
        self._lower(now + self._timeout)

    def _lower(self, due: int) -> None:
        if due < self.due:
            self.due = due

    def _heard(self, acknowledged: int, now: int) -> None:
        """The peer has taken everything up to `acknowledged`."""
        flying = self._flying
        for _ in range(acknowledged - self.acknowledged):
            flying.popleft()
        self.acknowledged = acknowledged
        while self._waiting and len(flying) < WINDOW:
            self._transmit(self._waiting.popleft(), now)
        self._timeout = RESEND_AFTER
        if flying:
            self._lower(flying[0].last + RESEND_AFTER)

    def _resend(self, now: int) -> None:
        count = RESEND_BURST if self._timeout == RESEND_AFTER else 1
        for flight in islice(self._flying, count):
            if flight.last + RESEND_AFTER <= now:
                self._again(flight, now)
        self._timeout = min(2 * self._timeout, RESEND_AT_MOST)

    def _again(self, flight: Flight, now: int) -> None:
        flight.last = now
        self._outbox.append((self.peer.node, flight.frame))
        self.resent += 1

    def _resend_missing(self, missing: tuple[int, ...], now: int) -> None:
        """The peer has later frames than these. A report may be late: each frame once, and again after a while only."""
        for sequence in missing:
            if sequence > self.acknowledged:
                flight = self._flying[sequence - self.acknowledged - 1]
                if flight.last == flight.first or flight.last + GAP_AGAIN <= now:
                    self._again(flight, now)

    def retry(self, now: int) -> None:
        """The channel has changed: do not wait as long as the peer was silent before."""
        self._timeout = RESEND_AFTER
        if self._flying:
            self._lower(max(now, self._flying[0].last + RESEND_AFTER))

    # Receiving

    def receive(self, envelope: Envelope, now: int, deliverable: deque[tuple[Link, Envelope]]) -> bool:
        """Take in a frame of this link; what became deliverable is appended. False if its numbers cannot be."""
        sequence, acknowledged, missing = envelope.sequence, envelope.acknowledged, envelope.missing
        on_wire = self.acknowledged + len(self._flying)
        if (
            acknowledged > on_wire
            or sequence > self.received + WINDOW
            or (sequence == 0) != (envelope.body is None)
            or (missing and (sequence or max(missing) > on_wire))
        ):
            return False
        if acknowledged > self.acknowledged:
            self._heard(acknowledged, now)
        if missing:
            self._resend_missing(missing, now)
        if sequence == self.received + 1:
            self.received = sequence
            deliverable.append((self, envelope))
            if self._early:
                self._fill(now, deliverable)
        elif sequence > self.received and sequence not in self._early:
            self._early[sequence] = envelope
            self.reordered += 1
            if sequence > self._highest + 1 or self._gap_at == NEVER:
                self._gap_at = now
                self._gap_wait = GAP_AGAIN
                self._lower(now)
            self._highest = max(self._highest, sequence)
        elif sequence:
            self.duplicates += 1
            self._ack_at = now  # the peer has not heard of it
            self._lower(now)
        return True

    def _fill(self, now: int, deliverable: deque[tuple[Link, Envelope]]) -> None:
        """A gap has become smaller: what came early may follow."""
        while (envelope := self._early.pop(self.received + 1, None)) is not None:
            self.received += 1
            deliverable.append((self, envelope))
        self._gap_wait = GAP_AGAIN
        self._gap_at = min(self._gap_at, now + GAP_AGAIN) if self._early else NEVER
        self._lower(self._gap_at)

    def report_gap(self, now: int) -> None:
        """Tell the peer what is missing, if it is time for that."""
        if self._gap_at > now:
            return
        self.acknowledge()
        self._gap_at = now + self._gap_wait if self._gap_wait < RESEND_AFTER else NEVER
        self._gap_wait *= 2
        self._lower(self._gap_at)

    def _missing(self) -> tuple[int, ...]:
        """What has not come although something later has, the first of it."""
        early = self._early
        if not early:
            return ()
        gaps = (number for number in range(self.received + 1, self._highest) if number not in early)
        return tuple(islice(gaps, MAX_MISSING))

    def handed_over(self, sequence: int, now: int) -> bool:
        """The owner has this message in hand; True if it is the first since the last `take`."""
        if sequence <= self._handed:
            return False
        first = self._handed == self._taken
        self._handed = sequence
        if self._ack_at == NEVER:
            self._ack_at = now + ACK_DELAY
            self._lower(self._ack_at)
        return first

    def take(self) -> None:
        """The owner came back: it took all that was handed over, which may now be acknowledged."""
        self._taken = self._handed
        if self._taken - self._told >= ACK_EVERY and not self.ended:
            self.acknowledge()

    def acknowledge(self) -> None:
        """Transmit a frame that carries nothing but the acknowledgement, and what is missing."""
        self._told = self._taken
        if self._handed == self._taken:
            self._ack_at = NEVER
        self._outbox.append((self.peer.node, self._encode(0, 0, None, self._missing())))

    @property
    def owes(self) -> bool:
        """Whether the peer was not yet told of everything that was taken."""
        return not self.ended and self._told != self._taken

    # Time and the end

    def tick(self, now: int) -> None:
        """Do what is due."""
        if self._ack_at <= now:
            self._taken = self._handed
            self.acknowledge()
        self.report_gap(now)
        if self._flying and self._flying[0].last + self._timeout <= now:
            self._resend(now)
        due = min(self._ack_at, self._gap_at)
        self.due = min(due, self._flying[0].last + self._timeout) if self._flying else due

    def end(self) -> list[str]:
        """The peer is dead: forget what is unsent; returns the ids that complete as dead."""
        if self.ended:
            return []
        self.ended = True
        self.due = self._ack_at = self._gap_at = NEVER
        self._flying.clear()
        self._waiting.clear()
        self._early.clear()
        return [f"{self.outward}:{n}" for n in range(self.acknowledged + 1, self.sent + 1)]

    def oldest(self, now: int) -> int:
        """Nanoseconds since the oldest unacknowledged frame was first transmitted; 0 if there is none."""
        return now - self._flying[0].first if self._flying else 0
