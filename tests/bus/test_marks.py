"""Marks, arrows, stages and holders of locks, from small histories."""

from __future__ import annotations

import pytest
from history import LOCK, Run

from bus.activities import Activities
from bus.marks import MarkKind, Marks
from bus.picture import Painter, Picture

MS = 1_000_000


def picture(run: Run) -> Picture:
    """The picture of a history."""
    painter = Painter()
    for record in run.records:
        painter.see(record)
    return painter.finish()


def test_an_ipi_is_an_arrow_from_when_it_left() -> None:
    """The arrow begins when the message was handed to the link, which is before its record was written."""
    run = Run().cpu(0).ipi_send(1, 7).cpu(1).ipi_deliver(0, 7)
    run.records[1]["took_ns"] = 400_000
    (arrow,) = picture(run).arrows
    assert (arrow.kind, arrow.source, arrow.target, arrow.text) == ("ipi", "cpu0", "cpu1", "IPI, vector 0xfb")
    assert (arrow.sent, arrow.taken) == (2 * MS - 400_000, 3 * MS)


def test_no_arrow_goes_back_in_time() -> None:
    """Where the clocks of two processes say that a message came before it left, it came when it left."""
    run = Run().cpu(0).ipi_send(1, 7).cpu(1).ipi_deliver(0, 7)
    run.records[2]["ts"] = run.records[1]["ts"] - 5
    (arrow,) = picture(run).arrows
    assert arrow.taken == arrow.sent == 2 * MS


def test_messages_that_did_not_arrive_have_no_arrow() -> None:
    """Neither a lost IPI nor a delivery without a sender is drawn."""
    assert picture(Run().cpu(0).ipi_send(1, 7).cpu(1).ipi_deliver(0, 8)).arrows == []


def test_a_grant_goes_from_the_service_to_the_holder() -> None:
    """The arrow of a grant is told by its token; the lock is held until the service has it back."""
    run = Run().cpu(0).lock_request(1).node("seamldr").queue(0, 1).grant(0, 1, 5).cpu(0).lock_hold(1, 5).lock_drop(5)
    run.node("seamldr").release(0, 5)
    shown = picture(run)
    assert [(a.kind, a.source, a.sent, a.target, a.taken) for a in shown.arrows] == [
        ("grant", "seamldr", 4 * MS, "cpu0", 5 * MS)
    ]
    assert [(h.lock, h.node, h.begin, h.end) for h in shown.holds] == [(LOCK, "cpu0", 4 * MS, 7 * MS)]
    assert [(d.ts, d.waiting) for d in shown.depths] == [(3 * MS, 1), (4 * MS, 0)]


def test_a_grant_to_a_dead_cpu_ends_when_it_is_withdrawn() -> None:
    """A withdrawal ends the hold of that CPU and of no other; what is held at the end is held until then."""
    run = Run().node("seamldr").grant(1, 1, 1).grant(0, 1, 2).withdraw(0, 1).later(1).finish()
    assert [(h.node, (h.end - h.begin) // MS) for h in picture(run).holds] == [("cpu1", 1003), ("cpu0", 1)]


def test_a_stale_release_ends_nothing() -> None:
    """Who gives back what it does not hold does not end the hold of another."""
    run = Run().node("seamldr").grant(0, 1, 1).write("lock_release", lock=LOCK, by=1, epoch=1, number=1, stale=1)
    run.later(1).finish()
    assert [(h.end - h.begin) // MS for h in picture(run).holds] == [1002]


def test_an_update_has_a_stage_after_the_other() -> None:
    """Stages follow each other without a gap, from the begin of the update to its end."""
    run = Run(updates=2).cpu(0, "kworker").update_begin().advance("CPU_INSTALL").later(1).advance("DONE").update_end()
    run.later(1).update_begin(2).finish()
    shown = [(s.update, s.name, (s.end - s.begin) // MS) for s in picture(run).stages]
    assert shown == [(1, "SHUTDOWN", 1), (1, "CPU_INSTALL", 1001), (1, "DONE", 1), (2, "SHUTDOWN", 1)]


def test_marks_are_on_the_lane_that_they_are_about() -> None:
    """A fault and a death are marked on the node that they strike, all else on the one that wrote it."""
    run = Run().node("launcher").write("fault", kind="kill", name="cpu1", incarnation=1, what="")
    run.exit("cpu1", wanted=False, status=-9).write("fault", kind="links", name="", incarnation=0, what="")
    run.cpu(0).vmread("invalid").write("warn", text="vmread failed").vmread("ok").exit("cpu0")
    marks = picture(run).marks
    assert [(mark.node, mark.kind) for mark in marks] == [
        ("cpu1", MarkKind.FAULT),
        ("cpu1", MarkKind.FAILURE),
        ("launcher", MarkKind.FAULT),
        ("cpu0", MarkKind.FAILURE),
        ("cpu0", MarkKind.WARNING),
    ]
    assert marks[3].text == "VMREAD EXIT_REASON: VMfailInvalid"


def test_who_dies_in_seam_is_marked() -> None:
    """What the SEAM side says of a CPU is marked on that CPU."""
    run = Run().node("seamldr").write("seam_dead", by=1, why="cpu1 died inside")
    assert [mark.node for mark in picture(run).marks] == ["cpu1"]


def test_lanes_are_in_the_order_of_a_reader() -> None:
    """Launcher and services come first, then the CPUs by their number."""
    run = Run().cpu(10).write("cpu_online").cpu(2).write("cpu_online").node("seamldr").grant(0, 1, 1).request(1, "x")
    assert list(picture(run).lanes) == ["launcher", "kvm", "seamldr", "cpu2", "cpu10"]


def test_a_record_without_its_fields_is_refused() -> None:
    """A record that is not as the event table says raises, so that who draws can pass over it."""
    with pytest.raises(KeyError):
        Marks(Activities()).see({"event": "ipi_send", "node": "cpu0"})
