"""Every case of every hazard comes out as its table says, and the table, the command and the page agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvm.hazard import Case, Hazard
from kvm.hazard_table import HAZARDS
from kvm.hazards import find, main

ROOT = Path(__file__).parents[2]
CASES = [
    pytest.param(
        hazard,
        case,
        id=f"{hazard.id}-{case.label}".replace(" ", "-"),
        marks=pytest.mark.conformance("Hazards", hazard.id),
    )
    for hazard in HAZARDS
    for case in hazard.cases
]


@pytest.mark.parametrize(("hazard", "case"), CASES)
def test_a_hazard_shows_its_observable(hazard: Hazard, case: Case) -> None:
    """Played this way the hazard bites, or is held off, as the table says."""
    shown = case.play()
    assert shown.bites == case.bites, dict(shown.seen)
    assert shown.seen


def test_the_table_is_complete() -> None:
    """H0 to H35 are there, each with a slug of its own, and all but three with a case that bites and one that does not.
    """
    numbers = {int(hazard.id.strip("Hb")) for hazard in HAZARDS}
    assert numbers == set(range(36))
    assert len({hazard.slug for hazard in HAZARDS}) == len({hazard.id for hazard in HAZARDS}) == len(HAZARDS)
    one_sided = {hazard.id for hazard in HAZARDS if len({case.bites for case in hazard.cases}) == 1}
    assert one_sided == {"H2b", "H20", "H22"}


def test_hazards_are_found_by_id_and_by_slug() -> None:
    """Both name a hazard; a word that names none is the error."""
    assert [hazard.id for hazard in find(["H14b", "same-vcpu-next"])] == ["H14b", "H0"]
    assert find([]) == list(HAZARDS)
    with pytest.raises(KeyError, match="H99"):
        find(["H99"])


def test_the_command_plays_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the history, each case, and what was seen, and succeeds if all is as expected."""
    assert main(["H32"]) == 0
    printed = capsys.readouterr().out
    assert "H32 nmis-merge\n" in printed
    assert "  three: bites\n      delivered: 1\n" in printed
    assert "  one: held\n" in printed
    command = [sys.executable, "-m", "kvm.hazards", "H99"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no hazard 'H99'; there are H0, H0b, H1,")
    assert done.stderr.count("\n") == 1


def test_the_command_fails_if_a_case_is_not_as_expected(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outcome that the table does not expect is said, and is exit status 1."""
    monkeypatch.setattr("kvm.hazards_vmcs.Stepped.count", lambda *_, **__: 0)
    monkeypatch.setattr("kvm.hazards_vmcs.failed", lambda *_: [])
    assert main(["H0"]) == 1
    assert "none: held, which was NOT EXPECTED" in capsys.readouterr().out
