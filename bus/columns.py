"""What a field of a record is in SQL: one place, from which the views of `bus.sql` and docs/queries.md are made.

Times are ns (`_ns`) or seconds (`_s`). Addresses and registers are UBIGINT; 18446744073709551615 is "no VMCS". A flag,
written as 0 or 1, is BOOLEAN. What is a list or an object in the record is JSON.
"""

from __future__ import annotations

from bus.events import EVENTS

COMMON = {
    "ts": ("BIGINT", "monotonic clock of the machine that wrote it, ns"),
    "ms": ("DOUBLE", "the same in ms since the first record of the run"),
    "clock": ("BIGINT", "Lamport time: no effect has a lower one than its cause"),
    "node": ("VARCHAR", "who wrote it"),
    "on_cpu": ("INTEGER", "its number if that is a CPU, else NULL"),
    "pid": ("INTEGER", "process id"),
    "seq": ("BIGINT", "number of the record in its file"),
    "ctx": ("VARCHAR", "context that ran, of a CPU"),
    "irqs": ("BOOLEAN", "RFLAGS.IF, of a CPU"),
}
"""Columns that every table of records has: type and meaning."""

_BY_TYPE = {
    "BIGINT": (
        "active attempt by call count counter cpu cpus delayed depth dropped duplicated elapsed_ns entries epoch "
        "errno hardware_reason held_ns holder_epoch holder_number holders incarnation inside level num_ack "
        "num_failed number operations remaining request resent ret seed sent target task tasks td tds to took_ns "
        "update updates vcpu vcpus vector waited_ns waiting"
    ),
    "UBIGINT": "csd cur expected features0 field got info leaf lost new old pa status value vmcs want",
    "DOUBLE": "stuck_s",
    "BOOLEAN": (
        "admitted alive coalesced data entered erratum finished initialized launched migrated nmi skipped stale "
        "sysinfo wait wanted"
    ),
    "VARCHAR": (
        "error func head id insn kind load lock mrtd name on owner path point reason result source stage state "
        "step strategy text version via what where why"
    ),
    "JSON": "asked counts files knobs locks online rules",
}
_TYPES = {field: kind for kind, fields in _BY_TYPE.items() for field in fields.split()}
_EXCEPTIONS = {
    ("csd_run", "source"): "BIGINT",
    ("link_backlog", "to"): "VARCHAR",
    ("lock_claim", "asked"): "BIGINT",
    ("process_exit", "status"): "BIGINT",
    ("soft_lockup", "task"): "VARCHAR",
    ("stop_freed", "owner"): "BIGINT",
    ("sysfs_read", "value"): "VARCHAR",
    ("sysfs_write", "value"): "VARCHAR",
    ("td_error", "leaf"): "VARCHAR",
    ("td_measured", "expected"): "VARCHAR",
}
"""Fields that mean something else in one event than elsewhere."""


def sql_type(event: str, field: str) -> str:
    """The SQL type of a field; raises `KeyError` if it has none yet.

    >>> sql_type("lock_grant", "waited_ns"), sql_type("sysfs_read", "value")
    ('BIGINT', 'VARCHAR')
    """
    return _EXCEPTIONS.get((event, field)) or _TYPES[field]


def event_columns(event: str) -> dict[str, str]:
    """The columns of an event's own fields, with their types, in the order of the event table."""
    return {field: sql_type(event, field) for field in EVENTS[event].fields}
