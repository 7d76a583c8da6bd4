"""Shadow state: what the machine must have looked like, derived from its records alone.

The analyzer walks through the merged history and keeps, for each CPU c, CUR(c) (the current-VMCS pointer), cv(c)
(KVM's `current_vmcs`) and which sections it is inside; for each VMCS v, act(v) (CPUs on which it is active) and hl(v)
(its launch state in hardware); holders and requests of locks, cross-calls on their way, and the stage of the update.

CPU state is followed in the order of that CPU's own file. The death of a process is a fact about the run, not a point
in the order: a launcher's clock may lag behind, so what a dead CPU had is dropped when its successor writes its first
record.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from bus.events import NONE
from bus.records import Record

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

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


class _Made(dict[_Key, _Value]):
    """A dictionary that makes what is asked for and not there."""

    def __init__(self, make: Callable[[_Key], _Value]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: _Key) -> _Value:
        made = self[key] = self._make(key)
        return made


class Shadow:
    """The state after the records applied so far. `knobs` are those of `machine_begin`."""

    def __init__(self, knobs: Mapping[str, Any]) -> None:
        self.clears = str(knobs.get("seamret_launch", "preserve")) == "clear"
        self.sweeps = str(knobs.get("seamret_scope", "current_only")) == "all_active_on_lp"
        self.fixed = is_set(knobs.get("vmx_basic_bit60", 0))
        self.hangs = str(knobs.get("lock_policy", "release")) == "hang"
        self.cpus = _Made[str, CpuShadow](CpuShadow)
        self.vmcs = _Made[int, VmcsShadow](lambda _: VmcsShadow())
        self.locks = _Made[str, LockShadow](lambda _: LockShadow())
        self.cpu: Callable[[str], CpuShadow] = self.cpus.__getitem__
        """Shadow of the CPU with this node name."""
        self.v: Callable[[int], VmcsShadow] = self.vmcs.__getitem__
        """Shadow of the VMCS at this physical address."""
        self.lock: Callable[[str], LockShadow] = self.locks.__getitem__
        """Shadow of the lock with this name."""
        self.requests: dict[tuple[str, str, int], Record] = {}
        """Lock requests without a hold, by node, lock and request number."""
        self.calls: dict[tuple[str, int], Record] = {}
        """Waiting cross-calls whose sender has not seen their end, by node and call number."""
        self.waiting: list[Record] = []
        """What `process_waits` records told of processes that did not end."""
        self.update: UpdateShadow | None = None
        self.uploads: dict[str, Record] = {}
        """The last `fw_upload` of each upload node."""
        self.dead: set[str] = set()
        """Nodes that ended without being asked to, at any time of the run so far."""
        self.gone: set[str] = set()
        """Those of them that were not started again."""
        self.ended = False
        """The workload has ended: what follows is the machine being taken down."""
        self.finished: bool | None = None
        self.why_ended = ""
        self.applies: dict[str, Callable[[Record], None]] = {
            name[4:]: getattr(self, name) for name in dir(self) if name.startswith("_on_")
        }
        """What moves the state past a record, by event."""

    def open_update(self) -> UpdateShadow | None:
        """The update that has begun and not ended."""
        return self.update if self.update is not None and self.update.end is None else None

    def meet(self, record: Record) -> None:
        """Look at who writes, before the record itself is judged: a new process starts with nothing."""
        node = record["node"]
        if node.startswith("cpu"):
            cpu = self.cpu(node)
            if cpu.pid != record["pid"]:
                if cpu.pid:
                    self._restart(cpu)
                cpu.pid = record["pid"]

    def apply(self, record: Record) -> None:
        """Move on past the record."""
        handler = self.applies.get(record["event"])
        if handler is not None:
            handler(record)

    def _restart(self, cpu: CpuShadow) -> None:
        for vmcs in list(cpu.active):
            self._deactivate(cpu, vmcs)
            self.v(vmcs).launched = None
        self.cpus[cpu.node] = fresh = CpuShadow(cpu.node, cv=None)
        fresh.load = cpu.load
        for key in [key for key in self.requests if key[0] == cpu.node]:
            del self.requests[key]
        for call in [call for call in self.calls if call[0] == cpu.node]:
            del self.calls[call]
        for lock in self.locks.values():
            lock.held.pop(cpu.node, None)

    def _deactivate(self, cpu: CpuShadow, vmcs: int) -> None:
        cpu.active.discard(vmcs)
        shadow = self.v(vmcs)
        shadow.active.discard(cpu.node)
        shadow.activated.pop(cpu.node, None)

    # Machine

    def _on_process_exit(self, record: Record) -> None:
        if not record["wanted"]:
            self.dead.add(record["name"])
            self.gone.add(record["name"])

    def _on_process_online(self, record: Record) -> None:
        self.gone.discard(record["name"])

    def _on_process_waits(self, record: Record) -> None:
        self.waiting.append(record)

    def _on_machine_end(self, record: Record) -> None:
        self.ended = True
        self.finished = bool(record["finished"])
        self.why_ended = record["why"]

    # VMX

    def _on_vmxon(self, record: Record) -> None:
        self.cpu(record["node"]).cur = NONE

    def _on_vmxoff(self, record: Record) -> None:
        if record["result"] != "ok":
            return
        cpu = self.cpu(record["node"])
        for vmcs in list(cpu.active):
            self._deactivate(cpu, vmcs)
            self.v(vmcs).launched = None
        cpu.cur = NONE
        cpu.taken = record

    def _on_vmptrld(self, record: Record) -> None:
        if record["result"] != "ok":
            return
        cpu, vmcs = self.cpu(record["node"]), record["vmcs"]
        shadow = self.v(vmcs)
        cpu.cur = vmcs
        cpu.made, cpu.stale = record, None
        cpu.active.add(vmcs)
        if cpu.node not in shadow.active:
            shadow.active.add(cpu.node)
            shadow.activated[cpu.node] = record
        if record["reason"] == "load":
            cpu.loading = False

    def _on_vmclear(self, record: Record) -> None:
        if record["result"] != "ok":
            return
        cpu, vmcs = self.cpu(record["node"]), record["vmcs"]
        shadow = self.v(vmcs)
        self._deactivate(cpu, vmcs)
        shadow.launched = False
        shadow.taken = record
        if cpu.cur == vmcs:
            cpu.cur = NONE
            cpu.taken = record

    def _on_vmentry(self, record: Record) -> None:
        if record["result"] == "ok":
            shadow = self.v(record["vmcs"])
            shadow.launched = True
            if record["insn"] == "vmlaunch":
                shadow.entered = record

    def _on_launched_store(self, record: Record) -> None:
        self.v(record["vmcs"]).stored = record

    def _on_seamcall_return(self, record: Record) -> None:
        cpu = self.cpu(record["node"])
        cpu.cur = record["cur"]
        if not record["leaf"] & P_SEAMLDR or not record["entered"]:
            return
        lost = record["lost"]
        if lost != NONE:
            cpu.taken = record
            self.v(lost).taken = record
        if self.clears and not self.fixed:
            self._evict(cpu, set(cpu.active) if self.sweeps else {lost} - {NONE}, record)

    def _evict(self, cpu: CpuShadow, vmcss: set[int], record: Record) -> None:
        """SEAMRET with the launch state cleared: written back, clear, and not active any more."""
        for vmcs in vmcss:
            self._deactivate(cpu, vmcs)
            shadow = self.v(vmcs)
            shadow.launched = False
            shadow.taken = record

    def _on_cv_write(self, record: Record) -> None:
        cpu, new = self.cpu(record["node"]), record["new"]
        cpu.cv = NONE if new == 0 else new
        cpu.stale = None
        if not cpu.strategies:
            cpu.loading = cpu.cv != NONE

    def _on_vcpu_load(self, record: Record) -> None:
        cpu = self.cpu(record["node"])
        cpu.loading = False
        cpu.load = record
        self.v(record["vmcs"]).load = record

    def _on_vcpu_lost(self, record: Record) -> None:
        """What a dead CPU had of it in its cache is gone."""
        shadow, node = self.v(record["vmcs"]), cpu_node(record["cpu"])
        if node in shadow.active:
            self._deactivate(self.cpu(node), record["vmcs"])
            shadow.launched = None

    def _on_strategy_begin(self, record: Record) -> None:
        cpu = self.cpu(record["node"])
        cpu.strategies[record.get("ctx", "")] += 1
        cpu.begun = record

    def _on_strategy_end(self, record: Record) -> None:
        cpu, context = self.cpu(record["node"]), record.get("ctx", "")
        if cpu.strategies[context] > 1:
            cpu.strategies[context] -= 1
        else:
            del cpu.strategies[context]
        if cpu.stale is None and cpu.quiet and cpu.cv not in (None, NONE, cpu.cur):
            cpu.stale = record

    _on_strategy_error = _on_strategy_end

    # Locks and cross-calls

    def _on_lock_request(self, record: Record) -> None:
        self.requests[record["node"], record["lock"], record["request"]] = record

    def _on_lock_hold(self, record: Record) -> None:
        self.requests.pop((record["node"], record["lock"], record["request"]), None)
        self.lock(record["lock"]).held[record["node"]] = record

    def _on_lock_drop(self, record: Record) -> None:
        lock = self.lock(record["lock"])
        lock.held.pop(record["node"], None)
        lock.dropped.add((record["epoch"], record["number"]))
        update = self.open_update()
        if update is not None and record["node"] in update.acked:
            update.waiting[record["node"]] = update.acked.pop(record["node"])

    def _on_lock_grant(self, record: Record) -> None:
        self.lock(record["lock"]).granted[record["epoch"], record["number"]] = record

    _on_lock_restore = _on_lock_grant

    def _on_lock_release(self, record: Record) -> None:
        if not record["stale"]:
            lock, token = self.lock(record["lock"]), (record["epoch"], record["number"])
            lock.granted.pop(token, None)
            lock.dropped.discard(token)
            held = lock.held.get(cpu_node(record["by"]))
            if held is not None and (held["epoch"], held["number"]) == token:
                del lock.held[held["node"]]

    def _on_lock_expire(self, record: Record) -> None:
        self.lock(record["lock"]).granted.pop((record["epoch"], record["number"]), None)

    def _on_service_restart(self, record: Record) -> None:
        for lock in self.locks.values():
            lock.granted.clear()

    def _on_lock_withdraw(self, record: Record) -> None:
        self.requests.pop((cpu_node(record["by"]), record["lock"], record["request"]), None)
        lock, by = self.lock(record["lock"]), cpu_node(record["by"])
        for token, grant in list(lock.granted.items()):
            if grant["to"] == record["by"] and grant["request"] == record["request"]:
                del lock.granted[token]
        if by in lock.held and lock.held[by]["request"] == record["request"]:
            del lock.held[by]

    def _on_csd_lock(self, record: Record) -> None:
        if record["wait"]:
            self.calls[record["node"], record["call"]] = record

    def _on_csd_done(self, record: Record) -> None:
        self.calls.pop((record["node"], record["call"]), None)

    _on_csd_lost = _on_csd_done

    # Update

    def _on_update_begin(self, record: Record) -> None:
        online = record["online"]
        nodes = None if isinstance(online, int) else frozenset(cpu_node(cpu) for cpu in online)
        self.update = UpdateShadow(record, nodes, online if nodes is None else len(nodes))

    def _on_ack(self, record: Record) -> None:
        update = self.open_update()
        if update is not None and update.begin["update"] == record["update"]:
            update.acks.setdefault(stage_rank(record["state"]), Counter())[record["node"]] += 1
            update.waiting.pop(record["node"], None)
            update.acked[record["node"]] = record
            update.failed += record["ret"] != 0

    def _on_stop_enter(self, record: Record) -> None:
        update = self.open_update()
        if update is not None:
            update.came.setdefault(record["node"], record)

    def _on_state_enter(self, record: Record) -> None:
        self._on_stop_enter(record)
        update = self.open_update()
        if update is not None:
            update.waiting.pop(record["node"], None)

    def _on_state_advance(self, record: Record) -> None:
        update = self.open_update()
        if update is not None and update.begin["update"] == record["update"]:
            update.rank = stage_rank(record["state"])
            update.advance = record

    def _on_update_end(self, record: Record) -> None:
        update = self.open_update()
        if update is not None and update.begin["update"] == record["update"]:
            update.end = record

    def _on_stop_freed(self, record: Record) -> None:
        update = self.open_update()
        if update is not None and update.begin["node"] == cpu_node(record["owner"]):
            update.end = record

    # The user's interface

    def _on_sysfs_tree(self, record: Record) -> None:
        self.uploads.clear()

    def _on_fw_upload(self, record: Record) -> None:
        self.uploads[record["name"]] = record
