"""CPUs that die at any operation, on stepped machines: what is lost, what goes on, and what a new process finds."""

from __future__ import annotations

import pytest
from hazards import install, load_run_put
from lives import live, offline, online

from cpu.layout import KERNEL, per_cpu
from cpu.smp import csd_of, smp_call_function_single
from kvm.lost import lost_cpu, lost_with
from kvm.vcpu import vcpu_of

OPERATIONS = range(3, 190, 17)
UPDATES = range(2, 340, 31)


def vmcs_cpu(task: int) -> int:
    """The word that says where a vCPU's VMCS is active."""
    return vcpu_of(task).loaded_vmcs.cpu


@pytest.mark.parametrize("operations", OPERATIONS)
def test_a_cpu_that_dies_takes_only_its_own_with_it(operations: int) -> None:
    """Wherever it stops, tasks on other CPUs go on, those whose VMCS it had end as lost, and nobody waits for it."""
    with live(operations) as lives:
        lives.go(700)
        lives.kill_after(operations, 1)
        lives.go(300)
        assert all(record["cpu"] == 1 for record in lives.stepped.events("vcpu_lost"))
        on_the_dead = {task for task, cpu in enumerate(lives.where()) if cpu == 1}
        before = lives.exits()
        lives.go(3000)
        made = {task for task in lives.tasks if lives.exits()[task] > before[task]}
        lost = {record["vcpu"] for record in lives.stepped.events("vcpu_lost")}
        assert made == set(lives.tasks) - on_the_dead - lost
        assert lives.violations() == {}


@pytest.mark.parametrize("operations", OPERATIONS)
def test_a_new_process_finds_ram_in_order(operations: int) -> None:
    """After a replug the CPU is online once, runs tasks, is called, goes and comes, and an update succeeds."""
    with live(operations) as lives:
        lives.go(700)
        lives.kill_after(operations, 1)
        lives.go(200)
        lives.replug(1)
        assert lives.word(KERNEL.num_online) == 3 and lives.word(per_cpu(1).lives) == 2
        assert 1 not in lives.where()
        threads = [thread for thread in lives.machine.loops[0].threads() if thread.task is not None]
        for thread in threads:
            thread.move_to = 1
        lives.go(600)
        assert not threads or 1 in lives.where()
        assert lives.run(install(lives.stepped), 0) == 0
        assert (lives.run(offline(1), 2), lives.run(online(1), 0)) == (0, 0)
        assert lives.all_go_on()
        assert lives.violations() == {}


@pytest.mark.parametrize("operations", UPDATES)
@pytest.mark.parametrize("worker", [0, 1])
def test_an_update_whose_cpu_died_waits_for_the_operator(operations: int, worker: int) -> None:
    """It is stuck until the abort, also if the worker's own CPU died; after a replug the next one ends, and says how.

    It succeeds if no stage had begun, and if the old module had been shut down it cannot.
    """
    with live(operations) as lives:
        lives.go(600)
        first = lives.start(install(lives.stepped), worker)
        lives.kill_after(operations, 1)
        lives.go(4000)
        if not lives.word(KERNEL.stop_mutex):
            return
        assert first.result is None
        assert not [r for r in lives.stepped.events("update_end") if r["ret"] == 0]
        lives.abort()
        lives.go(2500)
        assert not any(cpu.context.startswith("migration") for cpu in lives.machine.cpus if cpu.number != 1)
        assert worker == 1 or first.result == -4
        lives.replug(1)
        assert lives.word(KERNEL.stop_mutex) == 0
        shut_down = lives.stepped.count("module_init_flag", initialized=0)
        assert (lives.run(install(lives.stepped), 0) == 0) or shut_down
        assert lives.run(offline(1), 2) in (0, -22)
        assert lives.all_go_on()
        assert lives.violations() == {}


def test_the_abort_frees_what_a_dead_worker_had_locked() -> None:
    """The last stopper that leaves unlocks stop_machine for the next, although its owner does not live again."""
    with live(9) as lives:
        lives.go(600)
        lives.start(install(lives.stepped), 1)
        lives.go(until=lambda: lives.stepped.count("stop_enter") == 2)
        lives.stepped.kill(1)
        lives.go(2000)
        assert lives.word(KERNEL.stop_mutex)
        lives.abort()
        lives.go(2000)
        assert lives.word(KERNEL.stop_mutex) == lives.word(KERNEL.update_abort) == 0
        assert lives.stepped.count("stop_freed", owner=1) == 1
        assert lives.all_go_on() and lives.violations() == {}


def test_a_cpu_comes_back_whose_remover_died_in_the_middle() -> None:
    """CPU 1 is still busy going offline when its remover lives again: it ends that, and then undoes it."""
    with live(8) as lives:
        lives.go(600)
        lives.start(offline(1), 2)
        lives.go(until=lambda: bool(lives.word(per_cpu(1).cpuhp_work)) and not lives.word(per_cpu(1).active))
        lives.stepped.kill(2)
        lives.stepped.replug(2)
        while lives.word(per_cpu(2).dead):
            lives.machine.step(2)
        assert lives.word(KERNEL.hotplug_writer) == 0
        lives.go(2000)
        assert lives.word(per_cpu(1).active) == 1 and lives.word(per_cpu(1).virtualization_nr_users) == 2
        assert lives.all_go_on() and lives.violations() == {}


@pytest.mark.parametrize("operations", range(1, 115, 9))
@pytest.mark.parametrize("victim", [1, 2])
def test_a_cpu_that_dies_while_one_goes_offline(operations: int, victim: int) -> None:
    """CPU 2 takes CPU 1 down and one of them dies: the request ends, or is undone when the dead lives again."""
    with live(operations) as lives:
        lives.go(600)
        remover = lives.start(offline(1), 2)
        lives.kill_after(operations, victim)
        lives.go(1500)
        lives.abort()
        lives.go(1500)
        assert victim == 2 or remover.result in (0, -4, -6)
        lives.replug(victim)
        if not lives.word(per_cpu(1).online):
            assert lives.run(online(1), 0) == 0
        assert lives.run(install(lives.stepped), 0) == 0
        assert lives.word(KERNEL.num_online) == 3 and lives.all_go_on()
        assert lives.violations() == {}


# What a wait for a dead CPU comes to


def test_a_call_to_a_cpu_that_dies_ends() -> None:
    """-ENXIO and a record for whoever waits, and for whoever calls later; the function runs nowhere."""
    with live(1) as lives:
        lives.go(300)
        deaf = lives.machine.cpus[1]
        caller = lives.start(lambda cpu: smp_call_function_single(cpu, 1, "__loaded_vmcs_clear", vmcs_cpu(1) - 64), 0)
        lives.go(until=lambda: bool(lives.word(deaf.percpu.call_single_queue)))
        lives.stepped.kill(1)
        lives.go(until=lambda: caller.result is not None)
        assert caller.result == -6
        (lost,) = lives.stepped.events("csd_lost")
        assert (lost["node"], lost["target"]) == ("cpu0", 1)
        again = lambda cpu: smp_call_function_single(cpu, 1, "__loaded_vmcs_clear", 0)  # noqa: E731
        assert lives.run(again, 2) == -6
        assert lives.stepped.count("csd_lock") == 1


def test_nothing_more_is_queued_to_a_cpu_that_has_died() -> None:
    """Not even by who had looked before whether it is alive: a new process would find a stranger's entry."""
    with live(7) as lives:
        lives.go(300)
        caller = lives.start(lambda cpu: smp_call_function_single(cpu, 1, "__loaded_vmcs_clear", 0), 0)
        lives.go(until=lambda: bool(lives.word(csd_of(0, 0, 1).flags)))
        lives.stepped.kill(1)
        assert lives.word(per_cpu(1).call_single_queue) == 0
        lives.go(until=lambda: caller.result is not None)
        assert caller.result == -6 and lives.word(per_cpu(1).call_single_queue) == 0


def test_as_in_a_kernel_a_call_to_a_dead_cpu_has_no_end() -> None:
    """With `lock_policy=hang` the caller spins on, with preemption off."""
    with live(1, lock_policy="hang") as lives:
        lives.go(300)
        lives.stepped.kill(1)
        call = lambda cpu: smp_call_function_single(cpu, 1, "__loaded_vmcs_clear", 0)  # noqa: E731
        assert lives.run(call, 0) is None
        assert lives.stepped.cpu(0).waits_for == ("waits for __loaded_vmcs_clear on CPU 1", "cpu1")


def test_a_new_process_ends_the_calls_that_the_dead_one_had_not_run() -> None:
    """A sender that slept through death and replug finds its call over, not a queue that forgot it."""
    with live(2) as lives:
        lives.go(300)
        caller = lives.start(lambda cpu: smp_call_function_single(cpu, 1, "__loaded_vmcs_clear", 0), 0)
        lives.go(until=lambda: bool(lives.word(per_cpu(1).call_single_queue)))
        lives.stepped.kill(1)
        lives.machine.asleep.add(0)
        lives.stepped.replug(1)
        while lives.word(per_cpu(1).dead):
            lives.machine.step(1)
        assert caller.result is None
        lives.machine.asleep.discard(0)
        lives.go(until=lambda: caller.result is not None)
        assert caller.result == -6 and lives.stepped.count("csd_run") == 0
        assert lives.run(lambda cpu: smp_call_function_single(cpu, 1, "__loaded_vmcs_clear", vmcs_cpu(9) - 64), 0) == 0


def test_who_dies_before_its_ipi_leaves_nobody_waiting() -> None:
    """It had queued its call, so later callers send no IPI: the target looks at its queue when it hears of it."""
    with live(3) as lives:
        lives.go(300)
        queue = per_cpu(1).call_single_queue
        lives.start(lambda cpu: smp_call_function_single(cpu, 1, "__loaded_vmcs_clear", vmcs_cpu(9) - 64), 0)
        while not lives.word(queue):
            lives.machine.step(0)
        assert lives.stepped.count("ipi_send", target=1) == 0
        lives.stepped.kill(0)
        call = lambda cpu: smp_call_function_single(cpu, 1, "__loaded_vmcs_clear", vmcs_cpu(9) - 64)  # noqa: E731
        assert lives.run(call, 2) == 0


# What is lost


def test_a_vcpu_whose_vmcs_was_on_the_dead_cpu_is_refused_for_good() -> None:
    """A sleeping one too: its word says with whom it was lost, also after the CPU lives again; others still load."""
    with live(1, cpus=2, vcpus=0) as lives:
        stepped = lives.stepped
        sleeping, other = stepped.new_vcpu(8, 1), stepped.new_vcpu(9, 0)
        assert stepped.run(load_run_put(sleeping), 1) and stepped.run(load_run_put(other), 0)
        stepped.kill(1)
        assert stepped.run(lambda cpu: sleeping.run(cpu), 0) is False
        assert (sleeping.lost_with, lost_cpu(lives.word(vmcs_cpu(8)))) == (1, 1)
        lives.replug(1)
        for number in (0, 1):
            assert stepped.run(lambda cpu: sleeping.run(cpu), number) is False
        assert stepped.run(load_run_put(other), 1)
        assert stepped.count("vcpu_lost", vcpu=8, cpu=1) == 3 and stepped.count("vmptrld", result="ok", node="cpu0")
        assert lives.violations() == {}


def test_a_loader_that_slept_through_death_and_replug_loads_nothing_stale() -> None:
    """It had read the owner before; the new process said what was lost before it took the loader's call."""
    with live(4, vcpus=0) as lives:
        sleeping, stepped = lives.stepped.new_vcpu(8, 1), lives.stepped
        assert stepped.run(load_run_put(sleeping), 1)
        loader = lives.start(lambda cpu: sleeping.run(cpu), 0)
        read = lives.machine.cpus[0].recent_loads
        lives.go(until=lambda: read.count((vmcs_cpu(8), 1)) == 2)
        stepped.kill(1)
        stepped.replug(1)
        while lives.word(per_cpu(1).dead):
            lives.machine.step(1)
        assert lives.word(vmcs_cpu(8)) == lost_with(1)
        lives.go(until=lambda: loader.result is not None)
        assert loader.result is False and stepped.count("csd_run", node="cpu1") == 1
        assert lives.violations() == {}


def test_a_dead_cpu_stays_in_the_online_mask() -> None:
    """Dead is not offline; nor can it be taken offline, as its hotplug thread answers nobody."""
    with live(5) as lives:
        lives.go(300)
        lives.stepped.kill(1)
        assert lives.word(per_cpu(1).online) == 1 and lives.word(KERNEL.num_online) == 3
        assert lives.run(offline(1), 0) == -6
        assert lives.word(KERNEL.hotplug_writer) == 0


def test_a_cpu_whose_module_is_gone_stays_offline() -> None:
    """A replug after a fatal update: TDX's callback fails, so the CPU leaves the online mask and says why."""
    with live(6) as lives:
        lives.go(300)
        assert lives.run(offline(2), 0) == 0
        assert lives.run(install(lives.stepped), 0) == -19
        lives.stepped.kill(1)
        lives.replug(1)
        assert lives.word(per_cpu(1).online) == 0 and lives.word(KERNEL.num_online) == 1
        assert any("cannot come online" in record["text"] for record in lives.stepped.events("log"))
        assert lives.all_go_on() and lives.violations() == {}
