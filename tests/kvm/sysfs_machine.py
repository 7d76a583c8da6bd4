"""A machine with the files of the update's interface, in a launcher of its own, and what clients do with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from live import runs

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = Path(__file__).resolve().parent / "clients"
PATIENCE_S = 30
READY = "images are in"


class Live:
    """A machine that runs until it is interrupted, and the directory with its files."""

    def __init__(self, base: Path, *arguments: str) -> None:
        self.root = base / "sys"
        self.run_dir = base / "run"
        command = [sys.executable, str(ROOT / "launcher.py"), "run", "--json", *arguments]
        self.process = subprocess.Popen(
            [*command, "--sysfs", str(self.root), "--run-dir", str(self.run_dir)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()
        assert READY in self.said, self.said + self.process.stderr.read()

    def image(self, number: int, version: int = 2) -> Path:
        """One of the images that the machine trusts, as either container."""
        return self.run_dir / "modules" / (f"update-{number}.bin" if version == 2 else f"update-{number}.v1.bin")

    def node(self, name: str) -> Path:
        """An upload node."""
        return self.root / "class/firmware" / name

    def device(self, name: str) -> str:
        """An attribute of the device."""
        return (self.root / "devices/faux/tdx_host" / name).read_text().strip()

    def shell(self, node: str, image: Path, seconds: int = PATIENCE_S) -> tuple[int, dict[str, list[str]]]:
        """The shell client: its exit status and what it said."""
        command = ["sh", str(CLIENTS / "upload.sh"), str(self.root), node, str(image), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
        assert done.stderr == ""
        told: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            key, _, value = line.partition(": ")
            told.setdefault(key.rstrip(":"), []).append(value)
        return done.returncode, told

    def python(self, node: str, image: Path, seconds: int = PATIENCE_S) -> tuple[int, dict[str, Any]]:
        """The Python client: its exit status and what it found."""
        command = [sys.executable, str(CLIENTS / "upload.py"), str(self.root), str(image), str(seconds), node]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout) if done.stdout else {}

    def interrupt(self, number: int = signal.SIGINT) -> tuple[int, dict[str, Any]]:
        """Ctrl-C, or another signal: exit status and summary."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=2 * PATIENCE_S)
        return self.process.returncode, json.loads(out)

    def records(self, node: str, event: str) -> list[dict[str, Any]]:
        """Records of a process."""
        lines = (self.run_dir / "records" / f"{node}.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == event]

    def pid(self, node: str) -> int:
        """Process id of a CPU."""
        return int(self.records(node, "cpu_online")[0]["pid"])


class Remnants:
    """What must be gone after the end of a machine that runs now."""

    def __init__(self, machine: Live) -> None:
        self.root = machine.root
        self.sockets = Path(last_argument(machine.pid("cpu0")))
        self.pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and self._is_of_it(int(name))]
        assert self.sockets.is_dir() and len(self.pids) > 4

    def _is_of_it(self, pid: int) -> bool:
        try:
            return last_argument(pid) == str(self.sockets)
        except (FileNotFoundError, ProcessLookupError):
            return False

    def are_gone(self) -> bool:
        """Whether no process, socket or file is left."""
        return not (any(map(runs, self.pids)) or self.sockets.exists() or self.root.exists())


@contextmanager
def live(base: Path, *arguments: str) -> Iterator[Live]:
    """A machine that is gone after the block."""
    machine = Live(base, *arguments)
    try:
        yield machine
    finally:
        if machine.process.poll() is None:
            machine.process.terminate()
            machine.process.wait(PATIENCE_S)
        for stream in (machine.process.stdout, machine.process.stderr):
            assert stream is not None
            stream.close()


def last_argument(pid: int) -> str:
    """Of the program that a process runs; for those of a machine it is the directory of their sockets."""
    return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")[-1])
