"""Physical memory: one sparse mapping that every process of a machine shares.

Two kinds of thing live in it. *Pages* are raw bytes (VMCS regions, SEAMLDR_PARAMS, module images, the SEAM range).
*Words* are kernel data that several CPUs touch: a cell of four u64, so that a load can tell when, in Lamport time, its
value was stored, and a store can tell that somebody sleeps on the word, as MONITOR and MWAIT do:

    +0 value    +8 stamp (Lamport clock of the store)    +16 armed (a sleeper watches)    +24 spare

A store writes stamp, then value; a load reads value, then stamp. A reader may so see a stamp that is newer than its
value, never one that is older: its clock may run ahead, its causality is never wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from typing import Self

PAGE_SIZE = 4096
WORD_SIZE = 32
U64_MAX = 0xFFFF_FFFF_FFFF_FFFF

# Taking and dropping an uncontended lock is the cheapest full memory fence that Python offers.
_fence = threading.Lock()


def fence() -> None:
    """Order every store before this call with every load after it (x86: a locked instruction)."""
    with _fence:
        pass


class PhysicalMemory:
    """`size` bytes of RAM from physical address 0, zeroed at power on.

    An address outside reads as all ones and ignores writes, as a bus with no device behind it does.
    """

    def __init__(self, buffer: mmap.mmap, fd: int | None = None) -> None:
        self.size = len(buffer)
        self.fd = fd
        self._buffer = buffer
        self._bytes = memoryview(buffer)
        self._words = self._bytes.cast("Q")

    @classmethod
    def private(cls, size: int) -> Self:
        """Memory of one process only, for machines that are stepped in one process and for tests."""
        return cls(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)))

    @classmethod
    def create(cls, size: int) -> PhysicalMemory:
        """A new shared mapping on a memfd; `fd` may be inherited and given to `attach`."""
        fd = os.memfd_create("seamlab-memory", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        return cls.attach(fd)

    @classmethod
    def attach(cls, fd: int) -> PhysicalMemory:
        """Map the memory behind `fd`, made by `create` in another process."""
        size = os.fstat(fd).st_size
        return cls(mmap.mmap(fd, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0)), fd)

    def close(self) -> None:
        """Unmap; the memory goes when its last mapping does."""
        self._words.release()
        self._bytes.release()
        self._buffer.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def clear(self) -> None:
        """All zeros again, in every process that has it mapped, as after a power cycle."""
        self._buffer.madvise(mmap.MADV_REMOVE if self.fd is not None else mmap.MADV_DONTNEED)

    # Raw bytes

    def read(self, pa: int, length: int) -> bytes:
        """`length` bytes at `pa`; what lies outside RAM reads as FFH."""
        if pa >= 0 and pa + length <= self.size:
            return bytes(self._bytes[pa : pa + length])
        if pa >= self.size or pa < 0:
            return b"\xff" * length
        inside = bytes(self._bytes[pa : self.size])
        return inside + b"\xff" * (length - len(inside))

    def write(self, pa: int, data: bytes) -> None:
        """Store `data` at `pa`; what lies outside RAM is dropped."""
        if pa >= 0 and pa + len(data) <= self.size:
            self._bytes[pa : pa + len(data)] = data
        elif 0 <= pa < self.size:
            self._bytes[pa : self.size] = data[: self.size - pa]

    def read32(self, pa: int) -> int:
        """The u32 at `pa`."""
        return int.from_bytes(self.read(pa, 4), "little")

    def write32(self, pa: int, value: int) -> None:
        """Store a u32 at `pa`."""
        self.write(pa, (value & 0xFFFF_FFFF).to_bytes(4, "little"))

    def read64(self, pa: int) -> int:
        """The u64 at `pa`; atomic if `pa` is a multiple of 8."""
        if pa % 8 == 0 and 0 <= pa < self.size:
            return self._words[pa >> 3]
        return int.from_bytes(self.read(pa, 8), "little")

    def write64(self, pa: int, value: int) -> None:
        """Store a u64 at `pa`; atomic if `pa` is a multiple of 8."""
        if pa % 8 == 0 and 0 <= pa < self.size:
            self._words[pa >> 3] = value
        else:
            self.write(pa, value.to_bytes(8, "little"))

    def words(self, pa: int, count: int) -> memoryview:
        """`count` plain u64 at `pa`, a multiple of 8, to be read and stored by index; keeps the mapping alive."""
        return self._words[pa >> 3 : (pa >> 3) + count]

    # Stamped words

    def load(self, word: int) -> tuple[int, int]:
        """Value and stamp of the word at address `word`."""
        index = word >> 3
        words = self._words
        value = words[index]
        return value, words[index + 1]

    def store(self, word: int, value: int, stamp: int) -> bool:
        """Store `value` with Lamport time `stamp`; True if a sleeper may watch the word."""
        index = word >> 3
        words = self._words
        words[index + 1] = stamp
        words[index] = value
        fence()
        return words[index + 2] != 0

    def arm(self, word: int) -> None:
        """Say that a sleeper watches the word, before it looks at the value a last time."""
        self._words[(word >> 3) + 2] = 1
        fence()

    def disarm(self, word: int) -> None:
        """Forget the sleepers: done by the store that is about to ring them."""
        self._words[(word >> 3) + 2] = 0
        fence()

    @contextlib.contextmanager
    def atomic(self, word: int) -> Iterator[None]:
        """Hold the word for a read-modify-write, as a LOCK prefix does.

        Between processes this is a record lock on the memfd, which the operating system drops if its holder is
        killed.
        """
        if self.fd is None:
            yield
            return
        fcntl.lockf(self.fd, fcntl.LOCK_EX, WORD_SIZE, word)
        try:
            yield
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, WORD_SIZE, word)
