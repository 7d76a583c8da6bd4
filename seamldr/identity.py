"""What a module image says it is, so that the emulated TDX module that comes out of it knows itself.

Images made here carry a `ModuleIdentity` in a section of their own. Intel's images do not, so theirs is looked up by
SEAMHASH among the eleven that Intel published; an unknown image gets what its sigstruct says and version 0.0.0.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from seamldr import elf
from seamldr.sigstruct import SigStruct

MAGIC = b"SEAMLAB\0"
_HEADER = struct.Struct("<8sI")

HV0_FEATURES0 = 0x2_2E1F_0FBF
"""TDX_FEATURES0 of TDX module 1.5.08."""
HV1_FEATURES0 = 0x8022_6F3F_0FBF
"""TDX_FEATURES0 of TDX module 1.5.16 with UPDATE_COMPATIBILITY (bit 47)."""

UNKNOWN_VERSION = "0.0.00"
"""Of an image that does not say, and that Intel did not publish."""

Profile = Literal["A", "B"]


class ModuleIdentity(msgspec.Struct, frozen=True):
    """Version, features and handoff rules of one TDX module build.

    Profile "A" behaves as a module with handoff version 0, "B" as one with version 1. `build_date` is decimal
    yyyymmdd, `num_handoff_pages` the count minus one.
    """

    major: int = 1
    minor: int = 5
    update: int = 8
    build_date: int = 20240725
    build_num: int = 0
    profile: Profile = "A"
    module_hv: int = 0
    min_update_hv: int = 0
    no_downgrade: bool = False
    num_handoff_pages: int = 13
    tdx_features0: int = HV0_FEATURES0
    crypto_version: int = 1
    internal_version: int = 0

    @property
    def version(self) -> str:
        """As Linux prints it, for example "1.5.08"."""
        return f"{self.major}.{self.minor}.{self.update:02}"


def make_identity(version: str = "1.5.08", profile: Profile = "A", build_date: int = 20240725) -> ModuleIdentity:
    """The identity of a made-up build. Raises ValueError if `version` is not major.minor.update.

    >>> make_identity("1.5.16", "B").module_hv
    1
    """
    parts = version.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) < 0x1_0000 for part in parts):
        raise ValueError(f"module version {version!r} is not major.minor.update")
    major, minor, update = map(int, parts)
    pages = 13 if major < 2 else 24
    if profile == "A":
        return ModuleIdentity(major, minor, update, build_date, num_handoff_pages=pages)
    return ModuleIdentity(
        major, minor, update, build_date, profile="B", module_hv=1, no_downgrade=True,
        num_handoff_pages=pages, tdx_features0=HV1_FEATURES0,
    )  # fmt: skip


# Version and TDX_FEATURES0 to SEAMHASH. Where Intel printed no features for a build: the nearest older one's.
PUBLISHED = {
    ("1.5.01", 0xF0FBF):
        "9790d89a10210ec6968a773cee2ca05b5aa97309f36727a968527be4606fc19e6f73acce350946c9d46a9bf7a63f8430",
    ("1.5.05", 0x61F0FBF):
        "1cc6a17ab799e9a693fac7536be61c12ee1e0fabada82d0c999e08ccee2aa86de77b0870f558c570e7ffe55d6d47fa04",
    ("1.5.06", 0x2E1F0FBF):
        "5b38e33a6487958b72c3c12a938eaa5e3fd4510c51aeeab58c7d5ecee41d7c436489d6c8e4f92f160b7cad34207b00c1",
    ("1.5.08", 0x22E1F0FBF):
        "49b66faa451d19ebbdbe89371b8daf2b65aa3984ec90110343e9e2eec116af08850fa20e3b1aa9a874d77a65380ee7e6",
    ("1.5.09", 0x22E1F0FBF):
        "bfb360ac8e6233a1bca1433caf7382d95c165b4a77fb00bf1435e5a08f300cdfead5ee68461afd9b6c728dce7534602d",
    ("1.5.13", 0x226F1F0FBF):
        "27b67e0b20508f0acfb8a99df4283a7c86ae569d85d556a91d4eb20e56b5d42d5e65b31a3a6996e8e461f104f32fdeec",
    ("1.5.16", 0x226F3F0FBF):
        "7bf063280e94fb051f5dd7b1fc59ce9aac42bb961df8d44b709c9b0ff87a7b4df648657ba6d1189589feab1d5a3c9a9d",
    ("2.0.02", 0x32A71F0FBF):
        "685f891ea5c20e8fa27b151bf34bf3b50fbaf7143cc53662727cbdb167c0ad8385f1f6f3571539a91e104a1c96d75e04",
    ("2.0.04", 0x32A71F0FBF):
        "64cae497e0c6221176fe8d3bc9d0cf25b4c97bb24cc16499f77102451f15bb24249f1aa3e5d3bf8897be74ad6c84e648",
    ("2.0.05", 0x32A71F0FBF):
        "6f65e570e3bc418d2576f31aada40f7f7ce1ea810f964aa9bc70066a89ac1fc6e0d6b76d3f86a16405172b2c3e078528",
    ("2.0.08", 0x32A71F0FBF):
        "476a2997c62bccc78370913d0a80b956e3721b24272bc66c4d6307ced4be2865c40e26afac75f12df3425b03eb59ea7c",
}


def encode_identity(identity: ModuleIdentity) -> bytes:
    """The content of an identity section: magic, u32 length, MessagePack."""
    record = msgspec.msgpack.encode(identity)
    return _HEADER.pack(MAGIC, len(record)) + record


def identity_of(sigstruct: SigStruct, image: bytes) -> ModuleIdentity:
    """The identity of the module `image`, from its own record, else from SEAMHASH, else from the sigstruct."""
    record = elf.find_section(image, elf.SHT_SEAMLAB_IDENTITY)
    identity = None if record is None else _decode(record)
    return identity or _published(sigstruct) or _derive(sigstruct, UNKNOWN_VERSION)


def _decode(record: bytes) -> ModuleIdentity | None:
    if len(record) < _HEADER.size:
        return None
    magic, length = _HEADER.unpack_from(record)
    if magic != MAGIC:
        return None
    try:
        return msgspec.msgpack.decode(record[_HEADER.size : _HEADER.size + length], type=ModuleIdentity)
    except msgspec.DecodeError:
        return None


def _published(sigstruct: SigStruct) -> ModuleIdentity | None:
    for (version, features0), seamhash in PUBLISHED.items():
        if seamhash == sigstruct.seamhash.hex():
            return msgspec.structs.replace(_derive(sigstruct, version), tdx_features0=features0)
    return None


def _derive(sigstruct: SigStruct, version: str) -> ModuleIdentity:
    date = f"{sigstruct.date:x}"
    identity = make_identity(version, "A", int(date) if date.isdecimal() else 0)
    return msgspec.structs.replace(
        identity,
        module_hv=sigstruct.module_hv,
        min_update_hv=sigstruct.min_update_hv,
        no_downgrade=bool(sigstruct.no_downgrade),
        num_handoff_pages=sigstruct.num_handoff_pages,
    )
