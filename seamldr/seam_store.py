"""Where SEAM state lives: a log of records in P_SEAMLDR_RANGE, so that it survives the process that serves it.

The log is a row of [u32 name length, u32 data length, name, data]; its first u64 is the offset at which it ends. A
record is written before the end moves past it, so a writer that is killed leaves the log as it was. A full log is
written again with only the newest record of each name.
"""

from __future__ import annotations

import struct

from bus.memory import PhysicalMemory

_HEAD = struct.Struct("<II")
_START = 8


class SeamStoreFullError(Exception):
    """The newest records alone do not fit."""


class SeamStore:
    """A log of `size` bytes at physical address `base`."""

    def __init__(self, memory: PhysicalMemory, base: int, size: int) -> None:
        self._memory = memory
        self._base = base
        self._size = size
        self._end = memory.read64(base) or _START
        self._newest = self._replay()

    def _replay(self) -> dict[str, bytes]:
        newest: dict[str, bytes] = {}
        at = _START
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
        if self._end + len(record) > self._size:
            self._compact()
            return
        self._append(record)

    def _append(self, record: bytes) -> None:
        self._memory.write(self._base + self._end, record)
        self._end += len(record)
        self._memory.write64(self._base, self._end)

    def _compact(self) -> None:
        log = b"".join(_pack(name, data) for name, data in self.records().items())
        if _START + len(log) > self._size:
            raise SeamStoreFullError(f"SEAM state of {len(log)} bytes does not fit {self._size}")
        self._end = _START
        self._memory.write64(self._base, self._end)
        self._append(log)


def _pack(name: str, data: bytes) -> bytes:
    encoded = name.encode()
    return _HEAD.pack(len(encoded), len(data)) + encoded + data
