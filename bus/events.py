"""The event table: what a record may say. Writers, the analyzer and the docs share it.

Each line of a record file is one JSON object. Common fields of every record:

    ts      monotonic clock of the machine it was written on, ns
    clock   Lamport time of the event
    node    who wrote it: "launcher", "kvm", "seamldr", "cpu0", "cpu1", ...
    pid     process id
    seq     number of the record in its file, from 1
    event   name, one of EVENTS

Records of a CPU also have `ctx`, the context that ran: "vcpu3", "td1", "stopper", "kworker", "reader", "idle", or
"irq" and "nmi" while a handler runs on top of one of these; and `irqs`, RFLAGS.IF at that moment.

Physical addresses and registers are integers; NONE (2**64 - 1) is "no VMCS". A VMX `result` is "ok", "invalid" (CF),
"valid:N" (ZF, error N) or "fault:V" (exception vector V).
"""

from __future__ import annotations

import msgspec

NONE = 0xFFFF_FFFF_FFFF_FFFF


class Event(msgspec.Struct, frozen=True):
    """One kind of record: a sentence, its fields with their meaning, and whether it is written only with --trace."""

    sentence: str
    fields: dict[str, str]
    trace: bool = False


_VMCS = {"vmcs": "physical address of the VMCS region"}
_RESULT = {"result": "outcome of the instruction"}
_CUR = {"cur": "current-VMCS pointer before the instruction"}
_KIND = {"kind": "read_version, install, offline, online, or td_ and a step in the life of a TD"}
_TOKEN = {"epoch": "fencing token, high part", "number": "fencing token, low part"}

EVENTS: dict[str, Event] = {
    # The machine and its processes (written by the launcher)
    "machine_begin": Event(
        "The machine is described.",
        {
            "strategy": "name or FILE:FUNCTION",
            "knobs": "name to value",
            "seed": "of the workload",
            "cpus": "how many",
            "vcpus": "how many",
            "tds": "how many",
            "updates": "how many are asked for",
        },
    ),
    "machine_end": Event(
        "The workload has ended.", {"finished": "whether it came to its own end", "why": "a sentence if it did not"}
    ),
    "process_online": Event("A process said hello.", {"name": "its node", "incarnation": "from 1"}),
    "process_exit": Event(
        "A process is gone.",
        {"name": "its node", "status": "exit status, negative for a signal", "wanted": "asked to go"},
    ),
    "process_end_step": Event(
        "A step of ending a process was taken.", {"name": "its node", "step": "ask, SIGTERM or SIGKILL"}
    ),
    "process_waits": Event(
        "What a process that did not end was waiting for.",
        {"name": "its node", "what": "a sentence", "on": "node waited for, or empty", "operations": "done so far"},
    ),
    "fault": Event(
        "A fault was injected into the machine, or taken back.",
        {
            "kind": "kill, stop, resume, slow, replug, restart, standstill, links or abort",
            "name": "node that it strikes, or empty",
            "incarnation": "of that node, 0 if it does not matter",
            "what": "more about it",
        },
    ),
    "machine_reset": Event("Power cycle: every process and all memory are gone; the machine starts anew.", {}),
    # A CPU
    "cpu_online": Event("The CPU is in VMX operation and in the online mask.", {}),
    "cpu_offline": Event("The CPU has left the online mask.", {}),
    "counters": Event("Totals of this CPU so far.", {"counts": "name to count, as in the summary"}),
    "vmxon": Event("VMXON.", {"pa": "VMXON region", **_RESULT}),
    "vmxoff": Event("VMXOFF.", {"active": "VMCSs that were active", **_RESULT}),
    "vmptrld": Event("VMPTRLD.", {**_VMCS, **_CUR, **_RESULT, "reason": "load, restore, decoy, shadow or strategy"}),
    "vmclear": Event("VMCLEAR.", {**_VMCS, **_CUR, **_RESULT, "reason": "clear, alloc, decoy or strategy"}),
    "vmptrst": Event("VMPTRST.", {"value": "what it stored", **_RESULT}),
    "vmread": Event(
        "VMREAD. Without --trace only those that fail.",
        {"field": "encoding", "name": "of the field", "value": "read", **_VMCS, **_RESULT},
    ),
    "vmwrite": Event(
        "VMWRITE. Without --trace only those that fail.",
        {"field": "encoding", "name": "of the field", "value": "written", **_VMCS, **_RESULT},
    ),
    "vmentry": Event(
        "VMLAUNCH or VMRESUME. Without --trace the first after each load, and those that fail.",
        {
            "insn": "vmlaunch or vmresume",
            "vcpu": "task number",
            **_VMCS,
            "want": "the VMCS that KVM means to enter",
            "launched": "KVM's copy of the launch state",
            **_RESULT,
        },
    ),
    "cv_write": Event("current_vmcs of this CPU was stored.", {"old": "before", "new": "after"}),
    "list_add": Event("A loaded_vmcs was put on loaded_vmcss_on_cpu.", {**_VMCS}),
    "list_del": Event("A loaded_vmcs was taken off loaded_vmcss_on_cpu.", {**_VMCS}),
    "cpu_store": Event("loaded_vmcs.cpu was stored.", {**_VMCS, "new": "CPU number or NONE"}),
    "launched_store": Event("loaded_vmcs.launched was stored.", {**_VMCS, "new": "0 or 1"}),
    "vcpu_create": Event("A vCPU has its VMCS.", {"vcpu": "task number", **_VMCS}),
    "vcpu_destroy": Event("A vCPU's VMCS is freed.", {"vcpu": "task number", **_VMCS}),
    "vcpu_load": Event(
        "vmx_vcpu_load_vmcs has ended.",
        {
            "vcpu": "task number",
            **_VMCS,
            "via": "load, sched_in or switch",
            "skipped": "VMPTRLD was skipped: current_vmcs named this VMCS already",
            "migrated": "it was not active here before",
        },
    ),
    "vcpu_put": Event(
        "The vCPU was put.",
        {"vcpu": "task number", **_VMCS, "via": "put or sched_out", "entries": "VM entries since it was loaded"},
    ),
    "vcpu_dead": Event(
        "The vCPU cannot go on: KVM_EXIT_FAIL_ENTRY or an internal error.",
        {"vcpu": "task number", **_VMCS, "why": "a sentence", "hardware_reason": "VM-instruction error, 0 if none"},
    ),
    "vcpu_lost": Event(
        "The vCPU cannot be loaded: its VMCS, or its TD's association, was lost with a CPU that died.",
        {"vcpu": "task number", **_VMCS, "cpu": "that died"},
    ),
    "wrong_data": Event(
        "A field or the guest's state is not what this vCPU's software copy says.",
        {"vcpu": "task number", **_VMCS, "what": "field name", "expected": "value", "got": "value"},
    ),
    "irq_enter": Event("An interrupt handler starts.", {"vector": "taken"}),
    "irq_exit": Event("An interrupt handler ends.", {"vector": "taken"}),
    "nmi_enter": Event("The NMI handler starts.", {"cur": "current-VMCS pointer"}),
    "nmi_pend": Event("A performance counter overflowed: an NMI is pending.", {"point": "of `nmi_inject`"}),
    "nmi_exit": Event("The NMI handler ends.", {}),
    "ipi_send": Event(
        "An interrupt message has left.",
        {
            "target": "CPU",
            "vector": "0 to 255",
            "nmi": "0 or 1",
            "id": "message",
            "took_ns": "since it was handed to the link",
        },
    ),
    "ipi_deliver": Event(
        "An interrupt message has set its pending bit.",
        {
            "source": "node",
            "vector": "0 to 255",
            "nmi": "0 or 1",
            "id": "message",
            "coalesced": "the bit was set already",
        },
    ),
    "csd_lock": Event(
        "A cross-call is queued (smp_call_function_single).",
        {
            "csd": "address",
            "call": "unique number",
            "target": "CPU",
            "func": "name",
            "info": "argument",
            "wait": "0 or 1",
        },
    ),
    "csd_run": Event(
        "A cross-call's function has run here.", {"call": "unique number", "func": "name", "source": "CPU"}
    ),
    "csd_done": Event("The sender saw its cross-call complete.", {"call": "unique number"}),
    "csd_lost": Event(
        "The sender gives its cross-call up: the target is dead. Not Linux, which waits for ever.",
        {"call": "unique number", "target": "CPU"},
    ),
    "lock_request": Event(
        "A lock is asked for.", {"lock": "name", "request": "number", "level": "0 task, 1 IRQ, 2 NMI"}
    ),
    "lock_hold": Event(
        "The lock is held.", {"lock": "name", "request": "number", **_TOKEN, "waited_ns": "since the request"}
    ),
    "lock_drop": Event("The lock is given back.", {"lock": "name", **_TOKEN}),
    "seamcall_enter": Event(
        "SEAMCALL is executed.", {"leaf": "RAX", "name": "of the leaf", "attempt": "from 1", **_CUR, **_TOKEN}
    ),
    "seamcall_return": Event(
        "SEAMCALL is over.",
        {
            "leaf": "RAX",
            "name": "of the leaf",
            "entered": "SEAM was entered",
            "status": "RAX, or the kernel's software code",
            "cur": "current-VMCS pointer now",
            "lost": "VMCS that SEAMRET made not current, or NONE",
        },
    ),
    "strategy_begin": Event("seamldr_call starts.", {"leaf": "RAX", "name": "of the leaf", **_CUR}),
    "strategy_end": Event(
        "seamldr_call has returned.", {"leaf": "RAX", "errno": "0 or negative", "cur": "pointer now"}
    ),
    "strategy_error": Event(
        "seamldr_call broke its contract.", {"error": "what is wrong", "where": "FILE:LINE, or empty"}
    ),
    "admin_begin": Event("A request of user space starts.", {"request": "number", **_KIND}),
    "admin_end": Event(
        "A request of user space has ended.",
        {
            "request": "number",
            **_KIND,
            "errno": "0 or negative",
            "text": "what was read or said",
        },
    ),
    "update_begin": Event("Update control is reset.", {"update": "number", "online": "CPUs that take part"}),
    "stop_enter": Event("The stopper of this CPU has come to stop_machine.", {}),
    "stop_exit": Event("The stopper of this CPU has left stop_machine.", {}),
    "state_enter": Event("A CPU starts the work of a stage.", {"update": "number", "state": "name"}),
    "ack": Event(
        "A CPU acknowledges a stage.",
        {"update": "number", "state": "name", "ret": "errno", "num_ack": "count after", "num_failed": "count after"},
    ),
    "state_advance": Event("The stage advances.", {"update": "number", "state": "new stage"}),
    "stop_abort": Event(
        "The stopper of this CPU leaves stop_machine, which an operator has given up. Not Linux.",
        {"state": "of stop_machine then"},
    ),
    "stop_freed": Event(
        "The stop_machine of a CPU that died is over: its mutex is unlocked. Not Linux.", {"owner": "CPU that died"}
    ),
    "update_end": Event("stop_machine has returned.", {"update": "number", "ret": "errno"}),
    "update_refused": Event("An update was refused before it began.", {"errno": "negative", "why": "a sentence"}),
    "module_init_flag": Event(
        "The kernel's view of the module changed.", {"initialized": "0 or 1", "version": "x.y.zz"}
    ),
    "td_enter": Event(
        "TDH.VP.ENTER has returned. Without --trace the first after each load, and those that fail.",
        {"vcpu": "task number", "td": "number", "status": "RAX", "counter": "the guest's counter"},
    ),
    "td_measured": Event(
        "The owner of a TD that was built has compared its measurement.",
        {"td": "number", "mrtd": "as the module says, hex", "expected": "as its owner computes it, hex"},
    ),
    "td_error": Event(
        "A SEAMCALL for a TD that KVM builds or ends has failed.", {"td": "number", "leaf": "its name", "status": "RAX"}
    ),
    "td_flush": Event("TDH.VP.FLUSH has returned.", {"vcpu": "task number", "status": "RAX"}),
    "warn": Event("A kernel warning with stack.", {"text": "what it says"}),
    "log": Event("A kernel log line.", {"text": "what it says"}),
    "soft_lockup": Event(
        "The watchdog of this CPU: ticks are taken, but its own thread, which goes before all others, does not run.",
        {
            "cpu": "number",
            "stuck_s": "since its last turn",
            "task": "what runs, NAME:PID",
            "operations": "that this CPU has done meanwhile, to within a quantum",
            "text": "as the kernel says it",
        },
    ),
    "hard_lockup": Event(
        "The watchdog of this CPU: the next CPU in the online mask takes no tick of its timer.",
        {"cpu": "that CPU", "stuck_s": "since it was seen to take one", "text": "as the kernel says it"},
    ),
    "lockup_over": Event(
        "The watchdog of this CPU: what was reported as a lockup has moved.",
        {"cpu": "number", "kind": "soft_lockup or hard_lockup", "stuck_s": "how long it had not"},
    ),
    # The lock service and the SEAM side (written by the seamldr process)
    "lock_queue": Event(
        "A request reached the service.",
        {
            "lock": "name",
            "by": "CPU",
            "request": "number",
            "level": "0, 1 or 2",
            "depth": "requests now queued or granted",
        },
    ),
    "lock_grant": Event(
        "The service grants a lock.",
        {
            "lock": "name",
            "to": "CPU",
            "request": "number",
            **_TOKEN,
            "waited_ns": "in the queue",
            "holders": "holders now",
        },
    ),
    "lock_release": Event(
        "The service got a lock back.",
        {"lock": "name", "by": "CPU", **_TOKEN, "stale": "the token was not the holder's"},
    ),
    "lock_withdraw": Event(
        "A request or grant ended because its CPU is dead.", {"lock": "name", "by": "CPU", "request": "number"}
    ),
    "lock_hang": Event(
        "A dead CPU keeps the lock for ever (lock_policy=hang).",
        {"lock": "name", "by": "CPU", "request": "number", **_TOKEN},
    ),
    "lock_expire": Event(
        "A live CPU has lost the lock: its lease has ended while another waits (lock_policy=lease).",
        {"lock": "name", "by": "CPU", "request": "number", **_TOKEN, "held_ns": "since the grant"},
    ),
    "service_restart": Event(
        "The service was started again: it grants nothing until the CPUs have claimed what they hold and wait for.",
        {
            "epoch": "of the tokens from now on",
            "asked": "CPUs that are alive",
            "inside": "CPU inside P-SEAMLDR, by the state in the SEAM range; -1 for none",
        },
    ),
    "lock_claim": Event(
        "A CPU says that it holds a lock, or waits for it (token 0, 0).",
        {
            "lock": "name",
            "by": "CPU",
            "request": "number",
            "level": "0, 1 or 2",
            "asked": "Lamport time of the request",
            **_TOKEN,
        },
    ),
    "lock_restore": Event(
        "A holder goes on holding, under its old token.", {"lock": "name", "to": "CPU", "request": "number", **_TOKEN}
    ),
    "lock_recovered": Event("Holders and waiters are known; grants begin.", {"locks": "names"}),
    "seam_resume": Event(
        "A call that is inside since before the service was started again goes on.",
        {"by": "CPU", "leaf": "RAX", "name": "of the leaf"},
    ),
    "seam_answer": Event(
        "A call that came again gets the answer that it got before.",
        {"by": "CPU", "leaf": "RAX", "name": "of the leaf", "entered": "SEAM was entered"},
    ),
    "seam_fenced": Event(
        "A call of P-SEAMLDR under a token whose lease has ended: not entered, and the CPU is halted.",
        {
            "by": "CPU",
            "leaf": "RAX",
            "name": "of the leaf",
            **_TOKEN,
            "holder_epoch": "token of the holder of seamldr_lock, 0 if none",
            "holder_number": "token of the holder of seamldr_lock, 0 if none",
        },
    ),
    "seam_enter": Event(
        "A SEAMCALL reached the platform.",
        {
            "by": "CPU",
            "leaf": "RAX",
            "name": "of the leaf",
            "admitted": "SEAM was entered",
            "alive": "P-SEAMLDR or the module is there at all",
            "inside": "CPUs inside P-SEAMLDR now",
            **_TOKEN,
            "holder_epoch": "token of the holder of seamldr_lock, 0 if none",
            "holder_number": "token of the holder of seamldr_lock, 0 if none",
        },
    ),
    "seam_return": Event(
        "SEAM is left.", {"by": "CPU", "leaf": "RAX", "name": "of the leaf", "status": "RAX", "inside": "left inside"}
    ),
    "seam_dead": Event(
        "A CPU died inside SEAM, or its firmware hit a fatal error.", {"by": "CPU", "why": "a sentence"}
    ),
    # Tasks (written by the CPUs, and by the KVM process for CPUs that died)
    "task_enqueue": Event("A task is on the run queue of this CPU.", {"task": "number"}),
    "task_dequeue": Event(
        "A task has left the run queue of this CPU.", {"task": "number", "to": "CPU that it is sent to, -1 for none"}
    ),
    "task_lost": Event("A task was lost with the CPU that had it.", {"task": "number", "cpu": "that died"}),
    # The KVM process
    "request_lost": Event(
        "User space gets no answer: the CPU that it asked has died, or user space's own process did.",
        {"request": "number", "cpu": "number"},
    ),
    "workload_resume": Event(
        "User space was started again and goes on where its workload was.",
        {"elapsed_ns": "since the workload began", "tasks": "that live", "updates": "that were begun"},
    ),
    "task_place": Event("A task is put on a CPU.", {"task": "number", "cpu": "number"}),
    "task_move": Event("A task is asked to move.", {"task": "number", "to": "CPU"}),
    "request": Event(
        "User space asks for something.", {"request": "number", **_KIND, "cpu": "number"}
    ),
    "seamldr_info": Event(
        "SEAMLDR.INFO has answered.",
        {"request": "number", "errno": "0 or negative", "remaining": "updates that remain, 0 if it failed"},
    ),
    "sysfs_tree": Event(
        "The files of the user's interface are there.",
        {
            "sysinfo": "TDX is initialized",
            "features0": "TDX_FEATURES0 of the running module",
            "erratum": "the CPU has the SEAMRET erratum and the gate is on",
            "files": "their paths",
        },
    ),
    "sysfs_read": Event(
        "A file of the user's interface was read.", {"path": "of the file", "value": "read", "errno": "0 or negative"}
    ),
    "sysfs_write": Event(
        "A file of the user's interface was written; of writes to `data` only those that fail.",
        {"path": "of the file", "value": "written", "errno": "0 or negative"},
    ),
    "fw_upload": Event(
        "An upload node has changed.",
        {
            "name": "of the node",
            "load": "none, loading or done",
            "stage": "what `status` shows",
            "error": "what `error` shows, or EBUSY",
            "remaining": "bytes not yet written",
            "data": "whether `data` can be written",
        },
    ),
    # Any process
    "link_fault": Event(
        "The faults on the frames that leave this process have changed.",
        {"rules": "those in force now, each with what is not its default", "seed": "of what is drawn"},
    ),
    "link_backlog": Event(
        "Many messages wait for a peer that takes none.", {"to": "its node", "waiting": "messages beyond the window"}
    ),
    "link_totals": Event(
        "What became of the frames of this process, at its end. Only if link faults met any.",
        {
            "sent": "messages",
            "dropped": "frames lost by link faults",
            "duplicated": "frames transmitted twice by link faults",
            "delayed": "frames held back by link faults",
            "resent": "frames transmitted again",
        },
    ),
    "refused": Event(
        "A frame or a message was refused: of each reason the 1st, 2nd, 4th, 8th and so on.",
        {"reason": "a word", "head": "what it was, or first bytes in hex", "count": "of this reason so far"},
    ),
    "refused_totals": Event("All that this process refused until its end.", {"counts": "reason to number"}),
    "broken": Event("A process met a bug of its own.", {"error": "what it is"}),
}
