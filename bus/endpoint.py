"""One process on the bus: its inbox, its outgoing sockets and the timer, around the links of `bus.peers`.

Sockets go one way. The inbox (PULL) is only ever received from. It takes turns between the connections to it, and its
receive limit, for each connection, is more than a link can have on the wire: who obeys the links never meets it, since
a full ipc inbox loses silently when its sender closes; who floods fills his own queue. Each peer that is spoken to gets
a PUSH, connected at the first send and kept among the most recently used. What a socket loses all the same, the links
resend.

zmq's descriptor is edge-triggered: it says "look again", and any call into the socket may use the signal up. So: look
at EVENTS first, wait for the descriptor only if there is nothing, and *while one task watches the descriptor nobody
else reads the inbox*. A message that was read stays in the links until it is handed over: cancellation cannot lose
it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from heapq import heappop, heappush
from time import monotonic_ns

import msgspec
import trio
import zmq

from bus.clock import LamportClock
from bus.link import NEVER, WINDOW, Completion, Delivery, Identity, Refusal
from bus.linkfaults import LinkFaults, LinkRule
from bus.messages import MAX_FRAME, Body
from bus.peers import Admit, Peers

BATCH = 256
"""Frames read from the inbox at once."""

CONNECTIONS = 64
"""Outgoing sockets kept open; a connection costs about 70 KB at its two ends together."""

ADDRESS_LIMIT = 107
"""Bytes of a Unix socket path (`sun_path` of unix(7), without its NUL)."""

HEAD = 64
"""Bytes of a refused frame that are reported."""

INBOX_LIMIT = 2 * WINDOW
"""Frames of one connection that wait in the inbox; then the sender has to."""

LARGEST_READ = 8 << 20
"""Bytes of the longest frame that is taken off a connection, to be refused; who sends a longer one is cut off."""

_LINGER_MS = 250
_RECONNECT_MS = 10
_RECONNECT_AT_MOST_MS = 1000

# As plain integers: an enum member costs a conversion at each call.
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)

OnRefused = Callable[[str, bytes], None]
OnBacklog = Callable[[str, int], None]


class Statistics(msgspec.Struct, frozen=True):
    """Counts since the endpoint was opened, over all links, dead ones too."""

    sent: int
    """Messages given to `send`."""
    acknowledged: int
    """Of these, taken by the owner at the other end."""
    dead: int
    """Of these, completed by the death of their target."""
    unacknowledged: int
    """Of these, neither."""
    oldest_unacknowledged_ns: int
    """Nanoseconds that the oldest message on the wire has waited for its acknowledgement."""
    delivered: int
    """Messages handed to the owner."""
    deliverable: int
    """Messages read and in order, but not yet handed over."""
    resent: int
    """Frames transmitted again."""
    duplicates: int
    """Frames that came again."""
    reordered: int
    """Frames that came before an earlier one."""
    refused: dict[str, int]
    """Frames dropped, by `Refusal`."""
    connections: int
    """Outgoing sockets open now."""
    connected: int
    """Outgoing sockets opened in all."""
    wakeups: int
    """Times that a task of this endpoint woke up, for the inbox or for the timer."""
    dropped: int
    """Frames that link faults did not let out."""
    duplicated: int
    """Frames that link faults let out twice."""
    delayed: int
    """Frames that link faults let out late."""


def socket_path(directory: str, node: str) -> str:
    """Where the inbox of `node` is bound; `ValueError` if a Unix socket address cannot hold it."""
    path = f"{directory}/{node}"
    if len(path.encode()) > ADDRESS_LIMIT:
        raise ValueError(
            f"the socket path {path} has {len(path.encode())} bytes, more than {ADDRESS_LIMIT}: use a shorter directory"
        )
    return path


class Endpoint:
    """Made by `open_endpoint`. Belongs to one trio program; no method may be called from another thread."""

    def __init__(
        self,
        identity: Identity,
        directory: str,
        key: bytes,
        clock: LamportClock,
        on_refused: OnRefused,
        connections: int,
        admit: Admit | None,
    ) -> None:
        self.identity = identity
        self._directory = directory
        self.clock = clock
        self._on_refused = on_refused
        self._limit = connections
        self._peers = Peers(identity, key, admit)
        path = socket_path(directory, identity.node)
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 16 * connections + 64)  # closed ones that linger count too
        self._outgoing: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()
        self._inbox: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._inbox.set(zmq.RCVHWM, INBOX_LIMIT)
        self._inbox.set(zmq.MAXMSGSIZE, LARGEST_READ)
        self._frame = memoryview(bytearray(MAX_FRAME + 1))
        try:
            self._inbox.bind(f"ipc://{path}")
            os.chmod(path, 0o600)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(error.errno, f"cannot bind the inbox: {error.strerror}", path) from None
        self._descriptor = int(self._inbox.get(zmq.FD))
        self._watched = False
        self._looked = trio.lowlevel.ParkingLot()
        self._flushing: set[trio.CancelScope] = set()
        self._life = trio.CancelScope(shield=True)  # cancelled when the block ends: until then peers are answered
        self._timer = trio.CancelScope()
        self._timer_at = NEVER
        self._connected = 0
        self._wakeups = 0
        self.on_backlog: OnBacklog | None = None
        self._faults = LinkFaults(identity.node)
        self._faulty = False
        self._held: list[tuple[int, int, str, bytes]] = []  # a heap, by time; empty unless faulty
        self._holds = 0

    # Sending

    def send(self, node: str, body: Body) -> str:
        """Send `body` to the incarnation of `node` that membership names (1 if none yet). Never blocks.

        Returns the message id; `completion` tells what became of it. To a node that is dead nothing is sent and the
        message is complete at once. Raises `ValueError` if the frame or the target's socket path would be too long,
        `BacklogError` if a quarter of a million messages wait for the target already; `on_backlog`, if set, was called
        with node and number when there were 4,096 of them, and at each doubling.
        """
        if node not in self._outgoing:
            socket_path(self._directory, node)
        now = monotonic_ns()
        message_id = self._peers.send(node, body, self.clock.tick(), now)
        self._post(now)
        return message_id

    def _post(self, now: int) -> None:
        """Transmit what the links put out, and see that the timer rings in time."""
        peers = self._peers
        if peers.outbox:
            for node, frame in peers.outbox:
                self._transmit(frame, node)
            peers.outbox.clear()
        due = peers.due
        if self._faulty:
            self._release(now)
            due = self._due()
        if due < self._timer_at:
            self._timer_at = due
            self._timer.deadline = trio.current_time() + max(0, due - now) / 1e9
        if peers.crowded:
            self._tell_of_backlog()

    def _due(self) -> int:
        return min(self._peers.due, self._held[0][0]) if self._held else self._peers.due

    def _tell_of_backlog(self) -> None:
        crowded, self._peers.crowded[:] = list(self._peers.crowded), []
        if self.on_backlog is not None:
            for node, waiting in crowded:
                self.on_backlog(node, waiting)

    def _transmit(self, frame: bytes, peer: str) -> None:
        """The one place where a frame leaves this process. It may get lost from here on; the links resend."""
        if self._faulty:
            self._hold(frame, peer)
        else:
            self._put(frame, peer)

    def _put(self, frame: bytes, peer: str) -> None:
        socket = self._outgoing.get(peer)
        if socket is None:
            socket = self._connect(peer)
            if socket is None:
                return
        else:
            self._outgoing.move_to_end(peer)
        try:  # contextlib.suppress costs as much as the call inside  # noqa: SIM105
            socket.send(frame, _NOBLOCK)
        except zmq.Again:
            pass

    def _connect(self, peer: str) -> zmq.Socket[bytes] | None:
        """A socket for `peer`, instead of the one unused for longest if there are too many; None if none is free."""
        path = socket_path(self._directory, peer)
        while len(self._outgoing) >= self._limit:
            self._outgoing.popitem(last=False)[1].close(linger=_LINGER_MS)
        try:
            socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        except zmq.ZMQError as error:
            if error.errno == errno.EMFILE:  # closed sockets that linger count too
                return None
            raise
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_AT_MOST_MS)
        socket.connect(f"ipc://{path}")
        self._outgoing[peer] = socket
        self._connected += 1
        return socket

    # Link faults

    def set_link_faults(self, rules: Sequence[LinkRule], seed: int) -> None:
        """From now on these faults for the frames that leave here, and no others; () for none.

        What earlier rules still hold back is let out at once, and links that were silent are tried anew. Raises
        `ValueError` if there are too many rules.
        """
        self._faults.set(rules, seed)
        self._release(NEVER)
        self._faulty = bool(rules)
        now = monotonic_ns()
        self._peers.retry(now)
        self._post(now)

    def _hold(self, frame: bytes, peer: str) -> None:
        """Let link faults decide about a frame; what is to go later waits for `_release`."""
        now = monotonic_ns()
        for time in self._faults.decide(peer, len(frame), now):
            if time <= now:
                self._put(frame, peer)
            else:
                self._holds += 1
                heappush(self._held, (time, self._holds, peer, frame))

    def _release(self, now: int) -> None:
        held = self._held
        while held and held[0][0] <= now:
            _, _, peer, frame = heappop(held)
            self._put(frame, peer)

    def _forget_held(self, node: str) -> None:
        """A node is spoken with no more: neither is what was on its way to it."""
        self._held = sorted(one for one in self._held if one[2] != node)  # sorted is a heap

    # Receiving

    def drain_nowait(self, limit: int = BATCH) -> list[Delivery]:
        """Everything deliverable now, at most `limit`, in order per link; moves the clock past each message.

        What is returned is acknowledged at the next call of a receiving method or of `flush`, or when the caller has
        given trio its turn for a while: handle it before, and no acknowledgement is untrue.
        """
        now = monotonic_ns()
        peers = self._peers
        peers.take()
        if not self._watched and len(peers.deliverable) < limit and self._readable():
            self._read(limit - len(peers.deliverable), now)
        batch = peers.hand_over(limit, now) if peers.deliverable else []
        clock = self.clock
        for delivery in batch:
            clock.merge(delivery.clock)
            clock.tick()
        self._post(now)
        return batch

    async def wait(self) -> None:
        """Until a drain may return something. May be cancelled: nothing is lost."""
        peers = self._peers
        peers.take()
        self._post(monotonic_ns())
        if peers.deliverable:
            await trio.lowlevel.checkpoint()
            return
        while not peers.deliverable:
            await self._look()

    async def receive(self) -> Delivery:
        """The next message. May be cancelled: nothing is lost."""
        while True:
            await self.wait()
            if batch := self.drain_nowait(1):
                return batch[0]

    async def _look(self) -> None:
        """Read the inbox once, when there is something in it; or wait until another task has."""
        if self._watched:
            await self._looked.park()
            return
        self._watched = True
        try:
            if self._readable():
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._descriptor)
                self._wakeups += 1
        finally:
            self._watched = False
            self._looked.unpark_all()
        now = monotonic_ns()
        self._read(BATCH, now)
        self._post(now)

    def _readable(self) -> bool:
        return bool(int(self._inbox.get(_EVENTS)) & _POLLIN)

    def _read(self, limit: int, now: int) -> None:
        """Move up to `limit` frames from the inbox into the links; what they show to be missing is reported at once."""
        self._take_in(limit, now)
        self._peers.report_gaps(now)

    def _take_in(self, limit: int, now: int) -> None:
        """Of a frame that is too long only the beginning is read, and it is enough for one turn."""
        read, receive, frame = self._inbox.recv_into, self._peers.receive, self._frame
        for n in range(limit):
            # To run into the empty inbox costs as much as two looks at EVENTS: look once, after the first frame.
            if n == 1 and not self._readable():
                return
            try:
                size = read(frame, flags=_NOBLOCK)
            except zmq.Again:
                return
            refusal = receive(frame[:size], now)
            if refusal is not None:
                self._on_refused(refusal, bytes(frame[: min(size, HEAD)]))
                if refusal is Refusal.OVERSIZED:
                    return

    # Membership and completion

    def expect(self, nodes: Iterable[str]) -> None:
        """These nodes are online in incarnation 1. Costs nothing until one of them speaks or is spoken to."""
        self._peers.expect(nodes)

    def member(self, node: str, incarnation: int, state: str) -> list[str]:
        """Apply a membership record: `state` is online, offline or dead; `ValueError` on another word.

        A new incarnation gets a new link; a dead one is spoken with no more and its frames are refused. Returns the
        ids of the messages that now complete as dead.
        """
        peers = self._peers
        before = peers.incarnation(node)
        lost = peers.member(node, incarnation, state)
        if before is not None and peers.incarnation(node) != before:
            self._forget_held(node)
            if node in self._outgoing:
                self._outgoing.pop(node).close(linger=0)
        if lost:
            for scope in self._flushing:
                scope.cancel()
        return lost

    def is_alive(self, process: Identity) -> bool:
        """Whether membership still has this incarnation: nothing more is to be taken from one that it has not."""
        return self._peers.incarnation(process.node) == process.incarnation

    def completion(self, message_id: str) -> Completion:
        """What became of a message sent from here; `KeyError` if there was none with this id."""
        return self._peers.completion(message_id)

    async def flush(self, nodes: Collection[str] | None = None) -> None:
        """Until every message sent so far or meanwhile is acknowledged, or its target dead. May be cancelled.

        With `nodes`, only messages to these count: of the others one may have left for good, without being dead.
        Meanwhile what arrives is acknowledged before it is handed over; otherwise two that flush would wait for each
        other for ever.
        """
        await trio.lowlevel.checkpoint()
        peers = self._peers
        while peers.unacknowledged if nodes is None else peers.pending(nodes):
            now = monotonic_ns()
            peers.take_unseen(now)
            self._post(now)
            with trio.CancelScope() as scope:  # cancelled when a death completes messages
                self._flushing.add(scope)
                try:
                    await self._look()
                finally:
                    self._flushing.discard(scope)

    def statistics(self) -> Statistics:
        """The counts now."""
        peers = self._peers
        return Statistics(
            sent=peers.total("sent"),
            acknowledged=peers.total("acknowledged"),
            dead=peers.dead,
            unacknowledged=peers.unacknowledged,
            oldest_unacknowledged_ns=peers.oldest(monotonic_ns()),
            delivered=peers.delivered,
            deliverable=len(peers.deliverable),
            resent=peers.total("resent"),
            duplicates=peers.total("duplicates"),
            reordered=peers.total("reordered"),
            refused=dict(peers.refused),
            connections=len(self._outgoing),
            connected=self._connected,
            wakeups=self._wakeups,
            dropped=self._faults.dropped,
            duplicated=self._faults.duplicated,
            delayed=self._faults.delayed,
        )

    # Time and the end

    async def _keep_time(self) -> None:
        """Acknowledge and resend in time. Sleeps for good while nothing is outstanding."""
        with self._life:
            while True:
                due = self._timer_at = self._due()
                deadline = trio.current_time() + (due - monotonic_ns()) / 1e9 if due < NEVER else float("inf")
                with trio.CancelScope(deadline=deadline) as self._timer:
                    await trio.sleep_forever()
                self._wakeups += 1
                self._tick()

    def _tick(self) -> None:
        peers, now = self._peers, monotonic_ns()
        if not self._watched and len(peers.deliverable) < BATCH and self._readable():
            self._read(BATCH, now)  # acknowledgements may lie there unread
        peers.tick(now)
        self._post(now)

    def _settle(self) -> None:
        """The owner leaves in good order: it took all that it was handed."""
        now = monotonic_ns()
        self._peers.take()
        self._peers.settle()
        self._post(now)
        self._release(NEVER)

    def _close(self) -> None:
        """Free the sockets; waits a moment for frames that are on their way."""
        self._context.destroy(linger=_LINGER_MS)


@contextlib.asynccontextmanager
async def open_endpoint(
    identity: Identity,
    directory: str,
    key: bytes,
    clock: LamportClock,
    on_refused: OnRefused,
    connections: int = CONNECTIONS,
    admit: Admit | None = None,
) -> AsyncIterator[Endpoint]:
    """Bind the inbox `directory/node` and run the endpoint inside the block.

    `key` has 16 bytes and is the same in all processes of the run. `on_refused` gets the `Refusal` and the first
    bytes of each frame that was dropped. `connections` caps the outgoing sockets. `admit`, if given, says which
    messages are to be refused. Messages that are not acknowledged when the block ends may be lost: `flush` first. A
    block that is cancelled answers its peers until it ends. The zmq context is made here, so open it after the process
    was forked.

    Raises `ValueError` if the socket path or the key has the wrong length, `OSError` if the inbox cannot be bound.
    """
    endpoint = Endpoint(identity, directory, key, clock, on_refused, connections, admit)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint._keep_time)
            try:
                yield endpoint
                endpoint._settle()
            finally:
                endpoint._life.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:  # the owner's own exception, which the nursery wrapped
            raise group.exceptions[0] from None
        raise
    finally:
        endpoint._close()
