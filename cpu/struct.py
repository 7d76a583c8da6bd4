"""C structures in shared memory.

A `KernelStruct` is an address with named words. `v.cpu` is the *address* of the field, as `&v->cpu` is in C, so
kernel code reads `await cpu.load(v.cpu)` and writes `await cpu.store(v.cpu, NONE)`: each is one operation of the
machine.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from bus.memory import WORD_SIZE

NONE = 0xFFFF_FFFF_FFFF_FFFF
"""All ones: no VMCS, no CPU."""


class Word:
    """One stamped word of a structure, or `count` of them in a row; reads as the address of the first."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.offset = 0

    def __get__(self, instance: KernelStruct, owner: type) -> int:
        return instance.address + self.offset


class KernelStruct:
    """Base of structures in shared memory; words are laid out in the order of their declaration."""

    __slots__ = ("address",)
    SIZE: ClassVar[int] = 0

    def __init__(self, address: int) -> None:
        self.address = address

    def __init_subclass__(cls) -> None:
        offset = 0
        for base in reversed(cls.__mro__):
            for value in vars(base).values():
                if isinstance(value, Word):
                    value.offset = offset
                    offset += value.count * WORD_SIZE
        cls.SIZE = offset

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.address == other.address

    def __hash__(self) -> int:
        return hash((type(self), self.address))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.address:#x}>"


class ListHead(KernelStruct):
    """`struct list_head`."""

    next = Word()
    prev = Word()


S = TypeVar("S", bound=KernelStruct)


def container_of(pointer: int, kind: type[S], member: str) -> S:
    """The structure of type `kind` whose `member` is at `pointer`."""
    word = vars(kind)[member]
    return kind(pointer - word.offset)
