"""The launcher's side of the parent: ask it for processes, watch each by its pidfd, end them step by step."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import trio

from bus.spec import MachineSpec
from cpu.forkserver import MAX_REQUEST, Exited, Spawn, Spawned, answers

PARENT = "import sys; sys.path.insert(0, sys.argv[1]); from kvm.parent import main; main(int(sys.argv[2]), sys.argv[3])"
PARENT_END_S = 5.0


class Process:
    """One process of the machine, as the launcher knows it."""

    def __init__(self, node: str, incarnation: int, pid: int, pidfd: int) -> None:
        self.node = node
        self.incarnation = incarnation
        self.pid = pid
        self.pidfd = pidfd
        self.online = trio.Event()
        self.stopped = trio.Event()
        self.gone = trio.Event()
        self.status: int | None = None
        self.wanted = False

    def signal(self, number: int) -> None:
        """Send a signal to this very process, never to another that got its pid."""
        if not self.gone.is_set():
            signal.pidfd_send_signal(self.pidfd, number)

    def __repr__(self) -> str:
        state = "gone" if self.gone.is_set() else "online" if self.online.is_set() else "starting"
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
        self.exits: dict[int, int] = {}

    async def spawn(self, spec: MachineSpec, role: str, node: str, incarnation: int) -> None:
        """Ask for a process; `receive` brings it."""
        await self._sock.send(msgspec.json.encode(Spawn(role, node, incarnation, spec)))

    async def receive(self) -> Process | Exited | None:
        """The next process that was made or has ended; None if the parent itself is gone."""
        try:
            data, rights, _, _ = await self._sock.recvmsg(MAX_REQUEST, socket.CMSG_SPACE(4))
        except OSError:
            return None
        if not data:
            return None
        answer = answers.decode(data)
        if isinstance(answer, Spawned):
            fds = array.array("i")
            fds.frombytes(rights[0][2])
            return Process(answer.node, answer.incarnation, answer.pid, fds[0])
        return answer

    async def close(self) -> None:
        """Hang up: the parent kills what is left, cleans up and leaves; wait for that."""
        self._sock.close()
        with trio.CancelScope(shield=True), trio.move_on_after(PARENT_END_S):
            while self._popen.poll() is None:
                await trio.sleep(0.005)
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()


def close_pidfd(process: Process) -> None:
    """Forget a process that is gone."""
    if process.pidfd >= 0:
        os.close(process.pidfd)
        process.pidfd = -1
