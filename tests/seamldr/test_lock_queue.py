"""The queue of a raw spinlock: first come first served, tokens that only grow, and what death does."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seamldr.lock_queue import NO_TOKEN, Grant, LockQueue, Request, Token


def ask(queue: LockQueue, cpu: int, request: int = 1, *, incarnation: int = 1, level: int = 0) -> Grant | None:
    """A request of a CPU."""
    return queue.acquire(Request(f"cpu{cpu}", incarnation, request, level, 0))


def holder(queue: LockQueue) -> str | None:
    """The node that holds the lock."""
    return queue.holder.request.node if queue.holder else None


def test_a_free_lock_is_granted_at_once() -> None:
    """The first request gets the lock, under the first token of the service's epoch."""
    queue = LockQueue("l", 3)
    assert (queue.token, queue.depth) == (NO_TOKEN, 0)
    grant = ask(queue, 0)
    assert grant is not None and grant.token == (3, 1) == queue.token and queue.depth == 1


def test_waiters_are_served_in_the_order_of_their_arrival() -> None:
    """Each release grants whoever waits longest, whatever its number or context level."""
    queue = LockQueue("l", 1)
    for cpu, level in ((4, 0), (2, 0), (9, 2), (1, 1)):
        ask(queue, cpu, level=level)
    order = []
    while queue.holder:
        order.append(holder(queue))
        released, _ = queue.release(queue.token)
        assert released
    assert order == ["cpu4", "cpu2", "cpu9", "cpu1"]


def test_a_cpu_waits_at_several_levels_at_once() -> None:
    """The NMI handler of the holder queues behind its own task: each request is one place in the queue."""
    queue = LockQueue("l", 1)
    ask(queue, 0, 1)
    assert ask(queue, 0, 2, level=2) is None
    assert queue.depth == 2
    _, grant = queue.release((1, 1))
    assert grant is not None and (grant.request.request, grant.request.level) == (2, 2)


@pytest.mark.parametrize("token", [(1, 0), (1, 2), (0, 1), (2, 1), NO_TOKEN])
def test_a_stale_release_does_nothing(token: Token) -> None:
    """Only the holder's own token gives the lock back."""
    queue = LockQueue("l", 1)
    ask(queue, 0)
    ask(queue, 1)
    assert queue.release(token) == (False, None)
    assert (holder(queue), queue.depth) == ("cpu0", 2)


def test_a_release_is_good_once() -> None:
    """The same release again finds the next holder's token, or nobody's, and changes nothing."""
    queue = LockQueue("l", 1)
    ask(queue, 0)
    assert queue.release((1, 1)) == (True, None)
    assert queue.release((1, 1)) == (False, None)
    ask(queue, 1)
    assert queue.release((1, 1)) == (False, None) and holder(queue) == "cpu1"


@pytest.mark.parametrize("policy", ["release", "hang"])
def test_a_dead_waiter_leaves_the_queue(policy: str) -> None:
    """All its requests are gone, at every level; the holder and the others keep their places."""
    queue = LockQueue("l", 1, policy)
    for cpu, request in ((0, 1), (1, 1), (2, 1), (1, 2)):
        ask(queue, cpu, request)
    gone, grant = queue.dead("cpu1", 1)
    assert ([request.request for request in gone], grant) == ([1, 2], None)
    assert holder(queue) == "cpu0"
    _, grant = queue.release(queue.token)
    assert grant is not None and grant.request.node == "cpu2" and queue.depth == 1


def test_a_dead_holder_is_followed_under_a_higher_token() -> None:
    """Policy `release`: the next waiter is granted; the dead one's late release is stale."""
    queue = LockQueue("l", 1, "release")
    ask(queue, 0)
    ask(queue, 0, 2)
    ask(queue, 1)
    gone, grant = queue.dead("cpu0", 1)
    assert sorted(request.request for request in gone) == [1, 2]
    assert grant is not None and (grant.request.node, grant.token) == ("cpu1", (1, 2))
    assert queue.release((1, 1)) == (False, None)
    assert queue.dead("cpu1", 1)[1] is None and queue.holder is None


def test_a_dead_holder_that_hangs_keeps_the_lock_for_ever() -> None:
    """Policy `hang`: nobody is granted, as in a kernel; only its waiting requests go."""
    queue = LockQueue("l", 1, "hang")
    ask(queue, 0)
    ask(queue, 1)
    ask(queue, 0, 2)
    gone, grant = queue.dead("cpu0", 1)
    assert ([request.request for request in gone], grant) == ([2], None)
    assert holder(queue) == "cpu0" and ask(queue, 2) is None and queue.depth == 3


@pytest.mark.parametrize("policy", ["release", "hang", "lease"])
def test_what_a_successor_has_to_know_of_a_death(policy: str) -> None:
    """Only a dead holder that keeps the lock is remembered; the queue of the next epoch begins with it."""
    queue = LockQueue("l", 1, policy)
    ask(queue, 0)
    ask(queue, 1)
    held = queue.holder
    queue.dead("cpu0", 1)
    assert queue.memo.hung == (held if policy == "hang" else None)
    successor = LockQueue("l", 2, policy, memo=queue.memo)
    assert (ask(successor, 1) is None) == (policy == "hang")
    assert successor.release((1, 1)) == (False, None)


def test_another_incarnation_is_somebody_else() -> None:
    """The death of an incarnation takes nothing from the one that was started in its place."""
    queue = LockQueue("l", 1)
    ask(queue, 0)
    ask(queue, 1, incarnation=1)
    ask(queue, 1, incarnation=2)
    gone, _ = queue.dead("cpu1", 1)
    assert [request.incarnation for request in gone] == [1]
    assert queue.dead("cpu0", 2) == ([], None) and holder(queue) == "cpu0"


def test_tokens_grow_over_a_restart_of_the_service() -> None:
    """A later epoch is greater than every token of an earlier one, however many there were."""
    old, new = LockQueue("l", 1), LockQueue("l", 2)
    for request in range(100):
        ask(old, 0, request)
        last = old.token
        old.release(last)
    assert ask(new, 0) is not None and new.token > last


# Leases


def test_a_lease_ends_only_while_somebody_waits() -> None:
    """It runs from the grant; nobody is taken from the lock for nobody."""
    queue = LockQueue("l", 1, "lease")
    assert queue.lease_end(100) is None
    queue.acquire(Request("cpu0", 1, 1, 0, 5))
    assert queue.lease_end(100) is None
    queue.acquire(Request("cpu1", 1, 1, 0, 300))
    assert queue.lease_end(100) == 105
    queue.release((1, 1), 310)
    queue.acquire(Request("cpu2", 1, 1, 0, 320))
    assert queue.lease_end(100) == 410


def test_a_lease_that_ended_is_followed_under_a_higher_token() -> None:
    """Who lost the lock may come late with its release or die: it holds nothing, and that is remembered."""
    queue = LockQueue("l", 1, "lease")
    for cpu in (0, 1):
        ask(queue, cpu)
    lost, grant = queue.expire(7)
    assert (lost.request.node, lost.token, grant.request.node, grant.token) == ("cpu0", (1, 1), "cpu1", (1, 2))
    assert (queue.memo.fence, queue.granted_ns, queue.token) == ((1, 1), 7, (1, 2))
    assert queue.release((1, 1)) == (False, None)
    assert queue.dead("cpu0", 1) == ([], None) and holder(queue) == "cpu1"


# Taking over


def test_a_paused_queue_grants_when_it_resumes() -> None:
    """Requests wait, a restored holder goes on under its old token, the next gets one of the new epoch."""
    queue = LockQueue("l", 2, paused=True)
    queue.restore(Grant(Request("cpu3", 1, 9, 0, 0), (1, 40)), [Request("cpu1", 1, 1, 0, 0)])
    assert ask(queue, 0) is None
    assert queue.release((1, 40)) == (True, None) and queue.holder is None
    grant = queue.resume(50)
    assert grant is not None and (grant.request.node, grant.token, queue.granted_ns) == ("cpu1", (2, 1), 50)
    assert queue.release((2, 1))[1] is not None and holder(queue) == "cpu0"


def test_a_restored_lease_begins_anew() -> None:
    """Nobody knows how long the holder has held; it gets its whole time again."""
    queue = LockQueue("l", 2, "lease", paused=True)
    queue.restore(Grant(Request("cpu3", 1, 9, 0, 0), (1, 40)), [Request("cpu1", 1, 1, 0, 0)])
    assert queue.resume(1000) is None and queue.lease_end(100) == 1100


class QueueMachine(RuleBasedStateMachine):
    """Any row of requests, releases and deaths, against a list."""

    @initialize(policy=st.sampled_from(["release", "hang"]))
    def begin(self, policy: str) -> None:
        self.policy = policy
        self.queue = LockQueue("l", 7, policy)
        self.waiting: deque[Request] = deque()
        self.holder: Request | None = None
        self.tokens: list[Token] = []
        self.requests = 0
        self.hung = False

    def granted(self, grant: Grant | None) -> None:
        """Whoever waits longest must have been granted if nobody held, and nobody else."""
        if self.holder is None and self.waiting:
            self.holder = self.waiting.popleft()
            assert grant is not None and grant.request == self.holder
            assert not self.tokens or grant.token > self.tokens[-1]
            self.tokens.append(grant.token)
        else:
            assert grant is None

    @rule(cpu=st.integers(0, 3), incarnation=st.integers(1, 2), level=st.integers(0, 2))
    def acquire(self, cpu: int, incarnation: int, level: int) -> None:
        self.requests += 1
        request = Request(f"cpu{cpu}", incarnation, self.requests, level, self.requests)
        self.waiting.append(request)
        self.granted(self.queue.acquire(request))

    @precondition(lambda self: self.holder is not None and not self.hung)
    @rule()
    def release(self) -> None:
        was_holder, grant = self.queue.release(self.tokens[-1])
        assert was_holder
        self.holder = None
        self.granted(grant)

    @rule(data=st.data())
    def stale_release(self, data: st.DataObject) -> None:
        stale = self.tokens[:-1] if self.holder else self.tokens
        token = data.draw(st.sampled_from([*stale, NO_TOKEN, (8, 1)]))
        assert self.queue.release(token) == (False, None)

    @rule(cpu=st.integers(0, 3), incarnation=st.integers(1, 2))
    def die(self, cpu: int, incarnation: int) -> None:
        who = (f"cpu{cpu}", incarnation)
        gone = [request for request in self.waiting if (request.node, request.incarnation) == who]
        self.waiting = deque(request for request in self.waiting if request not in gone)
        held = self.holder is not None and (self.holder.node, self.holder.incarnation) == who
        if held and self.policy == "release":
            assert self.holder is not None
            gone.append(self.holder)
            self.holder = None
        elif held:
            self.hung = True
        found, grant = self.queue.dead(*who)
        assert sorted(r.request for r in found) == sorted(r.request for r in gone)
        self.granted(grant)

    @invariant()
    def the_same(self) -> None:
        assert list(self.queue.waiting) == list(self.waiting)
        assert (self.queue.holder.request if self.queue.holder else None) == self.holder
        assert self.queue.depth == len(self.waiting) + (self.holder is not None)
        assert self.queue.token == (self.tokens[-1] if self.holder else NO_TOKEN)


TestQueueMachine = QueueMachine.TestCase
