"""Hazards of the update and of CPU hotplug: exactly what is seen of them, and KVM's own coming and going."""

from __future__ import annotations

import pytest
from hazards import install, load_run_put, played, step_until, violated, warnings
from stepping import Stepped

from cpu.layout import KERNEL, per_cpu
from cpu.struct import NONE
from cpu.vmx import VmxMode
from kvm.hazard import failed
from kvm.hazards_update import STAGES
from kvm.hotplug import add_cpu, kvm_exit, kvm_init, remove_cpu
from seamldr.update import ModuleUpdateState


def test_h14_enxio_is_harmless_after_the_sweep_alone() -> None:
    """H14: without the sweep the clear IPI fails and the VMCS is lost; with it there is none to send, or no harm."""
    lost = played("H14", "no sweep")
    assert lost.seen["VMCSs lost by VMXOFF"] == [1]
    assert lost.seen["clear IPIs return"] == [-6]
    assert lost.seen["entries that fail"] == ["vmentry valid:6"]
    assert "I7" in violated(lost.machine)
    assert played("H14", "swept").seen == {
        "VMCSs lost by VMXOFF": [0],
        "clear IPIs return": [],
        "entries that fail": [],
        "broken": [],
    }
    assert played("H14", "swept, while the vCPU is destroyed").seen == {
        "clear IPIs return": [-6],
        "broken": [],
        "kernel log": [],
    }


def test_h14_a_cpu_that_comes_back_takes_the_vcpu_again() -> None:
    """H14: offline and online again, a CPU runs a vCPU as before."""
    machine = Stepped("none", cpus=2)
    x = machine.new_vcpu(0, 1)
    machine.run(load_run_put(x), 1)
    assert machine.run(lambda cpu: remove_cpu(cpu, 1)) == 0
    assert machine.run(load_run_put(x))
    assert machine.run(lambda cpu: add_cpu(cpu, 1)) == 0
    assert machine.run(load_run_put(x), 1)
    assert violated(machine) == []


def test_h14b_the_walk_never_ends() -> None:
    """H14b: with interrupts on the sweep walks the other CPU's list for ever."""
    seen = played("H14b", "interrupts on").seen
    assert (seen["it comes to an end"], seen["VMCSs lost by VMXOFF"]) == (False, [])


def test_h15_the_kernel_says_why() -> None:
    """H15: -EBUSY with one line; otherwise the CPU goes without a word."""
    seen = played("H15", "alone in its package, a TD").seen
    assert seen["errno"] == -16
    assert str(seen["kernel log"]).startswith("['virt/tdx: TDX requires all packages to have an online CPU.")
    assert played("H15", "two in the package, a TD").seen == {"errno": 0, "kernel log": []}


@pytest.mark.parametrize(
    ("hazard", "errno", "failed_in", "refused"),
    [
        ("H16", -19, ["CPU_INIT on cpu0: -19"], -16),
        ("H17", -5, ["CPU_INSTALL on cpu1: -5"], -28),
    ],
)
def test_h16_h17_fatal_as_merged_harmless_in_version_3(
    hazard: str, errno: int, failed_in: list[str], refused: int
) -> None:
    """H16, H17: the merged kernel finds out when the old module is shut down; version 3 asked before."""
    fatal = {"the update": errno, "failed in": failed_in, "TDX is initialized": False}
    assert played(hazard, "as merged").seen == fatal
    assert played(hazard, "version 3").seen == {"the update": refused, "failed in": [], "TDX is initialized": True}


def test_h18_the_module_refuses_if_asked() -> None:
    """H18: a module that knows the flag refuses harmlessly, whether it was asked always or only since it knows it."""
    for label in ("version 3", "version 10"):
        assert played("H18", label).seen == {"the update": -16, "TDX is initialized": True}


def test_h19_others_have_installed() -> None:
    """H19: the last CPU's INSTALL finds the bad hash, after the others' have succeeded."""
    seen = played("H19", "three CPUs").seen
    assert seen["SEAMLDR.INSTALL returns"] == ["0x0", "0x0", "0x8000000000020001"]
    assert (seen["the update"], seen["TDX is initialized"]) == (-5, False)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_h20_the_others_wait_with_interrupts_off(stage: ModuleUpdateState) -> None:
    """H20: in whichever stage it is, nothing advances, and both survivors are reported."""
    shown = played("H20", stage.name)
    assert shown.seen["the stage stays"] == stage.name
    assert shown.seen["interrupts are on"] == [False, False]
    assert str(shown.seen["CPU 0"]).startswith(("waits for the stage after", "spins on"))
    assert shown.seen["kernel log"] == [f"Watchdog detected hard LOCKUP on cpu {number}" for number in (0, 1)]
    assert shown.machine.judge(finished=False).verdict != "safe"


def test_h27_nothing_is_called() -> None:
    """H27: -EINVAL, no SEAMCALL, and the old module runs on."""
    assert played("H27", "version 1").seen == {"the update": -22, "SEAMCALLs": 0, "TDX is initialized": True}


def test_h31_the_kernel_believes_that_it_has_updated() -> None:
    """H31: no SHUTDOWN, one INSTALL, success, and the old module still runs."""
    assert played("H31", "CPU 0 offline").seen == {
        "the update": 0,
        "TDH.SYS.SHUTDOWN": 0,
        "SEAMLDR.INSTALL": 1,
        "module that runs": "1.5.08",
        "TDX is initialized": True,
    }


def test_h33_a_stage_advances_too_early() -> None:
    """H33: an acknowledgement that counts twice breaks I31, and the update with it."""
    shown = played("H33", "an acknowledgement counts twice")
    assert shown.seen["the update"] != 0
    assert "I31" in violated(shown.machine)


# Hotplug, KVM's life and the count of users, which the hazards above build on


def test_cpu_0_and_cpus_that_are_there_already_are_refused() -> None:
    """CPU 0 cannot go; what is offline cannot go again, nor what is online come."""
    machine = Stepped("none", cpus=2)
    assert machine.run(lambda cpu: remove_cpu(cpu, 0)) == -1
    assert machine.run(lambda cpu: add_cpu(cpu, 1)) == -22
    assert machine.run(lambda cpu: remove_cpu(cpu, 1)) == 0
    assert machine.run(lambda cpu: remove_cpu(cpu, 1)) == -22


def test_an_update_keeps_cpus_from_going_offline() -> None:
    """The update holds the hotplug lock for reading: whoever takes a CPU down waits for its end."""
    machine = Stepped("none", cpus=2)
    worker = machine.start(install(machine), 0, "kworker")
    step_until(machine, 0, lambda: bool(machine.events("update_begin")))
    remover = machine.start(lambda cpu: remove_cpu(cpu, 1), 0, "remover")
    machine.machine.run()
    assert (worker.result, remover.result) == (0, 0)
    order = [r["event"] for r in machine.events("update_end", "cpu_offline")]
    assert order == ["update_end", "cpu_offline"]


def users(machine: Stepped, number: int) -> int:
    """Users of VMX operation on a CPU."""
    return machine.memory.load(per_cpu(number).virtualization_nr_users)[0]


def test_the_count_of_users_of_vmx_operation() -> None:
    """TDX and KVM are two users; without KVM there is one, and VMX operation stays on; offline there is none."""
    machine = Stepped("none", cpus=2)
    assert users(machine, 1) == 2
    machine.run(kvm_exit)
    assert users(machine, 1) == 1 and machine.cpu(1).vmx.mode is VmxMode.ROOT and machine.cpu(1).vmx.cur == NONE
    machine.run(kvm_init)
    assert users(machine, 1) == 2
    assert machine.run(lambda cpu: remove_cpu(cpu, 1)) == 0
    assert users(machine, 1) == 0 and machine.cpu(1).vmx.mode is VmxMode.OUTSIDE
    assert machine.run(lambda cpu: add_cpu(cpu, 1)) == 0
    assert users(machine, 1) == 2
    assert warnings(machine) == []


def test_before_the_series_kvm_alone_has_vmx_operation() -> None:
    """With `vmxon_owner=kvm` unloading KVM is VMXOFF everywhere, and loading it VMXON."""
    machine = Stepped("none", cpus=2, vmxon_owner="kvm")
    machine.run(kvm_exit)
    assert [machine.cpu(n).vmx.mode for n in (0, 1)] == [VmxMode.OUTSIDE] * 2
    machine.run(kvm_init)
    assert [machine.cpu(n).vmx.mode for n in (0, 1)] == [VmxMode.ROOT] * 2
    assert warnings(machine) + failed(machine, "vmxon", "vmxoff") == []


def test_kvm_that_is_unloaded_clears_its_vmcss_before_its_callback_goes() -> None:
    """Until the last CPU has cleared its VMCSs the crash path can still call KVM; then KVM's code is freed."""
    machine = Stepped("none", cpus=2)
    machine.run(load_run_put(machine.new_vcpu(0, 1)), 1)
    machine.start(kvm_exit, name="rmmod")
    while not machine.memory.load(KERNEL.kvm_unloaded)[0]:
        assert not machine.memory.load(KERNEL.kvm_text_freed)[0]
        machine.machine.step(machine.machine.ready()[0])
    assert not machine.cpu(1).vmx.active
    machine.machine.run()
    assert machine.memory.load(KERNEL.kvm_text_freed)[0] == 1
    machine.run(kvm_init)
    assert machine.memory.load(KERNEL.kvm_text_freed)[0] == 0
    assert violated(machine) == []
