"""Points of the work: which record is one, how often it is counted, and that one at a time is due."""

from __future__ import annotations

import pytest

from bus.events import EVENTS
from bus.points import POINTS, FaultPoints, Reached
from bus.spec import SEAMLDR

INSTALL = 0x8000_0000_0000_0001


@pytest.mark.parametrize("name", POINTS)
def test_a_point_is_made_of_what_records_say(name: str) -> None:
    """Its event and the fields that it looks at are in the event table, and its sentence is one."""
    point = POINTS[name]
    assert point.sentence.endswith(".") and point.seen_by in ("cpu", SEAMLDR)
    if not point.event.startswith("*"):
        needed = {*point.where, *([point.subject] if point.subject else [])}
        needed |= {"leaf"} if point.p_seamldr else set()
        assert needed <= EVENTS[point.event].fields.keys()


def test_the_nth_time_counts_only_what_matches() -> None:
    """Other locks do not count; the third hold of seamldr_lock is due."""
    points = FaultPoints(2)
    assert points.arm(7, "holding", 3, -1)
    for lock in ("seamldr_lock", "update_lock", "seamldr_lock", "update_lock"):
        points.see("lock_hold", {"lock": lock})
    assert points.due is None
    points.see("lock_hold", {"lock": "seamldr_lock"})
    assert points.due == Reached(7, 2)
    assert not points.any


def test_the_service_tells_which_cpu_it_is_about() -> None:
    """A point that is limited to a CPU ignores the others; leaf and admission must fit."""
    points = FaultPoints(-1)
    points.arm(1, "mid-install", 1, 3)
    points.see("seam_enter", {"admitted": 1, "leaf": INSTALL, "by": 2})
    points.see("seam_enter", {"admitted": 0, "leaf": INSTALL, "by": 3})
    points.see("seam_enter", {"admitted": 1, "leaf": 1 << 63, "by": 3})
    assert points.due is None
    points.see("seam_enter", {"admitted": 1, "leaf": INSTALL, "by": 3})
    assert points.due == Reached(1, 3)


def test_one_point_at_a_time_is_due() -> None:
    """While one is due nothing counts; the other goes on counting when it is over."""
    points, calls = FaultPoints(0), []
    points.on_due = lambda: calls.append(points.due)
    points.arm(1, "migration", 1, -1)
    points.arm(2, "migration", 1, -1)
    points.see("list_add", {"vmcs": 1})
    points.see("list_add", {"vmcs": 1})
    assert points.due == Reached(1, 0) and calls == [Reached(1, 0)]
    points.due = None
    points.see("list_add", {"vmcs": 1})
    assert points.due == Reached(2, 0)


def test_what_is_taken_back_is_never_due() -> None:
    """Disarming works before the point is reached and while it is due; an unknown point is refused."""
    points = FaultPoints(0)
    assert not points.arm(1, "lunch", 1, -1)
    points.arm(1, "in-guest", 2, -1)
    points.see("*guest", {})
    points.disarm(1)
    points.see("*guest", {})
    assert points.due is None and not points.any
    points.arm(2, "in-guest", 1, -1)
    points.see("*guest", {})
    points.disarm(2)
    assert points.due is None
