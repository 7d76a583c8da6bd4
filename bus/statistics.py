"""What a run did, counted from its records: the numbers of the summary, and how often the question was really asked."""

from __future__ import annotations

from collections import Counter, defaultdict

import msgspec

from bus.events import NONE
from bus.invariant import Observer
from bus.invariants_lock import SEAMLDR_LOCK
from bus.records import Record
from bus.shadow import P_SEAMLDR, Shadow

VMX_COUNTS = ("vmread", "vmwrite", "vmread_errors", "vmwrite_errors", "entry_errors", "vmptrld", "vmclear")
"""Counts of `counters` that the summary shows under "vmx"."""


class Exposures(Observer):
    """How often a P-SEAMLDR call really put KVM's tracking to the test.

    `lost_vmcs`: calls that began with a current VMCS which was not current any more when SEAMRET returned, whoever
    took it. `same_next`: of these, the next VMCS loaded on that CPU was the same. `entered_after`: of these calls,
    that VMCS was entered on that CPU before any other was loaded there.
    """

    def __init__(self) -> None:
        self.lost_vmcs = 0
        self.same_next = 0
        self.entered_after = 0
        self._begun: dict[tuple[str, str], int] = {}
        self._open: dict[str, tuple[int, bool]] = {}

    def on_strategy_begin(self, record: Record, shadow: Shadow) -> None:
        self._begun[record["node"], record.get("ctx", "")] = record["cur"]

    def on_seamcall_return(self, record: Record, shadow: Shadow) -> None:
        if not record["leaf"] & P_SEAMLDR or not record["entered"]:
            return
        key = (record["node"], record.get("ctx", ""))
        current = self._begun.get(key, NONE)
        if current != NONE and record["cur"] != current:
            self._begun[key] = NONE
            self.lost_vmcs += 1
            self._open[record["node"]] = (current, False)

    def on_vcpu_load(self, record: Record, shadow: Shadow) -> None:
        vmcs, loaded = self._open.get(record["node"], (NONE, False))
        if vmcs == record["vmcs"]:
            self.same_next += not loaded
            self._open[record["node"]] = (vmcs, True)
        elif vmcs != NONE:
            del self._open[record["node"]]

    def on_vmentry(self, record: Record, shadow: Shadow) -> None:
        vmcs, _ = self._open.get(record["node"], (NONE, False))
        if vmcs == record["vmcs"] and record["result"] == "ok":
            self.entered_after += 1
            del self._open[record["node"]]

    def as_dict(self) -> dict[str, int]:
        """For the summary."""
        return {"lost_vmcs": self.lost_vmcs, "same_next": self.same_next, "entered_after": self.entered_after}


class Cost(Observer):
    """VMX instructions that the strategy costs: its own, and the reload of a VMCS that was current before the call.

    `calls` are its calls that entered P-SEAMLDR.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.extra_vmptrld = 0
        self.extra_vmclear = 0
        self._inside: dict[str, tuple[str, int]] = {}
        self._before: dict[str, int] = {}

    def on_strategy_begin(self, record: Record, shadow: Shadow) -> None:
        self._inside[record["node"]] = (record.get("ctx", ""), record["cur"])

    def on_strategy_end(self, record: Record, shadow: Shadow) -> None:
        _, before = self._inside.pop(record["node"], ("", NONE))
        if before != NONE:
            self._before[record["node"]] = before

    def _within(self, record: Record) -> bool:
        return bool(self._inside.get(record["node"], ("", NONE))[0] == record.get("ctx", "-"))

    def on_seamcall_return(self, record: Record, shadow: Shadow) -> None:
        self.calls += bool(record["leaf"] & P_SEAMLDR and record["entered"])

    def on_vmptrld(self, record: Record, shadow: Shadow) -> None:
        self.extra_vmptrld += self._within(record)

    def on_vmclear(self, record: Record, shadow: Shadow) -> None:
        self.extra_vmclear += self._within(record)

    def on_vcpu_load(self, record: Record, shadow: Shadow) -> None:
        before = self._before.pop(record["node"], NONE)
        self.extra_vmptrld += before == record["vmcs"] and not record["skipped"]

    def as_dict(self) -> dict[str, int]:
        """For the summary."""
        return {
            "calls": self.calls,
            "extra_vmptrld": self.extra_vmptrld,
            "extra_vmclear": self.extra_vmclear,
        }


class Updates(msgspec.Struct):
    """Updates that user space asked for, by how they ended; those without an end are in none of the three."""

    requested: int = 0
    succeeded: int = 0
    failed: int = 0
    refused: int = 0

    @property
    def all_refused(self) -> bool:
        """Whether there were updates and each of them was refused before it began."""
        return self.requested > 0 and self.refused == self.requested


class Statistics(Observer):
    """Counts for the summary; dictionaries and names as the command line prints them."""

    def __init__(self) -> None:
        self.updates = Updates()
        self.seamcalls: Counter[str] = Counter()
        self.seamldr_calls = 0
        self.wrong_data = 0
        self.records = 0
        self.broken: list[str] = []
        self.kernel_log: Counter[str] = Counter()
        self._counters: dict[tuple[str, int], dict[str, int]] = {}
        self._cpus: dict[str, int] = {}
        self._asked = 0
        self._refused_in: defaultdict[str, int] = defaultdict(int)
        self._waited_ns: list[int] = []
        self._max_holders = 0
        self._last_token = 0
        self._killed = 0
        self._stopped = 0
        self._restarted = 0
        self._times: dict[str, int] = {}
        self._links: Counter[str] = Counter()
        self._backlogs: dict[str, int] = {}
        self._refused_by: defaultdict[str, Counter[str]] = defaultdict(Counter)

    # Processes and time

    def on_machine_begin(self, record: Record, shadow: Shadow) -> None:
        self._times["begin"] = record["ts"]

    def on_process_online(self, record: Record, shadow: Shadow) -> None:
        if record["incarnation"] > 1:
            self._restarted += 1
        else:
            self._times["online"] = max(record["ts"], self._times.get("online", 0))

    def on_fault(self, record: Record, shadow: Shadow) -> None:
        self._stopped += record["kind"] == "stop"

    def on_process_exit(self, record: Record, shadow: Shadow) -> None:
        self._killed += not record["wanted"]
        self._times["exit"] = max(record["ts"], self._times.get("exit", 0))

    def on_machine_end(self, record: Record, shadow: Shadow) -> None:
        self._times["end"] = record["ts"]

    def on_cpu_online(self, record: Record, shadow: Shadow) -> None:
        self._cpus[record["node"]] = record["pid"]

    def on_counters(self, record: Record, shadow: Shadow) -> None:
        self._counters[record["node"], record["pid"]] = record["counts"]

    def on_broken(self, record: Record, shadow: Shadow) -> None:
        self.broken.append(f"{record['node']} met a bug of its own: {record['error']}")

    # The bus

    def on_link_totals(self, record: Record, shadow: Shadow) -> None:
        self._links.update({name: record[name] for name in ("sent", "dropped", "duplicated", "delayed", "resent")})

    def on_refused_totals(self, record: Record, shadow: Shadow) -> None:
        self._refused_by[record["node"]].update(record["counts"])

    def on_link_backlog(self, record: Record, shadow: Shadow) -> None:
        self._backlogs[f"from {record['node']} to {record['to']}"] = record["waiting"]

    # Work

    def on_log(self, record: Record, shadow: Shadow) -> None:
        self.kernel_log[record["text"]] += 1

    on_warn = on_soft_lockup = on_hard_lockup = on_log

    def on_seamcall_enter(self, record: Record, shadow: Shadow) -> None:
        self.seamcalls[record["name"]] += 1
        self.seamldr_calls += bool(record["leaf"] & P_SEAMLDR)

    def on_wrong_data(self, record: Record, shadow: Shadow) -> None:
        self.wrong_data += 1

    def on_lock_grant(self, record: Record, shadow: Shadow) -> None:
        if record["lock"] == SEAMLDR_LOCK:
            self._waited_ns.append(record["waited_ns"])
            self._last_token = record["number"]
            self._max_holders = max(self._max_holders, record["holders"])

    def on_lock_hold(self, record: Record, shadow: Shadow) -> None:
        """What the CPUs themselves say counts too: the service knows only what it meant to grant."""
        if record["lock"] == SEAMLDR_LOCK:
            holding = {record["node"], *shadow.lock(SEAMLDR_LOCK).held}
            self._max_holders = max(self._max_holders, len(holding))

    # Updates

    def on_request(self, record: Record, shadow: Shadow) -> None:
        self._asked += record["kind"] == "install"

    def on_admin_begin(self, record: Record, shadow: Shadow) -> None:
        if record["kind"] == "install":
            self.updates.requested += 1
            self._refused_in[record["node"]] = 0

    def on_update_refused(self, record: Record, shadow: Shadow) -> None:
        self._refused_in[record["node"]] += 1

    def on_admin_end(self, record: Record, shadow: Shadow) -> None:
        if record["kind"] != "install":
            return
        if record["errno"] == 0:
            self.updates.succeeded += 1
        elif self._refused_in[record["node"]]:
            self.updates.refused += 1
        else:
            self.updates.failed += 1

    # Results

    def finish(self) -> None:
        """Settle what only the end can tell: requests that never reached a CPU are requested all the same."""
        self.updates.requested = max(self.updates.requested, self._asked)

    def total(self, name: str) -> int:
        """One count of `counters`, over all CPUs and all their incarnations."""
        return sum(counts.get(name, 0) for counts in self._counters.values())

    def notes(self) -> list[str]:
        """Sentences about the bus: what link faults did to it, what had to wait, and what was refused."""
        links = self._links
        sentences = [f"{waiting} messages {way} waited at once" for way, waiting in sorted(self._backlogs.items())]
        for node, reasons in sorted(self._refused_by.items()):
            what = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            sentences.append(f"{node} refused {reasons.total()} frames or messages: {what}")
        if links:
            sentences.append(
                f"link faults dropped {links['dropped']}, doubled {links['duplicated']} and delayed {links['delayed']} "
                f"frames; {links['sent']} messages were sent, {links['resent']} frames sent again"
            )
        return sentences

    def vmx(self) -> dict[str, int]:
        """VMX instructions and their errors."""
        return {name: self.total(name) for name in VMX_COUNTS}

    def ipis(self) -> dict[str, int]:
        """Interrupt messages."""
        return {"sent": self.total("ipis_sent"), "delivered": self.total("ipis_delivered")}

    def guests(self) -> dict[str, int]:
        """VM exits, and fields that were not what KVM's copy says."""
        return {"exits": self.total("exits"), "wrong_data": self.wrong_data}

    def lock(self) -> dict[str, object]:
        """seamldr_lock by the records of its service; waits in microseconds."""
        return {
            "acquisitions": len(self._waited_ns),
            "max_holders": self._max_holders,
            "wait_us": percentiles(self._waited_ns),
            "last_token": self._last_token,
        }

    def processes(self) -> dict[str, object]:
        """CPUs by node with the pid of their last incarnation, and what happened to processes."""
        cpus = {node: self._cpus[node] for node in sorted(self._cpus, key=lambda node: (len(node), node))}
        return {"cpus": cpus, "killed": self._killed, "stopped": self._stopped, "restarted": self._restarted}

    def seconds(self) -> dict[str, float]:
        """How long it took until all were online, how long the machine then ran, and both with the taking down."""
        times = self._times
        begin = times.get("begin", 0)
        online = times.get("online", begin)
        end = times.get("end", online)
        last = max(end, times.get("exit", end))
        spans = {"online": online - begin, "run": end - online, "total": last - begin}
        return {name: round(ns / 1e9, 3) for name, ns in spans.items()}


def percentiles(waited_ns: list[int]) -> dict[str, float]:
    """p50, p99 and maximum in microseconds, by nearest rank; zeros for an empty list.

    >>> percentiles([1000, 2000, 9000])
    {'p50': 2.0, 'p99': 9.0, 'max': 9.0}
    """
    if not waited_ns:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    ordered = sorted(waited_ns)
    last = len(ordered) - 1
    picks = {"p50": ordered[round(last * 0.5)], "p99": ordered[-(-last * 99 // 100)], "max": ordered[-1]}
    return {name: round(ns / 1000, 1) for name, ns in picks.items()}
