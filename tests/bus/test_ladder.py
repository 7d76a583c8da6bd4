"""Stories as ladder diagrams: what is drawn, in which order, and how much of it."""

from __future__ import annotations

from typing import Any

import pytest
from history import INFO, Run

from bus.events import EVENTS, NONE
from bus.ladder import COLUMNS, LINES, MESSAGES, ROWS, ladder
from bus.phrases import PHRASES, outcome, phrase
from bus.story import Story, tell

V = 0x12000


def record(clock: int, node: str, event: str, **fields: Any) -> dict[str, Any]:
    """A record, as far as a story needs it."""
    return {"clock": clock, "node": node, "seq": clock, "event": event, **fields}


def drawn(*records: dict[str, Any]) -> list[str]:
    """The diagram below the sentence."""
    return ladder(tell("why", *(("", one) for one in records)))[1:]


def test_a_message_is_an_arrow_between_two_lifelines() -> None:
    """An arrow points from the sender to the receiver, across others, whichever of the two wrote the record."""
    lines = drawn(
        record(8, "cpu0", "csd_lock", target=2, func="clear", wait=1),
        record(9, "cpu1", "cpu_offline"),
        record(10, "cpu2", "csd_run", source=0, func="clear"),
        record(11, "seamldr", "seam_return", by=0, name="INFO"),
    )
    assert lines == [
        "    cpu0 cpu1 cpu2 seamldr",
        " 8   o-------->|      |  waits for CPU 2: clear()",
        " 9   |    *    |      |  offline",
        "10   o-------->|      |  clear() runs",
        "11   |<---------------X  INFO leaves SEAM",
    ]


def test_a_message_to_itself_is_none() -> None:
    """A cross-call to the own CPU is an event, not an arrow."""
    assert drawn(record(8, "cpu0", "csd_lock", target=0, func="clear", wait=0)) == [
        "   cpu0",
        "8   X  asks CPU 0: clear()",
    ]


def test_a_death_is_told_on_the_lifeline_of_the_dead() -> None:
    """What the launcher writes about a process happens to that process."""
    lines = drawn(record(8, "launcher", "process_exit", name="cpu3", status=-9, wanted=False))
    assert lines == ["   cpu3", "8   X  cpu3 ends, status -9, unasked"]


@pytest.mark.parametrize("count", [ROWS - 1, ROWS, ROWS + 1, 40])
def test_a_story_fits_a_mail(count: int) -> None:
    """At most 13 lines of 72 columns, whatever the records hold; first cause and effect are always among them."""
    records = [record(n, f"cpu{n % 50}", "warn", ctx="irq", text=f"{n}." + "x" * 300) for n in range(1, count + 1)]
    lines = ladder(tell("y" * 30 + " " + "z" * 200, *(("", one) for one in records)))
    assert len(lines) <= LINES and max(map(len, lines)) <= COLUMNS
    assert "X" in lines[-1] and lines[-1].split()[0] == str(count)


def test_the_middle_of_a_long_story_is_left_out() -> None:
    """Beginning and end stay, and a mark says where events are missing."""
    records = [record(100 + n, "cpu0", "warn", text=str(n)) for n in range(20)]
    lines = drawn(*records)[1:]
    told = [line.split()[-1] for line in lines]
    assert told == ["0", "1", "2", "3", "4", "...", "16", "17", "18", "19"]


def test_many_cpus_make_room_for_the_words() -> None:
    """Where lifelines would take all columns, messages go first, then the earliest events; the effect stays."""
    records = [record(n, f"cpu{1000 + n}", "csd_lock", target=n, func="clear", wait=1) for n in range(1, 9)]
    lines = drawn(*records)
    assert "cpu1008" in lines[0] and "waits for CPU 8" in lines[-1] and "cpu1001" not in lines[0]
    assert max(map(len, lines)) <= COLUMNS


def test_a_story_without_records_is_its_sentence() -> None:
    """Nothing is drawn for a story that has no events."""
    assert ladder(Story("why", (), ())) == ["why"]


TEXTS = dict.fromkeys(("expected", "insn", "mrtd", "path", "reason", "result", "state", "text", "via", "what"), "text")


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_can_be_told(event: str) -> None:
    """Each event of the table has words for its fields; a record that lacks them is told by the name of its event."""
    fields = {field: TEXTS.get(field, 1) for field in EVENTS[event].fields}
    told = phrase({"node": "cpu0", "event": event, **fields})
    assert told and (told != event or not fields)
    assert phrase({"node": "cpu0", "event": event}).startswith(event) or event in WORDLESS


WORDLESS = ("cpu_online", "cpu_offline", "nmi_enter", "csd_done", "service_restart")
"""Events whose words need no field."""


def test_the_tables_know_only_events() -> None:
    """Words and arrows are for events that there are."""
    assert MESSAGES.keys() | PHRASES.keys() <= EVENTS.keys()


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("ok", ""),
        ("invalid", "VMfailInvalid"),
        ("valid:12", "VMfailValid(12), unsupported field"),
        ("valid:28", "VMfailValid(28)"),
        ("fault:6", "#UD"),
    ],
)
def test_results_are_told_as_the_sdm_does(result: str, words: str) -> None:
    """CF is VMfailInvalid, ZF is VMfailValid with its number, an exception is told by its mnemonic."""
    assert outcome(result) == words


def test_the_skipped_vmptrld_is_told_step_by_step() -> None:
    """The bug of `none`: loaded, taken, not repaired, believed, failed; an older loss is no part of it."""
    run = Run().cpu(0).load(V).put(V).cpu(0, "reader").begin(V).seamcall(INFO, lost=V).cv(NONE).end(NONE)
    run.cpu(0).load(V).put(V).cpu(0, "reader").call_none(V).cpu(0).vcpu_load(V, skipped=True).vmread("invalid")
    assert [line.split("  ")[-1].removeprefix(" ") for line in run.rungs("I3")] == [
        "VMPTRLD 0x12000",
        "leaf0: SEAMRET takes 0x12000",
        "call over, current_vmcs still names it",
        "load: current_vmcs names it, no VMPTRLD",
        "VMREAD EXIT_REASON: VMfailInvalid",
    ]


def test_a_call_under_a_loaded_vcpu_is_told_without_a_load() -> None:
    """Where nothing was loaded between the loss and the failure, no load is part of the story."""
    run = Run().cpu(0).load(V).cpu(0, "irq").begin(V).seamcall(INFO, lost=V).cv(NONE).end(NONE).cpu(0)
    run.vmread("invalid")
    assert [line.split("  ")[-1].removeprefix(" ") for line in run.rungs("I3")] == [
        "VMPTRLD 0x12000",
        "leaf0: SEAMRET takes 0x12000",
        "VMREAD EXIT_REASON: VMfailInvalid",
    ]
