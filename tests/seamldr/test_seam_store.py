"""The log in the SEAM range: it survives its writer, whenever that is killed, and keeps the newest of each name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.memory import PhysicalMemory
from seamldr.seam_store import SeamStore, SeamStoreFullError

BASE = 4096
SIZE = 512


def memory() -> PhysicalMemory:
    """Zeroed memory with room for the log and its neighbours."""
    return PhysicalMemory.private(3 * 4096)


def reopened(ram: PhysicalMemory, size: int = SIZE) -> dict[str, bytes]:
    """What a process that takes over finds."""
    return SeamStore(ram, BASE, size).records()


def test_an_empty_log_has_no_records() -> None:
    """Zeroed memory is an empty log."""
    assert reopened(memory()) == {}


def test_the_newest_record_of_a_name_survives_reopening() -> None:
    """Another store over the same memory finds the last data of each name."""
    ram = memory()
    store = SeamStore(ram, BASE, SIZE)
    for name, data in (("a", b"1"), ("b", b"two"), ("a", b"three"), ("größe", bytes(20))):
        store.commit({name: data})
    assert store.records() == reopened(ram) == {"a": b"three", "b": b"two", "größe": bytes(20)}


def test_a_record_without_data_is_gone() -> None:
    """Empty data deletes a name, also for those who reopen."""
    ram = memory()
    store = SeamStore(ram, BASE, SIZE)
    store.commit({"a": b"1"})
    store.commit({"a": b""})
    assert store.records() == reopened(ram) == {}


def test_what_has_not_changed_is_not_written() -> None:
    """Keeping the same data again moves nothing; nor does deleting what is not there."""
    ram = memory()
    store = SeamStore(ram, BASE, SIZE)
    store.commit({"a": b"1"})
    before = ram.read(0, ram.size)
    store.commit({"a": b"1", "b": b""})
    assert ram.read(0, ram.size) == before


class Killed(Exception):
    """The writer is killed before a write."""


class MortalMemory(PhysicalMemory):
    """Memory whose user is killed before its write number `left` (from 0)."""

    left = 1 << 30

    def _count(self) -> None:
        if not self.left:
            raise Killed
        self.left -= 1

    def write(self, pa: int, data: bytes) -> None:
        self._count()
        super().write(pa, data)

    def write64(self, pa: int, value: int) -> None:
        self._count()
        super().write64(pa, value)


def test_a_torn_tail_is_as_if_it_had_not_been_written() -> None:
    """Bytes behind the end word, whole record or part of it, are nothing; the next record takes their place."""
    ram = MortalMemory.private(3 * 4096)
    store = SeamStore(ram, BASE, SIZE)
    store.commit({"a": b"old"})
    ram.left = 1
    with pytest.raises(Killed):
        store.commit({"a": b"new"})
    ram.left = 1 << 30
    assert b"new" in ram.read(BASE, SIZE)
    successor = SeamStore(ram, BASE, SIZE)
    assert successor.records() == {"a": b"old"}
    successor.commit({"b": b"next"})
    assert b"new" not in ram.read(BASE, SIZE)
    assert reopened(ram) == {"a": b"old", "b": b"next"}


def test_a_full_log_is_written_again_with_the_newest_only() -> None:
    """Many generations of few names fit for ever."""
    ram = memory()
    store = SeamStore(ram, BASE, SIZE)
    for number in range(500):
        store.commit({f"name {number % 3}": number.to_bytes(16, "little")})
        assert reopened(ram) == store.records()
    assert store.records() == {f"name {number % 3}": number.to_bytes(16, "little") for number in (497, 498, 499)}
    assert ram.read(BASE + SIZE, 4096) == bytes(4096) and ram.read(0, BASE) == bytes(BASE)


def test_deleted_names_take_no_room_after_compaction() -> None:
    """A name that is gone is not written again."""
    ram = memory()
    store = SeamStore(ram, BASE, SIZE)
    for number in range(200):
        store.commit({f"name {number}": b"x" * 20})
        store.commit({f"name {number}": b""})
    assert reopened(ram) == {}


def test_what_does_not_fit_is_an_error() -> None:
    """If the newest records alone are too large, commit says so, and what was there before stays."""
    ram = memory()
    store = SeamStore(ram, BASE, SIZE)
    store.commit({"a": bytes(150)})
    with pytest.raises(SeamStoreFullError, match="does not fit 252"):
        store.commit({"b": bytes(150)})
    assert store.records() == reopened(ram) == {"a": bytes(150)}


def test_an_erased_log_is_empty() -> None:
    """As after a power cycle: nothing is found any more, and new records have their place."""
    ram = memory()
    store = SeamStore(ram, BASE, SIZE)
    store.commit({"a": b"old"})
    store.erase()
    assert store.records() == reopened(ram) == {}
    store.commit({"b": b"new"})
    assert store.records() == reopened(ram) == {"b": b"new"}


Records = dict[str, bytes]


def survivors(commits: list[Records], death: int) -> tuple[Records, list[Records]]:
    """What is found after a writer was killed before its write number `death`, and what may be found."""
    ram = MortalMemory.private(3 * 4096)
    store = SeamStore(ram, BASE, SIZE)
    ram.left = death
    now: Records = {}
    allowed = [now]
    try:
        for commit in commits:
            following = {key: value for key, value in (now | commit).items() if value}
            allowed = [now, following]
            store.commit(commit)
            now = following
            allowed = [now]
    except Killed:
        pass
    ram.left = 1 << 30
    return reopened(ram), allowed


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.binary(max_size=40), max_size=3), max_size=30),
    st.integers(0, 80),
)
def test_a_writer_killed_at_any_write_leaves_the_old_or_the_new(commits: list[Records], death: int) -> None:
    """Whoever takes over finds the records before the last commit or all of them after it, never some of each."""
    found, allowed = survivors(commits, death)
    assert found in allowed


def test_a_writer_killed_while_it_writes_the_log_again_loses_nothing() -> None:
    """Over several compactions, death before each single write in turn."""
    commits = [{"abc"[(number + n) % 3]: bytes([number]) * 30 for n in range(2)} for number in range(40)]
    for death in range(90):
        found, allowed = survivors(commits, death)
        assert found in allowed, death
