"""The user's interface of the module update: the part of /sys that a client of it uses, as files under a directory.

Both names that the interface has had are there: those of the kernel as merged (`tdx_host/seamldr_version`, upload node
`tdx_module`) and those of version 3 of the series, which the released client uses (`tdx_host/seamldr/version`, upload
node `seamldr_upload`). They are two nodes of one device: each has its own upload, and the installs exclude each other.

The files are a mount of FUSE (`kvm.fuse_tree`), and then behave as those of sysfs to each errno; or they are plain and
leased (`kvm.leased`), so that a read is answered when the file is opened: `seamldr_version` and `num_remaining_updates`
perform one P-SEAMLDR call on some CPU for each open, as each read does in sysfs, and `status` is true after a write to
`loading`. What a plain file cannot do is to fail a read or a write with an errno. Instead:

* what would fail to read is not there: `version` while TDX is not initialized (-ENXIO), `error` while an upload runs
  (-EBUSY). An open of these that comes just before waits for the end of the update, and then reads.
* a P-SEAMLDR call that fails leaves its file empty; `sysfs_read` has the errno.
* a write that would fail is taken and has no effect; `sysfs_write` has the errno, and the kernel log says it too.
* `data` needs no capability; opening it with O_TRUNC empties it.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import trio

from kvm.fuse import detach, is_disconnected, try_mount
from kvm.fuse_tree import open_fuse_tree
from kvm.leased import Access, Show, Store, leases_work, open_tree, remove_tree
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


class File(Protocol):
    """An attribute in a tree."""

    def hide(self, hidden: bool) -> None:
        """A read of it would fail now, or not."""

    def push(self, content: str) -> None:
        """What a read of it would find now."""


class Buffer(Protocol):
    """A file in a tree that gathers what is written to it."""

    @property
    def size(self) -> int:
        """Bytes gathered."""

    def read(self, count: int) -> bytes:
        """The first bytes."""

    def clear(self) -> None:
        """Drop all bytes."""


class Tree(Protocol):
    """A directory that is being served. `exact`: a reader and a writer are told each errno, at once.

    What `show` returns is read, or it raises `OSError`; `store` and `access` return 0 or a negative errno, the latter
    for a write if it is called with True, else for a read. Paths are under the root.
    """

    nursery: trio.Nursery

    @property
    def exact(self) -> bool:
        """See above."""

    def file(self, path: str, mode: int, show: Show, store: Store | None = None) -> File:
        """Add an attribute."""

    def buffer(self, path: str, mode: int, access: Access) -> Buffer:
        """Add a gathering file."""

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""

    def names(self) -> list[str]:
        """Paths of the files that can be opened now; links are not followed."""


class UploadNode:
    """The files of one upload node, and its worker."""

    def __init__(self, tree: Tree, profile: NodeProfile, host: Host, changed: Callable[[], None]) -> None:
        self.core = core = Upload(profile)
        self.host = host
        self._tree = tree
        self._changed = changed
        self._idle = trio.Event()
        self._recorded: tuple[object, ...] = ()
        self._base = f"{DEVICE}/firmware/{profile.node}"
        self.data = tree.buffer(f"{self._base}/data", 0o644, self._access_data)
        loading = self._readable("loading", _sync(core.show_loading))
        self._loading = tree.file(f"{self._base}/loading", 0o644, loading, self._store_loading)
        tree.file(f"{self._base}/cancel", 0o200, _sync(lambda: ""), self._store_cancel)
        self._status = self._read_only("status", _sync(core.show_status))
        self._error = self._read_only("error", self._show_error)
        self._remaining = self._read_only("remaining_size", _sync(core.show_remaining_size))

    # Files

    def _readable(self, name: str, show: Show) -> Show:
        return readable(self.host, f"{self._base}/{name}", show)

    def _read_only(self, name: str, show: Show) -> File:
        return self._tree.file(f"{self._base}/{name}", 0o444, self._readable(name, show))

    def _store_loading(self, text: str) -> int:
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
        return stored.errno

    def _store_cancel(self, text: str) -> int:
        return self._note("cancel", text, self.core.store_cancel(text))

    def _access_data(self, writing: bool) -> int:
        """Whether nobody but an upload has the data: 0 or a negative errno. A write that fails is on record."""
        stored = self.core.store_data(0, 0)
        return self._note("data", "", stored) if writing and stored.errno else stored.errno

    def _note(self, file: str, text: str, stored: Stored) -> int:
        """Put a write on record; its errno."""
        value = text[:LONGEST_VALUE]
        self.host.emit("sysfs_write", path=f"{self._base}/{file}", value=value, errno=stored.errno)
        name = f"firmware {self.core.profile.node}"
        if stored.log:
            self.host.log(f"{name}: {stored.log}")
        if stored.errno:
            self.host.log(f"{name}: a write to {file} returns -{errno.errorcode[-stored.errno]}")
        return stored.errno

    async def _show_error(self) -> str:
        while (error := self.core.show_error()) is None:
            if self._tree.exact:
                raise OSError(errno.EBUSY, "an upload runs")
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

    def __init__(self, tree: Tree, host: Host, support: Support) -> None:
        self.tree = tree
        self.host = host
        self._version = self._attribute("version", 0o444, self._show_version)
        if support.update_supported:
            for profile in PROFILES:
                UploadNode(tree, profile, host, self.refresh)
                tree.link(f"{CLASS}/{profile.node}", f"{DEVICE}/firmware/{profile.node}")
            self._firmware_attributes()
        self.refresh()
        sysinfo, erratum = int(support.sysinfo), int(support.erratum)
        host.emit("sysfs_tree", sysinfo=sysinfo, features0=support.features0, erratum=erratum, files=tree.names())

    def _attribute(self, name: str, mode: int, show: Show) -> File:
        return self.tree.file(f"{DEVICE}/{name}", mode, readable(self.host, f"{DEVICE}/{name}", show))

    def _firmware_attributes(self) -> None:
        for profile in PROFILES:
            version, remaining = profile.readers
            mode = profile.reader_mode
            self._attribute(version, mode, functools.partial(self._show_seamldr_version, profile))
            self._attribute(remaining, mode, functools.partial(self._show_remaining_updates, profile))

    def refresh(self) -> None:
        """A plain `version` is there if and only if it can be read."""
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
    """`show` with a record of each reading, also of one that raises `OSError`."""

    async def shown() -> str:
        try:
            text = await show()
        except OSError as error:
            host.emit("sysfs_read", path=path, value="", errno=-(error.errno or errno.EIO))
            raise
        host.emit("sysfs_read", path=path, value=text.rstrip("\n"), errno=0)
        return text

    return shown


def _sync(show: Callable[[], str]) -> Callable[[], Awaitable[str]]:
    async def shown() -> str:
        return show()

    return shown


@asynccontextmanager
async def serve_sysfs(root: Path, host: Host, support: Support, *, fuse: bool = False) -> AsyncIterator[SysfsTree]:
    """The tree under the empty directory `root`, or mounted on it, until the block ends; then `root` is empty again."""
    opened: AbstractAsyncContextManager[Tree] = open_fuse_tree(root) if fuse else open_tree(root)
    async with opened as tree:
        yield SysfsTree(tree, host, support)


@contextmanager
def sysfs_directory(root: Path) -> Iterator[None]:
    """Make `root`, for its owner alone, if it is not there. When the block ends nothing of the tree is left, whoever
    was killed.
    """
    existed = root.exists()
    root.mkdir(mode=0o700, exist_ok=True)
    root = root.resolve()
    try:
        yield
    finally:
        clear(root)
        if not existed:
            with suppress(OSError):
                root.rmdir()


def clear(root: Path) -> None:
    """Unmount and remove what is left of a tree, also of one whose machine was killed. `root` leads over no link."""
    detach(root)
    remove_tree(root)


def check_sysfs_dir(path: Path, *, fuse: bool = False) -> None:
    """Whether the tree can be made at `path`, or mounted there; raises `SysfsError`.

    It does not exist or is empty. A mount that a killed machine has left there is taken away.
    """
    try:
        if is_disconnected(path):
            detach(path.resolve())
        if path.exists() or path.is_symlink():
            if not path.is_dir() or any(path.iterdir()):
                raise SysfsError(f"sysfs directory {path} exists and is not an empty directory")
            place = path
        else:
            place = path.parent
        if fuse:
            _check_mount(path)
        elif not leases_work(place):
            raise SysfsError(f"sysfs directory {path}: its file system has no leases (fcntl F_SETLEASE); try /tmp")
    except OSError as error:
        raise SysfsError(f"sysfs directory {path} cannot be made: {error.strerror}") from None


def _check_mount(path: Path) -> None:
    try:
        try_mount()
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        advice = "use --sysfs DIR without --fuse, or be root, or install fusermount3"
        raise SysfsError(f"--fuse: nothing can be mounted on {path} ({why}); {advice}") from None
