"""Sleeping on memory, as MONITOR and MWAIT do.

A CPU that waits writes the words that it last read into its watch slots, arms each word, and looks at the values once
more; if none changed it may sleep. A store to an armed word searches the slots of all CPUs and rings those that name
it.
"""

from __future__ import annotations

from bus.memory import PhysicalMemory
from cpu.layout import WATCH_SLOTS, WATCH_TABLE, watch_slots

_EMPTY = bytes(WATCH_SLOTS * 8)


def arm(memory: PhysicalMemory, cpu: int, loads: list[tuple[int, int]]) -> bool:
    """Watch the words in `loads` (word, value); True if all still hold these values, so that the CPU may sleep."""
    base = watch_slots(cpu)
    newest_first = dict.fromkeys(word for word, _ in reversed(loads))
    for slot, word in enumerate(list(newest_first)[:WATCH_SLOTS]):
        memory.write64(base + 8 * slot, word)
        memory.arm(word)
    return all(memory.load(word)[0] == value for word, value in loads)


def disarm(memory: PhysicalMemory, cpu: int) -> None:
    """Watch nothing any more."""
    memory.write(watch_slots(cpu), _EMPTY)


def watchers_of(memory: PhysicalMemory, num_cpus: int, word: int) -> list[int]:
    """The CPUs that sleep on `word`, in order."""
    table = memory.read(WATCH_TABLE, num_cpus * WATCH_SLOTS * 8)
    needle = word.to_bytes(8, "little")
    found: list[int] = []
    at = table.find(needle)
    while at >= 0:
        cpu = at // (WATCH_SLOTS * 8)
        if at % 8 == 0 and (not found or found[-1] != cpu):
            found.append(cpu)
        at = table.find(needle, at + 1)
    return found
