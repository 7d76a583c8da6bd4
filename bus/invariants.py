"""All invariants that a run is judged by, and where to look one up.

Numbers I1 to I56 are those of the project's catalogue; I57 and above continue it.
"""

from __future__ import annotations

from bus.invariant import Invariant
from bus.invariants_bus import BUS_INVARIANTS
from bus.invariants_context import CONTEXT_INVARIANTS
from bus.invariants_lock import LOCK_INVARIANTS
from bus.invariants_update import UPDATE_INVARIANTS
from bus.invariants_vmcs import VMCS_INVARIANTS


def number(invariant: type[Invariant]) -> int:
    """The number in an invariant's id, to sort by."""
    return int(invariant.id[1:])


INVARIANTS: dict[str, type[Invariant]] = {
    invariant.id: invariant
    for invariant in sorted(
        VMCS_INVARIANTS + CONTEXT_INVARIANTS + LOCK_INVARIANTS + UPDATE_INVARIANTS + BUS_INVARIANTS, key=number
    )
}
"""Every invariant by its id, in the order of their numbers."""
