"""The local APIC of one LP: what is pending, and in which order it is taken.

The IRR holds one bit per vector: a second interrupt of a vector that is still pending merges with the first, as on
the processor (SDM volume 3A, "Interrupt Acceptance for Fixed Interrupts"). One NMI is latched besides one being
handled.
"""

from __future__ import annotations

import enum


class Vector(enum.IntEnum):
    """Interrupt vectors of Linux (arch/x86/include/asm/irq_vectors.h)."""

    NMI = 0x02
    LOCAL_TIMER = 0xEC
    POSTED_INTR = 0xF2
    IRQ_WORK = 0xF6
    REBOOT = 0xF8
    CALL_FUNCTION_SINGLE = 0xFB
    CALL_FUNCTION = 0xFC
    RESCHEDULE = 0xFD


class LocalApic:
    """IRR and NMI latch."""

    __slots__ = ("in_nmi", "irr", "nmi_pending")

    def __init__(self) -> None:
        self.irr: set[int] = set()
        self.nmi_pending = False
        self.in_nmi = False

    def accept(self, vector: int) -> bool:
        """Set the vector's bit; True if it was set already."""
        coalesced = vector in self.irr
        self.irr.add(vector)
        return coalesced

    def accept_nmi(self) -> bool:
        """Latch an NMI; True if one was latched already."""
        coalesced = self.nmi_pending
        self.nmi_pending = True
        return coalesced

    def acknowledge(self) -> int:
        """Take the highest pending vector; raises ValueError if none is pending."""
        vector = max(self.irr)
        self.irr.discard(vector)
        return vector
