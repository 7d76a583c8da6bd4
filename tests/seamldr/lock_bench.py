"""The real lock service between CPUs that keep the rules, with links that lose what their ends lose when they die."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.judge import Judge
from bus.link import Delivery, Identity
from bus.memory import PhysicalMemory
from bus.messages import ClaimsEnd, LockAcquire, LockClaim, LockGrant, LockRelease
from bus.node import Node
from seamldr.lock_queue import NO_TOKEN, Token
from seamldr.lock_service import SEAMLDR_LOCK, LockService
from seamldr.seam_store import SeamStore

CPUS = 4
LEASE_MS = 1
NOW_NS = [0]
"""The service's clock; tests put it in the place of `monotonic_ns`."""


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
