"""Invariants about P-SEAMLDR and locks, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

import pytest
from history import INFO, LOCK, Run

DEAD = {"wanted": False, "status": -9}


def service() -> Run:
    """A history told by the lock service and the SEAM side."""
    return Run().node("seamldr")


def two_queued() -> Run:
    """CPU 0 asked before CPU 1."""
    return service().queue(0, 1).queue(1, 1)


def test_one_after_the_other_keeps_i19() -> None:
    """I19 holds when each CPU leaves P-SEAMLDR before the next enters; so do I20 and I21."""
    run = service().seam_enter(0).seam_return(0).seam_enter(1, (1, 2), (1, 2)).seam_return(1)
    assert run.violated() == set()


def test_two_inside_break_i19() -> None:
    """I19 is broken when a second CPU is admitted, by the order of events or by the SEAM side's own count."""
    assert service().seam_enter(0).seam_enter(1, inside=2).violated() == {"I19"}
    assert service().seam_enter(0, inside=2).violated() == {"I19"}


def test_a_cpu_that_died_inside_is_not_inside() -> None:
    """I19 counts no CPU whose death inside SEAM was noticed."""
    run = service().seam_enter(0).write("seam_dead", by=0, why="killed").seam_enter(1)
    assert run.violated() == set()


def test_a_grant_after_the_release_keeps_i20() -> None:
    """I20 holds when the lock was given back, or withdrawn from a dead holder, before the next grant."""
    run = two_queued().queue(2, 1).grant(0, 1, 1).release(0, 1).grant(1, 1, 2).withdraw(1, 1).grant(2, 1, 3)
    assert run.violated() == set()


def test_two_grants_break_i20() -> None:
    """I20 is broken by a grant while another CPU holds the lock; a stale release frees nothing."""
    assert two_queued().grant(0, 1, 1).grant(1, 1, 2).violated() == {"I20"}
    run = two_queued().grant(0, 1, 1).write("lock_release", lock=LOCK, by=1, epoch=1, number=9, stale=1)
    assert run.grant(1, 1, 2).violated() == {"I20"}
    assert service().queue(0, 1).grant(0, 1, 1, holders=2).violated() == {"I20"}


def test_other_locks_may_have_other_rules() -> None:
    """I20 speaks of seamldr_lock only."""
    run = service().queue(0, 1, "other").queue(1, 1, "other").grant(0, 1, 1, lock="other")
    assert run.grant(1, 1, 2, lock="other").violated() == set()


@pytest.mark.parametrize("token", [(0, 0), (1, 1)])
def test_a_call_without_the_lock_breaks_i20(token: tuple[int, int]) -> None:
    """I20 is broken by an admitted call with no token or with one that is not the holder's."""
    assert service().seam_enter(0, token, (1, 2)).violated() == {"I20"}


def test_a_refused_call_under_a_stale_token_breaks_i20() -> None:
    """A CPU that lost its lease gets no answer at all: VMfailInvalid would be one."""
    assert service().seam_enter(0, (1, 1), (1, 2), admitted=0, alive=0).violated() == {"I20"}


def test_a_fenced_call_breaks_nothing() -> None:
    """A call that was kept out because its lease had ended did no harm, and neither did the grant after it."""
    run = two_queued().grant(0, 1, 1).expire(0, 1, 1).grant(1, 1, 2)
    run.write(
        "seam_fenced", by=0, leaf=INFO, name="INFO", epoch=1, number=1, holder_epoch=1, holder_number=2
    )
    assert run.violated() == set()


def test_a_lease_that_ends_inside_breaks_i20() -> None:
    """I20 is broken if a CPU loses the lock while it is in P-SEAMLDR, and not if it was before or after."""
    held = two_queued().grant(0, 1, 1).seam_enter(0, (1, 1), (1, 1))
    assert held.seam_return(0).expire(0, 1, 1).violated() == set()
    assert two_queued().grant(0, 1, 1).seam_enter(0, (1, 1), (1, 1)).expire(0, 1, 1).violated() == {"I20"}


def test_a_restored_holder_keeps_i20() -> None:
    """After a restart of the service the holder goes on under its token; what was granted and lost does not count."""
    run = two_queued().grant(0, 1, 1).restart().claim(1, 1).claim(0, 1, 1).restore(0, 1, 1)
    run.queue(1, 1).release(0, 1).grant(1, 1, 1, epoch=2)
    assert run.violated() == set()
    assert two_queued().grant(0, 1, 1).restart().grant(0, 1, 1, epoch=2).violated() == {"I24"}


def test_two_who_claim_the_lock_break_i20() -> None:
    """I20 is broken if two CPUs say that they hold it, unless one of them lost its lease and has not noticed."""
    assert service().restart().claim(0, 1, 1).claim(1, 1, 2).violated() == {"I20"}
    run = two_queued().grant(0, 1, 1).expire(0, 1, 1).grant(1, 1, 2)
    assert run.restart().claim(0, 1, 1).claim(1, 1, 2).restore(1, 1, 2).violated() == set()


def test_a_grant_beside_a_restored_holder_breaks_i20() -> None:
    """I20 is broken by a grant of the new service while the restored holder has the lock."""
    run = two_queued().grant(0, 1, 1).restart().restore(0, 1, 1).queue(1, 1).grant(1, 1, 1, epoch=2)
    assert run.violated() == {"I20"}


def test_who_is_inside_goes_on_over_a_restart() -> None:
    """I19 takes who is inside from the state that was kept: who left unrecorded is out, who is in stays in."""
    assert service().seam_enter(0).restart().seam_enter(1, (1, 1), (1, 1)).violated() == set()
    assert service().seam_enter(0).restart(inside=0).seam_enter(1, (1, 1), (1, 1)).violated() == {"I19"}
    assert service().restart(inside=0).seam_return(0).seam_enter(1, (1, 1), (1, 1)).violated() == set()


def test_a_busy_p_seamldr_breaks_i21() -> None:
    """I21 is broken by VMfailInvalid while P-SEAMLDR is alive: two came at once."""
    run = service().seam_enter(0, (0, 0), (0, 0)).seam_enter(1, (0, 0), (0, 0), admitted=0)
    follows = {v.invariant: v.follows_from for v in run.judge().violations}
    assert follows == {"I20": (), "I21": ()}


def test_an_absent_p_seamldr_keeps_i21() -> None:
    """I21 holds when VMfailInvalid means that P-SEAMLDR is not there."""
    assert service().seam_enter(0, admitted=0, alive=0).violated() == set()


def test_first_come_first_served_keeps_i24() -> None:
    """I24 holds when grants follow requests, withdrawn ones left out; each lock has its own queue."""
    run = two_queued().queue(0, 2, "other").withdraw(0, 1).grant(1, 1, 1).grant(0, 2, 1, lock="other")
    assert run.violated() == set()


def test_overtaking_breaks_i24() -> None:
    """I24 is broken by a grant to somebody who is not first, or who never asked."""
    assert two_queued().grant(1, 1, 1).violated() == {"I24"}
    assert service().grant(1, 1, 1).violated() == {"I24"}


def test_waiters_queue_again_by_the_time_of_their_requests() -> None:
    """I24 orders those who waited by Lamport time, then CPU, and puts them before those who come later."""
    asked = two_queued().queue(2, 9).restart().claim(0, 1, asked=7).claim(1, 1, asked=5).claim(2, 9, asked=5)
    run = asked.queue(1, 1).queue(2, 9).queue(0, 1).queue(3, 1)
    for epoch_number, (cpu, request) in enumerate([(1, 1), (2, 9), (0, 1), (3, 1)], start=1):
        run.grant(cpu, request, epoch_number, epoch=2).release(cpu, epoch_number, epoch=2)
    assert run.violated() == set()


@pytest.mark.parametrize("first", [0, 3])
def test_queueing_again_out_of_turn_breaks_i24(first: int) -> None:
    """I24 is broken if a later request, or one that was never claimed, queues before a claimed one."""
    run = service().restart().claim(0, 1, asked=7).claim(1, 1, asked=5)
    assert run.queue(first, 1).violated() == {"I24"}


def test_growing_tokens_keep_i57() -> None:
    """I57 orders tokens by epoch, then number; a new epoch may count from 1 again."""
    run = two_queued().grant(0, 1, 5).release(0, 5).grant(1, 1, 1, epoch=2)
    assert run.violated() == set()


@pytest.mark.parametrize(("epoch", "number"), [(1, 5), (1, 4), (0, 9)])
def test_a_token_that_goes_back_breaks_i57(epoch: int, number: int) -> None:
    """I57 is broken by a token that is repeated or goes back."""
    assert two_queued().grant(0, 1, 5).release(0, 5).grant(1, 1, number, epoch=epoch).violated() == {"I57"}


def test_a_holder_restored_under_an_old_token_breaks_i57() -> None:
    """I57 is broken by a holder that comes back although another was granted after it."""
    run = two_queued().grant(0, 1, 1).release(0, 1).grant(1, 1, 2).restart()
    assert run.restore(0, 1, 1).violated() == {"I57"}


def test_a_granted_request_keeps_i50() -> None:
    """I50 holds for a request that was followed by a hold."""
    assert Run().cpu(0).lock_request(1).lock_hold(1, 1).lock_drop(1).finish().violated() == set()


def test_a_request_left_over_breaks_i50() -> None:
    """I50 is broken by a request without a hold in a run that came to its own end."""
    assert Run().cpu(0).lock_request(1).finish().violated() == {"I50"}


def test_a_request_in_a_cut_run_is_suspect() -> None:
    """I50 calls nothing violated that could still move when the run was cut."""
    judgement = Run().cpu(0).lock_request(1).finish(finished=False).judge()
    assert judgement.violations == () and judgement.suspects == (
        "cpu0 was waiting for seamldr_lock when the run was cut",
    )


def test_a_grant_on_its_way_is_no_cycle() -> None:
    """I50 does not take the grant of the very request for a holder."""
    run = Run().cpu(0).lock_request(1).node("seamldr").queue(0, 1).grant(0, 1, 1).finish(finished=False)
    assert run.violated() == set()


def test_a_lock_taken_twice_by_one_cpu_breaks_i50() -> None:
    """I50 is broken in a cut run when a handler asks for the lock that it interrupted the holder of, as I22 warns."""
    run = Run().cpu(0).lock_request(1).lock_hold(1, 1).cpu(0, "irq", irqs=False).lock_request(2)
    assert run.finish(finished=False).violated() == {"I22", "I50"}
    assert "held by cpu0" in run.story("I50")


def test_a_call_under_the_lock_breaks_i50_and_i51() -> None:
    """I50 and I51 are broken in a cut run when the holder waits for a CPU that waits for it with interrupts off."""
    run = Run().cpu(0).lock_request(1).lock_hold(1, 1).csd_lock(1, 7)
    run.cpu(1, irqs=False).lock_request(1)
    assert run.finish(finished=False).violated() == {"I25", "I50", "I51"}


def test_a_waiter_with_interrupts_on_serves_the_holder() -> None:
    """The same with interrupts on is no deadlock: the waiter can run the call."""
    run = Run().cpu(0).lock_request(1).lock_hold(1, 1).csd_lock(1, 7).cpu(1).lock_request(1)
    assert run.finish(finished=False).violated() == {"I25"}


def test_processes_that_wait_for_each_other_are_stuck() -> None:
    """What the launcher learned of waits counts: a lock wait that leads into such a cycle is a violation."""
    run = Run().cpu(0).lock_request(1).lock_hold(1, 1).cpu(1, irqs=False).lock_request(1).node("launcher")
    for name, on in (("cpu0", "cpu1"), ("cpu1", "cpu0")):
        run.write("process_waits", name=name, what="spins", on=on, operations=9)
    assert run.finish(finished=False).violated() == {"I50"}


def test_a_dead_holder_excuses_i50_only_if_the_policy_hangs() -> None:
    """I50 is excused when the holder died with lock_policy=hang, and when the waiter itself or the service did."""

    def waits(**knobs: str) -> Run:
        return Run(**knobs).cpu(0).lock_request(1).lock_hold(1, 1).cpu(1).lock_request(1)

    hung = waits(lock_policy="hang").exit("cpu0", **DEAD).finish()
    assert hung.violated() == set() and len(hung.judge().excused) == 1
    assert waits().exit("cpu0", **DEAD).finish().violated() == {"I50"}
    assert waits().exit("seamldr", **DEAD).finish().violated() == set()
    assert waits().exit("seamldr", **DEAD).online("seamldr", 2).finish().violated() == {"I50"}
    assert Run().cpu(0).lock_request(1).exit("cpu0", **DEAD).finish().violated() == set()


def test_a_withdrawn_request_is_no_request() -> None:
    """I50 forgets a request that the service withdrew, and those of a CPU that was started again."""
    assert Run().cpu(0).lock_request(1).node("seamldr").withdraw(0, 1).finish().violated() == set()
    run = Run().cpu(0).lock_request(1).exit("cpu0", **DEAD).online("cpu0", 2).cpu(0).new_process()
    assert run.write("cpu_online").finish().violated() == set()


def test_every_new_process_of_a_cpu_begins_anew() -> None:
    """I50 asks for no grant to a dead process, also if it was not the first on its CPU."""
    run = Run().cpu(0).write("cpu_online")
    for incarnation in (2, 3, 4):
        run.lock_request(1).exit("cpu0", **DEAD).online("cpu0", incarnation).cpu(0).new_process().write("cpu_online")
    assert run.finish().violated() == set()


def test_a_lock_that_the_kernel_took_back_has_no_holder() -> None:
    """A release seen by the service alone frees the lock, as when a strategy left it held."""
    run = Run().cpu(0).lock_request(1).lock_hold(1, 1).node("seamldr").release(0, 1)
    run.cpu(0, irqs=False).lock_request(2).finish(finished=False)
    assert run.violated() == set()


def test_a_strategy_that_raises_breaks_i60() -> None:
    """I60 is broken by what the kernel caught of a strategy, and says where."""
    run = Run().cpu(0).begin(1 << 12).end(1 << 12)
    assert run.violated() == set()
    run.write("strategy_error", error="raised KeyError: 1", where="idea.py:9")
    assert run.violated() == {"I60"} and "idea.py:9" in run.story("I60")
