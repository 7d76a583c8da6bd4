"""What every process of a machine is told when it is forked."""

from __future__ import annotations

from typing import Any

import msgspec

LAUNCHER = "launcher"
SEAMLDR = "seamldr"
KVM = "kvm"


class Workload(msgspec.Struct, frozen=True):
    """What user space does. Times in nanoseconds.

    `guest_ns` is how long a guest runs between two groups of VM exits; `residence_ns` how long a call stays in
    P-SEAMLDR; `action_ns` the mean time between two things that the KVM process does; `grace_ns` how long nothing may
    move after the planned end before the machine counts as stuck.
    """

    duration_ns: int
    updates: int
    guest_ns: int
    residence_ns: int = 300_000
    action_ns: int = 20_000_000
    grace_ns: int = 10_000_000_000


class MemberState(msgspec.Struct, frozen=True):
    """What a process that starts late has to know of another: its incarnation, and whether it is alive."""

    node: str
    incarnation: int
    alive: bool


class MachineSpec(msgspec.Struct, frozen=True):
    """One machine. Directories are absolute; `memory_fd` is inherited; `images` are version 2 files, one an update.

    `sysfs` is the directory for the files of the update's user interface, empty for none; `fuse`: as a mount. `members`
    are those that are not alive in their first incarnation at the time of the fork, which was after Lamport time
    `clock`. `buffers` are the physical addresses, first and past the last, of what user space may hand to the kernel.
    """

    run_dir: str
    socket_dir: str
    key: bytes
    memory_fd: int
    cpus: int
    vcpus: int
    tds: int
    strategy: str
    knobs: dict[str, Any]
    seed: int
    trace: bool
    workload: Workload
    boot_image: str
    images: tuple[str, ...]
    trusted_signers: tuple[str, ...]
    sysfs: str = ""
    fuse: bool = False
    members: tuple[MemberState, ...] = ()
    clock: int = 0
    buffers: tuple[int, int] = (0, 0)

    def cpu_nodes(self) -> list[str]:
        """Names of the CPUs' processes."""
        return [f"cpu{number}" for number in range(self.cpus)]

    def nodes(self) -> list[str]:
        """Names of all processes on the bus but the launcher."""
        return [SEAMLDR, KVM, *self.cpu_nodes()]


def cpu_number(node: str) -> int | None:
    """The CPU number of a node "cpuN", None for other nodes.

    >>> cpu_number("cpu12"), cpu_number("kvm")
    (12, None)
    """
    digits = node.removeprefix("cpu")
    return int(digits) if node.startswith("cpu") and digits.isascii() and digits.isdigit() else None
