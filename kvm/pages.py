"""The pages of user space's buffers. A pure core."""

from __future__ import annotations

import random

from bus.memory import PAGE_SIZE
from cpu.layout import BUFFERS, BUFFERS_END

SLICE_PAGES = 4096
SLICES = (BUFFERS_END - BUFFERS) // PAGE_SIZE // SLICE_PAGES - 1


class PagePool:
    """Given out in no order that anybody may rely on, as vmalloc does.

    Each incarnation of user space has a slice of its own, since requests of the one before may still be under way.
    """

    def __init__(self, seed: int, incarnation: int = 1) -> None:
        first = BUFFERS + PAGE_SIZE * SLICE_PAGES * ((incarnation - 1) % SLICES)
        self._free = [first + PAGE_SIZE * index for index in range(SLICE_PAGES)]
        random.Random(seed).shuffle(self._free)

    def take(self, count: int) -> list[int]:
        """Free pages; raises MemoryError if there are not so many."""
        if count > len(self._free):
            raise MemoryError(f"no {count} free pages")
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give(self, pages: list[int]) -> None:
        """Back to the pool."""
        self._free.extend(pages)
