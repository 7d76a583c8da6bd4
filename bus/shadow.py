"""Shadow state: what the machine must have looked like, derived from its records alone.

The analyzer walks through the merged history and keeps, for each CPU c, CUR(c) (the current-VMCS pointer), cv(c)
(KVM's `current_vmcs`) and which sections it is inside; for each VMCS v, act(v) (CPUs on which it is active) and hl(v)
(its launch state in hardware); holders and requests of locks, cross-calls on their way, and the stage of the update.

CPU state is followed in the order of that CPU's own file. The death of a process is a fact about the run, not a point
in the order: a launcher's clock may lag behind, so what a dead CPU had is dropped when its successor writes its first
record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from bus.events import NONE
from bus.records import Record
from bus.shadow_parts import (
    P_SEAMLDR,
    STAGES,
    CpuShadow,
    LockShadow,
    UpdateShadow,
    VmcsShadow,
    cpu_node,
    is_set,
    node_order,
    stage_rank,
)

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

__all__ = [
    "P_SEAMLDR",
    "STAGES",
    "CpuShadow",
    "LockShadow",
    "Shadow",
    "UpdateShadow",
    "VmcsShadow",
    "cpu_node",
    "is_set",
    "node_order",
    "stage_rank",
]


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
                    cpu = self._restart(cpu)
                cpu.pid = record["pid"]

    def apply(self, record: Record) -> None:
        """Move on past the record."""
        handler = self.applies.get(record["event"])
        if handler is not None:
            handler(record)

    def _restart(self, cpu: CpuShadow) -> CpuShadow:
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
        return fresh

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

    def _on_vmptrst(self, record: Record) -> None:
        self.cpu(record["node"]).saved = record

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
