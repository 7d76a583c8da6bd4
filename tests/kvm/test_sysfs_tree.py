"""The tree of the update's interface over a kernel that answers as a test tells it to."""

from __future__ import annotations

import functools
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EBUSY, EINVAL, EIO, ENODEV, ENOSPC, ENXIO
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing
from sysfs_host import SUPPORTED, V1, V2, FakeHost

from bus.judge import judge_records
from kvm.sysfs import CLASS, DEVICE, SysfsError, check_sysfs_dir, serve_sysfs, sysfs_directory
from seamldr.upload import Support, Upload

T = TypeVar("T")
NODES = ("tdx_module", "seamldr_upload")


class Client:
    """What a client does with the files, in a thread of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.device = root / DEVICE

    async def read(self, path: str | Path) -> str:
        """Open and read."""
        return await trio.to_thread.run_sync((self.root / path).read_text, abandon_on_cancel=True)

    async def write(self, path: str, content: str | bytes) -> None:
        """Open, write, close."""
        data = content.encode() if isinstance(content, str) else content
        await trio.to_thread.run_sync(functools.partial(_write, self.root / path, data), abandon_on_cancel=True)

    async def start(self, node: str, image: bytes) -> None:
        """Up to the write that starts the upload."""
        await self.write(f"{CLASS}/{node}/loading", "1")
        await self.write(f"{CLASS}/{node}/data", image)
        await self.write(f"{CLASS}/{node}/loading", "0")

    async def upload(self, node: str, image: bytes) -> str:
        """A whole upload; what `error` says."""
        await self.start(node, image)
        while await self.read(f"{CLASS}/{node}/status") != "idle\n":
            await trio.lowlevel.checkpoint()
        return await self.read(f"{CLASS}/{node}/error")


def _files(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]


def _real(path: Path) -> str:
    return str(path.resolve())


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


@asynccontextmanager
async def tree(
    root: Path, host: FakeHost, support: Support = SUPPORTED, *, broken: tuple[str, ...] = ()
) -> AsyncIterator[Client]:
    """The tree, and a client of it. Its records violate the invariants named `broken` and no others."""
    with trio.fail_after(20):
        async with serve_sysfs(root, host, support):
            yield Client(root)
    assert tuple(violation.invariant for violation in judge_records(host.records).violations) == broken


IMAGE = {"tdx_module": V2, "seamldr_upload": V1}


@pytest.mark.parametrize("node", NODES)
async def test_an_upload_installs_the_image_that_the_kernel_reads(tmp_path: Path, node: str) -> None:
    """Both nodes install the same version 2 container, the older one from a version 1 file."""
    host = FakeHost()
    async with tree(tmp_path, host) as client:
        assert await client.read(f"{DEVICE}/version") == "1.5.08\n"
        assert await client.upload(node, IMAGE[node]) == ""
        assert await client.read(f"{DEVICE}/version") == "1.5.09\n"
        assert await client.read(f"{CLASS}/{node}/remaining_size") == "0\n"
    assert host.installed == [V2] and host.lines == []


@pytest.mark.parametrize("node", NODES)
async def test_each_node_takes_its_own_container_only(tmp_path: Path, node: str) -> None:
    """The older node refuses a version 2 file by itself; the merged one hands a version 1 file on to be refused."""
    host = FakeHost()
    host.result = -EINVAL
    async with tree(tmp_path, host) as client:
        wrong = V2 if node == "seamldr_upload" else V1
        assert await client.upload(node, wrong) == "transferring:firmware-invalid\n"
        assert await client.read(f"{CLASS}/{node}/remaining_size") == f"{len(wrong)}\n"
        assert await client.read(f"{DEVICE}/version") == "1.5.08\n"
    assert host.installed == ([] if node == "seamldr_upload" else [V1])
    assert host.refused == ([-EINVAL] if node == "seamldr_upload" else [])


def _offline(host: FakeHost) -> None:
    host.online = False


def _silent(host: FakeHost) -> None:
    host.info = (-EIO, 0)


def _used_up(host: FakeHost) -> None:
    host.info = (0, 0)


@pytest.mark.parametrize(
    ("spoil", "errno", "error"),
    [(_offline, EBUSY, "device-busy"), (_silent, EIO, "hw-error"), (_used_up, ENOSPC, "flash-wearout")],
    ids=["cpu-offline", "info-fails", "H17-none-remains"],
)
async def test_the_older_driver_looks_before_it_begins(
    tmp_path: Path, spoil: Callable[[FakeHost], None], errno: int, error: str
) -> None:
    """It refuses what cannot succeed with an error of its own, harmlessly; the merged driver goes ahead."""
    host = FakeHost()
    spoil(host)
    async with tree(tmp_path, host) as client:
        assert await client.upload("seamldr_upload", V1) == f"transferring:{error}\n"
        assert host.refused == [-errno] and host.installed == []
        assert await client.upload("tdx_module", V2) == ""
        assert host.refused == [-errno] and host.installed == [V2]


@pytest.mark.parametrize("node", NODES)
async def test_while_an_upload_runs(tmp_path: Path, node: str) -> None:
    """Its files say so, `error` cannot be read, `data` and a second start do nothing; afterwards all is as before."""
    host = FakeHost()
    host.gate = trio.Event()
    async with tree(tmp_path, host) as client:
        base = f"{CLASS}/{node}"
        await client.start(node, IMAGE[node])
        assert await client.read(f"{base}/status") in ("preparing\n", "transferring\n")
        assert await client.read(f"{base}/loading") == "0\n"
        assert await client.read(f"{base}/remaining_size") == f"{len(IMAGE[node])}\n"
        with pytest.raises(FileNotFoundError):
            await client.read(f"{base}/error")
        await client.start(node, b"another image")
        assert await client.read(f"{base}/status") == "transferring\n"
        host.gate.set()
        while await client.read(f"{base}/status") != "idle\n":
            await trio.lowlevel.checkpoint()
        assert await client.read(f"{base}/error") == "" and await client.read(f"{base}/data") == ""
    assert host.installed == [V2]


async def test_data_written_while_an_upload_runs_is_lost(tmp_path: Path) -> None:
    """The install goes on with what it had, the kernel log says -ENODEV, and nothing of it is there afterwards."""
    host = FakeHost()
    host.gate = trio.Event()
    async with tree(tmp_path, host) as client:
        await client.start("tdx_module", V2)
        await client.write(f"{CLASS}/tdx_module/data", b"late")
        assert await client.read(f"{CLASS}/tdx_module/data") == ""
        host.gate.set()
        while await client.read(f"{CLASS}/tdx_module/status") != "idle\n":
            await trio.lowlevel.checkpoint()
        await client.write(f"{CLASS}/tdx_module/loading", "0")
    assert host.installed == [V2]
    assert host.lines[0] == "firmware tdx_module: a write to data returns -ENODEV"
    assert [(record["path"], record["errno"]) for record in host.records if record.get("errno")] == [
        (f"{DEVICE}/firmware/tdx_module/data", -ENODEV)
    ]


BREAKS = [
    ("I45", "show_status", lambda self: "idle\n"),
    ("I46", "show_error", lambda self: ""),
    ("I47", "data_is_accessible", True),
]


@pytest.mark.parametrize(("invariant", "what", "broken"), BREAKS, ids=[row[0] for row in BREAKS])
async def test_a_kernel_that_lies_breaks_the_invariant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invariant: str, what: str, broken: object
) -> None:
    """`status` idle, `error` readable, or `data` writable in the middle of an upload is seen in the records."""
    monkeypatch.setattr(Upload, what, broken)
    host = FakeHost()
    host.gate = trio.Event()
    async with tree(tmp_path, host, broken=(invariant,)) as client:
        await client.start("tdx_module", V2)
        await client.read(f"{CLASS}/tdx_module/status")
        host.gate.set()


async def test_a_driver_that_does_not_look_breaks_i48(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that are visible although the module cannot be updated are seen in the records."""
    monkeypatch.setattr(Support, "update_supported", True)
    async with tree(tmp_path, FakeHost(), Support(True, 0, False), broken=("I48",)):
        pass


async def test_a_version_that_is_kept_breaks_i39(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old version after an update is seen in the records."""
    monkeypatch.setattr(FakeHost, "version", lambda self: "1.5.08")
    async with tree(tmp_path, FakeHost(), broken=("I39",)) as client:
        assert await client.upload("tdx_module", V2) == ""
        assert await client.read(f"{DEVICE}/version") == "1.5.08\n"


async def test_a_failed_call_is_recorded_with_the_errno_of_its_driver(tmp_path: Path) -> None:
    """The merged attributes hand the errno of the call on, the older ones turn each into -ENXIO."""
    host = FakeHost()
    host.info = (-EIO, 0)
    async with tree(tmp_path, host) as client:
        for name in ("seamldr_version", "num_remaining_updates", "seamldr/version", "seamldr/num_remaining_updates"):
            assert await client.read(f"{DEVICE}/{name}") == ""
    reads = [record for record in host.records if record["event"] == "sysfs_read"]
    assert [record["errno"] for record in reads] == [-EIO, -EIO, -ENXIO, -ENXIO]


async def test_the_version_waits_for_the_end_of_an_install(tmp_path: Path) -> None:
    """Who opens `version` in the middle of an update reads the new one, never the old one with the new module."""
    host = FakeHost()
    host.gate = trio.Event()
    async with tree(tmp_path, host) as client:
        await client.start("tdx_module", V2)
        await client.read(f"{CLASS}/tdx_module/status")
        found: list[str] = []

        async def read() -> None:
            found.append(await client.read(f"{DEVICE}/version"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert found == []
            host.gate.set()
        assert found == ["1.5.09\n"]


async def test_version_tells_fatal_from_harmless(tmp_path: Path) -> None:
    """After a failure that left TDX uninitialized, `error` is the same but `version` cannot be read any more."""
    host = FakeHost()
    host.result = -EIO
    async with tree(tmp_path, host) as client:
        assert await client.upload("tdx_module", V2) == "transferring:firmware-invalid\n"
        assert await client.read(f"{DEVICE}/version") == "1.5.08\n"
        host.runs(None)
        assert await client.upload("tdx_module", V2) == "transferring:firmware-invalid\n"
        with pytest.raises(FileNotFoundError):
            await client.read(f"{DEVICE}/version")


async def test_each_read_of_a_loader_attribute_is_a_call(tmp_path: Path) -> None:
    """Under both names, one read is one P-SEAMLDR call, and one that fails leaves nothing to read."""
    host = FakeHost()
    async with tree(tmp_path, host) as client:
        for path in ("seamldr_version", "seamldr/version"):
            assert await client.read(f"{DEVICE}/{path}") == "1.5.02\n"
        for path in ("num_remaining_updates", "seamldr/num_remaining_updates"):
            assert await client.read(f"{DEVICE}/{path}") == "7\n"
        assert host.calls == 4
        host.info = (-EIO, 0)
        assert await client.read(f"{DEVICE}/seamldr_version") == ""
    assert host.calls == 5


async def test_writes_that_would_fail_are_in_the_kernel_log(tmp_path: Path) -> None:
    """They are taken and do nothing."""
    host = FakeHost()
    async with tree(tmp_path, host) as client:
        base = f"{CLASS}/tdx_module"
        for file, text in (("cancel", "maybe"), ("cancel", "1"), ("loading", "0"), ("loading", "5")):
            await client.write(f"{base}/{file}", text)
        assert await client.read(f"{base}/status") == "idle\n"
    start = "firmware tdx_module: "
    assert host.lines == [
        f"{start}a write to cancel returns -EINVAL",
        f"{start}a write to cancel returns -ENODEV",
        f"{start}firmware_loading_store: unexpected value (0)",
        f"{start}firmware_loading_store: unexpected value (5)",
    ]


async def test_modes_and_names(tmp_path: Path) -> None:
    """Modes are those of the kernel, of both versions; the class's directories are links into the device."""
    async with tree(tmp_path, FakeHost()) as client:
        modes = {path: stat.S_IMODE((client.device / path).stat().st_mode) for path in _files(client.device)}
        links = [_real(tmp_path / CLASS / node) for node in NODES]
        assert links == [str(client.device / "firmware" / node) for node in NODES]
    upload = dict.fromkeys(("status", "error", "remaining_size"), 0o444)
    upload |= {"loading": 0o644, "data": 0o644, "cancel": 0o200}
    assert modes == {
        "version": 0o444,
        "seamldr_version": 0o400,
        "num_remaining_updates": 0o400,
        "seamldr/version": 0o444,
        "seamldr/num_remaining_updates": 0o444,
        **{f"firmware/{node}/{name}": mode for node in NODES for name, mode in upload.items()},
    }


@pytest.mark.parametrize(
    "support",
    [Support(False, 0b10, False), Support(True, 0b101, False), Support(True, 0b10, True)],
    ids=["no-tdx", "no-td-preserving", "erratum"],
)
async def test_without_support_only_the_version_is_there(tmp_path: Path, support: Support) -> None:
    """I48: without TDX or TD preserving, or on a CPU with the erratum, nothing that calls P-SEAMLDR is visible."""
    async with tree(tmp_path, FakeHost(), support) as client:
        assert _files(tmp_path) == [f"{DEVICE}/version"]
        assert await client.read(f"{DEVICE}/version") == "1.5.08\n"


def test_which_directories_are_accepted(tmp_path: Path) -> None:
    """A new one with a parent, or an empty one; nothing of the user's is ever removed."""
    check_sysfs_dir(tmp_path / "new")
    check_sysfs_dir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for bad in (tmp_path, tmp_path / "file", tmp_path / "no" / "such", tmp_path / "file" / "below"):
        with pytest.raises(SysfsError) as caught:
            check_sysfs_dir(bad)
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    with sysfs_directory(tmp_path):
        (tmp_path / "devices").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with sysfs_directory(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


def test_clients_in_a_hurry_do_not_lose_an_upload(tmp_path: Path) -> None:
    """Two clients that fight for one node in tight loops leave it usable, and every upload ends with a word."""
    host = FakeHost()
    errors: list[str] = []

    def fight() -> None:
        node = tmp_path / CLASS / "tdx_module"
        for _ in range(10):
            _write(node / "loading", b"1")
            _write(node / "data", V2)
            _write(node / "loading", b"0")

    async def main() -> None:
        async with tree(tmp_path, host) as client:
            threads = [threading.Thread(target=fight) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                await trio.to_thread.run_sync(thread.join)
            while await client.read(f"{CLASS}/tdx_module/status") != "idle\n":
                await trio.lowlevel.checkpoint()
            errors.append(await client.upload("tdx_module", V2))

    trio.run(main)
    assert errors == [""] and host.installed[-1] == V2
