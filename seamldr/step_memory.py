"""Memory as one step of the SEAM side sees it: its own stores included, which others see only when it is over.

SEAM software reads what it has written (an INSTALL wipes the table that says how large the handoff area was), so a
step that was cut in the middle could not be done again over its own traces. Its stores are collected here instead, go
into the log of the SEAM range together with the state that they belong to, and are then made. Whoever takes over makes
them again: a store may be made twice.
"""

from __future__ import annotations

import msgspec

from bus.memory import PhysicalMemory


class Store(msgspec.Struct, frozen=True, array_like=True):
    """`data` at address `pa`, or `zeros` bytes of zero."""

    pa: int
    data: bytes = b""
    zeros: int = 0

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.pa + (self.zeros or len(self.data))

    def make(self, memory: PhysicalMemory) -> None:
        """Write it."""
        memory.write(self.pa, self.data or bytes(self.zeros))

    def show_through(self, pa: int, view: bytearray) -> None:
        """Put what it writes over `view`, which shows the bytes from `pa` on."""
        first, last = max(pa, self.pa), min(pa + len(view), self.end)
        if first < last:
            data = self.data[first - self.pa : last - self.pa] if self.data else bytes(last - first)
            view[first - pa : last - pa] = data


class StepMemory(PhysicalMemory):
    """Pages of `below` with the stores of the step at hand on top. No words: SEAM shares none with the kernel."""

    def __init__(self, below: PhysicalMemory) -> None:
        self.size = below.size
        self.fd = None
        self.stores: list[Store] = []
        self._below = below

    def read(self, pa: int, length: int) -> bytes:
        """As the step sees it."""
        data = self._below.read(pa, length)
        if not self.stores:
            return data
        view = bytearray(data)
        for store in self.stores:
            store.show_through(pa, view)
        return bytes(view)

    def write(self, pa: int, data: bytes) -> None:
        """Collect a store; what lies outside RAM is dropped."""
        data = data[: max(0, self.size - pa)]
        if not data or pa < 0:
            return
        nothing = data.count(0) == len(data)
        self.stores.append(Store(pa, zeros=len(data)) if nothing else Store(pa, bytes(data)))

    def read64(self, pa: int) -> int:
        """The u64 at `pa`."""
        return int.from_bytes(self.read(pa, 8), "little")

    def write64(self, pa: int, value: int) -> None:
        """Collect the store of a u64."""
        self.write(pa, value.to_bytes(8, "little"))

    def settle(self) -> None:
        """Make the stores of the step: it is over."""
        stores, self.stores = self.stores, []
        for store in stores:
            store.make(self._below)
