"""Conformance rows 114 to 128: image files that a user uploads, on stepped machines: errno, and what is left."""

from __future__ import annotations

from errno import EINVAL, EIO, ENODEV
from typing import Any

import pytest
from test_image_container import KERNEL_REFUSES

from cpu.layout import BUFFERS, TDX_STATE, per_cpu
from kvm.stepped import Stepped, module
from seamldr.image import PAGE, ModuleImage, build_v2
from seamldr.status import Flow, SeamldrStatus
from seamldr.tdx_leaves import TdhLeaf
from seamldr.update import seamldr_install_module, seamldr_version_show, version_text
from seamldr.upload import Support

IMAGE, PARAMS, INFO = BUFFERS + 0x20_0000, BUFFERS + 0x10_0000, BUFFERS + 0x11_0000
CPUS = 3
GOOD = module("1.5.09")
TDX_SYS_SHUTDOWN = 0xC000_0506_0000_0000


class Uploading(Stepped):
    """A machine to which files are uploaded."""

    def __init__(self, strategy: str = "vmclear-local", **knobs: Any) -> None:
        super().__init__(strategy, cpus=CPUS, **knobs)

    def upload(self, blob: bytes) -> int:
        """What the kernel makes of a file: the errno."""
        self.memory.write(IMAGE, blob)
        pages = tuple(range(IMAGE, IMAGE + max(len(blob), 2 * PAGE), PAGE))
        result: int = self.run(lambda cpu: seamldr_install_module(cpu, pages, len(blob), PARAMS))
        return result

    def running(self) -> tuple[int, str]:
        """What the kernel believes: whether TDX is initialized, and the version."""
        initialized, version = (self.memory.load(word)[0] for word in (TDX_STATE.initialized, TDX_STATE.version))
        return initialized, version_text(version)

    def statuses(self, name: str) -> list[int]:
        """What SEAM answered to the calls of a leaf, in order."""
        return [r["status"] for r in self.events("seamcall_return") if r["name"] == name]

    def module_status(self) -> int | None:
        """RAX of a module leaf on CPU 1; None if the SEAMCALL is VMfailInvalid."""
        registers = (0,) * 13
        reply = self.run(lambda cpu: cpu.seamcall(TdhLeaf.TDH_SYS_KEY_CONFIG, registers, name="TDH.SYS.KEY.CONFIG"), 1)
        return reply.rax if reply.entered else None


@pytest.mark.conformance("Image files")
@pytest.mark.parametrize("blob", [blob for blob, _ in KERNEL_REFUSES.values()], ids=KERNEL_REFUSES.keys())
def test_refused_by_the_kernel(blob: bytes) -> None:
    """-EINVAL before any SEAMCALL: the module runs on, and a good file is still taken."""
    machine = Uploading()
    running = machine.module_status()
    machine.machine.records.clear()
    assert machine.upload(blob) == -EINVAL
    assert machine.running() == (1, "1.5.08")
    assert machine.count("seamcall_enter") == machine.count("update_begin") == 0
    assert machine.module_status() == running
    assert machine.upload(build_v2(GOOD)) == 0


@pytest.mark.conformance("Image files", 122)
def test_a_wrong_checksum_is_taken() -> None:
    """Nobody looks at the checksum of the container."""
    machine = Uploading()
    blob = bytearray(build_v2(GOOD))
    blob[2:4] = b"\x55\xaa"
    assert machine.upload(bytes(blob)) == 0
    assert machine.running() == (1, "1.5.09")


LATE = {
    "row-124": (ModuleImage(GOOD.sigstruct, b""), SeamldrStatus.EBADPARAM),
    "row-125": (ModuleImage(b"", GOOD.module), SeamldrStatus.EBADSIG),
}


@pytest.mark.conformance("Image files")
@pytest.mark.parametrize(("image", "status"), LATE.values(), ids=LATE.keys())
def test_refused_by_the_last_install(image: ModuleImage, status: SeamldrStatus) -> None:
    """A file without pages of one kind costs the running module: it is shut down when INSTALL refuses."""
    machine = Uploading()
    assert machine.upload(build_v2(image)) == -EIO
    assert machine.statuses("SEAMLDR.INSTALL") == [0] * (CPUS - 1) + [status]
    assert machine.running() == (0, "1.5.08")
    assert machine.module_status() == TDX_SYS_SHUTDOWN
    assert f"SEAMCALL (0x8000000000000001) failed: {status:#018x}" in machine.events("log")[-1]["text"]


@pytest.mark.conformance("Image files", 126)
@pytest.mark.parametrize("at", [0, PAGE + 17, len(GOOD.module) - 1])
def test_a_corrupted_module(at: int) -> None:
    """The hash is looked at when the old module is gone already."""
    machine = Uploading()
    blob = bytearray(build_v2(GOOD))
    blob[2 * PAGE + at] ^= 0x10
    assert machine.upload(bytes(blob)) == -EIO
    assert machine.statuses("SEAMLDR.INSTALL") == [0] * (CPUS - 1) + [SeamldrStatus.EBADHASH]
    assert machine.running() == (0, "1.5.08")
    assert machine.module_status() is None


@pytest.mark.conformance("Image files", 127)
def test_one_cpu_offline() -> None:
    """Every INSTALL succeeds and the session stays open; without a module the CPUs cannot be initialized: -ENODEV."""
    machine = Uploading()
    machine.memory.store(per_cpu(2).online, 0, 1)
    assert machine.upload(build_v2(GOOD)) == -ENODEV
    assert machine.statuses("SEAMLDR.INSTALL") == [0] * (CPUS - 1)
    assert machine.seam.loader.state.current_flow is Flow.INSTALL
    assert machine.running() == (0, "1.5.08")
    assert machine.module_status() is None


@pytest.mark.conformance("Image files", 128)
def test_a_cpu_with_the_erratum() -> None:
    """As merged, there is no upload interface, and a call made all the same is -EINVAL without a SEAMCALL."""
    assert not Support(sysinfo=True, features0=0b10, erratum=True).update_supported
    assert Support(sysinfo=True, features0=0b10, erratum=False).update_supported
    machine = Uploading("refuse-on-erratum")
    assert machine.run(lambda cpu: seamldr_version_show(cpu, INFO)) == (-EINVAL, "")
    assert machine.upload(build_v2(GOOD)) == -EINVAL
    assert machine.count("seamcall_enter") == 0
    assert len(machine.events("warn")) == 2


@pytest.mark.conformance("TDX module calls", "F11")
def test_a_module_that_does_not_know_the_flag_of_shutdown() -> None:
    """A kernel that always sets bit 16 cannot update a module of handoff version 0: -EIO, and nothing is lost."""
    machine = Uploading(avoid_compat_sensitive="always", module_profile="A")
    assert machine.upload(build_v2(GOOD)) == -EIO
    assert machine.statuses("TDH.SYS.SHUTDOWN") == [0xC000_0100_0000_0001]
    assert machine.running() == (1, "1.5.08")
    assert machine.count("seamcall_enter", name="SEAMLDR.INSTALL") == 0
