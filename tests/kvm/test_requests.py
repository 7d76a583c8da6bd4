"""What user space remembers: its requests, its pages, and its tasks by the words in shared memory."""

from __future__ import annotations

from typing import Any

from bus.clock import LamportClock
from bus.memory import PhysicalMemory
from bus.messages import AdminDone, Body, RunTask
from cpu.layout import TASKS, per_cpu, task_address
from cpu.struct import NONE
from kvm.pages import SLICE_PAGES, SLICES, PagePool
from kvm.requests import Requests
from kvm.run_queue import on_its_way_to, on_run_queue_of, place_word
from kvm.tasks import Tasks


def test_an_answer_frees_the_pages_and_comes_once() -> None:
    """The pages of a request are free again when its answer is there; who waits gets it, and no second is taken."""
    pool = PagePool(1)
    requests = Requests(pool, 1)
    pages = pool.take(SLICE_PAGES)
    number = requests.new(2, pages, wanted=True)
    assert requests.answer(number) is None and requests.on(2) and not requests.on(1)
    assert requests.end(AdminDone(number, -5, "no"))
    assert sorted(pool.take(SLICE_PAGES)) == sorted(pages)
    assert not requests.end(AdminDone(number, 0, "again"))
    assert requests.answer(number) == AdminDone(number, -5, "no") and requests.open == {}


def test_a_request_of_a_cpu_that_died_fails_and_keeps_its_pages() -> None:
    """-ENXIO; its pages are never given out again, since SEAM may still write there. Other CPUs' requests stay."""
    pool = PagePool(1)
    requests = Requests(pool, 1)
    pages = pool.take(3)
    lost, kept = requests.new(1, pages, wanted=True), requests.new(0, [])
    assert requests.lose(1) == [lost] and requests.lose(1) == []
    answer = requests.answer(lost)
    assert answer is not None and answer.errno == -6
    assert list(requests.open) == [kept]
    assert not set(pages) & set(pool.take(SLICE_PAGES - 3))


def test_incarnations_share_neither_numbers_nor_pages() -> None:
    """An answer to the request of a process that died fits none of its successor's; nor do their pages overlap."""
    pools = [PagePool(7, incarnation) for incarnation in (1, 2, 3, SLICES + 1)]
    slices = [set(pool.take(SLICE_PAGES)) for pool in pools]
    assert not slices[0] & slices[1] and not slices[1] & slices[2] and slices[0] == slices[3]
    first, second = Requests(pools[0], 1), Requests(pools[1], 2)
    old = first.new(0, [])
    new = second.new(0, [])
    assert old != new and not second.end(AdminDone(old, 0, ""))


class Bench:
    """Tasks of a user space, with what it sends and records."""

    def __init__(self, total: int) -> None:
        self.memory = PhysicalMemory.private(TASKS + (1 << 20))
        self.sent: list[tuple[str, Body]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.tasks = self.another(total)

    def another(self, total: int) -> Tasks:
        """A user space that is started again."""
        return Tasks(total, self.memory, LamportClock(), lambda node, body: self.sent.append((node, body)), self.note)

    def note(self, event: str, **fields: Any) -> None:
        """A record."""
        self.events.append((event, fields))

    def place(self, task: int, place: int) -> None:
        """What a CPU stores."""
        self.memory.store(place_word(task), place, 0)


def test_what_is_on_its_way_is_sent_and_what_has_ended_is_forgotten() -> None:
    """`look` goes by the words alone, so whoever is started again knows as much."""
    bench = Bench(3)
    for task in range(3):
        bench.tasks.put(task, task)
    bench.place(1, on_run_queue_of(1))
    bench.place(2, NONE)
    for tasks in (bench.tasks, bench.another(3)):
        bench.sent.clear()
        assert tasks.look({0, 1, 2}) == 1
        assert tasks.live == {0, 1} and bench.sent == [("cpu0", RunTask(0))]
    assert [bench.tasks.owner(task) for task in range(3)] == [0, 1, None]


def test_a_dead_cpu_loses_what_it_had_and_not_what_was_on_its_way_there() -> None:
    """What it ran has ended, on record; what it had not taken goes to a CPU that lives."""
    bench = Bench(3)
    for task in range(3):
        bench.tasks.put(task, 1)
    bench.place(0, on_run_queue_of(1))
    bench.place(1, on_run_queue_of(2))
    bench.memory.store(per_cpu(1).dead, 1, 0)
    bench.events.clear()
    assert bench.tasks.look({0, 2}) == 1
    assert bench.tasks.live == {1, 2} and bench.sent == [("cpu0", RunTask(2))]
    assert bench.events == [("task_lost", {"task": 0, "cpu": 1}), ("task_place", {"task": 2, "cpu": 0})]
    words = [bench.memory.load(place_word(task))[0] for task in range(3)]
    assert words == [NONE, on_run_queue_of(2), on_its_way_to(0)]
    assert place_word(1) == task_address(1)
