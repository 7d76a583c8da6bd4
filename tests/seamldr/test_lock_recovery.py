"""A lock service that is started again: who holds and who waits, by the claims of the CPUs; first alone, then with CPUs
and services that die at any moment and messages that are lost with them.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.judge import Judge
from bus.link import Delivery, Identity
from bus.memory import PhysicalMemory
from bus.messages import ClaimsEnd, LockAcquire, LockClaim, LockGrant, LockRelease
from bus.node import Node
from seamldr.lock_queue import NO_TOKEN, LockMemo, Request, Token
from seamldr.lock_recovery import Claim, LockRecovery
from seamldr.lock_service import SEAMLDR_LOCK, LockService
from seamldr.seam_store import SeamStore

CPUS = 4
LEASE_MS = 1
NOW_NS = [0]
"""The service's clock."""


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


class Cpu(msgspec.Struct):
    """A CPU: what it waits for and holds, its links to the service, and what the launcher told it."""

    incarnation: int
    service: int | None
    """Incarnation of the service that it speaks with."""
    alive: bool = True
    requests: dict[int, tuple[int, Token]] = msgspec.field(default_factory=dict)
    """Clock and token (NO_TOKEN while it waits) by request number."""
    sent: deque[tuple[int, Any]] = msgspec.field(default_factory=deque)
    inbox: deque[tuple[int, LockGrant]] = msgspec.field(default_factory=deque)
    news: deque[tuple[int, str]] = msgspec.field(default_factory=deque)

    def send(self, body: object) -> None:
        if self.service is not None:
            self.sent.append((self.service, body))

    def claim(self) -> None:
        for request, (clock, token) in self.requests.items():
            self.send(LockClaim(SEAMLDR_LOCK, 0, request, clock, *token))
        self.send(ClaimsEnd())


class Machine(RuleBasedStateMachine):
    """The real service between CPUs that keep the rules; every message and every death comes when it likes."""

    @initialize(policy=st.sampled_from(["release", "hang", "lease"]))
    def begin(self, policy: str) -> None:
        self.policy = policy
        self.memory = PhysicalMemory.private(4 * 4096)
        self.judge = Judge({})
        self.clock = 0
        self.numbers = 0
        self.records = 0
        self.tokens: list[Token] = []
        self.lost: set[Token] = set()
        self.hung = False
        self.refused: list[str] = []
        self.cpus = {n: Cpu(1, 1) for n in range(CPUS)}
        self.service: LockService | None = None
        self.incarnation = 0
        self.start_service()

    # The service

    def emit(self, event: str, /, **fields: Any) -> int:
        self.records += 1
        head = {"ts": NOW_NS[0], "clock": self.records, "node": "seamldr", "pid": self.incarnation, "seq": self.records}
        self.judge.see(head | {"event": event} | fields)
        token = (fields.get("epoch", 0), fields.get("number", 0))
        if event == "lock_grant":
            assert not self.hung and (not self.tokens or token > self.tokens[-1])
            self.tokens.append(token)
        elif event == "lock_expire":
            self.lost.add(token)
        elif event == "lock_hang":
            self.hung = True
        return self.records

    def grant(self, node: str, body: Any) -> None:
        self.cpus[int(node.removeprefix("cpu"))].inbox.append((self.incarnation, body))

    def start_service(self) -> None:
        self.incarnation += 1
        self.heard = {n: cpu.incarnation for n, cpu in self.cpus.items()}
        self.dead = {n for n, cpu in self.cpus.items() if not cpu.alive}
        self.news: deque[tuple[int, int, str]] = deque()
        node = SimpleNamespace(
            identity=Identity("seamldr", self.incarnation),
            emit=self.emit,
            refuse=lambda reason, head: self.refused.append(reason),
            endpoint=SimpleNamespace(send=self.grant),
            spec=SimpleNamespace(knobs={"lock_policy": self.policy, "lease_ms": LEASE_MS}),
        )
        store = SeamStore(self.memory, 0, self.memory.size)
        self.service = LockService(cast(Node, node), store, lambda: None)
        if self.incarnation > 1:
            asked = [Identity(f"cpu{n}", cpu.incarnation) for n, cpu in self.cpus.items() if cpu.alive]
            self.emit("service_restart", epoch=self.incarnation, asked=[], inside=-1)
            self.service.recover(asked)
            for cpu in self.cpus.values():
                cpu.news.append((self.incarnation, "online"))

    def serve(self, source: Identity, body: Any) -> None:
        """A message of a CPU reaches the service."""
        assert self.service is not None
        match body:
            case LockAcquire():
                self.service.acquire(source, body)
            case LockRelease():
                self.service.release(source, body)
            case LockClaim():
                self.service.claim(Delivery("", source, 0, body), body)
            case ClaimsEnd():
                self.service.answered(source)

    # What CPUs do

    @rule(n=st.integers(0, CPUS - 1))
    def ask(self, n: int) -> None:
        cpu = self.cpus[n]
        if cpu.alive and len(cpu.requests) < 2:
            self.numbers += 1
            self.clock += self.numbers % 2
            cpu.requests[self.numbers] = (self.clock, NO_TOKEN)
            cpu.send(LockAcquire(SEAMLDR_LOCK, 0, self.numbers))

    @rule(n=st.integers(0, CPUS - 1))
    def release(self, n: int) -> None:
        cpu = self.cpus[n]
        for request, (_, token) in list(cpu.requests.items()):
            if cpu.alive and token != NO_TOKEN:
                del cpu.requests[request]
                cpu.send(LockRelease(SEAMLDR_LOCK, *token))

    # What arrives

    @rule(n=st.integers(0, CPUS - 1))
    def to_service(self, n: int) -> None:
        cpu = self.cpus[n]
        if cpu.sent and self.service is not None and self.heard[n] >= cpu.incarnation:
            target, body = cpu.sent.popleft()
            if target == self.incarnation and n not in self.dead:
                self.serve(Identity(f"cpu{n}", cpu.incarnation), body)

    @rule(n=st.integers(0, CPUS - 1))
    def to_cpu(self, n: int) -> None:
        cpu = self.cpus[n]
        if cpu.inbox:
            source, grant = cpu.inbox.popleft()
            if cpu.alive and source == cpu.service:
                clock, token = cpu.requests[grant.request]
                assert token == NO_TOKEN
                cpu.requests[grant.request] = (clock, (grant.epoch, grant.number))

    @rule(n=st.integers(0, CPUS - 1))
    def news_to_cpu(self, n: int) -> None:
        cpu = self.cpus[n]
        if cpu.news and cpu.alive:
            incarnation, state = cpu.news.popleft()
            if state == "dead":
                cpu.service = None if cpu.service == incarnation else cpu.service
            else:
                cpu.service = incarnation
                cpu.claim()

    @rule()
    def news_to_service(self) -> None:
        if self.news and self.service is not None:
            n, incarnation, state = self.news.popleft()
            self.heard[n] = incarnation
            if state == "dead":
                self.dead.add(n)
                self.service.dead(Identity(f"cpu{n}", incarnation))
            else:
                self.dead.discard(n)

    # Death and time

    @rule(n=st.integers(0, CPUS - 1))
    def kill_cpu(self, n: int) -> None:
        cpu = self.cpus[n]
        if cpu.alive:
            cpu.alive = False
            cpu.requests.clear()
            self.news.append((n, cpu.incarnation, "dead"))

    @rule(n=st.integers(0, CPUS - 1))
    def replug_cpu(self, n: int) -> None:
        old = self.cpus[n]
        if not old.alive:
            service = self.incarnation if self.service is not None else None
            cpu = self.cpus[n] = Cpu(old.incarnation + 1, service)
            self.news.append((n, cpu.incarnation, "online"))
            if self.incarnation > 1:
                cpu.claim()

    @precondition(lambda self: self.service is not None)
    @rule()
    def kill_service(self) -> None:
        self.service = None
        for cpu in self.cpus.values():
            cpu.news.append((self.incarnation, "dead"))

    @precondition(lambda self: self.service is None)
    @rule()
    def restart_service(self) -> None:
        self.start_service()

    @rule()
    def time_passes(self) -> None:
        NOW_NS[0] += LEASE_MS * 1_000_000
        if self.service is not None:
            self.service.end_leases()

    # What must hold

    def holders(self) -> list[Token]:
        held = [token for cpu in self.cpus.values() for _, token in cpu.requests.values() if token != NO_TOKEN]
        return [token for token in held if token not in self.lost]

    @invariant()
    def one_holder_at_most(self) -> None:
        if self.policy != "lease":
            assert not self.lost
        assert len(self.holders()) <= 1

    @invariant()
    def the_records_say_so_too(self) -> None:
        assert self.judge.violated == ()

    @invariant()
    def who_lost_the_lock_is_fenced(self) -> None:
        service = self.service
        if service is not None and service.recovery is None:
            assert all(service.is_fenced(token) for token in self.lost)

    @precondition(lambda self: self.service is not None)
    @rule()
    def calm(self) -> None:
        """Everything that is under way arrives."""
        moved = True
        while moved:
            moved = bool(self.news)
            self.news_to_service()
            for n, cpu in self.cpus.items():
                while cpu.alive and (cpu.news or cpu.inbox or cpu.sent) and not self.news:
                    self.news_to_cpu(n)
                    self.to_cpu(n)
                    self.to_service(n)
                    moved = True

    def teardown(self) -> None:
        """Every request of a live CPU is granted in the end, unless a dead holder keeps the lock."""
        if not hasattr(self, "cpus"):
            return
        if self.service is None:
            self.start_service()
        self.calm()
        while any(token != NO_TOKEN for cpu in self.cpus.values() for _, token in cpu.requests.values()):
            for n in self.cpus:
                self.release(n)
            self.calm()
        assert self.service is not None and self.service.recovery is None
        assert self.judge.violated == ()
        waiting = [request for cpu in self.cpus.values() if cpu.alive for request in cpu.requests]
        assert self.hung or waiting == []


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
