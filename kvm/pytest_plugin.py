"""A pytest plugin: the fixture `machine`, a live machine for one test.

    @pytest.mark.machine(cpus=4, vcpus=8, seconds=1.0)
    async def test_it(machine):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.run_workload)
            ...
        await machine.end()
        assert machine.check().verdict == "safe"

The marker takes the fields of `kvm.topology.Topology`; `--seamlab-cpus` and `--seamlab-strategy` win over it, so that
one suite can be run on machines of several sizes and under several strategies. Records are under pytest's tmp_path.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_trio  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from kvm.machine import Machine


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the fixture."""
    group = parser.getgroup("seamlab", "live machines of Seamlab")
    group.addoption("--seamlab-cpus", type=int, metavar="N", help="CPUs of the fixture `machine`")
    group.addoption("--seamlab-strategy", metavar="NAME|FILE.py:FUNCTION", help="strategy of the fixture `machine`")


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line("markers", "machine(**topology): sizes, strategy and knobs of the fixture `machine`")


@pytest_trio.trio_fixture  # type: ignore[untyped-decorator]
async def machine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Machine]:
    """A live machine, every process online; after the test none is left, whatever the test did."""
    from kvm.machine import Machine
    from kvm.topology import Topology

    marker = request.node.get_closest_marker("machine")
    settings: dict[str, Any] = {"run_dir": str(tmp_path / "run")} | (marker.kwargs if marker else {})
    for name in ("cpus", "strategy"):
        value = request.config.getoption(f"--seamlab-{name}")
        if value is not None:
            settings[name] = value
    topology = Topology(**settings)
    topology.validate()
    async with Machine(topology) as one:
        yield one
