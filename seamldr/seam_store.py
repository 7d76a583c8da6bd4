"""Where SEAM state lives: a log of records in P_SEAMLDR_RANGE, so that it survives the process that serves it.

The log is a row of [u32 name length, u32 data length, name, data] in one half of the range; the first u64 says where
it begins (upper 32 bits) and ends. The records of one commit are written before the end moves past all of them, and a
full log is written into the other half, with only the newest record of each name, before the first u64 goes there: so
a writer that is killed at any moment leaves a whole log, with all records of its last commit or none.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from bus.memory import PhysicalMemory

_HEAD = struct.Struct("<II")
_START = 8


class SeamStoreFullError(Exception):
    """The newest records alone do not fit."""


class SeamStore:
    """A log in `size` bytes at physical address `base`, of which it uses one half at a time."""

    def __init__(self, memory: PhysicalMemory, base: int, size: int) -> None:
        self._memory = memory
        self._base = base
        self._half = (size - _START) // 2
        where = memory.read64(base)
        self._begin, self._end = (where >> 32, where & 0xFFFF_FFFF) if where else (_START, _START)
        self._newest = self._replay()

    def _replay(self) -> dict[str, bytes]:
        newest: dict[str, bytes] = {}
        at = self._begin
        while at < self._end:
            name_length, length = _HEAD.unpack(self._memory.read(self._base + at, _HEAD.size))
            at += _HEAD.size
            name = self._memory.read(self._base + at, name_length).decode()
            newest[name] = self._memory.read(self._base + at + name_length, length)
            at += name_length + length
        return newest

    def records(self) -> dict[str, bytes]:
        """The newest data of each name; a record of no bytes is gone."""
        return {name: data for name, data in self._newest.items() if data}

    def commit(self, records: Mapping[str, bytes]) -> None:
        """Keep each record under its name, all at once; raises `SeamStoreFullError`, and then nothing has changed."""
        changed = {name: data for name, data in records.items() if self._newest.get(name, b"") != data}
        if not changed:
            return
        log = _pack(changed)
        if self._end + len(log) > self._begin + self._half:
            self._compact(changed)
        else:
            self._append(log)
        self._newest |= changed

    def erase(self) -> None:
        """Forget everything, as RAM does when the machine is switched off."""
        self._memory.write64(self._base, 0)
        self._begin = self._end = _START
        self._newest = {}

    def _append(self, record: bytes) -> None:
        self._memory.write(self._base + self._end, record)
        self._end += len(record)
        self._memory.write64(self._base, self._begin << 32 | self._end)

    def _compact(self, changed: dict[str, bytes]) -> None:
        log = _pack({name: data for name, data in (self._newest | changed).items() if data})
        if len(log) > self._half:
            raise SeamStoreFullError(f"SEAM state of {len(log)} bytes does not fit {self._half}")
        self._begin = self._end = _START + self._half if self._begin == _START else _START
        self._append(log)


def _pack(records: Mapping[str, bytes]) -> bytes:
    packed = []
    for name, data in records.items():
        encoded = name.encode()
        packed += [_HEAD.pack(len(encoded), len(data)), encoded, data]
    return b"".join(packed)
