"""The hazards, and the pieces of history that they are made of, under the names that tests import."""

from __future__ import annotations

from kvm.hazard import (
    IMAGE_AT,
    Shown,
    info,
    initialized,
    install,
    load_only,
    load_run_put,
    prefer,
    step_until,
    until_in_seam,
    violated,
    warnings,
)
from kvm.hazards import find

__all__ = [
    "IMAGE_AT",
    "info",
    "initialized",
    "install",
    "load_only",
    "load_run_put",
    "played",
    "prefer",
    "step_until",
    "until_in_seam",
    "violated",
    "warnings",
]


def played(hazard: str, label: str) -> Shown:
    """What one case of a hazard comes to."""
    return next(case for case in find([hazard])[0].cases if case.label == label).play()
