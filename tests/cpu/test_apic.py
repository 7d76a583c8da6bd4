"""The local APIC of one LP: pending bits merge, the highest vector goes first, one NMI is latched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu.apic import LocalApic, Vector


def test_a_second_interrupt_of_a_pending_vector_merges() -> None:
    """The IRR has one bit a vector, so two interrupts before it is taken are one."""
    apic = LocalApic()
    assert [apic.accept(0x40), apic.accept(0x40), apic.accept(0x41)] == [False, True, False]
    assert [apic.acknowledge(), apic.acknowledge()] == [0x41, 0x40]
    assert apic.irr == set()
    assert apic.accept(0x40) is False


def test_one_nmi_is_latched() -> None:
    """A second NMI merges with the latched one, also while one is being handled; interrupts do not count."""
    apic = LocalApic()
    apic.accept(2)
    assert [apic.accept_nmi(), apic.accept_nmi()] == [False, True]
    apic.nmi_pending, apic.in_nmi = False, True
    assert [apic.accept_nmi(), apic.accept_nmi()] == [False, True]
    assert apic.irr == {2}


def test_nothing_pending_cannot_be_acknowledged() -> None:
    """Acknowledging an empty IRR is an error of the caller."""
    with pytest.raises(ValueError, match="empty"):
        LocalApic().acknowledge()


def test_the_vectors_of_linux_are_in_their_order_of_priority() -> None:
    """A reschedule goes before cross-calls, which go before the reboot vector and posted interrupts."""
    apic = LocalApic()
    order = [Vector.RESCHEDULE, Vector.CALL_FUNCTION, Vector.CALL_FUNCTION_SINGLE, Vector.REBOOT, Vector.POSTED_INTR]
    for vector in sorted(order):
        apic.accept(vector)
    assert [apic.acknowledge() for _ in order] == order


@given(st.lists(st.one_of(st.integers(16, 255), st.none()), max_size=40))
def test_against_a_sorted_set(operations: list[int | None]) -> None:
    """Any row of interrupts and acknowledgements (None) behaves as a set of which the largest is taken."""
    apic, model = LocalApic(), set[int]()
    for vector in operations:
        if vector is not None:
            assert apic.accept(vector) == (vector in model)
            model.add(vector)
        elif model:
            assert apic.acknowledge() == max(model)
            model.remove(max(model))
    assert apic.irr == model
