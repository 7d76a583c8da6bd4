"""What version 3 of the series checked before an update; since version 5 that is user space's duty.

Each check refuses before anything has happened, where the merged kernel fails when the old module is shut down already.
"""

from __future__ import annotations

from errno import EBUSY, EIO, ENOSPC

from cpu.cpu import Cpu
from cpu.stop_machine import online_cpus
from seamldr.update import seamldr_get_info, seamldr_install_module


async def seamldr_install_module_v3(
    cpu: Cpu, pages: tuple[int, ...], length: int, params_page: int, info_page: int
) -> int:
    """As `seamldr_install_module`, if P-SEAMLDR answers (-EIO), has room for an update (-ENOSPC) and no CPU is offline
    (-EBUSY). `info_page` is the page for SEAMLDR_INFO, one for the whole kernel.
    """
    _, info = await seamldr_get_info(cpu, info_page)
    if info is None:
        return -EIO
    if not info.num_remaining_updates:
        return -ENOSPC
    if len(await online_cpus(cpu)) < cpu.kernel.num_cpus:
        cpu.pr_err("seamldr: Cannot update TDX module if any CPU is offline")
        return -EBUSY
    return await seamldr_install_module(cpu, pages, length, params_page)
