"""Physical memory: what lies outside, stamped words, and atomic words between processes that really run at once."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.memory import PAGE_SIZE, U64_MAX, WORD_SIZE, PhysicalMemory

ROOT = Path(__file__).resolve().parents[2]
SIZE = 4 * PAGE_SIZE
WORD = PAGE_SIZE


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    """Memory of this process."""
    memory = PhysicalMemory.private(SIZE)
    yield memory
    memory.close()


@pytest.fixture
def shared() -> Iterator[PhysicalMemory]:
    """Memory that other processes can attach."""
    memory = PhysicalMemory.create(SIZE)
    yield memory
    memory.close()


# Bytes


def test_memory_is_zero_at_power_on(memory: PhysicalMemory, shared: PhysicalMemory) -> None:
    """Every byte reads as 0 before the first write."""
    assert memory.read(0, SIZE) == shared.read(0, SIZE) == bytes(SIZE)


def test_outside_ram_reads_are_all_ones_and_writes_are_lost(memory: PhysicalMemory) -> None:
    """An address behind the end or below 0 has no device; an access across the end is split."""
    for pa in (SIZE, SIZE + 8, 1 << 52, -8):
        memory.write(pa, b"lost")
        memory.write64(pa, 5)
        memory.write32(pa, 5)
        assert memory.read(pa, 4) == b"\xff" * 4
        assert (memory.read64(pa), memory.read32(pa)) == (U64_MAX, 0xFFFF_FFFF)
    memory.write(SIZE - 2, b"abcd")
    assert memory.read(SIZE - 2, 4) == b"ab\xff\xff"
    memory.write64(SIZE - 4, 0x1122_3344_5566_7788)
    assert memory.read64(SIZE - 4) == 0xFFFF_FFFF_5566_7788
    assert memory.read(0, SIZE - 4) == bytes(SIZE - 4)


@given(st.integers(0, 64), st.integers(0, U64_MAX), st.integers(0, 1 << 40))
def test_numbers_are_little_endian_wherever_they_lie(pa: int, wide: int, narrow: int) -> None:
    """A u64 or u32 reads back at any address, aligned or not, and does not touch its neighbours."""
    memory = PhysicalMemory.private(PAGE_SIZE)
    memory.write64(pa, wide)
    assert memory.read64(pa) == wide
    assert memory.read(pa, 8) == wide.to_bytes(8, "little")
    assert memory.read(0, pa) == bytes(pa) and memory.read(pa + 8, 8) == bytes(8)
    memory.write32(pa, narrow)
    assert memory.read32(pa) == narrow & 0xFFFF_FFFF
    assert memory.read32(pa + 4) == wide >> 32


def test_all_mappings_of_one_memory_are_the_same(shared: PhysicalMemory) -> None:
    """What one mapping writes another reads."""
    other = PhysicalMemory.attach(_duplicate(shared))
    shared.write(8, b"hello")
    other.write64(16, 7)
    assert other.read(8, 5) == b"hello" and shared.read64(16) == 7 and other.size == SIZE
    other.close()
    assert shared.read64(16) == 7


def _duplicate(memory: PhysicalMemory) -> int:
    assert memory.fd is not None
    return fcntl.fcntl(memory.fd, fcntl.F_DUPFD_CLOEXEC, 3)


# Words


def test_a_word_is_a_value_with_the_time_of_its_store(memory: PhysicalMemory) -> None:
    """load gives what the last store wrote; neighbours are not touched."""
    assert memory.load(WORD) == (0, 0)
    memory.store(WORD, U64_MAX, 41)
    memory.store(WORD + WORD_SIZE, 5, 42)
    assert memory.load(WORD) == (U64_MAX, 41)
    assert memory.load(WORD + WORD_SIZE) == (5, 42)
    assert memory.load(WORD - WORD_SIZE) == (0, 0)


def test_a_store_learns_whether_somebody_watches(memory: PhysicalMemory) -> None:
    """Armed from `arm` to `disarm`, and neither value nor stamp changes by it."""
    assert memory.store(WORD, 1, 1) is False
    memory.arm(WORD)
    assert [memory.store(WORD, 2, 2), memory.store(WORD, 3, 3)] == [True, True]
    memory.disarm(WORD)
    assert memory.store(WORD, 4, 4) is False
    assert memory.load(WORD) == (4, 4)


# Several processes


PROLOGUE = """
import sys
from bus.memory import PhysicalMemory
memory = PhysicalMemory.attach(int(sys.argv[1]))
WORD = int(sys.argv[2])
"""
ADDER = """
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    with memory.atomic(WORD):
        value, stamp = memory.load(WORD)
        memory.store(WORD, value + 1, stamp + 1)
"""
HOLDER = """
with memory.atomic(WORD):
    print("held", flush=True)
    sys.stdin.read()
"""
WRITER = """
for value in range(1, int(sys.argv[3]) + 1):
    memory.store(WORD, value, value)
"""


def start(memory: PhysicalMemory, code: str, *arguments: int) -> subprocess.Popen[bytes]:
    """A process that runs `code` on the same memory."""
    assert memory.fd is not None
    command = [sys.executable, "-c", PROLOGUE + code, str(memory.fd), str(WORD), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, pass_fds=(memory.fd,), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def end(process: subprocess.Popen[bytes]) -> int:
    """Wait for its end; its status."""
    process.communicate()
    return process.returncode


def test_atomic_additions_of_several_processes_are_all_there(shared: PhysicalMemory) -> None:
    """Three processes add 3,000 each at the same time, and this one as well: no update is lost."""
    each = 3000
    adders = [start(shared, ADDER, each) for _ in range(3)]
    for adder in adders:
        assert adder.stdout is not None and adder.stdout.readline() == b"ready\n"
    for adder in adders:
        assert adder.stdin is not None
        adder.stdin.write(b"go\n")
        adder.stdin.flush()
    for _ in range(each):
        with shared.atomic(WORD):
            value, stamp = shared.load(WORD)
            shared.store(WORD, value + 1, stamp + 1)
    assert [end(adder) for adder in adders] == [0, 0, 0]
    assert shared.load(WORD) == (4 * each, 4 * each)


def test_a_killed_holder_frees_the_word(shared: PhysicalMemory) -> None:
    """The operating system drops the lock of a process that is killed in the middle; other words were never held."""
    holder = start(shared, HOLDER)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError):
        fcntl.lockf(_fd(shared), fcntl.LOCK_EX | fcntl.LOCK_NB, WORD_SIZE, WORD)
    with shared.atomic(WORD + WORD_SIZE):
        shared.store(WORD + WORD_SIZE, 1, 1)
    holder.kill()
    assert end(holder) == -9
    with shared.atomic(WORD):
        shared.store(WORD, 5, 1)
    assert shared.load(WORD) == (5, 1)


def _fd(memory: PhysicalMemory) -> int:
    assert memory.fd is not None
    return memory.fd


def test_a_load_never_sees_a_value_that_is_newer_than_its_stamp(shared: PhysicalMemory) -> None:
    """While another process stores value n with stamp n, n = 1, 2, ..., each load's stamp is at least its value."""
    last = 100_000
    writer = start(shared, WRITER, last)
    value, distinct, previous = 0, 0, 0
    while value < last and writer.poll() is None:
        for _ in range(1000):
            value, stamp = shared.load(WORD)
            assert stamp >= value >= previous
            distinct += value != previous
            previous = value
    assert end(writer) == 0
    assert shared.load(WORD) == (last, last)
    assert distinct > 1
