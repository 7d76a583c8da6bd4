"""IA32_SEAMEXTEND, the processor's record of the SEAM software that is loaded.

Layout: Intel P-SEAMLDR (tdx-loader 1.5.02), pseamldr_data_types.h; 136 bytes, one copy for the platform.
"""

from __future__ import annotations

import struct

import msgspec

SEAMEXTEND_SIZE = 136
VALID_SVN_AND_MRSEAM = 0x1FF
_LAYOUT = struct.Struct("<Q16s48s48sQ3B5x")


class SeamExtend(msgspec.Struct, frozen=True):
    """The fields in order. `tee_tcb_svn` is minor SVN, major SVN, SE SVN, 13 reserved; each ready flag is one byte."""

    valid: int = 0
    tee_tcb_svn: bytes = bytes(16)
    mrseam: bytes = bytes(48)
    mrsigner: bytes = bytes(48)
    attributes: int = 0
    seam_ready: int = 0
    system_under_debug: int = 0
    p_seamldr_ready: int = 0

    @classmethod
    def decode(cls, data: bytes) -> SeamExtend:
        """From the first 136 bytes. Raises ValueError if there are fewer."""
        if len(data) < SEAMEXTEND_SIZE:
            raise ValueError(f"SEAMEXTEND needs {SEAMEXTEND_SIZE} bytes, not {len(data)}")
        return cls(*_LAYOUT.unpack_from(data))

    def encode(self) -> bytes:
        """The 136 bytes."""
        return _LAYOUT.pack(*msgspec.structs.astuple(self))

    @property
    def svn_minor(self) -> int:
        """Of the module that is recorded."""
        return self.tee_tcb_svn[0]

    @property
    def svn_major(self) -> int:
        """Of the module that is recorded."""
        return self.tee_tcb_svn[1]

    def with_ready(self, seam_ready: int) -> SeamExtend:
        """The same record with another SEAM_READY."""
        return msgspec.structs.replace(self, seam_ready=seam_ready)

    def with_module(self, svn_minor: int, svn_major: int, mrseam: bytes) -> SeamExtend:
        """The record of a new module, not ready yet. MRSIGNER stays zero for Intel's key; SE_SVN stays."""
        return msgspec.structs.replace(
            self,
            valid=VALID_SVN_AND_MRSEAM,
            tee_tcb_svn=bytes((svn_minor, svn_major)) + self.tee_tcb_svn[2:],
            mrseam=mrseam,
            mrsigner=bytes(48),
            attributes=0,
            seam_ready=0,
        )

    def without_module(self, *, keep_se_svn: bool) -> SeamExtend:
        """No module: the identity is zeroed and SEAM_READY is 0; the loader's own bytes stay."""
        svn = bytes(2) + self.tee_tcb_svn[2:] if keep_se_svn else bytes(16)
        return SeamExtend(
            tee_tcb_svn=svn, system_under_debug=self.system_under_debug, p_seamldr_ready=self.p_seamldr_ready
        )
