"""What the shadow state consists of: CPU, VMCS, lock, update; and how CPUs and stages are named and ordered."""

from __future__ import annotations

import functools
from collections import Counter

import msgspec

from bus.events import NONE
from bus.records import Record

P_SEAMLDR = 1 << 63
"""Bit of RAX that says: this leaf is P-SEAMLDR's."""

STAGES = ("START", "SHUTDOWN", "CPU_INSTALL", "CPU_INIT", "RUN_UPDATE", "DONE")
"""Stages of an update in their order; whatever follows DONE is the end."""


@functools.cache
def cpu_node(cpu: int | str) -> str:
    """The node of a CPU that a record names by number (or by node)."""
    return f"cpu{cpu}" if isinstance(cpu, int) else cpu


def node_order(node: str) -> tuple[bool, int, str]:
    """To sort nodes by: CPUs by their number, then the others.

    >>> sorted(["kvm", "cpu10", "cpu9"], key=node_order)
    ['cpu9', 'cpu10', 'kvm']
    """
    return not node.startswith("cpu"), len(node), node


def stage_rank(name: str) -> int:
    """Position of a stage; the state after DONE comes last.

    >>> stage_rank("SHUTDOWN") < stage_rank("DONE") < stage_rank("after DONE")
    True
    """
    return STAGES.index(name) if name in STAGES else len(STAGES)


def is_set(knob: object) -> bool:
    """Whether a knob that is a switch is on, however it is spelled."""
    return str(knob).lower() in ("1", "true", "on", "yes")


class CpuShadow(msgspec.Struct):
    """One logical processor. `cv` is None where nothing is known about `current_vmcs`."""

    node: str
    pid: int = 0
    cur: int = NONE
    cv: int | None = NONE
    loading: bool = False
    strategies: Counter[str] = msgspec.field(default_factory=Counter)
    active: set[int] = msgspec.field(default_factory=set)
    made: Record | None = None
    """The last VMPTRLD."""
    taken: Record | None = None
    """The last event that left this CPU without a current VMCS."""
    stale: Record | None = None
    """The end of a strategy since when `current_vmcs` has named a VMCS that is not current."""
    load: Record | None = None
    """The last `vcpu_load`."""
    begun: Record | None = None
    """The last `strategy_begin`."""
    saved: Record | None = None
    """The last VMPTRST."""

    def belief(self) -> list[tuple[str, Record | None]]:
        """How KVM came to believe that a VMCS is current which is not: labelled records for a story."""
        taken = self.taken
        if taken is None or (self.made is not None and taken["clock"] < self.made["clock"]):
            return [("made current", self.made), ("believed", self.load)]
        believed = self.load if self.load is not None and self.load["clock"] > taken["clock"] else None
        return [("made current", self.made), ("took it", taken), ("not repaired", self.stale), ("believed", believed)]

    @property
    def quiet(self) -> bool:
        """Not between the store of `current_vmcs` and its VMPTRLD, and not inside a strategy."""
        return not self.loading and not self.strategies


class VmcsShadow(msgspec.Struct):
    """One VMCS. `launched` is None where the launch state is not known."""

    active: set[str] = msgspec.field(default_factory=set)
    launched: bool | None = False
    activated: dict[str, Record] = msgspec.field(default_factory=dict)
    """The VMPTRLD that made it active, by CPU."""
    taken: Record | None = None
    """The last event that took it away as current VMCS, or its launch state."""
    entered: Record | None = None
    """The last VMLAUNCH of it."""
    stored: Record | None = None
    """The last store of KVM's copy of the launch state."""
    load: Record | None = None
    """The last `vcpu_load` of it."""


class LockShadow(msgspec.Struct):
    """One lock: as its service grants it, and as the CPUs see it."""

    granted: dict[tuple[int, int], Record] = msgspec.field(default_factory=dict)
    """Tokens granted and not given back, with the grant."""
    dropped: set[tuple[int, int]] = msgspec.field(default_factory=set)
    """Those of them that their holder has let go; the service has not heard of it yet."""
    held: dict[str, Record] = msgspec.field(default_factory=dict)
    """Nodes that hold it, with their `lock_hold`."""


class UpdateShadow(msgspec.Struct):
    """One update. `acks` counts acknowledgements by stage and node."""

    begin: Record
    online: frozenset[str] | None
    size: int
    rank: int = 1
    failed: int = 0
    acks: dict[int, Counter[str]] = msgspec.field(default_factory=dict)
    acked: dict[str, Record] = msgspec.field(default_factory=dict)
    """The last acknowledgement of each node that holds the lock around it still."""
    waiting: dict[str, Record] = msgspec.field(default_factory=dict)
    """The last acknowledgement of each other node: it waits for the stage to advance."""
    came: dict[str, Record] = msgspec.field(default_factory=dict)
    """Nodes whose stopper has come to stop_machine, or has been seen in the callback, with that record."""
    advance: Record | None = None
    """What began the stage, if it is not the first."""
    end: Record | None = None

    @property
    def late(self) -> list[str]:
        """Nodes that take part and have not come to stop_machine."""
        return sorted((self.online or frozenset()) - self.came.keys(), key=node_order)

    @property
    def missing(self) -> list[str]:
        """Nodes that take part and have not acknowledged the stage."""
        return sorted((self.online or frozenset()) - self.acks.get(self.rank, Counter()).keys(), key=node_order)

    def acknowledged(self, rank: int) -> bool:
        """Whether every CPU that takes part has acknowledged the stage."""
        acks = self.acks.get(rank, Counter())
        return len(acks) == self.size if self.online is None else self.online <= acks.keys()
