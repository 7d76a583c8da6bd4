"""The map of physical memory: who lives where. Computed from the topology, the same in every process.

    0x0010_0000   words of the whole kernel (online mask, update control, stop_machine)
    0x0018_0000   TDVPR addresses of the TDs that firmware built, plain u64
    0x0020_0000   watch slots, 64 bytes a CPU, in one row so that a store searches them at memory speed
    0x0040_0000   a row for each CPU that shows to those who look on what it is doing (`cpu.board`)
    0x0050_0000   a row for each lock, with who holds it and who waits (`seamldr.lock_board`)
    0x0100_0000   per-CPU areas, four pages a CPU: two of words, VMXON region, scratch VMCS
    0x0800_0000   task area, two pages a task: struct task with struct vcpu and struct loaded_vmcs, VMCS region
    0x0C00_0000   TD area, one page a TD that KVM builds: struct kvm_tdx
    0x1000_0000   pages for user space's buffers and for SEAMLDR_PARAMS
    0x4000_0000   SEAMRR: TDX module range, then P_SEAMLDR_RANGE
    0x6000_0000   PAMT of the one TDMR; no RAM stands behind it
    0x8000_0000   the TDMR, encrypted memory that only the TDX module reads: pages for TDs that KVM builds, then, with
                  no RAM behind them, pages of the TDs that firmware built

What a TD is, is in the module's records, in the SEAM range.
"""

from __future__ import annotations

import enum

from bus.memory import PAGE_SIZE
from cpu.struct import KernelStruct, Word

MAX_CPUS = 4096
MAX_TASKS = 8192
MAX_TDS = 128
WATCH_SLOTS = 8

KERNEL_WORDS = 0x0010_0000
TD_TABLE = 0x0018_0000
WATCH_TABLE = 0x0020_0000
BOARD = 0x0040_0000
BOARD_ROW = 128
LOCK_BOARD = 0x0050_0000
PER_CPU = 0x0100_0000
PER_CPU_SIZE = 4 * PAGE_SIZE
TASKS = 0x0800_0000
TASK_SIZE = 2 * PAGE_SIZE
TDS = 0x0C00_0000
BUFFERS = 0x1000_0000
BUFFERS_END = 0x4000_0000
PAMT = 0x6000_0000
TDMR = 0x8000_0000
TDMR_SIZE = 1 << 30
PAGES_PER_TD = 64
TD_PAGES_END = TDMR + MAX_TDS * PAGES_PER_TD * PAGE_SIZE
SEAMRR_BASE = 0x4000_0000
P_SEAMLDR_SIZE = 32 << 20


def seamrr_size(cpus: int) -> int:
    """Bytes of SEAMRR: half of it is P_SEAMLDR_RANGE or more room for the module's per-LP pages, a power of two."""
    return (64 << 20) if cpus <= 512 else (256 << 20)


def memory_size(cpus: int) -> int:
    """Bytes of physical memory, almost all of them never touched."""
    assert SEAMRR_BASE + seamrr_size(cpus) <= PAMT
    return TD_PAGES_END


class MultiStop(KernelStruct):
    """`struct multi_stop_data`, with the completion that its caller sleeps on."""

    fn = Word()
    data = Word()
    num_threads = Word()
    state = Word()
    thread_ack = Word()
    result = Word()
    nr_todo = Word()
    active_cpu = Word()
    """The one CPU that runs the callback, or NONE: all do."""


class UpdateCtrl(KernelStruct):
    """`update_ctrl`: the lock-step of a module update. `params` and `update` are what the callback is given."""

    state = Word()
    num_ack = Word()
    num_failed = Word()
    params = Word()
    update = Word()
    online = Word()


class TdxState(KernelStruct):
    """What the kernel remembers of the TDX module."""

    initialized = Word()
    sysinit_done = Word()
    sysinit_ret = Word()
    version = Word()
    nr_keyids = Word()
    features0 = Word()
    phys_bits = Word()
    """Physical address bits below the key id."""
    global_keyid = Word()
    guest_keyid_start = Word()
    nr_guest_keyids = Word()
    guest_keyid_pool = Word()
    """A bit for each guest key id in use."""
    tdcs_base_size = Word()
    tdvps_base_size = Word()


class KernelData(KernelStruct):
    """Words that belong to no CPU."""

    num_online = Word()
    stop_mutex = Word()
    next_update = Word()
    next_call = Word()
    multi_stop = Word(MultiStop.SIZE // 32)
    update_ctrl = Word(UpdateCtrl.SIZE // 32)
    tdx = Word(TdxState.SIZE // 32)
    hotplug_writer = Word()
    upload_mutex = Word()
    """One install at a time, whoever asked for it."""
    virt_rebooting = Word()
    kvm_unloaded = Word()
    crashing_cpu = Word()
    crash_waits = Word()
    tdx_lock = Word()
    """KVM's mutex around SEAMCALLs that want the key ownership table for themselves."""
    kvm_text_freed = Word()
    """KVM's code is gone from memory: whoever jumps into it faults."""
    update_abort = Word()
    """Set by an operator who gives an update up whose CPU has died; Linux has nothing like it."""
    workload_began = Word()
    """When user space started its workload (monotonic clock, ns); 0 before. User space's own words, like the next."""
    workload_updates = Word()
    """How many of the workload's updates it has begun."""


CSD_LEVELS = 3
CSD_LIVES = 4


class CallSingleData(KernelStruct):
    """`struct call_single_data`."""

    next = Word()
    flags = Word()
    """CSD_FLAG_LOCK with the target's number above it, until the target has run it."""
    func = Word()
    info = Word()
    source = Word()
    call = Word()


class PerCpu(KernelStruct):
    """Per-CPU variables: RAM, so they outlive the process of their CPU."""

    online = Word()
    preempt_count = Word()
    current_vmcs = Word()
    loaded_vmcss_on_cpu = Word(2)
    associated_tdvcpus = Word(2)
    call_single_queue = Word()
    csd = Word(CSD_LIVES * CSD_LEVELS * CallSingleData.SIZE // 32)
    """For each context level; others may still read those of a process of this CPU that died, so they take turns."""
    stopper_work = Word()
    lp_initialized = Word()
    scratch_ready = Word()
    lock_grants = Word()
    virtualization_nr_users = Word()
    package = Word()
    cpuhp_work = Word()
    cpuhp_result = Word()
    halted = Word()
    lives = Word()
    """How often this CPU has come up in a new process."""
    hotplug_reads = Word()
    """Holders of the hotplug lock's read side here (a percpu-rwsem)."""
    dead = Word()
    """The launcher's word: the process of this CPU has died, and no new one is there yet."""
    active = Word()
    """Tasks may run here; the scheduler's own mask (`cpu_active_mask`)."""
    nr_tasks = Word()
    """Threads on this CPU that keep it from going offline: vCPUs' and readers'."""
    heartbeat = Word()
    """Ticks of the watchdog's timer that were taken with interrupts on."""
    heartbeat_saved = Word()
    watchdog_touch = Word()


class CpuhpWork(enum.IntEnum):
    """What the hotplug thread of a CPU is asked for (`cpuhp_work`)."""

    NONE = 0
    OFFLINE = 1
    ONLINE = 2


class LoadedVmcs(KernelStruct):
    """`struct loaded_vmcs`: one VMCS as KVM tracks it. The last four are its write-through caches."""

    vmcs = Word()
    shadow_vmcs = Word()
    cpu = Word()
    launched = Word()
    link = Word(2)
    host_rsp = Word()
    host_cr3 = Word()
    exec_control = Word()
    secondary_exec_control = Word()


class Task(KernelStruct):
    """The truth about a thread that moves between CPUs, changed by the CPU that has it; by user space if none has."""

    place = Word()
    """cpu * 4 + 2 if it is on that CPU's run queue; without the 2 it is on its way there. NONE: it has ended."""


KERNEL = KernelData(KERNEL_WORDS)
MULTI_STOP = MultiStop(KERNEL.multi_stop)
UPDATE_CTRL = UpdateCtrl(KERNEL.update_ctrl)
TDX_STATE = TdxState(KERNEL.tdx)


def per_cpu(cpu: int) -> PerCpu:
    """The per-CPU area of a CPU."""
    return PerCpu(PER_CPU + cpu * PER_CPU_SIZE)


def vmxon_region(cpu: int) -> int:
    """Physical address of the CPU's VMXON region (`root_vmcs`)."""
    return PER_CPU + cpu * PER_CPU_SIZE + 2 * PAGE_SIZE


def scratch_vmcs(cpu: int) -> int:
    """Physical address of a VMCS of this CPU that no vCPU uses."""
    return PER_CPU + cpu * PER_CPU_SIZE + 3 * PAGE_SIZE


def task_address(task: int) -> int:
    """Physical address of the words of a task."""
    return TASKS + task * TASK_SIZE


def task_vmcs(task: int) -> int:
    """Physical address of the page for the task's VMCS."""
    return TASKS + task * TASK_SIZE + PAGE_SIZE


def td_address(td: int) -> int:
    """Physical address of the words of a TD."""
    return TDS + td * PAGE_SIZE


def td_page(td: int, index: int) -> int:
    """Physical address of one of the PAGES_PER_TD pages in encrypted memory that KVM has for a TD that it builds."""
    return TDMR + (td * PAGES_PER_TD + index) * PAGE_SIZE


def watch_slots(cpu: int) -> int:
    """Physical address of the words that the CPU sleeps on: WATCH_SLOTS plain u64."""
    return WATCH_TABLE + cpu * WATCH_SLOTS * 8
