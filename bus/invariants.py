"""All invariants that a run is judged by, and where to look one up.

Numbers I1 to I56 are those of the project's catalogue; I57 and above continue it.
"""

from __future__ import annotations

from bus.invariant import Invariant
from bus.invariants_bus import BUS_INVARIANTS
from bus.invariants_calls import CALL_INVARIANTS
from bus.invariants_context import CONTEXT_INVARIANTS
from bus.invariants_lock import LOCK_INVARIANTS
from bus.invariants_module import MODULE_INVARIANTS
from bus.invariants_tasks import TASK_INVARIANTS
from bus.invariants_td import TD_INVARIANTS
from bus.invariants_tracking import TRACKING_INVARIANTS
from bus.invariants_update import UPDATE_INVARIANTS
from bus.invariants_upload import UPLOAD_INVARIANTS
from bus.invariants_vmcs import VMCS_INVARIANTS
from bus.invariants_watchdog import WATCHDOG_INVARIANTS


def number(invariant: type[Invariant]) -> int:
    """The number in an invariant's id, to sort by."""
    return int(invariant.id[1:])


INVARIANTS: dict[str, type[Invariant]] = {
    invariant.id: invariant
    for invariant in sorted(
        (
            *VMCS_INVARIANTS,
            *TRACKING_INVARIANTS,
            *CONTEXT_INVARIANTS,
            *LOCK_INVARIANTS,
            *CALL_INVARIANTS,
            *UPDATE_INVARIANTS,
            *MODULE_INVARIANTS,
            *TD_INVARIANTS,
            *UPLOAD_INVARIANTS,
            *BUS_INVARIANTS,
            *TASK_INVARIANTS,
            *WATCHDOG_INVARIANTS,
        ),
        key=number,
    )
}
"""Every invariant by its id, in the order of their numbers."""
