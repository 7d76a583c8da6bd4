"""The records of live machines against the event table, with every instruction traced and with faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from live import small

from bus.linkfaults import LinkRule
from bus.merge import Notes, merge_run
from bus.records import Record, complaint
from kvm.chaos import run_chaos
from kvm.machine import Machine
from kvm.plan import Fault

KILL = Fault(at="holding", do="kill")
BAD_LINKS = Fault(at="time", do="links", links=(LinkRule(drop=0.05, duplicate=0.05),), for_ms=200)
STOP = Fault(at="time", after_ms=100, do="stop", target="kvm", for_ms=50)


def checked(run_dir: Path) -> Iterator[Record]:
    """Every record of a run; each is as the table says, and no line is missing or unreadable."""
    notes = Notes()
    for record in merge_run(run_dir, notes):
        assert complaint(record) is None
        yield record
    assert not notes.incomplete and not notes.duplicates


async def test_a_traced_run_with_faults_is_as_the_event_table_says(tmp_path: Path) -> None:
    """A CPU dies with the lock, one is stopped, frames are lost, all is traced: every record has exactly its fields."""
    machine = Machine(small(tmp_path, trace=True, tds=1))
    await run_chaos(machine, (KILL, BAD_LINKS, STOP))
    seen = Counter(record["event"] for record in checked(machine.run_dir))
    assert len(seen) > 45
    assert min(seen[name] for name in ("vmread", "vmwrite", "fault", "link_fault", "lock_withdraw")) > 0
    assert [one for one in ("killed", "stopped") if not machine.check().as_dict()["processes"][one]] == []


async def test_lamport_time_orders_what_messages_order(tmp_path: Path) -> None:
    """No message arrives before it was sent, no lock is held before it was granted, in the merged history of a run."""
    machine = Machine(small(tmp_path))
    async with machine:
        assert await machine.run_workload()
    sent: set[tuple[str, object]] = set()
    granted: set[tuple[int, int]] = set()
    for record in checked(machine.run_dir):
        match record["event"]:
            case "csd_lock":
                sent.add((record["node"], record["call"]))
            case "csd_run":
                assert (f"cpu{record['source']}", record["call"]) in sent
            case "lock_grant":
                granted.add((record["epoch"], record["number"]))
            case "lock_hold":
                assert (record["epoch"], record["number"]) in granted
    assert granted
