"""A builder of histories for tests of the analyzer: each method writes one record, checked against the event table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bus.events import NONE
from bus.invariants import INVARIANTS
from bus.judge import Judgement, judge_records
from bus.records import Record, complaint

SECOND = 1_000_000_000
INFO = 1 << 63
INSTALL = 1 << 63 | 1
LOCK = "seamldr_lock"


def save(run: Run, folder: Path) -> Path:
    """Write the records as a run directory."""
    (folder / "records").mkdir()
    for record in run.records:
        with (folder / "records" / f"{record['node']}.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")
    return folder


class Run:
    """A history in which each record happens after the one before; `cpu(n)` and `node(name)` say where.

    The clock steps by one and `ts` by a millisecond. A record is refused if its fields are not those of the table.
    """

    def __init__(self, *, updates: int = 0, **knobs: Any) -> None:
        self.records: list[Record] = []
        self.clock = 0
        self._seq: dict[str, int] = {}
        self._pid: dict[str, int] = {}
        self._node, self._ctx, self._irqs = "launcher", "", True
        self._number = 0
        self._token: tuple[int, int] = (0, 0)
        self.write(
            "machine_begin", strategy="none", knobs=knobs, seed=1, cpus=2, vcpus=2, tds=0, updates=updates
        )

    def node(self, name: str) -> Run:
        self._node, self._ctx = name, ""
        return self

    def cpu(self, number: int, ctx: str = "vcpu0", irqs: bool = True) -> Run:
        self._node, self._ctx, self._irqs = f"cpu{number}", ctx, irqs
        return self

    def new_process(self) -> Run:
        self._pid[self._node] = self._pid.get(self._node, 100) + 1
        return self

    def write(self, event: str, /, **fields: Any) -> Run:
        self.clock += 1
        seq = self._seq[self._node] = self._seq.get(self._node, 0) + 1
        record = {
            "ts": self.clock * 1_000_000,
            "clock": self.clock,
            "node": self._node,
            "pid": self._pid.get(self._node, 100),
            "seq": seq,
            "event": event,
            **fields,
        }
        if self._ctx:
            record |= {"ctx": self._ctx, "irqs": self._irqs}
        assert complaint(record) is None, complaint(record)
        self.records.append(record)
        return self

    # One CPU

    def vmptrld(self, vmcs: int, result: str = "ok", reason: str = "load") -> Run:
        return self.write("vmptrld", vmcs=vmcs, cur=NONE, result=result, reason=reason)

    def vmptrst(self, value: int) -> Run:
        return self.write("vmptrst", value=value, result="ok")

    def vmclear(self, vmcs: int, reason: str = "clear") -> Run:
        return self.write("vmclear", vmcs=vmcs, cur=NONE, result="ok", reason=reason)

    def vmread(self, result: str, vmcs: int = NONE) -> Run:
        return self.write("vmread", field=0x4402, name="EXIT_REASON", value=0, vmcs=vmcs, result=result)

    def cv(self, new: int) -> Run:
        return self.write("cv_write", old=NONE, new=new)

    def vcpu_load(self, vmcs: int, skipped: bool = False) -> Run:
        return self.write("vcpu_load", vcpu=0, vmcs=vmcs, via="load", skipped=int(skipped), migrated=int(not skipped))

    def load(self, vmcs: int) -> Run:
        """A load that makes the VMCS current."""
        return self.cv(vmcs).vmptrld(vmcs).vcpu_load(vmcs)

    def put(self, vmcs: int) -> Run:
        return self.write("vcpu_put", vcpu=0, vmcs=vmcs, via="put", entries=1)

    def enter(self, vmcs: int, insn: str = "vmresume", result: str = "ok") -> Run:
        launched = int(insn == "vmresume")
        return self.write("vmentry", insn=insn, vcpu=0, vmcs=vmcs, want=vmcs, launched=launched, result=result)

    def begin(self, cur: int, leaf: int = INFO) -> Run:
        """A strategy starts; the first thing that it does is to turn interrupts off."""
        self.write("strategy_begin", leaf=leaf, name="INFO", cur=cur)
        self._irqs = False
        return self

    def end(self, cur: int, errno: int = 0) -> Run:
        self._irqs = True
        return self.write("strategy_end", leaf=INFO, errno=errno, cur=cur)

    def seamcall(
        self, leaf: int, lost: int = NONE, cur: int = NONE, *, entered: int = 1, status: int = 0, attempt: int = 1
    ) -> Run:
        """A SEAMCALL of this CPU, without the SEAM side's records."""
        name = f"leaf{leaf & 0xFF}"
        self.write("seamcall_enter", leaf=leaf, name=name, attempt=attempt, cur=lost, epoch=1, number=1)
        return self.write(
            "seamcall_return", leaf=leaf, name=name, entered=entered, status=status, cur=cur, lost=lost
        )

    def track(self, vmcs: int, cpu: int) -> Run:
        """The stores of a load that takes the VMCS to this CPU."""
        return self.write("list_add", vmcs=vmcs).load_as(vmcs, cpu)

    def load_as(self, vmcs: int, cpu: int) -> Run:
        """VMPTRLD, then the store of `loaded_vmcs.cpu`, then the end of the load."""
        return self.cv(vmcs).vmptrld(vmcs).cpu_store(vmcs, cpu).vcpu_load(vmcs)

    def untrack(self, vmcs: int) -> Run:
        """__loaded_vmcs_clear."""
        return self.cv(NONE).vmclear(vmcs).write("list_del", vmcs=vmcs).cpu_store(vmcs, NONE)

    def cpu_store(self, vmcs: int, new: int) -> Run:
        return self.write("cpu_store", vmcs=vmcs, new=new)

    def call_none(self, vmcs: int) -> Run:
        """A whole call by the strategy `none` that loses the current VMCS."""
        return self.begin(vmcs).seamcall(INFO, lost=vmcs).end(NONE)

    def wrong_data(self, vmcs: int, what: str) -> Run:
        return self.write("wrong_data", vcpu=0, vmcs=vmcs, what=what, expected=5, got=4)

    # Locks

    def lock_request(self, request: int, lock: str = LOCK) -> Run:
        return self.write("lock_request", lock=lock, request=request, level=0)

    def lock_hold(self, request: int, number: int, lock: str = LOCK) -> Run:
        return self.write("lock_hold", lock=lock, request=request, epoch=1, number=number, waited_ns=1)

    def lock_drop(self, number: int, lock: str = LOCK) -> Run:
        return self.write("lock_drop", lock=lock, epoch=1, number=number)

    def queue(self, by: int, request: int, lock: str = LOCK) -> Run:
        return self.write("lock_queue", lock=lock, by=by, request=request, level=0, depth=1)

    def grant(self, to: int, request: int, number: int, epoch: int = 1, holders: int = 1, lock: str = LOCK) -> Run:
        return self.write(
            "lock_grant", lock=lock, to=to, request=request, epoch=epoch, number=number, waited_ns=2000, holders=holders
        )

    def release(self, by: int, number: int, epoch: int = 1, lock: str = LOCK) -> Run:
        return self.write("lock_release", lock=lock, by=by, epoch=epoch, number=number, stale=0)

    def withdraw(self, by: int, request: int, lock: str = LOCK) -> Run:
        return self.write("lock_withdraw", lock=lock, by=by, request=request)

    # The SEAM side

    def restart(self, inside: int = -1) -> Run:
        """The service is started again, in its second incarnation."""
        return self.new_process().write("service_restart", epoch=2, asked=[0, 1], inside=inside)

    def claim(self, by: int, request: int, number: int = 0, *, asked: int = 0, epoch: int = 1) -> Run:
        """A claim of a lock that is held under token `number`, or waited for."""
        token = {"epoch": epoch if number else 0, "number": number}
        return self.write("lock_claim", lock=LOCK, by=by, request=request, level=0, asked=asked, **token)

    def restore(self, to: int, request: int, number: int, *, epoch: int = 1) -> Run:
        return self.write("lock_restore", lock=LOCK, to=to, request=request, epoch=epoch, number=number)

    def expire(self, by: int, request: int, number: int) -> Run:
        return self.write("lock_expire", lock=LOCK, by=by, request=request, epoch=1, number=number, held_ns=5)

    def seam_enter(
        self,
        by: int,
        token: tuple[int, int] = (1, 1),
        holder: tuple[int, int] = (1, 1),
        *,
        admitted: int = 1,
        alive: int = 1,
        inside: int = 1,
    ) -> Run:
        return self.write(
            "seam_enter",
            by=by,
            leaf=INFO,
            name="INFO",
            admitted=admitted,
            alive=alive,
            inside=inside,
            epoch=token[0],
            number=token[1],
            holder_epoch=holder[0],
            holder_number=holder[1],
        )

    def seam_return(self, by: int) -> Run:
        return self.write("seam_return", by=by, leaf=INFO, name="INFO", status=0, inside=0)

    # Interrupts and cross-calls

    def ipi_send(self, target: int, message: int, took_ns: int = 0) -> Run:
        return self.write("ipi_send", target=target, vector=0xFB, nmi=0, id=message, took_ns=took_ns)

    def ipi_deliver(self, source: int, message: int) -> Run:
        return self.write("ipi_deliver", source=f"cpu{source}", vector=0xFB, nmi=0, id=message, coalesced=0)

    def csd_lock(self, target: int, call: int, wait: int = 1) -> Run:
        return self.write("csd_lock", csd=0x100, call=call, target=target, func="clear", info=0, wait=wait)

    def csd_run(self, source: int, call: int) -> Run:
        return self.write("csd_run", call=call, func="clear", source=source)

    def csd_done(self, call: int) -> Run:
        return self.write("csd_done", call=call)

    # Updates

    def update_begin(self, update: int = 1, online: tuple[int, ...] = (0, 1)) -> Run:
        return self.write("update_begin", update=update, online=list(online))

    def ack(self, state: str, ret: int = 0, update: int = 1) -> Run:
        return self.write("ack", update=update, state=state, ret=ret, num_ack=1, num_failed=int(ret != 0))

    def enter_state(self, state: str, update: int = 1) -> Run:
        return self.write("state_enter", update=update, state=state)

    def advance(self, state: str, update: int = 1) -> Run:
        return self.write("state_advance", update=update, state=state)

    def update_end(self, ret: int = 0, update: int = 1) -> Run:
        return self.write("update_end", update=update, ret=ret)

    def stage(self, state: str, following: str) -> Run:
        """One stage done by both CPUs."""
        for number in (0, 1):
            self.cpu(number, "stopper", irqs=False).enter_state(state).ack(state)
        return self.advance(following)

    def admin(self, kind: str, errno: int = 0) -> Run:
        self._number += 1
        self.write("admin_begin", request=self._number, kind=kind)
        return self.write("admin_end", request=self._number, kind=kind, errno=errno, text="")

    # The user's interface

    def request(self, number: int, kind: str) -> Run:
        return self.node("kvm").write("request", request=number, kind=kind, cpu=0)

    def info(self, number: int, remaining: int, errno: int = 0) -> Run:
        return self.node("kvm").write("seamldr_info", request=number, errno=errno, remaining=remaining)

    def read(self, path: str, value: str, errno: int = 0) -> Run:
        return self.node("kvm").write("sysfs_read", path=f"devices/faux/tdx_host/{path}", value=value, errno=errno)

    def upload(self, stage: str, error: str | None = None, name: str = "tdx_module", data: int | None = None) -> Run:
        """A change of an upload node; `error` and `data` are what the stage implies unless they are given."""
        idle = stage == "idle"
        error = ("" if idle else "EBUSY") if error is None else error
        load, data = "none" if idle else "done", int(idle) if data is None else data
        self.node("kvm")
        return self.write("fw_upload", name=name, load=load, stage=stage, error=error, remaining=8192, data=data)

    # The machine

    def online(self, name: str, incarnation: int = 1) -> Run:
        return self.node("launcher").write("process_online", name=name, incarnation=incarnation)

    def exit(self, name: str, wanted: bool = True, status: int = 0) -> Run:
        return self.node("launcher").write("process_exit", name=name, status=status, wanted=wanted)

    def finish(self, finished: bool = True) -> Run:
        return self.node("launcher").write("machine_end", finished=finished, why="" if finished else "time is up")

    def later(self, seconds: int = 2) -> Run:
        """Let time pass."""
        self.clock += seconds * 1000
        return self

    # Judging

    def judge(self) -> Judgement:
        return judge_records(self.records)

    def violated(self) -> set[str]:
        """Ids of the invariants that the history violates."""
        return {violation.invariant for violation in self.judge().violations}

    def story(self, invariant: str) -> str:
        """The story of an invariant's first violation."""
        assert invariant in INVARIANTS
        found = [violation for violation in self.judge().violations if violation.invariant == invariant]
        assert found, f"{invariant} holds"
        return found[0].first.text

    def rungs(self, invariant: str) -> list[str]:
        """The events of that story, without their time."""
        lines = (line.lstrip() for line in self.story(invariant).splitlines())
        return [line.lstrip("0123456789 ") for line in lines if line[:1].isdigit()]
