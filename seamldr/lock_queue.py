"""The queue behind a raw spinlock: first come first served, with fencing tokens. A pure core.

Who is next: requests are granted in the order in which they reached the service. A CPU may wait at several context
levels at once (an NMI above its own waiting task), so a request is named by (cpu, incarnation, request). Every grant
has a token (epoch, number) that is greater than all before it: the epoch is the service's incarnation, so tokens
never go back even if the service itself is killed and restarted. A release under a token that is not the holder's
does nothing.

A CPU that dies leaves the queue. If it was the holder, the policy decides: "release" grants the next waiter, under a
higher token, so that whatever the dead one still has under way is fenced off; "hang" is what a kernel would do:
nobody gets it.
"""

from __future__ import annotations

from collections import deque

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


class Grant(msgspec.Struct, frozen=True):
    """Somebody holds, under `token`."""

    request: Request
    token: Token


class LockQueue:
    """One lock. Times are passed in; nothing is looked up."""

    def __init__(self, name: str, epoch: int, policy: str = "release") -> None:
        self.name = name
        self.epoch = epoch
        self.policy = policy
        self.holder: Grant | None = None
        self.waiting: deque[Request] = deque()
        self._number = 0

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
        return self._next()

    def release(self, token: Token) -> tuple[bool, Grant | None]:
        """Whether the token was the holder's, and the grant that follows."""
        if self.holder is None or self.holder.token != token:
            return False, None
        self.holder = None
        return True, self._next()

    def dead(self, node: str, incarnation: int) -> tuple[list[Request], Grant | None]:
        """A process died: its requests that are gone, held ones too if the policy releases them, and the next grant."""
        gone = [r for r in self.waiting if (r.node, r.incarnation) == (node, incarnation)]
        self.waiting = deque(r for r in self.waiting if r not in gone)
        holder = self.holder
        if holder is None or (holder.request.node, holder.request.incarnation) != (node, incarnation):
            return gone, None
        if self.policy != "release":
            return gone, None
        self.holder = None
        return [holder.request, *gone], self._next()

    def _next(self) -> Grant | None:
        if self.holder is not None or not self.waiting:
            return None
        self._number += 1
        self.holder = Grant(self.waiting.popleft(), (self.epoch, self._number))
        return self.holder
