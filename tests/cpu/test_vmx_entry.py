"""VM entry checks, VM exits, registers, and the events that reach a processor, on the unit."""

from __future__ import annotations

from typing import Any

import pytest

from bus.memory import PhysicalMemory
from cpu.vmx import Activity, CodeMode, Field, Msr, Outcome, Signal, Status, VmxConfig, VmxMode, VmxUnit
from cpu.vmx import events as event
from cpu.vmx.exit import VmExit
from cpu.vmx.guests import host_fields, named_fields

X, A, S = 0x1000, 0x3000, 0x5000
def unit_with_guest(name: str = "vmcall", config: VmxConfig | None = None) -> VmxUnit:
    """Root operation; the guest `name` in the current VMCS."""
    memory = PhysicalMemory.private(1 << 20)
    unit = VmxUnit(config or VmxConfig(), memory)
    unit.reset_to_vmx_ready()
    for page in (X, A):
        memory.write32(page, unit.config.vmcs_revision_id)
    assert unit.vmxon(X).ok and unit.vmclear(A).ok and unit.vmptrld(A).ok
    for field, value in named_fields(unit, name).items():
        assert unit.vmwrite(field, value).ok
    return unit


def exit_of(outcome: Outcome | None) -> tuple[int, int]:
    """Reason and qualification of a VM exit."""
    assert outcome is not None and outcome.exit is not None
    return outcome.exit.reason, outcome.exit.qualification


def test_exit_loads_host_state_and_keeps_the_rest() -> None:
    """After an exit: root operation at HOST_RIP, RFLAGS = 2, injection field invalid, launched, `cur` unchanged."""
    unit = unit_with_guest()
    unit.vmwrite(Field.VM_INSTRUCTION_ERROR, 12)
    unit.vmwrite(Field.VMENTRY_INTR_INFO, 0x8000_0306)
    assert unit.vmlaunch().ok
    assert unit.mode is VmxMode.NON_ROOT
    unit.guest_write(Field.GUEST_RIP, 0x1234)
    details = VmExit(idt_vectoring=0x8000_0306, guest_linear=5, guest_physical=6)
    outcome = unit.vm_exit(48, qualification=1, instruction_length=2, details=details)
    assert outcome.status is Status.VM_EXIT
    assert (unit.mode, unit.cpl, unit.code_mode, unit.cur) == (VmxMode.ROOT, 0, CodeMode.LONG, A)
    host = host_fields(unit)
    assert (unit.rip, unit.rsp, unit.rflags) == (host[Field.HOST_RIP], host[Field.HOST_RSP], 2)
    expected = {
        Field.EXIT_REASON: 48,
        Field.EXIT_QUALIFICATION: 1,
        Field.EXIT_INSTRUCTION_LENGTH: 2,
        Field.IDT_VECTORING_INFO: 0x8000_0306,
        Field.GUEST_LINEAR_ADDRESS: 5,
        Field.GUEST_PHYSICAL_ADDRESS: 6,
        Field.VMENTRY_INTR_INFO: 0x306,
        Field.VM_INSTRUCTION_ERROR: 12,
        Field.GUEST_RIP: 0x1234,
    }
    assert {field: unit.vmread(field).value for field in expected} == expected
    assert unit.vmlaunch().error == 4


def test_vm_exit_needs_a_guest() -> None:
    """Calling for an exit outside non-root operation is a mistake of the caller."""
    with pytest.raises(RuntimeError, match="non-root"):
        unit_with_guest().vm_exit(18)


def test_failed_entry_continues_at_the_host() -> None:
    """A VM entry that fails on guest state loads host state, and writes exit reason and qualification only."""
    unit = unit_with_guest("bad_rflags")
    unit.vmwrite(Field.EXIT_INSTRUCTION_LENGTH, 9)
    outcome = unit.vmlaunch()
    assert exit_of(outcome) == (0x8000_0021, 0)
    assert unit.rip == host_fields(unit)[Field.HOST_RIP]
    assert unit.vmread(Field.EXIT_INSTRUCTION_LENGTH).value == 9


# field, value, what VMLAUNCH says: an error number, or the exit qualification of reason 33
CHECKS: list[tuple[Field, int, str]] = [
    (Field.PRIMARY_PROC_CONTROLS, 0, "7"),
    (Field.PRIMARY_VMEXIT_CONTROLS, 0, "7"),
    (Field.VMENTRY_CONTROLS, 0xFFFF_FFFF, "7"),
    (Field.PIN_BASED_CONTROLS, 0x16 | 1 << 5, "7"),
    (Field.PRIMARY_PROC_CONTROLS, 0x0400_6172 | 1 << 22, "7"),
    (Field.PRIMARY_PROC_CONTROLS, 0x0400_6172 | 1 << 20, "ok"),
    (Field.PRIMARY_VMEXIT_CONTROLS, 0x0003_6DFB | 1 << 9 | 1 << 22, "7"),
    (Field.PRIMARY_VMEXIT_CONTROLS, 0x0003_6DFB, "8"),
    (Field.VMEXIT_MSR_STORE_COUNT, 1, "ok"),
    (Field.VMENTRY_INTR_INFO, 0x8000_0202, "ok"),
    (Field.VMENTRY_INTR_INFO, 0x8000_0203, "7"),
    (Field.VMENTRY_INTR_INFO, 0x8000_0320, "7"),
    (Field.VMENTRY_INTR_INFO, 0x8000_1306, "7"),
    (Field.VMENTRY_INTR_INFO, 0x8000_0040, "0"),
    (Field.HOST_CR3, 1 << 52, "8"),
    (Field.HOST_CS_SELECTOR, 0, "8"),
    (Field.HOST_CS_SELECTOR, 0xB, "8"),
    (Field.HOST_SS_SELECTOR, 0, "ok"),
    (Field.HOST_FS_BASE, 1 << 47, "8"),
    (Field.HOST_IA32_SYSENTER_EIP, 1 << 63, "8"),
    (Field.GUEST_CR4, 0x20, "0"),
    (Field.GUEST_CR3, 1 << 52, "0"),
    (Field.GUEST_RIP, 1 << 47, "ok"),
    (Field.GUEST_RIP, 1 << 48, "0"),
    (Field.GUEST_RFLAGS, 0x2 | 1 << 15, "0"),
    (Field.GUEST_RFLAGS, 0x2 | 1 << 17, "0"),
    (Field.GUEST_CS_ACCESS_RIGHTS, 0xA093, "0"),
    (Field.GUEST_TR_ACCESS_RIGHTS, 0x83, "0"),
    (Field.GUEST_TR_ACCESS_RIGHTS, 0x1_008B, "0"),
    (Field.GUEST_SS_SELECTOR, 0x13, "0"),
    (Field.GUEST_DS_ACCESS_RIGHTS, 0x1_0000, "ok"),
    (Field.GUEST_INTERRUPTIBILITY_STATE, 1, "0"),
    (Field.GUEST_INTERRUPTIBILITY_STATE, 3, "0"),
    (Field.GUEST_INTERRUPTIBILITY_STATE, 2, "ok"),
    (Field.GUEST_INTERRUPTIBILITY_STATE, 1 << 5, "0"),
    (Field.GUEST_ACTIVITY_STATE, Activity.HLT, "ok"),
    (Field.VMCS_LINK_POINTER, S, "ok"),
    (Field.VMCS_LINK_POINTER, S + 0x1000, "4"),
    (Field.VMCS_LINK_POINTER, 1 << 52, "4"),
    (Field.VMCS_LINK_POINTER, A, "4"),
    (Field.GUEST_IDTR_LIMIT, 0x1_0000, "0"),
]


@pytest.mark.parametrize(
    ("field", "value", "verdict"), CHECKS, ids=[f"{field.name}-{value:x}" for field, value, _ in CHECKS]
)
@pytest.mark.parametrize("entered_before", [False, True])
def test_entry_check(field: Field, value: int, verdict: str, entered_before: bool) -> None:
    """One changed field: the entry is refused, or not, in the same way on the first entry and on later ones."""
    unit = unit_with_guest()
    unit.memory.write32(S, unit.config.vmcs_revision_id)
    if entered_before:
        assert unit.vmlaunch().ok
        unit.vm_exit(18)
    unit.vmwrite(field, value)
    outcome = unit.vmresume() if entered_before else unit.vmlaunch()
    if outcome.exit is not None:
        assert outcome.exit.reason == 0x8000_0021
        assert str(outcome.exit.qualification) == verdict
    else:
        assert (str(outcome.error) if outcome.error else "ok") == verdict


def test_translation_controls() -> None:
    """EPT wants a good EPT pointer, VPID a VPID, an unrestricted guest EPT."""
    unit = unit_with_guest("ept_read")
    secondary = unit.vmread(Field.SECONDARY_PROC_CONTROLS).value
    for field, value in (
        (Field.EPT_POINTER, 0x4000_0018),
        (Field.EPT_POINTER, 0x4000_001E),
        (Field.EPT_POINTER, 0x4000_0000 | 3 << 3 | 6),
    ):
        unit.vmwrite(field, value)
    assert unit.vmlaunch().ok
    unit.vm_exit(18)
    for controls, eptp, error in (
        (secondary, 0x4000_0000 | 3 << 3 | 5, 7),
        (secondary, 0x4000_0000 | 2 << 3 | 6, 7),
        (secondary, 0x4000_0000 | 3 << 3 | 6 | 1 << 9, 7),
        (secondary, 1 << 52 | 3 << 3 | 6, 7),
        (secondary | 1 << 5, 0x4000_0000 | 3 << 3 | 6, 7),
        (secondary & ~2 | 1 << 7, 0, 7),
    ):
        unit.vmwrite(Field.SECONDARY_PROC_CONTROLS, controls)
        unit.vmwrite(Field.EPT_POINTER, eptp)
        assert unit.vmresume().error == error


def test_msr_areas() -> None:
    """Entry loads MSRs or fails with the number of the bad entry; a bad exit list is a VMX abort and a shutdown."""
    unit = unit_with_guest()
    unit.memory.write(0x8000, bytes.fromhex("77020000 00000000 0606060606060606".replace(" ", "")))
    unit.memory.write(0x8010, bytes.fromhex("00010000 00000000 0000000000000000".replace(" ", "")))
    unit.vmwrite(Field.VMENTRY_MSR_LOAD_ADDR, 0x8000)
    unit.vmwrite(Field.VMENTRY_MSR_LOAD_COUNT, 2)
    assert exit_of(unit.vmlaunch()) == (0x8000_0022, 2)
    unit.vmwrite(Field.VMENTRY_MSR_LOAD_COUNT, 1)
    unit.vmwrite(Field.VMEXIT_MSR_LOAD_ADDR, 0x8010)
    unit.vmwrite(Field.VMEXIT_MSR_LOAD_COUNT, 1)
    assert unit.vmlaunch().ok
    assert unit.rdmsr(Msr.IA32_PAT).exit is not None
    assert unit.activity is Activity.SHUTDOWN
    assert unit.memory.read32(A + 4) == 4


def test_stored_msrs() -> None:
    """The VM-exit MSR-store area receives the values."""
    unit = unit_with_guest()
    unit.wrmsr(Msr.IA32_TSC_AUX, 77)
    unit.memory.write(0x8000, Msr.IA32_TSC_AUX.to_bytes(4, "little"))
    unit.vmwrite(Field.VMEXIT_MSR_STORE_ADDR, 0x8000)
    unit.vmwrite(Field.VMEXIT_MSR_STORE_COUNT, 1)
    assert unit.vmlaunch().ok
    unit.vm_exit(18)
    assert unit.memory.read64(0x8008) == 77
    assert unit.activity is Activity.ACTIVE


def test_vmcs_shadowing() -> None:
    """With shadowing a guest's VMREAD and VMWRITE reach the linked VMCS, unless the bitmaps or bit 15 send them out."""
    unit = unit_with_guest()
    unit.memory.write32(S, unit.config.vmcs_revision_id | 1 << 31)
    assert unit.vmclear(S).ok and unit.vmptrld(A).ok
    primary = unit.vmread(Field.PRIMARY_PROC_CONTROLS).value
    unit.vmwrite(Field.PRIMARY_PROC_CONTROLS, primary | 1 << 31)
    unit.vmwrite(Field.SECONDARY_PROC_CONTROLS, 1 << 14)
    unit.vmwrite(Field.VMREAD_BITMAP_ADDR, 0x8000)
    unit.vmwrite(Field.VMWRITE_BITMAP_ADDR, 0x9000)
    unit.vmwrite(Field.VMCS_LINK_POINTER, S)
    unit.memory.write(0x9000 + Field.GUEST_RSP // 8, bytes([1 << Field.GUEST_RSP % 8]))
    assert unit.vmlaunch().ok
    assert S in unit.active
    assert unit.vmwrite(Field.GUEST_RIP, 42).ok
    assert unit.vmread(Field.GUEST_RIP).value == 42
    assert unit.vmread(0x7FFE).error == 12
    assert unit.vmread(Field.VM_INSTRUCTION_ERROR).value == 12
    assert exit_of(unit.vmwrite(Field.GUEST_RSP, 1)) == (25, 0)
    assert unit.vmread(Field.GUEST_RIP).value != 42
    assert unit.vmresume().ok
    assert exit_of(unit.vmread(0x8000)) == (23, 0)
    assert unit.vmptrld(S).ok
    assert unit.vmread(Field.GUEST_RIP).value == 42


def test_registers_of_a_guest() -> None:
    """A guest's RDMSR exits unless the bitmap lets it through; MOV to CR4 exits where the host owns a changed bit."""
    unit = unit_with_guest()
    primary = unit.vmread(Field.PRIMARY_PROC_CONTROLS).value
    unit.vmwrite(Field.PRIMARY_PROC_CONTROLS, primary | 1 << 28)
    unit.vmwrite(Field.MSR_BITMAP_ADDR, 0x8000)
    unit.memory.write(0x8000 + 2048 + 1024, b"\xff" * 1024)
    unit.vmwrite(Field.CR4_GUEST_HOST_MASK, 1 << 13)
    unit.vmwrite(Field.CR4_READ_SHADOW, 0)
    assert unit.vmlaunch().ok
    assert unit.rdmsr(Msr.IA32_EFER).ok
    assert unit.mov_cr4(0x20 | 1 << 7).ok
    assert unit.guest_read(Field.GUEST_CR4) == 0x2020 | 1 << 7
    assert exit_of(unit.mov_cr4(0x2020)) == (28, 4)
    assert unit.vmresume().ok
    assert exit_of(unit.wrmsr(Msr.IA32_EFER, 0)) == (32, 0)


def test_msrs_outside() -> None:
    """Capability MSRs are read-only and may be missing; other MSRs refuse what would fault."""
    unit = VmxUnit(VmxConfig().with_caps({0x492: None}), PhysicalMemory.private(4096))
    assert unit.rdmsr(0x480).value == unit.config.basic
    assert unit.rdmsr(0x492).vector == 13
    assert unit.wrmsr(0x480, unit.config.basic).vector == 13
    assert unit.wrmsr(Msr.IA32_PAT, 2).vector == 13
    assert unit.wrmsr(Msr.IA32_FS_BASE, 1 << 47).vector == 13
    assert unit.wrmsr(Msr.IA32_FEATURE_CONTROL, 1 << 3).vector == 13
    assert unit.wrmsr(Msr.IA32_FEATURE_CONTROL, 4).ok
    assert unit.wrmsr(Msr.IA32_FEATURE_CONTROL, 5).ok
    assert unit.wrmsr(Msr.IA32_FEATURE_CONTROL, 5).vector == 13
    assert unit.wrmsr(Msr.IA32_EFER, 0).vector == 13
    unit.cpl = 3
    assert unit.rdmsr(0x480).vector == 13


def test_control_registers_outside_vmx_operation() -> None:
    """CR4.VMXE and CR0.NE move freely outside VMX operation; what long mode needs, and reserved bits, do not."""
    unit = VmxUnit(VmxConfig(), PhysicalMemory.private(4096))
    assert unit.mov_cr4(unit.cr4 | 1 << 13).ok
    assert unit.mov_cr4(unit.cr4 & ~(1 << 13)).ok
    assert unit.mov_cr0(unit.cr0 & ~(1 << 5)).ok
    assert unit.mov_cr0(unit.cr0 & ~(1 << 31)).vector == 13
    assert unit.mov_cr0(unit.cr0 | 1 << 32).vector == 13
    assert unit.mov_cr0(unit.cr0 | 1 << 29).vector == 13
    assert unit.mov_cr4(unit.cr4 & ~(1 << 5)).vector == 13
    assert unit.mov_cr4(unit.cr4 | 1 << 30).vector == 13


@pytest.mark.parametrize(
    ("kind", "eptp", "error"),
    [(1, 0x1000 | 3 << 3 | 6, 0), (1, 0x1000, 28), (2, 0, 0), (3, 0, 28), (1 << 32 | 2, 0, 28)],
)
def test_invept_operands(kind: int, eptp: int, error: int) -> None:
    """INVEPT takes types 1 and 2 and, for type 1, an EPT pointer that VM entry would take."""
    assert unit_with_guest().invept(kind, eptp).error == error


@pytest.mark.parametrize(
    ("kind", "low", "linear", "error"),
    [
        (0, 1, 0x1000, 0),
        (0, 1, 1 << 47, 28),
        (0, 0, 0, 28),
        (1, 1, 1 << 47, 0),
        (2, 0, 0, 0),
        (2, 1 << 16, 0, 28),
        (3, 0, 0, 28),
        (3, 5, 0, 0),
        (4, 1, 0, 28),
    ],
)
def test_invvpid_operands(kind: int, low: int, linear: int, error: int) -> None:
    """INVVPID checks type, reserved descriptor bits, VPID and address."""
    assert unit_with_guest().invvpid(kind, low, linear).error == error


def test_invalidations_may_be_missing() -> None:
    """Without the capability INVEPT and INVVPID are #UD."""
    unit = unit_with_guest(config=VmxConfig().with_caps({0x48C: None}))
    assert (unit.invept(2, 0).vector, unit.invvpid(2, 0).vector) == (6, 6)


@pytest.mark.parametrize(
    ("call", "before"),
    [
        (lambda unit: unit.vmptrld(1, unmapped=True), 0),
        (lambda unit: unit.vmclear(1, unmapped=True), 0),
        (lambda unit: unit.vmptrst(unmapped=True), 0),
        (lambda unit: unit.vmwrite(0x7FFE, 0, unmapped=True), 0),
        (lambda unit: unit.vmread(Field.GUEST_RIP, unmapped=True), 0),
        (lambda unit: unit.vmread(0x7FFE, unmapped=True), 12),
        (lambda unit: unit.invept(1, 0, unmapped=True), 0),
        (lambda unit: unit.invept(0, 0, unmapped=True), 28),
        (lambda unit: unit.invvpid(1, 1 << 16, unmapped=True), 0),
        (lambda unit: unit.vmxon(1, unmapped=True), 15),
    ],
)
def test_where_an_unmapped_operand_faults(call: Any, before: int) -> None:
    """#PF comes where the operand is accessed: after some checks, before others."""
    outcome = call(unit_with_guest())
    assert (outcome.error, outcome.vector) == ((before, 0) if before else (0, 14))


# Events


def test_init_at_entry_and_timer_priority() -> None:
    """A pending INIT is taken at the next entry, before a preemption timer that is already zero."""
    unit = unit_with_guest("preempt_zero")
    assert event.init(unit).signal is Signal.PENDING
    assert event.init(unit).signal is Signal.PENDING
    assert exit_of(unit.vmlaunch()) == (3, 0)
    assert not unit.init_pending
    assert exit_of(unit.vmresume()) == (52, 0)


def test_init_waits_while_a_guest_waits_for_sipi() -> None:
    """INIT is blocked in wait-for-SIPI and stays pending over the exit that the SIPI causes."""
    unit = unit_with_guest("wait_sipi")
    assert unit.vmlaunch().ok
    assert event.init(unit).signal is Signal.PENDING
    assert event.nmi(unit).signal is Signal.PENDING
    assert event.external_interrupt(unit, 64).signal is Signal.PENDING
    assert exit_of(event.sipi(unit, 0x12).outcome) == (4, 0x12)
    assert unit.init_pending


def test_reset_and_init_differ_in_feature_control() -> None:
    """INIT keeps IA32_FEATURE_CONTROL, RESET clears it; both end VMX operation state."""
    unit = unit_with_guest()
    assert unit.vmxoff().ok
    assert event.init(unit).signal is Signal.RESET
    assert (unit.feature_control, unit.activity, unit.code_mode) == (5, Activity.WAIT_FOR_SIPI, CodeMode.REAL)
    assert event.nmi(unit).signal is Signal.DROPPED
    assert event.sipi(unit, 0x9A).signal is Signal.STARTED
    assert (unit.rip, unit.cr4 & 1 << 13) == (0x9A000, 0)
    assert event.sipi(unit, 0x9A).signal is Signal.DROPPED
    unit.reset()
    assert (unit.feature_control, unit.code_mode) == (0, CodeMode.LONG)


def test_acknowledge_on_exit() -> None:
    """With acknowledge-on-exit the vector is in the exit information and out of the APIC."""
    unit = unit_with_guest("extint_ack")
    assert unit.vmlaunch().ok
    delivery = event.external_interrupt(unit, 0x51)
    assert delivery.acknowledged
    assert unit.vmread(Field.EXIT_INTR_INFO).value == 0x8000_0051


def test_virtual_nmis_ignore_guest_blocking() -> None:
    """NMI blocking in the guest's interruptibility stops an NMI exit only without virtual NMIs."""
    for virtual, signal in ((0, Signal.PENDING), (1 << 5, Signal.EXIT)):
        unit = unit_with_guest("spin_nmi")
        unit.vmwrite(Field.PIN_BASED_CONTROLS, 0x1E | virtual)
        unit.vmwrite(Field.GUEST_INTERRUPTIBILITY_STATE, 8)
        assert unit.vmlaunch().ok
        assert event.nmi(unit).signal is signal


def test_nmi_window() -> None:
    """NMI-window exiting exits as soon as no virtual NMI is blocked."""
    unit = unit_with_guest()
    unit.vmwrite(Field.PIN_BASED_CONTROLS, 0x1E | 1 << 5)
    unit.vmwrite(Field.PRIMARY_PROC_CONTROLS, unit.vmread(Field.PRIMARY_PROC_CONTROLS).value | 1 << 22)
    unit.vmwrite(Field.GUEST_INTERRUPTIBILITY_STATE, 8)
    assert unit.vmlaunch().ok
    unit.vm_exit(18)
    unit.vmwrite(Field.GUEST_INTERRUPTIBILITY_STATE, 0)
    assert exit_of(unit.vmresume()) == (8, 0)


def test_saved_preemption_timer() -> None:
    """With "save preemption timer" the field is 0 after the timer's exit, else it keeps its value."""
    for save, left in ((0, 1000), (1 << 22, 0)):
        unit = unit_with_guest("preempt_spin")
        unit.vmwrite(Field.PRIMARY_VMEXIT_CONTROLS, unit.vmread(Field.PRIMARY_VMEXIT_CONTROLS).value | save)
        assert unit.vmlaunch().ok
        unit.vm_exit(52)
        assert unit.vmread(Field.VMX_PREEMPTION_TIMER_VALUE).value == left
