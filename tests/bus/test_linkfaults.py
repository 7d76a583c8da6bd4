"""Link faults as a pure core: which frames they strike, how, and that a seed says it all."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus.linkfaults import BUFFER_NS, HOLD_NS, LinkFaults, LinkRule

FRAME = 100
MS = 1_000_000


def faults(*rules: LinkRule, source: str = "cpu0", seed: int = 1) -> LinkFaults:
    """The core of one process with these rules."""
    core = LinkFaults(source)
    core.set(rules, seed)
    return core


def fates(core: LinkFaults, count: int, target: str = "cpu1", now: int = 0) -> list[list[int]]:
    """What becomes of the next frames."""
    return [core.decide(target, FRAME, now) for _ in range(count)]


def test_without_a_rule_nothing_happens() -> None:
    """A frame is transmitted at once, once, and not counted."""
    core = faults()
    assert fates(core, 10, now=7) == [[7]] * 10
    assert (core.dropped, core.duplicated, core.delayed) == (0, 0, 0)


@pytest.mark.parametrize(
    ("source", "target", "strikes"),
    [
        ("*", "*", {"cpu1", "cpu12", "kvm", "seamldr"}),
        ("cpu0", "*", {"cpu1", "cpu12", "kvm", "seamldr"}),
        ("cpu0", "cpu1", {"cpu1"}),
        ("cpu0", "cpu1*", {"cpu1", "cpu12"}),
        ("cpu*", "cpu*", {"cpu1", "cpu12"}),
        ("*", "kvm", {"kvm"}),
        ("cpu1", "*", set()),
        ("kvm", "cpu*", set()),
        ("*", "cpu0", set()),
        ("*", "launcher", set()),
    ],
)
def test_a_rule_strikes_the_links_that_it_names(source: str, target: str, strikes: set[str]) -> None:
    """A name, a beginning with a star, a star; never the launcher's links, never a node's own."""
    core = faults(LinkRule(source, target, drop=1.0))
    nodes = ("launcher", "kvm", "seamldr", "cpu0", "cpu1", "cpu12")
    assert {node for node in nodes if not core.decide(node, FRAME, 0)} == strikes
    assert fates(faults(LinkRule(drop=1.0), source="launcher"), 3) == [[0]] * 3


def test_a_seed_decides_everything() -> None:
    """The same seed, link and frame number: the same fate. Another seed or link: another one."""
    rule = LinkRule(drop=0.3, duplicate=0.3, reorder=0.3, jitter_ns=MS)
    first = fates(faults(rule), 200)
    assert fates(faults(rule), 200) == first
    assert fates(faults(rule, seed=2), 200) != first
    assert fates(faults(rule), 200, target="cpu2") != first
    assert fates(faults(rule, source="cpu3"), 200) != first
    mixed = faults(rule)
    assert [(mixed.decide("kvm", FRAME, 0), mixed.decide("cpu1", FRAME, 0))[1] for _ in range(200)] == first


def test_the_fate_of_a_frame_does_not_depend_on_that_of_others() -> None:
    """With a higher probability those that were dropped still are, and only more."""
    few = [not times for times in fates(faults(LinkRule(drop=0.2, duplicate=0.5)), 500)]
    many = [not times for times in fates(faults(LinkRule(drop=0.4, reorder=0.1)), 500)]
    assert all(more for less, more in zip(few, many, strict=True) if less)
    assert sum(few) < sum(many)


def test_probabilities_are_what_they_say() -> None:
    """Of 20,000 frames a tenth is dropped, a tenth doubled, a tenth held back, within a tenth of that; all counted."""
    core = faults(LinkRule(drop=0.1, duplicate=0.1, reorder=0.1))
    kinds = Counter((len(times), max(times, default=0)) for times in fates(core, 20_000))
    assert set(kinds) == {(0, 0), (1, 0), (1, HOLD_NS), (2, 0), (2, HOLD_NS)}
    dropped, doubled = kinds[0, 0], kinds[2, 0] + kinds[2, HOLD_NS]
    held = kinds[1, HOLD_NS] + kinds[2, HOLD_NS]
    assert (core.dropped, core.duplicated, core.delayed) == (dropped, doubled, held)
    for count, expected in ((dropped, 2000), (doubled, 1800), (held, 1800)):
        assert abs(count - expected) < expected / 10


def test_delay_and_jitter() -> None:
    """Every copy comes delay to delay + jitter later, the two copies of a frame at times of their own."""
    core = faults(LinkRule(duplicate=1.0, delay_ns=2 * MS, jitter_ns=MS))
    times = fates(core, 300, now=5 * MS)
    assert {len(copies) for copies in times} == {2}
    assert all(first != second for first, second in times)
    late = [time for copies in times for time in copies]
    assert 7 * MS <= min(late) < 7.1 * MS and 7.9 * MS < max(late) < 8 * MS
    assert core.delayed == 300


def test_bandwidth_spaces_frames_and_its_buffer_is_bounded() -> None:
    """At 1000 bytes a second a frame of 100 takes 100 ms; what would wait for more than a second is dropped."""
    core = faults(LinkRule(bandwidth=1000))
    times = fates(core, 20)
    assert times[:12] == [[100 * MS * (n + 1)] for n in range(11)] + [[]]
    assert core.dropped == 9 and BUFFER_NS == 1000 * MS
    assert core.decide("cpu2", FRAME, 0) == [100 * MS]
    assert core.decide("cpu1", FRAME, 5000 * MS) == [5100 * MS]


def test_partitions() -> None:
    """One way: only in the direction of the rule. Two ways: also back, whichever end it is looked at from."""
    one, two = LinkRule("cpu*", "kvm", partition="one-way"), LinkRule("cpu*", "kvm", partition="two-way")
    assert faults(one).decide("kvm", FRAME, 0) == faults(two).decide("kvm", FRAME, 0) == []
    assert faults(one, source="kvm").decide("cpu0", FRAME, 0) == [0]
    assert faults(two, source="kvm").decide("cpu0", FRAME, 0) == []
    assert faults(two).decide("cpu1", FRAME, 0) == [0]


def test_all_rules_that_apply_act() -> None:
    """Delays add up, and a partition is none the less one."""
    delay = LinkRule(delay_ns=MS)
    assert faults(delay, LinkRule("*", "kvm", partition="one-way"), delay).decide("cpu1", FRAME, 0) == [2 * MS]
    assert faults(delay, LinkRule("*", "kvm", partition="one-way"), delay).decide("kvm", FRAME, 0) == []
    assert faults(LinkRule(duplicate=1.0), LinkRule(duplicate=1.0)).decide("kvm", FRAME, 0) == [0] * 4


def test_setting_rules_begins_anew() -> None:
    """Old rules are gone, the same rules draw the same again, the counts go on."""
    core = faults(LinkRule(drop=0.5))
    first = fates(core, 50)
    core.set([LinkRule(drop=0.5)], 1)
    assert fates(core, 50) == first
    dropped = core.dropped
    core.set([], 1)
    assert fates(core, 5) == [[0]] * 5
    assert core.dropped == dropped == 2 * first.count([])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"drop": 1.01}, "drop 1.01 is not a probability"),
    ({"duplicate": -0.1}, "duplicate -0.1 is not"),
    ({"reorder": float("nan")}, "reorder nan is not"),
    ({"delay_ns": -1}, "delay_ns -1 is negative"),
    ({"jitter_ns": 1 << 63}, "too large"),
    ({"bandwidth": -5}, "bandwidth -5 is negative"),
    ({"source": ""}, "source '' is neither"),
    ({"target": "*pu"}, r"target '\*pu' is neither"),
    ({"target": "x" * 65}, "is neither"),
    ({"partition": "both"}, "partition 'both' is neither"),
]


@pytest.mark.parametrize(("fields", "why"), WRONG, ids=lambda value: str(value)[:30])
def test_a_rule_out_of_range_is_refused(fields: dict[str, Any], why: str) -> None:
    """Made in Python or read from a file, the error names the field."""
    with pytest.raises(ValueError, match=why):
        LinkRule(**fields)
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(fields, LinkRule)


def test_the_example_of_the_docs_is_one() -> None:
    """The rules shown in docs/bus.md are rules."""
    page = Path(__file__).resolve().parents[2] / "docs" / "bus.md"
    (example,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(example, found)
    assert [type(rule) for rule in found["rules"]] == [LinkRule] * 3


def test_rules_are_few() -> None:
    """More than 256 are an error, and the old ones stay."""
    core = faults(LinkRule(drop=1.0))
    with pytest.raises(ValueError, match="257 link rules are more than 256"):
        core.set([LinkRule()] * 257, 1)
    assert core.decide("cpu1", FRAME, 0) == []
