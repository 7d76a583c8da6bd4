"""What each CPU shows of itself to whoever looks on from outside: a row of plain u64 in shared memory. A pure core.

Its process stores a few words when it begins to wait and when it goes on; no kernel code reads them, and reading them
costs the CPUs nothing. A look may come between two stores: a row is for eyes, never for a verdict.

    +0 doing    +8 since (monotonic ns, 0 before its first process)    +16 detail
    +24 VM exits    +32 calls that entered P-SEAMLDR    +40 IPIs delivered    +48 failed VMREADs, VMWRITEs and entries
    +64 nanoseconds spent in each of `SPENT_IN`, without the present one
"""

from __future__ import annotations

import enum
import struct

import msgspec

from bus.memory import PhysicalMemory
from cpu.core import Counters
from cpu.layout import BOARD, BOARD_ROW


class Doing(enum.IntEnum):
    """What a CPU is in the middle of. Of itself it can say only what is in `SPENT_IN`."""

    OFFLINE = 0
    KERNEL = 1
    GUEST = 2
    """Detail: the task, plus 1."""
    LOCK = 3
    """Waits for a lock of the lock service."""
    P_SEAMLDR = 4
    """In a SEAMCALL to P-SEAMLDR, on the way there and back too. Detail: RAX."""
    SEAM = 5
    """In a SEAMCALL to the TDX module, or in a TD. Detail: RAX."""
    STOPPED = 6
    """Waits in stop_machine."""
    WAITS = 7
    """Spins for another CPU in any other way."""
    IDLE = 8
    STANDS = 9
    """Its process stands still at the point of a fault."""
    SIGSTOPPED = 10
    DEAD = 11


SPENT_IN = (
    Doing.KERNEL, Doing.GUEST, Doing.LOCK, Doing.P_SEAMLDR, Doing.SEAM, Doing.STOPPED, Doing.WAITS, Doing.IDLE,
)  # fmt: skip

_WORDS = BOARD_ROW // 8
_COUNTS = 3
_SPENT = 8
_ROW = struct.Struct(f"<{_WORDS}Q")


class Row(msgspec.Struct, frozen=True):
    """A row as it was read. `spent_ns` has the time in each of `SPENT_IN`, up to `since_ns`."""

    doing: Doing
    since_ns: int
    detail: int
    exits: int
    calls: int
    ipis: int
    errors: int
    spent_ns: tuple[int, ...]


class Board:
    """The row of one CPU, as its process writes it. Counts go on from those of the process before."""

    def __init__(self, memory: PhysicalMemory, number: int, count: Counters) -> None:
        self.calls = 0
        self._words = memory.words(BOARD + number * BOARD_ROW, _WORDS)
        self._count = count
        self._before = tuple(self._words[_COUNTS : _COUNTS + 4])
        self._words[0] = Doing.OFFLINE

    def change(self, doing: Doing, now_ns: int, detail: int = 0) -> None:
        """From now on the CPU does this."""
        words, count, before = self._words, self._count, self._before
        was, since = words[0], words[1]
        if since and 0 < was <= len(SPENT_IN):
            words[_SPENT - 1 + was] += now_ns - since
        words[0], words[1], words[2] = doing, now_ns, detail
        words[3] = before[0] + count.exits
        words[4] = before[1] + self.calls
        words[5] = before[2] + count.ipis_delivered
        words[6] = before[3] + count.vmread_errors + count.vmwrite_errors + count.entry_errors


def read_rows(memory: PhysicalMemory, cpus: int) -> list[Row]:
    """The rows of all CPUs."""
    return [
        Row(Doing(row[0]), row[1], row[2], row[3], row[4], row[5], row[6], row[_SPENT:])
        for row in _ROW.iter_unpack(memory.read(BOARD, cpus * BOARD_ROW))
    ]
