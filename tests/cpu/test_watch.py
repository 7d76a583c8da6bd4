"""Sleeping on memory: whoever goes to sleep while a word is stored is woken, in every interleaving."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.memory import WORD_SIZE, PhysicalMemory
from cpu.layout import KERNEL_WORDS, WATCH_SLOTS, WATCH_TABLE
from cpu.watch import arm, disarm, watchers_of

SIZE = WATCH_TABLE + 0x1_0000
WORDS = [KERNEL_WORDS + WORD_SIZE * index for index in range(20)]
CPUS = 4


def test_arming_after_a_change_says_do_not_sleep() -> None:
    """A word that no longer holds the value that was read forbids sleep; one that does allows it."""
    memory = PhysicalMemory.private(SIZE)
    memory.store(WORDS[0], 5, 1)
    assert not arm(memory, 0, [(WORDS[0], 4)])
    assert not arm(memory, 0, [(WORDS[0], 4), (WORDS[1], 0)])
    assert arm(memory, 0, [(WORDS[0], 5), (WORDS[1], 0)])
    assert arm(memory, 0, [])


def test_a_store_after_arming_finds_the_sleepers() -> None:
    """The store learns that somebody watches, and the table names every CPU that does, once and in order."""
    memory = PhysicalMemory.private(SIZE)
    assert not memory.store(WORDS[0], 1, 1)
    for cpu in (3, 1):
        assert arm(memory, cpu, [(WORDS[1], 0), (WORDS[0], 1), (WORDS[0], 1)])
    assert memory.store(WORDS[0], 2, 2)
    assert watchers_of(memory, CPUS, WORDS[0]) == [1, 3]
    assert watchers_of(memory, CPUS, WORDS[2]) == []
    assert watchers_of(memory, 3, WORDS[0]) == [1]


def test_a_cpu_that_watches_nothing_any_more_is_not_found() -> None:
    """disarm empties the slots of one CPU and no other's."""
    memory = PhysicalMemory.private(SIZE)
    for cpu in range(CPUS):
        arm(memory, cpu, [(WORDS[0], 0)])
    disarm(memory, 2)
    assert watchers_of(memory, CPUS, WORDS[0]) == [0, 1, 3]


def test_a_word_that_is_read_often_takes_one_slot() -> None:
    """Of many loads the newest distinct words are watched."""
    memory = PhysicalMemory.private(SIZE)
    loads = [(WORDS[index], 0) for index in range(WATCH_SLOTS)] + [(WORDS[0], 0)] * 9
    assert arm(memory, 1, loads)
    assert all(watchers_of(memory, CPUS, WORDS[index]) == [1] for index in range(WATCH_SLOTS))
    assert arm(memory, 2, [(word, 0) for word in WORDS])
    watched = [word for word in WORDS if 2 in watchers_of(memory, CPUS, word)]
    assert watched == WORDS[-WATCH_SLOTS:]


@given(st.lists(st.tuples(st.integers(0, CPUS - 1), st.sampled_from(WORDS)), max_size=12))
def test_watchers_against_a_model(armed: list[tuple[int, int]]) -> None:
    """After any arming, a word is watched by those CPUs whose last arming named it."""
    memory, model = PhysicalMemory.private(SIZE), dict[int, int]()
    for cpu, word in armed:
        disarm(memory, cpu)
        arm(memory, cpu, [(word, 0)])
        model[cpu] = word
    for word in WORDS:
        assert watchers_of(memory, CPUS, word) == sorted(cpu for cpu, on in model.items() if on == word)


def test_an_address_is_found_in_slots_only() -> None:
    """Bytes that happen to look like an address across two slots are no watcher."""
    memory = PhysicalMemory.private(SIZE)
    word = 0x0000_0001_0000_0000
    memory.write64(WATCH_TABLE, 0x0000_0000_0000_0000)
    memory.write(WATCH_TABLE + 4, word.to_bytes(8, "little"))
    assert watchers_of(memory, CPUS, word) == []


# Every interleaving


class Turns:
    """Two threads that touch memory one access at a time, in a given order; who is done gives way for good."""

    def __init__(self, order: list[int]) -> None:
        self.order = order
        self.changed = threading.Condition()
        self.done: set[int] = set()
        self.local = threading.local()

    def gate(self) -> None:
        """Wait for this thread's turn."""
        me = self.local.number
        with self.changed:
            self.changed.wait_for(lambda: self._whose() == me)
            if self.order:
                self.order.pop(0)
            self.changed.notify_all()

    def _whose(self) -> int:
        while self.order and self.order[0] in self.done:
            self.order.pop(0)
        return self.order[0] if self.order else min({0, 1} - self.done)

    def run(self, bodies: list[Callable[[], None]]) -> None:
        """Run both bodies to their ends."""

        def body(number: int) -> None:
            self.local.number = number
            bodies[number]()
            with self.changed:
                self.done.add(number)
                self.changed.notify_all()

        threads = [threading.Thread(target=body, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Gated:
    """A buffer each of whose accesses waits for its turn."""

    def __init__(self, buffer: Any, turns: Turns) -> None:
        self.buffer = buffer
        self.turns = turns

    def __getitem__(self, index: Any) -> Any:
        self.turns.gate()
        return self.buffer[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.turns.gate()
        self.buffer[index] = value


SLEEPER_ACCESSES, STORER_ACCESSES = 4, 10
ORDERS = [
    [0 if turn in mine else 1 for turn in range(SLEEPER_ACCESSES + STORER_ACCESSES)]
    for mine in combinations(range(SLEEPER_ACCESSES + STORER_ACCESSES), SLEEPER_ACCESSES)
]


@pytest.mark.parametrize("already_armed", [False, True], ids=["fresh", "armed by a third"])
def test_no_wake_up_is_lost(already_armed: bool) -> None:
    """In all 1,001 orders of memory accesses, a CPU that sleeps is rung by one of two stores: the old value, then 7."""
    slept = 0
    for order in ORDERS:
        memory, turns = PhysicalMemory.private(SIZE), Turns(list(order))
        word, sleeps, rung = WORDS[0], list[bool](), list[int]()
        if already_armed:
            arm(memory, 2, [(word, 0)])
        memory.__dict__["_words"] = Gated(memory.__dict__["_words"], turns)
        memory.__dict__["_bytes"] = Gated(memory.__dict__["_bytes"], turns)

        def sleeper(memory: PhysicalMemory = memory, word: int = word, sleeps: list[bool] = sleeps) -> None:
            sleeps.append(arm(memory, 1, [(word, 0)]))

        def storer(memory: PhysicalMemory = memory, word: int = word, rung: list[int] = rung) -> None:
            for value in (0, 7):
                if memory.store(word, value, 1):
                    memory.disarm(word)
                    rung += watchers_of(memory, CPUS, word)

        turns.run([sleeper, storer])
        assert not sleeps[0] or 1 in rung, order
        assert not already_armed or 2 in rung
        slept += sleeps[0]
    assert 0 < slept < len(ORDERS)
