"""The page: everything is in it, and nothing in it can break out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from history import Run
from synthetic import Synthetic

from bus.html import Page, unpack
from bus.invariants import INVARIANTS
from bus.judge import judge_records
from bus.picture import Painter
from bus.records import Record

A = 0x8003000
EVIL = "</script><script>alert(1)</script>"


def summary_of(records: list[Record]) -> dict[str, Any]:
    """The summary of records, as `analyze` hands it on."""
    return judge_records(records).as_dict() | {"run_dir": str(Path("run"))}


def page_of(records: list[Record]) -> str:
    """The page of records in causal order."""
    painter, page = Painter(), Page()
    for record in records:
        painter.see(record)
        page.see(record)
    return page.render(summary_of(records), painter.finish())


def broken_run() -> list[Record]:
    """A run that violates I2 and I3."""
    run = Run().cpu(0).load(A).enter(A).cpu(0, "reader").call_none(A).cpu(0).vcpu_load(A, skipped=True)
    return run.vmread("invalid").finish().records


def test_the_page_needs_no_network() -> None:
    """No element names anything outside the page, and its policy forbids to load anything."""
    page = page_of(broken_run())
    assert not re.search(r"""\b(src|href)\s*=|@import|url\(|\bimport\s*\(|XMLHttpRequest|\bfetch\(""", page)
    assert "default-src 'none'" in page
    assert not re.findall(r"\{\{\w+\}\}", page)


def test_every_invariant_has_its_verdict() -> None:
    """The table names each invariant once, the broken ones first, with how often."""
    page = page_of(broken_run())
    rows = re.findall(r'<tr class="(held|broken)"><td>(I\d+)</td>', page)
    assert sorted(id for _, id in rows) == sorted(INVARIANTS)
    broken = [id for word, id in rows if word == "broken"]
    assert "I3" in broken and [id for _, id in rows[: len(broken)]] == broken


def test_a_violation_is_told_with_its_ladder_and_its_events() -> None:
    """Each violation has its text, and its events are on the lanes at their times."""
    records = broken_run()
    page, summary = page_of(records), summary_of(records)
    assert len(re.findall('data-story="', page)) == len(summary["violations"])
    assert "with no current VMCS" in page
    data = unpack(page)
    number = [violation["invariant"] for violation in summary["violations"]].index("I3")
    at = {record["event"]: (record["ts"] - records[0]["ts"]) // 1000 for record in records}
    told = [(data["lanes"][row]["node"], time) for row, time, story in data["told"] if story == number]
    assert ("cpu0", at["vmread"]) in told and ("cpu0", at["seamcall_return"]) in told


def test_columns_hold_every_record_and_interval() -> None:
    """Lanes hold the records with their times, clocks and texts, and intervals that follow each other."""
    records = list(Synthetic(3).records(500))
    data = unpack(page_of(records))
    strings = data["strings"]
    assert sum(len(lane["ts"]) for lane in data["lanes"]) == len(records)
    (lane,) = [lane for lane in data["lanes"] if lane["node"] == "cpu1"]
    own = [record for record in records if record["node"] == "cpu1"]
    assert sums(lane["clock"]) == [record["clock"] for record in own]
    assert sums(lane["ts"]) == [(record["ts"] - records[0]["ts"]) // 1000 for record in own]
    assert strings[lane["text"][0]] == "up cpu_online"
    begins = sums(lane["begin"])
    assert [b + n for b, n in zip(begins, lane["length"], strict=True)][:-1] == begins[1:]
    assert len(data["arrows"]["sent"]) == len({record["id"] for record in records if "id" in record}) + len(
        [record for record in records if record["event"] == "lock_hold"]
    )


def sums(steps: list[int]) -> list[int]:
    """From differences to numbers."""
    return [sum(steps[: i + 1]) for i in range(len(steps))]


def test_what_a_strategy_says_cannot_break_out() -> None:
    """Texts of records and names of strategies are text on the page, whatever they contain."""
    run = Run().cpu(0).write("strategy_error", error=EVIL, where=EVIL).finish()
    run.records[0]["strategy"] = EVIL
    page = page_of(run.records)
    assert EVIL not in page and page.count("</script>") == 2
    assert any(EVIL in string for string in unpack(page)["strings"])


def test_the_same_records_make_the_same_page() -> None:
    """A page is a function of the records."""
    assert page_of(broken_run()) == page_of(broken_run())


def test_an_empty_history_has_a_page_too() -> None:
    """Without records there are no lanes and no length of time to divide by."""
    data = unpack(page_of([]))
    assert data["lanes"] == [] and data["end"] == 1
