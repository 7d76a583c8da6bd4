"""Hazards of the update and of CPU hotplug: H14 to H20, H27, H31, and H33's acknowledgements.

`kvm.hazard_table` has the table of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bus.memory import PAGE_SIZE
from cpu.cpu import Cpu
from cpu.hotplug_lock import cpus_write_lock, cpus_write_unlock
from cpu.irq_work import nmi_work_queue
from cpu.layout import TDMR, TDMR_SIZE, UPDATE_CTRL, per_cpu
from cpu.loop import Priority, Thread
from cpu.nmi_watchdog import watchdog_overflow_callback
from cpu.smp import smp_call_function_single
from kvm import hotplug, loaded_vmcs
from kvm.hazard import (
    IMAGE_AT,
    Shown,
    all_until,
    failed,
    initialized,
    install,
    load_only,
    load_run_put,
    patched,
    step_until,
    violated,
    warnings,
)
from kvm.hotplug import remove_cpu
from kvm.loaded_vmcs import vmclear_local_loaded_vmcss
from kvm.stepped import Stepped, module
from seamldr import update
from seamldr.image import build_v1, build_v2
from seamldr.seam import SCRATCH
from seamldr.tdx_boot import create_td
from seamldr.update import ModuleUpdateState

STAGES = [stage for stage in ModuleUpdateState if ModuleUpdateState.START < stage < ModuleUpdateState.DONE]


async def no_sweep(cpu: Cpu) -> None:
    """`vmclear_local_loaded_vmcss` that does nothing."""
    await cpu.give_way()


def offline_before_load(swept: bool) -> Shown:
    """H14: x's last CPU goes offline, by way of KVM's sweep or without it; x is loaded on another."""
    with _spied() as errnos:
        machine = Stepped("none", cpus=2)
        x = machine.new_vcpu(0, 1)
        machine.run(load_run_put(x), 1)
        with patched(hotplug, "vmclear_local_loaded_vmcss", vmclear_local_loaded_vmcss if swept else no_sweep):
            machine.run(lambda cpu: remove_cpu(cpu, 1))
        errnos.clear()
        alive = machine.run(load_run_put(x))
    seen = {
        "VMCSs lost by VMXOFF": [r["active"] for r in machine.events("vmxoff")],
        "clear IPIs return": list(errnos),
        "entries that fail": failed(machine, "vmentry"),
        "broken": violated(machine),
    }
    return Shown(machine, not alive, seen)


def offline_while_destroyed() -> Shown:
    """H14: x is destroyed; when its last CPU has been read, and no clear IPI sent yet, that CPU goes offline."""
    with _spied() as errnos:
        machine = Stepped("none", cpus=2)
        x = machine.new_vcpu(0, 1)
        machine.run(load_run_put(x), 1)
        errnos.clear()
        owner = x.state.loaded_vmcs.cpu
        machine.start(x.destroy, 0, "user")
        step_until(machine, 0, lambda: (owner, 1) in machine.cpu().recent_loads)
        machine.machine.start(0, Thread("remover", Priority.STOPPER, remove_cpu(machine.cpu(), 1)))
        machine.machine.run(max)
    seen = {"clear IPIs return": list(errnos), "broken": violated(machine), "kernel log": warnings(machine)}
    return Shown(machine, bool(violated(machine)), seen)


@contextmanager
def _spied() -> Iterator[list[int]]:
    """What the cross-calls return by which a VMCS is cleared elsewhere, and which KVM does not look at."""
    errnos: list[int] = []

    async def spy(cpu: Cpu, target: int, func: str, info: int) -> int:
        errno = await smp_call_function_single(cpu, target, func, info)
        errnos.append(errno)
        return errno

    with patched(loaded_vmcs, "smp_call_function_single", spy):
        yield errnos


SWEEP = 12
"""Operations of the sweep, from its first VMCLEAR on, after which the other CPU comes."""


def sweep_against_clear_ipi(irqs: str) -> Shown:
    """H14b: CPU 1 goes offline with three VMCSs; in the middle of its sweep CPU 2 loads one of them.

    Every operation and each of the three is tried until one breaks.
    """
    for attempt in range(3 * SWEEP):
        machine, ended = _sweep_against_clear_ipi(irqs, *divmod(attempt, 3))
        lost = [r["active"] for r in machine.events("vmxoff")]
        if not ended or lost != [0]:
            break
    seen = {"histories": attempt + 1, "it comes to an end": ended, "VMCSs lost by VMXOFF": lost}
    return Shown(machine, not ended or lost != [0], seen)


def _sweep_against_clear_ipi(irqs: str, operations: int, task: int) -> tuple[Stepped, bool]:
    machine = Stepped("none", cpus=3, offline_irqs=irqs)
    vcpus = [machine.new_vcpu(task, 1) for task in range(3)]
    for vcpu in vcpus:
        machine.run(load_run_put(vcpu), 1)
    machine.start(lambda cpu: remove_cpu(cpu, 1), 0)
    all_until(machine, lambda: bool(machine.count("vmclear", ctx="cpuhp/1")))
    for _ in range(operations):
        machine.machine.step(1)
    machine.start(load_only(vcpus[task]), 2, "vcpu")
    try:
        machine.machine.run(max, limit=5000)
    except RuntimeError:
        return machine, False
    return machine, True


def last_cpu_of_package(tds: int, package: int) -> Shown:
    """H15: CPU 1, in a package of its own or not, goes offline; a TD has a private key id or not."""
    machine = Stepped("none", cpus=2, tds=tds)
    machine.memory.store(per_cpu(1).package, package, 0)
    errno = machine.run(lambda cpu: remove_cpu(cpu, 1))
    log = [r["text"] for r in machine.events("log")]
    return Shown(machine, errno == -16, {"errno": errno, "kernel log": log})


def _after(machine: Stepped, errno: int) -> Shown:
    """How an update ended; it bites if that was fatal."""
    refused = [f"{r['state']} on {r['node']}: {r['ret']}" for r in machine.events("ack") if r["ret"]]
    seen = {"the update": errno, "failed in": refused, "TDX is initialized": initialized(machine)}
    return Shown(machine, errno != 0 and not initialized(machine), seen)


def update_with_offline_cpu(v3: bool) -> Shown:
    """H16: a module is installed while CPU 1 is offline."""
    machine = Stepped("none", cpus=2)
    machine.run(lambda cpu: remove_cpu(cpu, 1))
    return _after(machine, machine.run(install(machine, v3=v3)))


def no_update_left(v3: bool) -> Shown:
    """H17: a module is installed when P-SEAMLDR has no room for another."""
    machine = Stepped("none", cpus=2, seamdb_size=2)
    machine.run(install(machine))
    return _after(machine, machine.run(install(machine, build_v2(module("1.5.10")), v3=v3)))


def td_being_built(avoid: str) -> Shown:
    """H18: a module is installed while a TD is between TDH.MNG.INIT and TDH.MR.FINALIZE."""
    machine = Stepped("none", avoid_compat_sensitive=avoid, module_profile="B")
    running = machine.seam.module
    assert running is not None
    pages = iter(range(TDMR, TDMR + TDMR_SIZE, PAGE_SIZE))
    create_td(running, hkid=running.platform.first_private_hkid + 1, pages=pages, scratch_pa=SCRATCH, max_vcpus=1)
    machine.seam.keep()
    errno = machine.run(install(machine, build_v2(module("1.5.09", "B"))))
    seen = {"the update": errno, "TDX is initialized": initialized(machine)}
    return Shown(machine, errno == 0, seen)


def install_fails(cpus: int, damaged: bool = True) -> Shown:
    """H19: a page of the image does not have the hash that the signed structure says."""
    machine = Stepped("none", cpus=cpus)
    body = install(machine)
    if damaged:
        machine.memory.write(IMAGE_AT + 3 * PAGE_SIZE, b"\x55" * 64)
    errno = machine.run(body)
    statuses = [r["status"] for r in machine.events("seamcall_return") if r["name"] == "SEAMLDR.INSTALL"]
    shown = _after(machine, errno)
    return Shown(machine, shown.bites, {"SEAMLDR.INSTALL returns": [f"{s:#x}" for s in statuses], **shown.seen})


def cpu_dies_in_callback(stage: ModuleUpdateState) -> Shown:
    """H20: of three CPUs that install a module, CPU 2 stops for good as it begins a stage; then the watchdog looks."""
    machine = Stepped("none", cpus=3)
    worker = machine.start(install(machine), 0, "kworker")
    stepped = machine.machine
    while not any(r["state"] == stage.name for r in machine.events("state_enter", cpu=2)):
        stepped.step(stepped.ready()[-1])
    for _ in range(2):
        for cpu in stepped.cpus[:2]:
            nmi_work_queue(cpu, watchdog_overflow_callback)
            stepped.asleep.discard(cpu.number)
        while alive := [number for number in stepped.ready() if number != 2]:
            stepped.step(alive[0])
    seen = {
        "the stage stays": ModuleUpdateState(machine.memory.load(UPDATE_CTRL.state)[0]).name,
        "interrupts are on": [cpu.irqs_on for cpu in stepped.cpus[:2]],
        "CPU 0": machine.cpu().waits_for[0],
        "kernel log": sorted(warnings(machine)),
    }
    stuck = worker.result is None and seen["the stage stays"] == stage.name
    return Shown(machine, stuck and len(warnings(machine)) == 2, seen)


def image_of_old_client(version: int) -> Shown:
    """H27: user space uploads a container of this version."""
    machine = Stepped("none")
    image = (build_v1 if version == 1 else build_v2)(module("1.5.09"))
    errno = machine.run(install(machine, image))
    seen = {
        "the update": errno,
        "SEAMCALLs": machine.count("seamcall_enter"),
        "TDX is initialized": initialized(machine),
    }
    return Shown(machine, errno == -22 and not seen["SEAMCALLs"] and initialized(machine), seen)


async def without_cpu_0(cpu: Cpu) -> None:
    """`remove_cpu` of CPU 0, without the rule that forbids it."""
    await cpus_write_lock(cpu)
    await hotplug._cpu_down(cpu, 0)
    await cpus_write_unlock(cpu)


def lead_cpu_absent(absent: bool) -> Shown:
    """H31: CPU 0 goes offline, past the rule that forbids it, and a module is installed on the other."""
    machine = Stepped("none", cpus=2)
    if absent:
        machine.run(without_cpu_0, 1)
    errno = machine.run(install(machine), 1)
    running = machine.seam.module
    assert running is not None
    seen = {
        "the update": errno,
        "TDH.SYS.SHUTDOWN": machine.count("seamcall_enter", name="TDH.SYS.SHUTDOWN"),
        "SEAMLDR.INSTALL": machine.count("seamcall_enter", name="SEAMLDR.INSTALL"),
        "module that runs": f"1.5.{running.identity.update:02}",
        "TDX is initialized": initialized(machine),
    }
    return Shown(machine, errno == 0 and running.identity.update == 8, seen)


def duplicated_ack(twice: bool) -> Shown:
    """H33: CPU 1 acknowledges each stage of an update, twice or once."""
    machine = Stepped("none", cpus=3)
    once = update._ack_state

    async def ack_twice(cpu: Cpu, number: int, state: ModuleUpdateState, ret: int) -> None:
        await once(cpu, number, state, ret)
        if cpu.number == 1:
            await once(cpu, number, state, ret)

    with patched(update, "_ack_state", ack_twice if twice else once):
        worker = machine.start(install(machine), 0, "kworker")
        machine.machine.run()
    seen = {"the update": worker.result, "broken": violated(machine, finished=worker.result is not None)}
    return Shown(machine, "I31" in violated(machine, finished=worker.result is not None), seen)
