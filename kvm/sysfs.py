"""The user's interface of the module update: the part of /sys that a client of it uses, as files under a directory.

Both names that the interface has had are there: those of the kernel as merged (`tdx_host/seamldr_version`, upload node
`tdx_module`) and those of version 3 of the series, which the released client uses (`tdx_host/seamldr/version`, upload
node `seamldr_upload`). They are two nodes of one device: each has its own upload, and the installs exclude each other.

The files are leased (`kvm.leased`), so a read is answered when the file is opened: `seamldr_version` and
`num_remaining_updates` perform one P-SEAMLDR call on some CPU for each open, as each read does in sysfs, and `status`
is true after a write to `loading`. What a plain file cannot do is to fail a read or a write with an errno. Instead:

* what would fail to read is not there: `version` while TDX is not initialized (-ENXIO), `error` while an upload runs
  (-EBUSY). An open of these that comes just before waits for the end of the update, and then reads.
* a P-SEAMLDR call that fails leaves its file empty; `sysfs_read` has the errno.
* a write that would fail is taken and has no effect; `sysfs_write` has the errno, and the kernel log says it too.
* `data` needs no capability; opening it with O_TRUNC empties it.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import trio

from kvm.leased import LeasedFile, LeasedTree, Show, leases_work, open_tree, remove_tree
from seamldr.image import MAX_MODULE_PAGES, MAX_SIGSTRUCT_PAGES, PAGE, VERSION_1, ImageError, build_v2, parse
from seamldr.structures import SeamldrInfo
from seamldr.upload import PROFILES, NodeProfile, Stored, Support, Upload

DEVICE = "devices/faux/tdx_host"
CLASS = "class/firmware"
LARGEST_IMAGE = (1 + MAX_SIGSTRUCT_PAGES + MAX_MODULE_PAGES) * PAGE
"""Bytes of an image that the kernel may accept; of a larger one, nothing but its size and header matters."""

LARGEST_SIZE = 2**32 - 1
LONGEST_VALUE = 32
"""Characters of a write that its record shows."""


class SysfsError(ValueError):
    """The directory cannot hold the tree; one line for the user."""


class Host(Protocol):
    """The kernel behind the files. Errnos are 0 or negative."""

    async def seamldr_info(self) -> tuple[int, SeamldrInfo | None]:
        """SEAMLDR.INFO on some CPU."""

    async def install(self, image: bytes, length: int) -> int:
        """Have an image of `length` bytes installed, of which `image` is all that matters; waits for other installs."""

    async def settled(self) -> None:
        """Return when no install runs."""

    def version(self) -> str | None:
        """The module's version as the kernel knows it; None if TDX is not initialized."""

    def all_online(self) -> bool:
        """Whether every CPU is online."""

    def emit(self, event: str, /, **fields: Any) -> int:
        """Write a record."""

    def log(self, text: str) -> None:
        """A line of the kernel log."""

    def refuse(self, error: int, why: str) -> None:
        """Record that an image was refused before any CPU heard of it."""


class UploadNode:
    """The files of one upload node, and its worker."""

    def __init__(self, tree: LeasedTree, profile: NodeProfile, host: Host, changed: Callable[[], None]) -> None:
        self.core = core = Upload(profile)
        self.host = host
        self._tree = tree
        self._changed = changed
        self._idle = trio.Event()
        self._recorded: tuple[object, ...] = ()
        self._base = f"{DEVICE}/firmware/{profile.node}"
        self.data = tree.buffer(f"{self._base}/data", 0o644, self._data_written)
        loading = self._readable("loading", _sync(core.show_loading))
        self._loading = tree.file(f"{self._base}/loading", 0o644, loading, self._store_loading)
        tree.file(f"{self._base}/cancel", 0o200, _sync(lambda: ""), self._store_cancel)
        self._status = self._read_only("status", _sync(core.show_status))
        self._error = self._read_only("error", self._show_error)
        self._remaining = self._read_only("remaining_size", _sync(core.show_remaining_size))

    # Files

    def _readable(self, name: str, show: Show) -> Show:
        return readable(self.host, f"{self._base}/{name}", show)

    def _read_only(self, name: str, show: Show) -> LeasedFile:
        return self._tree.file(f"{self._base}/{name}", 0o444, self._readable(name, show))

    def _store_loading(self, text: str) -> None:
        if self.core.data_is_accessible:
            self.core.store_data(0, self.data.size)
        stored = self.core.store_loading(text)
        self._note("loading", text, stored)
        if stored.started:
            self._idle = trio.Event()
            image, length = self.data.read(LARGEST_IMAGE), min(self.data.size, LARGEST_SIZE)
            self._tree.nursery.start_soon(self._upload, image, length)
        if stored.started or self.core.size == 0:
            self.data.clear()
        self._publish()

    def _store_cancel(self, text: str) -> None:
        self._note("cancel", text, self.core.store_cancel(text))

    def _data_written(self) -> None:
        """What is written while an upload has the data is lost."""
        if not self.core.data_is_accessible and self.data.size:
            self._note("data", "", self.core.store_data(0, self.data.size))
            self.data.clear()

    def _note(self, file: str, text: str, stored: Stored) -> None:
        value = text[:LONGEST_VALUE]
        self.host.emit("sysfs_write", path=f"{self._base}/{file}", value=value, errno=stored.errno)
        name = f"firmware {self.core.profile.node}"
        if stored.log:
            self.host.log(f"{name}: {stored.log}")
        if stored.errno:
            self.host.log(f"{name}: a write to {file} returns -{errno.errorcode[-stored.errno]}")

    async def _show_error(self) -> str:
        while (error := self.core.show_error()) is None:
            await self._idle.wait()
        return error

    def _publish(self) -> None:
        """Bring files that somebody holds open up to date. `error` is there before `status` says that all is over."""
        error = self.core.show_error()
        self._record(error)
        self._error.hide(error is None)
        self._error.push(error or "")
        self._loading.push(self.core.show_loading())
        self._remaining.push(self.core.show_remaining_size())
        self._status.push(self.core.show_status())

    def _record(self, error: str | None) -> None:
        core = self.core
        shown = "EBUSY" if error is None else error.rstrip("\n")
        load, stage, remaining = core.load.value, core.progress.value, core.remaining
        data = int(core.data_is_accessible)
        now = (load, stage, shown, remaining, data)
        if now != self._recorded:
            self._recorded = now
            name = core.profile.node
            self.host.emit(
                "fw_upload", name=name, load=load, stage=stage, error=shown, remaining=remaining, data=data
            )

    # The worker

    async def _upload(self, image: bytes, length: int) -> None:
        core = self.core
        core.prepare()
        self._publish()
        await trio.lowlevel.checkpoint()
        if core.transfer():
            self._publish()
            if core.wrote(length, core.profile.upload_error(await self._write(image, length))):
                core.program()
                self._publish()
        core.free()
        self.data.clear()
        self._changed()
        core.finish()
        self._publish()
        self._idle.set()

    async def _write(self, image: bytes, length: int) -> int:
        """The driver's install; 0 or a negative errno."""
        profile, host = self.core.profile, self.host
        if profile.checks_first:
            failed, info = await host.seamldr_info()
            if failed or info is None:
                return self._refuse(errno.EIO, "P-SEAMLDR gives no information")
            if info.num_remaining_updates == 0:
                return self._refuse(errno.ENOSPC, "no update remains")
        if profile.image_version == VERSION_1:
            try:
                image = _reframed(image)
            except ImageError as error:
                return self._refuse(error.errno, str(error))
            length = len(image)
        if profile.checks_first and not host.all_online():
            return self._refuse(errno.EBUSY, "Cannot update TDX module if any CPU is offline")
        return await host.install(image, length)

    def _refuse(self, error: int, why: str) -> int:
        self.host.refuse(-error, why)
        return -error


def _reframed(image: bytes) -> bytes:
    """A version 1 container as the version 2 that our kernel reads; raises `ImageError`, for another too."""
    module = parse(image)
    if module.version != VERSION_1:
        raise ImageError("the container is not version 1")
    return build_v2(module)


class SysfsTree:
    """All files of the device."""

    def __init__(self, tree: LeasedTree, host: Host, support: Support) -> None:
        self.tree = tree
        self.host = host
        self._version = self._attribute("version", 0o444, self._show_version)
        if support.update_supported:
            for profile in PROFILES:
                UploadNode(tree, profile, host, self.refresh)
            self._firmware_attributes()
            self._links()
        self.refresh()
        sysinfo, erratum = int(support.sysinfo), int(support.erratum)
        host.emit("sysfs_tree", sysinfo=sysinfo, features0=support.features0, erratum=erratum, files=tree.names())

    def _attribute(self, name: str, mode: int, show: Show) -> LeasedFile:
        return self.tree.file(f"{DEVICE}/{name}", mode, readable(self.host, f"{DEVICE}/{name}", show))

    def _firmware_attributes(self) -> None:
        for profile in PROFILES:
            version, remaining = profile.readers
            mode = profile.reader_mode
            self._attribute(version, mode, functools.partial(self._show_seamldr_version, profile))
            self._attribute(remaining, mode, functools.partial(self._show_remaining_updates, profile))

    def _links(self) -> None:
        directory = self.tree.root / CLASS
        directory.mkdir(parents=True)
        for profile in PROFILES:
            target = self.tree.root / DEVICE / "firmware" / profile.node
            (directory / profile.node).symlink_to(os.path.relpath(target, directory))

    def refresh(self) -> None:
        """`version` is there if and only if it can be read."""
        version = self.host.version()
        self._version.hide(version is None)
        self._version.push(f"{version}\n" if version else "")

    async def _show_version(self) -> str:
        await self.host.settled()
        version = self.host.version()
        if version is None:
            raise OSError(errno.ENXIO, "TDX is not initialized")
        return f"{version}\n"

    async def _show_seamldr_version(self, profile: NodeProfile) -> str:
        info = await self._seamldr_info(profile)
        return f"{info.major}.{info.minor}.{info.update:02}\n"

    async def _show_remaining_updates(self, profile: NodeProfile) -> str:
        return f"{(await self._seamldr_info(profile)).num_remaining_updates}\n"

    async def _seamldr_info(self, profile: NodeProfile) -> SeamldrInfo:
        failed, info = await self.host.seamldr_info()
        if failed or info is None:
            raise OSError(profile.reader_errno or -failed, "P-SEAMLDR gives no information")
        return info


def readable(host: Host, path: str, show: Show) -> Show:
    """`show` with a record of each reading; one that raises `OSError` leaves nothing to read."""

    async def shown() -> str:
        text, failed = "", 0
        try:
            text = await show()
        except OSError as error:
            failed = -(error.errno or errno.EIO)
        host.emit("sysfs_read", path=path, value=text.rstrip("\n"), errno=failed)
        return text

    return shown


def _sync(show: Callable[[], str]) -> Callable[[], Awaitable[str]]:
    async def shown() -> str:
        return show()

    return shown


@asynccontextmanager
async def serve_sysfs(root: Path, host: Host, support: Support) -> AsyncIterator[SysfsTree]:
    """The tree under the empty directory `root` until the block ends; then `root` is empty again."""
    async with open_tree(root) as tree:
        yield SysfsTree(tree, host, support)


@contextmanager
def sysfs_directory(root: Path) -> Iterator[None]:
    """Make `root`, for its owner alone, if it is not there. When the block ends nothing of the tree is left, whoever
    was killed.
    """
    existed = root.exists()
    root.mkdir(mode=0o700, exist_ok=True)
    try:
        yield
    finally:
        remove_tree(root)
        if not existed:
            with suppress(OSError):
                root.rmdir()


def check_sysfs_dir(path: Path) -> None:
    """Whether the tree can be made at `path`, which does not exist or is empty; raises `SysfsError`."""
    try:
        if path.exists() or path.is_symlink():
            if not path.is_dir() or any(path.iterdir()):
                raise SysfsError(f"sysfs directory {path} exists and is not an empty directory")
            place = path
        else:
            place = path.parent
        if not leases_work(place):
            raise SysfsError(f"sysfs directory {path}: its file system has no leases (fcntl F_SETLEASE); try /tmp")
    except OSError as error:
        raise SysfsError(f"sysfs directory {path} cannot be made: {error.strerror}") from None
