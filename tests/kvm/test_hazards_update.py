"""Hazards of the update and of CPU hotplug, each shown by its observable on stepped machines: H14 to H20, H27, H31."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hazards import IMAGE_AT, failed, initialized, install, load_only, load_run_put, step_until, violated, warnings
from stepping import Stepped, module

from bus.memory import PAGE_SIZE
from cpu.cpu import Cpu
from cpu.layout import TDMR, TDMR_SIZE, UPDATE_CTRL, per_cpu
from cpu.struct import NONE
from cpu.vmx import VmxMode
from kvm import hotplug
from kvm.hotplug import add_cpu, kvm_exit, kvm_init, remove_cpu
from seamldr.image import build_v1, build_v2
from seamldr.seam import SCRATCH
from seamldr.tdx_boot import create_td
from seamldr.update import ModuleUpdateState

STAGES = [s for s in ModuleUpdateState if ModuleUpdateState.START < s < ModuleUpdateState.DONE]


def test_h14_a_vcpu_whose_last_cpu_went_offline() -> None:
    """H14: the offline callback has cleared its VMCS, so it loads elsewhere without an IPI and with its data."""
    machine = Stepped("none", cpus=2)
    x = machine.new_vcpu(0, 1)
    machine.run(load_run_put(x), 1)
    assert machine.run(lambda cpu: remove_cpu(cpu, 1)) == 0
    assert [r["active"] for r in machine.events("vmxoff")] == [0]
    assert machine.cpu(1).vmx.mode is VmxMode.OUTSIDE
    assert machine.run(load_run_put(x))
    assert machine.count("csd_lock") == 0
    assert violated(machine) == set()
    assert machine.run(lambda cpu: add_cpu(cpu, 1)) == 0
    assert machine.run(load_run_put(x), 1)
    assert violated(machine) == set()


def test_h14_without_the_sweep_the_vcpu_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """H14: VMXOFF with an active VMCS loses it; the clear IPI to the CPU that is gone returns -ENXIO."""

    async def no_sweep(cpu: Cpu) -> None:
        await cpu.give_way()

    monkeypatch.setattr(hotplug, "vmclear_local_loaded_vmcss", no_sweep)
    machine = Stepped("none", cpus=2)
    x = machine.new_vcpu(0, 1)
    machine.run(load_run_put(x), 1)
    assert machine.run(lambda cpu: remove_cpu(cpu, 1)) == 0
    assert [r["active"] for r in machine.events("vmxoff")] == [1]
    machine.run(load_run_put(x))
    assert machine.count("csd_lock") == 0
    assert machine.memory.load(x.state.loaded_vmcs.cpu)[0] == 0
    assert failed(machine, "vmentry", "vmptrld") or machine.count("wrong_data")


def sweep_against_clear_ipi(irqs: str, seed: int) -> bool:
    """CPU 1 goes offline with two VMCSs while CPU 2 loads one of them; whether everything ends well."""
    rng = Random(seed)
    machine = Stepped("none", cpus=3, offline_irqs=irqs)
    vcpus = [machine.new_vcpu(task, 1) for task in range(3)]
    for vcpu in vcpus:
        machine.run(load_run_put(vcpu), 1)
    loader = machine.start(load_only(vcpus[rng.randrange(3)]), 2, "vcpu")
    for _ in range(rng.randrange(40)):
        machine.machine.step(2)
    machine.start(lambda cpu: remove_cpu(cpu, 1), 0)
    try:
        machine.machine.run(rng.choice, limit=5000)
    except RuntimeError:
        return False
    assert loader.result is None
    return [r["active"] for r in machine.events("vmxoff")] == [0] and violated(machine) == set()


def test_h14b_a_clear_ipi_in_the_middle_of_the_sweep() -> None:
    """H14b: with interrupts on the IPI can unlink the element that the walk saved as next; off, it waits."""
    outcomes = {irqs: [sweep_against_clear_ipi(irqs, seed) for seed in range(40)] for irqs in ("on", "off")}
    assert all(outcomes["off"])
    assert not all(outcomes["on"])


@pytest.mark.parametrize(("tds", "other", "errno"), [(1, 1, -16), (1, 0, 0), (0, 1, 0)])
def test_h15_the_last_cpu_of_a_package(tds: int, other: int, errno: int) -> None:
    """H15: with a key id in use the last CPU of a package stays online, and the kernel says so."""
    machine = Stepped("none", cpus=2, tds=tds)
    machine.memory.store(per_cpu(1).package, other, 0)
    assert machine.run(lambda cpu: remove_cpu(cpu, 1)) == errno
    assert machine.memory.load(per_cpu(1).online)[0] == (errno != 0)
    assert [r["text"][:50] for r in machine.events("log")] == (
        ["virt/tdx: TDX requires all packages to have an onl"] if errno else []
    )


def test_h16_an_update_with_a_cpu_offline_is_fatal() -> None:
    """H16: P-SEAMLDR waits for the LP that does not come; CPU_INIT finds no module: -ENODEV, and TDX is lost."""
    machine = Stepped("none", cpus=2)
    assert machine.run(lambda cpu: remove_cpu(cpu, 1)) == 0
    assert machine.run(install(machine)) == -19
    assert [r["state"] for r in machine.events("ack") if r["ret"]] == ["CPU_INIT"]
    assert initialized(machine) == 0


def test_h17_no_update_left_is_fatal_at_install() -> None:
    """H17: the kernel does not look at the number left, so the module is already shut down when INSTALL refuses."""
    machine = Stepped("none", cpus=2, seamdb_size=2)
    assert machine.run(install(machine)) == 0
    assert machine.run(install(machine, build_v2(module("1.5.10")))) == -5
    assert {r["state"] for r in machine.events("ack") if r["ret"]} == {"CPU_INSTALL"}
    assert initialized(machine) == 0


@pytest.mark.parametrize(("knob", "errno"), [("off", 0), ("if_supported", -16), ("always", -16)])
def test_h18_a_trust_domain_is_being_built(knob: str, errno: int) -> None:
    """H18: the merged kernel updates under a TD build; with bit 16 of SHUTDOWN the module refuses, harmlessly."""
    machine = Stepped("none", avoid_compat_sensitive=knob, module_profile="B")
    assert machine.seam.module is not None
    pages = iter(range(TDMR, TDMR + TDMR_SIZE, PAGE_SIZE))
    first = machine.seam.module.platform.first_private_hkid
    create_td(machine.seam.module, hkid=first + 1, pages=pages, scratch_pa=SCRATCH, max_vcpus=1)
    machine.seam.keep()
    assert machine.run(install(machine, build_v2(module("1.5.09", "B")))) == errno
    assert initialized(machine) == 1


def test_h19_install_fails_and_the_module_is_gone() -> None:
    """H19: a module page that does not have its hash fails INSTALL on the last CPU, whoever installed before."""
    machine = Stepped("none", cpus=3)
    body = install(machine)
    machine.memory.write(IMAGE_AT + 3 * PAGE_SIZE, b"\x55" * 64)
    assert machine.run(body) == -5
    installs = [r["status"] for r in machine.events("seamcall_return") if r["name"] == "SEAMLDR.INSTALL"]
    assert installs[:2] == [0, 0] and installs[2] != 0
    assert initialized(machine) == 0


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_h20_a_cpu_that_dies_inside_the_callback(stage: ModuleUpdateState) -> None:
    """H20: nothing advances any more, in whichever stage it is; the others spin with interrupts off for ever."""
    machine = Stepped("none", cpus=3)
    worker = machine.start(install(machine), 0, "kworker")
    for _ in range(100_000):
        if any(r["state"] == stage.name for r in machine.events("state_enter", cpu=2)):
            break
        machine.machine.step(machine.machine.ready()[-1])
    for _ in range(3000):
        alive = [number for number in machine.machine.ready() if number != 2]
        if not alive:
            break
        machine.machine.step(alive[0])
    assert machine.memory.load(UPDATE_CTRL.state)[0] == stage
    assert worker.result is None and not machine.cpu(0).irqs_on and not machine.cpu(1).irqs_on
    assert machine.cpu(0).waits_for[0].startswith(("waits for the stage after", "spins on"))
    assert machine.judge(finished=False).verdict != "safe"


def test_h27_a_version_1_image_is_refused_harmlessly() -> None:
    """H27: the container that the public client ships is -EINVAL before any SEAMCALL, and the old module runs on."""
    machine = Stepped("none")
    assert machine.run(install(machine, build_v1(module("1.5.09")))) == -22
    assert machine.count("seamcall_enter") == 0
    assert initialized(machine) == 1


def test_h31_without_the_lead_cpu_nothing_is_shut_down() -> None:
    """H31: SHUTDOWN is nobody's work, INSTALL hits a running module, and the kernel believes that it has updated."""
    machine = Stepped("none", cpus=2)
    machine.memory.store(per_cpu(0).online, 0, 0)
    ret = machine.run(install(machine), 1)
    assert machine.count("seamcall_enter", name="TDH.SYS.SHUTDOWN") == 0
    assert machine.count("seamcall_enter", name="SEAMLDR.INSTALL") == 1
    assert (ret, initialized(machine)) == (0, 1)
    assert machine.seam.module is not None and machine.seam.module.identity.update == 8


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
    assert list(itertools.chain(warnings(machine), failed(machine, "vmxon", "vmxoff"))) == []
