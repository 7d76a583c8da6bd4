"""Chaos plans: what is read, what is refused and where, what follows from a seed, what is smaller."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.linkfaults import LinkRule
from kvm.plan import Fault, Plan, PlanError, complaints, parse_plan, random_plan, smaller, write_plan

GOOD = b"""\
cpus = 4
seconds = 1.5
strategy = "clear-current-vmcs"

[knobs]
seamret_launch = "clear"

[[fault]]
at = "holding"
nth = 2
do = "kill"
for_ms = 200

[[fault]]
at = "time"
after_ms = 300
do = "links"
links = [{ source = "cpu*", target = "seamldr", drop = 0.1 }]
"""


def test_a_plan_says_what_its_file_says() -> None:
    """Sizes, knobs and faults come out as written, with defaults for the rest."""
    plan = parse_plan(GOOD)
    assert (plan.cpus, plan.seconds, plan.updates) == (4, 1.5, 2)
    assert plan.parsed_knobs().seamret_launch == "clear"
    kill, links = plan.fault
    assert (kill.at, kill.nth, kill.do, kill.target) == ("holding", 2, "kill", "subject")
    assert kill.brought_back_by == "replug"
    assert links.links == (LinkRule("cpu*", "seamldr", drop=0.1),)


BAD = {
    "syntax": (b"cpus = 4\nseconds = = 2\n", "line 2: Invalid value"),
    "unknown key": (GOOD.replace(b"nth = 2", b"nht = 2"), "line 10: "),
    "wrong type": (GOOD.replace(b"nth = 2", b'nth = "two"'), "line 10: Expected `int`, got `str`"),
    "out of range": (GOOD.replace(b"cpus = 4", b"cpus = 0"), "line 1: Expected `int` >= 1"),
    "missing": (GOOD.replace(b'do = "kill"\n', b""), "line 8: The plan missing required field `do`"),
    "point": (GOOD.replace(b'"holding"', b'"hodling"'), "line 9: no point 'hodling'"),
    "action": (GOOD.replace(b'"kill"', b'"maim"'), "line 11: Invalid enum value 'maim'"),
    "target": (GOOD.replace(b"for_ms = 200", b'target = "cpu9"'), "line 12: no process 'cpu9' in a machine of 4 CPUs"),
    "rule": (GOOD.replace(b"drop = 0.1", b"drop = 1.5"), "line 18: drop 1.5 is not a probability"),
    "rule key": (GOOD.replace(b"drop = 0.1", b"dorp = 0.1"), "line 18: "),
    "subject of a time": (GOOD.replace(b'do = "links"', b'do = "stop"'), "line 14: a fault at a time has no subject"),
    "knob": (GOOD.replace(b'"clear"', b'"maybe"'), "line 5: knob seamret_launch is one of preserve, clear"),
    "strategy": (GOOD.replace(b'"clear-current-vmcs"', b'"hope"'), "line 3: "),
    "not UTF-8": (b"cpus = 4\n\n# \xff\n", "line 3: the plan is not UTF-8"),
    "deep": (b"cpus = " + b"[" * 50_000, ""),
    "huge": (b"#" * 300_000, "a plan has at most 262144 bytes, this one 300000"),
    "service replugged": (
        GOOD.replace(b"for_ms = 200", b'target = "kvm"\nundo = "replug"'),
        "line 13: kvm is restarted, not replugged",
    ),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_a_bad_plan_is_refused_with_its_line(data: bytes, message: str) -> None:
    """Whatever is wrong, it is one error of one line that says where."""
    with pytest.raises(PlanError) as caught:
        parse_plan(data)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=300))
def test_noise_is_no_plan_or_an_empty_one(noise: bytes) -> None:
    """Any bytes give a plan or a `PlanError`, nothing else."""
    with contextlib.suppress(PlanError):
        assert isinstance(parse_plan(noise), Plan)


@given(st.integers(0, 10_000), st.integers(2, 64))
def test_a_random_plan_follows_from_its_seed_and_survives_its_file(seed: int, cpus: int) -> None:
    """The same seed gives the same plan; it is valid, and TOML keeps it exactly."""
    plan = random_plan(seed, cpus=cpus)
    assert plan == random_plan(seed, cpus=cpus)
    assert plan.fault and not any(complaints(fault, cpus) for fault in plan.fault)
    assert parse_plan(write_plan(plan).encode()) == plan


def test_random_plans_use_every_kind_of_fault() -> None:
    """500 rounds have kills, stops, slow-downs, hotplug, link faults; at times and at points; with resets."""
    faults = [fault for seed in range(500) for fault in random_plan(seed).fault]
    assert {fault.do for fault in faults} == {"kill", "stop", "slow", "offline", "links"}
    assert {"time", "resident", "mid-install", "in-guest", "in-td", "holding"} <= {fault.at for fault in faults}
    assert {"subject", "seamldr", "kvm"} <= {fault.target for fault in faults}
    assert {"replug", "restart", "reset"} <= {fault.brought_back_by for fault in faults}


def test_smaller_plans_are_smaller_and_valid() -> None:
    """Each step takes one thing away; what needs a CPU of a high number keeps that CPU."""
    plan = Plan(cpus=8, tds=1, updates=3, fault=(Fault("holding", "kill", cpu=6), Fault("time", "stop", "cpu2")))
    steps = smaller(plan)
    assert [len(step.fault) for step in steps[:2]] == [1, 1]
    assert [step.cpus for step in steps if step.cpus < 8] == [7]
    assert all(step != plan and not any(complaints(fault, step.cpus) for fault in step.fault) for step in steps)
    assert smaller(msgspec.structs.replace(plan, cpus=2, tds=0, updates=1, fault=())) == []
