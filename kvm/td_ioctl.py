"""The ioctls with which user space builds, runs and ends a TD, by the name that a message gives them."""

from __future__ import annotations

from errno import EINVAL, EIO

from cpu.cpu import Cpu
from kvm.td_build import td_measurement, tdx_td_finalize, tdx_td_init, tdx_vcpu_init, tdx_vcpu_init_mem_region
from kvm.td_destroy import tdx_vm_destroy
from kvm.tdx import VmxTdVcpu
from kvm.vcpu import td_vcpu_of

COMMANDS = ("init_vm", "init_vcpu", "init_mem_region", "finalize_vm", "run", "destroy")


async def td_ioctl(cpu: Cpu, command: str, td: int, task: int, pages: tuple[int, ...]) -> tuple[int, str]:
    """One of COMMANDS for TD `td` with the vCPU `task`; 0 or a negative errno, and what user space is told besides.

    `pages` are user space's: one for TD_PARAMS, or those that the TD starts with, from guest-physical address 0 on.
    """
    match command:
        case "init_vm":
            return (await tdx_td_init(cpu, td, pages[0]) if pages else -EINVAL), ""
        case "init_vcpu":
            return await tdx_vcpu_init(cpu, td, task), ""
        case "init_mem_region":
            return await tdx_vcpu_init_mem_region(cpu, td, 0, pages), ""
        case "finalize_vm":
            errno = await tdx_td_finalize(cpu, td)
            return errno, "" if errno else (await td_measurement(cpu, td)).hex()
        case "run":
            return 0 if await VmxTdVcpu(task, td_vcpu_of(task)).run(cpu) else -EIO, ""
    return 0 if await tdx_vm_destroy(cpu, td) else -EIO, ""
