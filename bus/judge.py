"""The judge: reads the records of a run, holds them against every invariant, and says safe, unsafe or incomplete.

A verdict is never vacuous. "safe" needs that the question was asked: P-SEAMLDR calls really took a current VMCS away,
or every update was refused as the strategy intends. Where records are missing, where the machine did not come to its
own end, or where something may be stuck, the word is "incomplete"; one violation outweighs all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from bus.decode import UNREADABLE
from bus.events import EVENTS
from bus.invariant import IF_FAILED, Handler, Invariant, dispatch
from bus.invariants import INVARIANTS
from bus.merge import Entry, Notes, OnRead, merge, merge_entries, read_file
from bus.records import Record
from bus.shadow import Shadow, is_set
from bus.spec import LAUNCHER
from bus.statistics import Cost, Exposures, Statistics
from bus.story import Story
from bus.waits import Ending, Wait

KERNEL_LOG_LINES = 20
"""Different lines of the kernel log that a summary shows, the most frequent ones."""

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

    `why` are sentences for an incomplete verdict, `suspects` among them: waits that may or may not be stuck.
    `excused` are violations that an injected fault explains. `notes` are about the record files. `machine` is the
    `machine_begin` record, empty if there is none. `waits` are open at the end; `cycle` are those of them that wait
    for each other.
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
    cost: Cost
    waits: tuple[Wait, ...]
    cycle: tuple[Wait, ...]

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
            "cost": self.cost.as_dict(),
            "updates": msgspec.to_builtins(numbers.updates),
            "vmx": numbers.vmx(),
            "seamcalls": dict(sorted(numbers.seamcalls.items())),
            "ipis": numbers.ipis(),
            "guests": numbers.guests(),
            "lock": numbers.lock(),
            "processes": numbers.processes(),
            "seconds": numbers.seconds(),
            "kernel_log": dict(numbers.kernel_log.most_common(KERNEL_LOG_LINES)),
            "why": list(self.why),
            "suspects": list(self.suspects),
            "excused": list(self.excused),
            "notes": list(self.notes),
        }


def judge(run_dir: str | Path, on_read: OnRead = lambda size: None) -> Judgement:
    """Judge the run whose records lie in `run_dir`/records; `on_read` is told of bytes as they are read.

    Raises `FileNotFoundError` if there is no such folder; everything else that is wrong with the files is noted.
    """
    notes = Notes(on_read)
    launcher = Path(run_dir) / "records" / "launcher.jsonl"
    machine: Record = {}
    expected = [LAUNCHER]
    if launcher.exists():
        for record in read_file(launcher, Notes()):
            if record["event"] == "machine_begin":
                machine = record
            elif record["event"] == "process_online" and record.get("name", LAUNCHER) not in expected:
                expected.append(record["name"])
    judge = Judge(machine)
    judge.read(merge_entries(run_dir, notes, expected), notes)
    return judge.conclude(notes)


def judge_records(records: Iterable[Record]) -> Judgement:
    """Judge records that are in memory, of one process or of several, each in the order that it wrote them."""
    files: dict[str, list[Record]] = {}
    machine: Record = {}
    for record in records:
        files.setdefault(record["node"], []).append(record)
        if record["event"] == "machine_begin":
            machine = record
    notes = Notes()
    judge = Judge(machine)
    for record in merge(files.values(), notes):
        judge.see(record)
    return judge.conclude(notes)


_Plan = tuple[tuple[Handler, ...], Callable[[Record], None] | None, bool]
"""What is done with an event: who sees it, how the state moves on, and whether it matters only if it failed."""

_NOBODY: tuple[Handler, ...] = ()
_NOTHING: _Plan = (_NOBODY, None, False)


class Judge:
    """Sees one history, record by record in causal order, and concludes.

    `machine` is its `machine_begin` record, or empty. A history stepped in one process can be shown to the judge
    as it happens: `violated` grows on the way.
    """

    def __init__(self, machine: Record) -> None:
        self._machine = machine
        self._shadow = Shadow(machine.get("knobs") or {})
        self._invariants = [invariant() for invariant in INVARIANTS.values()]
        self._exposures, self._statistics, self._cost = Exposures(), Statistics(), Cost()
        self._watch()
        self._strange: dict[str, None] = {}
        self._pids: dict[str, int] = {}
        self._unheard = EVENTS.keys() - self._plans.keys() | {*IF_FAILED}

    @property
    def violated(self) -> tuple[str, ...]:
        """Ids of the invariants that are violated so far."""
        return tuple(invariant.id for invariant in self._invariants if invariant.count)

    def _watch(self) -> None:
        handlers = dispatch([*self._invariants, self._exposures, self._cost, self._statistics])
        applies = self._shadow.applies
        self._plans: dict[str, _Plan] = {
            event: (handlers.get(event, _NOBODY), applies.get(event), event in IF_FAILED)
            for event in handlers.keys() | applies.keys()
        }

    def _reset(self) -> None:
        """The machine was switched off and on: what was true of it is over, what was found stays found."""
        self._shadow = Shadow(self._machine.get("knobs") or {})
        self._invariants = [invariant.renewed() for invariant in self._invariants]
        self._pids = {}
        self._watch()

    def read(self, entries: Iterable[Entry], notes: Notes) -> None:
        """The next records; of those that nobody looks at only the common fields are decoded."""
        known_pid, unheard, passed_over = self._pids.get, self._unheard, 0
        for entry in entries:
            event = entry.event
            if event in unheard and known_pid(entry.node) == entry.pid and (
                entry.result == "ok" or event not in IF_FAILED
            ):
                passed_over += 1
                continue
            try:
                record = entry.record()
            except UNREADABLE:
                notes.add_unreadable(entry.node, 1, torn=False)
            else:
                self.see(record)
        self._statistics.records += passed_over

    def see(self, record: Record) -> None:
        """The next record. One that is not as the event table says is passed over, and makes the run incomplete."""
        event, node = record["event"], record["node"]
        self._statistics.records += 1
        if event == "machine_reset":
            self._reset()
        shadow = self._shadow
        handlers, apply, if_failed = self._plans.get(event, _NOTHING)
        try:
            if self._pids.get(node) != record["pid"]:
                self._pids[node] = record["pid"]
                shadow.meet(record)
            if if_failed and record["result"] == "ok":
                return
            for handler in handlers:
                handler(record, shadow)
            if apply is not None:
                apply(record)
        except (KeyError, TypeError, AttributeError) as error:
            self._strange[f"{node}: a {event} record is not as the event table says: {error!r}"] = None
        if handlers is _NOBODY and event not in EVENTS:
            self._strange[f"{node} wrote an unknown event {event}"] = None

    def conclude(self, notes: Notes) -> Judgement:
        """The judgement, when there are no more records; `notes` tell where they came from."""
        ending = Ending(self._shadow)
        for invariant in self._invariants:
            invariant.at_end(ending)
        self._statistics.finish()
        violations = tuple(_violations(self._invariants))
        suspects = tuple(suspect for invariant in self._invariants for suspect in invariant.suspects)
        why = (*self._doubts(notes), *suspects)
        return Judgement(
            verdict="unsafe" if violations else "incomplete" if why else "safe",
            violations=violations,
            why=why,
            suspects=suspects,
            excused=tuple(f"{one.id}: {excuse}" for one in self._invariants for excuse in one.excused),
            notes=(*notes.sentences, *self._strange, *self._statistics.notes()),
            finished=bool(self._shadow.finished),
            machine=self._machine,
            exposures=self._exposures,
            statistics=self._statistics,
            cost=self._cost,
            waits=tuple(ending.waits),
            cycle=tuple(ending.cycle),
        )

    def _doubts(self, notes: Notes) -> Iterator[str]:
        """Why the run cannot be called safe, although nothing is violated."""
        shadow, statistics = self._shadow, self._statistics
        if not self._machine:
            yield "no record describes the machine"
        if shadow.finished is None:
            yield "the records have no end"
        elif not shadow.finished:
            yield "the machine did not come to its own end" + (f": {shadow.why_ended}" if shadow.why_ended else "")
        if notes.incomplete or self._strange:
            yield "records are missing or unreadable"
        yield from statistics.broken
        refused = statistics.updates.all_refused and not statistics.seamldr_calls
        if self._exposures.lost_vmcs == 0 and not refused:
            yield _no_exposure(shadow, statistics)


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
