"""Ready questions to the records of a run, by name, and the samples that two runs are compared by.

Each is one SELECT over the views of `bus.views` and runs as `seamlab analyze RUN --sql NAME`.
"""

from __future__ import annotations

import re

import msgspec


class Query(msgspec.Struct, frozen=True):
    """A ready query: the sentence that says what it answers, and its SELECT."""

    sentence: str
    sql: str


class UnknownQuery(ValueError):
    """There is no query of this name; the message is one line for the user."""


def _spread(value: str) -> str:
    """Columns that describe how a time in us is spread."""
    return f"round(p50({value}), 1) AS p50_us, round(p99({value}), 1) AS p99_us, round(max({value}), 1) AS max_us"


QUERIES: dict[str, Query] = {
    "events": Query(
        "How many records of each event there are, and of how many processes.",
        "SELECT event, count(*) AS records, count(DISTINCT node) AS processes FROM records GROUP BY event "
        "ORDER BY records DESC, event",
    ),
    "processes": Query(
        "What each process wrote: its records, from when to when.",
        "SELECT node, pid, count(*) AS records, round(min(ms), 3) AS first_ms, round(max(ms), 3) AS last_ms "
        "FROM records GROUP BY node, pid ORDER BY first_ms, node",
    ),
    "lock-wait": Query(
        "How long each CPU waited for each lock.",
        f"SELECT lock, cpu, count(*) AS requests, count(wait_us) AS granted, {_spread('wait_us')}, "
        "round(p50(queue_us), 1) AS queue_p50_us FROM lock_waits GROUP BY lock, cpu ORDER BY lock, cpu",
    ),
    "lock-hold": Query(
        "How long each holder held each lock, by the context that held it.",
        f"SELECT lock, cpu, ctx, count(*) AS holds, count(*) - count(held_us) AS never_dropped, {_spread('held_us')} "
        "FROM lock_holds GROUP BY lock, cpu, ctx ORDER BY lock, cpu, ctx",
    ),
    "lock-slowest": Query(
        "The ten longest waits for a lock, and who held it while they waited.",
        "SELECT w.lock, w.cpu, w.ctx, round(w.asked_ms, 3) AS asked_ms, round(w.wait_us, 1) AS wait_us, "
        "count(h.cpu) AS holds_meanwhile, list(DISTINCT h.cpu ORDER BY h.cpu) FILTER (h.cpu IS NOT NULL) AS by_cpus "
        "FROM (SELECT * FROM lock_waits WHERE wait_us IS NOT NULL ORDER BY wait_us DESC, asked_ms LIMIT 10) w "
        "LEFT JOIN lock_holds h ON h.lock = w.lock AND h.held_ms < w.held_ms "
        "AND coalesce(h.dropped_ms, w.held_ms) > w.asked_ms "
        "GROUP BY ALL ORDER BY max(w.wait_us) DESC, asked_ms",
    ),
    "ipi-latency": Query(
        "From the sending of an interrupt to its delivery, by vector and target CPU.",
        f"SELECT vector, nmi, target, count(*) AS sent, count(latency_us) AS delivered, "
        f"count(*) FILTER (coalesced) AS coalesced, {_spread('latency_us')} FROM ipis GROUP BY vector, nmi, target "
        "ORDER BY vector, nmi, target",
    ),
    "cross-calls": Query(
        "From the queueing of a cross-call to its end, by function.",
        "SELECT func, count(*) AS calls, count(run_us) AS run, count(*) FILTER (wait) AS waited_for, "
        "round(p50(run_us), 1) AS run_p50_us, round(p99(run_us), 1) AS run_p99_us, round(p50(done_us), 1) AS "
        "done_p50_us, round(p99(done_us), 1) AS done_p99_us FROM cross_calls GROUP BY func ORDER BY func",
    ),
    "updates": Query(
        "Each module update: how long it took, and how it ended.",
        "SELECT update, cpu, cpus, round(begin_ms, 3) AS begin_ms, round(duration_us, 1) AS duration_us, ret "
        "FROM update_times ORDER BY begin_ms",
    ),
    "update-states": Query(
        "How long each CPU worked in each stage of each update.",
        "SELECT update, state, cpu, round(begin_ms, 3) AS begin_ms, round(end_ms, 3) AS end_ms, "
        "round(work_us, 1) AS work_us, ret, last FROM update_states "
        "ORDER BY update, min(begin_ms) OVER (PARTITION BY update, state), state, cpu",
    ),
    "update-slowest": Query(
        "The slowest CPU of each update, by its time at work in the stages, and in how many all waited for it.",
        "SELECT update, cpu, round(work_us, 1) AS work_us, round(work_us / all_us * count, 2) AS times_the_mean, "
        "held_up FROM (SELECT update, cpu, sum(work_us) AS work_us, count(*) FILTER (last) AS held_up, "
        "sum(sum(work_us)) OVER (PARTITION BY update) AS all_us, count(*) OVER (PARTITION BY update) AS count, "
        "row_number() OVER (PARTITION BY update ORDER BY sum(work_us) DESC NULLS LAST, cpu) AS place "
        "FROM update_states GROUP BY update, cpu) WHERE place = 1 ORDER BY update",
    ),
    "residence": Query(
        "How long each CPU was inside P-SEAMLDR, by leaf.",
        f"SELECT cpu, name, count(*) AS calls, count(inside_us) AS returned, {_spread('inside_us')}, "
        "round(sum(inside_us), 1) AS total_us FROM seam_residences WHERE p_seamldr GROUP BY cpu, name "
        "ORDER BY cpu, name",
    ),
    "seamcalls": Query(
        "Every SEAMCALL leaf: how often it entered SEAM, how long it stayed, how many statuses were not 0.",
        f"SELECT name, count(*) AS calls, count(*) FILTER (status <> 0) AS not_zero, {_spread('inside_us')} "
        "FROM seam_residences GROUP BY name ORDER BY calls DESC, name",
    ),
    "lost-vmcs": Query(
        "P-SEAMLDR calls that took a current VMCS away, by CPU, and what was loaded there next.",
        "SELECT cpu, name, count(*) AS lost, count(*) FILTER (same_next) AS same_next, "
        "count(*) FILTER (same_next AND next_skipped) AS believed_still_current FROM lost_vmcss GROUP BY cpu, name "
        "ORDER BY cpu, name",
    ),
    "loads-skipped": Query(
        "vCPU loads by CPU and by the way they came about, and those whose VMPTRLD was skipped.",
        "SELECT on_cpu AS cpu, via, count(*) AS loads, count(*) FILTER (skipped) AS skipped, "
        "count(*) FILTER (migrated) AS migrated, "
        "round(100 * count(*) FILTER (skipped) / count(*), 1) AS percent_skipped FROM vcpu_load GROUP BY cpu, via "
        "ORDER BY cpu, via",
    ),
    "vmcs-moves": Query(
        "How often each vCPU's VMCS moved to another CPU, and how long it was loaded nowhere meanwhile.",
        f"SELECT vcpu, pa(vmcs) AS vmcs, count(*) AS moves, count(DISTINCT to_cpu) AS to_cpus, {_spread('gap_us')} "
        "FROM vmcs_moves GROUP BY vcpu, vmcs ORDER BY vcpu, vmcs",
    ),
    "errors": Query(
        "VMX instructions that failed, by cause.",
        "SELECT cause, instruction, result, count(*) AS errors, list(DISTINCT cpu ORDER BY cpu) AS cpus, "
        "min(clock) AS first_clock FROM vmx_errors GROUP BY cause, instruction, result "
        "ORDER BY errors DESC, cause, instruction, result",
    ),
    "wrong-data": Query(
        "Fields of a VMCS, or parts of a TD, that were not what KVM's copy says.",
        "SELECT vcpu, pa(vmcs) AS vmcs, what, count(*) AS times, min(clock) AS first_clock, "
        "pa(arg_min(expected, clock)) AS first_expected, pa(arg_min(got, clock)) AS first_got "
        "FROM wrong_data GROUP BY vcpu, vmcs, what ORDER BY first_clock",
    ),
    "requests": Query(
        "What user space asked for, by kind: how long it waited for the CPU's thread, and how long that worked.",
        "SELECT kind, count(*) AS requests, count(total_us) AS ended, count(*) FILTER (errno <> 0) AS failed, "
        "round(p50(wait_us), 1) AS wait_p50_us, round(p99(wait_us), 1) AS wait_p99_us, "
        "round(p50(work_us), 1) AS work_p50_us, round(p99(work_us), 1) AS work_p99_us "
        "FROM request_times GROUP BY kind ORDER BY kind",
    ),
    "faults": Query(
        "Injected faults, processes that ended unasked, refused frames, backlogs, lockups, in their order.",
        "SELECT round(ms, 3) AS ms, clock, node, what, detail FROM troubles ORDER BY clock, node",
    ),
    "kernel-log": Query(
        "Lines of the emulated kernels' logs: how often, on which CPUs, when first.",
        "SELECT text, count(*) AS times, list(DISTINCT on_cpu ORDER BY on_cpu) AS cpus, round(min(ms), 3) AS first_ms "
        "FROM (SELECT text, on_cpu, ms FROM log UNION ALL SELECT text, on_cpu, ms FROM warn UNION ALL "
        "SELECT text, on_cpu, ms FROM soft_lockup UNION ALL SELECT text, on_cpu, ms FROM hard_lockup) "
        "GROUP BY text ORDER BY times DESC, text",
    ),
}

SAMPLES: dict[str, tuple[str, str]] = {
    "lock wait": (
        "from a CPU's request of seamldr_lock until it held it",
        "SELECT wait_us FROM lock_waits WHERE lock = 'seamldr_lock' AND wait_us IS NOT NULL ORDER BY asked_ms, cpu",
    ),
    "IPI latency": (
        "from the sending of an interrupt message until its bit was pending",
        "SELECT latency_us FROM ipis WHERE latency_us IS NOT NULL ORDER BY sent_ms, id",
    ),
    "P-SEAMLDR residence": (
        "from the entry of P-SEAMLDR until SEAMRET",
        "SELECT inside_us FROM seam_residences WHERE p_seamldr AND inside_us IS NOT NULL ORDER BY enter_ms, cpu",
    ),
    "update duration": (
        "from the reset of update control until stop_machine had returned",
        "SELECT duration_us FROM update_times WHERE duration_us IS NOT NULL ORDER BY begin_ms",
    ),
}
"""What two runs are compared by: what each sample measures, in us, and its SELECT, in the order of time."""

_NAME = re.compile(r"[\w-]+")


def query_text(given: str) -> str:
    """The SQL of a ready query's name, or `given` itself if it is SQL; raises `UnknownQuery`.

    >>> query_text("SELECT 1")
    'SELECT 1'
    """
    name = given.strip()
    if not _NAME.fullmatch(name):
        return given
    if name not in QUERIES:
        raise UnknownQuery(f"no query {name!r}; there are {', '.join(QUERIES)}")
    return QUERIES[name].sql
