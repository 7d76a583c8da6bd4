"""States that no instruction refuses and that are mistakes all the same: what the architecture leaves undefined when
a VMCS or VMXON region is shared between processors, or used before its first VMCLEAR.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from .lp import VmxMode
from .unit import VmxUnit
from .vmcs import LaunchState


class Suspicion(enum.StrEnum):
    """What is wrong with a region."""

    NEVER_CLEARED = "active without a VMCLEAR before the first VMPTRLD"
    CORRUPTED = "was active across a VMXOFF"
    ACTIVE_TWICE = "VMCS active on several processors"
    VMXON_TWICE = "VMXON region of several processors"
    VMXON_ACTIVE = "VMXON region of a processor, active as a VMCS"


class Finding(msgspec.Struct, frozen=True, order=True):
    """A suspicion about the region at `pa`, and the processors that have to do with it."""

    pa: int
    suspicion: Suspicion
    cpus: tuple[int, ...]


def find_suspicions(units: Mapping[int, VmxUnit]) -> list[Finding]:
    """Every suspicious region of the processors `units`, in order of address."""
    active: dict[int, list[int]] = {}
    vmxon: dict[int, list[int]] = {}
    findings = []
    for cpu, unit in units.items():
        if unit.mode is not VmxMode.OUTSIDE:
            vmxon.setdefault(unit.vmxon_ptr, []).append(cpu)
        for pa, vmcs in unit.active.items():
            active.setdefault(pa, []).append(cpu)
            if vmcs.launch is LaunchState.UNKNOWN:
                findings.append(Finding(pa, Suspicion.NEVER_CLEARED, (cpu,)))
            elif vmcs.launch is LaunchState.CORRUPTED:
                findings.append(Finding(pa, Suspicion.CORRUPTED, (cpu,)))
    findings += [Finding(pa, Suspicion.ACTIVE_TWICE, tuple(cpus)) for pa, cpus in active.items() if len(cpus) > 1]
    findings += [Finding(pa, Suspicion.VMXON_TWICE, tuple(cpus)) for pa, cpus in vmxon.items() if len(cpus) > 1]
    findings += [
        Finding(pa, Suspicion.VMXON_ACTIVE, tuple({*vmxon[pa], *cpus})) for pa, cpus in active.items() if pa in vmxon
    ]
    return sorted(findings)
