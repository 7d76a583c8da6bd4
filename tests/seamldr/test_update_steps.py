"""The module update, stage by stage, on stepped machines: what each first failure leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from errno import EINVAL, EIO, ENODEV
from random import Random
from typing import Any

import pytest

from bus.memory import PAGE_SIZE
from cpu.core import SeamReply, SeamTrap
from cpu.cpu import Cpu
from cpu.layout import BUFFERS, KERNEL, TDX_STATE, UPDATE_CTRL, per_cpu
from kvm.stepped import Stepped, module
from seamldr.arbiter import SteppedArbiter
from seamldr.image import build_v2
from seamldr.status import SeamldrLeaf
from seamldr.tdx_leaves import TdhLeaf
from seamldr.update import (
    FIELD_MODULE_HV,
    VERSION_FIELDS,
    ModuleUpdateState,
    read_module_version,
    seamldr_install_module,
    seamldr_version_show,
    tdx_cpu_enable,
    version_text,
    version_word,
)

CPUS = 3
IMAGE, PARAMS, INFO = BUFFERS + 0x20_0000, BUFFERS + 0x10_0000, BUFFERS + 0x11_0000
NO_ENTROPY = 0x8000_0203_0000_0000
REFUSED = 0xC000_0100_0000_0000
STAGES = ["SHUTDOWN", "CPU_INSTALL", "CPU_INIT", "RUN_UPDATE", "DONE"]


@functools.cache
def image() -> bytes:
    """The module that machines update to."""
    return build_v2(module("1.5.09"))


class FailingArbiter(SteppedArbiter):
    """A SEAM side that refuses some calls: `fails` is (CPU, leaf, first operand or None) to the status it answers."""

    def __init__(self, stepped: Stepped) -> None:
        super().__init__(stepped.machine, stepped.seam)
        self.fails: dict[tuple[int | None, int, int | None], int] = {}
        self.times = 1 << 30
        self._pending: dict[int, int] = {}

    def seam_enter(self, cpu: int, request: SeamTrap) -> SeamReply | None:
        for (who, leaf, operand), status in self.fails.items():
            if request.rax == leaf and who in (cpu, None) and operand in (None, request.registers[1]) and self.times:
                self.times -= 1
                return SeamReply(True, status, request.registers)
        return super().seam_enter(cpu, request)


class Updating(Stepped):
    """A machine of some CPUs with an image in memory."""

    def __init__(self, cpus: int = CPUS, strategy: str = "vmclear-local", **knobs: Any) -> None:
        super().__init__(strategy, cpus=cpus, **knobs)
        self.failing = self.arbiter = FailingArbiter(self)
        self.memory.write(IMAGE, image())

    def update(self, schedule: int | Callable[[list[int]], int] = 0, data: bytes | None = None) -> int:
        """One update by a worker on CPU 0, under a schedule that is given or made from a seed; its errno."""
        if data is not None:
            self.memory.write(IMAGE, data)
        length = len(image() if data is None else data)
        pages = tuple(range(IMAGE, IMAGE + max(length, PAGE_SIZE), PAGE_SIZE))
        worker = self.start(lambda cpu: seamldr_install_module(cpu, pages, length, PARAMS), name="kworker")
        self.machine.run(Random(schedule).choice if isinstance(schedule, int) else schedule)
        result: int = worker.result
        return result

    def kernel(self) -> tuple[int, str]:
        """What the kernel believes: `initialized`, and the version."""
        initialized, version = (self.memory.load(word)[0] for word in (TDX_STATE.initialized, TDX_STATE.version))
        return initialized, version_text(version)

    def said(self, event: str, *fields: str) -> list[tuple[Any, ...]]:
        """Some fields of all records of an event."""
        return [tuple(record[field] for field in fields) for record in self.events(event)]


# Success


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_a_good_update(cpus: int) -> None:
    """Every CPU goes through all stages in order; the new version is there, and all CPUs are initialized."""
    stepped = Updating(cpus)
    assert stepped.update() == 0
    assert stepped.kernel() == (1, "1.5.09")
    assert stepped.said("module_init_flag", "initialized", "version") == [(0, "1.5.08"), (1, "1.5.09")]
    assert stepped.said("state_advance", "state") == [(name,) for name in [*STAGES[1:], "END"]]
    for number in range(cpus):
        entered = [r["state"] for r in stepped.events("state_enter", cpu=number)]
        assert entered == [r["state"] for r in stepped.events("ack", cpu=number)] == STAGES
        assert stepped.memory.load(per_cpu(number).lp_initialized)[0] == 1
    assert stepped.run(read_module_version) == version_word(1, 5, 9)
    assert stepped.count("update_begin") == stepped.count("update_end", ret=0) == 1


def test_who_makes_which_call() -> None:
    """SHUTDOWN and UPDATE by the lead alone, SYS.INIT by one CPU, INSTALL and LP.INIT by every CPU once."""
    for seed in range(10):
        stepped = Updating()
        assert stepped.update(seed) == 0
        made: dict[str, list[str]] = {}
        for record in stepped.events("seamcall_enter"):
            made.setdefault(record["name"], []).append(record["node"])
        everybody = [f"cpu{number}" for number in range(CPUS)]
        assert made["TDH.SYS.SHUTDOWN"] == made["TDH.SYS.UPDATE"] == ["cpu0"]
        assert sorted(made["SEAMLDR.INSTALL"]) == sorted(made["TDH.SYS.LP.INIT"]) == everybody
        assert len(made["TDH.SYS.INIT"]) == 1


def test_nobody_works_ahead() -> None:
    """Under any schedule, a CPU starts a stage only after all have acknowledged the one before; acks count up."""
    for seed in range(15):
        stepped = Updating()
        assert stepped.update(seed) == 0
        acks: dict[str, int] = {}
        for record in stepped.events("state_enter", "ack"):
            state = record["state"]
            if record["event"] == "ack":
                acks[state] = acks.get(state, 0) + 1
                assert (record["num_ack"], record["num_failed"], record["ret"]) == (acks[state], 0, 0)
            elif state != STAGES[0]:
                assert acks[STAGES[STAGES.index(state) - 1]] == CPUS, seed
        assert acks == dict.fromkeys(STAGES, CPUS)


def test_updates_follow_each_other() -> None:
    """The next update is number 2 and starts from the beginning."""
    stepped = Updating()
    assert stepped.update() == 0
    assert stepped.update(data=build_v2(module("1.5.13"))) == 0
    assert stepped.kernel() == (1, "1.5.13")
    assert stepped.said("update_begin", "update", "online") == [(1, [0, 1, 2]), (2, [0, 1, 2])]


def test_entropy_that_runs_out_for_a_while_is_no_failure() -> None:
    """A module leaf that has no entropy is executed again."""
    stepped = Updating()
    stepped.failing.fails = {(None, TdhLeaf.TDH_SYS_INIT, None): NO_ENTROPY}
    stepped.failing.times = 9
    assert stepped.update() == 0
    attempts = [r["attempt"] for r in stepped.events("seamcall_enter") if r["name"] == "TDH.SYS.INIT"]
    assert attempts == list(range(1, 11))


# The first failure in each stage

Fails = tuple[int | None, int, int | None]
FAILURES: dict[str, tuple[Fails, str, tuple[int, str]]] = {
    "SHUTDOWN: handoff version unreadable": (
        (0, TdhLeaf.TDH_SYS_RD, FIELD_MODULE_HV), "SHUTDOWN", (1, "1.5.08"),
    ),
    "SHUTDOWN: leaf refused": ((0, TdhLeaf.TDH_SYS_SHUTDOWN, None), "SHUTDOWN", (1, "1.5.08")),
    "CPU_INSTALL: on the lead": ((0, SeamldrLeaf.INSTALL, None), "CPU_INSTALL", (0, "1.5.08")),
    "CPU_INSTALL: on another": ((2, SeamldrLeaf.INSTALL, None), "CPU_INSTALL", (0, "1.5.08")),
    "CPU_INSTALL: everywhere": ((None, SeamldrLeaf.INSTALL, None), "CPU_INSTALL", (0, "1.5.08")),
    "CPU_INIT: TDH.SYS.INIT": ((None, TdhLeaf.TDH_SYS_INIT, None), "CPU_INIT", (0, "1.5.08")),
    "CPU_INIT: TDH.SYS.LP.INIT on one": ((1, TdhLeaf.TDH_SYS_LP_INIT, None), "CPU_INIT", (0, "1.5.08")),
    "RUN_UPDATE": ((0, TdhLeaf.TDH_SYS_UPDATE, None), "RUN_UPDATE", (0, "1.5.08")),
}  # fmt: skip


@pytest.mark.parametrize("fails, stage, kernel", FAILURES.values(), ids=FAILURES.keys())
def test_the_first_failure(fails: Fails, stage: str, kernel: tuple[int, str]) -> None:
    """The update ends with -EIO, never passes the stage, frees every CPU, and leaves what the outcome table says."""
    for seed in range(6):
        stepped = Updating()
        stepped.failing.fails = {fails: REFUSED}
        assert stepped.update(seed) == -EIO
        assert stepped.kernel() == kernel
        assert stepped.memory.load(UPDATE_CTRL.state)[0] == ModuleUpdateState[stage]
        assert not any(r["state"] in STAGES[STAGES.index(stage) + 1 :] for r in stepped.events("state_enter"))
        failed = [r for r in stepped.events("ack") if r["ret"]]
        assert failed and all((r["state"], r["ret"]) == (stage, -EIO) for r in failed)
        assert stepped.memory.load(UPDATE_CTRL.num_failed)[0] == len(failed)
        assert stepped.memory.load(UPDATE_CTRL.num_ack)[0] == sum(r["state"] == stage for r in stepped.events("ack"))
        assert stepped.said("update_end", "ret") == [(-EIO,)]
        assert all(stepped.cpu(number).irqs_on for number in range(CPUS))


@pytest.mark.parametrize("fails, stage, kernel", FAILURES.values(), ids=FAILURES.keys())
def test_what_a_later_update_does(fails: Fails, stage: str, kernel: tuple[int, str]) -> None:
    """After a failure in SHUTDOWN the next update succeeds; after any later one it fails in SHUTDOWN, harmlessly."""
    stepped = Updating()
    stepped.failing.fails = {fails: REFUSED}
    assert stepped.update() == -EIO
    stepped.failing.fails = {}
    again = stepped.update()
    if stage == "SHUTDOWN":
        assert (again, stepped.kernel()) == (0, (1, "1.5.09"))
    else:
        assert again in (-EIO, -ENODEV) and stepped.kernel() == kernel
        assert stepped.memory.load(UPDATE_CTRL.state)[0] == ModuleUpdateState.SHUTDOWN


@pytest.mark.parametrize("choose, installed", [(min, ["cpu0", "cpu1"]), (max, ["cpu0", "cpu1", "cpu2"])])
def test_a_cpu_may_leave_without_having_installed(choose: Callable[[list[int]], int], installed: list[str]) -> None:
    """Who installs before a failure is seen depends on timing: the slow ones see it and leave."""
    stepped = Updating()
    stepped.failing.fails = {(0, SeamldrLeaf.INSTALL, None): REFUSED}
    assert stepped.update(choose) == -EIO
    calls = [r["node"] for r in stepped.events("seamcall_enter") if r["name"] == "SEAMLDR.INSTALL"]
    assert sorted(calls) == installed


def test_a_failed_init_is_remembered_for_all() -> None:
    """TDH.SYS.INIT is executed once; the others get its errno without a call of their own."""
    for seed in range(8):
        stepped = Updating()
        stepped.failing.fails = {(None, TdhLeaf.TDH_SYS_INIT, None): REFUSED}
        stepped.update(seed)
        assert stepped.count("seamcall_enter", name="TDH.SYS.INIT") == 1
        assert stepped.run(tdx_cpu_enable, 1) == -EIO
        assert stepped.count("seamcall_enter", name="TDH.SYS.INIT") == 1


def test_an_offline_cpu_makes_the_update_fail_after_the_point_of_no_return() -> None:
    """P-SEAMLDR waits for every LP: with one offline INSTALL succeeds on the others, and TDH.SYS.INIT finds nothing."""
    stepped = Updating()
    stepped.memory.store(per_cpu(2).online, 0, 1)
    assert stepped.update() == -ENODEV
    assert stepped.kernel() == (0, "1.5.08")
    assert stepped.said("update_begin", "online") == [([0, 1],)]
    assert {r["state"] for r in stepped.events("ack") if r["ret"]} == {"CPU_INIT"}
    assert ("virt/tdx: module not loaded",) in stepped.said("log", "text")


def test_an_unreadable_new_version_does_not_fail_the_update() -> None:
    """The kernel warns once, and the update has succeeded all the same."""
    stepped = Updating()
    stepped.failing.fails = {(0, TdhLeaf.TDH_SYS_RD, VERSION_FIELDS[1]): REFUSED}
    assert stepped.update() == 0
    assert stepped.kernel() == (1, "0.0.00")
    assert stepped.said("warn", "text") == [("the version of the new TDX module cannot be read",)]


# Before it begins


def test_with_the_gate_nothing_begins() -> None:
    """On a CPU with the erratum and `enforce_gate` on, -EINVAL before any SEAMCALL; on a fixed CPU it goes on."""
    stepped = Updating(enforce_gate="on")
    assert stepped.update() == -EINVAL
    assert stepped.count("seamcall_enter") == stepped.count("update_begin") == 0
    assert stepped.said("update_refused", "errno") == [(-EINVAL,)] and stepped.count("warn") == 1
    assert Updating(enforce_gate="on", vmx_basic_bit60=1).update() == 0


@pytest.mark.parametrize("damage", ["short", "long", "version", "signature", "reserved", "header only half there"])
def test_a_bad_container_is_refused_before_it_begins(damage: str) -> None:
    """The kernel's framing checks are -EINVAL, and the running module is not touched."""
    blob = bytearray(image())
    if damage == "version":
        blob[0] ^= 1
    elif damage == "signature":
        blob[4] ^= 1
    elif damage == "reserved":
        blob[100] = 1
    data = {
        "short": bytes(blob[:-PAGE_SIZE]),
        "long": bytes(blob) + bytes(PAGE_SIZE),
        "header only half there": bytes(blob[:2000]),
    }.get(damage, bytes(blob))
    stepped = Updating()
    assert stepped.update(data=data) == -EINVAL
    assert stepped.kernel() == (1, "1.5.08") and stepped.count("seamcall_enter") == 0
    assert stepped.said("update_refused", "errno") == [(-EINVAL,)]
    assert stepped.update(data=image()) == 0


def test_the_checksum_is_not_the_kernels_business() -> None:
    """A wrong checksum passes the kernel; what it should have caught P-SEAMLDR catches: the module is lost."""
    blob = bytearray(image())
    blob[-1] ^= 1
    stepped = Updating()
    assert stepped.update(data=bytes(blob)) == -EIO
    assert stepped.kernel() == (0, "1.5.08")
    statuses = {r["status"] for r in stepped.events("seamcall_return") if r["name"] == "SEAMLDR.INSTALL"}
    assert statuses & {0x8000_0000_0002_0001}


# seamldr_version


def test_reading_the_version_of_p_seamldr() -> None:
    """SEAMLDR.INFO, and three numbers of it as text."""
    assert Updating(1).run(lambda cpu: seamldr_version_show(cpu, INFO)) == (0, "1.5.02")


def test_a_failed_read_has_no_text() -> None:
    """The errno of the call is the errno of the read."""
    stepped = Updating(1)
    stepped.failing.fails = {(None, SeamldrLeaf.INFO, None): 0x8000_0000_0000_0000}
    assert stepped.run(lambda cpu: seamldr_version_show(cpu, INFO)) == (-EIO, "")


def test_a_structure_of_another_version_is_not_understood() -> None:
    """A SEAMLDR_INFO whose version is not 0 is -EIO."""
    stepped = Updating(1)
    stepped.failing.fails = {(None, SeamldrLeaf.INFO, None): 0}
    stepped.memory.write32(INFO, 1)
    assert stepped.run(lambda cpu: seamldr_version_show(cpu, INFO)) == (-EIO, "")


def test_versions_as_words_and_as_text() -> None:
    """sysfs shows the update number with two digits."""
    words = [version_word(1, 5, 8), version_word(2, 0, 16), version_word(0, 0, 0)]
    assert [version_text(word) for word in words] == ["1.5.08", "2.0.16", "0.0.00"]


def test_an_enabled_cpu_is_not_enabled_again() -> None:
    """tdx_cpu_enable does nothing where lp_initialized is set."""
    stepped = Updating(1)

    async def enable(cpu: Cpu) -> int:
        return await tdx_cpu_enable(cpu)

    assert stepped.run(enable) == 0 and stepped.count("seamcall_enter") == 0
    assert stepped.memory.load(KERNEL.next_update)[0] == 0
