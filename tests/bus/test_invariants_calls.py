"""Invariants about how SEAMCALLs are made, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

from typing import Any

import pytest
from history import INFO, INSTALL, Run

NO_ENTROPY = 0x8000_0203_0000_0000
SEAMLDR_NO_ENTROPY = 0x8000_0000_0003_0001
SYS_RD = 34


def machine(strategy: str, **knobs: Any) -> Run:
    """A machine with this strategy and these knobs."""
    run = Run(**knobs)
    run.records[0]["strategy"] = strategy
    return run.cpu(0, "kworker")


@pytest.mark.parametrize(
    ("strategy", "knobs", "leaf", "broken"),
    [
        ("refuse-on-erratum", {}, INFO, {"I23"}),
        ("refuse-on-erratum", {"vmx_basic_bit60": 1}, INSTALL, set()),
        ("refuse-on-erratum", {}, SYS_RD, set()),
        ("none", {}, INSTALL, set()),
        ("none", {"enforce_gate": "on"}, INSTALL, {"I23"}),
        ("none", {"enforce_gate": "on"}, INFO, set()),
    ],
)
def test_a_call_through_the_gate_breaks_i23(strategy: str, knobs: dict[str, Any], leaf: int, broken: set[str]) -> None:
    """I23 is broken by a call that the kernel as merged refuses, on a CPU with the erratum only."""
    assert machine(strategy, **knobs).seamcall(leaf).violated() == broken


def test_a_call_that_the_holder_waits_for_breaks_i25() -> None:
    """I25 is broken by a cross-call that waits under seamldr_lock; not after it, nor in a handler on top of it."""
    held = Run().cpu(0, "reader").lock_request(1).lock_hold(1, 1)
    assert held.csd_lock(1, 7, wait=0).cpu(0, "irq").csd_lock(1, 8).csd_done(8).violated() == set()
    held.cpu(0, "reader").lock_drop(1).csd_lock(1, 9).csd_done(9)
    assert held.violated() == set()
    assert held.lock_request(2).lock_hold(2, 2).csd_lock(1, 10).csd_done(10).violated() == {"I25"}


def repeated(statuses: list[int], leaf: int = SYS_RD) -> Run:
    """One SEAMCALL, executed once for each status."""
    run = Run().cpu(0, "kworker")
    for attempt, status in enumerate(statuses, 1):
        run.seamcall(leaf, status=status, attempt=attempt)
    return run


@pytest.mark.parametrize(
    ("statuses", "leaf", "broken"),
    [
        ([NO_ENTROPY] * 9 + [0], SYS_RD, set()),
        ([NO_ENTROPY] * 10 + [0], SYS_RD, {"I28"}),
        ([0, 0], SYS_RD, {"I28"}),
        ([SEAMLDR_NO_ENTROPY, 0], INFO, {"I28"}),
    ],
    ids=["nine retries", "ten retries", "after success", "after P-SEAMLDR's refusal"],
)
def test_a_retry_too_many_breaks_i28(statuses: list[int], leaf: int, broken: set[str]) -> None:
    """I28 is broken by the eleventh execution, and by one after anything but the module's want of entropy."""
    assert repeated(statuses, leaf).violated() == broken
