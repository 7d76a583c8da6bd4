"""What firmware leaves to the kernel at power on: P-SEAMLDR launched, a TDX module running, TDs that can be entered."""

from __future__ import annotations

from pathlib import Path

from bus.memory import PAGE_SIZE, PhysicalMemory
from bus.spec import MachineSpec
from cpu.layout import BUFFERS, TD_TABLE, TDX_STATE
from seamldr.image import parse
from seamldr.seam import SeamSide, platform_of
from seamldr.tdx_context import TDVPS_BASE_PAGES
from seamldr.tdx_module import TdxModule
from seamldr.update import version_word


def seam_side(spec: MachineSpec, memory: PhysicalMemory) -> SeamSide:
    """The SEAM side over what memory holds: fresh, or as the process before this one left it."""
    knobs = spec.knobs
    platform = platform_of(
        spec.cpus, knobs["fms"], knobs["seamldr_profile"], knobs["seamdb_size"], spec.trusted_signers
    )
    return SeamSide(platform, memory)


def power_on(spec: MachineSpec, memory: PhysicalMemory) -> SeamSide:
    """Load and boot the first module and build the TDs; raises `Fatal` or `BootError` if it cannot be."""
    seam_side(spec, memory).store.erase()
    seam = seam_side(spec, memory)
    seam.load(parse(Path(spec.boot_image).read_bytes()), BUFFERS)
    seam.boot_module()
    for index, td in enumerate(seam.build_tds(spec.tds)):
        memory.write64(TD_TABLE + 8 * index, td.vcpus[0])
    assert seam.module is not None
    identity = seam.module.identity
    memory.store(TDX_STATE.initialized, 1, 0)
    tell_sysinfo(memory, seam.module, spec.tds)
    memory.store(TDX_STATE.version, version_word(identity.major, identity.minor, identity.update), 0)
    return seam


def tell_sysinfo(memory: PhysicalMemory, module: TdxModule, tds: int) -> None:
    """What the kernel learned of the module's features, key ids and control pages at boot, with `tds` TDs there."""
    platform = module.platform
    for word, value in (
        (TDX_STATE.features0, module.identity.tdx_features0),
        (TDX_STATE.phys_bits, platform.pa_bits),
        (TDX_STATE.global_keyid, platform.first_private_hkid),
        (TDX_STATE.guest_keyid_start, platform.first_private_hkid + 1 + tds),
        (TDX_STATE.nr_guest_keyids, platform.num_private_hkids - 1 - tds),
        (TDX_STATE.nr_keyids, tds),
        (TDX_STATE.tdcs_base_size, module.tdcs_base_pages * PAGE_SIZE),
        (TDX_STATE.tdvps_base_size, TDVPS_BASE_PAGES * PAGE_SIZE),
    ):
        memory.store(word, value, 0)


def take_over(spec: MachineSpec, memory: PhysicalMemory) -> SeamSide:
    """`power_on` if the machine is new, else the state that is kept in the SEAM range."""
    if memory.load(TDX_STATE.version)[0] == 0:
        return power_on(spec, memory)
    return seam_side(spec, memory)
