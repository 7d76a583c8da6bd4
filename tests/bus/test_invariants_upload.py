"""Invariants about the user's interface of the update, each with a history that keeps it and one that breaks it."""

from __future__ import annotations

import pytest
from history import Run

ENXIO, EBUSY, ENODEV = -6, -16, -19
STAGES = ("receiving", "preparing", "transferring", "programming", "idle")
STATUS, ERROR = "firmware/tdx_module/status", "firmware/tdx_module/error"
DATA = "devices/faux/tdx_host/firmware/tdx_module/data"
VERSION = "devices/faux/tdx_host/version"


def running() -> Run:
    """An upload whose install is under way."""
    return Run().upload("receiving").upload("preparing").upload("transferring")


def test_two_uploads_keep_everything() -> None:
    """A good upload and a failed one, read all the time, violate nothing."""
    run = Run().read(STATUS, "idle").read(ERROR, "")
    for error in ("", "transferring:firmware-invalid"):
        for stage in STAGES[:-1]:
            run.upload(stage).read(STATUS, stage).read(ERROR, "", errno=EBUSY)
        run.upload("idle", error).read(STATUS, "idle").read(ERROR, error)
    run.upload("receiving", name="seamldr_upload")
    assert run.violated() == set()


def test_a_stage_that_goes_back_breaks_i45() -> None:
    """I45 is broken by a stage that goes back, and by one that the ABI does not have."""
    assert running().upload("preparing").violated() == {"I45"}
    assert Run().upload("flashing").violated() == {"I45"}
    assert Run().upload("transferring").upload("idle").violated() == set()


def test_a_status_that_lies_breaks_i45() -> None:
    """I45 is broken by a read of `status` that is not the stage; that of another node does not matter."""
    assert running().read(STATUS, "idle").violated() == {"I45"}
    assert running().read("firmware/seamldr_upload/status", "idle").violated() == set()


@pytest.mark.parametrize(
    ("stage", "error"),
    [("transferring", ""), ("idle", "EBUSY"), ("idle", "transferring:oops"), ("idle", "idle:timeout"), ("idle", "x")],
)
def test_an_error_that_cannot_be_breaks_i46(stage: str, error: str) -> None:
    """I46 is broken by an error during an upload, -EBUSY without one, or words that the ABI does not have."""
    assert Run().upload(stage, error).violated() == {"I46"}


def test_an_error_that_lies_breaks_i46() -> None:
    """I46 is broken by a read of `error` that succeeds during an upload, or says something else after it."""
    assert running().read(ERROR, "").violated() == {"I46"}
    done = running().upload("idle", "transferring:hw-error")
    assert done.read(ERROR, "transferring:timeout").violated() == {"I46"}
    assert Run().read(ERROR, "", errno=EBUSY).violated() == {"I46"}


def test_a_second_upload_breaks_i47() -> None:
    """I47 is broken by an upload that begins during another of its node, which also goes back in its stages."""
    assert running().upload("receiving").violated() == {"I45", "I47"}


def test_data_written_during_an_upload_breaks_i47() -> None:
    """I47 is broken by data that takes writes while an upload has it; a write that fails is as it should be."""
    assert Run().upload("receiving", data=1).violated() == {"I47"}
    assert running().write("sysfs_write", path=DATA, value="", errno=ENODEV).violated() == set()
    assert running().write("sysfs_write", path=DATA, value="", errno=0).violated() == {"I47"}


def test_updates_that_overlap_break_i47() -> None:
    """I47 is broken by an update that begins before the last has ended."""
    run = Run().cpu(0, "kworker").update_begin(1).cpu(1, "kworker").update_begin(2)
    assert run.violated() == {"I47"}


@pytest.mark.parametrize("sysinfo", [0, 1])
@pytest.mark.parametrize("features0", [0b101, 0b010])
@pytest.mark.parametrize("erratum", [0, 1])
@pytest.mark.parametrize("visible", [True, False])
def test_what_is_visible_breaks_or_keeps_i48(sysinfo: int, features0: int, erratum: int, visible: bool) -> None:
    """I48 is broken unless the nodes are visible exactly where updates are supported."""
    files = [VERSION, DATA] if visible else [VERSION]
    run = Run().node("kvm").write("sysfs_tree", sysinfo=sysinfo, features0=features0, erratum=erratum, files=files)
    supported = (sysinfo, features0, erratum) == (1, 0b010, 0)
    assert run.violated() == (set() if visible is supported else {"I48"})


def module(run: Run, version: str) -> Run:
    """The kernel's flag: this version runs, or none if it is empty."""
    return run.cpu(0, "stopper").write("module_init_flag", initialized=int(bool(version)), version=version or "1.5.08")


def test_a_version_that_lies_breaks_i39() -> None:
    """I39 is broken by an old version with a new module, by one without a module, and by none with one."""
    run = module(module(Run().read("version", "1.5.08").read("version", "1.5.08"), ""), "1.5.09")
    assert run.read("version", "1.5.09").read("seamldr/version", "1.5.02").violated() == set()
    assert run.read("version", "1.5.08").violated() == {"I39"}
    assert module(Run(), "").read("version", "", errno=ENXIO).violated() == set()
    assert module(Run(), "").read("version", "1.5.08").violated() == {"I39"}
    assert module(Run(), "1.5.09").read("version", "", errno=ENXIO).violated() == {"I39"}


def installed(run: Run, number: int, errno: int = 0, refused: bool = False) -> Run:
    """An install from its request to its end."""
    run.request(number, "install").cpu(0, "kworker").write("admin_begin", request=number, kind="install")
    if refused:
        run.write("update_refused", errno=errno, why="no")
    return run.write("admin_end", request=number, kind="install", errno=errno, text="")


def counted(run: Run, number: int, remaining: int) -> Run:
    """SEAMLDR.INFO from its request to its answer."""
    return run.request(number, "read_version").info(number, remaining)


def test_each_update_counts_once_or_breaks_i42() -> None:
    """I42 is broken unless each success takes one from what remains, and each refusal nothing."""
    run = counted(installed(installed(counted(Run(), 1, 9), 2), 3, errno=-22, refused=True), 4, 8)
    assert run.violated() == set()
    assert counted(run, 5, 7).violated() == {"I42"}
    assert counted(installed(counted(Run(), 1, 9), 2), 3, 9).violated() == {"I42"}


def test_where_it_cannot_be_told_i42_is_not_judged() -> None:
    """I42 passes over an answer that an update overlaps, and begins anew after a failed update."""
    run = installed(counted(Run(), 1, 9).request(2, "read_version"), 3).info(2, 9)
    assert counted(run, 4, 8).violated() == set()
    assert counted(installed(counted(Run(), 1, 9), 2, errno=-5), 3, 9).violated() == set()
    assert counted(Run(), 1, 9).request(2, "read_version").info(2, 0, errno=-5).violated() == set()
