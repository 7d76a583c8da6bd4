"""Events that reach a logical processor from outside: INIT, SIPI, NMI, external interrupts (Intel SDM vol. 3C, "Other
Causes of VM Exits" and "Blocking of INIT and other signals").

The unit decides what an event means in its present state; whoever owns the interrupt controller keeps what stays
pending, and runs handlers.
"""

from __future__ import annotations

import enum

import msgspec

from .controls import INTR_INFO_VALID, Activity, Exit, Interruptibility, Pin, Rflags
from .errors import ExitReason
from .exit import NMI_EXIT_INFO
from .fields import Field
from .lp import VmxMode
from .outcome import Outcome
from .unit import VmxUnit


class Signal(enum.StrEnum):
    """What becomes of an event: HOST or GUEST takes it through its IDT, RESET and STARTED are done already."""

    HOST = "host"
    GUEST = "guest"
    EXIT = "exit"
    PENDING = "pending"
    DROPPED = "dropped"
    RESET = "reset"
    STARTED = "started"


class Delivery(msgspec.Struct, frozen=True):
    """An event's fate; `outcome` is the VM exit of EXIT. `acknowledged`: the exit took an interrupt out of the APIC."""

    signal: Signal
    outcome: Outcome | None = None
    acknowledged: bool = False


_HOST = Delivery(Signal.HOST)
_GUEST = Delivery(Signal.GUEST)
_PENDING = Delivery(Signal.PENDING)
_DROPPED = Delivery(Signal.DROPPED)


def _exit(outcome: Outcome, acknowledged: bool = False) -> Delivery:
    return Delivery(Signal.EXIT, outcome, acknowledged)


def init(unit: VmxUnit) -> Delivery:
    """INIT: resets a processor outside VMX operation, waits in root operation, exits a guest."""
    if unit.mode is VmxMode.OUTSIDE:
        unit.take_init()
        return Delivery(Signal.RESET)
    if unit.mode is VmxMode.NON_ROOT and unit.guest_read(Field.GUEST_ACTIVITY_STATE) != Activity.WAIT_FOR_SIPI:
        return _exit(unit.vm_exit(ExitReason.INIT))
    unit.init_pending = True
    return _PENDING


def sipi(unit: VmxUnit, vector: int) -> Delivery:
    """Start-up IPI: only a processor or a guest that waits for one notices it."""
    if unit.mode is VmxMode.OUTSIDE and unit.activity is Activity.WAIT_FOR_SIPI:
        unit.activity = Activity.ACTIVE
        unit.rip = vector << 12
        return Delivery(Signal.STARTED)
    if unit.mode is VmxMode.NON_ROOT and unit.guest_read(Field.GUEST_ACTIVITY_STATE) == Activity.WAIT_FOR_SIPI:
        return _exit(unit.vm_exit(ExitReason.SIPI, qualification=vector))
    return _DROPPED


def nmi(unit: VmxUnit) -> Delivery:
    """NMI. HOST: NMIs are blocked until the handler's IRET, when the caller clears `nmi_blocked`."""
    if unit.mode is not VmxMode.NON_ROOT:
        if unit.activity is Activity.WAIT_FOR_SIPI:
            return _DROPPED
        if unit.nmi_blocked:
            return _PENDING
        unit.nmi_blocked = True
        return _HOST
    pin = unit.guest_read(Field.PIN_BASED_CONTROLS)
    blocking = unit.guest_read(Field.GUEST_INTERRUPTIBILITY_STATE)
    blocked = blocking & Interruptibility.BLOCKING_BY_NMI and not pin & Pin.VIRTUAL_NMIS
    if blocked or unit.guest_read(Field.GUEST_ACTIVITY_STATE) == Activity.WAIT_FOR_SIPI:
        return _PENDING
    if pin & Pin.NMI_EXITING:
        return _exit(unit.vm_exit(ExitReason.EXCEPTION_OR_NMI, intr_info=NMI_EXIT_INFO))
    unit.guest_write(Field.GUEST_INTERRUPTIBILITY_STATE, blocking | Interruptibility.BLOCKING_BY_NMI)
    return _GUEST


def external_interrupt(unit: VmxUnit, vector: int) -> Delivery:
    """An interrupt that the local APIC offers. HOST: the caller's RFLAGS.IF decides when it is taken."""
    if unit.mode is not VmxMode.NON_ROOT:
        return _HOST
    if unit.guest_read(Field.GUEST_ACTIVITY_STATE) not in (Activity.ACTIVE, Activity.HLT):
        return _PENDING
    if unit.guest_read(Field.PIN_BASED_CONTROLS) & Pin.EXTERNAL_INTERRUPT_EXITING:
        acknowledge = unit.guest_read(Field.PRIMARY_VMEXIT_CONTROLS) & Exit.ACKNOWLEDGE_INTERRUPT != 0
        info = INTR_INFO_VALID | vector if acknowledge else 0
        return _exit(unit.vm_exit(ExitReason.EXTERNAL_INTERRUPT, intr_info=info), acknowledge)
    blocking = Interruptibility.BLOCKING_BY_STI | Interruptibility.BLOCKING_BY_MOV_SS
    open_window = unit.guest_read(Field.GUEST_RFLAGS) & Rflags.IF
    if not open_window or unit.guest_read(Field.GUEST_INTERRUPTIBILITY_STATE) & blocking:
        return _PENDING
    return _GUEST
