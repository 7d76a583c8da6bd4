"""TDs on live machines: what they have after many updates, builds that meet updates, and what a lost module costs."""

from __future__ import annotations

import hashlib
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from live import records, small

from bus.judge import Judgement
from cpu.layout import TDX_STATE
from kvm.compose import parse_knobs
from kvm.machine import Machine
from kvm.vcpu import TdVcpu, td_vcpu_of, vcpu_of
from kvm.workload import BUILDS
from seamldr.identity import make_identity
from seamldr.image import build_v2
from seamldr.module_maker import make_module
from seamldr.sigstruct import SigStruct, new_key, signer_hash

UPDATES = 50
TDX_SYS_SHUTDOWN = 0xC000_0506_0000_0000
INCOMPATIBLE_MRTD_CONTEXT = 0xC000_0622_0000_0000
ENOREMAININGUPDATE = 0x8000_0000_0000_0003


def guest_after(counter: int) -> bytes:
    """The hash chain of a guest that has done so many units of work since it was born, computed from nothing."""
    chain = bytes(32)
    for number in range(1, counter + 1):
        chain = hashlib.sha256(chain + number.to_bytes(8, "little")).digest()
    return chain


def state_of(machine: Machine, vcpu: TdVcpu) -> tuple[int, bytes]:
    """KVM's counter and chain of a TD's guest, which every exit is checked against."""
    load = machine.memory.load
    chain = b"".join(load(vcpu.chain + 32 * at)[0].to_bytes(8, "little") for at in range(4))
    return load(vcpu.counter)[0], chain


async def run(tmp_path: Path, *knobs: str, **settings: Any) -> tuple[Machine, Judgement]:
    """A live machine, run to its end."""
    async with Machine(small(tmp_path, knobs=parse_knobs(list(knobs)), **settings)) as machine:
        assert await machine.run_workload()
    return machine, machine.check()


def counters(machine: Machine, vcpus: list[TdVcpu]) -> list[int]:
    """How far the guests are."""
    return [machine.memory.load(vcpu.counter)[0] for vcpu in vcpus]


@pytest.mark.slow
async def test_tds_live_through_fifty_updates_under_load(tmp_path: Path) -> None:
    """vCPUs, TDs, version readers and migrations at once, 50 updates in a row: each TD has run after every update, its
    guest has counted on without a gap, and its chain is that of all its work since birth."""
    sizes = {"cpus": 3, "vcpus": 3, "tds": 2, "updates": 0, "seconds": 60.0, "residence_us": 20}
    vcpus = [td_vcpu_of(task) for task in (3, 4)]
    async with Machine(small(tmp_path, **sizes)) as machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        for number in range(UPDATES):
            assert await machine.update(cpu=number % 3) == 0
            before = counters(machine, vcpus)
            while any(now == then for now, then in zip(counters(machine, vcpus), before, strict=True)):
                await machine.read_version(number % 3)
        await machine.finish()
        states = [state_of(machine, vcpu) for vcpu in vcpus]
    judgement = machine.check()
    assert (judgement.verdict, judgement.why) == ("safe", ())
    assert judgement.statistics.updates.succeeded == UPDATES
    flags = records(machine.run_dir, "module_init_flag", initialized=1)
    assert [flag["version"] for flag in flags] == [f"1.5.{8 + number:02}" for number in range(1, UPDATES + 1)]
    for counter, chain in states:
        assert counter > UPDATES
        assert chain == guest_after(counter)
    entries = records(machine.run_dir, "td_enter")
    assert {entry["status"] >> 32 for entry in entries} == {0}
    for task in (3, 4):
        mine = sorted((entry["ts"], entry["counter"]) for entry in entries if entry["vcpu"] == task)
        assert [counter for _, counter in mine] == sorted(counter for _, counter in mine)
    assert records(machine.run_dir, "wrong_data") == records(machine.run_dir, "vcpu_dead") == []


@pytest.mark.slow
async def test_tds_are_built_while_updates_come(tmp_path: Path) -> None:
    """In a run with many updates some TDs are begun before an update and finished after it; each is measured as it was
    built, runs, and gives back what it took."""
    machine, judgement = await run(tmp_path, "module_profile=B", cpus=3, tds=1, updates=8, seconds=1.6)
    assert (judgement.verdict, judgement.statistics.updates.succeeded) == ("safe", 8)
    assert [machine.facts[fact] for fact in ("tds_built", "tds_failed", "tds_ended")] == [BUILDS, 0, BUILDS]
    ends = [r["ts"] for r in records(machine.run_dir, "update_end", ret=0)]
    steps = sorted((r["ts"], r["kind"]) for r in records(machine.run_dir, "admin_end") if r["kind"].startswith("td_"))
    begun, finished = ([ts for ts, kind in steps if kind == name] for name in ("td_init_vm", "td_finalize_vm"))
    assert any(first < end < last for first, last in zip(begun, finished, strict=True) for end in ends)
    assert {r["errno"] for r in records(machine.run_dir, "admin_end", kind="td_run")} == {0}


def made(tmp_path: Path) -> str:
    """A module with another crypto library, and beside it who signed it."""
    identity = msgspec.structs.replace(make_identity("1.5.09", "B"), crypto_version=2)
    image = make_module(identity, key=new_key())
    path = tmp_path / "module.bin"
    path.write_bytes(build_v2(image))
    Path(f"{path}.signer").write_text(signer_hash(SigStruct.decode(image.sigstruct)))
    return str(path)


@pytest.mark.slow
async def test_a_build_that_an_update_cuts_is_detected_and_built_again(tmp_path: Path) -> None:
    """The module says so at MR.FINALIZE, KVM gives the TD up, user space builds another, which runs."""
    machine, judgement = await run(
        tmp_path, "module_profile=B", "detect_compat_sensitive=if_supported", module=made(tmp_path), tds=1
    )
    (error,) = records(machine.run_dir, "td_error")
    assert (error["leaf"], error["status"]) == ("TDH.MR.FINALIZE", INCOMPATIBLE_MRTD_CONTEXT)
    assert [r["errno"] for r in records(machine.run_dir, "admin_end", kind="td_finalize_vm")] == [-5, 0]
    assert [machine.facts[fact] for fact in ("tds_failed", "tds_built", "tds_ended")] == [1, 1, 2]
    assert judgement.violations == () and judgement.statistics.updates.succeeded == 1


@pytest.mark.slow
async def test_a_build_that_an_update_cuts_is_silently_wrong_as_merged(tmp_path: Path) -> None:
    """Neither avoided nor detected: every call succeeds, only the owner of the TD can tell; I61 says so."""
    machine, judgement = await run(tmp_path, "module_profile=B", module=made(tmp_path), tds=1)
    assert {violation.invariant for violation in judgement.violations} == {"I61"}
    assert records(machine.run_dir, "td_error") == records(machine.run_dir, "log") == []
    assert [r["errno"] for r in records(machine.run_dir, "admin_end", kind="td_run")] == [0, 0, 0]


@pytest.mark.slow
async def test_an_update_avoids_a_td_in_build(tmp_path: Path) -> None:
    """An update that meets a TD in build is refused, -EBUSY, and nothing is lost; when the TD is done it succeeds."""
    machine, judgement = await run(
        tmp_path, "module_profile=B", "avoid_compat_sensitive=always", tds=1, updates=2, seconds=0.8
    )
    errnos = [r["errno"] for r in sorted(records(machine.run_dir, "admin_end", kind="install"), key=itemgetter("ts"))]
    assert errnos in ([-16, 0, 0], [-16, 0, -16, 0])
    statuses = {r["status"] for r in records(machine.run_dir, "seamcall_return", name="TDH.SYS.SHUTDOWN")}
    assert statuses == {0x8000_0512_0001_0000, 0}
    assert judgement.violations == ()
    assert [machine.facts[fact] for fact in ("tds_failed", "tds_built", "tds_ended")] == [0, 2, 2]
    assert {r["mrtd"] == r["expected"] for r in records(machine.run_dir, "td_measured")} == {True}


@pytest.mark.slow
async def test_the_update_that_has_no_room_left_costs_the_tds_and_nothing_else(tmp_path: Path) -> None:
    """A SEAMDB of three: two updates succeed, the third is refused by INSTALL after the shutdown. The TDs are dead with
    the documented code, the kernel has no module, plain guests go on with their data, and the machine ends in order."""
    settings = small(tmp_path, tds=2, updates=4, seconds=1.2, knobs=parse_knobs(["seamdb_size=3"]))
    async with Machine(settings) as machine:
        assert await machine.run_workload()
        assert machine.memory.load(TDX_STATE.initialized)[0] == 0
        dead = [machine.memory.load(td_vcpu_of(task).dead)[0] for task in (2, 3)]
        alive = [machine.memory.load(vcpu_of(task).dead)[0] for task in (0, 1)]
        states = [state_of(machine, td_vcpu_of(task)) for task in (2, 3)]
    judgement = machine.check()
    assert (dead, alive) == ([1, 1], [0, 0])
    assert [r["errno"] for r in records(machine.run_dir, "admin_end", kind="install")] == [0, 0, -5, -5]
    refused = [r for r in records(machine.run_dir, "seamcall_return", name="SEAMLDR.INSTALL") if r["status"]]
    assert {record["status"] for record in refused} == {ENOREMAININGUPDATE}
    (lost,) = [r["ts"] for r in records(machine.run_dir, "module_init_flag", initialized=0, version="1.5.10")]
    entries = [r for r in records(machine.run_dir, "td_enter") if r["ts"] > lost and r["vcpu"] in (2, 3)]
    assert {record["vcpu"] for record in entries} == {2, 3}
    assert {record["status"] for record in entries} == {TDX_SYS_SHUTDOWN}
    assert [chain for _, chain in states] == [guest_after(counter) for counter, _ in states]
    assert max(r["ts"] for r in records(machine.run_dir, "vmentry", result="ok")) > lost
    assert records(machine.run_dir, "wrong_data") == []
    assert judgement.violations == ()
