"""Ready queries: each gives the known answer about a history made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from databases import rows
from history import INFO, INSTALL, LOCK, Run

from bus.events import NONE
from bus.queries import QUERIES, SAMPLES, UnknownQuery, query_text

A, B = 0x8001000, 0x8003000
Rows = list[tuple[Any, ...]]


def two_locks() -> Run:
    """CPU 0 waits 3 ms and holds 5 ms, CPU 1 waits 7 ms meanwhile and never gives the lock back; CPU 0 asks again."""
    run = Run().cpu(0, "reader").lock_request(1).node("seamldr").queue(0, 1).grant(0, 1, 1)
    run.cpu(0, "reader").lock_hold(1, 1).cpu(1, "reader").lock_request(1).node("seamldr").queue(1, 1)
    run.cpu(0, "idle").write("irq_enter", vector=251).write("irq_exit", vector=251)
    run.cpu(0, "reader").lock_drop(1).node("seamldr").release(0, 1).grant(1, 1, 2)
    return run.cpu(1, "reader").lock_hold(1, 2).cpu(0, "reader").lock_request(2)


def ipis() -> Run:
    """Two interrupts from CPU 0 to CPU 1, the second of which took 0.5 ms to hand over; one that never arrives."""
    run = Run().cpu(0).ipi_send(1, 1).cpu(1).ipi_deliver(0, 1).cpu(0).ipi_send(1, 2, took_ns=500_000)
    return run.cpu(1).ipi_deliver(0, 2).cpu(0).ipi_send(2, 3)


def cross_calls() -> Run:
    """A call that ran after 2 ms and was seen after 3 ms, and one that nobody ran."""
    run = Run().cpu(0).csd_lock(1, 7).ipi_send(1, 1).cpu(1).csd_run(0, 7).cpu(0).csd_done(7)
    return run.csd_lock(1, 8, wait=0)


def update() -> Run:
    """One stage of an update, in which CPU 0 works 1 ms and CPU 1 4 ms; then a stage that CPU 0 does not end."""
    run = Run().cpu(1, "kworker").update_begin().cpu(1, "stopper").enter_state("SHUTDOWN")
    run.cpu(0, "stopper").enter_state("SHUTDOWN")
    run.write("ack", update=1, state="SHUTDOWN", ret=0, num_ack=1, num_failed=0).cpu(0, "idle")
    run.write("stop_exit").cpu(1, "stopper")
    run.write("ack", update=1, state="SHUTDOWN", ret=-5, num_ack=2, num_failed=1)
    run.cpu(0, "stopper").enter_state("CPU_INSTALL")
    return run.cpu(1, "kworker").update_end(-5)


def residences() -> Run:
    """CPU 0 is inside P-SEAMLDR for 1 ms and for 3 ms; then CPU 1 is refused entry, enters all the same, and dies."""
    run = Run().node("seamldr").seam_enter(0).seam_return(0).seam_enter(0).seam_enter(1, admitted=0).seam_enter(1)
    return run.seam_return(0).write("seam_dead", by=1, why="the CPU died inside SEAM")


def lost() -> Run:
    """Two calls lose the VMCS A on CPU 0: it is next and VMPTRLD is skipped; then B is next."""
    run = Run().cpu(0).load(A).call_none(A).vcpu_load(A, skipped=True)
    return run.call_none(A).vcpu_load(B)


def moves() -> Run:
    """A goes from CPU 0 to CPU 1, 2 ms after it was put, and is loaded there twice; B is loaded on CPU 0 only."""
    run = Run().cpu(0).vcpu_load(A).put(A).vcpu_load(B).cpu(1).vcpu_load(A).put(A).vcpu_load(A)
    return run.cpu(0).put(B).vcpu_load(B, skipped=True).cpu(1).put(B)


def errors() -> Run:
    """SEAMRET takes the VMCS of CPU 0, two VMREADs fail; a VMRESUME fails of what is not launched."""
    run = Run().cpu(0).load(A).call_none(A).vmread("invalid").vmread("invalid").vmptrld(A)
    return run.enter(A, result="valid:5").vmread("ok", A)


def wrong_data() -> Run:
    """Two wrong values of a field, one of another."""
    run = Run().cpu(0).wrong_data(A, "GUEST_RSP").wrong_data(A, "GUEST_RIP")
    return run.write("wrong_data", vcpu=0, vmcs=A, what="GUEST_RSP", expected=9, got=NONE)


def requests() -> Run:
    """A request that waits 1 ms and works 2 ms, and one that nobody begins."""
    run = Run().request(1, "read_version").cpu(0, "reader").write("admin_begin", request=1, kind="read_version")
    run.lock_request(1).write("admin_end", request=1, kind="read_version", errno=-16, text="")
    return run.request(2, "read_version")


def faults() -> Run:
    """CPU 1 is killed, and its process ends unasked; the kernel of CPU 0 sees a lockup."""
    run = Run().write("fault", kind="kill", name="cpu1", incarnation=1, what="").exit("cpu1", wanted=False, status=-9)
    run.exit("cpu0").cpu(0, "idle").write("hard_lockup", cpu=1, stuck_s=10.5, text="CPU 1 is stuck")
    return run.write("log", text="a line").write("warn", text="a line")


def call(run: Run, leaf: int) -> Run:
    """A call of this leaf by CPU 0 that fails."""
    token = {"epoch": 1, "number": 1, "holder_epoch": 1, "holder_number": 1}
    run.node("seamldr")
    run.write("seam_enter", by=0, leaf=leaf, name="INSTALL", admitted=1, alive=1, inside=1, **token)
    return run.write("seam_return", by=0, leaf=leaf, name="INSTALL", status=7, inside=0)


def spread(us: float) -> tuple[float, float, float]:
    """p50, p99 and maximum of one value."""
    return us, us, us


CASES: dict[str, tuple[Callable[[], Run], Rows]] = {
    "events": (ipis, [("ipi_send", 3, 1), ("ipi_deliver", 2, 1), ("machine_begin", 1, 1)]),
    "processes": (
        lambda: Run().cpu(1).cv(A).new_process().cv(B),
        [("launcher", 100, 1, 0.0, 0.0), ("cpu1", 100, 1, 1.0, 1.0), ("cpu1", 101, 1, 2.0, 2.0)],
    ),
    "lock-wait": (
        two_locks,
        [(LOCK, 0, 2, 1, *spread(3000.0), 2.0), (LOCK, 1, 1, 1, *spread(7000.0), 2.0)],
    ),
    "lock-hold": (
        two_locks,
        [(LOCK, 0, "reader", 1, 0, *spread(5000.0)), (LOCK, 1, "reader", 1, 1, None, None, None)],
    ),
    "lock-slowest": (
        two_locks,
        [(LOCK, 1, "reader", 5.0, 7000.0, 1, [0]), (LOCK, 0, "reader", 1.0, 3000.0, 0, None)],
    ),
    "ipi-latency": (
        ipis,
        [(0xFB, False, 1, 2, 2, 0, 1000.0, 1500.0, 1500.0), (0xFB, False, 2, 1, 0, 0, None, None, None)],
    ),
    "cross-calls": (cross_calls, [("clear", 2, 1, 1, 2000.0, 2000.0, 3000.0, 3000.0)]),
    "updates": (update, [(1, 1, 2, 1.0, 7000.0, -5)]),
    "update-states": (
        update,
        [
            (1, "SHUTDOWN", 0, 3.0, 4.0, 1000.0, 0, False),
            (1, "SHUTDOWN", 1, 2.0, 6.0, 4000.0, -5, True),
            (1, "CPU_INSTALL", 0, 7.0, None, None, None, None),
        ],
    ),
    "update-slowest": (update, [(1, 1, 4000.0, 1.6, 1)]),
    "residence": (
        lambda: call(residences(), 3),
        [(0, "INFO", 2, 2, 1000.0, 3000.0, 3000.0, 4000.0), (1, "INFO", 1, 0, None, None, None, None)],
    ),
    "seamcalls": (
        lambda: call(call(residences(), INSTALL), 3),
        [("INFO", 3, 0, 1000.0, 3000.0, 3000.0), ("INSTALL", 2, 2, *spread(1000.0))],
    ),
    "lost-vmcs": (lost, [(0, f"leaf{INFO & 0xFF}", 2, 1, 1)]),
    "loads-skipped": (moves, [(0, "load", 3, 1, 2, 33.3), (1, "load", 2, 0, 2, 0.0)]),
    "vmcs-moves": (moves, [(0, "0x8001000", 1, 1, *spread(2000.0))]),
    "errors": (
        errors,
        [
            ("SEAMRET of leaf0 took the current VMCS", "VMREAD", "invalid", 2, [0], 9),
            ("VMRESUME of a VMCS that is not launched", "VMRESUME", "valid:5", 1, [0], 12),
        ],
    ),
    "wrong-data": (
        wrong_data,
        [(0, "0x8001000", "GUEST_RSP", 2, 2, "0x5", "0x4"), (0, "0x8001000", "GUEST_RIP", 1, 3, "0x5", "0x4")],
    ),
    "requests": (requests, [("read_version", 2, 1, 1, 1000.0, 1000.0, 2000.0, 2000.0)]),
    "faults": (
        faults,
        [
            (1.0, 2, "cpu1", "fault:kill", ""),
            (2.0, 3, "cpu1", "exit", "status -9"),
            (4.0, 5, "cpu1", "hard_lockup", "CPU 1 is stuck"),
        ],
    ),
    "kernel-log": (faults, [("a line", 2, [0], 5.0), ("CPU 1 is stuck", 1, [0], 4.0)]),
}


@pytest.mark.parametrize("name", CASES)
def test_ready_query(name: str, tmp_path: Path) -> None:
    """The ready query gives exactly the rows that follow from the history."""
    history, expected = CASES[name]
    assert rows(history(), name, tmp_path) == expected


def test_every_ready_query_is_tested() -> None:
    """There is a history with a known answer for each ready query, and there are a dozen or more."""
    assert CASES.keys() == QUERIES.keys() and len(QUERIES) > 12


SAMPLED: dict[str, tuple[Callable[[], Run], list[float]]] = {
    "lock wait": (
        lambda: two_locks().lock_request(3, lock="other").lock_hold(3, 3, lock="other"),
        [3000.0, 7000.0],
    ),
    "IPI latency": (ipis, [1000.0, 1500.0]),
    "P-SEAMLDR residence": (lambda: call(residences(), 3), [1000.0, 3000.0]),
    "update duration": (update, [7000.0]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name: str, tmp_path: Path) -> None:
    """What runs are compared by is measured as it says, in the order of time, without calls of the TDX module."""
    history, expected = SAMPLED[name]
    assert [value for (value,) in rows(history(), SAMPLES[name][1], tmp_path)] == expected


def test_a_wait_ends_at_the_hold_of_the_same_process(tmp_path: Path) -> None:
    """Request numbers start again with a new process of a CPU: its wait is not taken for that of the dead one."""
    run = Run().cpu(0).lock_request(1).new_process().lock_request(1).lock_hold(1, 1)
    assert rows(run, "SELECT asked_ms, wait_us FROM lock_waits ORDER BY asked_ms", tmp_path) == [
        (1.0, None),
        (2.0, 1000.0),
    ]


def test_a_vmclear_explains_a_failure_too(tmp_path: Path) -> None:
    """The cause is what happened last to the current-VMCS pointer of that CPU, not to another VMCS or elsewhere."""
    run = Run().cpu(0).load(A).write("vmclear", vmcs=A, cur=A, result="ok", reason="clear").cpu(1).load(B).call_none(B)
    run.vmclear(A).cpu(0).vmread("invalid").cpu(1).vmread("invalid").cpu(2)
    for _ in range(20):
        run.cv(A)
    run.vmread("invalid").write("vmptrst", value=0, result="fault:6")
    assert rows(run, "SELECT cpu, cause FROM vmx_errors ORDER BY clock", tmp_path) == [
        (0, "VMCLEAR of the current VMCS"),
        (1, "SEAMRET of leaf0 took the current VMCS"),
        (2, "no VMCS was ever current"),
        (2, "exception 6"),
    ]


def test_a_name_that_is_no_query_is_told_with_those_that_are() -> None:
    """One word that names no ready query is refused, and the message lists them; anything else is SQL."""
    with pytest.raises(UnknownQuery, match=r"no query 'lock-waits'; there are events, .*kernel-log"):
        query_text("lock-waits")
    assert query_text(" errors ") == QUERIES["errors"].sql
