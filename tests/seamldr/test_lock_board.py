"""What the lock service shows of its queues is what they are, after each change and in the next service, too."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus.link import Identity
from bus.memory import PhysicalMemory
from bus.messages import LockAcquire, LockGrant, LockRelease
from bus.node import Node
from cpu.layout import LOCK_BOARD
from seamldr.lock_board import SHOWN, LockBoard, read_locks
from seamldr.lock_queue import LockQueue, Request
from seamldr.lock_service import LockService
from seamldr.seam_store import SeamStore

STORE = 4096


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    """Room for the rows, and for what a lock service keeps."""
    memory = PhysicalMemory.private(LOCK_BOARD + (1 << 20))
    yield memory
    memory.close()


def request(cpu: int, number: int = 1) -> Request:
    """A CPU asks for a lock at time 0."""
    return Request(f"cpu{cpu}", 1, number, 0, 0)


def test_a_row_has_the_holder_and_the_queue_in_order(memory: PhysicalMemory) -> None:
    """Holder, since when, who waits, how many; a free lock has nobody."""
    board, queue = LockBoard(memory), LockQueue("seamldr_lock", 1)
    for cpu in (3, 1, 2):
        queue.acquire(request(cpu))
    queue.granted_ns = 77
    board.show(queue, 40)
    (row,) = read_locks(memory)
    assert (row.name, row.holder, row.since_ns, row.waiting, row.waiters) == ("seamldr_lock", 3, 77, (1, 2), 2)
    for _ in range(3):
        queue.release(queue.token)
    board.show(queue)
    (row,) = read_locks(memory)
    assert (row.holder, row.since_ns, row.waiting, row.waiters) == (None, 0, (), 0)
    assert (row.grants, row.waited_ns) == (1, 40)


def test_of_a_long_queue_the_first_are_shown(memory: PhysicalMemory) -> None:
    """Of 1,023 waiters a row has as many as fit, and their number."""
    queue = LockQueue("seamldr_lock", 1)
    for cpu in range(1024):
        queue.acquire(request(cpu))
    LockBoard(memory).show(queue)
    (row,) = read_locks(memory)
    assert row.waiting == tuple(range(1, SHOWN + 1)) and row.waiters == 1023


def test_rows_and_counts_outlive_the_process_that_writes_them(memory: PhysicalMemory) -> None:
    """A service that is started again finds each lock's row and counts on, in whatever order it meets the locks."""
    first = LockBoard(memory)
    for name in ("seamldr_lock", "update_ctrl.lock"):
        first.show(LockQueue(name, 1), 10)
    second = LockBoard(memory)
    for name in ("sysinit_lock", "update_ctrl.lock"):
        second.show(LockQueue(name, 2), 5)
    rows = [(row.name, row.grants, row.waited_ns) for row in read_locks(memory)]
    assert rows == [("seamldr_lock", 1, 10), ("update_ctrl.lock", 2, 15), ("sysinit_lock", 1, 5)]


@pytest.mark.parametrize("seed", range(5))
def test_the_service_shows_each_change(memory: PhysicalMemory, seed: int) -> None:
    """After every request, release and death of a random history, the row is the queue, and counts the grants."""
    random, granted = Random(seed), []

    def send(node: str, body: Any) -> None:
        granted.append((node, body))

    spec = SimpleNamespace(knobs={"lock_policy": "release", "lease_ms": 0})
    node = SimpleNamespace(
        identity=Identity("seamldr", 1), emit=lambda *_, **__: 0, endpoint=SimpleNamespace(send=send), spec=spec
    )
    service = LockService(cast(Node, node), SeamStore(memory, STORE, 1 << 20), lambda: None)
    service.on_change = LockBoard(memory).show
    incarnation = dict.fromkeys(range(6), 1)
    for number in range(1, 400):
        cpu = random.randrange(6)
        match random.choice(["acquire", "acquire", "release", "release", "die"]):
            case "acquire":
                service.acquire(Identity(f"cpu{cpu}", incarnation[cpu]), LockAcquire("seamldr_lock", 0, number))
            case "release" if granted:
                holder, grant = granted[-1]
                assert isinstance(grant, LockGrant)
                service.release(Identity(holder, 1), LockRelease("seamldr_lock", grant.epoch, grant.number))
            case "die":
                service.dead(Identity(f"cpu{cpu}", incarnation[cpu]))
                incarnation[cpu] += 1
        if not service.queues:
            continue
        queue, (row,) = service.queues["seamldr_lock"], read_locks(memory)
        assert row.holder == (int(queue.holder.request.node[3:]) if queue.holder else None)
        assert row.waiting == tuple(int(one.node[3:]) for one in queue.waiting)
        assert row.grants == len(granted)
    assert len(granted) > 50
