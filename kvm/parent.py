"""Entry point of the parent that forks a machine's processes: which role runs which code."""

from __future__ import annotations

from pathlib import Path

import cpu.process
import kvm.process
import seamldr.service
from bus.spec import MachineSpec
from cpu import forkserver
from kvm.personality import personality
from kvm.sysfs import clear


def cpu_role(spec: MachineSpec, node: str, incarnation: int) -> None:
    """The process of one CPU, with the kernel of this machine."""
    cpu.process.main(spec, node, incarnation, personality(spec))


ROLES: dict[str, forkserver.Role] = {
    "cpu": cpu_role,
    "seamldr": seamldr.service.main,
    "kvm": kvm.process.main,
}


def clean_up(spec: MachineSpec) -> None:
    """Leave no file of the machine under its `sysfs`, nor a mount."""
    if spec.sysfs:
        clear(Path(spec.sysfs))


def main(fd: int, socket_dir: str) -> None:
    """Serve the launcher at the other end of the inherited socket `fd`."""
    forkserver.main(fd, ROLES, socket_dir, clean_up)
