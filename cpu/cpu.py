"""The operations of a CPU: all that kernel code may do to the world.

Each method that is awaited is one operation of the machine, and the only place where anything else may happen: an
interrupt, an NMI, a preemption, another CPU's step. Each takes effect at once, then gives way (see `core`).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from bus.memory import PAGE_SIZE
from cpu.core import CpuCore, LockRequest, SeamReply, SeamTrap, Trap, trap
from cpu.layout import PerCpu
from cpu.ops_vmx import VmxOperations
from cpu.struct import NONE
from cpu.vmx import Outcome
from cpu.watch import watchers_of


class PerCpuVariable:
    """A per-CPU pointer whose stores have a record of their own."""

    def __init__(self, name: str, event: str) -> None:
        self.name = name
        self.event = event

    def word(self, area: PerCpu) -> int:
        """Address of this variable in a CPU's area."""
        address: int = getattr(area, self.name)
        return address


current_vmcs = PerCpuVariable("current_vmcs", "cv_write")
"""The VMCS that KVM believes is current on this CPU."""


class RawSpinLock:
    """`raw_spinlock_t`: a queued spinlock, first come first served, kept by the lock service."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<raw_spinlock {self.name}>"


class Cpu(VmxOperations, CpuCore):
    """One logical processor as kernel code sees it."""

    # Memory

    async def load(self, word: int) -> int:
        """READ_ONCE of a shared word."""
        value, stamp = self.memory.load(word)
        self.clock.merge(stamp)
        self.recent_loads.append((word, value))
        self.budget -= 1
        if self.budget <= 0:
            await self.boundary()
        return value

    async def store(self, word: int, value: int) -> None:
        """WRITE_ONCE of a shared word; rings whoever sleeps on it."""
        self._store(word, value)
        self.budget -= 1
        if self.budget <= 0:
            await self.boundary()

    def _store(self, word: int, value: int, time: int | None = None) -> None:
        if self.memory.store(word, value, self.clock.tick() if time is None else time):
            self.ring_watchers(word)

    async def this_cpu_read(self, variable: PerCpuVariable) -> int | None:
        """this_cpu_read of a per-CPU pointer; None is NULL."""
        value, stamp = self.memory.load(variable.word(self.percpu))
        self.clock.merge(stamp)
        await self.give_way()
        return None if value == NONE else value

    async def this_cpu_write(self, variable: PerCpuVariable, value: int | None) -> None:
        """this_cpu_write of a per-CPU pointer; None is NULL."""
        word, new = variable.word(self.percpu), NONE if value is None else value
        old, _ = self.memory.load(word)
        self._store(word, new, self.emit(variable.event, old=old, new=new))
        await self.give_way()

    async def store_recorded(self, word: int, value: int, event: str, **fields: object) -> None:
        """WRITE_ONCE of a word whose history the invariants need: `event` with `fields` and `new` is its record."""
        self._store(word, value, self.emit(event, **fields, new=value))
        await self.give_way()

    async def atomic_add(self, word: int, delta: int) -> int:
        """atomic_add_return."""
        with self.memory.atomic(word):
            value, stamp = self.memory.load(word)
            self.clock.merge(stamp)
            value = (value + delta) & 0xFFFF_FFFF_FFFF_FFFF
            self._store(word, value)
        await self.give_way()
        return value

    async def xchg(self, word: int, value: int) -> int:
        """Store and return what was there."""
        with self.memory.atomic(word):
            old, stamp = self.memory.load(word)
            self.clock.merge(stamp)
            self._store(word, value)
        await self.give_way()
        return old

    async def cmpxchg(self, word: int, expected: int, value: int) -> int:
        """Store `value` if `expected` is there; return what was there."""
        with self.memory.atomic(word):
            old, stamp = self.memory.load(word)
            self.clock.merge(stamp)
            if old == expected:
                self._store(word, value)
        await self.give_way()
        return old

    async def llist_add(self, node: int, head: int, *, unless: int = 0) -> bool | None:
        """Push a node, whose first word is its next pointer, on a lock-free list; True if the list was empty.

        Nothing is pushed, and the answer is None, if the word `unless` is set: that of a CPU whose list dies with it.
        """
        with self.memory.atomic(head):
            first, stamp = self.memory.load(head)
            self.clock.merge(stamp)
            refused = bool(unless and self.memory.load(unless)[0])
            if not refused:
                self._store(node, first)
                self._store(head, node)
        await self.give_way()
        return None if refused else first == 0

    async def read_phys(self, pa: int, length: int) -> bytes:
        """Copy bytes out of pages that no other context writes meanwhile."""
        data = self.memory.read(pa, length)
        await self.give_way()
        return data

    async def write_phys(self, pa: int, data: bytes) -> None:
        """Copy bytes into pages that no other context reads meanwhile."""
        self.memory.write(pa, data)
        await self.give_way()

    async def clear_page(self, pa: int) -> None:
        """Zero one page."""
        await self.write_phys(pa, bytes(PAGE_SIZE))

    # Interrupts and preemption

    async def local_irq_disable(self) -> None:
        """CLI."""
        self.irqs_on = False
        await self.give_way()

    async def local_irq_enable(self) -> None:
        """STI: what is pending is taken right after it."""
        self.irqs_on = True
        if self.apic.irr or self.need_resched:
            self.budget = 0
        await self.give_way()

    async def local_irq_save(self) -> bool:
        """CLI; what RFLAGS.IF was."""
        flags = self.irqs_on
        await self.local_irq_disable()
        return flags

    async def local_irq_restore(self, flags: bool) -> None:
        """POPF of what `local_irq_save` returned."""
        if flags:
            await self.local_irq_enable()
        else:
            await self.local_irq_disable()

    async def preempt_disable(self) -> None:
        """preempt_count++."""
        self.preempt_count += 1
        self._store(self.percpu.preempt_count, self.preempt_count)
        await self.give_way()

    async def preempt_enable(self) -> None:
        """preempt_count--, and a scheduling point if it reaches 0."""
        self.preempt_count -= 1
        self._store(self.percpu.preempt_count, self.preempt_count)
        if self.need_resched and self.preempt_count == 0:
            self.budget = 0
        await self.give_way()

    async def cond_resched(self) -> None:
        """A place where the thread may be preempted whatever the preemption model: `__schedule` if need be."""
        if self.need_resched and not self.preempt_count and self.irqs_on:
            self.resched_point = True
            await self.boundary()
            self.resched_point = False
        else:
            await self.give_way()

    async def might_resched(self) -> None:
        """`might_sleep()`: a preemption point of the voluntary model alone."""
        if self.kernel.knobs.get("preemption") == "voluntary":
            await self.cond_resched()

    # Waiting

    async def cpu_relax(self) -> None:
        """PAUSE in a spinning wait: resumes when a word read since the last one, or anything that arrived, changed."""
        await trap(Trap.RELAX)
        self.recent_loads.clear()

    async def schedule(self, words: int = 1) -> None:
        """Sleep until one of the `words` read last changes; other threads run meanwhile. Task context, preemption on.
        """
        if self.preempt_count or not self.irqs_on:
            self.warn_on_once(True, "BUG: scheduling while atomic")
        self.sleep_words = words
        await trap(Trap.SLEEP)
        self.recent_loads.clear()

    async def resume_user_mode(self) -> bool:
        """The head of a thread's loop: True to go on, False if the thread is to leave this CPU."""
        await self.cond_resched()
        return bool(await trap(Trap.USER))

    # Other CPUs

    async def send_ipi(self, target: int, vector: int, *, nmi: bool = False) -> None:
        """Write the ICR: an interrupt message to one CPU."""
        self.count.ipis_sent += 1
        begun = self.world.now_ns()
        message = self.world.send_ipi(target, vector, nmi)
        took = self.world.now_ns() - begun
        self.emit("ipi_send", target=target, vector=vector, nmi=int(nmi), id=message, took_ns=took)
        await self.give_way()

    def ring_watchers(self, word: int) -> None:
        """A store hit a word that somebody may sleep on: wake them, as a write to a monitored line does."""
        self.memory.disarm(word)
        for target in watchers_of(self.memory, self.kernel.num_cpus, word):
            if target != self.number:
                self.world.ring(target, word)

    # Locks

    def raw_spin_lock(self, lock: RawSpinLock) -> LockGuard:
        """`async with`: raw_spin_lock .. raw_spin_unlock."""
        return LockGuard(self, lock, irqsave=False)

    def raw_spin_lock_irqsave(self, lock: RawSpinLock) -> LockGuard:
        """`async with`: raw_spin_lock_irqsave .. raw_spin_unlock_irqrestore. Interrupts go off before the spin."""
        return LockGuard(self, lock, irqsave=True)

    def spin_lock(self, lock: RawSpinLock) -> LockGuard:
        """`async with`: spin_lock on a plain `spinlock_t`. In the preemption model `rt` it is a lock that sleeps."""
        return LockGuard(self, lock, irqsave=False, plain=True)

    def spin_lock_irqsave(self, lock: RawSpinLock) -> LockGuard:
        """`async with`: spin_lock_irqsave on a plain `spinlock_t`. In the model `rt` interrupts stay on."""
        return LockGuard(self, lock, irqsave=True, plain=True)

    # SEAM

    async def seamcall(
        self, rax: int, registers: tuple[int, ...], *, name: str, attempt: int = 1, guest: bool = False
    ) -> SeamReply | Outcome:
        """The SEAMCALL instruction: a fault or VM exit as an `Outcome`, else what SEAM answered.

        Takes no event until it returns. SEAMRET from P-SEAMLDR may invalidate the current VMCS, and an NMI that
        waited is taken then, before anything else here runs (Trust Domain CPU Architectural Extensions, SEAMRET).
        `name` and `attempt` are for the records; a call that runs a TD (`guest`) has none.
        """
        fault = self.vmx.seamcall_check(rax)
        if fault is not None:
            await self.boundary()
            return fault
        if rax >> 63 and self.nmi_due("after-vmptrst"):
            await self.boundary()
        recorded = self.trace or not guest
        if recorded:
            epoch, number = self.tokens.get("seamldr_lock", (0, 0))
            cur = self.vmx.cur
            self.emit("seamcall_enter", leaf=rax, name=name, attempt=attempt, cur=cur, epoch=epoch, number=number)
        if rax >> 63:
            self.nmi_due("in-seam")
        self.vmx.in_seam = True
        reply: SeamReply = await trap(SeamTrap(rax, registers, guest))
        self.vmx.in_seam = False
        lost = NONE
        if reply.entered and rax >> 63:
            knobs = self.kernel.knobs
            lost = self.vmx.seamret_pseamldr(knobs["seamret_launch"], knobs["seamret_scope"])
        if recorded:
            entered, cur = int(reply.entered), self.vmx.cur
            self.emit("seamcall_return", leaf=rax, name=name, entered=entered, status=reply.rax, cur=cur, lost=lost)
        await self.boundary()
        if rax >> 63 and self.nmi_due("after-seamret"):
            await self.boundary()
        return reply

    # Messages of the kernel

    def warn_on_once(self, condition: bool, text: str = "WARN_ON_ONCE") -> bool:
        """WARN_ON_ONCE: one record a text and CPU; returns the condition. Not an operation."""
        if condition and text not in self.warned:
            self.warned.add(text)
            self.emit("warn", text=text)
        return condition

    def warn(self, text: str) -> None:
        """WARN: a record every time. Not an operation."""
        self.emit("warn", text=text)

    def pr_err(self, text: str) -> None:
        """One line of the kernel log. Not an operation."""
        self.emit("log", text=text)

    # Static calls

    async def static_call(self, name: str, *arguments: Any) -> Any:
        """Call what composition patched in under `name`."""
        return await self.kernel.static_calls[name](self, *arguments)


class LockGuard:
    """A held spinlock. A coroutine that is dropped with its machine releases nothing, as a CPU that loses power."""

    def __init__(self, cpu: Cpu, lock: RawSpinLock, *, irqsave: bool, plain: bool = False) -> None:
        self.cpu = cpu
        self.lock = lock
        self.plain = plain
        self.sleeps = plain and cpu.kernel.knobs.get("preemption") == "rt"
        self.irqsave = irqsave and not self.sleeps
        self.flags = False
        self.token = (0, 0)

    async def __aenter__(self) -> LockGuard:
        cpu = self.cpu
        self._lockdep()
        if self.irqsave:
            self.flags = await cpu.local_irq_save()
        if self.sleeps:
            cpu.warn_on_once(cpu.in_atomic, "BUG: sleeping function called from invalid context")
        else:
            await cpu.preempt_disable()
        self.token = await self._spin()
        return self

    def _lockdep(self) -> None:
        """What lockdep says before the lock is taken, whether or not it will deadlock this time."""
        cpu = self.cpu
        cpu.warn_on_once(self.plain and cpu.level > 0, "[ BUG: Invalid wait context ]")
        if self.lock.name in cpu.tokens and not self.sleeps:
            text = "inconsistent lock state" if cpu.level else "possible recursive locking detected"
            cpu.warn_on_once(True, f"WARNING: {text}: {self.lock.name}")

    async def _spin(self) -> tuple[int, int]:
        cpu, name = self.cpu, self.lock.name
        cpu.next_request += 1
        request, began = cpu.next_request, cpu.world.now_ns()
        asked = cpu.emit("lock_request", lock=name, request=request, level=cpu.level)
        cpu.requests[request] = LockRequest(name, cpu.level, asked)
        cpu.world.lock_acquire(name, cpu.level, request)
        cpu.recent_loads.clear()
        while request not in cpu.grants:
            cpu.waits_for = (f"spins on {name}", "seamldr")
            await self._wait(request)
        cpu.waits_for = ("", "")
        token = cpu.grants.pop(request)
        epoch, number = cpu.tokens[name] = cpu.requests[request].token = token
        waited = cpu.world.now_ns() - began
        cpu.emit("lock_hold", lock=name, request=request, epoch=epoch, number=number, waited_ns=waited)
        await cpu.give_way()
        return token

    async def _wait(self, request: int) -> None:
        if not self.sleeps:
            await self.cpu.cpu_relax()
            return
        await self.cpu.load(self.cpu.percpu.lock_grants)
        if request not in self.cpu.grants:
            await self.cpu.schedule()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is GeneratorExit:
            return
        cpu, name = self.cpu, self.lock.name
        epoch, number = self.token
        cpu.emit("lock_drop", lock=name, epoch=epoch, number=number)
        cpu.give_lock_back(name, self.token)
        if not self.sleeps:
            await cpu.preempt_enable()
        if self.irqsave:
            await cpu.local_irq_restore(self.flags)
