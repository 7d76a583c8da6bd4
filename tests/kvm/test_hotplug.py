"""CPU offline and online with vCPUs that run, on stepped machines."""

from __future__ import annotations

import pytest
from hazards import info, install
from lives import live, offline, online

from cpu.layout import MULTI_STOP, per_cpu
from cpu.struct import NONE
from kvm.run_queue import enqueue_task, on_its_way_to, place_word, redirect_task

SEEDS = range(5)
ONE = per_cpu(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_tasks_leave_a_cpu_that_goes_and_may_come_back(seed: int) -> None:
    """Offline moves every vCPU to an active CPU first; all go on, and nothing is lost. Online brings the CPU back."""
    with live(seed) as lives:
        lives.go(800)
        for _ in range(2):
            assert lives.run(offline(1), 0) == 0
            assert 1 not in lives.where()
            assert [lives.word(word) for word in (ONE.online, ONE.active, ONE.nr_tasks)] == [0, 0, 0]
            assert lives.all_go_on()
            assert lives.run(online(1), 2) == 0
            assert [lives.word(word) for word in (ONE.online, ONE.active)] == [1, 1]
        assert lives.all_go_on()
        assert lives.violations() == {}
        assert sum(lives.word(per_cpu(number).nr_tasks) for number in range(3)) == len(lives.queued())


def test_the_cpu_leaves_the_mask_while_all_others_stand_still() -> None:
    """take_cpu_down runs under stop_machine: all CPUs are in it, and only the one that goes does something."""
    with live(1) as lives:
        lives.go(500)
        assert lives.run(offline(1), 0) == 0
        assert {record["node"] for record in lives.stepped.events("stop_enter")} == {"cpu0", "cpu1", "cpu2"}
        (gone,) = lives.stepped.events("cpu_offline")
        assert (gone["node"], gone["ctx"], gone["irqs"]) == ("cpu1", "migration/1", 0)
        assert lives.word(MULTI_STOP.active_cpu) == 1
        assert lives.run(install(lives.stepped)) == -19
        assert lives.word(MULTI_STOP.active_cpu) == NONE


def test_a_refusal_of_tdx_makes_the_cpu_active_again() -> None:
    """The last CPU of a package stays while a key id is in use: its tasks may run there again."""
    with live(2, tds=1) as lives:
        lives.stepped.memory.store(per_cpu(1).package, 1, 0)
        lives.go(500)
        assert lives.run(offline(1), 0) == -16
        assert [lives.word(word) for word in (ONE.online, ONE.active)] == [1, 1]
        assert lives.all_go_on() and lives.violations() == {}


def test_tasks_go_to_a_cpu_of_the_same_package_first() -> None:
    """select_fallback_rq prefers the package, although another CPU has less to do."""
    with live(3, cpus=4) as lives:
        for number, package in enumerate((0, 1, 1, 0)):
            lives.stepped.memory.store(per_cpu(number).package, package, 0)
        lives.go(300)
        for task in (0, 4):
            thread = lives.machine.loops[0].find_task(task)
            assert thread is not None
            thread.move_to = 2
        lives.go(300)
        on_1 = [task for task, cpu in enumerate(lives.where()) if cpu == 1]
        assert lives.run(offline(1), 0) == 0
        moved = lives.stepped.events("task_dequeue", cpu=1)
        assert {record["to"] for record in moved if record["task"] in on_1} == {2}


def test_the_last_active_cpu_stays() -> None:
    """With no CPU to go to, tasks keep theirs: -EBUSY."""
    with live(4, cpus=2) as lives:
        lives.stepped.memory.store(per_cpu(0).active, 0, 0)
        assert lives.run(offline(1), 0) == -16
        assert lives.word(per_cpu(1).online) == 1


def test_a_task_that_was_sent_to_a_cpu_on_its_way_out_goes_on_to_another() -> None:
    """The CPU passes it on; whoever repeats the first message is not listened to."""
    with live(5) as lives:
        lives.go(500)
        assert lives.run(offline(1), 0) == 0
        lives.stepped.memory.store(place_word(9), on_its_way_to(1), 0)
        to = redirect_task(lives.stepped.cpu(1), 9)
        assert to in (0, 2)
        assert redirect_task(lives.stepped.cpu(1), 9) is None and not enqueue_task(lives.stepped.cpu(1), 9)
        assert enqueue_task(lives.stepped.cpu(to), 9) and not enqueue_task(lives.stepped.cpu(to), 9)


@pytest.mark.parametrize("seed", SEEDS)
def test_updates_reads_and_hotplug_at_once(seed: int) -> None:
    """An update, a reader and a CPU that goes and comes: they exclude each other where they must, and all is safe."""
    with live(seed) as lives:
        lives.go(400 + 50 * seed)
        remover = lives.start(offline(1), 2)
        lives.go(lives.rng.randrange(150))
        worker = lives.start(install(lives.stepped), 0)
        lives.start(info, 2)
        lives.go(until=lambda: None not in (remover.result, worker.result))
        assert remover.result == 0 and worker.result in (0, -19)
        assert lives.run(online(1), 0) == (0 if worker.result == 0 else -19)
        assert lives.all_go_on()
        assert lives.violations() == {}
        if worker.result == 0:
            order = [record["event"] for record in lives.stepped.events("update_end", "cpu_offline")]
            assert order == ["update_end", "cpu_offline"]
