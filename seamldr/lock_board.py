"""What the lock service shows of its queues to whoever looks on: a row a lock, in shared memory. A pure core.

It is for eyes, not for decisions: a look may meet a row that is half written. Rows and their counts outlive the
process that writes them.
"""

from __future__ import annotations

import struct
from itertools import islice

import msgspec

from bus.memory import PhysicalMemory
from bus.spec import cpu_number
from cpu.layout import LOCK_BOARD
from seamldr.lock_queue import LockQueue, Request

MAX_LOCKS = 64
SHOWN = 23
"""Waiting CPUs in a row; of more only the number is told."""
NOBODY = 0xFFFF

_NAME = 40
_ROW = struct.Struct(f"<{_NAME}s4QH{SHOWN}H")


class LockRow(msgspec.Struct, frozen=True):
    """One lock. `since_ns` is when the holder was granted it, by the monotonic clock; `waiting` are the first CPUs of
    `waiters`. `grants` and `waited_ns` (all waits together) count from the machine's beginning.
    """

    name: str
    holder: int | None = None
    since_ns: int = 0
    waiting: tuple[int, ...] = ()
    waiters: int = 0
    grants: int = 0
    waited_ns: int = 0


class _Kept(msgspec.Struct):
    """Where the row of a lock is, and its counts."""

    address: int
    name: bytes
    grants: int = 0
    waited_ns: int = 0


class LockBoard:
    """The rows, as the lock service writes them."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._kept: dict[str, _Kept] = {}
        for row in read_locks(memory):
            kept = self._keep(row.name)
            kept.grants, kept.waited_ns = row.grants, row.waited_ns

    def _keep(self, name: str) -> _Kept:
        kept = _Kept(LOCK_BOARD + len(self._kept) * _ROW.size, name.encode()[:_NAME])
        return self._kept.setdefault(name, kept)

    def show(self, queue: LockQueue, waited_ns: int | None = None) -> None:
        """The queue as it is now; `waited_ns` if its holder has just been granted the lock."""
        kept = self._kept.get(queue.name) or self._keep(queue.name)
        if waited_ns is not None:
            kept.grants += 1
            kept.waited_ns += waited_ns
        holder, waiting = queue.holder, [_number(request) for request in islice(queue.waiting, SHOWN)]
        row = _ROW.pack(
            kept.name,
            queue.granted_ns if holder else 0,
            len(queue.waiting),
            kept.grants,
            kept.waited_ns,
            _number(holder.request) if holder else NOBODY,
            *waiting,
            *(NOBODY,) * (SHOWN - len(waiting)),
        )
        self._memory.write(kept.address, row)


def _number(request: Request) -> int:
    number = cpu_number(request.node)
    return NOBODY if number is None else number


def read_locks(memory: PhysicalMemory) -> list[LockRow]:
    """All locks that anybody has asked for, in the order of their first use."""
    table, rows = memory.read(LOCK_BOARD, MAX_LOCKS * _ROW.size), []
    for name, since, waiters, grants, waited, holder, *waiting in _ROW.iter_unpack(table):
        name = name.rstrip(b"\0").decode(errors="replace")
        if not name:
            break
        rows.append(
            LockRow(
                name=name,
                holder=None if holder == NOBODY else holder,
                since_ns=since,
                waiting=tuple(number for number in waiting if number != NOBODY),
                waiters=waiters,
                grants=grants,
                waited_ns=waited,
            )
        )
    return rows
