"""list_head in shared memory, against a Python list."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_bench import LoopBench

from bus.memory import WORD_SIZE
from cpu.cpu import Cpu
from cpu.layout import KERNEL_WORDS
from cpu.lists import ListWalk, init_list_head, list_add, list_del
from cpu.struct import KernelStruct, ListHead, Word, container_of

AT = KERNEL_WORDS + 0x1_0000
NODE = 4 * WORD_SIZE


class Item(KernelStruct):
    """Something with a list_head inside."""

    value = Word()
    link = Word(2)
    after = Word()


def node(index: int) -> int:
    """Address of the list_head number `index`; number 0 is the head."""
    return AT + index * NODE


def both_ways(bench: LoopBench) -> tuple[list[int], list[int]]:
    """The entries by `next` and by `prev`, as numbers of nodes."""
    found: list[list[int]] = []
    for direction in ("next", "prev"):
        entries, at = [], bench.memory.load(getattr(ListHead(node(0)), direction))[0]
        while at != node(0):
            entries.append((at - AT) // NODE)
            at = bench.memory.load(getattr(ListHead(at), direction))[0]
        found.append(entries)
    return found[0], found[1]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 6), max_size=20))
def test_adding_and_deleting_keeps_both_directions(toggles: list[int]) -> None:
    """An entry is added right after the head if it is not on the list, else deleted; `next` and `prev` agree."""
    bench, model = LoopBench(), list[int]()

    async def change(cpu: Cpu) -> None:
        await init_list_head(cpu, node(0))
        for index in toggles:
            if index in model:
                model.remove(index)
                await list_del(cpu, node(index))
            else:
                model.insert(0, index)
                await list_add(cpu, node(index), node(0))

    bench.run(change)
    assert both_ways(bench) == (model, model[::-1])


async def walk(cpu: Cpu, delete: set[int]) -> list[int]:
    """The entries met by a walk that unlinks some of them as it meets them."""
    met = []
    async for entry in ListWalk(cpu, node(0)):
        index = (entry - AT) // NODE
        met.append(index)
        if index in delete:
            await list_del(cpu, entry)
    return met


@pytest.mark.parametrize("delete", [set(), {1}, {2}, {3}, {1, 2, 3}], ids=str)
def test_a_walk_meets_every_entry_even_if_it_unlinks_them(delete: set[int]) -> None:
    """list_for_each_safe: the successor is read before the entry is handed out."""
    bench = LoopBench()

    async def fill(cpu: Cpu) -> list[int]:
        await init_list_head(cpu, node(0))
        for index in (1, 2, 3):
            await list_add(cpu, node(index), node(0))
        return await walk(cpu, delete)

    assert bench.run(fill) == [3, 2, 1]
    assert both_ways(bench)[0] == [index for index in (3, 2, 1) if index not in delete]


def test_every_store_of_a_list_operation_is_an_operation() -> None:
    """Between the four stores of list_add another context can look: the new entry is reachable only at the end."""
    bench = LoopBench()
    bench.run(lambda cpu: init_list_head(cpu, node(0)))
    bench.start(lambda cpu: list_add(cpu, node(1), node(0)))
    seen = []
    while bench.machine.ready():
        bench.step()
        seen.append(bench.memory.load(ListHead(node(0)).next)[0] == node(1))
    assert seen.count(False) == 4 and seen[4]


def test_container_of_goes_from_a_member_to_its_structure() -> None:
    """Members are laid out in order, and container_of subtracts the member's offset."""
    item = Item(0x5000)
    assert (item.value, item.link, item.after) == (0x5000, 0x5020, 0x5060)
    assert Item.SIZE == 0x80
    assert container_of(item.link, Item, "link") == item != Item(0x6000)
    assert len({item, Item(0x5000), ListHead(0x5000)}) == 2
