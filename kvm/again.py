"""The command line that makes a run once more, so that others can see what it showed."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from bus.records import Record
from kvm.compose import Knobs
from kvm.topology import Topology

PLAN = "plan.toml"
"""In the run directory of a machine that was struck by faults: the whole machine and its faults."""


def command(machine: Record, run_dir: Path) -> str:
    """One line for the shell: what the record `machine_begin` tells, as far as it is not the default.

    A live machine does not repeat itself event by event; what it showed under one seed it will show again if it is not
    very rare. Empty if no record describes the machine.
    """
    if (run_dir / PLAN).exists():
        return shlex.join(["seamlab", "chaos", _short(run_dir / PLAN)])
    if not machine:
        return ""
    usual = Topology()
    cpus, vcpus, tds, updates = (int(machine[name]) for name in ("cpus", "vcpus", "tds", "updates"))
    words = ["seamlab", "run", "--strategy", str(machine["strategy"]), "--seed", str(machine["seed"])]
    words += ["--cpus", str(cpus)] if cpus != usual.cpus else []
    words += ["--vcpus", str(vcpus)] if vcpus != 2 * cpus else []
    words += ["--tds", str(tds)] if tds != usual.tds else []
    words += ["--updates", str(updates)] if updates != usual.updates else []
    for name, value in machine["knobs"].items():
        words += ["--knob", f"{name}={value}"] if value != getattr(Knobs(), name, None) else []
    return shlex.join(words)


def _short(path: Path) -> str:
    """Relative to where we are, if it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
