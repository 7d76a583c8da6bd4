"""I53: a lockup that the watchdog reported is a suspicion, a violation only if the wait graph proves it."""

from __future__ import annotations

import io

import pytest
from history import Run
from rich.console import Console

from bus.judge import Judgement
from bus.report import print_run

HARD = "watchdog: Watchdog detected hard LOCKUP on cpu 1"
SOFT = "watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [kworker/1:120]"


def hard(run: Run, cpu: int = 1) -> Run:
    """CPU 0 reports a hard lockup of another one."""
    return run.later(12).cpu(0).write("hard_lockup", cpu=cpu, stuck_s=12, text=HARD)


def soft(run: Run) -> Run:
    """CPU 1 reports a soft lockup of itself."""
    run.later(22).cpu(1)
    return run.write("soft_lockup", cpu=1, stuck_s=22, task="kworker/1:120", operations=512, text=SOFT)


def about_lockups(judgement: Judgement) -> list[str]:
    """What the judgement suspects of CPU 1."""
    return [sentence for sentence in judgement.suspects if sentence.endswith("stuck or slow")]


@pytest.mark.parametrize(("report", "words"), [(hard, "takes no interrupt"), (soft, "does not schedule")])
def test_wall_clock_alone_makes_nobody_unsafe(report: object, words: str) -> None:
    """A run that was cut with a lockup open is incomplete, and the suspicion is a sentence."""
    assert callable(report)
    judgement = report(Run().cpu(1).load(0x1000)).finish(False).judge()
    assert (judgement.verdict, judgement.violations) == ("incomplete", ())
    (sentence,) = about_lockups(judgement)
    assert sentence.startswith(f"cpu1 {words}")


def test_the_kernel_log_has_it_in_the_kernels_words() -> None:
    """The summary has both texts, with how often, and what is printed has them whole."""
    summary = hard(soft(soft(Run()))).finish().judge().as_dict() | {"run_dir": "run"}
    assert summary["kernel_log"] == {SOFT: 2, HARD: 1}
    out = io.StringIO()
    print_run(Console(file=out, width=160), summary)
    assert f"{SOFT} (2 times)" in out.getvalue()


def test_a_lockup_that_is_over_was_slow() -> None:
    """What moved again is no suspect."""
    run = hard(Run()).write("lockup_over", cpu=1, kind="hard_lockup", stuck_s=16).finish(False)
    assert about_lockups(run.judge()) == []


def test_a_machine_that_came_to_its_own_end_was_slow() -> None:
    """With nobody left to say that it is over: all that the machine was to do is done."""
    assert about_lockups(hard(Run()).finish().judge()) == []


def test_a_cycle_proves_it() -> None:
    """Two CPUs wait for each other with interrupts off: the lockup is a violation, and follows from the others."""
    run = Run().cpu(0, irqs=False).lock_request(1).lock_hold(1, 1).csd_lock(1, 7).cpu(1, irqs=False).lock_request(1)
    judgement = hard(run).finish(False).judge()
    (found,) = [violation for violation in judgement.violations if violation.invariant == "I53"]
    assert found.count == 1 and {"I26", "I50", "I51"} <= set(found.follows_from)
    assert found.first.sentence == "cpu1 takes no interrupt, for ever"


@pytest.mark.parametrize("itself", [True, False])
def test_a_death_explains_it(itself: bool) -> None:
    """The CPU that takes no ticks is dead, or waits for a lock whose holder is."""
    run = Run().cpu(0).lock_request(1).lock_hold(1, 1).cpu(1, irqs=False).lock_request(1)
    run = hard(run.exit("cpu1" if itself else "cpu0", wanted=False, status=-9).cpu(2))
    judgement = run.finish(False).judge()
    assert about_lockups(judgement) == []
    assert any("takes no interrupt" in excuse and "is dead" in excuse for excuse in judgement.excused)
