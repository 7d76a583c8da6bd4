"""Invariants about how SEAMCALLs are made: I23, I25, I28."""

from __future__ import annotations

from bus.invariant import Invariant
from bus.invariants_lock import SEAMLDR_LOCK
from bus.records import Record
from bus.shadow import P_SEAMLDR, Shadow

SEAMLDR_INSTALL = P_SEAMLDR | 1
REFUSING = "refuse-on-erratum"
RETRY_LOOPS = 10
RND_NO_ENTROPY = 0x8000_0203_0000_0000


class GateHolds(Invariant):
    """Judged at each P-SEAMLDR call."""

    id = "I23"
    slug = "gate-holds"
    sentence = (
        "On a CPU with the erratum nothing is installed while the gate is on, and the strategy refuse-on-erratum makes "
        "no P-SEAMLDR call at all."
    )
    source = "kernel seamldr_call() as merged, X86_BUG_SEAMRET_INVD_VMCS"
    broken_by = "a run-time check that is missing; an attribute that is visible although it must not be read"

    def __init__(self) -> None:
        super().__init__()
        self._refuses = self._gate = False

    def on_machine_begin(self, record: Record, shadow: Shadow) -> None:
        self._refuses = record["strategy"] == REFUSING
        gate = record["knobs"].get("enforce_gate", "auto")
        self._gate = self._refuses if gate == "auto" else gate == "on"

    def on_seamcall_enter(self, record: Record, shadow: Shadow) -> None:
        leaf = record["leaf"]
        if shadow.fixed or not leaf & P_SEAMLDR:
            return
        if self._refuses or (self._gate and leaf == SEAMLDR_INSTALL):
            self.violated(f"{record['name']} on {record['node']}, whose CPU has the erratum", ("call", record))


class HolderDoesNotWait(Invariant):
    """Judged where a waiting cross-call is queued by a CPU that holds seamldr_lock in the same context."""

    id = "I25"
    slug = "holder-does-not-wait"
    sentence = "The holder of seamldr_lock starts no cross-call that it waits for before it gives the lock back."
    source = "kernel raw_spin_lock(): a target that spins on the lock with interrupts off never answers"
    broken_by = "a strategy that clears VMCSs of other CPUs under the lock"

    def on_csd_lock(self, record: Record, shadow: Shadow) -> None:
        held = shadow.lock(SEAMLDR_LOCK).held.get(record["node"])
        if record["wait"] and held is not None and held.get("ctx") == record.get("ctx"):
            why = f"{record['node']} waits for cpu{record['target']} ({record['func']}) while it holds seamldr_lock"
            self.violated(why, ("held", held), ("waits", record))


class RetriesBounded(Invariant):
    """Judged at each execution of a SEAMCALL. Between two a vCPU's thread may move to another CPU."""

    id = "I28"
    slug = "retries-bounded"
    sentence = (
        "A SEAMCALL is executed ten times at most, and again only after the module said that it had no entropy "
        "(0x8000020300000000)."
    )
    source = "kernel sc_retry(), RDRAND_RETRY_LOOPS"
    broken_by = "an unlimited retry; a retry of what P-SEAMLDR itself refuses for want of entropy"

    def __init__(self) -> None:
        super().__init__()
        self._returned: dict[str, Record] = {}

    def on_seamcall_enter(self, record: Record, shadow: Shadow) -> None:
        before = self._returned.get(_thread(record))
        attempt = record["attempt"]
        if attempt > RETRY_LOOPS:
            self.violated(f"{record['name']} executed {attempt} times", ("again", record))
        elif attempt > 1 and (before is None or before["status"] != RND_NO_ENTROPY):
            status = "nothing" if before is None else f"{before['status']:#018x}"
            why = f"{record['name']} executed again after it had returned {status}"
            self.violated(why, ("returned", before), ("again", record))

    def on_seamcall_return(self, record: Record, shadow: Shadow) -> None:
        self._returned[_thread(record)] = record


def _thread(record: Record) -> str:
    """Who runs: the name of a vCPU's thread is its own, other contexts are of one CPU."""
    context = str(record.get("ctx", ""))
    return context if context.startswith(("td", "vcpu")) else f"{record['node']} {context}"


CALL_INVARIANTS: tuple[type[Invariant], ...] = (GateHolds, HolderDoesNotWait, RetriesBounded)
