"""The views over the records: one an event, and those that join events into what people ask about.

Times of a joined view are taken from `ts`: they hold on one machine, whose processes share a monotonic clock.
"""

from __future__ import annotations

import msgspec

from bus.columns import COMMON, event_columns
from bus.events import NONE
from bus.shadow import P_SEAMLDR


class View(msgspec.Struct, frozen=True):
    """A view: what a row of it is, its columns with their meaning, its SELECT."""

    sentence: str
    columns: dict[str, str]
    sql: str


MACROS = {
    "pa(x)": f"CASE WHEN x IS NULL THEN NULL WHEN x = {NONE} THEN 'none' ELSE '0x' || lower(to_hex(x)) END",
    "p50(x)": "quantile_disc(x, 0.5)",
    "p99(x)": "quantile_disc(x, 0.99)",
}
"""Short words for queries: an address as the documents write it; percentiles by nearest rank."""

VMX_ERRORS = {
    1: "VMCALL in VMX root operation",
    2: "VMCLEAR of an invalid address",
    3: "VMCLEAR of the VMXON pointer",
    4: "VMLAUNCH of a VMCS that is not clear",
    5: "VMRESUME of a VMCS that is not launched",
    6: "VMRESUME after VMXOFF",
    7: "VM entry with invalid control fields",
    8: "VM entry with invalid host-state fields",
    9: "VMPTRLD of an invalid address",
    10: "VMPTRLD of the VMXON pointer",
    11: "VMPTRLD of a wrong revision identifier",
    12: "VMREAD or VMWRITE of an unsupported field",
    13: "VMWRITE to a read-only field",
    15: "VMXON in VMX root operation",
    26: "VM entry with events blocked by MOV SS",
}
"""VM-instruction errors in short (SDM vol. 3C, table 33-1)."""


def event_view(event: str) -> str:
    """The SELECT of the view of an event: the common columns, then its own fields with their types."""
    columns = event_columns(event)
    common = ", ".join(COMMON)
    if not columns:
        return f"SELECT {common} FROM records WHERE event = '{event}'"
    types = ", ".join(f'"{field}": "{kind}"' for field, kind in columns.items())
    return (
        f"SELECT {common}, UNNEST(own) FROM "
        f"(SELECT {common}, json_transform(fields, '{{{types}}}') AS own FROM records WHERE event = '{event}')"
    )


def _failed(event: str, instruction: str = "", operand: str = "''", vmcs: str = "vmcs") -> str:
    """Failures of one VMX instruction, as rows of `vmx_errors` without their cause."""
    name = instruction or f"'{event.upper()}'"
    own = f"{name} AS instruction, {operand} AS operand, {vmcs} AS vmcs, result"
    return f"SELECT ms, clock, node, on_cpu AS cpu, ctx, seq, {own} FROM {event} WHERE result <> 'ok'"


_ERROR_TEXTS = " ".join(f"WHEN result = 'valid:{number}' THEN '{text}'" for number, text in VMX_ERRORS.items())

VIEWS: dict[str, View] = {
    "lock_waits": View(
        "A lock asked for by a CPU, until it held it.",
        {
            "lock": "name",
            "cpu": "that asked",
            "ctx": "context that asked",
            "request": "number",
            "level": "0 task, 1 IRQ, 2 NMI",
            "asked_ms": "when it asked",
            "held_ms": "when it held it; NULL if it never did",
            "epoch": "fencing token, high part",
            "number": "fencing token, low part",
            "wait_us": "from asking to holding",
            "queue_us": "of that, in the queue of the lock service",
        },
        """
        SELECT r.lock, r.on_cpu AS cpu, r.ctx, r.request, r.level, r.ms AS asked_ms, h.ms AS held_ms, h.epoch,
               h.number, (h.ts - r.ts) / 1e3 AS wait_us, g.waited_ns / 1e3 AS queue_us
        FROM lock_request r
        LEFT JOIN lock_hold h ON h.node = r.node AND h.pid = r.pid AND h.lock = r.lock AND h.request = r.request
        LEFT JOIN lock_grant g ON g.lock = h.lock AND g.epoch = h.epoch AND g.number = h.number
        """,
    ),
    "lock_holds": View(
        "A lock held by a CPU, until it gave it back.",
        {
            "lock": "name",
            "cpu": "that held it",
            "ctx": "context that held it",
            "epoch": "fencing token, high part",
            "number": "fencing token, low part",
            "held_ms": "when it got it",
            "dropped_ms": "when it gave it back; NULL if it never did",
            "held_us": "in between",
        },
        """
        SELECT h.lock, h.on_cpu AS cpu, h.ctx, h.epoch, h.number, h.ms AS held_ms, d.ms AS dropped_ms,
               (d.ts - h.ts) / 1e3 AS held_us
        FROM lock_hold h
        LEFT JOIN lock_drop d ON d.node = h.node AND d.pid = h.pid AND d.lock = h.lock AND d.epoch = h.epoch
             AND d.number = h.number
        """,
    ),
    "ipis": View(
        "An interrupt message from CPU to CPU.",
        {
            "id": "of the message",
            "source": "CPU that sent it",
            "target": "CPU",
            "vector": "0 to 255",
            "nmi": "whether it is an NMI",
            "sent_ms": "when it was handed to the link",
            "delivered_ms": "when it had set the pending bit; NULL if it never did",
            "coalesced": "the bit was set already",
            "latency_us": "from sending to delivering",
        },
        """
        SELECT s.id, s.on_cpu AS source, s.target, s.vector, s.nmi, s.ms - coalesce(s.took_ns, 0) / 1e6 AS sent_ms,
               d.ms AS delivered_ms, d.coalesced, (d.ts - s.ts + coalesce(s.took_ns, 0)) / 1e3 AS latency_us
        FROM ipi_send s
        LEFT JOIN ipi_deliver d ON d.id = s.id AND d.on_cpu = s.target
        """,
    ),
    "cross_calls": View(
        "A cross-call (smp_call_function_single).",
        {
            "call": "number",
            "func": "name",
            "source": "CPU that asked",
            "target": "CPU that ran it",
            "wait": "whether the sender waits",
            "sent_ms": "when it was queued",
            "run_us": "from then until the function had run; NULL if it never did",
            "done_us": "from then until the sender saw it complete; NULL if it never did",
        },
        """
        SELECT c.call, c.func, c.on_cpu AS source, c.target, c.wait, c.ms AS sent_ms, (r.ts - c.ts) / 1e3 AS run_us,
               (d.ts - c.ts) / 1e3 AS done_us
        FROM csd_lock c
        LEFT JOIN csd_run r ON r.call = c.call AND r.source = c.on_cpu AND r.on_cpu = c.target
        LEFT JOIN csd_done d ON d.call = c.call AND d.node = c.node AND d.pid = c.pid
        """,
    ),
    "update_times": View(
        "A module update that began.",
        {
            "update": "number",
            "cpu": "that ran it",
            "cpus": "that took part",
            "begin_ms": "when update control was reset",
            "end_ms": "when stop_machine had returned; NULL if it never did",
            "duration_us": "in between",
            "ret": "errno",
        },
        """
        SELECT b.update, b.on_cpu AS cpu, CAST(json_array_length(b.online) AS INTEGER) AS cpus, b.ms AS begin_ms,
               e.ms AS end_ms, (e.ts - b.ts) / 1e3 AS duration_us, e.ret
        FROM update_begin b
        LEFT JOIN update_end e ON e.update = b.update AND e.node = b.node AND e.pid = b.pid
        """,
    ),
    "update_states": View(
        "The work of one CPU in one stage of an update.",
        {
            "update": "number",
            "cpu": "number",
            "state": "name of the stage",
            "begin_ms": "when the CPU began it",
            "end_ms": "when it acknowledged it; NULL if it never did",
            "work_us": "in between",
            "ret": "errno",
            "last": "no CPU acknowledged this stage later: the others waited for this one",
        },
        """
        SELECT e.update, e.on_cpu AS cpu, e.state, e.ms AS begin_ms, a.ms AS end_ms, (a.ts - e.ts) / 1e3 AS work_us,
               a.ret, a.num_ack = max(a.num_ack) OVER (PARTITION BY e.update, e.state) AS last
        FROM state_enter e
        LEFT JOIN ack a ON a.node = e.node AND a.pid = e.pid AND a.update = e.update AND a.state = e.state
        """,
    ),
    "seam_residences": View(
        "A SEAMCALL that entered SEAM, until it left.",
        {
            "cpu": "that made it",
            "name": "of the leaf",
            "p_seamldr": "a call of P-SEAMLDR; else of the TDX module",
            "enter_ms": "when SEAM was entered",
            "leave_ms": "when it was left; NULL if it never was",
            "inside_us": "in between",
            "status": "RAX",
        },
        f"""
        SELECT * FROM (
            SELECT CAST("by" AS INTEGER) AS cpu, name, leaf >= {P_SEAMLDR} AS p_seamldr, ms AS enter_ms,
                   CASE WHEN next.left THEN next.ms END AS leave_ms,
                   CASE WHEN next.left THEN (next.ts - ts) / 1e3 END AS inside_us, next.status AS status
            FROM (
                SELECT *, lead({{'left': is_return, 'ts': ts, 'ms': ms, 'status': status}})
                          OVER (PARTITION BY node, "by" ORDER BY seq) AS next
                FROM (
                    SELECT node, seq, ts, ms, "by", name, leaf, NULL AS status, false AS is_return
                    FROM seam_enter WHERE admitted
                    UNION ALL
                    SELECT node, seq, ts, ms, "by", name, leaf, status, true FROM seam_return
                    UNION ALL
                    SELECT node, seq, ts, ms, "by", NULL, NULL, NULL, false FROM seam_dead
                )
            ) WHERE NOT is_return AND name IS NOT NULL
        )
        """,
    ),
    "lost_vmcss": View(
        "A P-SEAMLDR call whose SEAMRET made a current VMCS not current.",
        {
            "clock": "Lamport time",
            "ms": "when",
            "cpu": "that made the call",
            "ctx": "context that made it",
            "name": "of the leaf",
            "vmcs": "that was lost",
            "next_vmcs": "the next one that was loaded on this CPU; NULL if none was",
            "same_next": "it is the same one",
            "next_skipped": "its VMPTRLD was skipped",
        },
        f"""
        SELECT s.clock, s.ms, s.on_cpu AS cpu, s.ctx, s.name, s.lost AS vmcs, v.vmcs AS next_vmcs,
               v.vmcs = s.lost AS same_next, v.skipped AS next_skipped
        FROM (SELECT * FROM seamcall_return WHERE lost <> {NONE}) s
        ASOF LEFT JOIN vcpu_load v ON v.node = s.node AND v.seq > s.seq
        """,
    ),
    "vmcs_moves": View(
        "A VMCS loaded on another CPU than the last time.",
        {
            "clock": "Lamport time of the load",
            "vcpu": "task number",
            "vmcs": "physical address; 18446744073709551615 for a TD's",
            "from_cpu": "where it was before",
            "to_cpu": "where it is loaded now",
            "put_ms": "when it was put there, or loaded if it was not put",
            "load_ms": "when it was loaded here",
            "gap_us": "in between",
        },
        """
        SELECT clock, vcpu, vmcs, before.cpu AS from_cpu, on_cpu AS to_cpu, before.ms AS put_ms, ms AS load_ms,
               (ts - before.ts) / 1e3 AS gap_us
        FROM (
            SELECT *, lag({'cpu': on_cpu, 'ts': ts, 'ms': ms}) OVER (PARTITION BY vcpu, vmcs ORDER BY clock) AS before
            FROM (
                SELECT clock, ts, ms, on_cpu, vcpu, vmcs, true AS loads FROM vcpu_load
                UNION ALL
                SELECT clock, ts, ms, on_cpu, vcpu, vmcs, false FROM vcpu_put
            )
        ) WHERE loads AND before.cpu <> on_cpu
        """,
    ),
    "vmx_errors": View(
        "A VMX instruction that failed.",
        {
            "ms": "when",
            "clock": "Lamport time",
            "node": "CPU",
            "cpu": "its number",
            "ctx": "context that executed it",
            "instruction": "name",
            "operand": "VMCS field, if it has one",
            "vmcs": "current VMCS, or the one that it names",
            "result": "invalid, valid:N or fault:V",
            "cause": "what took the current VMCS, or what the error number says",
        },
        f"""
        SELECT e.ms, e.clock, e.node, e.cpu, e.ctx, e.instruction, e.operand, e.vmcs, e.result,
               CASE {_ERROR_TEXTS}
                    WHEN e.result LIKE 'valid:%' THEN 'VM-instruction error ' || e.result[7:]
                    WHEN e.result LIKE 'fault:%' THEN 'exception ' || e.result[7:]
                    ELSE coalesce(c.what, 'no VMCS was ever current') END AS cause
        FROM (
            {_failed("vmread", operand="name")}
            UNION ALL {_failed("vmwrite", operand="name")}
            UNION ALL {_failed("vmentry", instruction="upper(insn)")}
            UNION ALL {_failed("vmptrld")}
            UNION ALL {_failed("vmclear")}
            UNION ALL {_failed("vmptrst", vmcs="NULL")}
            UNION ALL {_failed("vmxon", vmcs="NULL")}
            UNION ALL {_failed("vmxoff", vmcs="NULL")}
        ) e
        ASOF LEFT JOIN (
            SELECT node, seq, 'SEAMRET of ' || name || ' took the current VMCS' AS what
            FROM seamcall_return WHERE lost <> {NONE}
            UNION ALL
            SELECT node, seq, 'VMCLEAR of the current VMCS' FROM vmclear WHERE result = 'ok' AND vmcs = cur
            UNION ALL
            SELECT node, seq, 'VMPTRLD gave it a current VMCS' FROM vmptrld WHERE result = 'ok'
            UNION ALL
            SELECT node, seq, 'VMXON left it without a VMCS' FROM vmxon WHERE result = 'ok'
            UNION ALL
            SELECT node, seq, 'VMX is off' FROM vmxoff WHERE result = 'ok'
        ) c ON c.node = e.node AND c.seq < e.seq
        """,
    ),
    "request_times": View(
        "Something that user space asked a CPU for.",
        {
            "request": "number",
            "kind": "what it asked for",
            "cpu": "that it asked",
            "asked_ms": "when",
            "wait_us": "until the CPU's thread began with it; NULL if it never did",
            "work_us": "from then to its end; NULL if it has none",
            "total_us": "both",
            "errno": "0 or negative",
        },
        """
        SELECT r.request, r.kind, r.cpu, r.ms AS asked_ms, (b.ts - r.ts) / 1e3 AS wait_us,
               (e.ts - b.ts) / 1e3 AS work_us, (e.ts - r.ts) / 1e3 AS total_us, e.errno
        FROM request r
        LEFT JOIN admin_begin b ON b.request = r.request AND b.on_cpu = r.cpu
        LEFT JOIN admin_end e ON e.request = b.request AND e.node = b.node AND e.pid = b.pid
        """,
    ),
    "troubles": View(
        "What went wrong in the machine from outside, or was reported to go wrong.",
        {
            "ms": "when",
            "clock": "Lamport time",
            "node": "that it happened to, or that says it",
            "what": "fault:KIND, exit, refused, broken, backlog, soft_lockup or hard_lockup",
            "detail": "more about it",
        },
        """
        SELECT ms, clock, name AS node, 'fault:' || kind AS what, "what" AS detail FROM fault
        UNION ALL
        SELECT ms, clock, name, 'exit', 'status ' || status FROM process_exit WHERE NOT wanted
        UNION ALL
        SELECT ms, clock, node, 'refused', reason FROM refused
        UNION ALL
        SELECT ms, clock, node, 'broken', error FROM broken
        UNION ALL
        SELECT ms, clock, node, 'backlog', waiting || ' messages for ' || "to" FROM link_backlog
        UNION ALL
        SELECT ms, clock, 'cpu' || cpu, 'soft_lockup', text FROM soft_lockup
        UNION ALL
        SELECT ms, clock, 'cpu' || cpu, 'hard_lockup', text FROM hard_lockup
        """,
    ),
}
"""By name, in an order in which each uses only those of events and those before it."""
