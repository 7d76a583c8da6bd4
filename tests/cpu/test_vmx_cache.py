"""Each processor has its own copy of a VMCS from VMPTRLD to VMCLEAR, and memory what was last written back."""

from __future__ import annotations

import pytest

from bus.memory import PhysicalMemory
from cpu.vmx import (
    NO_VMCS,
    CodeMode,
    Field,
    LaunchState,
    Outcome,
    Status,
    Suspicion,
    VmxConfig,
    VmxMode,
    VmxUnit,
    find_suspicions,
)
from cpu.vmx.guests import named_fields

X0, X1, A, B = 0x1000, 0x2000, 0x3000, 0x4000
RIP = Field.GUEST_RIP


def processor(memory: PhysicalMemory, vmxon_region: int, config: VmxConfig | None = None) -> VmxUnit:
    """A processor in VMX root operation."""
    unit = VmxUnit(config or VmxConfig(), memory)
    unit.reset_to_vmx_ready()
    for page in (vmxon_region, A, B):
        memory.write32(page, unit.config.vmcs_revision_id)
    assert unit.vmxon(vmxon_region).ok
    return unit


@pytest.fixture
def two() -> tuple[VmxUnit, VmxUnit]:
    """Two processors in root operation over one memory; A and B are clear, with 1 in GUEST_RIP."""
    memory = PhysicalMemory.private(1 << 16)
    first, second = processor(memory, X0), processor(memory, X1)
    for page in (A, B):
        first.vmclear(page)
        first.vmptrld(page)
        first.vmwrite(RIP, 1)
        first.vmclear(page)
    return first, second


def launch(unit: VmxUnit) -> Outcome:
    """Fill in a valid guest, launch it, exit."""
    for field, value in named_fields(unit, "vmcall").items():
        assert unit.vmwrite(field, value).ok
    assert unit.vmlaunch().ok
    return unit.vm_exit(18, instruction_length=3)


def test_migration_with_vmclear_carries_the_data(two: tuple[VmxUnit, VmxUnit]) -> None:
    """VMCLEAR here, VMPTRLD there: the other processor sees every write."""
    first, second = two
    first.vmptrld(A)
    first.vmwrite(RIP, 2)
    first.vmclear(A)
    second.vmptrld(A)
    assert second.vmread(RIP).value == 2


def test_migration_without_vmclear_reads_stale_data(two: tuple[VmxUnit, VmxUnit]) -> None:
    """VMPTRLD there without VMCLEAR here succeeds and sees the old value."""
    first, second = two
    first.vmptrld(A)
    first.vmwrite(RIP, 2)
    assert second.vmptrld(A).ok
    assert second.vmread(RIP).value == 1


def test_two_processors_with_one_vmcs_diverge(two: tuple[VmxUnit, VmxUnit]) -> None:
    """Copies are private, and the VMCLEAR that comes last wins in memory."""
    first, second = two
    first.vmptrld(A)
    second.vmptrld(A)
    first.vmwrite(RIP, 2)
    second.vmwrite(RIP, 3)
    assert (first.vmread(RIP).value, second.vmread(RIP).value) == (2, 3)
    second.vmclear(A)
    first.vmclear(A)
    second.vmptrld(A)
    assert second.vmread(RIP).value == 2


def test_vmclear_elsewhere_does_not_flush_this_copy(two: tuple[VmxUnit, VmxUnit]) -> None:
    """VMCLEAR acts on the executing processor only: the other one keeps pointer, data and launch state."""
    first, second = two
    first.vmptrld(A)
    launch(first)
    assert second.vmclear(A).ok
    assert first.vmptrst().value == A
    assert first.vmresume().ok


def test_killed_processor_takes_its_copy_with_it(two: tuple[VmxUnit, VmxUnit]) -> None:
    """Memory keeps what was last written back when a processor disappears."""
    first, _ = two
    first.vmptrld(A)
    first.vmwrite(RIP, 2)
    memory = first.memory
    del first
    after = processor(memory, X0)
    after.vmptrld(A)
    assert after.vmread(RIP).value == 1


def test_switching_keeps_both_active(two: tuple[VmxUnit, VmxUnit]) -> None:
    """VMPTRLD of another VMCS writes nothing back and loses nothing."""
    first, _ = two
    first.vmptrld(A)
    first.vmwrite(RIP, 2)
    first.vmptrld(B)
    assert set(first.active) == {A, B}
    first.vmptrld(A)
    assert first.vmread(RIP).value == 2


def test_never_cleared_region_cannot_be_entered() -> None:
    """VMPTRLD of fresh memory succeeds, its launch state is unknown, VMLAUNCH and VMRESUME both fail."""
    unit = processor(PhysicalMemory.private(1 << 16), X0)
    assert unit.vmptrld(A).ok
    assert unit.active[A].launch is LaunchState.UNKNOWN
    assert (unit.vmlaunch().error, unit.vmresume().error) == (4, 5)


def test_vmxoff_without_vmclear_loses_the_vmcs(two: tuple[VmxUnit, VmxUnit]) -> None:
    """After VMXOFF and VMXON a VMCS that was still active gives error 6 to VMRESUME; VMCLEAR makes it usable again."""
    first, _ = two
    first.vmptrld(A)
    launch(first)
    assert first.vmxoff().ok and first.vmxon(X0).ok and first.vmptrld(A).ok
    assert first.vmresume().error == 6
    assert first.vmlaunch().error == 4
    assert first.vmread(RIP).value == 1
    assert first.vmclear(A).ok and first.vmptrld(A).ok
    launch(first)


@pytest.mark.parametrize("launch_knob", ["preserve", "clear"])
@pytest.mark.parametrize("scope", ["current_only", "all_active_on_lp"])
def test_seamret_of_the_pseamldr(two: tuple[VmxUnit, VmxUnit], launch_knob: str, scope: str) -> None:
    """The pointer is lost in every variant and the data reaches memory; `clear` also ends activity and launch state."""
    unit, _ = two
    for page in (B, A):
        unit.vmptrld(page)
        launch(unit)
        unit.vmwrite(RIP, 7)
    assert unit.seamret_pseamldr(launch_knob, scope) == A
    assert unit.cur == NO_VMCS and unit.current is None
    assert unit.vmread(RIP).status is Status.FAIL_INVALID
    cleared = {A} if scope == "current_only" else {A, B}
    assert set(unit.active) == ({A, B} - cleared if launch_knob == "clear" else {A, B})
    for page in (A, B):
        if page in cleared:
            assert 7 in memoryview(unit.memory.read(page, 4096)).cast("Q").tolist()
        unit.vmptrld(page)
        gone = launch_knob == "clear" and page in cleared
        assert unit.vmread(RIP).value == 7
        assert unit.active[page].launch is (LaunchState.CLEAR if gone else LaunchState.LAUNCHED)


def test_seamret_without_a_current_vmcs(two: tuple[VmxUnit, VmxUnit]) -> None:
    """With no current VMCS nothing is lost, but the wide scope still takes what is active."""
    unit, _ = two
    unit.vmptrld(A)
    unit.vmptrld(B)
    unit.vmclear(B)
    assert unit.seamret_pseamldr("clear", "current_only") == NO_VMCS
    assert set(unit.active) == {A}
    assert unit.seamret_pseamldr("clear", "all_active_on_lp") == NO_VMCS
    assert set(unit.active) == set()


def test_seamret_words_are_checked(two: tuple[VmxUnit, VmxUnit]) -> None:
    """A misspelt knob is an error, not a default."""
    with pytest.raises(ValueError, match="preserve"):
        two[0].seamret_pseamldr("kept", "current_only")


def test_seamcall_checks_in_order(two: tuple[VmxUnit, VmxUnit]) -> None:
    """#UD before the exit of a guest, the exit before #GP."""
    unit, _ = two
    unit.cpl = 3
    unit.code_mode = CodeMode.COMPATIBILITY
    assert unit.seamcall_check(0) == Outcome(Status.EXCEPTION, vector=6)
    unit.code_mode = CodeMode.LONG
    assert unit.seamcall_check(0) == Outcome(Status.EXCEPTION, vector=13)
    unit.cpl, unit.mov_ss_blocking = 0, True
    assert unit.seamcall_check(0) == Outcome(Status.EXCEPTION, vector=13)
    unit.mov_ss_blocking, unit.in_seam = False, True
    assert unit.seamcall_check(0) == Outcome(Status.EXCEPTION, vector=6)
    unit.in_seam = False
    unit.vmptrld(A)
    launch(unit)
    assert unit.vmresume().ok
    exited = unit.seamcall_check(0)
    assert exited is not None and exited.exit is not None
    assert (exited.exit.reason, exited.exit.instruction_length, unit.mode) == (76, 4, VmxMode.ROOT)
    assert unit.vmxoff().ok
    assert unit.seamcall_check(0) == Outcome(Status.EXCEPTION, vector=6)


def test_seamcall_needs_seamrr() -> None:
    """Without a valid SEAM range register SEAMCALL is #GP, in root operation."""
    unit = processor(PhysicalMemory.private(1 << 16), X0, VmxConfig(seamrr_mask=0))
    assert unit.seamcall_check(1 << 63) == Outcome(Status.EXCEPTION, vector=13)


def test_suspicions(two: tuple[VmxUnit, VmxUnit]) -> None:
    """What instructions accept and software must not do is found by looking at all processors."""
    first, second = two
    units = {0: first, 1: second}
    assert find_suspicions(units) == []
    first.vmptrld(A)
    second.vmptrld(A)
    first.vmptrld(X1)
    found = {(finding.pa, finding.suspicion): finding.cpus for finding in find_suspicions(units)}
    assert found == {
        (X1, Suspicion.NEVER_CLEARED): (0,),
        (X1, Suspicion.VMXON_ACTIVE): (0, 1),
        (A, Suspicion.ACTIVE_TWICE): (0, 1),
    }
    first.vmxoff()
    assert first.vmxon(X1).ok and first.vmptrld(B).ok
    assert first.vmxoff().ok and first.vmxon(X1).ok and first.vmptrld(B).ok
    assert {(finding.pa, finding.suspicion) for finding in find_suspicions(units)} == {
        (X1, Suspicion.VMXON_TWICE),
        (B, Suspicion.CORRUPTED),
    }
