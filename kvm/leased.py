"""Plain files that know when they are opened: the closest that ordinary files come to sysfs, without any privilege.

Linux lets the owner of a file hold a lease on it (fcntl(2), F_SETLEASE). Whoever opens the file then waits inside
open(2) until the owner, told by SIGIO, gives the lease up. So a reader finds what is true at its open, and only after
all that it wrote before to other files has been taken in, just as if each file were a function of the kernel.
inotify(7) tells what writers wrote and when they closed.

Each opening has a file of its own under the name: before a lease is given up, a new leased file takes the name over.
Nothing written is lost or mixed, however fast two writers follow each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import trio

IN_MODIFY, IN_CLOSE_WRITE, IN_CLOSE_NOWRITE = 0x2, 0x8, 0x10
CLOSED = IN_CLOSE_WRITE | IN_CLOSE_NOWRITE
_EVENT = struct.Struct("iIII")
TOPS = ("devices", "class")
STAGING = ".staging"
LONGEST_WRITE = 4096

Show = Callable[[], Awaitable[str]]
Store = Callable[[str], int]
Access = Callable[[bool], int]


class Inotify:
    """inotify(7) through the C library: events of inodes, by the number that `add` returned."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def _checked(self, result: int) -> int:
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def add(self, fd: int) -> int:
        """Watch the inode behind `fd`."""
        mask = IN_MODIFY | CLOSED
        return self._checked(self._libc.inotify_add_watch(self.fd, f"/proc/self/fd/{fd}".encode(), mask))

    def remove(self, watch: int) -> None:
        """Watch it no longer."""
        self._libc.inotify_rm_watch(self.fd, watch)

    def read(self) -> list[tuple[int, int]]:
        """Watch and mask of all events so far."""
        events: list[tuple[int, int]] = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fd, 65536):
                events += _events(data)
        return events

    def close(self) -> None:
        """No more events."""
        os.close(self.fd)


def _events(data: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(data):
        watch, mask, _, length = _EVENT.unpack_from(data, at)
        yield watch, mask
        at += _EVENT.size + length


class Sheet:
    """One inode behind the name of a file."""

    def __init__(self, fd: int, watch: int) -> None:
        self.fd = fd
        self.watch = watch
        self.granted = self.writing = False
        self.seen = b""

    def lease(self) -> bool:
        """Take the lease; False while somebody has the inode open."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            return False
        return True

    def awaited_for(self) -> int | None:
        """Who waits for the lease: F_RDLCK a reader, F_UNLCK a writer, None nobody."""
        kind = fcntl.fcntl(self.fd, fcntl.F_GETLEASE)
        return None if kind == fcntl.F_WRLCK else kind

    def release(self) -> None:
        """Let those who wait go on."""
        self.granted = True
        fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def write(self, content: bytes) -> None:
        """What a reader of this inode finds from now on."""
        self.seen = content
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, content, 0)

    def written(self) -> list[str]:
        """The lines that a writer has added since the last look."""
        content = os.pread(self.fd, LONGEST_WRITE, 0)
        new = content[len(self.seen) :] if content.startswith(self.seen) else content
        self.seen = content
        return new.decode("latin-1").splitlines()


class LeasedFile:
    """A file whose content is made when it is opened. `show` makes it, nothing if it raises `OSError`; `store` takes
    each line written, whatever it returns.
    """

    def __init__(self, tree: LeasedTree, path: Path, mode: int, show: Show, store: Store | None) -> None:
        self.tree = tree
        self.path = self.place = path
        self.mode = mode
        self.show = show
        self.store = store
        self.leased = tree.new_sheet(self.place, mode, self)
        self.opened: list[Sheet] = []

    def look(self) -> None:
        """Serve whoever waits."""
        for sheet in [sheet for sheet in self.opened if sheet.granted]:
            self._retire(sheet)
        if self.leased.awaited_for() is not None:
            sheet = self.leased
            self.opened.append(sheet)
            self.leased = self.tree.new_sheet(self.place, self.mode, self)
            self.tree.nursery.start_soon(self._grant, sheet)

    async def _grant(self, sheet: Sheet) -> None:
        """A writer finds nothing, so that all in the file is what it wrote; a reader finds what is true now."""
        if not self._is_for_writer(sheet):
            content = await self._content()
            if not self._is_for_writer(sheet):
                sheet.write(content.encode())
        sheet.release()

    async def _content(self) -> str:
        try:
            return await self.show()
        except OSError:
            return ""

    def _is_for_writer(self, sheet: Sheet) -> bool:
        sheet.writing = self.store is not None and sheet.awaited_for() == fcntl.F_UNLCK
        return sheet.writing

    def event(self, sheet: Sheet, mask: int) -> None:
        """Something was done with an inode of this file."""
        if self.store is not None:
            for line in sheet.written():
                self.store(line)
        if mask & CLOSED and sheet in self.opened:
            self._retire(sheet)

    def _retire(self, sheet: Sheet) -> None:
        """Nobody can open a granted inode any more: it goes as soon as nobody has it open."""
        if sheet.granted and sheet.lease():
            self.opened.remove(sheet)
            self.tree.drop(sheet)

    def push(self, content: str) -> None:
        """Whoever has the file open for reading finds this from now on."""
        for sheet in self.opened:
            if not sheet.writing:
                sheet.write(content.encode())

    def hide(self, hidden: bool) -> None:
        """Take the name away, so that an open fails, or put it back."""
        place = self.tree.staging / f"hidden-{id(self)}" if hidden else self.path
        if place != self.place:
            self.place.rename(place)
            self.place = place


class BufferFile:
    """A file that gathers what is written to it, at any offset, by whoever: one inode for good.

    `access` is called some time after writes to it; if it refuses them, with a negative errno, all bytes are dropped.
    """

    def __init__(self, tree: LeasedTree, path: Path, mode: int, access: Access) -> None:
        self.access = access
        self.leased = tree.new_sheet(path, mode, self)
        self._is_leased = True

    def look(self) -> None:
        """Let whoever waits go on: what was done before is known now."""
        self._lease_again()
        if self._is_leased and self.leased.awaited_for() is not None:
            self.leased.release()
            self._is_leased = False

    def event(self, sheet: Sheet, mask: int) -> None:
        """Closed by all: the next open has to wait again."""
        if mask & IN_MODIFY and self.size and self.access(True) < 0:
            self.clear()
        if mask & CLOSED:
            self._lease_again()

    def _lease_again(self) -> None:
        """May fail right after a close: Linux tells of it before the file counts as closed. Then the next look does."""
        if not self._is_leased:
            self._is_leased = self.leased.lease()

    def clear(self) -> None:
        """Drop all bytes."""
        os.ftruncate(self.leased.fd, 0)

    @property
    def size(self) -> int:
        """Bytes gathered."""
        return os.fstat(self.leased.fd).st_size

    def read(self, count: int) -> bytes:
        """The first bytes."""
        return os.pread(self.leased.fd, count, 0)


class LeasedTree:
    """A directory of such files, empty at first; made by `open_tree`."""

    exact = False

    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        if (root / STAGING).is_dir():
            remove_tree(root)  # of one who was killed
        if any(root.iterdir()):
            raise FileExistsError(f"{root} is not empty")
        self.root = root
        self.nursery = nursery
        self.staging = root / STAGING
        self.staging.mkdir(mode=0o700)
        self.inotify = Inotify()
        self.files: list[LeasedFile | BufferFile] = []
        self._sheets: dict[int, tuple[LeasedFile | BufferFile, Sheet]] = {}

    def file(self, path: str, mode: int, show: Show, store: Store | None = None) -> LeasedFile:
        """Add a file at `path` under the root."""
        file = LeasedFile(self, self._place(path), mode, show, store)
        self.files.append(file)
        return file

    def buffer(self, path: str, mode: int, access: Access) -> BufferFile:
        """Add a gathering file at `path` under the root."""
        file = BufferFile(self, self._place(path), mode, access)
        self.files.append(file)
        return file

    def link(self, path: str, target: str) -> None:
        """Add a link at `path` to `target`, both under the root."""
        self._place(path).symlink_to(os.path.relpath(target, os.path.dirname(path)))

    def names(self) -> list[str]:
        """Paths of the files that can be opened now, under the root; links are not followed."""
        tops = [self.root / top for top in TOPS]
        found = [path for top in tops for path in top.rglob("*") if path.is_file() and not path.is_symlink()]
        return sorted(str(path.relative_to(self.root)) for path in found)

    def _place(self, path: str) -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def new_sheet(self, place: Path, mode: int, owner: LeasedFile | BufferFile) -> Sheet:
        """A new leased inode that has the name `place` now."""
        fresh = self.staging / secrets.token_hex(8)
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        sheet = Sheet(fd, self.inotify.add(fd))
        os.fchmod(fd, mode)  # inotify wants a file that we may read
        self._sheets[sheet.watch] = owner, sheet
        if not sheet.lease():
            raise OSError(f"{fresh}: a new file is open elsewhere")
        fresh.rename(place)
        return sheet

    def drop(self, sheet: Sheet) -> None:
        """Nobody has this inode open, nor can anybody open it."""
        self.inotify.remove(sheet.watch)
        self._sheets.pop(sheet.watch, None)
        os.close(sheet.fd)

    def take_in(self) -> None:
        """Take in all that was written so far."""
        for watch, mask in self.inotify.read():
            owner, sheet = self._sheets.get(watch, (None, None))
            if owner is not None and sheet is not None:
                owner.event(sheet, mask)

    def look(self) -> None:
        """Serve all who wait in an open, after what was written before."""
        self.take_in()
        for file in self.files:
            file.look()

    def close(self) -> None:
        """Remove everything under the root; whoever waits goes on."""
        remove_tree(self.root)
        for _, sheet in list(self._sheets.values()):
            self.drop(sheet)
        self.inotify.close()


@contextlib.asynccontextmanager
async def open_tree(root: Path) -> AsyncIterator[LeasedTree]:
    """A tree under the empty directory `root`, served until the block ends. Takes SIGIO for itself."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    tree: LeasedTree | None = None
    with trio.open_signal_receiver(signal.SIGIO) as signals:
        try:
            async with trio.open_nursery() as nursery:
                tree = LeasedTree(root, nursery)
                nursery.start_soon(_serve_opens, tree, signals)
                nursery.start_soon(_serve_writes, tree)
                yield tree
                nursery.cancel_scope.cancel()
        finally:
            if tree is not None:
                tree.close()


async def _serve_opens(tree: LeasedTree, signals: AsyncIterator[int]) -> None:
    async for _ in signals:
        tree.look()


async def _serve_writes(tree: LeasedTree) -> None:
    while True:
        await trio.lowlevel.wait_readable(tree.inotify.fd)
        tree.take_in()


def remove_tree(root: Path) -> None:
    """Remove the directories that a tree has under `root`."""
    for top in (*TOPS, STAGING):
        shutil.rmtree(root / top, ignore_errors=True)


def leases_work(directory: Path) -> bool:
    """Whether files in `directory` can be leased; raises `OSError` if none can be made there."""
    path = directory / f".lease-{secrets.token_hex(8)}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    finally:
        os.close(fd)
        path.unlink()
    return True
