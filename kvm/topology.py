"""What a user asks for: sizes, strategy, knobs, workload; checked, and made into the spec of a machine."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import msgspec

from bus.spec import MachineSpec, Workload
from cpu.layout import BUFFERS, BUFFERS_END
from kvm.compose import Knobs
from kvm.images import Images
from kvm.sysfs import check_sysfs_dir
from seamldr.strategies import DEFAULT, find_strategy

MAX_CPUS = 1024
MAX_VCPUS = 4096
MAX_TDS = 64
MAX_UPDATES = 1000
EXITS_PER_SECOND = 1500
"""Groups of VM exits that all CPUs together make in a second: what two cores can serve without falling behind."""


class TopologyError(ValueError):
    """The topology cannot be built; the message says what is allowed."""


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. `module` is an image file for the updates, made on the spot if None; `seconds` the length of the
    workload; `sysfs` a new or empty directory for the files of the update's user interface, if wanted; `fuse`: they
    are a mount of FUSE.
    """

    cpus: int = 4
    vcpus: int = 8
    tds: int = 0
    updates: int = 2
    seconds: float = 2.0
    strategy: str = DEFAULT
    knobs: Knobs = Knobs()
    seed: int = 1
    module: str | None = None
    run_dir: str | None = None
    trace: bool = False
    residence_us: int = 300
    grace_s: float = 10.0
    sysfs: str | None = None
    fuse: bool = False

    def validate(self) -> None:
        """Raises `TopologyError` or `StrategyError`."""
        for name, value, low, high in (
            ("cpus", self.cpus, 1, MAX_CPUS),
            ("vcpus", self.vcpus, 0, MAX_VCPUS),
            ("tds", self.tds, 0, MAX_TDS),
            ("updates", self.updates, 0, MAX_UPDATES),
        ):
            if not low <= value <= high:
                raise TopologyError(f"{name} is {low} to {high}, not {value}")
        if not 0.1 <= self.seconds <= 86400:
            raise TopologyError(f"seconds is 0.1 to 86400, not {self.seconds:g}")
        if self.vcpus + self.tds == 0:
            raise TopologyError("a machine needs at least one vCPU or TD")
        find_strategy(self.strategy)
        if self.sysfs is not None:
            check_sysfs_dir(Path(self.sysfs), fuse=self.fuse)
        elif self.fuse:
            raise TopologyError("--fuse needs a directory: --sysfs DIR")

    def make_run_dir(self) -> Path:
        """Create the directory for records and summary, for its owner alone; raises `TopologyError` if it is in use."""
        if self.run_dir is None:
            path = _fresh(Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{_slug(self.strategy)}")
        else:
            path = Path(self.run_dir)
        if (path / "records").exists():
            raise TopologyError(f"run directory {path} holds the records of another run; name a new one")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_uid != os.geteuid():
                raise TopologyError(f"run directory {path} belongs to another user")
            path.chmod(0o700)
            (path / "records").mkdir(mode=0o700)
        except OSError as error:
            raise TopologyError(f"run directory {path} cannot be made: {error.strerror}") from None
        return path.resolve()


def parse_topology(text: str) -> int:
    """LPs of a topology like "2s8c2t" (sockets, cores, threads); raises `TopologyError`.

    >>> parse_topology("2s8c2t")
    32
    """
    match = re.fullmatch(r"([0-9]{1,3})s([0-9]{1,3})c([0-9]{1,2})t", text)
    if match is None:
        raise TopologyError(f"topology {text!r} is not like 2s8c2t (sockets, cores each, threads each)")
    sockets, cores, threads = (int(part) for part in match.groups())
    return sockets * cores * threads


def machine_images(topology: Topology, run_dir: Path) -> Images:
    """The module images of a run, made and signed, or read and reframed, under `run_dir`; raises `ModuleFileError`."""
    return Images(
        run_dir / "modules",
        planned=topology.updates,
        profile="B" if topology.knobs.module_profile == "B" else "A",
        loader=topology.knobs.seamldr_profile,
        fms=topology.knobs.fms,
        given=topology.module,
        upload=topology.sysfs is not None,
    )


def machine_spec(
    topology: Topology, run_dir: Path, socket_dir: str, key: bytes, memory_fd: int, images: Images
) -> MachineSpec:
    """The spec of a machine that has these module images."""
    seconds = topology.seconds
    workload = Workload(
        duration_ns=int(seconds * 1e9),
        updates=topology.updates,
        guest_ns=max(300_000, topology.cpus * 1_000_000_000 // EXITS_PER_SECOND),
        residence_ns=topology.residence_us * 1000,
        action_ns=max(20_000_000, topology.cpus * 1_000_000),
        grace_ns=int(topology.grace_s * 1e9),
    )
    strategy = topology.strategy
    path, colon, function = strategy.rpartition(":")
    return MachineSpec(
        run_dir=str(run_dir),
        socket_dir=socket_dir,
        key=key,
        memory_fd=memory_fd,
        cpus=topology.cpus,
        vcpus=topology.vcpus,
        tds=topology.tds,
        strategy=f"{Path(path).resolve()}:{function}" if colon else strategy,
        knobs=msgspec.structs.asdict(topology.knobs),
        seed=topology.seed,
        trace=topology.trace,
        workload=workload,
        boot_image=images.boot,
        images=images.planned,
        trusted_signers=images.signers,
        sysfs=str(Path(topology.sysfs).resolve()) if topology.sysfs is not None else "",
        fuse=topology.fuse,
        buffers=(BUFFERS, BUFFERS_END),
    )


def _slug(strategy: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", Path(strategy).name).strip("-")[:40]


def _fresh(path: Path) -> Path:
    number = 1
    while True:
        candidate = path.with_name(f"{path.name}-{number}")
        if not candidate.exists():
            return candidate
        number += 1
