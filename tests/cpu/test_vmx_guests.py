"""The synthetic guests of `run_script`: first exits, defects that fail entry, interrupts that reach them."""

from __future__ import annotations

from typing import Any

import pytest

from cpu.vmx import run_script
from cpu.vmx.guests import GUESTS

SETUP: list[dict[str, Any]] = [
    {"op": "cr4", "set": "0x2000"},
    {"op": "wrmsr", "msr": "0x3a", "value": "0x5"},
    {"op": "mem_write32", "pa": "0x1000", "value": 0x13},
    {"op": "mem_write32", "pa": "0x3000", "value": 0x13},
    {"op": "vmxon", "pa": "0x1000"},
    {"op": "vmclear", "pa": "0x3000"},
    {"op": "vmptrld", "pa": "0x3000"},
]

# name: (reason, qualification, instruction length, interruption information, saved activity)
FIRST_EXIT: dict[str, tuple[int, int, int, int, int]] = {
    "vmcall": (18, 0, 3, 0, 0),
    "cpuid": (10, 0, 2, 0, 0),
    "hlt": (12, 0, 1, 0, 0),
    "invd": (13, 0, 2, 0, 0),
    "rdmsr": (31, 0, 2, 0, 0),
    "wrmsr": (32, 0, 2, 0, 0),
    "in": (30, 0x80_0048, 2, 0, 0),
    "out": (30, 0x80_0040, 2, 0, 0),
    "vmread": (23, 0, 3, 0, 0),
    "vmwrite": (25, 0, 3, 0, 0),
    "vmxon": (27, 0, 4, 0, 0),
    "vmxoff": (26, 0, 3, 0, 0),
    "vmptrld": (21, 0, 3, 0, 0),
    "vmptrst": (22, 0, 3, 0, 0),
    "vmclear": (19, 0, 4, 0, 0),
    "vmlaunch": (20, 0, 3, 0, 0),
    "vmresume": (24, 0, 3, 0, 0),
    "invept": (50, 0, 5, 0, 0),
    "invvpid": (53, 0, 5, 0, 0),
    "rdtsc": (16, 0, 2, 0, 0),
    "rdpmc": (15, 0, 2, 0, 0),
    "invlpg": (14, 0x5000_0000, 3, 0, 0),
    "monitor": (39, 0, 3, 0, 0),
    "mwait": (36, 0, 3, 0, 0),
    "pause": (40, 0, 2, 0, 0),
    "xsetbv": (55, 0, 3, 0, 0),
    "mov_cr3": (28, 0x03, 3, 0, 0),
    "mov_from_cr3": (28, 0x13, 3, 0, 0),
    "mov_dr": (29, 0x07, 3, 0, 0),
    "int3": (0, 0, 1, 0x8000_0603, 0),
    "ud2": (0, 0, 0, 0x8000_0306, 0),
    "gp": (0, 0, 0, 0x8000_0B0D, 0),
    "pf": (0, 0x5000_0000, 0, 0x8000_0B0E, 0),
    "triple": (2, 0, 0, 0, 0),
    "ept_read": (48, 0x181, 0, 0, 0),
    "ept_write": (48, 0x182, 0, 0, 0),
    "ept_exec": (48, 0x184, 0, 0, 0),
    "ept_misconfig": (49, 0, 0, 0, 0),
    "extint": (1, 0, 0, 0, 0),
    "extint_ack": (1, 0, 0, 0x8000_0040, 0),
    "intr_window": (7, 0, 0, 0, 0),
    "preempt_zero": (52, 0, 0, 0, 0),
    "preempt_spin": (52, 0, 0, 0, 0),
    "hlt_preempt": (52, 0, 0, 0, 1),
    "inject_ud": (18, 0, 3, 0, 0),
    "two_exits": (10, 0, 2, 0, 0),
    "mtf": (37, 0, 0, 0, 0),
}
WAITING = {"spin", "spin_extint", "spin_nmi", "wait_sipi"}
DEFECTS: dict[str, tuple[str, int, int]] = {
    "bad_pin": ("fail_valid", 7, 0),
    "bad_inject": ("fail_valid", 7, 0),
    "bad_cr3_count": ("fail_valid", 7, 0),
    "bad_host_rip": ("fail_valid", 8, 0),
    "bad_host_cr4": ("fail_valid", 8, 0),
    "bad_host_tr": ("fail_valid", 8, 0),
    "bad_guest_cr0": ("vm_exit", 0x8000_0021, 0),
    "bad_guest_rip": ("vm_exit", 0x8000_0021, 0),
    "bad_rflags": ("vm_exit", 0x8000_0021, 0),
    "bad_activity": ("vm_exit", 0x8000_0021, 0),
    "bad_link": ("vm_exit", 0x8000_0021, 4),
    "bad_msr_load": ("vm_exit", 0x8000_0022, 1),
}


def run(*ops: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of `ops` after the set-up of a current VMCS."""
    return run_script({}, [*SETUP, *ops])[len(SETUP) :]


def test_every_guest_is_here() -> None:
    """The tables of this file name every guest."""
    assert set(FIRST_EXIT) | WAITING == set(GUESTS)


@pytest.mark.parametrize("name", FIRST_EXIT)
def test_first_exit_of_guest(name: str) -> None:
    """The guest's first VM exit has the reason that it is named for, with its exit information."""
    setup, entry = run({"op": "setup_guest", "guest": name}, {"op": "vmlaunch"})
    assert setup["status"] == "succeed"
    reason, qualification, length, info, activity = FIRST_EXIT[name]
    assert entry["status"] == "vm_exit"
    assert entry["exit"] == {
        "reason": hex(reason),
        "qualification": hex(qualification),
        "instr_len": hex(length),
        "intr_info": hex(info),
        "activity": hex(activity),
    }


@pytest.mark.parametrize("name", sorted(WAITING))
def test_waiting_guest_does_not_come_back(name: str) -> None:
    """A guest that nothing interrupts keeps its processor."""
    _, entry, ping = run({"op": "setup_guest", "guest": name}, {"op": "vmlaunch"}, {"op": "ping"})
    assert (entry["status"], ping["status"]) == ("no_response", "no_response")


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_fails_entry(name: str) -> None:
    """Controls give error 7, host state 8; guest state and MSR loading an exit with bit 31; the VMCS stays clear."""
    _, entry, resume = run({"op": "setup_guest", "guest": name}, {"op": "vmlaunch"}, {"op": "vmresume"})
    status, code, qualification = DEFECTS[name]
    assert entry["status"] == status
    if status == "fail_valid":
        assert entry["error"] == code
    else:
        assert entry["exit"]["reason"] == hex(code)
        assert entry["exit"]["qualification"] == hex(qualification)
    assert resume["error"] == 5


def test_two_exits() -> None:
    """After `advance_rip` the guest goes on behind the exiting instruction; without it, it exits there again."""
    results = run(
        {"op": "setup_guest", "guest": "two_exits"},
        {"op": "vmlaunch"},
        {"op": "vmresume"},
        {"op": "advance_rip"},
        {"op": "vmresume"},
    )
    assert [result["exit"] and result["exit"]["reason"] for result in results] == [None, "0xa", "0xa", None, "0x12"]


def test_without_interception_the_guest_handles_it() -> None:
    """An exception that is not in the bitmap goes through the guest's IDT, whose handlers execute VMCALL."""
    results = run(
        {"op": "setup_guest", "guest": "ud2"}, {"op": "vmwrite", "field": "0x4004", "value": 0}, {"op": "vmlaunch"}
    )
    assert results[-1]["exit"]["reason"] == "0x12"


@pytest.mark.parametrize(("guest", "reason", "counted"), [("spin", "0x12", 0), ("spin_extint", "0x1", 1)])
def test_waiting_interrupt_at_entry(guest: str, reason: str, counted: int) -> None:
    """An interrupt that waits at entry exits, and stays for the host, or goes to a guest with RFLAGS.IF = 1."""
    results = run(
        {"op": "setup_guest", "guest": guest},
        {"op": "vmwrite", "field": "0x6820", "value": "0x202"},
        {"op": "vmlaunch", "pending_irq": True},
        {"op": "irq_count"},
    )
    assert results[2]["exit"]["reason"] == reason
    assert results[3]["value"] == hex(counted)


def test_nmi_exit_blocks_nmis_until_iret() -> None:
    """An exit due to an NMI blocks the next one in root operation; an IRET, here of an interrupt handler, ends that."""
    config = {"cpus": 2}
    on_1 = [op | {"cpu": 1} for op in SETUP]
    results = run_script(
        config,
        [
            *on_1,
            {"op": "setup_guest", "guest": "spin_nmi", "cpu": 1},
            {"op": "vmlaunch", "cpu": 1, "async": True},
            {"op": "ipi", "to": 1, "kind": "nmi"},
            {"op": "join", "cpu": 1},
            {"op": "ipi", "to": 1, "kind": "nmi"},
            {"op": "nmi_count", "cpu": 1},
            {"op": "ipi", "to": 1, "kind": "fixed", "vector": 64},
            {"op": "nmi_count", "cpu": 1},
        ],
    )
    assert results[-5]["exit"]["intr_info"] == "0x80000202"
    assert (results[-3]["value"], results[-1]["value"]) == ("0x0", "0x1")
