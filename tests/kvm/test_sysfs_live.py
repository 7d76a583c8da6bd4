"""Clients that know nothing but the ABI update the module of a live machine, while its guests and TDs run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest
from live import records, small
from sysfs_machine import PATIENCE_S, Live, live

import launcher
from kvm.machine import Machine
from kvm.summary import BAD_INPUT, SAFE
from kvm.sysfs import sysfs_directory
from seamldr.identity import HV0_FEATURES0, ModuleIdentity, Profile, make_identity
from seamldr.image import build_v1, build_v2, parse

READS = 50


def test_two_clients_update_the_module_under_running_guests(tmp_path: Path) -> None:
    """A shell client and a Python client, by the merged and the older names, each bring a version; all guests live."""
    with live(tmp_path, "--cpus", "4", "--vcpus", "6", "--tds", "2") as machine:
        slots = int(machine.device("num_remaining_updates"))
        assert machine.device("version") == "1.5.08" and machine.device("seamldr_version") == "1.5.02"
        status, told = machine.shell("tdx_module", machine.image(1))
        assert status == 0 and told["error"] == [""] and told["version"] == ["1.5.09"]
        assert told["status"][-1] == "idle"
        status, found = machine.python("seamldr_upload", machine.image(2, version=1))
        assert (status, found["before"], found["after"], found["error"]) == (0, "1.5.09", "1.5.10", "")
        assert (found["seamldr"], found["remaining_size"]) == ("1.5.02", "0")
        assert [int(slot) for slot in found["slots"]] == [slots - 1, slots - 2]
        _bad_images_do_no_harm(machine, slots - 2)
        assert {machine.device("seamldr/version") for _ in range(READS)} == {"1.5.02"}
        status, summary = machine.interrupt()
    assert (status, summary["verdict"], summary["violations"]) == (SAFE, "safe", [])
    assert summary["updates"] == {"requested": 5, "succeeded": 2, "failed": 0, "refused": 3}
    assert summary["guests"]["wrong_data"] == 0 and not machine.root.exists()
    assert summary["seamcalls"]["SEAMLDR.INFO"] >= READS
    assert _tds_that_ran_on(machine) == {0, 1}


def _tds_that_ran_on(machine: Live) -> set[int]:
    """TDs that were entered after the last update that succeeded, and counted on from where they were."""
    files = (machine.run_dir / "records").glob("cpu*.jsonl")
    lines = [line for path in files for line in path.read_text().splitlines()]
    records = sorted((json.loads(line) for line in lines), key=lambda record: record["ts"])
    last = max(record["ts"] for record in records if record["event"] == "update_end" and record["ret"] == 0)
    entries = [record for record in records if record["event"] == "td_enter"]
    assert all(entry["status"] >> 32 == 0 for entry in entries)
    for td in {entry["td"] for entry in entries}:
        counters = [entry["counter"] for entry in entries if entry["td"] == td]
        assert counters == sorted(counters)
    return {entry["td"] for entry in entries if entry["ts"] > last}


def _bad_images_do_no_harm(machine: Live, slots: int) -> None:
    """A file that the kernel does not accept fills `error`; that `version` still reads says that nothing was lost."""
    garbage = machine.run_dir / "garbage.bin"
    garbage.write_bytes(b"no module" * 1000)
    for node, image in (
        ("tdx_module", garbage),
        ("tdx_module", machine.image(3, version=1)),
        ("seamldr_upload", machine.image(3)),
    ):
        status, told = machine.shell(node, image)
        assert (status, told["error"], told["version"]) == (1, ["transferring:firmware-invalid"], ["1.5.10"])
        assert int((machine.node(node) / "remaining_size").read_text()) == image.stat().st_size
    assert int(machine.device("num_remaining_updates")) == slots


def test_during_an_update_a_second_one_changes_nothing(tmp_path: Path) -> None:
    """With a CPU stopped in its tracks the update lasts: clients give up in time, and what they wrote has no effect."""
    with live(tmp_path, "--cpus", "2", "--vcpus", "2", "--tds", "1") as machine:
        pid = machine.pid("cpu1")
        os.kill(pid, signal.SIGSTOP)
        try:
            status, told = machine.shell("tdx_module", machine.image(1), seconds=1)
            assert status == 2 and "idle" not in told["status"]
            assert machine.shell("tdx_module", machine.image(2), seconds=1)[0] == 2
            assert not (machine.node("tdx_module") / "error").exists()
            assert (machine.node("tdx_module") / "loading").read_text() == "0\n"
        finally:
            os.kill(pid, signal.SIGCONT)
        _wait_until_idle(machine.node("tdx_module"))
        assert (machine.node("tdx_module") / "error").read_text() == ""
        assert machine.device("version") == "1.5.09"
        assert machine.interrupt()[1]["updates"]["succeeded"] == 1


def _wait_until_idle(node: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (node / "status").read_text() != "idle\n":
        assert time.monotonic() < deadline


def test_a_used_up_database_is_harmless_or_fatal_by_driver(tmp_path: Path) -> None:
    """H17: with no update left the older driver refuses; the merged one begins, and loses module and version."""
    with live(tmp_path, "--cpus", "2", "--vcpus", "2", "--knob", "seamdb_size=1") as machine:
        assert machine.device("seamldr/num_remaining_updates") == "0"
        status, found = machine.python("seamldr_upload", machine.image(1, version=1))
        assert (status, found["error"], found["after"]) == (1, "transferring:flash-wearout", "1.5.08")
        status, told = machine.shell("tdx_module", machine.image(1))
        assert (status, told["error"], told["version"]) == (1, ["transferring:firmware-invalid"], ["none"])
        status, told = machine.shell("tdx_module", machine.image(1))
        assert (status, told["error"], told["version"]) == (1, ["transferring:firmware-invalid"], ["none"])
        assert not (machine.root / "devices/faux/tdx_host/version").exists()
        machine.interrupt()


def test_with_the_gate_on_there_is_nothing_to_call(tmp_path: Path) -> None:
    """On a CPU with the erratum a gated kernel shows neither upload nodes nor what would call P-SEAMLDR."""
    with live(tmp_path, "--cpus", "1", "--vcpus", "1", "--strategy", "refuse-on-erratum") as machine:
        files = [path for path in machine.root.rglob("*") if not path.is_dir()]
        assert [str(path.relative_to(machine.root)) for path in files] == ["devices/faux/tdx_host/version"]
        assert machine.device("version") == "1.5.08"
        machine.interrupt()


async def test_a_module_without_td_preserving_cannot_be_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I48: if the running module's TDX_FEATURES0 lacks bit 1, there is nothing but its version."""

    def without(version: str, profile: Profile) -> ModuleIdentity:
        identity = make_identity(version, profile)
        return msgspec.structs.replace(identity, tdx_features0=identity.tdx_features0 & ~0b10)

    monkeypatch.setattr("kvm.images.make_identity", without)
    root = tmp_path / "sys"
    with sysfs_directory(root):
        async with Machine(small(tmp_path, updates=0, sysfs=str(root))) as machine:
            assert await machine.run_workload()
    (tree,) = records(machine.run_dir, "sysfs_tree")
    assert (tree["features0"], tree["files"]) == (HV0_FEATURES0 & ~0b10, ["devices/faux/tdx_host/version"])
    assert machine.check().violations == ()


@pytest.mark.parametrize("bad", ["full", "file", "no/parent"])
def test_a_bad_directory_is_one_line(tmp_path: Path, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that is not empty, a file, or a missing parent: one line, status 2, and nothing touched."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    status = launcher.main(["run", "--sysfs", str(tmp_path / bad)])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (BAD_INPUT, "", 1) and str(tmp_path / bad) in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"] and (tmp_path / "full/mine").exists()


def test_a_machine_with_a_given_length_ends_by_itself(tmp_path: Path) -> None:
    """With --seconds nobody has to interrupt it; its images, in either container, outlive it, its files do not."""
    with live(tmp_path, "--cpus", "1", "--vcpus", "1", "--seconds", "0.3") as machine:
        out, _ = machine.process.communicate(timeout=PATIENCE_S)
    assert json.loads(out)["updates"]["requested"] == 0
    assert not machine.root.exists()
    new, old = machine.image(3).read_bytes(), machine.image(3, version=1).read_bytes()
    assert new == build_v2(parse(old)) and old == build_v1(parse(new))
