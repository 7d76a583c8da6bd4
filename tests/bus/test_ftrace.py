"""Records as text of the kernel's tracer."""

from __future__ import annotations

import re
from pathlib import Path

from history import INFO, Run, save

from bus.events import NONE
from bus.ftrace import ftrace
from bus.merge import Notes, merge_by_time

V = 0x12000
LINE = re.compile(
    r"^ *(?P<comm>\S.{0,14})-(?P<pid>\d+) +\[(?P<cpu>\d{3,})\] (?P<flags>[d.]\.[hz.]\.\.) +\d+\.\d{6}: \w+:"
)
"""What readers of such files expect of a line that is no comment."""


def lines(run: Run) -> list[str]:
    """The lines below the header."""
    return [line.rstrip("\n") for line in list(ftrace(run.records, len(run.records), 2))[1:]]


def test_the_header_is_the_kernel_s() -> None:
    """Tracer, number of entries and of CPUs, and the column heads under which the lines stand."""
    head, first, *_ = ftrace(Run().records, 1, 2)
    comments = head.splitlines()
    assert comments[0] == "# tracer: nop" and "1/1   #P:2" in comments[2] and {line[0] for line in comments} == {"#"}
    heads = comments[-2]
    assert first.index("-1000") == heads.index("-PID") and first.index("[") == heads.index("CPU#")
    assert first.index(".....") == heads.index("|||||")


def test_a_line_has_task_cpu_flags_time_and_event() -> None:
    """Addresses are hexadecimal; time is in seconds with microseconds."""
    run = Run().cpu(1, "vcpu0", irqs=False).vmptrld(V)
    assert lines(run)[-1] == (
        "           vcpu0-1001    [001] d....     0.002000: vmptrld: vmcs=0x12000 cur=none result=ok reason=load"
    )


def test_every_line_can_be_parsed() -> None:
    """Whatever is written, fields with lists, dictionaries, newlines and spaces too."""
    run = Run(seamret_launch="clear").online("cpu1").cpu(0, "a task with a long name").load(V).update_begin()
    run.cpu(0, "irq").begin(V).seamcall(INFO, lost=V).end(NONE).cpu(1, "nmi").vmread("invalid")
    run.write("log", text="two\nlines").node("seamldr").queue(0, 1).exit("cpu1", wanted=False, status=-9).finish()
    assert [line for line in lines(run) if LINE.match(line) is None] == []


def test_handlers_have_the_task_that_they_interrupt() -> None:
    """Flags say hard interrupt or NMI; the idle task is number 0; threads of a CPU have its number."""
    run = Run().cpu(0, "vcpu3").vmptrst(V).cpu(0, "irq", irqs=False).vmptrst(V).cpu(0, "nmi", irqs=False).vmptrst(V)
    run.cpu(1, "irq", irqs=False).vmptrst(V).cpu(1, "idle").vmptrst(V).cpu(0, "reader").vmptrst(V)
    found = [LINE.match(line) for line in lines(run)[1:]]
    assert [match and (match["comm"], match["pid"], match["flags"]) for match in found] == [
        ("vcpu3", "1001", "....."),
        ("vcpu3", "1001", "d.h.."),
        ("vcpu3", "1001", "d.z.."),
        ("<idle>", "0", "d.h.."),
        ("<idle>", "0", "....."),
        ("reader/0", "1002", "....."),
    ]


def test_what_no_cpu_wrote_stands_on_the_cpu_that_it_is_about() -> None:
    """A grant on the CPU that gets it, a death on the CPU that died, the machine on CPU 0."""
    run = Run().node("seamldr").queue(1, 1).grant(1, 1, 1).exit("cpu1", wanted=False, status=-9)
    assert [re.findall(r"\[(\d+)\]", line)[0] for line in lines(run)] == ["000", "001", "001", "001"]


def test_the_kernel_log_is_the_console() -> None:
    """Warnings, log lines and lockups are printk's console events, with nothing but the line."""
    run = Run().cpu(0).write("warn", text="vmread failed: field=4400").write("log", text="seamldr: error -5")
    run.write("hard_lockup", cpu=1, stuck_s=10.0, text="watchdog: Watchdog detected hard LOCKUP on cpu 1")
    assert [line.partition(": ")[2] for line in lines(run)[1:]] == [
        "console: vmread failed: field=4400",
        "console: seamldr: error -5",
        "console: watchdog: Watchdog detected hard LOCKUP on cpu 1",
    ]


def test_the_order_is_that_of_time(tmp_path: Path) -> None:
    """The clock of a process that hears of nobody lags behind; the monotonic one does not."""
    run = Run().cpu(0).vmptrst(V).cpu(1).vmptrst(V).cpu(0).vmptrst(V)
    for record, clock in zip(run.records, (9, 4, 1, 5), strict=True):
        record["clock"] = clock
    notes = Notes()
    merged = [(record["ts"], record["node"]) for record in merge_by_time(save(run, tmp_path), notes)]
    assert merged == [(1_000_000, "launcher"), (2_000_000, "cpu0"), (3_000_000, "cpu1"), (4_000_000, "cpu0")]
    assert notes.sentences == []
