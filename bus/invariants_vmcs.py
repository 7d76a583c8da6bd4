"""Invariants about VMCSs: I1, I2, I3, I5, I14, I18, and I41 for trust domains."""

from __future__ import annotations

from bus.events import NONE
from bus.invariant import Invariant
from bus.phrases import hexadecimal, outcome
from bus.records import Record
from bus.shadow import CpuShadow, Shadow

OPERAND_BUSY = 0x80000200
"""Upper half of a TDX status after which KVM simply enters again."""

_FAILED = 0b11 << 62
"""ERROR and NON_RECOVERABLE of a TDX status."""


class ActiveOnOneCpu(Invariant):
    """Judged at each VMPTRLD, against where the VMCS was active until then."""

    id = "I1"
    slug = "active-on-one-cpu"
    sentence = "A VMCS is active on at most one CPU: VMPTRLD(v) on c requires that v is active nowhere but on c."
    source = "SDM volume 3, Software Use of Virtual-Machine Control Structures; KVM loaded_vmcs_clear()"
    broken_by = "save and restore with interrupts on; a clear IPI that is not sent; a CPU that goes offline unswept"

    def on_vmptrld(self, record: Record, shadow: Shadow) -> None:
        if record["result"] != "ok":
            return
        known = shadow.vmcs.get(record["vmcs"])
        others = known.active - {record["node"]} if known is not None else None
        if known is not None and others:
            other = min(others)
            active = known.activated.get(other)
            restoring = next((one for one in (active, record) if one is not None and one["reason"] == "restore"), None)
            self.violated(
                f"VMCS {hexadecimal(record['vmcs'])} became active on {record['node']} while active on {other}",
                ("saved", shadow.cpu(restoring["node"]).saved if restoring is not None else None),
                ("cleared", known.taken if restoring is not None else None),
                ("active", active),
                ("failed", record),
            )


class PointerMatches(Invariant):
    """Judged at quiet points: where a strategy, a load or a put has ended. Counted once until it is true again."""

    id = "I2"
    slug = "cached-pointer"
    sentence = "At every quiet point of a CPU, its current_vmcs is NULL or names the VMCS that is current in hardware."
    source = "KVM vmx_vcpu_load_vmcs(), which skips VMPTRLD when current_vmcs names the VMCS that it wants"
    broken_by = "a P-SEAMLDR call that neither restores the current VMCS nor makes KVM forget it"

    def __init__(self) -> None:
        super().__init__()
        self._wrong: set[str] = set()

    def on_strategy_end(self, record: Record, shadow: Shadow) -> None:
        cpu = shadow.cpu(record["node"])
        if not cpu.loading and cpu.strategies.total() <= 1:
            self._judge(cpu, record["cur"], record, "not repaired")

    def on_vcpu_load(self, record: Record, shadow: Shadow) -> None:
        cpu = shadow.cpu(record["node"])
        if not cpu.strategies:
            self._judge(cpu, cpu.cur, record)

    def on_vcpu_put(self, record: Record, shadow: Shadow) -> None:
        cpu = shadow.cpu(record["node"])
        if cpu.quiet:
            self._judge(cpu, cpu.cur, record)

    def _judge(self, cpu: CpuShadow, cur: int, record: Record, label: str = "stale at") -> None:
        if cpu.cv is None or cpu.cv in (NONE, cur):
            self._wrong.discard(cpu.node)
        elif cpu.node not in self._wrong:
            self._wrong.add(cpu.node)
            self.violated(
                f"current_vmcs of {cpu.node} names {hexadecimal(cpu.cv)}, but the current VMCS is {hexadecimal(cur)}",
                *cpu.belief(),
                (label, record),
            )


class CurrentVmcsNeeded(Invariant):
    """The processor says it: VMfailInvalid."""

    id = "I3"
    slug = "current-vmcs-needed"
    sentence = "No VMREAD, VMWRITE, VMLAUNCH or VMRESUME executes while the CPU has no current VMCS."
    source = "SDM volume 3, VMX Instruction Reference, VMfailInvalid"
    broken_by = "a VMPTRLD skipped after SEAMRET took the VMCS; a call under a loaded vCPU; a read in an NMI handler"

    def _judge(self, record: Record, shadow: Shadow) -> None:
        if record["result"] == "invalid":
            cpu = shadow.cpu(record["node"])
            what = record["insn"].upper() if record["event"] == "vmentry" else record["event"].upper()
            self.violated(
                f"{what} on {cpu.node} with no current VMCS",
                *cpu.belief(),
                ("failed", record),
            )

    on_vmread = on_vmwrite = on_vmentry = _judge


class LaunchStateMatches(Invariant):
    """The processor says it by errors 4 and 5; a VMLAUNCH that succeeds on a launched VMCS counts as well.

    A VMRESUME that succeeds cannot be held against the shadow: without --trace not every entry is recorded.
    """

    id = "I5"
    slug = "launch-state"
    sentence = "VMLAUNCH finds the launch state clear and VMRESUME finds it launched."
    source = "SDM volume 3, VM-Instruction Error Numbers 4 and 5; KVM vmx_vcpu_run(), which trusts loaded_vmcs.launched"
    broken_by = "SEAMRET that clears the launch state while `launched` stays set; or `launched` reset where it does not"

    def on_vmentry(self, record: Record, shadow: Shadow) -> None:
        result, vmcs = record["result"], record["vmcs"]
        if result not in ("ok", "valid:4", "valid:5"):
            return
        known = shadow.v(vmcs)
        launch = record["insn"] == "vmlaunch"
        unnoticed = result == "ok" and launch and known.launched is True and len(known.active) <= 1
        if result != "ok" or unnoticed:
            what = "VMLAUNCH of launched VMCS" if launch else "VMRESUME of clear VMCS"
            taken = known.taken
            by_seamret = taken is not None and taken["event"] == "seamcall_return"
            self.violated(
                f"{what} {hexadecimal(vmcs)} on {record['node']}",
                ("launched", known.entered),
                ("launch state cleared" if by_seamret and not launch else "took it", taken),
                ("believed", known.stored if launch else None),
                ("failed", record),
            )


class DataSurvives(Invariant):
    """Each vCPU's software copy knows what its VMCS fields must be."""

    id = "I14"
    slug = "no-lost-writes"
    sentence = "A field that a vCPU reads is what it, or the processor for it, wrote last."
    source = "SDM volume 3, Software Use of Virtual-Machine Control Structures: data may live in the processor"
    broken_by = "a lost VMWRITE behind KVM's write caches; a VMCS active on two CPUs; migration without VMCLEAR"
    consequence_of = ("I1", "I2", "I3", "I5")

    def on_wrong_data(self, record: Record, shadow: Shadow) -> None:
        if is_td(record):
            return
        elsewhere = [made for node, made in shadow.v(record["vmcs"]).activated.items() if node != record["node"]]
        self.violated(
            f"vCPU {record['vcpu']} on {record['node']} finds {record['what']} = {hexadecimal(record['got'])}, "
            f"not {hexadecimal(record['expected'])}",
            ("active elsewhere", elsewhere[0] if elsewhere else None),
            *shadow.cpu(record["node"]).belief(),
            ("failed", record),
        )


class NoVmxErrors(Invariant):
    """Every VMX instruction that fails or faults."""

    id = "I18"
    slug = "no-vmx-errors"
    sentence = "No VMX instruction reports an error."
    source = "KVM vmx_ops.h error reports; the tests of 2026-02-03 that counted them"
    broken_by = "whatever violates I1, I2, I3 or I5"
    consequence_of = ("I1", "I2", "I3", "I5")

    def _judge(self, record: Record, shadow: Shadow) -> None:
        if record["result"] != "ok":
            cpu = shadow.cpu(record["node"])
            self.violated(
                f"{record['event'].upper()} on {cpu.node}: {outcome(record['result'])}",
                *cpu.belief(),
                ("failed", record),
            )

    on_vmread = on_vmwrite = on_vmentry = on_vmptrld = on_vmclear = on_vmptrst = on_vmxon = on_vmxoff = _judge


class DomainsSurvive(Invariant):
    """Judged by TD entries and TD data, against the kernel's view of the module (`module_init_flag`)."""

    id = "I41"
    slug = "domains-survive"
    sentence = (
        "TDs that lived before a successful update can be entered after it, with their contents, while SEAM lives; "
        "after a fatal one none can."
    )
    source = "TDX module, TDH.SYS.UPDATE; kernel tdx_module_run_update()"
    broken_by = "state that the handoff between two modules loses"
    consequence_of = ("I31", "I32", "I33", "I35")

    def __init__(self) -> None:
        super().__init__()
        self._flag: Record | None = None
        self._updated = False

    def on_module_init_flag(self, record: Record, shadow: Shadow) -> None:
        if self._flag is not None and record["initialized"] and not self._flag["initialized"]:
            self._updated = True
        self._flag = record

    def on_seam_dead(self, record: Record, shadow: Shadow) -> None:
        """SEAM is gone with a CPU, and every TD with it: no update is to blame."""
        self._flag = None

    def on_td_enter(self, record: Record, shadow: Shadow) -> None:
        flag, status = self._flag, record["status"]
        if flag is None:
            return
        failed = bool(status & _FAILED) and status >> 32 != OPERAND_BUSY
        if failed and self._updated and flag["initialized"]:
            self._violated(f"cannot be entered after a successful update: {hexadecimal(status)}", record)
        elif not failed and not flag["initialized"]:
            self._violated("is entered although the module was lost", record)

    def on_wrong_data(self, record: Record, shadow: Shadow) -> None:
        if is_td(record):
            self._violated(f"finds {record['what']} = {record['got']}, not {record['expected']}", record)

    def _violated(self, what: str, record: Record) -> None:
        self.violated(f"TD vCPU {record['vcpu']} {what}", ("module", self._flag), ("failed", record))


def is_td(record: Record) -> bool:
    """Whether a `wrong_data` record speaks of a trust domain."""
    return str(record["what"]).startswith("td")


VMCS_INVARIANTS: tuple[type[Invariant], ...] = (
    ActiveOnOneCpu,
    PointerMatches,
    CurrentVmcsNeeded,
    LaunchStateMatches,
    DataSurvives,
    NoVmxErrors,
    DomainsSurvive,
)
