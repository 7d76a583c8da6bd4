"""What messages make a CPU do: vCPU threads, user space's requests, and the word that says where a task is."""

from __future__ import annotations

import functools
from errno import ENXIO

from bus.messages import (
    AdminDone,
    Body,
    BuildTd,
    Hotplug,
    InstallModule,
    MoveTask,
    Preempt,
    ReadVersion,
    RunTask,
    StopTask,
    TaskEnded,
    TaskMoved,
)
from bus.spec import KVM, MachineSpec
from cpu.cpu import Cpu
from cpu.irq_work import irq_work_queue, nmi_work_queue
from cpu.layout import KERNEL, task_vmcs
from cpu.loop import Priority, Thread
from cpu.mutex import mutex_lock, mutex_unlock
from cpu.process import CpuProcess, Personality
from kvm.compose import Knobs, kernel, vmx_config
from kvm.hardware import cpu_down, cpu_up
from kvm.hotplug import add_cpu, cpuhp_thread, remove_cpu
from kvm.run_queue import count_task, dequeue_task, enqueue_task, is_active, redirect_task, select_fallback_rq
from kvm.td_ioctl import td_ioctl
from kvm.tdx import VmxTdVcpu, td_vcpu_thread
from kvm.vcpu import td_vcpu_of, vcpu_of
from kvm.vmx import VmxVcpu, vcpu_thread
from seamldr.update import seamldr_install_module, seamldr_version_show

SLICE_EXITS = 16
READER = "reader"


def personality(spec: MachineSpec) -> Personality:
    """The kernel of this machine's CPUs and what they do on messages; raises `StrategyError`."""
    knobs = Knobs(**spec.knobs)
    return Personality(
        config=vmx_config(knobs),
        kernel=kernel(spec.strategy, knobs, spec.cpus),
        cpu_up=functools.partial(cpu_up, vcpus=spec.vcpus, tds=spec.tds),
        cpu_down=cpu_down,
        cpuhp=cpuhp_thread,
        spawn=spawn,
        thread_ended=ended,
    )


def spawn(process: CpuProcess, body: Body) -> Thread | None:
    """The thread that a message starts here, or None if it only changed one."""
    cpu, endpoint = process.cpu, process.endpoint
    match body:
        case RunTask(task=task):
            return _task_thread(process, task)
        case MoveTask(task=task, to=to):
            thread = process.loop.find_task(task)
            if thread is None or to >= process.spec.cpus or not is_active(cpu, to):
                endpoint.send(KVM, TaskMoved(task, to, False))
            else:
                thread.move_to = to
        case StopTask(task=task):
            thread = process.loop.find_task(task)
            if thread is not None:
                thread.stopping = True
        case Preempt():
            return Thread("housekeeping", Priority.KERNEL, _housekeeping(cpu))
        case ReadVersion() | BuildTd() | InstallModule() | Hotplug() if not is_active(cpu, cpu.number):
            endpoint.send(KVM, AdminDone(body.request, -ENXIO, f"CPU {cpu.number} is not active"))
        case ReadVersion() as read:
            return _reader(process, read)
        case BuildTd() as build:
            return Thread(f"qemu{build.td}", Priority.KERNEL, _td_ioctl(process, build))
        case InstallModule() as install:
            return Thread("kworker", Priority.KERNEL, _install(process, install))
        case Hotplug() as hotplug:
            return Thread("kworker", Priority.KERNEL, _hotplug(process, hotplug))
        case _:
            process.node.refuse("unexpected", type(body).__name__)
    return None


def _task_thread(process: CpuProcess, task: int) -> Thread | None:
    cpu, spec = process.cpu, process.spec
    if task >= spec.vcpus + spec.tds:
        process.node.refuse("task", str(task))
        return None
    if not is_active(cpu, cpu.number):
        _send_on(process, task)
        return None
    if not enqueue_task(cpu, task):
        return None
    if task < spec.vcpus:
        vcpu = VmxVcpu(task, vcpu_of(task))
        body = vcpu_thread(cpu, vcpu, task_vmcs(task))
        return Thread(f"vcpu{task}", Priority.VCPU, body, task=task, slice_exits=SLICE_EXITS)
    td = VmxTdVcpu(task, td_vcpu_of(task))
    return Thread(f"td{task - spec.vcpus}", Priority.VCPU, td_vcpu_thread(cpu, td), task=task, slice_exits=SLICE_EXITS)


def _send_on(process: CpuProcess, task: int) -> None:
    """A task was sent here while the CPU was going offline: it goes on to another."""
    to = redirect_task(process.cpu, task)
    if to is not None:
        process.endpoint.send(f"cpu{to}", RunTask(task))


def ended(process: CpuProcess, thread: Thread) -> None:
    """A thread has ended here: a task that moves goes on at another CPU, or here again if there is no other."""
    cpu, task, endpoint = process.cpu, thread.task, process.endpoint
    if thread.name == READER:
        count_task(cpu, -1)
    if task is None:
        return
    if thread.result != "moved" or thread.move_to is None:
        dequeue_task(cpu, task, None)
        endpoint.send(KVM, TaskEnded(task, str(thread.result)))
        return
    to = thread.move_to if is_active(cpu, thread.move_to) else select_fallback_rq(cpu)
    if to is None or to == cpu.number:
        dequeue_task(cpu, task, cpu.number)
        again = _task_thread(process, task)
        if again is not None:
            process.loop.add(again)
    else:
        dequeue_task(cpu, task, to)
        endpoint.send(f"cpu{to}", RunTask(task))
    endpoint.send(KVM, TaskMoved(task, to or cpu.number, to not in (None, cpu.number)))


def _reader(process: CpuProcess, read: ReadVersion) -> Thread | None:
    """Whoever reads the version: a thread, an interrupt handler, or the NMI handler (`call_context`)."""
    cpu = process.cpu
    context = cpu.kernel.knobs["call_context"]
    if context == "task":
        count_task(cpu, 1)
        return Thread(READER, Priority.KERNEL, _read_version(process, read))
    queue = irq_work_queue if context == "irq" else nmi_work_queue
    queue(cpu, lambda _: _read_version(process, read))
    return None


async def _housekeeping(cpu: Cpu) -> None:
    """A short kernel thread: its only effect is that it ran."""
    await cpu.give_way()


async def _read_version(process: CpuProcess, read: ReadVersion) -> None:
    cpu = process.cpu
    cpu.emit("admin_begin", request=read.request, kind="read_version")
    errno, text = await seamldr_version_show(cpu, read.buffer)
    cpu.emit("admin_end", request=read.request, kind="read_version", errno=errno, text=text)
    process.endpoint.send(KVM, AdminDone(read.request, errno, text))


async def _td_ioctl(process: CpuProcess, build: BuildTd) -> None:
    cpu, kind = process.cpu, f"td_{build.command}"
    cpu.emit("admin_begin", request=build.request, kind=kind)
    errno, text = await td_ioctl(cpu, build.command, build.td, build.task, build.pages)
    cpu.emit("admin_end", request=build.request, kind=kind, errno=errno, text=text)
    process.endpoint.send(KVM, AdminDone(build.request, errno, text))


async def _hotplug(process: CpuProcess, hotplug: Hotplug) -> None:
    cpu, kind = process.cpu, "online" if hotplug.online else "offline"
    cpu.emit("admin_begin", request=hotplug.request, kind=kind)
    errno = await (add_cpu if hotplug.online else remove_cpu)(cpu, hotplug.cpu)
    cpu.emit("admin_end", request=hotplug.request, kind=kind, errno=errno, text=f"CPU {hotplug.cpu}")
    process.endpoint.send(KVM, AdminDone(hotplug.request, errno, ""))


async def _install(process: CpuProcess, install: InstallModule) -> None:
    cpu = process.cpu
    cpu.emit("admin_begin", request=install.request, kind="install")
    await mutex_lock(cpu, KERNEL.upload_mutex)
    errno = await seamldr_install_module(cpu, install.pages, install.length, install.params)
    await mutex_unlock(cpu, KERNEL.upload_mutex)
    text = "" if errno == 0 else "transferring:firmware-invalid"
    cpu.emit("admin_end", request=install.request, kind="install", errno=errno, text=text)
    process.endpoint.send(KVM, AdminDone(install.request, errno, text))
