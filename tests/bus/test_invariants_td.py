"""The invariant about TDs that are built, with a history that keeps it and ones that break it."""

from __future__ import annotations

import pytest
from history import Run

RIGHT, WRONG = "ab" * 48, "cd" * 48


def test_a_td_that_is_measured_as_it_was_built_keeps_i61() -> None:
    """The module and the owner agree."""
    assert Run().node("kvm").write("td_measured", td=2, mrtd=RIGHT, expected=RIGHT).finish().violated() == set()


@pytest.mark.parametrize("mrtd", [WRONG, ""])
def test_a_wrong_or_missing_measurement_breaks_i61(mrtd: str) -> None:
    """They do not, and the story names the module that was there."""
    run = Run().cpu(0, "stopper").write("module_init_flag", initialized=1, version="1.5.09")
    run.node("kvm").write("td_measured", td=2, mrtd=mrtd, expected=RIGHT).finish()
    assert run.violated() == {"I61"}
    assert "1.5.09" in run.story("I61") and "TD 2 is measured as" in run.story("I61")
