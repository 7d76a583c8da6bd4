"""Hazards of the current VMCS, each shown by its observable on stepped machines: H0 to H9b, H25, H29, H30, H34."""

from __future__ import annotations

from typing import Any

import pytest
from hazards import (
    answer_first,
    failed,
    info,
    load_only,
    load_run_put,
    prefer,
    step_until,
    until_in_seam,
    violated,
    warnings,
)
from stepping import Stepped

from cpu.cpu import Cpu, current_vmcs
from cpu.irq_work import irq_work_queue
from cpu.layout import BUFFERS, LoadedVmcs, per_cpu, task_address, task_vmcs
from cpu.lists import list_del
from cpu.struct import NONE, ListHead
from cpu.vmx import Field
from kvm import scenes
from kvm.emergency import machine_crash_shutdown
from kvm.hotplug import kvm_exit
from kvm.loaded_vmcs import free_loaded_vmcs, vmcs_read
from kvm.matrix import save_restore_irqs_on
from kvm.nested import NestedVcpu
from kvm.tdx import VmxTdVcpu
from kvm.vcpu import td_vcpu_of
from kvm.vmx import VmxVcpu
from seamldr.api import TdxModuleArgs, vmptrld, vmptrst
from seamldr.seamcall import TDX_RND_NO_ENTROPY, seamcall_prerr
from seamldr.status import SeamldrLeaf

REPAIRED_AT_ONCE = ("save-restore", "save-restore-v3", "decoy")
"""Strategies that leave the processor as it was when they return."""
LEFT_TO_THE_NEXT_LOAD = ("none", "vmclear-local", "clear-current-vmcs", "sweep-naive")
"""Strategies after which a vCPU that stays loaded has no current VMCS."""


def test_h0_the_same_vcpu_next_finds_nothing_current() -> None:
    """H0: after a call by `none` the same vCPU loads without VMPTRLD, and accesses fail in pairs with field 4400."""
    machine = Stepped("none")
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    before = machine.count("vmptrld")
    machine.run(info)
    assert not machine.run(load_run_put(x))
    assert machine.count("vmptrld") == before
    assert "vmread failed: field=4400" in warnings(machine)
    assert {"I2", "I3"} <= violated(machine)


@pytest.mark.parametrize("launch", ["preserve", "clear"])
def test_h0b_another_vcpu_in_between_heals_the_pointer(launch: str) -> None:
    """H0b: with y loaded in between there is no failed access; a launch state that was cleared shows as error 5."""
    machine = Stepped("none", seamret_launch=launch)
    x, y = machine.new_vcpu(0), machine.new_vcpu(1)
    machine.run(load_run_put(x))
    machine.run(info)
    assert machine.run(load_run_put(y))
    assert machine.run(load_run_put(x)) == (launch == "preserve")
    assert failed(machine, "vmread", "vmwrite") == []
    assert failed(machine, "vmentry") == ([] if launch == "preserve" else [("vmentry", "valid:5")])


@pytest.mark.parametrize("strategy", ["save-restore", "clear-current-vmcs", "save-restore-v3", "unserialized"])
def test_h2_a_cleared_launch_state_ends_the_vcpu(strategy: str) -> None:
    """H2: with `seamret_launch=clear` the next entry is VMRESUME of a clear VMCS: KVM_EXIT_FAIL_ENTRY, reason 5."""
    machine = Stepped(strategy, seamret_launch="clear")
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    machine.run(info)
    assert not machine.run(load_run_put(x))
    assert [r["hardware_reason"] for r in machine.events("vcpu_dead")] == [5]
    assert x.fail_reason == 5


def test_h2b_a_vcpu_that_never_ran_survives_a_cleared_launch_state() -> None:
    """H2b: a vCPU that was loaded and not yet entered has nothing to lose."""
    machine = Stepped("save-restore", seamret_launch="clear")
    x = machine.new_vcpu(0)
    machine.run(load_only(x))
    machine.run(info)
    assert machine.run(load_run_put(x))
    assert violated(machine) == set()


@pytest.mark.parametrize("strategy", REPAIRED_AT_ONCE + LEFT_TO_THE_NEXT_LOAD)
def test_h3_an_interrupt_handler_calls_between_two_vmreads(strategy: str) -> None:
    """H3: on top of a loaded vCPU only a strategy that repairs the processor itself leaves the next VMREAD alone."""
    machine = Stepped(strategy)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))

    async def two_reads(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await vmcs_read(cpu, Field.GUEST_RIP)
        irq_work_queue(cpu, info)
        await cpu.give_way()
        await vmcs_read(cpu, Field.GUEST_RSP)
        await x.vcpu_put(cpu)

    machine.run(two_reads)
    assert machine.count("seamcall_return", name="SEAMLDR.INFO") == 1
    assert (failed(machine, "vmread") == []) == (strategy in REPAIRED_AT_ONCE)


def test_h4_a_task_that_migrates_between_save_and_restore() -> None:
    """H4: a pointer saved on CPU 0 and restored on CPU 1 is active on both, and CPU 1's own VMCS is not current."""
    machine = Stepped("none", cpus=2)
    x, y = machine.new_vcpu(0), machine.new_vcpu(1, 1)
    machine.run(load_run_put(x))
    machine.run(load_run_put(y), 1)
    saved = machine.run(vmptrst)

    async def rest(cpu: Cpu) -> None:
        await seamcall_prerr(cpu, SeamldrLeaf.INFO, TdxModuleArgs(rcx=BUFFERS))
        await vmptrld(cpu, saved)

    machine.run(rest, 1)
    assert machine.cpu(1).vmx.cur == task_vmcs(0) != machine.memory.load(per_cpu(1).current_vmcs)[0]
    assert machine.cpu(0).vmx.cur == task_vmcs(0)
    assert "I1" in violated(machine)


def in_window(strategy: object) -> tuple[Stepped, VmxVcpu]:
    """x was put on CPU 0, and a reader there is inside P-SEAMLDR."""
    machine = Stepped(strategy, cpus=2)  # type: ignore[arg-type]
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    return machine, x


@pytest.mark.parametrize("strategy", [save_restore_irqs_on, "save-restore"])
def test_h5_a_clear_ipi_between_seamret_and_the_restore(strategy: object) -> None:
    """H5: with interrupts on the restore undoes the clear, and the VMCS is active on two CPUs; else it waits."""
    machine, x = in_window(strategy)
    moved = machine.start(load_only(x), 1, "vcpu0")
    machine.machine.run(prefer(1))
    assert moved.result is None and machine.count("csd_run") == 1
    broken = strategy is save_restore_irqs_on
    assert ("I1" in violated(machine)) == broken
    assert (task_vmcs(0) in machine.cpu(0).vmx.active) == broken
    assert task_vmcs(0) in machine.cpu(1).vmx.active


@pytest.mark.parametrize("foreign", [b"\x77", None])
def test_h5b_the_page_is_freed_in_the_window(foreign: bytes | None) -> None:
    """H5b: the restore loads a page that is somebody else's: it fails, or makes a VMCS of it in silence.

    With no current VMCS the failure has no place for its error number 11, so it is VMfailInvalid.
    """
    machine, x = in_window(save_restore_irqs_on)

    async def free(cpu: Cpu) -> None:
        await free_loaded_vmcs(cpu, x.state.loaded_vmcs)
        if foreign is not None:
            await cpu.write_phys(task_vmcs(0), foreign * 4096)

    machine.start(free, 1)
    machine.machine.run(prefer(1))
    restore = machine.events("vmptrld", cpu=0)[-1]
    assert (restore["reason"], restore["result"]) == ("restore", "ok" if foreign is None else "invalid")


@pytest.mark.parametrize(("strategy", "broken"), [(save_restore_irqs_on, True), ("save-restore", False)])
def test_h6_a_vcpu_is_scheduled_into_the_window(strategy: object, broken: bool) -> None:
    """H6: preempted between SEAMRET and its restore, the caller leaves a vCPU that skips VMPTRLD and fails."""
    found: set[str] = set()
    for seed in range(4):
        act = scenes.task(strategy, seed)  # type: ignore[arg-type]
        found |= {violation.invariant for violation in act.judgement.violations}
    assert ("I3" in found) == broken


def nested(strategy: str, **knobs: Any) -> tuple[Stepped, NestedVcpu]:
    """A machine with a nested vCPU that has run L1 and L2 once, loaded nowhere but active on CPU 0."""
    machine = Stepped(strategy, **knobs)
    x = NestedVcpu(0, task_address(0))

    async def begin(cpu: Cpu) -> None:
        await x.create(cpu, task_vmcs(0))
        await x.vcpu_load(cpu)
        await x.enter_vmx_operation(cpu, BUFFERS + 0x30_0000, BUFFERS + 0x30_1000)
        await x.vcpu_enter_guest(cpu)
        await x.nested_vmx_run(cpu)
        await x.vcpu_put(cpu)

    machine.run(begin)
    assert x.fail_reason is None and x.vmcs12.launched
    return machine, x


@pytest.mark.parametrize("strategy", ["none", "clear-current-vmcs", "vmclear-local", "save-restore"])
def test_h7_an_interrupt_handler_calls_while_a_shadow_is_loaded(strategy: str) -> None:
    """H7: the copy fails half way; `vmclear-local` even leaves vmcs01 active and unlisted; save-restore survives."""
    machine, x = nested(strategy)

    async def copy(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await x.copy_shadow_to_vmcs12(cpu)
        await x.vcpu_put(cpu)

    machine.start(copy)
    step_until(machine, 0, lambda: machine.cpu().vmx.cur == x.shadow_page)
    irq_work_queue(machine.cpu(), info)
    machine.machine.run()
    head = ListHead(per_cpu(0).loaded_vmcss_on_cpu)
    listed = machine.memory.load(head.next)[0] != head.address
    assert (failed(machine, "vmread") == []) == (strategy == "save-restore")
    assert listed == (strategy != "vmclear-local")
    assert task_vmcs(0) in machine.cpu().vmx.active


@pytest.mark.parametrize("launch", ["preserve", "clear"])
@pytest.mark.parametrize("strategy", ["none", "clear-current-vmcs"])
def test_h8_a_nested_switch_after_the_call(strategy: str, launch: str) -> None:
    """H8: a switch executes VMPTRLD anyway, so even `none` heals; error 5 of vmcs02 is L1's error 7."""
    machine, x = nested(strategy, seamret_launch=launch)

    async def with_vmcs02(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await x.vmx_switch_vmcs(cpu, LoadedVmcs(x.state.vmcs02))
        await x.vcpu_put(cpu)

    async def back(cpu: Cpu) -> bool:
        await x.vcpu_load(cpu)
        await x.vmx_switch_vmcs(cpu, LoadedVmcs(x.state.vmcs01))
        await x.vcpu_enter_guest(cpu)
        entered = await x.nested_vmx_run(cpu)
        await x.vcpu_put(cpu)
        return entered

    machine.run(with_vmcs02)
    machine.run(info)
    assert machine.run(back) == (launch == "preserve")
    assert x.vmcs12.vmfail == (0 if launch == "preserve" else 7)
    assert x.fail_reason is None and machine.events("vcpu_dead") == []
    assert failed(machine, "vmread", "vmwrite") == []


@pytest.mark.parametrize(
    ("strategy", "errno", "warning"),
    [
        ("save-restore-v3", -5, "Failed to save/restore the current VMCS"),
        ("save-restore", -13, "VMPTRST faulted"),
        ("clear-current-vmcs", -13, None),
        ("none", -13, None),
    ],
)
@pytest.mark.parametrize("owner", ["kvm", "core"])
def test_h9_no_vmx_operation_without_kvm(owner: str, strategy: str, errno: int, warning: str | None) -> None:
    """H9: before the VMXON series unloading KVM ends VMX operation: VMPTRST and SEAMCALL are #UD."""
    machine = Stepped(strategy, cpus=2, vmxon_owner=owner)
    machine.run(kvm_exit)
    assert machine.run(info) == (errno if owner == "kvm" else 0)
    assert warnings(machine) == ([warning] if owner == "kvm" and warning else [])


async def restore_blindly(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Save and restore that does not look at what it saved."""
    saved = await vmptrst(cpu)
    ret = await seamcall_prerr(cpu, fn, args)
    await vmptrld(cpu, saved or 0)
    return ret


@pytest.mark.parametrize(("strategy", "result"), [(restore_blindly, ["invalid"]), ("save-restore", [])])
def test_h9b_all_ones_must_not_be_restored(strategy: object, result: list[str]) -> None:
    """H9b: with no current VMCS VMPTRST stores all ones; VMPTRLD of that is VMfailInvalid, for the same reason."""
    machine = Stepped(strategy)  # type: ignore[arg-type]
    machine.run(info)
    assert [r["value"] for r in machine.events("vmptrst")] == [NONE]
    assert [r["result"] for r in machine.events("vmptrld")] == result


async def save_inside_the_loop(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """Save and restore around each attempt, with the retry outside."""
    for _ in range(3):
        saved = await vmptrst(cpu)
        reply = await cpu.seamcall(fn, args.registers(), name="SEAMLDR.INFO")
    if saved not in (None, NONE):
        await vmptrld(cpu, saved or 0)
    return 0 if reply else -5


@pytest.mark.parametrize(
    ("strategy", "saved"),
    [("save-restore", [task_vmcs(0)]), (save_inside_the_loop, [task_vmcs(0), NONE, NONE])],
)
def test_h25_a_retry_enters_again_with_nothing_current(strategy: object, saved: list[int]) -> None:
    """H25: only the first of three entries takes the VMCS; a pointer saved inside the loop is lost."""
    machine = Stepped(strategy)  # type: ignore[arg-type]
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    answer_first(machine, [TDX_RND_NO_ENTROPY] * 2)
    assert machine.run(info) == 0
    assert [r["lost"] for r in machine.events("seamcall_return")] == [task_vmcs(0), NONE, NONE]
    assert [r["value"] for r in machine.events("vmptrst")] == saved
    assert machine.run(load_run_put(x)) == (strategy == "save-restore")


def test_h29_a_pointer_that_outlives_its_vmcs() -> None:
    """H29: `current_vmcs` not set to NULL with the VMCS, and the page used again: VMPTRLD is skipped for a new VMCS."""
    machine = Stepped("none")
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))

    async def forget_all_but_the_pointer(cpu: Cpu) -> None:
        v = x.state.loaded_vmcs
        await cpu.vmclear(task_vmcs(0), "clear")
        await list_del(cpu, v.link)
        await cpu.store_recorded(v.cpu, NONE, "cpu_store", vmcs=task_vmcs(0))

    machine.run(forget_all_but_the_pointer)
    fresh = VmxVcpu(0, x.state)

    async def reuse(cpu: Cpu) -> int | None:
        await fresh.create(cpu, task_vmcs(0))
        return await cpu.this_cpu_read(current_vmcs)

    assert machine.run(reuse) == task_vmcs(0)
    assert machine.events("vcpu_load")[-1]["skipped"] == 1
    assert {"I2", "I3"} <= violated(machine)


@pytest.mark.parametrize(
    "strategy", ["save-restore", "clear-current-vmcs", "decoy", "vmclear-current", "vmclear-local"]
)
def test_h30_seamret_evicts_every_active_vmcs(strategy: str) -> None:
    """H30: with the whole cache evicted a vCPU that was not current gets error 5 too; only clearing all is safe."""
    machine = Stepped(strategy, seamret_launch="clear", seamret_scope="all_active_on_lp")
    x, y = machine.new_vcpu(0), machine.new_vcpu(1)
    machine.run(load_run_put(x))
    machine.run(load_run_put(y))
    machine.run(info)
    assert machine.run(load_run_put(x)) == (strategy == "vmclear-local")
    assert failed(machine, "vmentry") == ([] if strategy == "vmclear-local" else [("vmentry", "valid:5")])


def test_h34_a_cpu_that_runs_only_trust_domains_has_nothing_to_lose() -> None:
    """H34: a TD vCPU has no VMCS of KVM's, so a call by `none` takes nothing and the TD goes on."""
    machine = Stepped("none", tds=1)
    state = td_vcpu_of(0)
    for word, value in ((state.cpu, NONE), (state.tdvpr, machine.tds[0].vcpus[0])):
        machine.memory.store(word, value, 0)
    vcpu = VmxTdVcpu(0, state)
    assert machine.run(vcpu.run)
    assert machine.run(info) == 0
    assert machine.events("seamcall_return")[-1]["lost"] == NONE
    assert machine.run(vcpu.run)
    assert violated(machine) == set()


def test_a_crash_clears_the_shadow_too() -> None:
    """The emergency path clears vmcs01, vmcs02 and the shadow, whatever KVM's tracking says."""
    machine, x = nested("none")
    machine.run(machine_crash_shutdown)
    cleared = {r["vmcs"] for r in machine.events("vmclear") if r["reason"] == "emergency"}
    assert cleared == {task_vmcs(0), BUFFERS + 0x30_0000, x.shadow_page}
    assert machine.events("vmxoff")[-1]["active"] == 0
    assert machine.memory.load(LoadedVmcs(x.state.vmcs01).cpu)[0] == 0


@pytest.mark.parametrize("launch", ["preserve", "clear"])
def test_a_nested_vcpu_comes_and_goes(launch: str) -> None:
    """Switches, rare copies and shadow copies leave no error, and tearing the nested state down leaves L1 running."""
    machine, x = nested("vmclear-local", seamret_launch=launch)

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
    assert violated(machine) == set() and warnings(machine) == []
