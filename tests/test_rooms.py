"""Who may import whom: the rooms of the project, and what kernel code and cores stay clear of."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL_ROOMS = frozenset({"bus", "cpu", "seamldr", "kvm"})
MAY_IMPORT = {
    "bus": frozenset({"bus"}),
    "cpu": frozenset({"bus", "cpu"}),
    "seamldr": frozenset({"bus", "cpu", "seamldr"}),
    "kvm": ALL_ROOMS,
}
"""A room and what of ours it may import; `launcher.py` alone may import everything, and nobody imports it."""

KERNEL_CODE = (
    "cpu/cpu.py",
    "cpu/hotplug_lock.py",
    "cpu/irq_work.py",
    "cpu/lists.py",
    "cpu/nmi_watchdog.py",
    "cpu/mutex.py",
    "cpu/ops_vmx.py",
    "cpu/rcu.py",
    "cpu/smp.py",
    "cpu/softlockup.py",
    "cpu/stop_machine.py",
    "kvm/emergency.py",
    "kvm/guest.py",
    "kvm/hardware.py",
    "kvm/hotplug.py",
    "kvm/loaded_vmcs.py",
    "kvm/lost.py",
    "kvm/nested.py",
    "kvm/perf.py",
    "kvm/run_queue.py",
    "kvm/td_build.py",
    "kvm/td_destroy.py",
    "kvm/td_ioctl.py",
    "kvm/tdx.py",
    "kvm/vcpu.py",
    "kvm/virt.py",
    "kvm/vmcs_setup.py",
    "kvm/vmx.py",
    "seamldr/api.py",
    "seamldr/call.py",
    "seamldr/mutants.py",
    "seamldr/seamcall.py",
    "seamldr/strategies.py",
    "seamldr/tdx_host.py",
    "seamldr/update.py",
    "seamldr/update_v3.py",
)
CORES = (
    "bus/clock.py",
    "bus/columns.py",
    "bus/events.py",
    "bus/link.py",
    "bus/linkfaults.py",
    "bus/markdown.py",
    "bus/messages.py",
    "bus/peers.py",
    "bus/queries.py",
    "bus/spec.py",
    "bus/summary_words.py",
    "cpu/apic.py",
    "cpu/board.py",
    "cpu/core.py",
    "cpu/layout.py",
    "cpu/loop.py",
    "cpu/migration.py",
    "cpu/stepped.py",
    "cpu/struct.py",
    "cpu/watch.py",
    "cpu/watchdog.py",
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "cpu/vmx").glob("*.py")
        if path.stem not in ("__main__", "bench")
    ),
    "kvm/compose.py",
    "kvm/observer.py",
    "kvm/pages.py",
    "kvm/requests.py",
    "kvm/tasks.py",
    "kvm/workload.py",
    "seamldr/arbiter.py",
    "seamldr/cleanup.py",
    "seamldr/elf.py",
    "seamldr/gate.py",
    "seamldr/identity.py",
    "seamldr/image.py",
    "seamldr/install.py",
    "seamldr/journal.py",
    "seamldr/leaves.py",
    "seamldr/lock_board.py",
    "seamldr/lock_queue.py",
    "seamldr/lock_recovery.py",
    "seamldr/manifest.py",
    "seamldr/pseamldr.py",
    "seamldr/range_writer.py",
    "seamldr/seam.py",
    "seamldr/seam_store.py",
    "seamldr/sigstruct.py",
    "seamldr/state.py",
    "seamldr/status.py",
    "seamldr/step_memory.py",
    "seamldr/tdx_module.py",
    "seamldr/tdx_state.py",
    "seamldr/upload.py",
    "seamldr/verdict.py",
)
SHELL_LIBRARIES = frozenset({"trio", "zmq", "structlog", "rich"})
OUTSIDE_WORLD = frozenset({"asyncio", "datetime", "logging", "os", "secrets", "signal", "socket", "subprocess",
                           "threading", "time", "uuid"})  # fmt: skip


def sources(room: str) -> list[Path]:
    """All Python files of a room."""
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports anywhere in it, with its full dotted name."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *((node.module,) if node.module else ())))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def top(module: str) -> str:
    """The package that a module belongs to."""
    return module.split(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_down_the_table_only(room: str) -> None:
    """A room imports of ours only what is below it, and no room imports the launcher or the tests."""
    assert len(sources(room)) > 3
    forbidden = (ALL_ROOMS | {"launcher", "tests"}) - MAY_IMPORT[room]
    wrong = [(path.name, name) for path in sources(room) for name in imported(path) if top(name) in forbidden]
    assert wrong == []


def test_there_are_no_other_rooms() -> None:
    """Code at the top level is in the four rooms, the launcher and the tests, nowhere else."""
    ours = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "build"]
    assert {path.name for path in ours if any(path.rglob("*.py"))} <= ALL_ROOMS | {"tests", "docs"}
    assert [path.name for path in ROOT.glob("*.py")] == ["launcher.py"]


@pytest.mark.parametrize("path", KERNEL_CODE + CORES)
def test_kernel_code_and_cores_do_not_touch_the_outside_world(path: str) -> None:
    """Kernel code and cores import no shell library, no clock, no operating system."""
    assert {top(name) for name in imported(ROOT / path)} & (SHELL_LIBRARIES | OUTSIDE_WORLD) == set()


def test_kernel_code_and_cores_have_no_randomness_of_their_own() -> None:
    """Of the module `random` they use at most `Random`, made from a seed that somebody hands in."""
    for path in KERNEL_CODE + CORES:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "random":
                assert node.attr == "Random", f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("random.Random", "Random"):
                assert node.args, f"{path}:{node.lineno} makes a generator without a seed"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_importing_a_room_starts_no_shell(room: str) -> None:
    """The `__init__` files import nothing but cores of their own room."""
    modules = {path.removesuffix(".py").replace("/", ".") for path in CORES}
    for path in sources(room):
        if path.name == "__init__.py":
            for name in imported(path):
                assert name.rpartition(".")[0] in modules | {"__future__"}, f"{path} imports {name}"


def test_no_shell_library_is_loaded_along_with_kernel_code_and_cores() -> None:
    """A process that imports all kernel code and cores has loaded neither trio, zmq, structlog nor rich."""
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in KERNEL_CODE + CORES]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    found = sorted(set(sys.argv[1].split()) & set(sys.modules))\n"
        "    assert not found, f'{name} loads {found}'\n"
    )
    command = [sys.executable, "-c", code, " ".join(sorted(SHELL_LIBRARIES | {"launcher"})), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

