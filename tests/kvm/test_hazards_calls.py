"""Hazards of calling P-SEAMLDR: exactly what is seen of them."""

from __future__ import annotations

import pytest
from hazards import played, violated


def test_h1_perf_is_told_zero() -> None:
    """H1: guest RIP reads as 0 in the NMI handler; on a CPU without the erratum it is there."""
    shown = played("H1", "save-restore")
    assert shown.seen["guest RIP, read in the NMI handler"] == [("invalid", 0)]
    assert "I13" in violated(shown.machine, finished=False)
    assert played("H1", "save-restore, fixed=1").seen["guest RIP, read in the NMI handler"] == "ok"
    assert [r["point"] for r in shown.machine.events("nmi_pend")][:1] == ["in-seam"]


def test_h10_the_second_caller_gets_enodev() -> None:
    """H10: VMfailInvalid is -ENODEV for the second alone; the lock makes it wait."""
    assert played("H10", "unserialized").seen == {"errnos of the two readers": (0, -19)}
    assert played("H10", "save-restore").seen == {"errnos of the two readers": (0, 0)}


def test_h11_one_copy_has_parts_of_two_answers() -> None:
    """H11: the number of updates is from before the update, SEAMEXTEND from after it; a lock does not help."""
    seen = played("H11", "clear-current-vmcs, shared=True").seen
    assert seen["num_remaining_updates before, copied, after"] == [65535, 65535, 65534]
    assert seen["the copy's SEAMEXTEND is of"] == "after"


def test_h12_the_module_is_in_place_and_tdx_is_lost() -> None:
    """H12: -EIO in spite of INSTALL's success; the non-masking restore ends as an update that succeeded."""
    assert played("H12", "save-restore-v3").seen == {
        "SEAMLDR.INSTALL returns": [0],
        "module in place": "1.5.09",
        "the update": -5,
        "TDX is initialized": False,
    }
    assert played("H12", "save-restore").seen["the update"] == 0


def test_h13_what_the_kernel_says_of_a_plain_lock() -> None:
    """H13: on RT the stopper sleeps while atomic; everywhere lockdep objects to a plain lock in an interrupt."""
    log = played("H13", "plain_lock, preemption=rt").seen["kernel log"]
    assert isinstance(log, list)
    assert set(log) == {"BUG: sleeping function called from invalid context", "BUG: scheduling while atomic"}
    assert played("H13", "plain_lock, preemption=full").seen["kernel log"] == []
    log = played("H13", "plain_lock, called by an interrupt handler").seen["kernel log"]
    assert log == ["[ BUG: Invalid wait context ]"]


@pytest.mark.parametrize("strategy", ["clear-current-vmcs", "save-restore", "vmclear-local"])
def test_h22_all_that_a_crash_leaves(strategy: str) -> None:
    """H22: no NMI in SEAM, one after it with nothing current; VMCLEARs, VMXOFF, halt; the lock stays taken."""
    shown = played("H22", strategy)
    cleared = ["ok", "ok"] if strategy != "vmclear-local" else []
    assert shown.seen == {
        "NMIs taken in SEAM": 0,
        "current VMCS in the NMI handler": [False],
        "emergency VMCLEARs": cleared,
        "CPUs out of VMX operation": 2,
        "CPU 0 has halted": True,
        "the reader has returned": False,
        "seamldr_lock is held": True,
    }
    assert "I13" not in violated(shown.machine, finished=False)


def test_h23_lockups_are_reported_and_no_vmcs_is_touched() -> None:
    """H23: every CPU is reported in a long stop; CPU 0's NMI came during INSTALL, and finds nothing current."""
    seen = played("H23", "15 s for each CPU").seen
    log = seen["kernel log"]
    assert isinstance(log, list)
    assert sorted(log) == [f"Watchdog detected hard LOCKUP on cpu {number}" for number in range(3)]
    assert seen["NMIs right after SEAMRET, with a current VMCS"] == [False]
    assert seen["VMX instructions in NMI handlers"] == 0
    assert seen["the update"] == 0


@pytest.mark.parametrize(
    ("label", "attempts", "errno"),
    [("TDH.SYS.INIT, 9 times", 10, 0), ("TDH.SYS.INIT, 10 times", 10, -5), ("SEAMLDR.INSTALL, once", 1, -5)],
)
def test_h24_how_often_is_asked(label: str, attempts: int, errno: int) -> None:
    """H24: the module ten times, P-SEAMLDR once; a failure is one line of the log."""
    seen = played("H24", label).seen
    assert (seen["attempts"], seen["the update"], seen["kernel log"] != []) == (attempts, errno, errno != 0)


def test_h26_updates_starve_and_every_read_takes_a_vmcs() -> None:
    """H26: in version 3 most uploads are refused with -EIO before they begin; with the lock all come through."""
    seen = played("H26", "save-restore-v3, v3=True").seen
    uploads = seen["uploads"]
    assert isinstance(uploads, list) and uploads.count(-5) > len(uploads) // 2
    assert seen["updates begun"] == uploads.count(0)
    assert seen["VMCSs that they took"] != 0
    assert played("H26", "clear-current-vmcs, v3=True").seen["uploads"] == [0] * 6


def test_h28_a_caller_that_waits_with_interrupts_off_is_spared() -> None:
    """H28: VMXOFF comes by IPI, so only a waiter with interrupts on finds itself outside; the others leave later."""
    assert played("H28", "merged_without_check, owner=kvm").seen == {"errno of CPU 1": -13, "CPU 1 has left VMX": True}
    assert played("H28", "none, owner=kvm").seen == {"errno of CPU 1": 0, "CPU 1 has left VMX": True}
    assert played("H28", "merged_without_check, owner=core").seen["CPU 1 has left VMX"] is False


def test_h28_a_callback_read_early_is_freed_text() -> None:
    """H28: whoever reads the pointer outside of a preemption-off region is not waited for."""
    log = played("H28", "kvm_callback_read_early").seen["kernel log"]
    assert log == ["BUG: unable to handle page fault: instruction fetch from a module that is unloaded"]


def test_h32_one_nmi_after_seamret() -> None:
    """H32: three NMIs are one, and it comes before anything else of the call."""
    assert played("H32", "three").seen == {
        "delivered": 1,
        "order": ["seamcall_return", "nmi_enter", "lock_drop"],
    }


def test_h33_a_second_clear_ipi_finds_nothing_to_do() -> None:
    """H33: the interrupt comes twice, the function runs once, and a second clear of the VMCS returns at once."""
    assert played("H33", "a clear IPI comes twice").seen == {
        "interrupts": 2,
        "functions run": 1,
        "VMCLEARs of the second call": 0,
        "broken": [],
    }


def test_h35_who_asks_waits() -> None:
    """H35: while CPU 0 stands still CPU 1 waits for its answer, and gets it later."""
    seen = played("H35", "save-restore").seen
    assert seen["CPU 1, meanwhile"] == "waits for __loaded_vmcs_clear on CPU 0"
    assert (seen["later"], seen["broken"]) == ("cleared", [])
