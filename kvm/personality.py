"""What messages make a CPU do: vCPU threads, user space's requests, and the word that says where a task is."""

from __future__ import annotations

from bus.messages import (
    AdminDone,
    Body,
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
from cpu.layout import Task, task_address, task_vmcs
from cpu.loop import Priority, Thread
from cpu.process import CpuProcess, Personality
from cpu.struct import NONE
from kvm.compose import Knobs, kernel, vmx_config
from kvm.hardware import cpu_down, cpu_up
from kvm.tdx import VmxTdVcpu, td_vcpu_thread
from kvm.vcpu import td_vcpu_of, vcpu_of
from kvm.vmx import VmxVcpu, vcpu_thread
from seamldr.update import seamldr_install_module, seamldr_version_show

SLICE_EXITS = 16

ON_RQ = 2


def personality(spec: MachineSpec) -> Personality:
    """The kernel of this machine's CPUs and what they do on messages; raises `StrategyError`."""
    knobs = Knobs(**spec.knobs)
    return Personality(vmx_config(knobs), kernel(spec.strategy, knobs, spec.cpus), cpu_up, cpu_down, spawn, ended)


def spawn(process: CpuProcess, body: Body) -> Thread | None:
    """The thread that a message starts here, or None if it only changed one."""
    cpu, endpoint = process.cpu, process.endpoint
    match body:
        case RunTask(task=task):
            return _task_thread(process, task)
        case MoveTask(task=task, to=to):
            thread = process.loop.find_task(task)
            if thread is None or to >= process.spec.cpus:
                endpoint.send(KVM, TaskMoved(task, to, False))
            else:
                thread.move_to = to
        case StopTask(task=task):
            thread = process.loop.find_task(task)
            if thread is not None:
                thread.stopping = True
        case Preempt():
            return Thread("housekeeping", Priority.KERNEL, _housekeeping(cpu))
        case ReadVersion() as read:
            return _reader(process, read)
        case InstallModule() as install:
            return Thread("kworker", Priority.KERNEL, _install(process, install))
        case _:
            process.node.emit("refused", reason="unexpected", head=type(body).__name__)
    return None


def _task_thread(process: CpuProcess, task: int) -> Thread | None:
    cpu, spec = process.cpu, process.spec
    if task >= spec.vcpus + spec.tds or process.loop.find_task(task):
        process.node.emit("refused", reason="task", head=str(task))
        return None
    _place(cpu, task, cpu.number * 4 + ON_RQ)
    if task < spec.vcpus:
        vcpu = VmxVcpu(task, vcpu_of(task))
        body = vcpu_thread(cpu, vcpu, task_vmcs(task))
        return Thread(f"vcpu{task}", Priority.VCPU, body, task=task, slice_exits=SLICE_EXITS)
    td = VmxTdVcpu(task, td_vcpu_of(task))
    return Thread(f"td{task - spec.vcpus}", Priority.VCPU, td_vcpu_thread(cpu, td), task=task, slice_exits=SLICE_EXITS)


def _place(cpu: Cpu, task: int, place: int) -> None:
    cpu.memory.store(Task(task_address(task)).place, place, cpu.clock.tick())


def ended(process: CpuProcess, thread: Thread) -> None:
    """A thread has ended here: a task that moves goes on at another CPU."""
    task = thread.task
    if task is None:
        return
    _place(process.cpu, task, NONE)
    to = thread.move_to
    if thread.result == "moved" and to is not None:
        process.endpoint.send(f"cpu{to}", RunTask(task))
        process.endpoint.send(KVM, TaskMoved(task, to, True))
    else:
        process.endpoint.send(KVM, TaskEnded(task, str(thread.result)))


def _reader(process: CpuProcess, read: ReadVersion) -> Thread | None:
    """Whoever reads the version: a thread, an interrupt handler, or the NMI handler (`call_context`)."""
    cpu = process.cpu
    context = cpu.kernel.knobs["call_context"]
    if context == "task":
        return Thread("reader", Priority.KERNEL, _read_version(process, read))
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


async def _install(process: CpuProcess, install: InstallModule) -> None:
    cpu = process.cpu
    cpu.emit("admin_begin", request=install.request, kind="install")
    errno = await seamldr_install_module(cpu, install.pages, install.length, install.params)
    text = "" if errno == 0 else "transferring:firmware-invalid"
    cpu.emit("admin_end", request=install.request, kind="install", errno=errno, text=text)
    process.endpoint.send(KVM, AdminDone(install.request, errno, text))
