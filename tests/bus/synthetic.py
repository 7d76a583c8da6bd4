"""A long synthetic history: as many CPUs and records as a test asks for, each record as the event table says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bus.events import NONE
from bus.records import Record

INFO = 1 << 63
LOCK = "seamldr_lock"


class Synthetic:
    """Each CPU goes round: its vCPU runs, it sends the next CPU an IPI, it calls P-SEAMLDR under the lock.

    The CPUs write in turn, one record each. Lamport time steps by one a record, `ts` by 10 us.
    """

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self.clock = 0
        self._seq: dict[str, int] = {}
        self._number = 0
        self._busy = False

    def records(self, number: int) -> Iterator[Record]:
        """At least `number` records, the last of which ends the machine."""
        knobs = {"seamret_launch": "preserve"}
        size = {"cpus": self.cpus, "vcpus": self.cpus, "tds": 0, "updates": 0}
        yield self._record("launcher", "machine_begin", strategy="synthetic", knobs=knobs, seed=1, **size)
        for cpu in range(self.cpus):
            yield self._cpu(cpu, "cpu_online", "up")
            yield self._cpu(cpu, "task_enqueue", task=cpu)
        running = {cpu: self._life(cpu, number) for cpu in range(self.cpus)}
        while running:
            for cpu in list(running):
                record = next(running[cpu], None)
                if record is None:
                    del running[cpu]
                elif record:
                    yield record
        yield self._record("launcher", "machine_end", finished=1, why="")

    def _life(self, cpu: int, number: int) -> Iterator[Record]:
        while self.clock < number:
            yield from self._guest(cpu)
            yield from self._call(cpu)

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _guest(self, cpu: int) -> Iterator[Record]:
        ctx, vmcs, target = f"vcpu{cpu}", 0x8000000 + 0x1000 * cpu, (cpu + 1) % self.cpus
        ipi = {"vector": 0xFB, "nmi": 0, "id": f"m{self._next()}"}
        vcpu = {"vcpu": cpu, "vmcs": vmcs}
        yield self._cpu(cpu, "vcpu_load", ctx, **vcpu, via="load", skipped=1, migrated=0)
        yield self._cpu(cpu, "vmentry", ctx, **vcpu, insn="vmresume", want=vmcs, launched=1, result="ok")
        yield self._cpu(cpu, "ipi_send", ctx, target=target, **ipi)
        yield self._cpu(target, "ipi_deliver", source=f"cpu{cpu}", coalesced=0, **ipi)
        yield self._cpu(cpu, "vcpu_put", ctx, **vcpu, via="sched_out", entries=4)

    def _call(self, cpu: int) -> Iterator[Record]:
        request, call = self._next(), {"leaf": INFO, "name": "SEAMLDR.INFO"}
        service = {"lock": LOCK, "request": request, "level": 0}
        yield self._cpu(cpu, "lock_request", "reader", **service)
        yield self._record("seamldr", "lock_queue", by=cpu, depth=1, **service)
        while self._busy:
            yield {}
        self._busy, number = True, self._next()
        token = {"lock": LOCK, "epoch": 1, "number": number}
        yield self._record("seamldr", "lock_grant", to=cpu, request=request, waited_ns=1000, holders=1, **token)
        yield self._cpu(cpu, "lock_hold", "reader", request=request, waited_ns=2000, **token)
        yield self._cpu(cpu, "seamcall_enter", "reader", attempt=1, cur=NONE, epoch=1, number=number, **call)
        yield self._cpu(cpu, "seamcall_return", "reader", entered=1, status=0, cur=NONE, lost=NONE, **call)
        yield self._cpu(cpu, "lock_drop", "reader", **token)
        yield self._record("seamldr", "lock_release", by=cpu, stale=0, **token)
        self._busy = False

    def _cpu(self, cpu: int, event: str, ctx: str = "idle", **fields: Any) -> Record:
        return self._record(f"cpu{cpu}", event, **fields, ctx=ctx, irqs=1)

    def _record(self, node: str, event: str, **fields: Any) -> Record:
        self.clock += 1
        seq = self._seq[node] = self._seq.get(node, 0) + 1
        common = {"ts": self.clock * 10_000, "clock": self.clock, "node": node, "pid": 1, "seq": seq, "event": event}
        return common | fields
