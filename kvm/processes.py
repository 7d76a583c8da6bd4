"""The launcher's side of the parent: ask it for processes, watch each by its pidfd, end them step by step."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

from bus.spec import MachineSpec, MemberState
from cpu.forkserver import MAX_REQUEST, Answer, Begin, Spawn, answers

PARENT = "import sys; sys.path.insert(0, sys.argv[1]); from kvm.parent import main; main(int(sys.argv[2]), sys.argv[3])"
PARENT_END_S = 5.0
FILES_PER_PROCESS = 3
"""Descriptors in the launcher for each process: a pidfd, a socket and that socket's mailbox."""
FILES_SPARE = 100


class Process:
    """One process of the machine, as the launcher knows it. It has a pid and a pidfd once it is `born`."""

    def __init__(self, node: str, incarnation: int) -> None:
        self.node = node
        self.incarnation = incarnation
        self.pid = 0
        self.pidfd = -1
        self.born = trio.Event()
        self.hello = False
        self.totals: dict[str, int] | None = None
        """What it counted, if it came to its end in good order."""
        self.exited = trio.Event()
        """Its parent has reaped it: `status` is known."""
        self.gone = trio.Event()
        """It is dead, reaped, and on record as such."""
        self.status = 0
        self.wanted = False
        """It was asked to go: its end is no event of the machine."""
        self.dead = False
        """Its pidfd has fired; others may have been told. It is `gone` when its status is known, too."""
        self.doomed = False
        """It is killed on purpose; the machine goes on without it."""

    def bear(self, pid: int, pidfd: int) -> None:
        """The parent has made it."""
        self.pid, self.pidfd = pid, pidfd
        self.born.set()

    def exit(self, status: int) -> None:
        """The parent says how it ended, or is gone itself."""
        if not self.exited.is_set():
            self.status = status
            self.exited.set()

    @property
    def online(self) -> bool:
        """It was made, said hello and has not ended."""
        return self.born.is_set() and self.hello and not self.gone.is_set()

    @property
    def settled(self) -> bool:
        """Nobody need wait for it: it is online, or was killed on purpose."""
        return self.online or (self.doomed and self.gone.is_set())

    def signal(self, number: int) -> None:
        """Send a signal to this very process, never to another that got its pid."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def is_stopped(self) -> bool:
        """Whether it stands still by SIGSTOP."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def forget(self) -> None:
        """Close the pidfd."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __repr__(self) -> str:
        state = "gone" if self.gone.is_set() else "online" if self.online else "starting"
        return f"<Process {self.node}.{self.incarnation} pid {self.pid} {state}>"


class Parent:
    """The fork server as a child of this process."""

    def __init__(self, socket_dir: str, memory_fd: int, log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST)
        root = str(Path(__file__).resolve().parent.parent)
        arguments = [sys.executable, "-c", PARENT, root, str(theirs.fileno()), socket_dir]
        with log.open("ab") as errors:
            self._popen = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[theirs.fileno(), memory_fd],
                start_new_session=True,
            )
        theirs.close()
        self._sock = trio.socket.from_stdlib_socket(ours)
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid)

    @property
    def alive(self) -> bool:
        """Whether the parent still runs. When a process has died of its parent's death, this is already False."""
        return self._popen.poll() is None

    async def begin(self, spec: MachineSpec) -> None:
        """Describe the machine; before the first `spawn`. Raises OSError if the parent is gone, as `spawn` does."""
        await self._sock.send(msgspec.json.encode(Begin(spec)))

    async def spawn(
        self, role: str, node: str, incarnation: int, members: tuple[MemberState, ...], clock: int
    ) -> None:
        """Ask for a process that starts among `members` after Lamport time `clock`; `receive` brings the answer."""
        await self._sock.send(msgspec.json.encode(Spawn(role, node, incarnation, members, clock)))

    async def receive(self) -> tuple[Answer, int] | None:
        """What the parent says next, with the pidfd if it made a process (-1 if there is none); None if it is gone."""
        try:
            data, rights, _, _ = await self._sock.recvmsg(MAX_REQUEST, socket.CMSG_SPACE(4))
        except OSError:
            return None
        if not data:
            return None
        fds = array.array("i")
        for _, _, received in rights:
            fds.frombytes(received)
        return answers.decode(data), fds[0] if fds else -1

    async def close(self) -> None:
        """Hang up: the parent kills what is left, cleans up and leaves; wait for that."""
        self._sock.close()
        with trio.CancelScope(shield=True), trio.move_on_after(PARENT_END_S):
            await trio.lowlevel.wait_readable(self._pidfd)
        os.close(self._pidfd)
        if self.alive:
            self._popen.kill()
        self._popen.wait()


@contextlib.contextmanager
def enough_files(processes: int) -> Iterator[bool]:
    """Raise the soft limit of open files for a machine of that many processes; False if the hard limit forbids it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_PER_PROCESS * processes + FILES_SPARE
    if hard != resource.RLIM_INFINITY and hard < wanted:
        yield False
        return
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield True
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
