"""Invariants about interrupts and cross-calls, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

from history import Run

DEAD = {"wanted": False, "status": -9}


def test_a_call_with_interrupts_on_keeps_i26() -> None:
    """I26 holds for a waiting call with interrupts on, for one to the CPU itself, and for one that nobody waits for."""
    run = Run().cpu(0).csd_lock(1, 1).csd_done(1).cpu(0, irqs=False).csd_lock(0, 2).csd_done(2).csd_lock(1, 3, wait=0)
    assert run.violated() == set()


def test_a_call_with_interrupts_off_breaks_i26() -> None:
    """I26 is broken by a waiting call to another CPU with interrupts off."""
    assert Run().cpu(0, irqs=False).csd_lock(1, 1).violated() == {"I26"}


def test_a_completed_call_keeps_i51_and_i59() -> None:
    """I51 and I59 hold for a call that ran once and whose sender saw it."""
    assert Run().cpu(0).csd_lock(1, 1).cpu(1, "irq").csd_run(0, 1).cpu(0).csd_done(1).finish().violated() == set()


def test_a_call_that_its_sender_never_saw_end_breaks_i51() -> None:
    """I51 is broken by a waiting call without an end in a finished run; in a cut one it is suspect."""
    run = Run().cpu(0).csd_lock(1, 1).cpu(1, "irq").csd_run(0, 1)
    assert run.finish().violated() == {"I51"}
    run = Run().cpu(0).csd_lock(1, 1).finish(finished=False)
    assert run.violated() == set() and len(run.judge().suspects) == 1


def test_two_calls_with_interrupts_off_are_a_deadlock() -> None:
    """I51 is broken in a cut run by two CPUs that wait for each other with interrupts off."""
    run = Run().cpu(0, irqs=False).csd_lock(1, 1).cpu(1, irqs=False).csd_lock(0, 2).finish(finished=False)
    follows = {v.invariant: v.follows_from for v in run.judge().violations}
    assert follows == {"I26": (), "I51": ("I26",)}


def test_two_calls_with_interrupts_on_are_none() -> None:
    """I51 holds as long as both waiters can serve each other."""
    run = Run().cpu(0).csd_lock(1, 1).cpu(1).csd_lock(0, 2).finish(finished=False)
    assert run.violated() == set()


def test_a_dead_target_excuses_i51_and_i59() -> None:
    """I51 and I59 are excused when the target died, even if it was started again."""
    run = Run().cpu(0).csd_lock(1, 1).exit("cpu1", **DEAD).online("cpu1", 2).finish()
    assert run.violated() == set() and len(run.judge().excused) == 2


def test_every_delivery_once_keeps_i58() -> None:
    """I58 holds when each message is delivered once, also if its delivery is recorded before its sending."""
    run = Run().cpu(0).ipi_send(1, 1).ipi_send(1, 2).cpu(1, "idle").ipi_deliver(0, 1).ipi_deliver(0, 2)
    run.ipi_deliver(0, 3).cpu(0).ipi_send(1, 3)
    assert run.later().exit("cpu1").finish().violated() == set()


def test_ids_belong_to_their_sender() -> None:
    """I58 tells messages of two senders with one number apart."""
    run = Run().cpu(0).ipi_send(2, 1).cpu(1).ipi_send(2, 1).cpu(2).ipi_deliver(0, 1).ipi_deliver(1, 1)
    assert run.later().finish().violated() == set()


def test_a_repeated_delivery_breaks_i58() -> None:
    """I58 is broken by a second delivery of one message, before or after its sending is recorded."""
    assert Run().cpu(0).ipi_send(1, 1).cpu(1).ipi_deliver(0, 1).ipi_deliver(0, 1).violated() == {"I58"}
    assert Run().cpu(1).ipi_deliver(0, 1).ipi_deliver(0, 1).cpu(0).ipi_send(1, 1).violated() == {"I58"}


def test_a_delivery_of_nothing_breaks_i58() -> None:
    """I58 is broken by a delivery that nobody sent; a sender that died may have left no record."""
    run = Run().cpu(1).ipi_deliver(0, 1)
    assert run.violated() == {"I58"}
    assert run.exit("cpu0", **DEAD).violated() == set()


def test_a_lost_interrupt_breaks_i58() -> None:
    """I58 is broken by a message that was never delivered though its target lived on."""
    assert Run().cpu(0).ipi_send(1, 1).later().finish().violated() == {"I58"}


def test_in_a_run_that_was_cut_an_interrupt_that_was_overtaken_is_lost() -> None:
    """I58 suspects a message that may still be on its way, and is broken when a later one on its link has arrived."""
    cut = Run().cpu(0).ipi_send(1, 1).later().finish(finished=False).exit("cpu1")
    assert cut.violated() == set() and len(cut.judge().suspects) == 1
    run = Run().cpu(0).ipi_send(1, 1).ipi_send(1, 2).cpu(1).ipi_deliver(0, 2)
    assert run.later().finish(finished=False).violated() == {"I58"}


def test_what_was_on_its_way_at_the_end_is_excused() -> None:
    """I58 excuses messages sent just before the end, to or from dead CPUs, or to one that was killed in the end."""
    for run in (
        Run().cpu(0).ipi_send(1, 1).finish(),
        Run().cpu(0).ipi_send(1, 1).later().exit("cpu1", **DEAD).later().finish(),
        Run().cpu(0).ipi_send(1, 1).later().exit("cpu0", **DEAD).later().finish(),
        Run().cpu(0).ipi_send(1, 1).later().finish(finished=False).exit("cpu1", wanted=True, status=-9),
    ):
        assert run.violated() == set()
        assert len(run.judge().excused) == 1


def test_a_new_incarnation_may_count_anew() -> None:
    """I58 lets the successor of a dead CPU use its message numbers again."""
    run = Run().cpu(0).ipi_send(1, 1).cpu(1).ipi_deliver(0, 1).exit("cpu0", **DEAD).online("cpu0", 2)
    run.cpu(0).new_process().ipi_send(1, 1).cpu(1).ipi_deliver(0, 1)
    assert run.finish().violated() == set()


def test_a_function_that_runs_twice_breaks_i59() -> None:
    """I59 is broken by a call that runs twice, on whichever CPU."""
    run = Run().cpu(0).csd_lock(1, 1, wait=0).cpu(1, "irq").csd_run(0, 1)
    assert run.violated() == set()
    assert run.csd_run(0, 1).violated() == {"I59"}


def test_a_function_that_never_runs_breaks_i59() -> None:
    """I59 is broken by a queued function that has not run in a run that came to its own end."""
    run = Run().cpu(0).csd_lock(1, 1, wait=0)
    assert run.finish().violated() == {"I59"}
    assert Run().cpu(0).csd_lock(1, 1, wait=0).finish(finished=False).violated() == set()
