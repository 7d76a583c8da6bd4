"""Rounds of chaos: each follows from its seed and is judged; one that breaks an invariant is shrunk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio

from kvm.chaos import Strike, chaos_topology, run_chaos
from kvm.fleet import MachineError
from kvm.machine import Machine, Watch
from kvm.plan import Plan, explained, random_plan, smaller, write_plan
from kvm.summary import Summary, summarize_run

TRIES = 2
"""How often a smaller plan is run before it counts as one that does not fail: the operating system interleaves."""
MAX_SHRINK_RUNS = 40

BY_THE_END = frozenset({"I58"})
"""Excused without any fault: what was on its way when the machine was taken down."""

Outcome = Literal["held", "broken", "unfinished"]


class Round(msgspec.Struct, frozen=True):
    """One round, judged. `broken` are the invariants that no fault explains; `excused` are sentences about others."""

    plan: Plan
    strikes: tuple[Strike, ...]
    outcome: Outcome
    broken: tuple[str, ...]
    excused: tuple[str, ...]
    why: tuple[str, ...]
    run_dir: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seed": self.plan.seed,
            "outcome": self.outcome,
            "broken": list(self.broken),
            "excused": list(self.excused),
            "why": list(self.why),
            "faults": [
                {"fault": strike.fault.describe(), "node": strike.node, "outcome": strike.outcome}
                for strike in self.strikes
            ],
            "run_dir": self.run_dir,
        }


def run_round(plan: Plan, directory: Path, watch: Watch | None = None) -> Round:
    """Run one plan in a new directory, write plan.toml there, judge it; raises what `chaos_topology` raises."""
    topology = chaos_topology(plan, directory)
    directory.mkdir(parents=True)
    (directory / "plan.toml").write_text(write_plan(plan))
    try:
        strikes = trio.run(run_chaos, Machine(topology, watch=watch), plan.fault)
    except MachineError as error:
        return Round(plan, (), "unfinished", (), (), (str(error),), str(directory))
    return judged(plan, tuple(strikes), summarize_run(directory))


def judged(plan: Plan, strikes: tuple[Strike, ...], summary: Summary) -> Round:
    """What the summary of a round says of it."""
    allowed: frozenset[str] = frozenset().union(*(explained(strike.fault) for strike in strikes if strike.node))
    excused = tuple(summary["excused"])
    not_excused = {excuse.partition(":")[0] for excuse in excused} - allowed - BY_THE_END
    broken = (*(violation["invariant"] for violation in summary["violations"]), *sorted(not_excused))
    ended = not any("did not come to its own end" in reason for reason in summary["why"])
    outcome: Outcome = "broken" if broken else "held" if ended else "unfinished"
    why = () if outcome == "held" else tuple(summary["why"])
    return Round(plan, strikes, outcome, broken, excused, why, summary["run_dir"])


def rounds(
    count: int, seed: int, directory: Path, *, cpus: int, strategy: str, knobs: dict[str, str | int], keep: bool
) -> Iterator[Round]:
    """`count` rounds with the seeds from `seed` on. Of those that held only plan and summary stay, unless `keep`."""
    for number in range(seed, seed + count):
        plan = random_plan(number, cpus=cpus, strategy=strategy, knobs=knobs)
        done = run_round(plan, directory / f"round-{number:05}")
        if done.outcome == "held" and not keep:
            for name in ("records", "modules"):
                shutil.rmtree(Path(done.run_dir) / name, ignore_errors=True)
        yield done


def shrink(failed: Round, directory: Path, on_try: Callable[[Plan], None]) -> Round:
    """The smallest round found that breaks one of the same invariants, fault by fault and CPU by CPU."""
    best, wanted, number = failed, set(failed.broken), 0
    candidates = smaller(best.plan)
    while candidates and number < MAX_SHRINK_RUNS:
        plan = candidates.pop(0)
        on_try(plan)
        for _ in range(TRIES):
            number += 1
            tried = run_round(plan, directory / f"try-{number:03}")
            if wanted & set(tried.broken):
                best, candidates = tried, smaller(plan)
                break
    return best
