"""Numbers of the P-SEAMLDR interface: leaves, status codes, scenarios.

Source: Intel P-SEAMLDR (tdx-loader 1.5.02), pseamldr_api_defs.h.
"""

from __future__ import annotations

import enum


class SeamldrLeaf(enum.IntEnum):
    """RAX of a SEAMCALL to P-SEAMLDR. The whole u64 is compared: there is no version field in it."""

    INFO = 0x8000_0000_0000_0000
    INSTALL = 0x8000_0000_0000_0001
    SHUTDOWN = 0x8000_0000_0000_0002
    SEAMINFO = 0x8000_0000_0000_0003
    CLEANUP = 0x8000_0000_0000_0004


class SeamldrStatus(enum.IntEnum):
    """RAX on return from P-SEAMLDR. Bits 31:16 are the class: caller, platform, integrity, transient.

    EBADPARAM is the number of the leaf SEAMLDR.INFO, so a caller must look at CF before it looks at RAX.
    """

    SUCCESS = 0
    EBADPARAM = 0x8000_0000_0000_0000
    EBADCALL = 0x8000_0000_0000_0003
    EBADHANDOFF = 0x8000_0000_0000_0004
    ECLEANUPREQ = 0x8000_0000_0000_0005
    EUNSUPPORTED = 0x8000_0000_0000_0006
    ENOMEM = 0x8000_0000_0001_0002
    EUNSPECERR = 0x8000_0000_0001_0003
    EUNSUPCPU = 0x8000_0000_0001_0004
    EBADSIG = 0x8000_0000_0002_0000
    EBADHASH = 0x8000_0000_0002_0001
    EINTERRUPT = 0x8000_0000_0003_0000
    ENOENTROPY = 0x8000_0000_0003_0001


class Scenario(enum.IntEnum):
    """SEAMLDR_PARAMS.SCENARIO: a fresh start, or a replacement that keeps the handoff data."""

    LOAD = 0
    UPDATE = 1


class Flow(enum.StrEnum):
    """P-SEAMLDR's CURRENT_FLOW: which session is open."""

    READY = "READY"
    INSTALL = "INSTALL"
    SHUTDOWN = "SHUTDOWN"
    CLEANUP = "CLEANUP"


class Fatal(Exception):
    """P-SEAMLDR executed UD2: the LP shuts down inside SEAM and takes all SEAM software with it."""
