"""Hazards of calling P-SEAMLDR, and of what comes in between: H1, H10 to H13, H21 to H26, H28, H32, H33, H35.

`kvm.hazard_table` has the table of all.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from itertools import pairwise
from random import Random
from typing import Any

from cpu.apic import Vector
from cpu.cpu import Cpu
from cpu.irq_work import irq_work_queue, nmi_work_queue
from cpu.layout import KERNEL, per_cpu, task_vmcs
from cpu.loop import Priority, Thread
from cpu.nmi_watchdog import watchdog_hrtimer_fn, watchdog_overflow_callback
from cpu.struct import NONE
from cpu.vmx import Field, VmxMode
from kvm.emergency import machine_crash_shutdown
from kvm.hazard import (
    A_STRATEGY,
    INFO_PAGE,
    SHARED_INFO_PAGE,
    Shown,
    all_until,
    failed,
    info,
    initialized,
    install,
    load_only,
    load_run_put,
    only,
    prefer,
    step_until,
    until_in_seam,
    violated,
    warnings,
)
from kvm.hazards_vmcs import dry_seamldr
from kvm.hotplug import kvm_exit
from kvm.loaded_vmcs import clear_on_this_cpu
from kvm.scenes import Stage
from kvm.stepped import Stepped
from seamldr.structures import SeamldrInfo
from seamldr.tdx_call import Hooks
from seamldr.update import seamldr_get_info, seamldr_version_show

V = task_vmcs(0)


def nmi_reads_vmcs(strategy: A_STRATEGY, fixed: int = 0) -> Shown:
    """H1: an interrupt ends a guest's run, its handler reads the version, and perf's NMI waits in SEAM."""
    stage = Stage(strategy, 1, nmi_inject="in-seam", vmx_basic_bit60=fixed)
    stage.vcpu(0)
    stage.steps(300)
    stage.until_guest_runs(0)
    stage.interrupt(0)
    stage.steps(60)
    machine = stage.stepped
    reads = [r for r in machine.events("vmread") if r["ctx"] == "nmi" and r["field"] == Field.GUEST_RIP]
    found = [(r["result"], r["value"]) for r in reads]
    seen = {"guest RIP, read in the NMI handler": found or "ok", "broken": violated(machine, finished=False)}
    return Shown(machine, found == [("invalid", 0)], seen)


def two_callers(strategy: A_STRATEGY) -> Shown:
    """H10: CPU 1 reads the version while CPU 0 is inside P-SEAMLDR."""
    machine = Stepped(strategy, cpus=2)
    first = machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    second = machine.start(info, 1, "reader")
    only(machine, 1, 60)
    machine.machine.run()
    return Shown(machine, second.result == -19, {"errnos of the two readers": (first.result, second.result)})


def torn_info(strategy: A_STRATEGY, shared: bool) -> Shown:
    """H11: a reader is preempted while it copies SEAMLDR_INFO; a module is installed, and another reader comes."""
    machine = Stepped(strategy, cpus=2)
    pages = [SHARED_INFO_PAGE] * 2 if shared else [INFO_PAGE, INFO_PAGE + 4096]

    async def get_info(cpu: Cpu) -> SeamldrInfo | None:
        return (await seamldr_get_info(cpu, pages[cpu.number]))[1]

    uploads = install(machine)

    async def install_and_read(cpu: Cpu) -> SeamldrInfo | None:
        await uploads(cpu)
        return await get_info(cpu)

    before = machine.run(get_info)
    calls = machine.count("strategy_end")
    copying = machine.start(get_info, 0, "reader")
    step_until(machine, 0, lambda: machine.count("strategy_end") > calls)
    after = machine.start(install_and_read, 1, "kworker")
    machine.machine.run(prefer(1))
    copy = copying.result
    seen = {
        "num_remaining_updates before, copied, after": [
            i.num_remaining_updates for i in (before, copy, after.result)
        ],
        "the copy's SEAMEXTEND is of": "before" if copy.seamextend == before.seamextend else "after",
    }
    return Shown(machine, copy not in (before, after.result), seen)


def restore_masks_result(strategy: A_STRATEGY) -> Shown:
    """H12: the restore after a successful INSTALL fails, since somebody wrote over the VMCS's first word."""
    machine = Stepped(strategy)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    worker = machine.start(install(machine), name="kworker")
    until_in_seam(machine, 0)
    machine.memory.write32(V, 0x77)
    machine.machine.run()
    status = [r["status"] for r in machine.events("seamcall_return") if r["name"] == "SEAMLDR.INSTALL"]
    module = machine.seam.module
    assert module is not None
    seen = {
        "SEAMLDR.INSTALL returns": status,
        "module in place": f"1.5.{module.identity.update:02}",
        "the update": worker.result,
        "TDX is initialized": initialized(machine),
    }
    return Shown(machine, status == [0] and worker.result == -5 and not initialized(machine), seen)


def lock_that_sleeps(strategy: A_STRATEGY, preemption: str) -> Shown:
    """H13: a module is installed on two CPUs at once; a thread that has work to do waits on CPU 1."""
    machine = Stepped(strategy, cpus=2, preemption=preemption)
    x = machine.new_vcpu(0)
    machine.start(install(machine), 0, "kworker")
    all_until(machine, lambda: machine.seam.inside == 0)
    machine.start(load_only(x), 1, "vcpu0")
    machine.machine.run(prefer(1))
    order = [r["event"] for r in machine.events("vcpu_load", "ack", cpu=1)]
    intruder = "ack" in order[order.index("vcpu_load") :]
    seen = {"kernel log": warnings(machine), "a vCPU is loaded in the middle of stop_machine": intruder}
    return Shown(machine, intruder, seen)


def lock_in_handler(strategy: A_STRATEGY) -> Shown:
    """H13: an interrupt handler reads the version."""
    machine = Stepped(strategy)
    irq_work_queue(machine.cpu(), info)
    machine.machine.asleep.clear()
    machine.machine.run()
    return Shown(machine, warnings(machine) != [], {"kernel log": warnings(machine)})


def holder_dies(strategy: A_STRATEGY) -> Shown:
    """H21: CPU 0 stops for good right after SEAMRET; CPU 1 reads the version."""
    machine = Stepped(strategy, cpus=2)
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    step_until(machine, 0, lambda: bool(machine.events("seamcall_return", cpu=0)))
    waiter = machine.start(info, 1, "reader")
    only(machine, 1)
    waits = machine.cpu(1).waits_for[0] if waiter.result is None else ""
    return Shown(machine, waits == "spins on seamldr_lock", {"CPU 1": waits or f"has read, errno {waiter.result}"})


def crash_in_call(strategy: A_STRATEGY) -> Shown:
    """H22: CPU 1 panics while a reader on CPU 0 is inside P-SEAMLDR; two VMCSs are active there."""
    machine = Stepped(strategy, cpus=2)
    for task in (0, 1):
        machine.run(load_run_put(machine.new_vcpu(task)))
    reader = machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    crash = machine.start(machine_crash_shutdown, 1, "panic")
    only(machine, 1, 40)
    early = machine.count("nmi_enter")
    machine.machine.run()
    cleared = [r["result"] for r in machine.events("vmclear", cpu=0) if r["reason"] == "emergency"]
    left = [machine.cpu(n).vmx.mode is VmxMode.OUTSIDE for n in (0, 1)]
    seen = {
        "NMIs taken in SEAM": early,
        "current VMCS in the NMI handler": [r["cur"] != NONE for r in machine.events("nmi_enter", cpu=0)],
        "emergency VMCLEARs": cleared,
        "CPUs out of VMX operation": sum(left),
        "CPU 0 has halted": bool(machine.memory.load(per_cpu(0).halted)[0]),
        "the reader has returned": reader.result is not None,
        "seamldr_lock is held": "seamldr_lock" in machine.cpu(0).tokens,
    }
    bites = crash.result and not early and all(left) and seen["seamldr_lock is held"] and reader.result is None
    return Shown(machine, bool(bites), seen)


WATCHDOG_THRESH = 10
"""Seconds between two NMIs of the hard lockup detector."""


def long_stop(seconds: int) -> Shown:
    """H23: three CPUs install a module, one after the other, each for so many seconds; the watchdog watches."""
    machine = Stepped("none", cpus=3)
    machine.run(load_run_put(machine.new_vcpu(0)))
    worker = machine.start(install(machine), name="kworker")
    stepped, now, entered = machine.machine, 1, 0
    inside: int | None = None
    while worker.result is None:
        for cpu in stepped.cpus:
            if not cpu.irq_work:
                irq_work_queue(cpu, watchdog_hrtimer_fn)
            if now % WATCHDOG_THRESH == 0 and not cpu.nmi_work:
                nmi_work_queue(cpu, watchdog_overflow_callback)
            stepped.asleep.discard(cpu.number)
        if inside is not None and now - entered >= seconds:
            stepped.step(inside)
        while ready := [number for number in stepped.ready() if number != machine.seam.inside]:
            stepped.step(ready[0])
        if machine.seam.inside != inside:
            inside, entered = machine.seam.inside, now
        now += 1
    reports = [text for text in warnings(machine) if "LOCKUP" in text]
    own = [r for r in stepped.records if r["node"] == "cpu0" and r["event"] != "ipi_deliver"]
    late = [after for before, after in pairwise(own) if before["event"] == "seamcall_return" and after["ctx"] == "nmi"]
    seen = {
        "seconds in stop_machine": now,
        "kernel log": reports,
        "NMIs right after SEAMRET, with a current VMCS": [r["cur"] != NONE for r in late],
        "VMX instructions in NMI handlers": len([r for r in machine.events("vmread", "vmwrite") if r["ctx"] == "nmi"]),
        "the update": worker.result,
    }
    return Shown(machine, reports != [], seen)


class DryModule(Hooks):
    """RDRAND and RDSEED that fail a number of times in the TDX module."""

    def __init__(self, times: int) -> None:
        self.left = times

    def entropy(self, lp: int) -> bool:
        """Whether there is some now."""
        self.left -= 1
        return self.left < 0


def entropy(leaf: str, times: int) -> Shown:
    """H24: a module is installed; TDH.SYS.INIT, or P-SEAMLDR, finds no entropy so many times."""
    machine = Stepped("none")
    old = machine.seam.module
    worker = machine.start(install(machine), name="kworker")
    if leaf == "SEAMLDR.INSTALL":
        dry_seamldr(machine, times)
    else:
        step_until(machine, 0, lambda: machine.seam.module not in (old, None))
        assert machine.seam.module is not None
        machine.seam.module.hooks = DryModule(times)
    machine.machine.run()
    attempts = machine.count("seamcall_enter", name=leaf)
    log = [r["text"] for r in machine.events("log")]
    return Shown(machine, worker.result == -5, {"attempts": attempts, "the update": worker.result, "kernel log": log})


UPLOADS = 6
PAUSE = 60
"""Operations between two uploads, and between two timer ticks."""
RESIDENCE = 0.985
"""Chance that a read of the version goes on while CPU 0 steps: user space that does nothing else."""


def reader_loop(strategy: A_STRATEGY, v3: bool) -> Shown:
    """H26: user space reads the version in a loop on CPU 1, in turns with a vCPU; CPU 0 uploads a module six times."""
    machine, rng = Stepped(strategy, cpus=2), Random(1)
    x = machine.new_vcpu(0, 1)

    async def read(cpu: Cpu) -> None:
        await seamldr_version_show(cpu, INFO_PAGE)

    async def loop(cpu: Cpu, body: Callable[[Cpu], Coroutine[Any, Any, Any]]) -> None:
        while await cpu.resume_user_mode():
            await body(cpu)

    threads = {name: Thread(name, Priority.VCPU, loop(machine.cpu(1), body), slice_exits=1)
               for name, body in (("reader", read), ("vcpu0", x.run))}  # fmt: skip
    for thread in threads.values():
        machine.machine.start(1, thread)

    async def upload(cpu: Cpu) -> list[int]:
        uploads, errnos = install(machine, v3=v3), list[int]()
        for _ in range(UPLOADS):
            errnos.append(await uploads(cpu))
            for _ in range(PAUSE):
                await cpu.give_way()
        return errnos

    worker = machine.start(upload, 0, "kworker")
    while worker.result is None:
        ready = machine.machine.ready()
        if machine.seam.inside == 1 and 0 in ready and rng.random() < RESIDENCE:
            ready = [0]
        machine.machine.step(rng.choice(ready))
        if machine.machine.steps % PAUSE == 0:
            tick(machine, 1)
    for thread in threads.values():
        thread.stopping = True
    machine.machine.run()
    seen = {
        "reads": machine.count("seamcall_return", name="SEAMLDR.INFO", node="cpu1"),
        "VMCSs that they took": machine.judge().exposures.lost_vmcs,
        "uploads": worker.result,
        "updates begun": machine.count("update_begin"),
    }
    return Shown(machine, worker.result.count(-5) > UPLOADS // 2, seen)


def tick(machine: Stepped, number: int) -> None:
    """The timer ends the slice of the thread that runs on a CPU."""
    thread = machine.machine.loops[number].current
    if thread is not None:
        thread.slice_left = 0
        machine.cpu(number).need_resched = True


def kvm_unloaded_under_waiter(strategy: A_STRATEGY, owner: str) -> Shown:
    """H28: KVM is unloaded while CPU 0 is inside P-SEAMLDR and CPU 1 waits for the lock."""
    machine = Stepped(strategy, cpus=3, vmxon_owner=owner)
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    waiter = machine.start(info, 1, "reader")
    only(machine, 1)
    machine.start(kvm_exit, 2, "rmmod")
    machine.machine.run(max)
    outside = machine.cpu(1).vmx.mode is VmxMode.OUTSIDE
    return Shown(machine, waiter.result == -13, {"errno of CPU 1": waiter.result, "CPU 1 has left VMX": outside})


def callback_after_unload(strategy: A_STRATEGY) -> Shown:
    """H28: KVM is unloaded when a reader on CPU 0 has just read KVM's callback pointer."""
    machine = Stepped(strategy, cpus=2)
    machine.start(info, 0, "reader")
    step_until(machine, 0, lambda: any(word == KERNEL.kvm_unloaded for word, _ in machine.cpu().recent_loads))
    machine.start(kvm_exit, 1, "rmmod")
    machine.machine.run(prefer(1))
    return Shown(machine, warnings(machine) != [], {"kernel log": warnings(machine)})


def nmis_merge(count: int) -> Shown:
    """H32: so many NMIs arrive while a reader is inside P-SEAMLDR."""
    machine = Stepped("none")
    machine.start(info)
    until_in_seam(machine, 0)
    merged = [machine.cpu().apic.accept_nmi() for _ in range(count)]
    machine.machine.run()
    order = [r["event"] for r in machine.events("seamcall_return", "nmi_enter", "lock_drop")]
    return Shown(machine, any(merged), {"delivered": machine.count("nmi_enter"), "order": order})


def duplicated_ipi() -> Shown:
    """H33: the clear IPI for x comes once more, and so does the call that it brought."""
    machine = Stepped("none", cpus=2)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    machine.run(load_run_put(x), 1)
    machine.cpu().apic.accept(Vector.CALL_FUNCTION_SINGLE)
    machine.machine.asleep.discard(0)
    machine.machine.run()
    runs, clears = machine.count("csd_run"), machine.count("vmclear")
    machine.run(lambda cpu: clear_on_this_cpu(cpu, x.state.loaded_vmcs.address))
    again = machine.count("vmclear") - clears
    alive = machine.run(load_run_put(x), 1)
    seen = {
        "interrupts": machine.count("irq_enter"),
        "functions run": runs,
        "VMCLEARs of the second call": again,
        "broken": violated(machine),
    }
    return Shown(machine, runs != 1 or bool(again) or not alive or bool(violated(machine)), seen)


def stopped_before_repair(strategy: A_STRATEGY) -> Shown:
    """H35: CPU 0 stands still between SEAMRET and its repair; CPU 1 loads x, which ran there."""
    machine = Stepped(strategy, cpus=2)
    x = machine.new_vcpu(0)
    machine.run(load_run_put(x))
    machine.start(info, 0, "reader")
    until_in_seam(machine, 0)
    machine.machine.step(0)
    machine.start(load_only(x), 1, "vcpu0")
    only(machine, 1)
    waits = machine.cpu(1).waits_for[0]
    machine.machine.run(prefer(1))
    found = violated(machine)
    seen = {"CPU 1, meanwhile": waits, "later": "cleared" if machine.count("csd_done") else "", "broken": found}
    return Shown(machine, "I1" in found or failed(machine, "vmread", "vmwrite") != [], seen)
