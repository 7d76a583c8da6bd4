"""A mounted tree whose reads and writes fail as those of sysfs do: the same tree as `kvm.leased`, through FUSE.

What sysfs does for each of its files (Linux, fs/kernfs/file.c and fs/seq_file.c), this does: a read at offset 0, or
elsewhere than where the last one ended, makes the content anew; the offset of a write to an attribute means nothing; a
write takes a page at most; a truncation is taken and does nothing; a file is opened only for what its mode allows, by
root too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

import trio

from kvm.fuse import (
    LARGEST_REQUEST,
    PAGE,
    REFUSED,
    ROOT,
    UNANSWERED,
    Attr,
    Entry,
    Opcode,
    Request,
    changes_owner_or_mode,
    decode_handle,
    decode_name,
    decode_open,
    decode_read,
    decode_request,
    decode_write,
    detach,
    encode_answer,
    encode_attr,
    encode_entries,
    encode_entry,
    encode_init,
    encode_open,
    encode_statfs,
    encode_written,
    mount,
)
from kvm.leased import Access, Show, Store

READABLE, WRITABLE = 0o444, 0o222


class FuseDirectory:
    """A directory; the root is its own `parent`."""

    def __init__(self, number: int, parent: int) -> None:
        self.attr = Attr(number, stat.S_IFDIR | 0o755)
        self.parent = parent
        self.children: dict[str, FuseNode] = {}

    def entries(self) -> list[Entry]:
        """All names."""
        own = [Entry(".", self.attr.number, self.attr.mode), Entry("..", self.parent, self.attr.mode)]
        return own + [Entry(name, node.attr.number, node.attr.mode) for name, node in self.children.items()]


class FuseLink:
    """A symbolic link."""

    def __init__(self, number: int, target: str) -> None:
        self.attr = Attr(number, stat.S_IFLNK | 0o777)
        self.target = target


class FuseFile:
    """An attribute: `show` makes what is read, `store` takes each write. What they refuse, their user is told."""

    def __init__(self, number: int, mode: int, show: Show, store: Store | None) -> None:
        self.attr = Attr(number, stat.S_IFREG | mode, PAGE)
        self._show = show
        self._store = store

    def hide(self, hidden: bool) -> None:
        """It is always there: a read of it fails instead."""

    def push(self, content: str) -> None:
        """Whoever has it open reads what is true then."""

    async def answer_read(self, handle: Handle, offset: int, size: int) -> bytes:
        """The next bytes for a reader; raises `OSError`."""
        if offset == 0 or offset != handle.position:
            handle.content = (await self._show()).encode()
        part = handle.content[offset : offset + size]
        handle.position = offset + len(part)
        return part

    def answer_write(self, offset: int, data: bytes) -> int:
        """Bytes taken; raises `OSError`."""
        taken = data[:PAGE]
        _check(self._store(taken.decode("latin-1").rstrip("\n")) if self._store else -errno.EIO)
        return len(taken)


class FuseBuffer:
    """A file that gathers what is written to it, at any offset, by whoever, as long as `access` lets it."""

    def __init__(self, number: int, mode: int, access: Access) -> None:
        self.attr = Attr(number, stat.S_IFREG | mode)
        self.fd = os.memfd_create("data")
        self._access = access

    @property
    def size(self) -> int:
        """Bytes gathered."""
        return os.fstat(self.fd).st_size

    def read(self, count: int) -> bytes:
        """The first bytes."""
        return os.pread(self.fd, count, 0)

    def clear(self) -> None:
        """Drop all bytes."""
        os.ftruncate(self.fd, 0)

    async def answer_read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Bytes for a reader; raises `OSError`."""
        _check(self._access(False))
        return os.pread(self.fd, min(size, PAGE), offset)

    def answer_write(self, offset: int, data: bytes) -> int:
        """Bytes taken; raises `OSError`."""
        _check(self._access(True))
        try:
            return os.pwrite(self.fd, data[:PAGE], offset)
        except OSError:
            raise _failure(errno.ENOMEM) from None


FuseNode = FuseDirectory | FuseLink | FuseFile | FuseBuffer
Node = TypeVar("Node", FuseDirectory, FuseLink, FuseFile, FuseBuffer)


class Handle:
    """An open file or directory, with what its reader was shown and how far it has read."""

    def __init__(self, node: FuseNode) -> None:
        self.node = node
        self.content = b""
        self.position = 0


class FuseTree:
    """The files on a mount, none at first; made by `open_fuse_tree`. Each read of a file has a task of its own."""

    exact = True
    nursery: trio.Nursery

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._nodes: dict[int, FuseNode] = {}
        self._root = self._put(FuseDirectory(ROOT, ROOT))
        self._handles: dict[int, Handle] = {}
        self._opened = 0
        self._reading: set[int] = set()
        self._answers: dict[int, Callable[[Request], bytes]] = {
            Opcode.INIT: lambda request: encode_init(request.body),
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: lambda request: encode_attr(self._nodes[request.node].attr),
            Opcode.SETATTR: self._set_attr,
            Opcode.READLINK: self._read_link,
            Opcode.OPEN: self._open,
            Opcode.OPENDIR: self._open,
            Opcode.READDIR: self._read_directory,
            Opcode.WRITE: self._write,
            Opcode.RELEASE: self._release,
            Opcode.RELEASEDIR: self._release,
            Opcode.STATFS: lambda request: encode_statfs(),
            Opcode.ACCESS: lambda request: b"",
        }

    # What the tree is made of

    def file(self, path: str, mode: int, show: Show, store: Store | None = None) -> FuseFile:
        """Add an attribute at `path` under the root."""
        return self._add(path, FuseFile(self._next(), mode, show, store))

    def buffer(self, path: str, mode: int, access: Access) -> FuseBuffer:
        """Add a gathering file at `path` under the root."""
        return self._add(path, FuseBuffer(self._next(), mode, access))

    def link(self, path: str, target: str) -> None:
        """Add a link at `path` to `target`, both under the root."""
        self._add(path, FuseLink(self._next(), os.path.relpath(target, os.path.dirname(path))))

    def names(self) -> list[str]:
        """Paths of the files under the root; links are not followed."""
        return sorted(_files(self._root, PurePosixPath()))

    def _next(self) -> int:
        return ROOT + len(self._nodes)

    def _put(self, node: Node) -> Node:
        self._nodes[node.attr.number] = node
        return node

    def _add(self, path: str, node: Node) -> Node:
        self._put(node)
        *parents, name = PurePosixPath(path).parts
        directory = self._root
        for parent in parents:
            inner = directory.children.get(parent)
            if not isinstance(inner, FuseDirectory):
                inner = self._put(FuseDirectory(self._next(), directory.attr.number))
                directory.children[parent] = inner
            directory = inner
        directory.children[name] = node
        return node

    # Requests

    async def serve(self) -> None:
        """Answer until somebody has unmounted the tree."""
        while True:
            await trio.lowlevel.wait_readable(self.fd)
            try:
                data = os.read(self.fd, LARGEST_REQUEST)
            except (BlockingIOError, FileNotFoundError):  # nothing yet; or its caller gave up before we had it
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise
            self._take(decode_request(data))

    def _take(self, request: Request) -> None:
        if request.opcode == Opcode.READ:
            self._reading.add(request.unique)
            self.nursery.start_soon(self._read, request)
        elif request.opcode == Opcode.INTERRUPT:
            self._end_read(decode_handle(request.body), error=-errno.EINTR)
        elif request.opcode not in UNANSWERED:
            self._send(request)

    def _send(self, request: Request) -> None:
        answer = self._answers.get(request.opcode)
        try:
            if answer is None:
                raise _failure(REFUSED.get(request.opcode, errno.ENOSYS))
            encoded = encode_answer(request.unique, answer(request))
        except OSError as error:
            encoded = encode_answer(request.unique, error=-(error.errno or errno.EIO))
        self._write_out(encoded)

    def _write_out(self, encoded: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):  # its caller waits no longer
            os.write(self.fd, encoded)

    async def _read(self, request: Request) -> None:
        """May take as long as a P-SEAMLDR call, or an update."""
        try:
            read = decode_read(request.body)
            handle = self._handles[read.fh]
            assert isinstance(handle.node, FuseFile | FuseBuffer)
            self._end_read(request.unique, await handle.node.answer_read(handle, read.offset, read.size))
        except OSError as error:
            self._end_read(request.unique, error=-(error.errno or errno.EIO))

    def _end_read(self, unique: int, content: bytes = b"", error: int = 0) -> None:
        """Answer a read that was not answered yet. One that is interrupted goes on for nobody."""
        if unique in self._reading:
            self._reading.discard(unique)
            self._write_out(encode_answer(unique, content, error))

    def _lookup(self, request: Request) -> bytes:
        directory, name = self._nodes[request.node], decode_name(request.body)
        assert isinstance(directory, FuseDirectory)
        if name not in directory.children:
            raise _failure(errno.ENOENT)
        return encode_entry(directory.children[name].attr)

    def _set_attr(self, request: Request) -> bytes:
        if changes_owner_or_mode(request.body):
            raise _failure(errno.EPERM)
        return encode_attr(self._nodes[request.node].attr)

    def _read_link(self, request: Request) -> bytes:
        link = self._nodes[request.node]
        assert isinstance(link, FuseLink)
        return os.fsencode(link.target)

    def _open(self, request: Request) -> bytes:
        node = self._nodes[request.node]
        way = decode_open(request.body) & os.O_ACCMODE
        for refused, needed in ((os.O_WRONLY, READABLE), (os.O_RDONLY, WRITABLE)):
            if isinstance(node, FuseFile | FuseBuffer) and way != refused and not node.attr.mode & needed:
                raise _failure(errno.EACCES)
        self._opened += 1
        self._handles[self._opened] = Handle(node)
        return encode_open(self._opened)

    def _read_directory(self, request: Request) -> bytes:
        read = decode_read(request.body)
        directory = self._handles[read.fh].node
        assert isinstance(directory, FuseDirectory)
        return encode_entries(directory.entries(), read.offset, read.size)

    def _write(self, request: Request) -> bytes:
        write = decode_write(request.body)
        node = self._handles[write.fh].node
        assert isinstance(node, FuseFile | FuseBuffer)
        return encode_written(node.answer_write(write.offset, write.data))

    def _release(self, request: Request) -> bytes:
        del self._handles[decode_handle(request.body)]
        return b""

    def close(self) -> None:
        """Answer no more: who still waits is told what Linux says when a device goes away."""
        for unique in list(self._reading):
            self._end_read(unique, error=-errno.ENODEV)
        os.close(self.fd)
        for node in self._nodes.values():
            if isinstance(node, FuseBuffer):
                os.close(node.fd)


def _files(directory: FuseDirectory, path: PurePosixPath) -> Iterator[str]:
    for name, node in directory.children.items():
        if isinstance(node, FuseDirectory):
            yield from _files(node, path / name)
        elif not isinstance(node, FuseLink):
            yield str(path / name)


def _failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _check(result: int) -> None:
    """Raises `OSError` if `result` is a negative errno."""
    if result < 0:
        raise _failure(-result)


@contextlib.asynccontextmanager
async def open_fuse_tree(root: Path) -> AsyncIterator[FuseTree]:
    """A tree mounted on the directory `root`, served until the block ends. Nobody here may touch files under `root`.

    Raises `OSError` if it cannot be mounted.
    """
    tree = FuseTree(mount(root))
    try:
        async with trio.open_nursery() as tree.nursery:
            tree.nursery.start_soon(tree.serve)
            yield tree
            tree.nursery.cancel_scope.cancel()
    finally:
        tree.close()
        detach(root)
