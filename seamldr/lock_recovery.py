"""Who holds and who waits, asked anew after the lock service was started again. A pure core.

The service that died took its queues with it. The CPUs know the truth: each says which locks it holds and which it
waits for, then that this was all. Until every live one has, nothing is granted; one that dies meanwhile counts as
having answered. Then the holder is restored under its old token, and the waiters queue by (clock of the request, CPU).

A message that was lost with the old service needs no repair: a release that it never took is a lock that nobody
claims, and a grant that never arrived is a request that still waits. A grant that did arrive is claimed as held.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from seamldr.lock_queue import NO_TOKEN, Grant, LockMemo, Request, Token

Process = tuple[str, int]
"""A node and its incarnation."""


class Claim(msgspec.Struct, frozen=True):
    """A CPU waits with this request since Lamport time `clock`, or holds if there is a `token`."""

    request: Request
    clock: int
    token: Token = NO_TOKEN


class LockRecovery:
    """The claims so far; `asked` are the live CPUs."""

    def __init__(self, asked: Iterable[Process]) -> None:
        self.silent: set[Process] = set(asked)
        """Live CPUs that have not said everything yet."""
        self.claims: dict[str, list[Claim]] = {}

    @property
    def complete(self) -> bool:
        """Whether every live CPU has answered."""
        return not self.silent

    def claim(self, lock: str, claim: Claim) -> bool:
        """Take a claim; False, and nothing happens, if its CPU has nothing to say (any more)."""
        if (claim.request.node, claim.request.incarnation) not in self.silent:
            return False
        self.claims.setdefault(lock, []).append(claim)
        return True

    def answered(self, node: str, incarnation: int) -> None:
        """The process has said everything, or is dead."""
        self.silent.discard((node, incarnation))

    def holder(self, lock: str, memo: LockMemo) -> Grant | None:
        """Who goes on holding the lock: the highest token, but none up to the last lease that ended."""
        held = [claim for claim in self.claims.get(lock, ()) if claim.token > memo.fence]
        if not held:
            return None
        last = max(held, key=lambda claim: claim.token)
        return Grant(last.request, last.token)

    def waiting(self, lock: str) -> list[Request]:
        """Who waits for the lock, in the order in which they queue again."""
        waiting = [claim for claim in self.claims.get(lock, ()) if claim.token == NO_TOKEN]
        waiting.sort(key=lambda claim: (claim.clock, _number(claim.request.node)))
        return [claim.request for claim in waiting]


def _number(node: str) -> int:
    return int(node.removeprefix("cpu"))
