"""A logical processor on the bench: the unit, a synthetic guest in it, and the interrupts that reach both.

It is the small machine behind `run_script`: between operations it runs 64-bit code at CPL 0 with interrupts enabled,
its interrupt handlers count and return, and after a SIPI it is back in that state at once.
"""

from __future__ import annotations

from collections.abc import Callable

from bus.memory import PhysicalMemory

from . import events
from .config import VmxConfig
from .controls import INTR_INFO_VALID, Activity
from .events import Signal
from .exit import NMI_EXIT_INFO
from .guests import step_at
from .lp import VmxMode
from .outcome import Outcome
from .steps import deliver, run_guest
from .unit import VmxUnit

DEVICE_VECTOR = 0x40
"""Vector of an external interrupt that nobody gave a number."""

_HOST_VECTORS = 32


class BenchProcessor:
    """One processor. `result` is the outcome of an operation that nobody waits for any more."""

    def __init__(self, config: VmxConfig, memory: PhysicalMemory) -> None:
        self.unit = VmxUnit(config, memory)
        self.unit.on_inject = self._inject
        self.result: Outcome | None = None
        self.nmi_count = 0
        self.irq_count = 0
        self._nmi_latched = False
        self._requested: set[int] = set()

    @property
    def answers(self) -> bool:
        """It executes the bench's code: not a guest, not shut down, not waiting for a SIPI."""
        return self.unit.mode is not VmxMode.NON_ROOT and self.unit.activity is Activity.ACTIVE

    def execute(self, instruction: Callable[[VmxUnit], Outcome], pending_irq: int | None = None) -> Outcome | None:
        """One instruction, and the guest that it enters, up to its exit. None if this processor does not come back.

        `pending_irq` is the vector of an interrupt that waits, with RFLAGS.IF = 0, while the instruction executes.
        """
        if not self.answers:
            return None
        if pending_irq is not None:
            self._requested.add(pending_irq)
        return self._finish(self._until_exit(instruction(self.unit)))

    def _finish(self, outcome: Outcome | None) -> Outcome | None:
        if not self.answers:
            return None
        self._take_host_events()
        return outcome

    def _until_exit(self, outcome: Outcome) -> Outcome | None:
        return self._run_guest() if self.unit.mode is VmxMode.NON_ROOT else outcome

    # Guest

    def _run_guest(self) -> Outcome | None:
        """The guest, and what is pending for it, until an exit, or until it waits and nothing it can take is left."""
        while True:
            waiting = self._pending_events()
            outcome = self._deliver_pending() or run_guest(self.unit, step_at, self._device_interrupt)
            if outcome is not None or waiting == self._pending_events():
                return outcome

    def _pending_events(self) -> tuple[bool, frozenset[int]]:
        return self._nmi_latched, frozenset(self._requested)

    def _deliver_pending(self) -> Outcome | None:
        """Offer what is pending to the guest, NMI first; the VM exit that it causes."""
        if self._nmi_latched:
            delivery = events.nmi(self.unit)
            self._nmi_latched = delivery.signal is Signal.PENDING
            if delivery.signal is not Signal.PENDING:
                return delivery.outcome or deliver(self.unit, NMI_EXIT_INFO)
        if self._requested:
            vector = max(self._requested)
            delivery = events.external_interrupt(self.unit, vector)
            if delivery.acknowledged or delivery.signal is Signal.GUEST:
                self._requested.discard(vector)
            if delivery.signal is Signal.GUEST:
                return deliver(self.unit, INTR_INFO_VALID | vector)
            return delivery.outcome
        return None

    def _device_interrupt(self) -> Outcome | None:
        self._requested.add(DEVICE_VECTOR)
        return self._deliver_pending()

    def _inject(self, info: int) -> Outcome | None:
        return deliver(self.unit, info)

    # Events

    def receive(self, kind: str, vector: int) -> None:
        """An interprocessor interrupt arrives: kind init, sipi, nmi or fixed."""
        if kind == "init":
            self._init()
        elif kind == "sipi":
            self._sipi(vector)
        elif self.unit.activity is not Activity.WAIT_FOR_SIPI:
            if kind == "nmi":
                self._nmi_latched = True
            elif vector >= _HOST_VECTORS:
                self._requested.add(vector)
        if self.unit.mode is VmxMode.NON_ROOT:
            self.result = self._finish(self._run_guest())
        elif self.answers:
            self._take_host_events()

    def _init(self) -> None:
        delivery = events.init(self.unit)
        if delivery.signal is Signal.RESET:
            self._requested.clear()
            self._nmi_latched = False
        elif delivery.outcome is not None:
            self.result = delivery.outcome

    def _sipi(self, vector: int) -> None:
        delivery = events.sipi(self.unit, vector)
        if delivery.signal is Signal.STARTED:
            self.unit.enter_long_mode()
        elif delivery.outcome is not None:
            self.result = delivery.outcome

    def iret(self) -> None:
        """Something returned by IRET, which ends the blocking of NMIs."""
        self.unit.nmi_blocked = False
        if self.answers:
            self._take_host_events()

    def _take_host_events(self) -> None:
        self.irq_count += len(self._requested)
        if self._requested:
            self._requested.clear()
            self.unit.nmi_blocked = False
        if self._nmi_latched and events.nmi(self.unit).signal is Signal.HOST:
            self._nmi_latched = False
            self.nmi_count += 1
            self.unit.nmi_blocked = False
