"""The queue behind a raw spinlock: first come first served, with fencing tokens. A pure core.

Who is next: requests are granted in the order in which they reached the service. A CPU may wait at several context
levels at once (an NMI above its own waiting task), so a request is named by (cpu, incarnation, request). Every grant
has a token (epoch, number) that is greater than all before it: the epoch is the service's incarnation, so tokens
never go back even if the service itself is killed and restarted. A release under a token that is not the holder's
does nothing.

A CPU that dies leaves the queue. If it was the holder, the policy decides: "release" and "lease" grant the next
waiter, under a higher token, so that whatever the dead one still has under way is fenced off; "hang" is what a kernel
would do: nobody gets it, ever. With a lease, which no kernel has, a live holder loses the lock too if it keeps it too
long while somebody waits.

A process that takes the queue over makes one with `paused`, restores what `seamldr.lock_recovery` found, and then
lets it go on with `resume`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

Token = tuple[int, int]
NO_TOKEN: Token = (0, 0)


class Request(msgspec.Struct, frozen=True):
    """Somebody waits: `node` in this `incarnation`, in a context of `level`, since `since_ns`."""

    node: str
    incarnation: int
    request: int
    level: int
    since_ns: int

    def of(self, node: str, incarnation: int) -> bool:
        """Whether this process asked."""
        return (self.node, self.incarnation) == (node, incarnation)


class Grant(msgspec.Struct, frozen=True):
    """Somebody holds, under `token`."""

    request: Request
    token: Token


class LockMemo(msgspec.Struct, frozen=True, array_like=True):
    """What must outlive the service: the token of the last lease that ended, and a dead holder that keeps the lock."""

    fence: Token = NO_TOKEN
    hung: Grant | None = None


class LockQueue:
    """One lock. Times are in nanoseconds of one clock and passed in; nothing is looked up."""

    def __init__(
        self, name: str, epoch: int, policy: str = "release", *, memo: LockMemo | None = None, paused: bool = False
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.policy = policy
        self.memo = memo or LockMemo()
        self.holder: Grant | None = self.memo.hung
        self.granted_ns = 0
        self.waiting: deque[Request] = deque()
        self._number = 0
        self._paused = paused

    @property
    def depth(self) -> int:
        """Requests that wait or hold."""
        return len(self.waiting) + (self.holder is not None)

    @property
    def token(self) -> Token:
        """The holder's token, NO_TOKEN if nobody holds."""
        return self.holder.token if self.holder else NO_TOKEN

    def acquire(self, request: Request) -> Grant | None:
        """Queue a request; its grant if the lock was free."""
        self.waiting.append(request)
        return self._next(request.since_ns)

    def release(self, token: Token, now_ns: int = 0) -> tuple[bool, Grant | None]:
        """Whether the token was the holder's, and the grant that follows."""
        if self.holder is None or self.holder.token != token or self.memo.hung is not None:
            return False, None
        self.holder = None
        return True, self._next(now_ns)

    def dead(self, node: str, incarnation: int, now_ns: int = 0) -> tuple[list[Request], Grant | None]:
        """A process died: its requests that are gone, held ones too if the policy releases them, and the next grant.

        With the policy "hang" `memo` changes if it was the holder.
        """
        gone = [request for request in self.waiting if request.of(node, incarnation)]
        self.waiting = deque(request for request in self.waiting if not request.of(node, incarnation))
        holder = self.holder
        if holder is None or not holder.request.of(node, incarnation):
            return gone, None
        if self.policy == "hang":
            self.memo = msgspec.structs.replace(self.memo, hung=holder)
            return gone, None
        self.holder = None
        return [holder.request, *gone], self._next(now_ns)

    def _next(self, now_ns: int) -> Grant | None:
        if self._paused or self.holder is not None or not self.waiting:
            return None
        self._number += 1
        self.granted_ns = now_ns
        self.holder = Grant(self.waiting.popleft(), (self.epoch, self._number))
        return self.holder

    # Leases

    def lease_end(self, lease_ns: int) -> int | None:
        """When the holder loses the lock; None while nobody waits for it."""
        return self.granted_ns + lease_ns if self.holder is not None and self.waiting else None

    def expire(self, now_ns: int) -> tuple[Grant, Grant]:
        """Take the lock from its holder, for good (`memo` changes); who lost it, and the grant that follows.

        Only while somebody waits.
        """
        lost = self.holder
        assert lost is not None and self.waiting
        self.memo = msgspec.structs.replace(self.memo, fence=lost.token)
        self.holder = None
        grant = self._next(now_ns)
        assert grant is not None
        return lost, grant

    # Taking over

    def restore(self, holder: Grant | None, waiting: Iterable[Request]) -> None:
        """Put the holder back, under its old token, and the waiters in their new order. Only while paused."""
        self.holder = self.memo.hung or holder
        self.waiting = deque(waiting)

    def resume(self, now_ns: int = 0) -> Grant | None:
        """Grant from now on; the first grant if nobody holds. A lease that was restored begins now."""
        self._paused = False
        self.granted_ns = now_ns
        return self._next(now_ns)
