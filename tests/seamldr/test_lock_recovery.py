"""A lock service that is started again: who holds and who waits, by the claims of the CPUs; first alone, then with CPUs
and services that die at any moment and messages that are lost with them.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from lock_bench import NOW_NS, Machine

from bus.link import Identity
from bus.messages import LockClaim
from seamldr.lock_queue import NO_TOKEN, LockMemo, Request, Token
from seamldr.lock_recovery import Claim, LockRecovery
from seamldr.lock_service import SEAMLDR_LOCK


def claim(cpu: int, request: int, *, clock: int = 0, token: Token = NO_TOKEN) -> Claim:
    """What a CPU in its first incarnation says."""
    return Claim(Request(f"cpu{cpu}", 1, request, 0, 0), clock, token)


def recovery(*cpus: int) -> LockRecovery:
    """A recovery that asks these CPUs."""
    return LockRecovery((f"cpu{cpu}", 1) for cpu in cpus)


def test_every_live_cpu_is_waited_for() -> None:
    """It is complete when each has said everything; the dead count, strangers and successors do not."""
    asked = recovery(0, 1)
    asked.answered("cpu0", 2)
    asked.answered("cpu5", 1)
    assert not asked.complete
    asked.answered("cpu0", 1)
    assert not asked.complete and asked.silent == {("cpu1", 1)}
    asked.answered("cpu1", 1)
    assert asked.complete and recovery().complete


def test_claims_count_until_their_cpu_has_said_everything() -> None:
    """Before: yes. After, or from one that was not asked: no, and nothing happens."""
    asked = recovery(0)
    assert asked.claim("l", claim(0, 1))
    assert not asked.claim("l", claim(1, 1))
    asked.answered("cpu0", 1)
    assert not asked.claim("l", claim(0, 2))
    assert [request.request for request in asked.waiting("l")] == [1]


def test_waiters_queue_by_the_time_of_their_requests() -> None:
    """Lamport time first, then the number of the CPU, whatever order the claims came in."""
    asked = recovery(0, 1, 2, 10)
    for cpu, clock in ((10, 3), (2, 3), (0, 9), (1, 1)):
        asked.claim("l", claim(cpu, 1, clock=clock))
    assert [request.node for request in asked.waiting("l")] == ["cpu1", "cpu2", "cpu10", "cpu0"]
    assert asked.waiting("other") == [] and asked.holder("l", LockMemo()) is None


def test_the_holder_is_who_claims_the_highest_token() -> None:
    """A lower one belongs to a lease that ended; a lease that was remembered to have ended is nobody's."""
    asked = recovery(0, 1)
    asked.claim("l", claim(0, 1, token=(1, 5)))
    asked.claim("l", claim(1, 1, token=(1, 6)))
    holder = asked.holder("l", LockMemo())
    assert holder is not None and (holder.request.node, holder.token) == ("cpu1", (1, 6))
    assert asked.holder("l", LockMemo(fence=(1, 6))) is None
    assert asked.waiting("l") == []


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seamldr.lock_service.monotonic_ns", lambda: NOW_NS[0])


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=50, deadline=None, phases=(Phase.generate,))


# The same machine, by script


def scene(policy: str, *cpus: int) -> Machine:
    """CPUs have asked in this order, and the first has the lock."""
    machine = Machine()
    machine.begin(policy)
    for cpu in cpus:
        machine.ask(cpu)
        machine.calm()
    return machine


def restarted(machine: Machine, *answer: int) -> Machine:
    """The service was started again, and only these CPUs have answered."""
    machine.kill_service()
    machine.restart_service()
    for n in answer:
        machine.news_to_cpu(n)
        machine.news_to_cpu(n)
        while machine.cpus[n].sent:
            machine.to_service(n)
    return machine


def holder(machine: Machine) -> int | None:
    """The CPU that holds the lock, after everything has arrived."""
    machine.calm()
    assert machine.service is not None
    queue = machine.service.queues[SEAMLDR_LOCK]
    return None if queue.holder is None else int(queue.holder.request.node.removeprefix("cpu"))


def test_a_release_during_the_recovery_counts_at_its_end() -> None:
    """The holder claimed, then gave the lock back: it is restored, its release is done, the waiter is granted."""
    machine = restarted(scene("release", 0, 1), 0)
    machine.release(0)
    machine.to_service(0)
    assert holder(machine) == 1
    machine.teardown()


def test_a_request_during_the_recovery_queues_behind_those_who_waited() -> None:
    """CPU 2 asks while CPU 1, which waited before, has yet to claim."""
    machine = restarted(scene("release", 0, 1), 0, 2)
    machine.ask(2)
    machine.to_service(2)
    assert holder(machine) == 0
    machine.release(0)
    assert holder(machine) == 1
    machine.teardown()


def test_a_release_that_was_lost_leaves_nobody_holding() -> None:
    """It went to the dead service: the CPU does not claim, and the lock is free."""
    machine = scene("release", 0, 1)
    machine.release(0)
    restarted(machine)
    assert holder(machine) == 1
    machine.teardown()


def test_a_grant_that_was_lost_is_a_request_that_waits() -> None:
    """The old service granted, the CPU never heard of it: the new one grants under its own epoch."""
    machine = scene("release", 0, 1)
    machine.release(0)
    machine.to_service(0)
    restarted(machine)
    assert holder(machine) == 1 and machine.holders() == [(2, 1)]


@pytest.mark.parametrize("claimed", [True, False])
def test_a_waiter_that_dies_during_the_recovery_is_no_holder(claimed: bool) -> None:
    """It has claimed or asked, and nobody grants a dead CPU, who would keep the lock if the policy is to hang."""
    machine = restarted(scene("hang", 0, 1) if claimed else scene("hang", 0), 1)
    if not claimed:
        machine.ask(1)
        machine.to_service(1)
    machine.kill_cpu(1)
    machine.news_to_service()
    machine.release(0)
    machine.ask(2)
    assert holder(machine) == 2
    machine.teardown()


def test_nothing_is_granted_before_everything_that_came_is_taken_in() -> None:
    """The holder gave the lock back and its waiter died, both during the recovery: the dead one never gets it."""
    machine = restarted(scene("hang", 0, 1), 0, 1)
    machine.release(0)
    machine.to_service(0)
    machine.kill_cpu(1)
    machine.ask(2)
    assert holder(machine) == 2
    machine.teardown()


def test_a_cpu_that_dies_before_it_answers_is_waited_for_no_longer() -> None:
    """The lock that it held goes to who waits; a successor that comes meanwhile is not asked."""
    machine = restarted(scene("release", 0, 1), 1, 2, 3)
    assert machine.service is not None and machine.service.recovery is not None
    machine.kill_cpu(0)
    machine.replug_cpu(0)
    machine.news_to_service()
    assert machine.service.recovery is None and holder(machine) == 1
    machine.teardown()


def test_a_request_for_a_lock_that_nobody_claims_dies_with_its_cpu() -> None:
    """The lock is new to this incarnation of the service, and is granted to the living."""
    machine = Machine()
    machine.begin("hang")
    restarted(machine, 0)
    machine.ask(0)
    machine.to_service(0)
    machine.kill_cpu(0)
    assert holder(machine) is None
    machine.ask(1)
    assert holder(machine) == 1
    machine.teardown()


def test_a_dead_holder_hangs_over_a_restart() -> None:
    """Nobody gets its lock from the next service either, and the records say who keeps it."""
    machine = scene("hang", 0, 1)
    machine.kill_cpu(0)
    assert holder(machine) == 0 and machine.hung
    restarted(machine)
    assert holder(machine) == 0
    machine.ask(2)
    assert holder(machine) == 0 and machine.holders() == []
    machine.teardown()


def test_a_lease_that_ended_stays_ended_over_a_restart() -> None:
    """Its CPU still claims the lock, after those who had it since have given it back; it is fenced, not restored."""
    machine = scene("lease", 0, 1)
    machine.time_passes()
    assert holder(machine) == 1
    machine.release(1)
    assert holder(machine) is None
    restarted(machine)
    assert holder(machine) is None
    machine.ask(2)
    assert holder(machine) == 2 and machine.lost == {(1, 1)}
    machine.teardown()


def test_who_lost_the_lock_gives_back_nothing() -> None:
    """Its late release is stale, before a restart and during one."""
    machine = scene("lease", 0, 1)
    machine.time_passes()
    machine.release(0)
    assert holder(machine) == 1
    machine = scene("lease", 0, 1)
    machine.time_passes()
    machine.calm()
    restarted(machine, 0)
    machine.release(0)
    assert holder(machine) == 1


def test_claims_of_the_unborn_are_refused() -> None:
    """A token of the service's own epoch, and a claim after the last, change nothing."""
    machine = restarted(scene("release", 0), 0)
    source = Identity("cpu1", 1)
    machine.serve(source, LockClaim(SEAMLDR_LOCK, 0, 5, 1, 2, 7))
    machine.serve(Identity("cpu0", 1), LockClaim(SEAMLDR_LOCK, 0, 6, 1))
    assert machine.refused == ["claim", "claim"]
    assert holder(machine) == 0
    machine.release(0)
    assert holder(machine) is None
