"""A picture: lanes, marks, arrows, stages and locks of one history, from which the timeline and the trace are drawn."""

from __future__ import annotations

import msgspec

from bus.activities import Activities
from bus.lanes import Interval, Lanes
from bus.marks import Arrow, Depth, Hold, Mark, Marks, Stage
from bus.records import Record
from bus.shadow import node_order
from bus.spec import LAUNCHER


class Picture(msgspec.Struct, frozen=True):
    """`begin` and `end` are monotonic ns. `lanes` are in the order in which they are shown; of the others, all but
    `holds` of different locks are in time order.
    """

    begin: int
    end: int
    lanes: dict[str, tuple[Interval, ...]]
    marks: list[Mark]
    arrows: list[Arrow]
    stages: list[Stage]
    holds: list[Hold]
    depths: list[Depth]


class Painter:
    """Sees one history, record by record in causal order, and paints it."""

    def __init__(self) -> None:
        self._lanes = Lanes()
        self._marks = Marks(self._lanes.activities)

    @property
    def activities(self) -> Activities:
        """What each process is in the middle of now."""
        return self._lanes.activities

    def see(self, record: Record) -> None:
        """The next record; raises KeyError or TypeError if it is not as the event table says."""
        self._lanes.see(record)
        self._marks.see(record)

    def finish(self) -> Picture:
        """The picture, when there are no more records."""
        lanes, marks = self._lanes.finish(), self._marks
        marks.finish(self._lanes.end)
        order = sorted(lanes, key=lambda node: (node.startswith("cpu"), node != LAUNCHER, node_order(node)))
        return Picture(
            begin=self._lanes.begin,
            end=self._lanes.end,
            lanes={node: lanes[node] for node in order},
            marks=marks.marks,
            arrows=marks.arrows,
            stages=marks.stages,
            holds=marks.holds,
            depths=marks.depths,
        )
