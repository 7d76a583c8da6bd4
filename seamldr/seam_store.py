"""Where SEAM state lives: a log of records in P_SEAMLDR_RANGE, so that it survives the process that serves it.

The log is a row of [u32 name length, u32 data length, name, data] in one half of the range; the first u64 says where
it begins (upper 32 bits) and ends. A record is written before the end moves past it, and a full log is written into
the other half, with only the newest record of each name, before the first u64 goes there: so a writer that is killed
at any moment leaves a whole log.
"""

from __future__ import annotations

import struct

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

    def put(self, name: str, data: bytes) -> None:
        """Keep `data` under `name`; raises `SeamStoreFullError`."""
        if self._newest.get(name) == data:
            return
        self._newest[name] = data
        record = _pack(name, data)
        if self._end + len(record) > self._begin + self._half:
            self._compact()
            return
        self._append(record)

    def _append(self, record: bytes) -> None:
        self._memory.write(self._base + self._end, record)
        self._end += len(record)
        self._memory.write64(self._base, self._begin << 32 | self._end)

    def _compact(self) -> None:
        log = b"".join(_pack(name, data) for name, data in self.records().items())
        if len(log) > self._half:
            raise SeamStoreFullError(f"SEAM state of {len(log)} bytes does not fit {self._half}")
        self._begin = self._end = _START + self._half if self._begin == _START else _START
        self._append(log)


def _pack(name: str, data: bytes) -> bytes:
    encoded = name.encode()
    return _HEAD.pack(len(encoded), len(data)) + encoded + data
