"""Knobs of the kernel side on live machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm.compose import parse_knobs
from kvm.machine import Machine
from kvm.topology import Topology

CELLS = [
    ("save-restore", ["call_context=irq"], set()),
    ("clear-current-vmcs", ["call_context=irq"], {"I3"}),
    ("save-restore", ["call_context=irq", "nmi_inject=in-seam"], {"I3", "I13"}),
    ("save-restore", ["call_context=task", "nmi_inject=in-seam"], set()),
    ("save-restore", ["call_context=nmi"], {"I22"}),
    ("clear-current-vmcs", ["preemption=none"], set()),
    ("clear-current-vmcs", ["preemption=lazy", "vmxon_owner=kvm"], set()),
]


def said(value: str | tuple[str, ...] | set[str]) -> str:
    """A part of the name of a test: in one order, since the tests may run in several processes."""
    return value if isinstance(value, str) else "-".join(sorted(value)) or "safe"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "settings", "broken"), CELLS, ids=said)
async def test_a_knob_decides_on_processes_too(
    strategy: str, settings: list[str], broken: set[str], tmp_path: Path
) -> None:
    """What a knob makes of a strategy on stepped machines it makes of it on a machine of processes."""
    topology = Topology(cpus=3, vcpus=4, updates=1, seconds=0.6, strategy=strategy, knobs=parse_knobs(settings),
                        run_dir=str(tmp_path / "run"))  # fmt: skip
    async with Machine(topology) as machine:
        assert await machine.run_workload()
    judgement = machine.check()
    assert {v.invariant for v in judgement.violations if not v.follows_from} == broken
    assert judgement.verdict == ("unsafe" if broken else "safe")
