"""The log for ShiViz keeps the rules that ShiViz checks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from history import Run
from synthetic import Synthetic

import bus.shiviz
from bus.records import Record
from bus.shiviz import Log

A = 0x1000
HELD: dict[str, Any] = {"violations": []}


def log_of(records: list[Record], summary: dict[str, Any]) -> tuple[Log, list[str]]:
    """The log and its lines."""
    log = Log(summary)
    for record in records:
        log.see(record)
    return log, list(log.lines())


def events(lines: list[str]) -> list[tuple[str, dict[str, int], str]]:
    """Host, clock and event of each line that the regular expression of the first line takes, as ShiViz does it."""
    pattern = re.compile("^" + lines[0].replace("(?<", "(?P<") + "$", re.MULTILINE)
    found = pattern.finditer("\n".join(lines[2:]))
    return [(match["host"], json.loads(match["clock"]), match["event"]) for match in found]


def check(lines: list[str]) -> None:
    """What ShiViz refuses: a host whose own time does not count from 1 in steps of 1, and an unknown host or time."""
    own: dict[str, list[int]] = {}
    for host, clock, _ in events(lines):
        own.setdefault(host, []).append(clock[host])
    for times in own.values():
        assert times == list(range(1, len(times) + 1))
    for _, clock, _ in events(lines):
        assert all(1 <= time <= len(own[host]) for host, time in clock.items())


def test_a_line_is_an_event() -> None:
    """The first line is the regular expression, the second is empty, and it takes all other lines but the note."""
    run = Run().cpu(0).ipi_send(1, 7).cpu(1).ipi_deliver(0, 7).finish()
    _, lines = log_of(run.records, HELD)
    assert lines[1] == "" and lines[2].startswith("# 4 events, 0 left out")
    assert [(host, clock) for host, clock, _ in events(lines)] == [
        ("launcher", {"launcher": 1}),
        ("cpu0", {"cpu0": 1}),
        ("cpu1", {"cpu0": 1, "cpu1": 1}),
        ("launcher", {"launcher": 2}),
    ]
    assert events(lines)[1][2].startswith("vcpu0 ipi_send target=1 vector=251")


def test_a_log_keeps_the_rules_of_shiviz() -> None:
    """On a long history too, and guests that just run are left out."""
    _, lines = log_of(list(Synthetic(5).records(1500)), HELD)
    check(lines)
    assert len(events(lines)) > 1000 and not any("vcpu_load" in event for _, _, event in events(lines))


def test_without_a_violation_the_beginning_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the cap the rest of the run is left out, counted and said."""
    monkeypatch.setattr(bus.shiviz, "EVENTS", 100)
    records = list(Synthetic(5).records(1500))
    log, lines = log_of(records, HELD)
    check(lines)
    assert len(events(lines)) == 100 and "machine_begin" in events(lines)[0][2]
    assert log.left_out > 900 and f"100 events, {log.left_out} left out" in lines[2]


def test_with_a_violation_what_led_to_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log ends a little after the events of the first story, which are in it even if they are routine."""
    monkeypatch.setattr(bus.shiviz, "EVENTS", 60)
    monkeypatch.setattr(bus.shiviz, "AFTER", 10)
    run = Run()
    for message in range(200):
        run.cpu(0).ipi_send(1, message).cpu(1).ipi_deliver(0, message)
    run.cpu(0).load(A).call_none(A).vcpu_load(A, skipped=True).vmread("invalid")
    for message in range(200, 400):
        run.cpu(0).ipi_send(1, message).cpu(1).ipi_deliver(0, message)
    story = [record for record in run.records if record["event"] in ("vmread", "seamcall_return")]
    story += [record for record in run.records if record["event"] == "vcpu_load" and record["skipped"]]
    _, lines = log_of(run.finish().records, {"violations": [{"first": {"events": story}}]})
    check(lines)
    told = [event.split()[1] for _, _, event in events(lines)]
    assert len(told) == 60 and told.index("vmread") == 50
    assert {"seamcall_return", "vcpu_load"} <= set(told[:50])
