"""Hazards of calling P-SEAMLDR, each shown by its observable on stepped machines: H1, H10 to H13, H21 to H24, H26, H28,
H32, H33, H35."""

from __future__ import annotations

import pytest
from hazards import (
    answer_first,
    failed,
    info,
    initialized,
    install,
    kvm_unloaded,
    load_only,
    load_run_put,
    prefer,
    step_until,
    until_in_seam,
    violated,
    warnings,
)
from stepping import Stepped

from cpu.apic import Vector
from cpu.cpu import Cpu
from cpu.layout import BUFFERS, KERNEL, per_cpu, task_vmcs
from cpu.loop import Thread
from cpu.struct import NONE
from cpu.vmx import Field, VmxMode
from kvm.emergency import machine_crash_shutdown
from kvm.hotplug import kvm_exit
from kvm.loaded_vmcs import clear_on_this_cpu
from kvm.matrix import save_restore_irqs_on
from kvm.scenes import Stage
from seamldr.api import TdxModuleArgs, seamldr_lock, vmclear_local_loaded_vmcss
from seamldr.seamcall import TDX_RND_NO_ENTROPY, seamcall_prerr
from seamldr.status import SeamldrLeaf
from seamldr.tdx_leaves import TdhLeaf

SOFTWARE = ("none", "save-restore", "clear-current-vmcs", "vmclear-local", "decoy")
V = task_vmcs(0)


@pytest.mark.parametrize("fixed", [0, 1])
@pytest.mark.parametrize("strategy", SOFTWARE)
def test_h1_an_nmi_reads_the_vmcs_right_after_seamret(strategy: str, fixed: int) -> None:
    """H1: perf's VMREAD of guest RIP fails and gives 0; a fixed CPU helps where the strategy clears nothing."""
    stage = Stage(strategy, 1, nmi_inject="in-seam", vmx_basic_bit60=fixed)
    stage.vcpu(0)
    stage.steps(300)
    stage.until_guest_runs(0)
    stage.interrupt(0)
    stage.steps(60)
    machine = stage.stepped
    reads = [r for r in machine.events("vmread") if r["ctx"] == "nmi"]
    cleared_before = strategy in ("vmclear-local", "decoy")
    lost = not fixed or cleared_before
    assert machine.count("nmi_pend", point="in-seam") == 1
    assert [(r["field"], r["value"], r["result"]) for r in reads] == [(Field.GUEST_RIP, 0, "invalid")] * lost
    assert ("I13" in violated(machine)) == lost


@pytest.mark.parametrize("strategy", ["unserialized", "save-restore-v3", "clear-current-vmcs"])
def test_h10_two_callers_at_once(strategy: str) -> None:
    """H10: without a lock the second caller gets VMfailInvalid, which the kernel takes for -ENODEV."""
    machine = Stepped(strategy, cpus=2)
    first = machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    second = machine.start(info, 1, "reader")
    for _ in range(60):
        machine.machine.step(1)
    machine.machine.run()
    assert first.result == 0
    assert second.result == (0 if strategy == "clear-current-vmcs" else -19)


def test_h11_one_buffer_for_all_readers_is_torn() -> None:
    """H11: a second reader's SEAMLDR.INFO writes into the buffer that the first is just reading."""
    machine = Stepped("save-restore-v3", cpus=2)
    page, go, halves = BUFFERS + 0x10_0000, BUFFERS + 0x40_0000, list[bytes]()

    async def read_in_halves(cpu: Cpu) -> None:
        await seamcall_prerr(cpu, SeamldrLeaf.INFO, TdxModuleArgs(rcx=page))
        for at in (0, 32):
            halves.append(await cpu.read_phys(page + at, 32))
            while not await cpu.load(go):
                await cpu.schedule()

    async def read_whole(cpu: Cpu) -> bytes:
        await seamcall_prerr(cpu, SeamldrLeaf.INFO, TdxModuleArgs(rcx=page))
        return await cpu.read_phys(page, 64)

    before = machine.run(read_whole)
    machine.run(read_in_halves)
    assert machine.run(install(machine), 1) == 0
    after = machine.run(read_whole, 1)
    machine.memory.store(go, 1, 0)
    machine.machine.asleep.clear()
    machine.machine.run()
    assert b"".join(halves) not in (before, after)
    assert halves == [before[:32], after[32:]]


@pytest.mark.parametrize(("strategy", "errno"), [("save-restore-v3", -5), ("save-restore", 0)])
def test_h12_a_restore_that_fails_masks_a_successful_install(strategy: str, errno: int) -> None:
    """H12: v3 returns -EIO although INSTALL succeeded, which ends the update fatally; v4 keeps the result."""
    machine = Stepped(strategy)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    worker = machine.start(install(machine), name="kworker")
    until_in_seam(machine, 0)
    machine.memory.write32(V, 0x77)
    machine.machine.run()
    assert [r["status"] for r in machine.events("seamcall_return") if r["name"] == "SEAMLDR.INSTALL"] == [0]
    assert worker.result == errno
    assert initialized(machine) == (errno == 0)


async def plain_lock(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """`clear-current-vmcs` with a plain spinlock."""
    async with cpu.spin_lock_irqsave(seamldr_lock):
        return await seamcall_prerr(cpu, fn, args)


@pytest.mark.parametrize("strategy", [plain_lock, "none"])
@pytest.mark.parametrize("preemption", ["full", "rt"])
def test_h13_a_plain_lock_sleeps_in_stop_machine_on_rt(preemption: str, strategy: object) -> None:
    """H13: on PREEMPT_RT a plain spinlock may not be taken with interrupts off, as in stop_machine; a raw one may."""
    machine = Stepped(strategy, preemption=preemption)  # type: ignore[arg-type]
    assert machine.run(install(machine), name="kworker") == 0
    slept = "BUG: sleeping function called from invalid context" in warnings(machine)
    assert slept == (preemption == "rt" and strategy is plain_lock)


def only(machine: Stepped, number: int, steps: int = 3000) -> None:
    """Step one CPU alone, as if the others had stopped for good."""
    for _ in range(steps):
        if number not in machine.machine.ready():
            return
        machine.machine.step(number)


def test_h21_a_cpu_that_dies_holding_the_lock() -> None:
    """H21: a real kernel never hands the lock on: whoever asks for it spins for ever."""
    machine = Stepped("clear-current-vmcs", cpus=2)
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    waiter = machine.start(info, 1, "reader")
    only(machine, 1)
    assert waiter.result is None
    assert machine.cpu(1).waits_for == ("spins on seamldr_lock", "seamldr")


def test_h22_a_crash_during_the_call() -> None:
    """H22: the NMI waits for SEAMRET; then every listed VMCS is cleared, VMX operation ends, nobody ever unlocks."""
    machine = Stepped("save-restore", cpus=2)
    x, y = machine.new_vcpu(0), machine.new_vcpu(1)
    machine.run(load_run_put(x))
    machine.run(load_run_put(y))
    reader = machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    crash = machine.start(machine_crash_shutdown, 1, "panic")
    for _ in range(40):
        machine.machine.step(1)
    assert machine.events("nmi_enter", cpu=0) == []
    machine.machine.run()
    assert crash.result is True
    assert machine.events("nmi_enter", cpu=0)[0]["cur"] == NONE
    cleared = [(r["vmcs"], r["result"]) for r in machine.events("vmclear", cpu=0) if r["reason"] == "emergency"]
    assert sorted(cleared) == [(task_vmcs(0), "ok"), (task_vmcs(1), "ok")]
    assert [r["active"] for r in machine.events("vmxoff")] == [0, 0]
    assert all(machine.cpu(n).vmx.mode is VmxMode.OUTSIDE for n in (0, 1))
    assert machine.memory.load(per_cpu(0).halted)[0] == 1
    assert reader.result is None and "seamldr_lock" in machine.cpu(0).tokens
    assert machine.events("vmptrld")[-1]["reason"] != "restore"
    assert "I13" not in violated(machine, finished=False)


def test_h23_the_watchdogs_nmi_lands_right_after_seamret() -> None:
    """H23: in a long INSTALL the NMI waits in SEAM, comes with no current VMCS, and its handler does not look."""
    machine = Stepped("none", cpus=2, nmi_inject="in-seam")
    machine.run(load_run_put(machine.new_vcpu(0)))
    assert machine.run(install(machine), name="kworker") == 0
    entered = machine.events("nmi_enter", cpu=0)
    assert [(r["ctx"], r["cur"]) for r in entered] == [("nmi", NONE)]
    assert [r for r in machine.events("vmread", "vmwrite") if r["ctx"] == "nmi"] == []


@pytest.mark.parametrize(
    ("leaf", "status", "times", "executions", "errno"),
    [
        (TdhLeaf.TDH_SYS_LP_INIT, TDX_RND_NO_ENTROPY, 9, 10, None),
        (TdhLeaf.TDH_SYS_LP_INIT, TDX_RND_NO_ENTROPY, 10, 10, -5),
        (SeamldrLeaf.INFO, 0x8000_0000_0003_0001, 1, 1, -5),
    ],
)
def test_h24_entropy_runs_out(leaf: int, status: int, times: int, executions: int, errno: int | None) -> None:
    """H24: the module is asked ten times at most; P-SEAMLDR's own code for it is not retried at all."""
    machine = Stepped("none")
    answer_first(machine, [status] * times + [0])

    async def call(cpu: Cpu) -> int:
        return await seamcall_prerr(cpu, leaf, TdxModuleArgs(rcx=BUFFERS))

    assert machine.run(call) == (errno or 0)
    assert [r["attempt"] for r in machine.events("seamcall_enter")] == list(range(1, executions + 1))


def test_h26_a_reader_in_a_tight_loop_clobbers_every_time() -> None:
    """H26: each of 20 reads takes the VMCS that the guest had loaded in between, and costs it a VMPTRLD."""
    machine = Stepped("clear-current-vmcs")
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    before = machine.count("vmptrld")
    for _ in range(20):
        assert machine.run(info) == 0
        assert machine.run(load_run_put(x))
    assert machine.count("vmptrld") - before == 20
    assert machine.judge().exposures.lost_vmcs == 20


def test_h28_kvm_goes_away_under_a_waiting_caller() -> None:
    """H28: before the VMXON series unloading KVM executes VMXOFF under a caller that waits: #UD, -EACCES."""
    machine = Stepped("none", cpus=2, vmxon_owner="kvm")
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    waiter = machine.start(info, 1, "reader")
    for _ in range(30):
        machine.machine.step(1)
    assert machine.cpu(1).vmx.mode is VmxMode.ROOT

    async def unload_here(cpu: Cpu) -> None:
        await cpu.kernel.functions["kvm_disable_virtualization_cpu"](cpu, 0)

    machine.cpu(1).nmi_work.append(unload_here)
    machine.cpu(1).apic.accept_nmi()
    machine.machine.asleep.discard(1)
    only(machine, 1)
    machine.machine.run()
    assert waiter.result == -13


async def callback_fetched_before_the_lock(cpu: Cpu, fn: int, args: TdxModuleArgs) -> int:
    """`vmclear-local` through a callback whose pointer is fetched before the lock is held."""
    registered = not await cpu.load(KERNEL.kvm_unloaded)
    async with cpu.raw_spin_lock(seamldr_lock):
        if registered:
            cpu.warn_on_once(bool(await cpu.load(KERNEL.kvm_unloaded)), "callback into a module that is gone")
            await vmclear_local_loaded_vmcss(cpu)
        return await seamcall_prerr(cpu, fn, args)


def test_h28_a_callback_into_a_module_that_is_gone() -> None:
    """H28: a callback fetched before KVM was unloaded runs after it, where its text is freed."""
    machine = Stepped(callback_fetched_before_the_lock, cpus=3)
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    machine.start(info, 1, "reader")
    for _ in range(30):
        machine.machine.step(1)
    machine.start(kvm_exit, 2, "rmmod")
    step_until(machine, 2, lambda: bool(kvm_unloaded(machine)))
    machine.machine.run()
    assert warnings(machine) == ["callback into a module that is gone"]


def test_h32_nmis_that_wait_in_seam_merge() -> None:
    """H32: three NMIs during one call are delivered once, after SEAMRET."""
    machine = Stepped("none")
    machine.start(info)
    until_in_seam(machine, 0)
    assert [machine.cpu().apic.accept_nmi() for _ in range(3)] == [False, True, True]
    machine.machine.run()
    events = [r["event"] for r in machine.events("seamcall_return", "nmi_enter", "lock_drop")]
    assert events == ["seamcall_return", "nmi_enter", "lock_drop"]


def test_h33_a_duplicated_clear_ipi_is_harmless() -> None:
    """H33: an interrupt that comes once more finds nothing queued, and a second clear of one VMCS does nothing."""
    machine = Stepped("none", cpus=2)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    machine.run(load_run_put(x), 1)
    machine.cpu(0).apic.accept(Vector.CALL_FUNCTION_SINGLE)
    machine.machine.asleep.discard(0)
    machine.machine.run()
    assert (machine.count("irq_enter"), machine.count("csd_run")) == (2, 1)
    clears = machine.count("vmclear")
    machine.run(lambda cpu: clear_on_this_cpu(cpu, x.state.loaded_vmcs.address))
    assert machine.count("vmclear") == clears
    assert machine.run(load_run_put(x), 1)
    assert violated(machine) == set()


@pytest.mark.parametrize("strategy", ["clear-current-vmcs", "save-restore", save_restore_irqs_on])
def test_h35_a_cpu_that_is_stopped_between_seamret_and_the_repair(strategy: object) -> None:
    """H35: who asks it to clear a VMCS waits as long as it is stopped, and with interrupts off nothing is corrupted."""
    machine = Stepped(strategy, cpus=2)  # type: ignore[arg-type]
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    machine.machine.step(0)
    moved: Thread = machine.start(load_only(x), 1, "vcpu0")
    only(machine, 1)
    assert machine.count("csd_lock") == 1 and machine.count("csd_done") == 0
    assert machine.cpu(1).waits_for == ("waits for __loaded_vmcs_clear on CPU 0", "cpu0")
    machine.machine.run(prefer(1))
    assert moved.result is None and machine.count("csd_done") == 1
    assert ("I1" in violated(machine)) == (strategy is save_restore_irqs_on)
    assert failed(machine, "vmread", "vmwrite") == []
