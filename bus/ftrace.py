"""The records of a run as text of the kernel's function tracer, one event a line, in the order of time.

    vcpu1-1003    [001] d.... 15660.123456: vmptrld: vmcs=0x8003000 cur=none result=ok reason=load

Flags are those of the kernel: `d` interrupts off, `h` in an interrupt handler, `z` in the NMI handler; preemption and
what else the tracer shows there is not recorded, and a dot. What the kernel would have written to its log is an event
`console` of printk. Tasks have numbers in the order in which they first appear. What no CPU wrote (the lock service,
the KVM process, the launcher) stands on the CPU that it is about, else on CPU 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from bus.phrases import hexadecimal
from bus.records import COMMON_FIELDS, CPU_FIELDS, Record
from bus.spec import cpu_number
from bus.story import HEXADECIMAL

HEADER = """# tracer: nop
#
# entries-in-buffer/entries-written: {count}/{count}   #P:{cpus}
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""

CONSOLE = frozenset(("warn", "log", "soft_lockup", "hard_lockup"))
"""Events that are lines of the kernel log."""

FIRST_PID = 1000
COMM_LEN = 15
"""Bytes of a task's name that the kernel keeps."""

_HANDLERS = {"irq": "h", "nmi": "z"}
_ABOUT = ("by", "to", "cpu", "target", "name")
_encode = msgspec.json.Encoder().encode


def ftrace(records: Iterable[Record], count: int, cpus: int) -> Iterator[str]:
    """The file, header first; `records` are `count` in the order of their `ts`, of a machine of `cpus` CPUs."""
    yield HEADER.format(count=count, cpus=cpus)
    tasks = _Tasks()
    for record in records:
        comm, pid = tasks.running(record)
        seconds, rest = divmod(record["ts"], 1_000_000_000)
        yield (
            f"{comm[:COMM_LEN]:>16}-{pid:<7} [{_cpu(record):03}] {_flags(record)} {seconds:>5}.{rest // 1000:06}: "
            f"{_says(record)}\n"
        )


class _Tasks:
    """What runs on each CPU, below its handlers, and the number of each task."""

    def __init__(self) -> None:
        self._running: dict[str, str] = {}
        self._pids: dict[str, int] = {}

    def running(self, record: Record) -> tuple[str, int]:
        """Name and number of the task that a record is from."""
        node, context = record["node"], record.get("ctx")
        if context is None:
            name = node
        else:
            if context not in _HANDLERS:
                self._running[node] = context
            name = self._running.get(node, "idle")
            if name == "idle":
                return "<idle>", 0
            if not name.startswith(("vcpu", "td")):
                name = f"{name}/{cpu_number(node)}"
        return name, self._pids.setdefault(name, FIRST_PID + len(self._pids))


def _cpu(record: Record) -> int:
    node = cpu_number(record["node"])
    if node is not None:
        return node
    for field in _ABOUT:
        about = record.get(field)
        number = about if type(about) is int else cpu_number(about) if isinstance(about, str) else None
        if number is not None and 0 <= number < 1 << 16:
            return number
    return 0


def _flags(record: Record) -> str:
    off = "." if record.get("irqs", 1) else "d"
    return f"{off}.{_HANDLERS.get(record.get('ctx', ''), '.')}.."


def _says(record: Record) -> str:
    event = record["event"]
    if event in CONSOLE:
        return f"console: {_value('text', record['text'])}"
    fields = (f"{key}={_value(key, record[key])}" for key in record if key not in COMMON_FIELDS | CPU_FIELDS)
    return " ".join((f"{event}:", *fields))


def _value(key: str, value: object) -> str:
    if key in HEXADECIMAL:
        return hexadecimal(value)
    return _encode(value).decode() if isinstance(value, dict | list) else str(value).replace("\n", " ")
