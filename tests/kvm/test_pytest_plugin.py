"""The pytest plugin, used as a stranger would: in a test suite of its own, and here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from kvm.machine import Machine

SUITE = """
import pytest, trio

@pytest.mark.trio
@pytest.mark.machine(cpus=3, vcpus=3, updates=1, seconds=0.3)
async def test_strangers(machine):
    await machine.run_workload()
    await machine.end()
    print("SIZE", machine.spec.cpus, machine.spec.strategy, machine.check().verdict)
"""


@pytest.mark.machine(cpus=2, vcpus=2, updates=0, seconds=0.3)
async def test_the_fixture_is_a_machine(machine: Machine) -> None:
    """Every process is online; user space can be told what to do; after `end` the records can be judged."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        assert await machine.update() == 0
    await machine.end()
    assert machine.check().verdict == "safe"
    assert all(process.gone.is_set() for process in machine.processes.values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "SIZE 3 clear-current-vmcs safe"),
        (["--seamlab-cpus=2", "--seamlab-strategy=none"], "SIZE 2 none unsafe"),
    ],
    ids=["marker", "options"],
)
def test_a_suite_of_somebody_else(tmp_path: Path, options: list[str], expected: str) -> None:
    """The marker says what machine it is, and the options of the command line win over it."""
    (tmp_path / "test_strange.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
