"""The tree as a mount: reads and writes fail with the errno that sysfs has, and no mount outlives its machine."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from errno import EACCES, EBUSY, ECONNABORTED, EINVAL, EIO, ENODEV, ENOTCONN, ENXIO, EPERM
from pathlib import Path

import pytest
import trio
import trio.testing
from live import parent_of, runs, small
from sysfs_host import SUPPORTED, V1, V2, FakeHost
from sysfs_machine import PATIENCE_S, Live, last_argument, live

import kvm.fuse
import launcher
from bus.judge import judge_records
from kvm.fuse import PAGE, detach, mount, mounts_on, try_mount
from kvm.machine import Machine
from kvm.summary import BAD_INPUT, SAFE
from kvm.sysfs import CLASS, DEVICE, SysfsError, check_sysfs_dir, serve_sysfs, sysfs_directory
from seamldr.upload import Support

NODE = f"{CLASS}/tdx_module"
IMAGE = {"tdx_module": V2, "seamldr_upload": V1}
SMALL = ("--fuse", "--cpus", "2", "--vcpus", "2")


def _can_mount() -> bool:
    try:
        try_mount()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _can_mount(), reason="FUSE cannot be mounted here")


@pytest.fixture(autouse=True)
def _a_test_that_fails_leaves_no_mount(tmp_path: Path) -> Iterator[None]:
    yield
    for place in (tmp_path, tmp_path / "sys"):
        detach(place)


class Client:
    """System calls on files of the tree, each in a thread of its own: their result, or the errno, negative."""

    def __init__(self, root: Path) -> None:
        self.root = root

    async def do(self, call: Callable[[], int | str]) -> int | str:
        """What `call` returns, or its errno."""

        def tried() -> int | str:
            try:
                return call()
            except OSError as error:
                return -(error.errno or 0)

        return await trio.to_thread.run_sync(tried, abandon_on_cancel=True)

    async def open(self, path: str, flags: int) -> int:
        """open(2)."""
        return int(await self.do(functools.partial(os.open, self.root / path, flags)))

    async def close(self, fd: int) -> None:
        """close(2)."""
        await self.do(lambda: os.close(fd) or 0)

    async def read(self, path: str) -> int | str:
        """Open, one read, close."""

        def read() -> str:
            with open(self.root / path, "rb", buffering=0) as file:
                return file.read(PAGE).decode()

        return await self.do(read)

    async def write(self, path: str, data: bytes) -> int | str:
        """Open as a shell does, write all, close."""

        def write() -> int:
            with open(self.root / path, "wb", buffering=0) as file:
                at = 0
                while at < len(data):
                    at += file.write(data[at:]) or 0
                return at

        return await self.do(write)

    async def start(self, node: str) -> None:
        """Up to the write that starts an upload."""
        for file, data in (("loading", b"1\n"), ("data", IMAGE[node]), ("loading", b"0\n")):
            assert await self.write(f"{CLASS}/{node}/{file}", data) == len(data)

    async def until_idle(self, node: str) -> None:
        """Wait for the end of an upload."""
        while await self.read(f"{CLASS}/{node}/status") != "idle\n":
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def tree(root: Path, host: FakeHost, support: Support = SUPPORTED) -> AsyncIterator[Client]:
    """The mounted tree. Its records violate no invariant, and nothing is mounted afterwards."""
    with trio.fail_after(PATIENCE_S):
        async with serve_sysfs(root, host, support, fuse=True):
            yield Client(root)
    assert judge_records(host.records).violations == ()
    assert mounts_on(root) == 0 and os.listdir(root) == []


def _errnos(host: FakeHost, event: str) -> list[int]:
    return [record["errno"] for record in host.records if record["event"] == event and record["errno"]]


@pytest.mark.parametrize("node", IMAGE)
async def test_while_an_upload_runs(tmp_path: Path, node: str) -> None:
    """`error` is -EBUSY, `data` is -ENODEV both ways, `cancel` and `loading` are taken; afterwards all can be read."""
    host = FakeHost()
    host.gate = trio.Event()
    async with tree(tmp_path, host) as client:
        base = f"{CLASS}/{node}"
        await client.start(node)
        assert await client.read(f"{base}/error") == -EBUSY
        assert await client.read(f"{base}/data") == -ENODEV
        assert await client.write(f"{base}/data", b"late") == -ENODEV
        assert await client.write(f"{base}/cancel", b"1\n") == 2
        assert await client.write(f"{base}/loading", b"1\n") == 2
        assert await client.read(f"{base}/loading") == "0\n"
        host.gate.set()
        await client.until_idle(node)
        assert await client.read(f"{base}/error") == "" and await client.read(f"{DEVICE}/version") == "1.5.09\n"
    assert host.installed == [V2]
    assert (_errnos(host, "sysfs_read"), _errnos(host, "sysfs_write")) == ([-EBUSY], [-ENODEV])


async def test_writes_in_the_wrong_state(tmp_path: Path) -> None:
    """`cancel` wants a true word (-EINVAL) and an upload (-ENODEV); a `loading` nobody expects is only logged."""
    host = FakeHost()
    async with tree(tmp_path, host) as client:
        assert await client.write(f"{NODE}/cancel", b"maybe\n") == -EINVAL
        assert await client.write(f"{NODE}/cancel", b"1\n") == -ENODEV
        assert await client.write(f"{NODE}/loading", b"0\n") == 2
        assert await client.write(f"{NODE}/loading", b"-1\n") == 3
    assert "unexpected value (0)" in host.lines[2]


async def test_version_is_there_and_cannot_be_read(tmp_path: Path) -> None:
    """While TDX is not initialized the file exists and its read is -ENXIO."""
    host = FakeHost()
    host.runs(None)
    async with tree(tmp_path, host) as client:
        assert await client.do(lambda: (client.root / DEVICE / "version").stat().st_size) == PAGE
        assert await client.read(f"{DEVICE}/version") == -ENXIO
        host.runs("1.5.09")
        assert await client.read(f"{DEVICE}/version") == "1.5.09\n"


async def test_a_failed_call_fails_the_read(tmp_path: Path) -> None:
    """The merged attributes hand the errno of the P-SEAMLDR call on, the older ones turn each into -ENXIO."""
    host = FakeHost()
    host.info = (-EIO, 0)
    names = "seamldr_version", "num_remaining_updates", "seamldr/version", "seamldr/num_remaining_updates"
    async with tree(tmp_path, host) as client:
        assert [await client.read(f"{DEVICE}/{name}") for name in names] == [-EIO, -EIO, -ENXIO, -ENXIO]
        host.info = (0, 7)
        assert [await client.read(f"{DEVICE}/{name}") for name in names] == ["1.5.02\n", "7\n"] * 2
    assert host.calls == 8


async def test_each_read_from_the_start_is_a_call(tmp_path: Path) -> None:
    """Through one descriptor: a read at 0 calls P-SEAMLDR, the rest and the end come from what that read found."""
    host = FakeHost()
    async with tree(tmp_path, host) as client:
        fd = await client.open(f"{DEVICE}/seamldr_version", os.O_RDONLY)
        pieces = [await client.do(lambda: os.read(fd, 3).decode()) for _ in range(4)]
        assert (pieces, host.calls) == (["1.5", ".02", "\n", ""], 1)
        assert await client.do(lambda: os.pread(fd, 9, 0).decode()) == "1.5.02\n" and host.calls == 2
        assert await client.do(lambda: os.pread(fd, 9, 4).decode()) == "02\n" and host.calls == 3
        await client.close(fd)


async def test_data_takes_a_page_at_a_time_at_any_offset(tmp_path: Path) -> None:
    """A longer write is short; holes are zeros; a truncation is taken and drops nothing; `loading` 1 does."""
    host = FakeHost()
    async with tree(tmp_path, host) as client:
        fd = await client.open(f"{NODE}/data", os.O_RDWR)
        assert await client.do(lambda: os.write(fd, b"a" * 3 * PAGE)) == PAGE
        assert await client.do(lambda: os.pwrite(fd, b"end", PAGE + 5)) == 3
        assert await client.do(lambda: os.ftruncate(fd, 0) or 0) == 0
        await client.close(await client.open(f"{NODE}/data", os.O_WRONLY | os.O_TRUNC))
        assert await client.do(lambda: os.pread(fd, 2 * PAGE, 0).decode()) == "a" * PAGE
        assert await client.do(lambda: os.pread(fd, PAGE, PAGE).decode()) == "\0" * 5 + "end"
        assert await client.write(f"{NODE}/loading", b"1\n") == 2
        assert await client.do(lambda: os.pread(fd, PAGE, 0).decode()) == ""
        await client.close(fd)


async def test_what_the_modes_forbid_root_cannot_do_either(tmp_path: Path) -> None:
    """A file is opened for what its mode allows, and nobody adds, removes or changes names."""
    async with tree(tmp_path, FakeHost()) as client:
        assert await client.open(f"{NODE}/cancel", os.O_RDONLY) == -EACCES
        assert await client.open(f"{DEVICE}/version", os.O_RDWR) == -EACCES
        assert await client.open(f"{DEVICE}/mine", os.O_CREAT | os.O_WRONLY) == -EACCES
        for call in (Path.mkdir, Path.rmdir, Path.touch):
            assert await client.do(functools.partial(call, client.root / "class/mine")) in (-EPERM, -EACCES, -2)
        version = client.root / DEVICE / "version"
        assert await client.do(version.unlink) == -EPERM
        assert await client.do(functools.partial(version.chmod, 0o666)) == -EPERM
        real = await client.do(lambda: str((client.root / NODE).resolve()))
        assert real == str(client.root / DEVICE / "firmware/tdx_module")


async def test_a_read_that_waits_holds_nobody_up(tmp_path: Path) -> None:
    """`version` waits for the end of an install: others are answered meanwhile, and Ctrl-C ends the reader at once."""
    host = FakeHost()
    host.gate = trio.Event()
    async with tree(tmp_path, host) as client:
        await client.start("tdx_module")
        async with trio.open_nursery() as nursery:
            command = [sys.executable, "-c", READER.format(client.root)]
            reader: trio.Process = await nursery.start(trio.run_process, command)
            await _until_blocked(reader.pid)
            assert await client.read(f"{NODE}/status") == "transferring\n"
            reader.send_signal(signal.SIGINT)
            await reader.wait()
            nursery.cancel_scope.cancel()
        assert not host.gate.is_set()
        host.gate.set()
        await client.until_idle("tdx_module")


READER = """import os
fd = os.open("{}/devices/faux/tdx_host/version", os.O_RDONLY)
try:
    os.read(fd, 9)
except KeyboardInterrupt:
    pass
"""


async def _until_blocked(pid: int) -> None:
    """Until the process waits for an answer of ours to a read."""
    while "request_wait_answer" not in _wchan(pid):  # noqa: ASYNC110
        await trio.sleep(0.001)


def _wchan(pid: int) -> str:
    return Path(f"/proc/{pid}/wchan").read_text()


async def test_who_still_waits_at_the_end_is_told(tmp_path: Path) -> None:
    """The tree goes away under a reader: -ENODEV, as when a device does; what is open later is not connected."""
    host = FakeHost()
    host.gate = trio.Event()
    found: list[int | str] = []
    async with trio.open_nursery() as nursery, tree(tmp_path, host) as client:
        await client.start("tdx_module")
        fd = await client.open(f"{DEVICE}/version", os.O_RDONLY)

        async def read() -> None:
            found.append(await client.do(lambda: os.read(fd, 9).decode()))

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert found == [-ENODEV]
    with pytest.raises(OSError) as caught:
        os.read(fd, 9)
    assert caught.value.errno == ENOTCONN
    os.close(fd)


# Mounts


def test_a_mount_of_somebody_else_stays(tmp_path: Path) -> None:
    """Ours is taken away from under a name with a space; another file system at that place is not touched."""
    place = tmp_path / "a place"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
    try:
        (place / "mine").touch()
        os.close(mount(place))
        assert mounts_on(place) == 1
        detach(place)
        assert mounts_on(place) == 0 and (place / "mine").exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)


HELPER = f"""#!{sys.executable}
import array, os, socket, sys
sys.path.insert(0, {str(Path(launcher.__file__).parent)!r})
from pathlib import Path
from kvm.fuse import mount
assert sys.argv[1] == "-o" and "default_permissions" in sys.argv[2].split(",") and sys.argv[3] == "--"
fds = array.array("i", [mount(Path(sys.argv[4]))])
socket.socket(fileno=int(os.environ["_FUSE_COMMFD"])).sendmsg([b"0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
"""


async def test_without_privilege_the_helper_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mount(2) is refused, fusermount3 hands the descriptor over; where that is missing, one line says so."""

    def refuse(root: Path) -> int:
        raise PermissionError(EPERM, "Operation not permitted")

    monkeypatch.setattr(kvm.fuse, "_mount_directly", refuse)
    monkeypatch.setenv("PATH", str(tmp_path))
    root = tmp_path / "sys"
    root.mkdir()
    with pytest.raises(SysfsError) as caught:
        check_sysfs_dir(root, fuse=True)
    assert "--sysfs DIR without --fuse" in str(caught.value) and "\n" not in str(caught.value)
    helper = tmp_path / "fusermount3"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    check_sysfs_dir(root, fuse=True)
    async with tree(root, FakeHost()) as client:
        assert await client.read(f"{DEVICE}/version") == "1.5.08\n"


# Machines


def test_clients_update_the_module_through_the_mount(tmp_path: Path) -> None:
    """The same shell and Python clients, unmodified; with a CPU stopped, the errors of an upload that runs."""
    with live(tmp_path, "--fuse", "--cpus", "3", "--vcpus", "4", "--tds", "1") as machine:
        slots = int(machine.device("num_remaining_updates"))
        status, told = machine.shell("tdx_module", machine.image(1))
        assert (status, told["error"], told["version"]) == (0, [""], ["1.5.09"])
        status, found = machine.python("seamldr_upload", machine.image(2, version=1))
        assert (status, found["after"], found["error"]) == (0, "1.5.10", "")
        assert [int(slot) for slot in found["slots"]] == [slots - 1, slots - 2]
        _errors_during_an_update(machine)
        status, summary = machine.interrupt()
    assert (status, summary["verdict"], summary["violations"]) == (SAFE, "safe", [])
    assert summary["updates"]["succeeded"] == 3 and not machine.root.exists() and mounts_on(machine.root) == 0


def _errors_during_an_update(machine: Live) -> None:
    pid, node = machine.pid("cpu1"), machine.node("tdx_module")
    os.kill(pid, signal.SIGSTOP)
    try:
        assert machine.shell("tdx_module", machine.image(3), seconds=0)[0] == 2
        for name, call in (("error", Path.read_text), ("data", Path.read_text), ("data", _write_something)):
            with pytest.raises(OSError) as caught:
                call(node / name)
            assert caught.value.errno == (EBUSY if name == "error" else ENODEV)
    finally:
        os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE_S
    while (node / "status").read_text() != "idle\n":
        assert time.monotonic() < deadline
    assert (node / "error").read_text() == "" and machine.device("version") == "1.5.11"


def _write_something(path: Path) -> None:
    path.write_text("something")


def test_a_launcher_that_is_killed_leaves_no_mount(tmp_path: Path) -> None:
    """The parent of the processes takes it away."""
    with live(tmp_path, *SMALL) as machine:
        assert mounts_on(machine.root) == 1
        parent = parent_of(machine.pid("cpu0"))
        machine.process.kill()
        machine.process.wait(PATIENCE_S)
        _wait_for_end(parent)
    assert mounts_on(machine.root) == 0 and list(machine.root.iterdir()) == []


async def test_a_new_kvm_process_mounts_anew(tmp_path: Path) -> None:
    """The files are back after the process that served them was killed, on one mount, and go with the machine."""
    client = Client(tmp_path / "sys")
    machine = Machine(small(tmp_path, updates=0, seconds=30.0, sysfs=str(client.root), fuse=True))
    with trio.fail_after(2 * PATIENCE_S), sysfs_directory(client.root):
        async with machine, trio.open_nursery() as nursery:
            nursery.start_soon(machine.run_workload)
            await _until_served(client)
            await machine.kill("kvm")
            assert await client.read(f"{DEVICE}/version") == -ENOTCONN
            await machine.restart("kvm")
            await _until_served(client)
            assert mounts_on(client.root) == 1
            await machine.finish()
            nursery.cancel_scope.cancel()
    assert mounts_on(client.root) == 0 and machine.check().violations == ()


async def _until_served(client: Client) -> None:
    while await client.read(f"{DEVICE}/version") != "1.5.08\n":  # noqa: ASYNC110
        await trio.sleep(0.005)


def test_the_next_run_takes_away_what_all_have_left(tmp_path: Path) -> None:
    """With the parent killed as well nobody is left to unmount: the next machine on the same directory does."""
    (tmp_path / "first").mkdir()
    (tmp_path / "sys").mkdir()
    (tmp_path / "first" / "sys").symlink_to(tmp_path / "sys")
    with live(tmp_path / "first", *SMALL) as machine:
        cpu = machine.pid("cpu0")
        sockets = last_argument(cpu)
        assert stat.S_ISDIR(machine.root.stat().st_mode)  # the kernel keeps that
        for pid in (parent_of(cpu), machine.process.pid):
            os.kill(pid, signal.SIGSTOP)
        for pid in (parent_of(cpu), machine.process.pid):
            os.kill(pid, signal.SIGKILL)
        machine.process.wait(PATIENCE_S)
        _wait_for_end(cpu)
        shutil.rmtree(sockets)
    while _errno_of_listing(tmp_path / "sys") != ENOTCONN:
        pass
    with live(tmp_path, *SMALL) as machine:
        assert machine.device("version") == "1.5.08" and mounts_on(machine.root) == 1
        machine.interrupt()
    assert mounts_on(machine.root) == 0 and list(machine.root.iterdir()) == []


def _errno_of_listing(path: Path) -> int:
    """ECONNABORTED if the server died meanwhile, ENOTCONN if it was dead before."""
    with pytest.raises(OSError) as caught:
        while True:
            os.listdir(path)
    assert caught.value.errno in (ECONNABORTED, ENOTCONN)
    return int(caught.value.errno)


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while runs(pid):
        assert time.monotonic() < deadline


def test_a_mount_needs_a_directory(capsys: pytest.CaptureFixture[str]) -> None:
    """--fuse alone is one line and status 2."""
    assert launcher.main(["run", "--fuse"]) == BAD_INPUT
    assert "--sysfs DIR" in capsys.readouterr().err
