"""User space of the TDs that are built while the machine runs: it asks KVM step by step, as a virtual machine monitor
does, and knows what its TD must measure.

Between two steps any time may pass. A build that waits for an update in the middle shows what the update does to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol

from bus.memory import PAGE_SIZE
from bus.messages import AdminDone
from bus.spec import MachineSpec
from cpu.layout import MAX_TDS
from kvm.workload import Build
from seamldr.tdx_td import mrtd_of

PAGES = 2
"""Pages that a TD starts with."""
RUNS = 3
ATTEMPTS = 2
"""How often a TD is built if its build fails."""


class UserSpace(Protocol):
    """What the owner of TDs needs of the KVM process."""

    spec: MachineSpec
    emit: Callable[..., int]

    async def td_command(self, command: str, td: int, task: int, contents: Iterable[bytes] = ()) -> AdminDone:
        """Have a CPU do one step; `contents` are copied to pages of user space before."""

    async def next_update(self) -> None:
        """Return when the next update has ended, when it waits for TDs in build, or when no more will come."""

    def count(self, fact: str, by: int = 1) -> None:
        """One more of something."""

    def version(self) -> str | None:
        """The running module's version; None if there is none."""


def contents(td: int) -> list[bytes]:
    """The pages that a TD starts with: for each TD others."""
    seeds = [b"td %d page %d" % (td, page) for page in range(PAGES)]
    return [hashlib.shake_128(seed).digest(PAGE_SIZE) for seed in seeds]


class TdOwner:
    """Builds TDs, lets them run a little, and ends them."""

    def __init__(self, user_space: UserSpace) -> None:
        self._user = user_space
        self._free = list(range(user_space.spec.tds, MAX_TDS))
        self.in_build = 0
        """TDs whose build has begun and not ended."""
        self.not_waiting = 0
        """Of these, those that are going to wait for an update and have not come so far."""

    async def live(self, action: Build) -> None:
        """A TD from its first step to its last; built again if the build fails while there is a module."""
        for _ in range(ATTEMPTS):
            if not self._free or self._user.version() is None:
                return
            td = self._free.pop(0)
            built = await self._build(td, action.over_update)
            self._user.count("tds_built" if built else "tds_failed")
            if built:
                await self._run(td)
            if await self._end(td):
                self._free.append(td)
            if built:
                return

    async def _step(self, command: str, td: int, pages: Iterable[bytes] = ()) -> AdminDone:
        return await self._user.td_command(command, td, self._user.spec.vcpus + td, pages)

    async def _build(self, td: int, over_update: bool) -> bool:
        self.in_build += 1
        pages = contents(td)
        begun = await self._begin(td, pages, over_update)
        if begun and over_update:
            await self._user.next_update()
        done = await self._step("finalize_vm", td) if begun else None
        self.in_build -= 1
        if done is None or done.errno:
            return False
        expected = mrtd_of({PAGE_SIZE * index: page for index, page in enumerate(pages)}).hex()
        self._user.emit("td_measured", td=td, mrtd=done.text, expected=expected)
        return True

    async def _begin(self, td: int, pages: list[bytes], over_update: bool) -> bool:
        self.not_waiting += over_update
        good = True
        for command, given in (("init_vm", [b""]), ("init_vcpu", []), ("init_mem_region", pages)):
            good = good and not (await self._step(command, td, given)).errno
        self.not_waiting -= over_update
        self._user.count("tds_begun", int(good))
        return good

    async def _run(self, td: int) -> None:
        for _ in range(RUNS):
            if (await self._step("run", td)).errno:
                return

    async def _end(self, td: int) -> bool:
        done = await self._step("destroy", td)
        self._user.count("tds_ended", int(not done.errno))
        return not done.errno
