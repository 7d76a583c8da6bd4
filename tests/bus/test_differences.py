"""Two runs compared: what differs, and what is no more than noise."""

from __future__ import annotations

import io
import json
import math
import random
from typing import Any

import msgspec
import pytest
from history import Run
from rich.console import Console

from bus.differences import Differences, Side, compare_samples, differences, effective_size, kolmogorov_smirnov
from bus.queries import SAMPLES
from bus.report_differences import differences_as_dict, print_differences

A = 0x8001000


def summary(run: Run, **changes: Any) -> dict[str, Any]:
    """The summary of a history."""
    return run.judge().as_dict() | changes


def unsafe() -> Run:
    """A call that takes a VMCS away, which is read afterwards."""
    return Run().cpu(0).load(A).call_none(A).vcpu_load(A, skipped=True).vmread("invalid").finish()


def compared(a: dict[str, Any], b: dict[str, Any], **samples: tuple[list[float], list[float]]) -> Differences:
    """The differences of two summaries, and of samples by name."""
    first = {name: pair[0] for name, pair in samples.items()}
    return differences(Side(a, first), Side(b, {name: pair[1] for name, pair in samples.items()}))


def correlated(rng: random.Random, count: int, correlation: float, shift: float = 0.0) -> list[float]:
    """Waits of which each resembles the one before it."""
    value, found = 0.0, []
    for _ in range(count):
        value = correlation * value + rng.gauss(0, 1)
        found.append(math.exp(value + shift))
    return found


def test_a_run_does_not_differ_from_itself() -> None:
    """Nothing differs, whatever the verdict."""
    one = summary(unsafe())
    found = compared(one, one, wait=([1.0] * 50, [1.0] * 50))
    assert found.verdicts == ("unsafe", "unsafe")
    assert found.settings == found.invariants == found.counts == ()
    assert [(d.distance, d.more_than_noise) for d in found.distributions] == [(0.0, False)]


def test_what_differs_is_named_with_both_values() -> None:
    """Verdict, settings with knobs, invariants and counts: what is the same is left out, what one lacks is 0."""
    a, b = summary(unsafe()), summary(Run(seamret_launch="clear").finish(), strategy="sweep-naive", cpus=8)
    found = compared(a, b)
    assert found.verdicts == ("unsafe", "incomplete")
    assert {(c.name, c.a, c.b) for c in found.settings} == {
        ("strategy", "none", "sweep-naive"),
        ("cpus", 2, 8),
        ("seamret_launch", None, "clear"),
    }
    assert ("I3 current-vmcs-needed", 1, 0) in {(c.name, c.a, c.b) for c in found.invariants}
    assert {("exposures.lost_vmcs", 1, 0), ("seamcalls.leaf0", 1, 0)} <= {(c.name, c.a, c.b) for c in found.counts}
    assert any("different size" in note for note in found.notes)
    assert any("A is none, B is sweep-naive" in note for note in found.notes)


def test_runs_of_different_length_are_said_to_be() -> None:
    """Counts of a run that took longer are not to be compared as they are."""
    a, b = summary(unsafe()), summary(unsafe())
    a["seconds"] = b["seconds"] | {"run": 10.0}
    assert any("A ran 10.00 s" in note for note in compared(a, b).notes)
    assert not any("ran" in note for note in compared(b, b).notes)


def test_the_distance_is_that_of_the_textbook() -> None:
    """The largest gap between the two distribution functions, equal values on both sides counted at once."""
    assert kolmogorov_smirnov([1, 2, 3], [4, 5]) == 1.0
    assert kolmogorov_smirnov([1, 1, 1, 1], [1, 1]) == 0.0
    assert kolmogorov_smirnov([1, 2, 3, 4], [2, 2, 4, 4]) == pytest.approx(0.25)
    assert kolmogorov_smirnov([5, 1, 3], [2, 2, 2]) == pytest.approx(2 / 3)


def test_a_shift_is_more_than_noise() -> None:
    """Twice as long waits are found, with their direction; a slight shift of many values is called small."""
    rng = random.Random(1)
    short, long = correlated(rng, 200, 0.0), correlated(rng, 200, 0.0, shift=0.7)
    assert compare_samples("wait", short, long).sentence == "more than noise: B longer"
    assert compare_samples("wait", long, short).sentence == "more than noise: B shorter"
    many = [rng.gauss(100, 10) for _ in range(20_000)]
    found = compare_samples("wait", many, [value + 1 for value in many[::-1]])
    assert found.sentence == "more than noise, but small: B longer"


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_noise_is_seldom_taken_for_more(correlation: float) -> None:
    """Of 200 pairs of samples that come from the same source at most 4 % differ, also where waits resemble the last."""
    rng = random.Random(7)
    pairs = [(correlated(rng, 100, correlation), correlated(rng, 70, correlation)) for _ in range(200)]
    assert sum(compare_samples("wait", a, b).more_than_noise is True for a, b in pairs) <= 8


def test_values_in_a_row_that_resemble_each_other_count_less() -> None:
    """Independent values count in full, a slow drift counts as very few."""
    rng = random.Random(3)
    assert effective_size([rng.random() for _ in range(1000)]) > 900
    assert effective_size([float(number) for number in range(1000)]) < 10
    assert effective_size([5.0] * 100) == 100


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        ([], [1.0], "nothing to compare"),
        ([1.0, 2.0], [8.0, 9.0], "too few values to tell"),
        ([1.0] * 4, [9.0] * 4, "too few values to tell"),
        ([1.0] * 6, [9.0] * 6, "more than noise: B longer"),
    ],
)
def test_too_few_values_are_not_judged(a: list[float], b: list[float], sentence: str) -> None:
    """Where even samples that do not overlap could be chance, nothing is claimed."""
    assert compare_samples("update duration", a, b).sentence == sentence


def test_report_and_json_say_what_is_compared_and_how_many() -> None:
    """The printed tables and the JSON have the verdicts, the sizes of the samples, and a sentence for each."""
    samples = {name: ([1.0] * 10, [5.0] * 12) for name in SAMPLES}
    found = compared(summary(unsafe()), summary(Run().finish()), **samples)
    out = io.StringIO()
    print_differences(Console(file=out, width=120), found, ("/runs/a", "/runs/b"))
    text = out.getvalue()
    for words in ("A is unsafe: /runs/a", "B is incomplete: /runs/b", "I3 current-vmcs-needed", "10 / 12"):
        assert words in text
    assert "P-SEAMLDR residence: from the entry of P-SEAMLDR until SEAMRET" in text and "B longer" in text
    answer = json.loads(msgspec.json.encode(differences_as_dict(found, ("/runs/a", "/runs/b"))))
    assert answer["schema"] == 1 and answer["runs"] == ["/runs/a", "/runs/b"]
    assert answer["verdicts"] == ["unsafe", "incomplete"]
    assert [one["counts"] for one in answer["distributions"]] == [[10, 12]] * len(SAMPLES)
    assert all(one["measures"] and one["sentence"] for one in answer["distributions"])
