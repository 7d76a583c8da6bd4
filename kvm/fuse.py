"""The kernel's side of FUSE: requests and answers as bytes, and mounting.

We speak the protocol of /dev/fuse ourselves (Linux, include/uapi/linux/fuse.h, version 7): of the Python libraries for
it none comes as a wheel that needs no libfuse. Only what a tree of small files needs is here; `kvm.fuse_tree` serves.
"""

from __future__ import annotations

import array
import ctypes
import enum
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Iterable
from errno import EACCES, EINVAL, ENOTCONN, EPERM, EPROTO
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

DEVICE_FILE = "/dev/fuse"
HELPER = "fusermount3"
TYPE = "fuse.seamlab"
MAJOR, MINOR = 7, 31
PAGE = 4096
MAX_WRITE = 2 * PAGE
"""Bytes of a write that the kernel hands over at once: more than sysfs takes, so that a longer write can be short."""
LARGEST_REQUEST = 1 << 16
VALID_S = 3600
"""How long the kernel may keep a name or attributes: they do not change."""
ROOT = 1
"""Number of the root directory."""
FOPEN_DIRECT_IO, FOPEN_NOFLUSH = 1, 32
FATTR_OWNER_OR_MODE = 0b111
MS_NOSUID, MS_NODEV, MS_NOEXEC, MNT_DETACH, UMOUNT_NOFOLLOW = 2, 4, 8, 2, 8


class Opcode(enum.IntEnum):
    """Requests that are answered, or of which the errno matters; what is not here is -ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    RENAME2 = 45


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.DESTROY})
REFUSED: dict[int, int] = {
    Opcode.MKNOD: EACCES,
    Opcode.CREATE: EACCES,
    Opcode.SYMLINK: EPERM,
    Opcode.MKDIR: EPERM,
    Opcode.UNLINK: EPERM,
    Opcode.RMDIR: EPERM,
    Opcode.RENAME: EPERM,
    Opcode.RENAME2: EPERM,
    Opcode.LINK: EPERM,
}
"""What nobody can do in sysfs."""

_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_VALID = struct.Struct("=QI4x")
_OPEN_IN = struct.Struct("=II")
_OPEN_OUT = struct.Struct("=QI4x")
_IO_IN = struct.Struct("=QQIIQI4x")
_WRITE_OUT = struct.Struct("=I4x")
_FH = struct.Struct("=Q")
_WORD = struct.Struct("=I")
_DIRENT = struct.Struct("=QQII")
_STATFS = struct.Struct("=QQQQQIII28x")


class ProtocolError(OSError):
    """A request that is shorter than its kind, or of another protocol."""

    def __init__(self, why: str) -> None:
        super().__init__(EPROTO, why)


class Request(msgspec.Struct, frozen=True):
    """One request: what is asked (`opcode`, maybe none that we know), about which node, and the rest as bytes."""

    opcode: int
    unique: int
    node: int
    body: bytes = b""


class ReadIn(msgspec.Struct, frozen=True):
    """`size` bytes from `offset`, through the handle `fh`."""

    fh: int
    offset: int
    size: int


class WriteIn(msgspec.Struct, frozen=True):
    """`data` at `offset`, through the handle `fh`."""

    fh: int
    offset: int
    data: bytes


class Attr(msgspec.Struct, frozen=True):
    """What stat(2) shows of a node: number, type and mode as `st_mode`, size in bytes."""

    number: int
    mode: int
    size: int = 0


class Entry(msgspec.Struct, frozen=True):
    """A name in a directory."""

    name: str
    number: int
    mode: int


# Requests


def _unpack(form: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) < form.size:
        raise ProtocolError(f"{len(data)} bytes where {form.size} are needed")
    return form.unpack_from(data)


def decode_request(data: bytes) -> Request:
    """What was read from /dev/fuse; raises `ProtocolError`."""
    length, opcode, unique, node, *_ = _unpack(_IN, data)
    if length != len(data):
        raise ProtocolError(f"a request of {length} bytes came as {len(data)}")
    return Request(opcode, unique, node, data[_IN.size :])


def decode_name(body: bytes) -> str:
    """The name of a LOOKUP."""
    return os.fsdecode(body.partition(b"\0")[0])


def decode_read(body: bytes) -> ReadIn:
    """A READ or READDIR; raises `ProtocolError`."""
    fh, offset, size, *_ = _unpack(_IO_IN, body)
    return ReadIn(fh, offset, size)


def decode_write(body: bytes) -> WriteIn:
    """A WRITE; raises `ProtocolError`."""
    fh, offset, size, *_ = _unpack(_IO_IN, body)
    data = body[_IO_IN.size :]
    if len(data) != size:
        raise ProtocolError(f"a write of {size} bytes has {len(data)}")
    return WriteIn(fh, offset, data)


def decode_open(body: bytes) -> int:
    """The flags of an OPEN, as for open(2); raises `ProtocolError`."""
    return _unpack(_OPEN_IN, body)[0]


def decode_handle(body: bytes) -> int:
    """The handle of a RELEASE or RELEASEDIR, and the request that an INTERRUPT is about; raises `ProtocolError`."""
    return _unpack(_FH, body)[0]


def changes_owner_or_mode(body: bytes) -> bool:
    """Whether a SETATTR is more than a truncation or a time; raises `ProtocolError`."""
    return bool(_unpack(_WORD, body)[0] & FATTR_OWNER_OR_MODE)


# Answers


def encode_answer(unique: int, payload: bytes = b"", error: int = 0) -> bytes:
    """What is written to /dev/fuse: `payload`, or only `error`, which is 0 or a negative errno."""
    payload = b"" if error else payload
    return _OUT.pack(_OUT.size + len(payload), error, unique) + payload


def encode_init(body: bytes) -> bytes:
    """The answer to INIT: our version, no option, small writes; raises `ProtocolError` if the kernel's is older."""
    major, minor, max_readahead, _ = _unpack(_INIT_IN, body)
    if (major, minor) < (MAJOR, MINOR):
        raise ProtocolError(f"the kernel speaks FUSE {major}.{minor}, older than {MAJOR}.{MINOR}")
    return _INIT_OUT.pack(MAJOR, MINOR, max_readahead, 0, 0, 0, MAX_WRITE, 1, 0, 0, 0)


def _attr(attr: Attr) -> bytes:
    links = 2 if stat.S_ISDIR(attr.mode) else 1
    times = (0,) * 6
    return _ATTR.pack(attr.number, attr.size, 0, *times, attr.mode, links, os.geteuid(), os.getegid(), 0, PAGE, 0)


def encode_entry(attr: Attr) -> bytes:
    """The answer to LOOKUP."""
    return _ENTRY.pack(attr.number, 0, VALID_S, VALID_S, 0, 0) + _attr(attr)


def encode_attr(attr: Attr) -> bytes:
    """The answer to GETATTR and SETATTR."""
    return _VALID.pack(VALID_S, 0) + _attr(attr)


def encode_open(fh: int) -> bytes:
    """The answer to OPEN and OPENDIR: each read and write comes to us as it was made, and a close waits for nothing."""
    return _OPEN_OUT.pack(fh, FOPEN_DIRECT_IO | FOPEN_NOFLUSH)


def encode_written(count: int) -> bytes:
    """The answer to WRITE."""
    return _WRITE_OUT.pack(count)


def encode_entries(entries: Iterable[Entry], offset: int, size: int) -> bytes:
    """The answer to READDIR: as many entries as fit into `size` bytes, from the one at index `offset`."""
    found = b""
    for at, entry in enumerate(entries):
        name = os.fsencode(entry.name)
        one = _DIRENT.pack(entry.number, at + 1, len(name), stat.S_IFMT(entry.mode) >> 12) + name
        one += bytes(-len(one) % 8)
        if at >= offset:
            if len(found) + len(one) > size:
                break
            found += one
    return found


def encode_statfs() -> bytes:
    """The answer to STATFS: no block at all, as in sysfs."""
    return _STATFS.pack(0, 0, 0, 0, 0, PAGE, 255, PAGE)


# Mounting

_libc = ctypes.CDLL(None, use_errno=True)


def mount(root: Path) -> int:
    """Mount on the directory `root`, for the caller alone; the descriptor that requests come from, non-blocking.

    By mount(2), or by fusermount3 if that is not permitted. Raises `OSError`.
    """
    try:
        return _mount_directly(root)
    except PermissionError:
        helper = shutil.which(HELPER)
        if helper is None:
            raise
        return _mount_by(helper, root)


def _mount_directly(root: Path) -> int:
    fd = os.open(DEVICE_FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={fd},rootmode=40755,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    if _libc.mount(b"seamlab", os.fsencode(root), TYPE.encode(), ctypes.c_ulong(flags), options.encode()) < 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise OSError(code, os.strerror(code))
    return fd


def _mount_by(helper: str, root: Path) -> int:
    """The helper mounts, and sends the descriptor through a socket that we name to it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [helper, "-o", "default_permissions,noexec,fsname=seamlab,subtype=seamlab", "--", str(root)],
            env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        theirs.close()
        _, rights, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    fds = array.array("i")
    for _, _, received in rights:
        fds.frombytes(received)
    if done.returncode or not fds:
        said = " ".join(done.stderr.split())
        raise PermissionError(EPERM, said or f"{HELPER} has not mounted")
    os.set_blocking(fds[0], False)
    os.set_inheritable(fds[0], False)
    return fds[0]


def try_mount() -> None:
    """Raises `OSError` if nothing can be mounted."""
    with TemporaryDirectory() as place:
        try:
            os.close(mount(Path(place)))
        finally:
            detach(Path(place).resolve())


def is_disconnected(root: Path) -> bool:
    """Whether something is mounted on `root` that nobody serves any more."""
    try:
        os.listdir(root)  # a stat may be answered from what the kernel has kept
    except OSError as error:
        return error.errno == ENOTCONN
    return False


def detach(root: Path) -> None:
    """Unmount what a machine has mounted on `root`, an absolute path without links, whether it is served or not.

    Nothing of other file systems there. Waits for nobody: the files are not looked at.
    """
    for _ in range(mounts_on(root)):
        if _libc.umount2(os.fsencode(root), MNT_DETACH | UMOUNT_NOFOLLOW) == 0:
            continue
        helper = shutil.which(HELPER)
        if ctypes.get_errno() == EINVAL or helper is None:
            return
        subprocess.run([helper, "-u", "-z", "-q", "--", str(root)], capture_output=True, check=False)


def mounts_on(root: Path) -> int:
    """How many of our mounts are on `root`."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return sum(_is_ours(line, os.fsencode(root)) for line in lines)


def _is_ours(line: bytes, root: bytes) -> bool:
    """Whether a line of /proc/self/mountinfo (proc(5)) says that a tree of ours is at `root`."""
    place, _, kind = line.partition(b" - ")
    return kind.split()[0] == TYPE.encode() and _unescape(place.split()[4]) == root


def _unescape(path: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path)
