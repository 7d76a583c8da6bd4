"""The parent of all processes of a machine: a fresh, single-threaded interpreter that forks them on request.

It is started first, on one end of a socketpair. Each request is one JSON message; the answer carries the child's
pidfd, so that the launcher watches the very process that was made. The parent reaps its children and says how each
ended. When the launcher is gone, however it went, the socketpair reads EOF: the parent then kills its children, waits
for them, removes the directory of their sockets and leaves. Each child asks to be killed when the parent dies.
"""

from __future__ import annotations

import array
import ctypes
import gc
import os
import select
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import msgspec
import trio
import zmq

from bus.spec import MachineSpec

PR_SET_PDEATHSIG = 1
MAX_REQUEST = 1 << 20

Role = Callable[[MachineSpec, str, int], None]


class Spawn(msgspec.Struct, frozen=True, tag="spawn"):
    """The launcher to the parent: fork `node` in the role given."""

    role: str
    node: str
    incarnation: int
    spec: MachineSpec


class Spawned(msgspec.Struct, frozen=True, tag="spawned"):
    """The parent to the launcher: the process is there; its pidfd comes with this message."""

    node: str
    incarnation: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """The parent to the launcher: the process is gone and reaped; `status` is negative for a signal."""

    node: str
    incarnation: int
    pid: int
    status: int


_requests = msgspec.json.Decoder(Spawn)
answers: msgspec.json.Decoder[Spawned | Exited] = msgspec.json.Decoder(Spawned | Exited)


def warm_up() -> None:
    """Do once what every child will do, so that it need not; leaves no thread and no zmq context behind."""

    async def nothing() -> None:
        await trio.sleep(0)

    trio.run(nothing)
    context = zmq.Context()
    context.socket(zmq.PULL).close()
    context.term()
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"the parent has {len(threads)} threads and may not fork")
    gc.collect()
    gc.freeze()


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL when the parent dies; leave at once if it died before."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class ForkServer:
    """The parent's loop."""

    def __init__(self, sock: socket.socket, roles: dict[str, Role], socket_dir: str) -> None:
        self.sock = sock
        self.roles = roles
        self.socket_dir = socket_dir
        self.children: dict[int, Spawn] = {}
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Until the launcher is gone."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(self.wake_read, select.POLLIN)
        try:
            while self._turn(poll.poll()):
                pass
        finally:
            self._clean_up()

    def _turn(self, events: list[tuple[int, int]]) -> bool:
        ready = {fd for fd, _ in events}
        if self.wake_read in ready:
            os.read(self.wake_read, 4096)
            self._reap()
        if self.sock.fileno() in ready:
            request = self._request()
            if not request:
                return False
            self._fork(_requests.decode(request))
        return True

    def _request(self) -> bytes:
        """The next request; nothing if the launcher is gone, however it went."""
        try:
            return self.sock.recv(MAX_REQUEST)
        except ConnectionError:
            return b""

    def _fork(self, request: Spawn) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._child(request, parent)
        self.children[pid] = request
        pidfd = os.pidfd_open(pid)
        answer = Spawned(request.node, request.incarnation, pid)
        self._answer(answer, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))])
        os.close(pidfd)

    def _answer(self, answer: Spawned | Exited, rights: list[tuple[int, int, array.array[int]]]) -> None:
        try:
            self.sock.sendmsg([msgspec.json.encode(answer)], rights)
        except OSError:
            return  # the launcher is gone: the next receive says so

    def _child(self, request: Spawn, parent: int) -> None:
        """Never returns: the process of one node."""
        status = 1
        try:
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self.sock.close()
            os.close(self.wake_read)
            os.close(self.wake_write)
            self.roles[request.role](request.spec, request.node, request.incarnation)
            status = 0
        except BaseException:  # noqa: BLE001 - the last line of a process: say what happened and leave
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)

    def _reap(self) -> None:
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            request = self.children.pop(pid)
            self._answer(Exited(request.node, request.incarnation, pid, os.waitstatus_to_exitcode(status)), [])

    def _clean_up(self) -> None:
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for pid in list(self.children):
            os.waitpid(pid, 0)
        shutil.rmtree(self.socket_dir, ignore_errors=True)


def main(fd: int, roles: dict[str, Role], socket_dir: str) -> None:
    """Serve on the inherited socket `fd`."""
    sock = socket.socket(fileno=fd)
    warm_up()
    ForkServer(sock, roles, socket_dir).serve()
