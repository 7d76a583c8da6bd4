"""The command that shows a run again, and where it is printed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

import launcher
from bus.judge import judge_records
from kvm.again import PLAN, command
from kvm.chaos import chaos_topology, plan_of
from kvm.compose import Knobs
from kvm.plan import Fault, parse_plan, write_plan
from kvm.summary import summarize
from kvm.topology import Topology


def machine(**fields: Any) -> dict[str, Any]:
    """What `machine_begin` tells of the usual machine, and what is unusual."""
    usual = {"strategy": "none", "seed": 1, "cpus": 4, "vcpus": 8, "tds": 0, "updates": 2}
    knobs = msgspec.structs.asdict(Knobs()) | fields.pop("knobs", {})
    return usual | {"knobs": knobs} | fields


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "seamlab run --strategy none --seed 1"),
        ({"cpus": 8, "vcpus": 16}, "seamlab run --strategy none --seed 1 --cpus 8"),
        ({"vcpus": 3, "tds": 1}, "seamlab run --strategy none --seed 1 --vcpus 3 --tds 1"),
        ({"updates": 0}, "seamlab run --strategy none --seed 1 --updates 0"),
        ({"knobs": {"seamret_launch": "clear"}}, "seamlab run --strategy none --seed 1 --knob seamret_launch=clear"),
        ({"strategy": "my idea.py:f", "seed": 7}, "seamlab run --strategy 'my idea.py:f' --seed 7"),
    ],
)
def test_the_command_says_what_is_not_the_default(fields: dict[str, Any], line: str, tmp_path: Path) -> None:
    """Strategy and seed always, the rest only where it differs from what `seamlab run` does anyway."""
    assert command(machine(**fields), tmp_path) == line


@pytest.mark.parametrize("fields", [{}, {"cpus": 2, "vcpus": 5, "tds": 1, "updates": 0, "knobs": {"lease_ms": 5}}])
def test_the_command_line_understands_it(fields: dict[str, Any], tmp_path: Path) -> None:
    """The command makes a machine of the same description."""
    wanted = machine(**fields)
    arguments = launcher._parser().parse_args(command(wanted, tmp_path).split()[1:])
    topology = launcher._topology(arguments, arguments.strategy)
    made = msgspec.structs.asdict(topology)
    assert {name: made[name] for name in wanted if name != "knobs"} == {k: v for k, v in wanted.items() if k != "knobs"}
    assert msgspec.structs.asdict(topology.knobs) == wanted["knobs"]


def test_a_machine_with_faults_is_made_again_from_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan in the run directory describes machine and faults; below the working directory its path is short."""
    topology = Topology(cpus=3, vcpus=4, seed=9, knobs=Knobs(lock_policy="hang"), run_dir=str(tmp_path))
    faults = (Fault(at="before-acquire", do="kill"),)
    (tmp_path / PLAN).write_text(write_plan(plan_of(topology, faults)))
    plan = parse_plan((tmp_path / PLAN).read_bytes())
    assert chaos_topology(plan, tmp_path) == topology and plan.fault == faults
    assert command(machine(), tmp_path) == f"seamlab chaos {tmp_path}/plan.toml"
    monkeypatch.chdir(tmp_path.parent)
    assert command(machine(), tmp_path) == f"seamlab chaos {tmp_path.name}/plan.toml"


def test_a_run_that_describes_no_machine_has_no_command(tmp_path: Path) -> None:
    """Without `machine_begin` nothing can be said."""
    assert command({}, tmp_path) == ""


def summary(tmp_path: Path) -> dict[str, Any]:
    """The summary of a run in which a strategy broke its contract at a place with brackets in its name."""
    begin = {"ts": 1, "clock": 1, "node": "launcher", "pid": 1, "seq": 1, "event": "machine_begin", **machine()}
    error = {"ts": 2, "clock": 2, "node": "cpu0", "pid": 2, "seq": 1, "event": "strategy_error", "ctx": "vcpu0"}
    return summarize(judge_records([begin, error | {"error": "raised [bold] E", "where": "a[1].py:3"}]), tmp_path)


def test_every_story_ends_with_the_command(tmp_path: Path) -> None:
    """The text of a story can be pasted as it is."""
    (violation,) = summary(tmp_path)["violations"]
    assert violation["first"]["text"][-1] == "again: seamlab run --strategy none --seed 1"


def test_a_comparison_prints_brackets_as_they_are(tmp_path: Path) -> None:
    """What is in square brackets is text, not markup."""
    found = summary(tmp_path)
    found["why"], found["assumptions"] = ["process cpu0 [idle] has no end"], ["It is [red]so[/red]."]
    out = io.StringIO()
    launcher._print_comparison(Console(file=out, width=100), {"a[b]": found})
    words = out.getvalue()
    assert "raised [bold] E at a[1].py:3" in words and "Assumed: It is [red]so[/red]." in words
    assert words.count("a[b]") == 3 and "why a[b] is unsafe" in words
    assert "a[b]: process cpu0 [idle] has no end" in words
