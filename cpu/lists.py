"""`struct list_head` and its operations (include/linux/list.h), word by word in shared memory."""

from __future__ import annotations

from cpu.cpu import Cpu
from cpu.struct import ListHead


async def init_list_head(cpu: Cpu, head: int) -> None:
    """INIT_LIST_HEAD."""
    entry = ListHead(head)
    await cpu.store(entry.next, head)
    await cpu.store(entry.prev, head)


async def list_add(cpu: Cpu, new: int, head: int) -> None:
    """Insert `new` right after `head`."""
    after = await cpu.load(ListHead(head).next)
    await cpu.store(ListHead(after).prev, new)
    await cpu.store(ListHead(new).next, after)
    await cpu.store(ListHead(new).prev, head)
    await cpu.store(ListHead(head).next, new)


async def list_del(cpu: Cpu, entry: int) -> None:
    """Unlink `entry`."""
    after = await cpu.load(ListHead(entry).next)
    before = await cpu.load(ListHead(entry).prev)
    await cpu.store(ListHead(after).prev, before)
    await cpu.store(ListHead(before).next, after)


class ListWalk:
    """list_for_each_safe: `async for` over the entries; the one at hand may be unlinked, its successor is read
    before.
    """

    def __init__(self, cpu: Cpu, head: int) -> None:
        self.cpu = cpu
        self.head = head
        self.following: int | None = None

    def __aiter__(self) -> ListWalk:
        return self

    async def __anext__(self) -> int:
        entry = self.following
        if entry is None:
            entry = await self.cpu.load(ListHead(self.head).next)
        if entry == self.head:
            raise StopAsyncIteration
        self.following = await self.cpu.load(ListHead(entry).next)
        return entry
