"""The judge: reads the records of a run, holds them against every invariant, and says safe, unsafe or incomplete.

A verdict is never vacuous. "safe" needs that the question was asked: P-SEAMLDR calls really took a current VMCS away,
or every update was refused as the strategy intends. Where records are missing, where the machine did not come to its
own end, or where something may be stuck, the word is "incomplete"; one violation outweighs all of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from bus.events import EVENTS
from bus.invariant import Invariant, dispatch
from bus.invariants import INVARIANTS
from bus.merge import Notes, merge, merge_run, read_file
from bus.records import Record
from bus.shadow import Shadow, is_set
from bus.statistics import Exposures, Statistics
from bus.story import Story
from bus.waits import Ending

Verdict = Literal["safe", "unsafe", "incomplete"]


class Violation(msgspec.Struct, frozen=True):
    """An invariant that did not hold: how often, the story of the first time, and what explains it.

    `follows_from` are ids of invariants, violated in the same run, of which this is a consequence.
    """

    invariant: str
    slug: str
    sentence: str
    count: int
    first: Story
    follows_from: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For the summary."""
        return {
            "invariant": self.invariant,
            "slug": self.slug,
            "count": self.count,
            "first": self.first.as_dict(),
            "follows_from": list(self.follows_from),
        }


class Judgement(msgspec.Struct, frozen=True):
    """What the records of a run say.

    `why` are sentences for an incomplete verdict; `suspects` and `excused` are what was seen and not called a
    violation; `notes` are about the record files. `machine` is the `machine_begin` record, empty if there is none.
    """

    verdict: Verdict
    violations: tuple[Violation, ...]
    why: tuple[str, ...]
    suspects: tuple[str, ...]
    excused: tuple[str, ...]
    notes: tuple[str, ...]
    finished: bool
    machine: Record
    exposures: Exposures
    statistics: Statistics

    def as_dict(self) -> dict[str, Any]:
        """The part of the summary that records can tell."""
        machine, numbers = self.machine, self.statistics
        described = {key: machine.get(key) for key in ("strategy", "knobs", "seed", "cpus", "vcpus", "tds")}
        return {
            "schema": 1,
            "verdict": self.verdict,
            **described,
            "violations": [violation.as_dict() for violation in self.violations],
            "assumptions": assumptions(machine.get("knobs") or {}),
            "exposures": self.exposures.as_dict(),
            "updates": msgspec.to_builtins(numbers.updates),
            "vmx": numbers.vmx(),
            "seamcalls": dict(sorted(numbers.seamcalls.items())),
            "ipis": numbers.ipis(),
            "guests": numbers.guests(),
            "lock": numbers.lock(),
            "processes": numbers.processes(),
            "seconds": numbers.seconds(),
            "why": list(self.why),
            "suspects": list(self.suspects),
            "excused": list(self.excused),
            "notes": list(self.notes),
        }


def judge(run_dir: str | Path) -> Judgement:
    """Judge the run whose records lie in `run_dir`/records.

    Raises `FileNotFoundError` if there is no such folder; everything else that is wrong with the files is noted.
    """
    notes = Notes()
    launcher = Path(run_dir) / "records" / "launcher.jsonl"
    machine: Record = {}
    expected = ["launcher"]
    if launcher.exists():
        for record in read_file(launcher, Notes()):
            if record["event"] == "machine_begin":
                machine = record
            elif record["event"] == "process_online" and record["name"] not in expected:
                expected.append(record["name"])
    return _judge(merge_run(run_dir, notes, expected), machine, notes)


def judge_records(records: Iterable[Record]) -> Judgement:
    """Judge records that are in memory, of one process or of several, each in the order that it wrote them."""
    files: dict[str, list[Record]] = {}
    machine: Record = {}
    for record in records:
        files.setdefault(record["node"], []).append(record)
        if record["event"] == "machine_begin":
            machine = record
    notes = Notes()
    return _judge(merge(files.values(), notes), machine, notes)


def _judge(records: Iterator[Record], machine: Record, notes: Notes) -> Judgement:
    shadow = Shadow(machine.get("knobs") or {})
    invariants = [invariant() for invariant in INVARIANTS.values()]
    exposures, statistics = Exposures(), Statistics()
    table = dispatch([*invariants, exposures, statistics])
    unreadable = 0
    for record in records:
        statistics.records += 1
        try:
            shadow.meet(record)
            for handler in table.get(record["event"], ()):
                handler(record, shadow)
            shadow.apply(record)
        except (KeyError, TypeError, AttributeError) as error:
            unreadable += 1
            notes.add(f"{record['node']}: a {record['event']} record is not as the event table says: {error!r}")
        if record["event"] not in EVENTS:
            notes.add(f"{record['node']} wrote an unknown event {record['event']}")
    ending = Ending(shadow)
    for invariant in invariants:
        invariant.at_end(ending)
    statistics.finish()
    violations = tuple(_violations(invariants))
    suspects = tuple(suspect for invariant in invariants for suspect in invariant.suspects)
    why = tuple(_doubts(shadow, machine, notes, suspects, exposures, statistics, unreadable))
    return Judgement(
        verdict="unsafe" if violations else "incomplete" if why else "safe",
        violations=violations,
        why=why,
        suspects=suspects,
        excused=tuple(excuse for invariant in invariants for excuse in invariant.excused),
        notes=tuple(notes.sentences),
        finished=bool(shadow.finished),
        machine=machine,
        exposures=exposures,
        statistics=statistics,
    )


def _violations(invariants: list[Invariant]) -> Iterator[Violation]:
    """Violations in the order of their numbers, those that explain others first."""
    violated = {invariant.id for invariant in invariants if invariant.count}
    found = [
        Violation(
            invariant.id,
            invariant.slug,
            invariant.sentence,
            invariant.count,
            invariant.story,
            tuple(cause for cause in invariant.consequence_of if cause in violated),
        )
        for invariant in invariants
        if invariant.story is not None
    ]
    yield from sorted(found, key=lambda violation: bool(violation.follows_from))


def _doubts(
    shadow: Shadow,
    machine: Record,
    notes: Notes,
    suspects: tuple[str, ...],
    exposures: Exposures,
    statistics: Statistics,
    unreadable: int,
) -> Iterator[str]:
    """Why the run cannot be called safe, although nothing is violated."""
    if not machine:
        yield "no record describes the machine"
    if shadow.finished is None:
        yield "the records have no end"
    elif not shadow.finished:
        yield "the machine did not come to its own end"
    if notes.incomplete or unreadable:
        yield "records are missing or unreadable"
    yield from statistics.broken
    if suspects:
        yield f"{suspects[0]}" + (f" (and {len(suspects) - 1} more)" if len(suspects) > 1 else "")
    if exposures.lost_vmcs == 0 and not (statistics.updates.all_refused and not statistics.seamldr_calls):
        yield _no_exposure(shadow, statistics)


def _no_exposure(shadow: Shadow, statistics: Statistics) -> str:
    if shadow.fixed:
        return "nothing was put to the test: on this CPU (vmx_basic_bit60=1) SEAMRET keeps the current VMCS"
    if not statistics.seamldr_calls:
        return "nothing was put to the test: there was no P-SEAMLDR call"
    return "nothing was put to the test: no P-SEAMLDR call was made on a CPU with a current VMCS"


def assumptions(knobs: dict[str, Any]) -> list[str]:
    """What a verdict takes for granted about the processor, one sentence each."""
    if is_set(knobs.get("vmx_basic_bit60", 0)):
        return ["The CPU has the fixed microcode: SEAMRET from P-SEAMLDR keeps the current VMCS."]
    if str(knobs.get("seamret_launch", "preserve")) == "preserve":
        return ["SEAMRET from P-SEAMLDR takes the current-VMCS pointer and leaves the launch state."]
    scope = "every VMCS active on the CPU" if "all" in str(knobs.get("seamret_scope", "")) else "that VMCS"
    return [f"SEAMRET from P-SEAMLDR takes the current-VMCS pointer and clears the launch state of {scope}."]
