"""Hazards of the current VMCS: exactly what is seen of them, and the nested vCPU that some of them need."""

from __future__ import annotations

import pytest
from hazards import info, load_run_put, played, violated, warnings
from stepping import Stepped

from cpu.cpu import Cpu
from cpu.layout import KERNEL, LoadedVmcs, task_vmcs
from cpu.struct import NONE
from cpu.vmx import Field
from kvm.emergency import machine_crash_shutdown
from kvm.guest import STACK, TEXT, guest_step
from kvm.hazard import NESTED_PAGES
from kvm.hazards_vmcs import nested_vcpu
from kvm.loaded_vmcs import free_loaded_vmcs, vmcs_clear, vmcs_read, vmcs_write
from kvm.virt import x86_vmx_disable_virtualization_cpu

V = task_vmcs(0)


def test_h0_no_vmptrld_and_pairs_of_reports() -> None:
    """H0: the load executes no VMPTRLD, and a VMWRITE that fails logs field 4400 first."""
    shown = played("H0", "none")
    assert shown.seen["VMPTRLDs"] == 0
    log = ["vmread failed: field=4400", "vmwrite failed: field=681e val=400013 err=0"]
    assert shown.seen["kernel log"] == log
    assert {"I2", "I3"} <= set(violated(shown.machine))


def test_h0b_the_failure_is_a_matter_of_chance() -> None:
    """H0b: with y in between nothing fails, or with the launch state cleared one entry does, and no access."""
    assert played("H0b", "none, launch=preserve").seen == {"accesses that fail": [], "entries that fail": []}
    assert played("H0b", "none, launch=clear").seen == {
        "accesses that fail": [],
        "entries that fail": ["vmentry valid:5"],
    }


def test_h2_user_space_is_told_reason_5() -> None:
    """H2: KVM_EXIT_FAIL_ENTRY with hardware reason 5, on record too."""
    shown = played("H2", "clear-current-vmcs")
    assert [r["hardware_reason"] for r in shown.machine.events("vcpu_dead")] == [5]


def test_h4_two_cpus_have_the_vmcs_and_one_lost_its_own() -> None:
    """H4: the restore lands on CPU 1, whose vCPU then executes VMRESUME on a VMCS that is not its own."""
    shown = played("H4", "save_restore_irqs_on")
    assert shown.seen["CPU 0's VMCS is restored on"] == ["cpu1"]
    assert shown.seen["y enters x's VMCS"] == ["valid:5"]
    assert V in shown.machine.cpu(0).vmx.active and V in shown.machine.cpu(1).vmx.active
    assert {"I1", "I11"} <= set(violated(shown.machine))
    assert played("H4", "save-restore").seen["CPU 0's VMCS is restored on"] == ["cpu0"]


def test_h5_writes_are_lost() -> None:
    """H5: when x comes back, what it wrote meanwhile on the other CPU is not there."""
    shown = played("H5", "save_restore_irqs_on")
    assert shown.seen["x's VMCS is active on"] == ["cpu0", "cpu1"]
    assert shown.seen["fields that are lost"] == 2


@pytest.mark.parametrize(
    ("page", "restored", "active"),
    [("data", ["invalid"], []), ("VMCS", ["ok"], ["cpu0", "cpu1"]), ("free", ["ok"], ["cpu0"])],
)
def test_h5b_what_becomes_of_a_page_that_was_freed(page: str, restored: list[str], active: list[str]) -> None:
    """H5b: data fails the restore; a VMCS, or a page as it was left, is taken over in silence."""
    seen = played("H5b", f"save_restore_irqs_on, page={page}").seen
    assert (seen["restored after it was freed"], seen["the page is a VMCS of"]) == (restored, active)


def test_h7_vmclear_local_leaves_vmcs01_active_and_unlisted() -> None:
    """H7: the sweep takes vmcs01 off the list, and the end of the copy loads it again, unknown to KVM."""
    assert played("H7", "vmclear-local").seen["vmcs01 is active but unlisted"] is True
    assert played("H7", "none").seen == {"VMREADs of the copy that fail": 3, "vmcs01 is active but unlisted": False}


def test_h8_the_buddy_warning_and_error_7() -> None:
    """H8: an old kernel warns once; a launch state that was cleared reaches L1, not user space."""
    assert played("H8", "clear-current-vmcs, names_buddy=True").seen["kernel log"] == ["buddy->vmcs != prev"]
    assert played("H8", "none, launch=clear").seen == {
        "entries that fail": ["vmentry valid:5"],
        "what L1 sees": "VMfail 7",
        "the vCPU goes on": True,
    }


@pytest.mark.parametrize(
    ("strategy", "errno", "log"),
    [
        ("save-restore-v3", -5, ["Failed to save/restore the current VMCS"]),
        ("save-restore", -13, ["VMPTRST faulted"]),
        ("clear-current-vmcs", -13, []),
        ("none", -13, []),
    ],
)
def test_h9_what_a_fault_becomes(strategy: str, errno: int, log: list[str]) -> None:
    """H9: #UD of VMPTRST is a warning, and in version 3 -EIO; #UD of SEAMCALL is -EACCES."""
    assert played("H9", f"{strategy}, owner=kvm").seen == {"errno": errno, "kernel log": log}


def test_h9b_all_ones_are_not_loaded() -> None:
    """H9b: VMPTRLD of all ones is VMfailInvalid, as there is nowhere to put an error number; or is not tried."""
    assert played("H9b", "restore_blindly").seen == {"VMPTRST stores": f"{NONE:#x}", "VMPTRLDs": ["invalid"]}
    assert played("H9b", "save-restore").seen == {"VMPTRST stores": f"{NONE:#x}", "VMPTRLDs": []}


def test_h25_a_pointer_saved_in_the_loop_is_lost() -> None:
    """H25: of three entries only the first takes the VMCS, and the later saves find none."""
    seen = played("H25", "save_inside_the_loop").seen
    assert seen["attempts"] == ["0x8000000000030001", "0x8000000000030001", "0x0"]
    assert seen["VMCSs lost"] == [True, False, False]
    assert seen["saved"] == [f"{V:#x}", f"{NONE:#x}", f"{NONE:#x}"]
    assert played("H25", "save_outside_the_loop").seen["saved"] == [f"{V:#x}"]


# A nested vCPU


def test_a_crash_clears_the_shadow_too() -> None:
    """The emergency path clears vmcs01, vmcs02 and the shadow, and leaves KVM's tracking as it is."""
    machine, x = nested_vcpu("none")
    machine.run(machine_crash_shutdown)
    cleared = {r["vmcs"] for r in machine.events("vmclear") if r["reason"] == "emergency"}
    assert cleared == {V, NESTED_PAGES, x.shadow_page}
    assert machine.events("vmxoff")[-1]["active"] == 0
    assert machine.memory.load(LoadedVmcs(x.state.vmcs01).cpu)[0] == 0


@pytest.mark.parametrize("launch", ["preserve", "clear"])
def test_a_nested_vcpu_comes_and_goes(launch: str) -> None:
    """Switches, rare copies and shadow copies leave no error, and tearing the nested state down leaves L1 running."""
    machine, x = nested_vcpu("vmclear-local", seamret_launch=launch)
    assert x.fail_reason is None and x.vmcs12.launched

    async def again(cpu: Cpu) -> bool:
        await x.vcpu_load(cpu)
        x.vmcs12.fields[Field.GUEST_RSP] = 0x5000
        await x.copy_vmcs12_to_shadow(cpu)
        x.vmcs12.fields.clear()
        await x.copy_shadow_to_vmcs12(cpu)
        await x.copy_vmcs02_to_vmcs12_rare(cpu)
        await x.free_nested(cpu)
        entered = await x.vcpu_enter_guest(cpu)
        await x.vcpu_put(cpu)
        return entered

    machine.run(info)
    assert machine.run(again)
    assert x.vmcs12.fields[Field.GUEST_RSP] == 0x5000
    assert violated(machine) == [] and warnings(machine) == []


def test_what_l2_left_is_in_the_shadow_before_l1_runs() -> None:
    """After an exit of L2 the next entry of L1 copies vmcs12 into the shadow, once."""
    machine, x = nested_vcpu("none")
    assert x.need_vmcs12_to_shadow_sync
    x.vmcs12.fields[Field.GUEST_RSP] = 0x7000

    async def run_l1(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await x.vcpu_enter_guest(cpu)
        x.vmcs12.fields.clear()
        await x.vcpu_enter_guest(cpu)
        await x.copy_shadow_to_vmcs12(cpu)
        await x.vcpu_put(cpu)

    machine.run(run_l1)
    assert x.vmcs12.fields[Field.GUEST_RSP] == 0x7000
    assert violated(machine) == [] and warnings(machine) == []


def test_what_l1_wrote_into_the_shadow_is_what_l2_runs_with() -> None:
    """An entry of L2 takes its registers from the shadow, and its exit leaves in vmcs12 where it has come to."""
    machine, x = nested_vcpu("none")
    rip, rsp = TEXT + 0x100, STACK + 0x400

    async def run_l2(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        x.vmcs12.fields.update({Field.GUEST_RIP: rip, Field.GUEST_RSP: rsp, Field.GUEST_RFLAGS: 2})
        await x.copy_vmcs12_to_shadow(cpu)
        x.vmcs12.fields.clear()
        await x.nested_vmx_run(cpu)
        await x.vcpu_put(cpu)

    machine.run(run_l2)
    assert (x.vmcs12.fields[Field.GUEST_RIP], x.vmcs12.fields[Field.GUEST_RSP]) == guest_step(rip, rsp)


def test_a_nested_vcpu_that_moves_clears_its_shadow() -> None:
    """The clear IPI for a launched vmcs01 clears the shadow with it, since the processor may have cached that too."""
    machine, x = nested_vcpu("none", cpus=2)
    before = machine.count("vmclear", node="cpu0")
    machine.run(load_run_put(x), 1)
    assert [r["vmcs"] for r in machine.events("vmclear", cpu=0)[before:]] == [V, x.shadow_page]
    assert violated(machine) == []


def test_an_nmi_that_ends_the_guest_is_serviced_first() -> None:
    """An NMI exit is serviced with interrupts off before KVM notes that the VMCS is launched; the VMCS is there."""
    machine = Stepped("none", nmi_inject="in-guest")
    machine.run(load_run_put(machine.new_vcpu(0)))
    order = [r for r in machine.events("nmi_enter", "vmread", "nmi_exit", "launched_store") if r.get("new") != 0]
    assert [r["event"] for r in order] == ["nmi_enter", "nmi_exit", "launched_store"]
    assert order[0]["cur"] == V and not order[0]["irqs"]


def test_a_nested_vcpu_is_destroyed_with_its_shadow() -> None:
    """vcpu_free clears and frees all three VMCSs, wherever they are active; without that KVM warns of the shadow."""
    machine, x = nested_vcpu("none", cpus=2)
    machine.run(x.destroy, 1)
    assert all(not machine.cpu(number).vmx.active for number in (0, 1))
    assert violated(machine) == [] and warnings(machine) == []

    machine, x = nested_vcpu("none")
    machine.run(lambda cpu: free_loaded_vmcs(cpu, x.state.loaded_vmcs))
    assert warnings(machine) == ["a VMCS is freed with its shadow VMCS"]


# Faults


@pytest.mark.parametrize("rebooting", [0, 1])
def test_a_vmx_instruction_that_faults_is_a_bug_unless_the_machine_goes_down(rebooting: int) -> None:
    """#UD after VMXOFF is no VMfail: nothing is reported, but it is a BUG, except while the machine goes down."""
    machine = Stepped("none")
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    machine.memory.store(KERNEL.virt_rebooting, rebooting, 0)
    machine.run(x86_vmx_disable_virtualization_cpu)

    async def instructions(cpu: Cpu) -> None:
        assert await vmcs_read(cpu, Field.GUEST_RIP) == 0
        await vmcs_write(cpu, Field.GUEST_RIP, 1)
        await vmcs_clear(cpu, V)

    machine.run(instructions)
    assert not machine.run(load_run_put(x))
    assert {r["result"] for r in machine.events("vmread", "vmwrite", "vmclear", "vmentry")} >= {"fault:6"}
    assert [r["why"] for r in machine.events("vcpu_dead")] == ["VM entry faulted"]
    assert warnings(machine) == ([] if rebooting else ["BUG: VMX instruction faulted"])
