"""Conformance rows 1 to 17: SEAMCALL and SEAMRET as instructions, on machines of two CPUs; what they leave of VMX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from cpu.core import SeamReply
from cpu.cpu import Cpu
from cpu.layout import BUFFERS, task_vmcs
from cpu.vmx import CodeMode, Field, LaunchState, Outcome, Status, VmxMode
from cpu.vmx.guests import named_fields
from kvm.stepped import Stepped
from seamldr.seamextend import SeamExtend
from seamldr.status import SeamldrLeaf, SeamldrStatus
from seamldr.tdx_leaves import TdhLeaf

INFO_PAGE = BUFFERS + 0x10_0000
ALL_ONES = 0xFFFF_FFFF_FFFF_FFFF
MODULE_HV = 0x8900_0001_0000_0000
UPDATE_VERSION = 0x0800_0001_0000_0005
VMCS = task_vmcs(0)
UD, GP = Outcome(Status.EXCEPTION, vector=6), Outcome(Status.EXCEPTION, vector=13)
BOTH_KINDS = pytest.mark.parametrize("leaf", [SeamldrLeaf.INFO, TdhLeaf.TDH_SYS_RD], ids=["p-seamldr", "module"])


def registers(**named: int) -> tuple[int, ...]:
    """The thirteen registers of a SEAMCALL; those that nobody names hold a pattern."""
    names = ("rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rbx", "rdi", "rsi")
    return tuple(named.get(name, 0x1111 * (index + 1)) for index, name in enumerate(names))


ARGUMENTS = registers(rcx=INFO_PAGE, rdx=UPDATE_VERSION)


class Machine(Stepped):
    """Two CPUs in VMX root operation with a module that runs."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__("none", cpus=2, **knobs)

    def seamcall(self, number: int, leaf: int, arguments: tuple[int, ...] = ARGUMENTS) -> SeamReply | Outcome:
        """One SEAMCALL of one CPU, which steps alone until it has its answer."""
        thread = self.start(lambda cpu: cpu.seamcall(leaf, arguments, name="call"), number)
        while not any(ended is thread for _, ended in self.machine.ended):
            self.machine.step(number)
        result: SeamReply | Outcome = thread.result
        return result

    def enter(self, number: int, leaf: int) -> None:
        """A SEAMCALL up to where the CPU is inside SEAM."""
        self.start(lambda cpu: cpu.seamcall(leaf, ARGUMENTS, name="call"), number)
        while self.machine.waiting_for(number) is None:
            self.machine.step(number)

    def seam_state(self) -> bytes:
        """All that SEAM software and the processor's gate remember."""
        return msgspec.msgpack.encode((self.seam.loader.state, self.seam.gate.state))

    def load_guest(self, number: int = 0) -> None:
        """Make a VMCS with a valid guest current on a CPU; its launch state is clear."""
        unit = self.cpu(number).vmx
        self.memory.write32(VMCS, unit.config.vmcs_revision_id)
        assert unit.vmclear(VMCS).ok and unit.vmptrld(VMCS).ok
        assert all(unit.vmwrite(field, value).ok for field, value in named_fields(unit, "vmcall").items())

    def run_guest(self, number: int = 0) -> None:
        """Load a guest, launch it and let it exit: its VMCS is current and launched."""
        self.load_guest(number)
        unit = self.cpu(number).vmx
        assert unit.vmlaunch().ok
        unit.vm_exit(18, instruction_length=3)


def outside_vmx(cpu: Cpu) -> None:
    assert cpu.vmx.vmxoff().ok


def compatibility_mode(cpu: Cpu) -> None:
    cpu.vmx.code_mode = CodeMode.COMPATIBILITY


def in_seam(cpu: Cpu) -> None:
    cpu.vmx.in_seam = True


def cpl_3(cpu: Cpu) -> None:
    cpu.vmx.cpl = 3


def no_seamrr(cpu: Cpu) -> None:
    cpu.vmx.config = msgspec.structs.replace(cpu.vmx.config, seamrr_mask=0)


def after_mov_ss(cpu: Cpu) -> None:
    cpu.vmx.mov_ss_blocking = True


def cpl_3_outside_vmx(cpu: Cpu) -> None:
    outside_vmx(cpu)
    cpl_3(cpu)


FAULTS: dict[str, tuple[Callable[[Cpu], None], Outcome]] = {
    "row-1": (outside_vmx, UD),
    "row-2": (compatibility_mode, UD),
    "row-3": (in_seam, UD),
    "row-4": (cpl_3, GP),
    "row-5": (no_seamrr, GP),
    "row-6": (after_mov_ss, GP),
    "row-13": (cpl_3_outside_vmx, UD),
}


@pytest.mark.conformance("P-SEAMLDR calls")
@BOTH_KINDS
@pytest.mark.parametrize(("spoil", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault(spoil: Callable[[Cpu], None], fault: Outcome, leaf: int) -> None:
    """The fault is the same for every leaf, and nothing anywhere has changed."""
    machine = Machine()
    spoil(machine.cpu())
    before = machine.seam_state()
    assert machine.seamcall(0, leaf) == fault
    assert machine.seam_state() == before


@pytest.mark.conformance("P-SEAMLDR calls", 4)
@BOTH_KINDS
def test_a_fault_comes_before_busy(leaf: int) -> None:
    """A caller at CPL 3 gets #GP also while another LP is in P-SEAMLDR."""
    machine = Machine()
    machine.enter(1, SeamldrLeaf.INFO)
    cpl_3(machine.cpu())
    assert machine.seamcall(0, leaf) == GP
    assert machine.seam.inside == 1


@pytest.mark.conformance("P-SEAMLDR calls", 7)
@BOTH_KINDS
def test_seamcall_in_a_guest(leaf: int) -> None:
    """A guest exits with reason 4CH, bit 29 clear, and does not enter SEAM."""
    machine = Machine()
    machine.load_guest()
    unit = machine.cpu().vmx
    assert unit.vmlaunch().ok
    before = machine.seam_state()
    outcome = machine.seamcall(0, leaf)
    assert isinstance(outcome, Outcome) and outcome.status is Status.VM_EXIT
    assert (unit.vmread(Field.EXIT_REASON).value, unit.mode) == (0x4C, VmxMode.ROOT)
    assert unit.vmread(Field.EXIT_INSTRUCTION_LENGTH).value == 4
    assert machine.seam_state() == before


def refused(leaf: int) -> SeamReply:
    """VMfailInvalid: RAX and all registers as they were."""
    return SeamReply(False, leaf, ARGUMENTS)


@pytest.mark.conformance("P-SEAMLDR calls", 8)
def test_no_p_seamldr() -> None:
    """Without P-SEAMLDR a call to it is VMfailInvalid, and the mutex is free."""
    machine = Machine()
    machine.seam.loader.state.seamextend = SeamExtend()
    before = machine.seam_state()
    assert machine.seamcall(0, SeamldrLeaf.INFO) == refused(SeamldrLeaf.INFO)
    assert machine.seam_state() == before and machine.seam.inside is None


@pytest.mark.conformance("P-SEAMLDR calls", 9)
@pytest.mark.parametrize("leaf", list(SeamldrLeaf), ids=lambda leaf: leaf.name)
def test_another_lp_is_inside(leaf: int) -> None:
    """P_SEAMLDR_MUTEX held: VMfailInvalid at once, whatever the leaf; the LP inside ends its call undisturbed."""
    machine = Machine()
    machine.enter(0, SeamldrLeaf.INFO)
    before = machine.seam_state()
    assert machine.seamcall(1, leaf) == refused(leaf)
    assert machine.seam_state() == before
    machine.machine.step(0)
    assert machine.memory.read32(INFO_PAGE + 8) == 0x8086
    assert machine.seam.inside is None


@pytest.mark.conformance("P-SEAMLDR calls", 10)
def test_no_module() -> None:
    """SEAM_READY 0: a module call is VMfailInvalid, a call to P-SEAMLDR is not."""
    machine = Machine()
    state = machine.seam.loader.state
    state.seamextend = state.seamextend.with_ready(0)
    assert machine.seamcall(0, TdhLeaf.TDH_SYS_RD) == refused(TdhLeaf.TDH_SYS_RD)
    assert machine.seamcall(0, SeamldrLeaf.INFO) == SeamReply(True, 0, ARGUMENTS)


@pytest.mark.conformance("P-SEAMLDR calls", 11)
@pytest.mark.conformance("TDX module calls", 72)
def test_between_first_and_last_install() -> None:
    """A module that is replaced on some LPs only is VMfailInvalid on every LP; the last one brings an answer back."""
    machine = Machine()
    assert machine.seamcall(1, SeamldrLeaf.INSTALL) == SeamReply(True, 0, registers(rcx=INFO_PAGE, rdx=0))
    for number in range(2):
        for leaf in (TdhLeaf.TDH_SYS_RD, TdhLeaf.TDH_SYS_LP_SHUTDOWN, TdhLeaf.TDH_VP_ENTER):
            assert machine.seamcall(number, leaf) == refused(leaf)
    last = machine.seamcall(0, SeamldrLeaf.INSTALL, registers(rcx=INFO_PAGE + 1))
    assert last == SeamReply(True, SeamldrStatus.EBADPARAM, registers(rcx=INFO_PAGE + 1, rdx=0))
    assert machine.seamcall(0, TdhLeaf.TDH_SYS_LP_SHUTDOWN) == SeamReply(True, 0, ARGUMENTS)


@pytest.mark.conformance("P-SEAMLDR calls", 12)
def test_a_module_call_beside_info() -> None:
    """A call to the module does not look at P_SEAMLDR_MUTEX."""
    machine = Machine()
    machine.enter(0, SeamldrLeaf.INFO)
    reply = machine.seamcall(1, TdhLeaf.TDH_SYS_RD)
    assert isinstance(reply, SeamReply)
    assert (reply.entered, reply.rax, reply.registers[2]) == (True, 0, 8)
    assert machine.seam.inside == 0


@pytest.mark.conformance("P-SEAMLDR calls", 14)
@BOTH_KINDS
def test_an_lp_crashes_inside(leaf: int) -> None:
    """The crash of an LP inside P-SEAMLDR ends all of SEAM for every LP, module calls included."""
    machine = Machine()
    machine.enter(0, SeamldrLeaf.INFO)
    assert machine.seam.leave_dead(0)
    assert machine.seamcall(1, leaf) == refused(leaf)
    assert machine.seam.gate.state.dead and machine.seam.inside is None


@pytest.mark.conformance("P-SEAMLDR calls", 15)
def test_seamret() -> None:
    """SEAMRET is #UD outside SEAM; inside it goes on, in 64-bit code at CPL 0."""
    unit = Machine().cpu().vmx
    assert unit.seamret_check() == UD
    unit.cpl = 3
    assert unit.seamret_check() == UD
    unit.in_seam = True
    assert unit.seamret_check() == GP
    unit.cpl, unit.code_mode = 0, CodeMode.COMPATIBILITY
    assert unit.seamret_check() == UD
    unit.code_mode = CodeMode.LONG
    assert unit.seamret_check() is None


def test_a_cpu_is_in_seam_until_seamret() -> None:
    """While its call lasts, the LP is in SEAM; a second SEAMCALL there would be #UD."""
    machine = Machine()
    machine.enter(0, SeamldrLeaf.INFO)
    assert machine.cpu().vmx.seamcall_check(1 << 63) == UD
    assert machine.cpu().vmx.seamret_check() is None
    machine.machine.step(0)
    assert machine.cpu().vmx.seamcall_check(1 << 63) is None
    assert machine.cpu().vmx.seamret_check() == UD


@pytest.mark.conformance("P-SEAMLDR calls", 16)
@pytest.mark.conformance("VMX instructions", 84, 85)
def test_the_erratum() -> None:
    """IA32_VMX_BASIC[60] = 0: the call succeeds, and no VMCS is current. As Intel's pseudo-code has it, it is clear."""
    machine = Machine(vmx_basic_bit60=0, seamret_launch="clear")
    machine.run_guest()
    unit = machine.cpu().vmx
    assert machine.seamcall(0, SeamldrLeaf.INFO) == SeamReply(True, 0, ARGUMENTS)
    assert unit.vmptrst().value == ALL_ONES
    assert unit.vmread(Field.GUEST_RIP).status is Status.FAIL_INVALID
    assert unit.vmptrld(VMCS).ok
    assert unit.vmresume().error == 5
    assert unit.vmlaunch().ok


@pytest.mark.conformance("P-SEAMLDR calls", 16)
@pytest.mark.conformance("VMX instructions", 84)
def test_the_erratum_that_spares_the_launch_state() -> None:
    """The default of this machine: the pointer is lost, and after VMPTRLD the VMCS is launched as before."""
    machine = Machine()
    machine.run_guest()
    unit = machine.cpu().vmx
    assert machine.seamcall(0, SeamldrLeaf.INFO) == SeamReply(True, 0, ARGUMENTS)
    assert unit.vmptrst().value == ALL_ONES
    assert unit.vmread(Field.GUEST_RIP).status is Status.FAIL_INVALID
    assert unit.vmptrld(VMCS).ok and unit.vmresume().ok


@pytest.mark.conformance("P-SEAMLDR calls", 17)
@pytest.mark.conformance("VMX instructions", 86)
@pytest.mark.parametrize("launch", ["preserve", "clear"])
def test_without_the_erratum(launch: str) -> None:
    """IA32_VMX_BASIC[60] = 1: the call leaves the VMCS current and launched."""
    machine = Machine(vmx_basic_bit60=1, seamret_launch=launch)
    machine.run_guest()
    unit = machine.cpu().vmx
    assert machine.seamcall(0, SeamldrLeaf.INFO) == SeamReply(True, 0, ARGUMENTS)
    assert unit.vmptrst().value == VMCS
    assert unit.vmread(Field.GUEST_RIP).ok and unit.vmresume().ok


@pytest.mark.conformance("VMX instructions", 87)
@pytest.mark.parametrize("bit60", [0, 1])
def test_a_module_call_keeps_the_vmcs(bit60: int) -> None:
    """A call to the TDX module, there and back, changes nothing for the caller, with the erratum or without."""
    machine = Machine(vmx_basic_bit60=bit60, seamret_launch="clear", seamret_scope="all_active_on_lp")
    machine.run_guest()
    unit = machine.cpu().vmx
    reply = machine.seamcall(0, TdhLeaf.TDH_SYS_RD, registers(rdx=MODULE_HV))
    assert isinstance(reply, SeamReply) and (reply.entered, reply.rax) == (True, 0)
    assert unit.vmread(Field.GUEST_RIP).ok and unit.vmresume().ok


@pytest.mark.conformance("VMX instructions", 88)
def test_a_call_that_is_refused_keeps_the_vmcs() -> None:
    """VMfailInvalid because another LP is inside: the erratum does not strike."""
    machine = Machine(seamret_launch="clear")
    machine.run_guest()
    machine.enter(1, SeamldrLeaf.INFO)
    unit = machine.cpu().vmx
    assert machine.seamcall(0, SeamldrLeaf.INFO) == refused(SeamldrLeaf.INFO)
    assert unit.vmread(Field.GUEST_RIP).ok and unit.vmptrst().value == VMCS
    assert unit.current is not None and unit.current.launch is LaunchState.LAUNCHED
