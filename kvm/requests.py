"""What user space has asked CPUs for and not got yet. A pure core."""

from __future__ import annotations

from errno import ENXIO

import msgspec

from bus.messages import AdminDone
from kvm.pages import PagePool

NUMBER_BITS = 32


class Request(msgspec.Struct):
    """One request to a CPU. `pages` are in use until it has ended; `wanted`: somebody waits for the answer."""

    cpu: int
    pages: list[int]
    wanted: bool
    done: AdminDone | None = None


class Requests:
    """Requests by their numbers, which tell the incarnations of user space apart."""

    def __init__(self, pool: PagePool, incarnation: int) -> None:
        self._pool = pool
        self._number = (incarnation - 1) << NUMBER_BITS
        self.open: dict[int, Request] = {}

    def new(self, cpu: int, pages: list[int], *, wanted: bool = False) -> int:
        """The number of a new request."""
        self._number += 1
        self.open[self._number] = Request(cpu, pages, wanted)
        return self._number

    def end(self, done: AdminDone) -> bool:
        """A CPU has answered; False if nobody of this incarnation asked."""
        request = self.open.get(done.request)
        if request is None or request.done is not None:
            return False
        self._pool.give(request.pages)
        self._ended(done.request, request, done)
        return True

    def lose(self, cpu: int) -> list[int]:
        """The CPU has died: what it was asked for has failed. Returns the numbers.

        The pages are not used again: what the CPU began in SEAM may still be under way there.
        """
        lost = [number for number, request in self.open.items() if request.cpu == cpu and request.done is None]
        for number in lost:
            self._ended(number, self.open[number], AdminDone(number, -ENXIO, f"CPU {cpu} has died"))
        return lost

    def _ended(self, number: int, request: Request, done: AdminDone) -> None:
        request.done = done
        if not request.wanted:
            del self.open[number]

    def forget(self, number: int) -> None:
        """Nobody waits for the answer any more; the request is open until it is there."""
        request = self.open[number]
        request.wanted = False
        if request.done is not None:
            del self.open[number]

    def answer(self, number: int) -> AdminDone | None:
        """The answer to a request that is waited for, once; None if there is none yet."""
        done = self.open[number].done
        if done is not None:
            del self.open[number]
        return done

    def on(self, cpu: int) -> bool:
        """Whether the CPU has not answered to all."""
        return any(request.cpu == cpu and request.done is None for request in self.open.values())
