"""What one CPU is made of, and the traps by which kernel code gives way.

Kernel code is `async def` and touches the world only through operations of the `Cpu` it is given. An operation takes
effect at once; after it, where events may be due, it yields a trap to whoever drives the code: the step loop of a
live CPU process, or a machine that is stepped in one process. `budget` decides: operations left before the next
yield. It is 1 in a stepped machine, so that every operation yields; some hundreds in a live one; and 0 as soon as the
CPU itself makes an event deliverable (interrupts on, preemption on).
"""

from __future__ import annotations

import enum
import types
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from typing import Any, Protocol

import msgspec

from bus.clock import LamportClock
from bus.memory import PhysicalMemory
from cpu.apic import LocalApic, Vector
from cpu.layout import WATCH_SLOTS, PerCpu, per_cpu
from cpu.vmx import VmxUnit


class Trap(enum.Enum):
    """Why kernel code gives way, besides the two traps below that carry an argument."""

    BOUNDARY = "an operation is over, events may be taken"
    RELAX = "a spinning wait: resume when something may have changed"
    SLEEP = "a sleeping wait: another thread may run meanwhile"
    USER = "the thread is at the head of its loop, where it may move or end"


class GuestRun(msgspec.Struct, frozen=True):
    """The CPU is in VMX non-root operation; resume with a `GuestExit`."""


class GuestExit(msgspec.Struct, frozen=True):
    """What ended a run of the guest: its own doing, an interrupt (the vector is acknowledged) or an NMI."""

    vector: int = 0
    nmi: bool = False


class SeamTrap(msgspec.Struct, frozen=True):
    """The CPU executes SEAMCALL; resume with a `SeamReply`. No event is taken until then.

    `guest` says that a TD runs until it exits, which an event makes it do.
    """

    rax: int
    registers: tuple[int, ...]
    guest: bool = False


class SeamReply(msgspec.Struct, frozen=True):
    """What SEAMRET brought back; `entered` False is VMfailInvalid."""

    entered: bool
    rax: int
    registers: tuple[int, ...]


@types.coroutine
def trap(request: Any) -> Generator[Any, Any, Any]:
    """Give way to the driver and return what it sends back."""
    return (yield request)


class World(Protocol):
    """What joins a CPU to the others: the bus of a live machine, plain calls in a stepped one. All return at once."""

    def send_ipi(self, target: int, vector: int, nmi: bool) -> str:
        """Queue an interrupt message; the message's id."""

    def ring(self, target: int, word: int) -> None:
        """Wake a CPU that sleeps on `word`."""

    def lock_acquire(self, lock: str, level: int, request: int) -> None:
        """Ask the lock service; the grant arrives by `Cpu.lock_granted`."""

    def lock_release(self, lock: str, epoch: int, number: int) -> None:
        """Give a lock back under its fencing token."""

    def now_ns(self) -> int:
        """A clock for measurements, never for decisions."""


class Emit(Protocol):
    """Write one record; its Lamport time."""

    def __call__(self, event: str, /, **fields: object) -> int: ...


NMI_PERIODS = {
    "in-guest": 53,
    "before-vmptrst": 7,
    "after-vmptrst": 11,
    "in-seam": 3,
    "after-seamret": 5,
    "after-repair": 13,
}
"""Where the knob `nmi_inject` can have an NMI arrive, and of how many passages `sampled` takes one."""

CpuFunction = Callable[..., Coroutine[Any, Any, Any]]


class Kernel(msgspec.Struct, frozen=True):
    """The kernel as composed for one machine: what upper rooms hand in, so that this room never looks up.

    `functions` are those that one CPU may ask another to run, by name: cross-calls, stop_machine callbacks.
    `static_calls` are patched in at composition, as static_call() targets are. `guest` is what a guest does between a
    VM entry and the VM exit that ended it.
    """

    interrupts: Mapping[int, CpuFunction]
    nmi: CpuFunction
    functions: Mapping[str, CpuFunction]
    static_calls: Mapping[str, Callable[..., Awaitable[Any]]]
    guest: Callable[[VmxUnit, GuestExit], None]
    knobs: Mapping[str, Any]
    num_cpus: int

    def function_number(self, name: str) -> int:
        """The number that stands for a function in shared memory."""
        return list(self.functions).index(name)

    def function_named(self, number: int) -> tuple[str, CpuFunction]:
        """The function behind a number, with its name."""
        return list(self.functions.items())[number]


class Counters(msgspec.Struct):
    """Totals of one CPU."""

    vmread: int = 0
    vmwrite: int = 0
    vmread_errors: int = 0
    vmwrite_errors: int = 0
    entry_errors: int = 0
    vmptrld: int = 0
    vmclear: int = 0
    exits: int = 0
    ipis_sent: int = 0
    ipis_delivered: int = 0
    operations: int = 0


class LockRequest(msgspec.Struct):
    """A lock that a context of this CPU (`level`: 0 task, 1 interrupt, 2 NMI) asked for at Lamport time `clock`.

    It waits for the lock while `token` is (0, 0), and holds it then.
    """

    lock: str
    level: int
    clock: int
    token: tuple[int, int] = (0, 0)


class CpuCore:
    """State of the logical processor and of the kernel's control flow on it; `Cpu` adds the operations."""

    def __init__(
        self,
        number: int,
        vmx: VmxUnit,
        memory: PhysicalMemory,
        clock: LamportClock,
        world: World,
        kernel: Kernel,
        emit: Emit,
        *,
        trace: bool = False,
        quantum: int = 1,
    ) -> None:
        self.number = number
        self.vmx = vmx
        self.memory = memory
        self.clock = clock
        self.world = world
        self.kernel = kernel
        self.emit = emit
        self.trace = trace
        self.quantum = quantum
        self.budget = quantum
        self.apic = LocalApic()
        self.percpu: PerCpu = per_cpu(number)
        self.irqs_on = False
        self.preempt_count = 0
        self.need_resched = False
        self.contexts: list[str] = ["idle"]
        self.count = Counters()
        self.recent_loads: deque[tuple[int, int]] = deque(maxlen=WATCH_SLOTS)
        self.sleep_words = 1
        self.lives = 0
        """How often this CPU has come up, as its per-CPU word says; tells its processes apart."""
        self.waits_for: tuple[str, str] = ("", "")
        self.tokens: dict[str, tuple[int, int]] = {}
        self.grants: dict[int, tuple[int, int]] = {}
        self.requests: dict[int, LockRequest] = {}
        """What this CPU waits for or holds, by request number: what it tells a lock service that starts again."""
        self.next_request = 0
        self.warned: set[str] = set()
        self.irq_work: deque[CpuFunction] = deque()
        self.nmi_work: deque[CpuFunction] = deque()
        self.pmi_pending = False
        self.watchdog_turns = 0
        self.resched_point = False
        self._nmi_inject = str(kernel.knobs.get("nmi_inject", "off"))
        self._samples: Counter[str] = Counter()
        self.thread: Any = None

    @property
    def context(self) -> str:
        """Who runs: a thread's name, "irq" or "nmi"."""
        return self.contexts[-1]

    @property
    def level(self) -> int:
        """0 in a task, 1 in an interrupt handler, 2 in the NMI handler: the level of a lock request."""
        return {"irq": 1, "nmi": 2}.get(self.contexts[-1], 0)

    @property
    def in_atomic(self) -> bool:
        """Whether the code at hand may not sleep: preemption or interrupts off, or a handler."""
        return bool(self.preempt_count or self.level or not self.irqs_on)

    def record_context(self) -> dict[str, object]:
        """The fields that every record of a CPU has."""
        return {"ctx": self.contexts[-1], "irqs": int(self.irqs_on)}

    async def boundary(self) -> None:
        """Let events in: called after an operation's effect once the budget is used up."""
        self.count.operations += self.quantum
        self.budget = self.quantum
        await trap(Trap.BOUNDARY)

    async def give_way(self) -> None:
        """End of an operation: let events in if they may be due."""
        self.budget -= 1
        if self.budget <= 0:
            await self.boundary()

    def nmi_due(self, point: str) -> bool:
        """Pend a performance-counter NMI if the knob `nmi_inject` names this point, or by the count of `sampled`."""
        if self._nmi_inject == "off" or not (self._nmi_inject == point or self._sampled(point)):
            return False
        self.pmi_pending = True
        self.emit("nmi_pend", point=point)
        self.apic.accept_nmi()
        return True

    def _sampled(self, point: str) -> bool:
        """The deterministic sample: each point every `NMI_PERIODS` times that it is passed."""
        self._samples[point] += 1
        return self._nmi_inject == "sampled" and self._samples[point] % NMI_PERIODS[point] == 0

    def take_what_waits(self) -> None:
        """Look at the queue of cross-calls although no interrupt has come: whoever should have sent it has died."""
        if self.memory.load(self.percpu.call_single_queue)[0]:
            self.apic.accept(Vector.CALL_FUNCTION_SINGLE)

    def lock_granted(self, request: int, epoch: int, number: int) -> None:
        """The shell has a grant for this CPU."""
        self.grants[request] = (epoch, number)
        word = self.percpu.lock_grants
        self.memory.store(word, self.memory.load(word)[0] + 1, self.clock.tick())

    def give_lock_back(self, lock: str, token: tuple[int, int]) -> None:
        """Hold the lock no longer, and tell the service."""
        self.tokens.pop(lock, None)
        self.requests = {n: one for n, one in self.requests.items() if (one.lock, one.token) != (lock, token)}
        self.world.lock_release(lock, *token)

    def __repr__(self) -> str:
        return (
            f"<Cpu {self.number} in {self.context} vmcs={self.vmx.cur:#x} irqs={'on' if self.irqs_on else 'off'} "
            f"preempt={self.preempt_count} pending={sorted(self.apic.irr)}>"
        )
