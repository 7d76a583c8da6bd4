"""The parent of all processes of a machine: a fresh, single-threaded interpreter that forks them on request.

It is started first, on one end of a socketpair. The first message describes the machine, each further one asks for a
process; the answer carries the child's pidfd, so that the launcher watches the very process that was made. The parent
reaps its children and says how each ended. When the launcher is gone, however it went, the socketpair reads EOF: the
parent then kills its children, waits for them, clears away what they left, removes the directory of their sockets and
leaves. Each child asks to be killed when the parent dies.
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
from time import monotonic, sleep

import msgspec
import trio
import zmq

from bus.spec import MachineSpec, MemberState

PR_SET_PDEATHSIG = 1
MAX_REQUEST = 1 << 20
ALONE_S = 5.0
"""How long the threads of the warm-up may take to be gone."""

Role = Callable[[MachineSpec, str, int], None]
CleanUp = Callable[[MachineSpec], None]


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The launcher to the parent, once: this is the machine whose processes will be asked for."""

    spec: MachineSpec


class Spawn(msgspec.Struct, frozen=True, tag="spawn"):
    """The launcher to the parent: fork `node` in the role given, into a machine of which not all are in their first
    incarnation (`members`), after Lamport time `clock`.
    """

    role: str
    node: str
    incarnation: int
    members: tuple[MemberState, ...] = ()
    clock: int = 0


class Spawned(msgspec.Struct, frozen=True, tag="spawned"):
    """The parent to the launcher: the process is there; its pidfd comes with this message."""

    node: str
    incarnation: int
    pid: int


class NotSpawned(msgspec.Struct, frozen=True, tag="not_spawned"):
    """The parent to the launcher: the operating system refused to fork."""

    node: str
    incarnation: int
    why: str


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """The parent to the launcher: the process is gone and reaped; `status` is negative for a signal."""

    node: str
    incarnation: int
    pid: int
    status: int


Answer = Spawned | NotSpawned | Exited

_requests: msgspec.json.Decoder[Begin | Spawn] = msgspec.json.Decoder(Begin | Spawn)
answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)
_libc = ctypes.CDLL(None, use_errno=True)


def warm_up() -> None:
    """Do once what every child will do, so that it need not; leaves no thread and no zmq context behind."""

    async def nothing() -> None:
        await trio.lowlevel.checkpoint()

    trio.run(nothing)
    context = zmq.Context()
    context.socket(zmq.PULL).close()
    context.term()
    _be_alone()
    gc.collect()
    gc.freeze()


def _be_alone() -> None:
    """Wait until this thread is the only one: one that was joined may be in /proc for a moment longer."""
    deadline = monotonic() + ALONE_S
    while (threads := len(os.listdir("/proc/self/task"))) != 1:
        if monotonic() > deadline:
            raise RuntimeError(f"the parent has {threads} threads and may not fork")
        sleep(0.001)


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL when the parent dies; leave at once if it died before."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class ForkServer:
    """The parent's loop."""

    def __init__(self, sock: socket.socket, roles: dict[str, Role], socket_dir: str, clean_up: CleanUp) -> None:
        self.sock = sock
        self.roles = roles
        self.socket_dir = socket_dir
        self.clean_up = clean_up
        self.spec: MachineSpec | None = None
        self.children: dict[int, Spawn] = {}
        self.launcher_gone = False
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
            self._serve(_requests.decode(request))
        return not self.launcher_gone

    def _serve(self, request: Begin | Spawn) -> None:
        if isinstance(request, Begin):
            self.spec = request.spec
            return
        try:
            self._fork(request)
        except OSError as error:
            self._answer(NotSpawned(request.node, request.incarnation, error.strerror or str(error)))

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
        self._answer(answer, (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd])))
        os.close(pidfd)

    def _answer(self, answer: Answer, *rights: tuple[int, int, array.array[int]]) -> None:
        try:
            self.sock.sendmsg([msgspec.json.encode(answer)], rights)
        except OSError:
            self.launcher_gone = True

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
            assert self.spec is not None
            spec = msgspec.structs.replace(self.spec, members=request.members, clock=request.clock)
            self.roles[request.role](spec, request.node, request.incarnation)
            status = 0
        except BaseException as error:  # noqa: BLE001 - the end of a process: say what happened and leave
            traceback.print_exc()
            print(f"{request.node}: {_in_short(error)}", file=sys.stderr, flush=True)
        os._exit(status)

    def _reap(self) -> None:
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            request = self.children.pop(pid)
            self._answer(Exited(request.node, request.incarnation, pid, os.waitstatus_to_exitcode(status)))

    def _clean_up(self) -> None:
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for pid in list(self.children):
            os.waitpid(pid, 0)
        if self.spec is not None:
            self.clean_up(self.spec)
        shutil.rmtree(self.socket_dir, ignore_errors=True)


def _in_short(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def main(fd: int, roles: dict[str, Role], socket_dir: str, clean_up: CleanUp) -> None:
    """Serve on the inherited socket `fd`; `clean_up` is called when no process of the machine is left."""
    sock = socket.socket(fileno=fd)
    warm_up()
    ForkServer(sock, roles, socket_dir, clean_up).serve()
