"""The first Ctrl-C, or SIGTERM, ends a machine with files in any state of an upload, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from sysfs_machine import PATIENCE_S, Live, Remnants, live

from kvm.summary import SAFE, UNFINISHED

SMALL = ("--cpus", "2", "--vcpus", "3")


def start_upload(machine: Live) -> Path:
    """Write an image and start its upload; the node."""
    node = machine.node("tdx_module")
    (node / "loading").write_text("1")
    (node / "data").write_bytes(machine.image(1).read_bytes())
    (node / "loading").write_text("0")
    return node


def wait_for_shutdown(machine: Live) -> None:
    """Until the CPUs are in the update."""
    deadline = time.monotonic() + PATIENCE_S
    while not machine.records("cpu0", "state_enter"):
        assert time.monotonic() < deadline


def test_a_stuck_update_does_not_need_a_second_ctrl_c(tmp_path: Path) -> None:
    """With a CPU stopped in its tracks the update cannot end: the machine does, as unfinished, and readers go on."""
    with live(tmp_path, *SMALL) as machine:
        remnants = Remnants(machine)
        os.kill(machine.pid("cpu1"), signal.SIGSTOP)
        node = start_upload(machine)
        deadline = time.monotonic() + PATIENCE_S
        while (status := (node / "status").read_text()) != "transferring\n":  # until then `version` can be read
            assert status == "preparing\n" and time.monotonic() < deadline
        version = machine.root / "devices/faux/tdx_host/version"
        reader = subprocess.Popen(["cat", str(version)], stdout=subprocess.PIPE)  # waits for the end of the update
        exit_status, summary = machine.interrupt()
        assert reader.communicate(timeout=PATIENCE_S) == (b"", None)
        assert remnants.are_gone()
    assert (exit_status, summary["verdict"], summary["violations"]) == (UNFINISHED, "incomplete", [])
    (end,) = machine.records("launcher", "machine_end")
    assert end["finished"] == 0 and "within" in end["why"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_upload_half_way_is_dropped(tmp_path: Path, number: int) -> None:
    """A client has written half of its image and has `data` open: the machine ends in order, none the wiser."""
    with live(tmp_path, *SMALL) as machine:
        remnants = Remnants(machine)
        machine.device("seamldr_version")
        node, image = machine.node("tdx_module"), machine.image(1).read_bytes()
        (node / "loading").write_text("1")
        with open(node / "data", "wb", buffering=0) as data:
            data.write(image[: len(image) // 2])
            status, summary = machine.interrupt(number)
            data.write(image[len(image) // 2 :])
        assert remnants.are_gone()
    assert (status, summary["updates"]["requested"]) in ((SAFE, 0), (UNFINISHED, 0)) and not summary["violations"]
    assert [end["finished"] for end in machine.records("launcher", "machine_end")] == [1]


def test_an_update_in_progress_comes_to_its_end(tmp_path: Path) -> None:
    """An update that has begun when Ctrl-C comes is finished: no TD and no module is lost to it."""
    with live(tmp_path, *SMALL, "--tds", "1") as machine:
        remnants = Remnants(machine)
        start_upload(machine)
        wait_for_shutdown(machine)
        _, summary = machine.interrupt()
        assert remnants.are_gone()
    assert (summary["violations"], summary["updates"]["succeeded"]) == ([], 1)
    assert [end["finished"] for end in machine.records("launcher", "machine_end")] == [1]
