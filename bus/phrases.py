"""Phrases: what a record says, in a few words of the SDM and of the kernel, for stories and for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bus.events import NONE
from bus.records import COMMON_FIELDS, CPU_FIELDS, Record
from bus.shadow_parts import P_SEAMLDR

_EXCEPTIONS = {6: "#UD", 13: "#GP", 14: "#PF"}
_ERRORS = {
    4: "VMLAUNCH with non-clear VMCS",
    5: "VMRESUME with non-launched VMCS",
    7: "invalid control fields",
    8: "invalid host state",
    11: "wrong revision identifier",
    12: "unsupported field",
    13: "read-only field",
}
"""VM-instruction error numbers, SDM volume 3."""


def hexadecimal(value: object) -> str:
    """A number as the machine's documents write it; the NONE pointer as "none"."""
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return "none" if value == NONE else hex(value)


def phrase(record: Record) -> str:
    """What happened, without saying where: "VMRESUME of 0x8003000: VMfailInvalid".

    A record that is not as the event table says gets no better phrase than its name.
    """
    words = PHRASES.get(record["event"], _plain)
    try:
        return words(record)
    except (KeyError, TypeError, ValueError):
        return str(record["event"])


def outcome(result: object) -> str:
    """A VMX result in the SDM's words; empty if the instruction succeeded.

    >>> outcome("ok"), outcome("invalid"), outcome("valid:5"), outcome("fault:6")
    ('', 'VMfailInvalid', 'VMfailValid(5), VMRESUME with non-launched VMCS', '#UD')
    """
    kind, _, number = str(result).partition(":")
    if kind == "valid":
        words = _ERRORS.get(int(number), "")
        return f"VMfailValid({number})" + (f", {words}" if words else "")
    if kind == "fault":
        return _EXCEPTIONS.get(int(number), f"exception {number}")
    return "VMfailInvalid" if kind == "invalid" else ""


def _plain(r: Record) -> str:
    fields = (f"{key}={hexadecimal(r[key])}" for key in r if key not in COMMON_FIELDS | CPU_FIELDS)
    return " ".join((r["event"], *fields))


def _vmx(what: str, r: Record) -> str:
    failed = outcome(r["result"])
    return f"{what}: {failed}" if failed else what


def _vmptrld(r: Record) -> str:
    why = {"restore": ", to restore it", "decoy": ", a decoy"}.get(r["reason"], "")
    return _vmx(f"VMPTRLD {hexadecimal(r['vmcs'])}{why}", r)


def _vmclear(r: Record) -> str:
    why = {"strategy": " by the strategy", "emergency": ", emergency"}.get(r["reason"], "")
    return _vmx(f"VMCLEAR {hexadecimal(r['vmcs'])}{why}", r)


def _field(r: Record) -> str:
    return _vmx(f"{r['event'].upper()} {r['name']}", r)


def _vmentry(r: Record) -> str:
    insn = r["insn"].upper()
    if r["result"] == "ok":
        return f"{insn} of {hexadecimal(r['vmcs'])}"
    return f"{insn}, launched={r['launched']}: {outcome(r['result']).partition(',')[0]}"


def _vcpu_load(r: Record) -> str:
    if r["skipped"]:
        return f"{r['via']}: current_vmcs names it, no VMPTRLD"
    return f"{r['via']} of {hexadecimal(r['vmcs'])}"


def _seamcall_return(r: Record) -> str:
    if not r["entered"]:
        return f"{r['name']}: VMfailInvalid, not entered"
    if r["leaf"] & P_SEAMLDR and r["lost"] != NONE:
        return f"{r['name']}: SEAMRET takes {hexadecimal(r['lost'])}"
    return f"{r['name']} returns {hexadecimal(r['status'])}"


def _strategy_end(r: Record) -> str:
    return f"seamldr_call() returns {r['errno']}, current VMCS {hexadecimal(r['cur'])}"


def _seam_enter(r: Record) -> str:
    if r["admitted"]:
        return f"{r['name']} enters SEAM, {_token(r)}"
    return f"{r['name']}: " + ("busy, VMfailInvalid" if r["alive"] else "not there, VMfailInvalid")


def _token(r: Record) -> str:
    token = r["epoch"], r["number"]
    return f"token {token[0]}.{token[1]}" if token != (0, 0) else "without the lock"


def _irqs(r: Record) -> str:
    return "" if r.get("irqs", 1) else ", IF=0"


def _csd_lock(r: Record) -> str:
    wait = "waits for" if r["wait"] else "asks"
    return f"{wait} CPU {r['target']}: {r['func']}(){_irqs(r)}"


def _ack(r: Record) -> str:
    failed = f", {r['ret']}" if r["ret"] else ""
    return f"acknowledges {r['state']}{failed} ({r['num_ack']} so far)"


def _wrong_data(r: Record) -> str:
    return f"{r['what']} is {hexadecimal(r['got'])}, was {hexadecimal(r['expected'])}"


def _owner(cpu: Any) -> str:
    return "-1" if cpu == NONE else str(cpu)


def _lock_grant(r: Record) -> str:
    return f"{r['lock']} granted, token {r['epoch']}.{r['number']}"


PHRASES: dict[str, Callable[[Record], str]] = {
    "process_exit": lambda r: f"{r['name']} ends, status {r['status']}" + ("" if r["wanted"] else ", unasked"),
    "process_waits": lambda r: f"{r['name']}: {r['what']}",
    "fault": lambda r: f"fault: {r['kind']} {r['name']} {r['what']}".rstrip(),
    "cpu_online": lambda r: "online",
    "cpu_offline": lambda r: "offline",
    "vmxon": lambda r: _vmx("VMXON", r),
    "vmxoff": lambda r: _vmx(f"VMXOFF, {r['active']} VMCSs active", r),
    "vmptrld": _vmptrld,
    "vmclear": _vmclear,
    "vmptrst": lambda r: _vmx(f"VMPTRST stores {hexadecimal(r['value'])}", r),
    "vmread": _field,
    "vmwrite": _field,
    "vmentry": _vmentry,
    "cv_write": lambda r: f"current_vmcs = {hexadecimal(r['new'])}",
    "list_add": lambda r: f"list_add {hexadecimal(r['vmcs'])}",
    "list_del": lambda r: f"list_del {hexadecimal(r['vmcs'])}",
    "cpu_store": lambda r: f"loaded_vmcs.cpu of {hexadecimal(r['vmcs'])} = {_owner(r['new'])}",
    "launched_store": lambda r: f"launched of {hexadecimal(r['vmcs'])} = {r['new']}",
    "vcpu_destroy": lambda r: f"free_vmcs of {hexadecimal(r['vmcs'])}",
    "vcpu_load": _vcpu_load,
    "vcpu_put": lambda r: f"{r['via']} of {hexadecimal(r['vmcs'])}",
    "wrong_data": _wrong_data,
    "irq_enter": lambda r: f"interrupt {hexadecimal(r['vector'])}",
    "nmi_enter": lambda r: "NMI",
    "ipi_send": lambda r: "NMI sent" if r["nmi"] else f"IPI {hexadecimal(r['vector'])} sent",
    "ipi_deliver": lambda r: "NMI arrives" if r["nmi"] else f"IPI {hexadecimal(r['vector'])} arrives",
    "csd_lock": _csd_lock,
    "csd_run": lambda r: f"{r['func']}() runs",
    "csd_done": lambda r: "sees its call done",
    "lock_request": lambda r: f"waits for {r['lock']}{_irqs(r)}",
    "lock_hold": lambda r: f"holds {r['lock']}, token {r['epoch']}.{r['number']}{_irqs(r)}",
    "lock_drop": lambda r: f"drops {r['lock']}",
    "lock_queue": lambda r: f"{r['lock']}: CPU {r['by']} is number {r['depth']} in line",
    "lock_grant": _lock_grant,
    "lock_restore": lambda r: f"{r['lock']} is CPU {r['to']}'s again, token {r['epoch']}.{r['number']}",
    "lock_claim": lambda r: f"CPU {r['by']} claims {r['lock']}, {_token(r)}",
    "lock_expire": lambda r: f"the lease of {r['lock']} ends",
    "service_restart": lambda r: "lock service and SEAM side start again",
    "seamcall_enter": lambda r: f"SEAMCALL {r['name']}" + (f", try {r['attempt']}" if r["attempt"] > 1 else ""),
    "seamcall_return": _seamcall_return,
    "strategy_begin": lambda r: f"seamldr_call({r['name']}){_irqs(r)}",
    "strategy_end": _strategy_end,
    "strategy_error": lambda r: f"the strategy {r['error']}",
    "admin_begin": lambda r: f"{r['kind']} begins",
    "admin_end": lambda r: f"{r['kind']} ends with {r['errno']}",
    "update_begin": lambda r: f"update {r['update']} begins",
    "state_enter": lambda r: f"starts {r['state']}{_irqs(r)}",
    "ack": _ack,
    "state_advance": lambda r: f"the update goes to {r['state']}",
    "update_end": lambda r: f"update {r['update']} ends with {r['ret']}",
    "update_refused": lambda r: f"update refused, {r['errno']}: {r['why']}",
    "module_init_flag": lambda r: f"TDX initialized = {r['initialized']}, module {r['version']}",
    "td_enter": lambda r: f"TD {r['td']} entered, status {hexadecimal(r['status'])}",
    "td_measured": lambda r: f"TD {r['td']}: MRTD {r['mrtd'][:16]}",
    "td_flush": lambda r: f"TDH.VP.FLUSH of vCPU {r['vcpu']}: {hexadecimal(r['status'])}",
    "warn": lambda r: f"WARNING: {r['text']}",
    "log": lambda r: str(r["text"]),
    "soft_lockup": lambda r: str(r["text"]),
    "hard_lockup": lambda r: str(r["text"]),
    "seam_enter": _seam_enter,
    "seam_return": lambda r: f"{r['name']} leaves SEAM",
    "seam_dead": lambda r: f"CPU {r['by']} died in SEAM: {r['why']}",
    "task_enqueue": lambda r: f"task {r['task']} joins the run queue",
    "task_dequeue": lambda r: f"task {r['task']} leaves the run queue",
    "task_lost": lambda r: f"task {r['task']} is lost with CPU {r['cpu']}",
    "request": lambda r: f"request {r['request']}: {r['kind']}",
    "seamldr_info": lambda r: f"SEAMLDR.INFO: {r['remaining']} updates remain",
    "sysfs_read": lambda r: f"read {r['path'].rpartition('/')[2]}: {r['errno'] or repr(r['value'])}",
    "sysfs_write": lambda r: f"write {r['path'].rpartition('/')[2]}: {r['errno']}",
    "fw_upload": lambda r: f"upload of {r['name']}: {r['stage']} {r['error']}".rstrip(),
}
"""What each event says; any other is told by its name and fields."""
