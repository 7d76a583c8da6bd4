"""What an invariant is: an observer of the merged history that can say "violated" and tell why.

An observer has a method `on_EVENT(record, shadow)` for each event that it cares about; it sees each record together
with the shadow state just before it, except VMREADs and VMWRITEs that succeed. `at_end(ending)` is called once, when
there are no more records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Self

from bus.records import Record
from bus.shadow import Shadow
from bus.story import Story, tell
from bus.waits import Ending

Handler = Callable[[Record, Shadow], None]

IF_FAILED = ("vmread", "vmwrite")
"""Events that observers are told of only if `result` is not "ok": a traced run has mostly these."""


class Observer:
    """Base of everything that watches a history go by."""

    def handlers(self) -> dict[str, Handler]:
        """Handler by event name."""
        return {name[3:]: getattr(self, name) for name in dir(type(self)) if name.startswith("on_")}

    def at_end(self, ending: Ending) -> None:
        """The history is over."""


class Invariant(Observer):
    """A statement that holds in every run of a correct machine with a correct strategy.

    Class attributes: `id`, `slug`, `sentence`; `source`, where the statement comes from; `broken_by`, what violates
    it; `consequence_of`, ids of invariants that, when they are violated in the same run, explain this one.

    `count` violations were found, `story` tells the first. `suspects` are sentences about what may be a violation but
    cannot be called one; `excused` are sentences about violations that an injected fault explains.
    """

    id: ClassVar[str]
    slug: ClassVar[str]
    sentence: ClassVar[str]
    source: ClassVar[str]
    broken_by: ClassVar[str]
    consequence_of: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.count = 0
        self.story: Story | None = None
        self.suspects: list[str] = []
        self.excused: list[str] = []

    def renewed(self) -> Self:
        """Another of this kind that has seen nothing yet, but keeps what was found."""
        other = type(self)()
        other.count, other.story = self.count, self.story
        other.suspects, other.excused = self.suspects, self.excused
        return other

    def violated(self, sentence: str, *parts: tuple[str, Record | None]) -> None:
        """One more violation, shown by these labelled records."""
        self.count += 1
        if self.story is None:
            self.story = tell(sentence, *parts)


EXPLAINED_BY_DEATH: dict[str, str] = {
    "I35": "a CPU that dies right after its SEAMCALL has told nobody, so another, or its successor, makes it again",
    "I37": "a CPU that dies leaves the machine without leaving the online mask",
    "I38": "a CPU that dies right after TDH.SYS.SHUTDOWN or TDH.SYS.UPDATE leaves the kernel with its old belief",
    "I50": "a dead holder keeps the lock with `lock_policy=hang`, as in a kernel; a dead lock service grants none",
    "I51": "a dead CPU runs no cross-call, and does not see its own end",
    "I52": "a dead CPU acknowledges no stage, so the update stays where it is",
    "I53": "a dead CPU takes no ticks, and who waits for it with interrupts off takes none either",
    "I56": "a CPU that is dead neither goes nor comes, and asks for nothing more",
    "I58": "what is sent to a dying CPU arrives at most once; a dying sender may leave no record of what it sent",
    "I59": "a dead CPU runs no cross-call",
}
"""What the death of a CPU (a process that ended without being asked to) explains. Never anything else: not I1 or I14
of other CPUs, not I19, not tokens."""


def dispatch(observers: Iterable[Observer]) -> dict[str, tuple[Handler, ...]]:
    """For each event the handlers that want it."""
    table: dict[str, tuple[Handler, ...]] = {}
    for observer in observers:
        for event, handler in observer.handlers().items():
            table[event] = (*table.get(event, ()), handler)
    return table
