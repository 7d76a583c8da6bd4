"""A kernel behind the files of the update's interface that answers as a test tells it to, and images for it."""

from __future__ import annotations

from typing import Any

import trio

from bus.records import Record, complaint
from kvm.stepped import module
from seamldr.image import build_v1, build_v2
from seamldr.structures import SeamldrInfo
from seamldr.upload import Support

SUPPORTED = Support(sysinfo=True, features0=0b10, erratum=False)
V1, V2 = build_v1(module("1.5.09")), build_v2(module("1.5.09"))


class FakeHost:
    """A kernel with 7 updates left. `gate` set: installs go on."""

    def __init__(self) -> None:
        self.info = (0, 7)
        self.result = 0
        self.running: str | None = "1.5.08"
        self.online = True
        self.gate = trio.Event()
        self.gate.set()
        self.installed: list[bytes] = []
        self.refused: list[int] = []
        self.lines: list[str] = []
        self.calls = 0
        self.lock = trio.Lock()
        self.records: list[Record] = []

    async def seamldr_info(self) -> tuple[int, SeamldrInfo | None]:
        """One call."""
        self.calls += 1
        errno, remaining = self.info
        seamextend = SeamldrInfo.decode(bytes(256)).seamextend
        info = SeamldrInfo(0, 0, 0x8086, 0, 0, 5, 1, 2, 0, remaining, seamextend, 0)
        return errno, None if errno else info

    async def install(self, image: bytes, length: int) -> int:
        """As long as the gate is shut."""
        async with self.lock:
            await self.gate.wait()
            self.installed.append(image)
            if not self.result:
                self.runs("1.5.09")
            return self.result

    def runs(self, version: str | None) -> None:
        """This module runs now, or none does."""
        self.running = version
        self.emit("module_init_flag", initialized=int(version is not None), version=version or "1.5.08")

    async def settled(self) -> None:
        """When no install runs."""
        async with self.lock:
            pass

    def version(self) -> str | None:
        """Of the module."""
        return self.running

    def all_online(self) -> bool:
        """All CPUs."""
        return self.online

    def emit(self, event: str, /, **fields: Any) -> int:
        """Kept, if it is as the event table says."""
        at = len(self.records) + 1
        record = {"ts": at, "clock": at, "node": "kvm", "pid": 1, "seq": at, "event": event, **fields}
        assert complaint(record) is None
        self.records.append(record)
        return at

    def log(self, text: str) -> None:
        """Kept."""
        self.lines.append(text)

    def refuse(self, error: int, why: str) -> None:
        """Kept."""
        self.refused.append(error)
