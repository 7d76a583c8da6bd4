"""Link faults of a live machine: ordered by the launcher, obeyed by every process, judged from the records."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from live import Remains, records, small

from bus.linkfaults import LinkRule
from kvm.link_faults import check_rules
from kvm.machine import Machine

NODES = ("seamldr", "kvm", "cpu0", "cpu1")


async def test_a_machine_whose_bus_drops_and_repeats_is_safe(tmp_path: Path) -> None:
    """A tenth of all frames lost, a tenth sent twice, some late: the update succeeds, every IPI arrives once."""
    remains = Remains()
    rule = LinkRule(drop=0.1, duplicate=0.1, reorder=0.05, jitter_ns=100_000)
    async with Machine(small(tmp_path)) as machine:
        await machine.set_link_faults([rule])
        assert await machine.run_workload()
    remains.nothing_of(machine)
    judgement = machine.check()
    assert (judgement.verdict, judgement.why) == ("safe", ())
    assert judgement.statistics.updates.succeeded == 1
    assert [note for note in judgement.notes if note.startswith("link faults dropped")]
    faults = records(machine.run_dir, "link_fault", rules=[
        {"drop": 0.1, "duplicate": 0.1, "reorder": 0.05, "jitter_ns": 100_000}
    ])  # fmt: skip
    assert {record["node"] for record in faults} == set(NODES)
    totals = [process.totals or {} for process in machine.processes.values()]
    assert min(sum(total[name] for total in totals) for name in ("dropped", "duplicated", "delayed", "resent")) > 0


async def test_a_partition_is_waited_out(tmp_path: Path) -> None:
    """CPU 1 and the lock service do not reach each other: nobody is dead, and when they do, the work goes on."""
    waits = trio.Event()

    def look(facts: dict[str, int]) -> None:
        if records(machine.run_dir, "lock_request", node="cpu1"):
            waits.set()

    async with Machine(small(tmp_path)) as machine:
        machine.on_progress = look
        await machine.set_link_faults([LinkRule("cpu1", "seamldr", partition="two-way")])
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(machine.run_workload)
                await waits.wait()
                assert not records(machine.run_dir, "lock_queue", by=1)
                await machine.set_link_faults([])
    judgement = machine.check()
    assert (judgement.verdict, judgement.why) == ("safe", ())
    assert records(machine.run_dir, "lock_queue", by=1)
    assert not records(machine.run_dir, "process_exit", wanted=0)


async def test_a_process_that_starts_later_gets_the_rules_in_force(tmp_path: Path) -> None:
    """The fresh process of a replugged CPU drops frames like the others."""
    async with Machine(small(tmp_path)) as machine:
        await machine.set_link_faults([LinkRule(duplicate=0.5)])
        await machine.kill(1)
        await machine.replug(1)
        await machine.set_link_faults([])
        await machine.run_workload()
    orders = [record["rules"] for record in records(machine.run_dir, "link_fault", node="cpu1")]
    assert orders == [[{"duplicate": 0.5}], [{"duplicate": 0.5}], []]


@pytest.mark.parametrize(
    "rule", [LinkRule("cpu2"), LinkRule("launcher"), LinkRule("*", "launcher"), LinkRule("kvm", "kvm")]
)
def test_a_rule_that_can_do_nothing_is_refused(rule: LinkRule) -> None:
    """A node that the machine does not have, a control link, a node and itself: the error names the rule."""
    check_rules([LinkRule("cpu*", "kvm"), LinkRule("cpu1", "cpu*")], NODES)
    with pytest.raises(ValueError, match="link rule 2 applies to no link"):
        check_rules([LinkRule(), rule], NODES)
