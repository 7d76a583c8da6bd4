"""What P-SEAMLDR gets from the processor's random number generator, and may fail to get."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from typing import Protocol


class RdrandUse(enum.Enum):
    """What a random number is for."""

    CANARY = enum.auto()
    ASLR = enum.auto()


class SeamopsStatus(enum.IntEnum):
    """RAX of SEAMOPS."""

    SUCCESS = 0
    INPUT_ERROR = 1
    ENTROPY_ERROR = 2
    DATABASE_ERROR = 3


class PconfigStatus(enum.IntEnum):
    """RAX of PCONFIG (SDM volume 2, PCONFIG)."""

    SUCCESS = 0
    INVALID_PROG_CMD = 1
    ENTROPY_ERROR = 2
    INVALID_KEYID = 3
    INVALID_CRYPTO_ALG = 4
    DEVICE_BUSY = 5


class Entropy(Protocol):
    """The processor operations that can fail for want of entropy; tests replace single ones."""

    def rdrand(self, use: RdrandUse) -> int | None:
        """64 random bits, or None if the attempt failed (RDRAND with CF=0)."""

    def seamdb_nonce(self) -> bytes:
        """The 32-byte nonce of an emptied module history database."""

    def seamdb_insert(self) -> SeamopsStatus:
        """Whether SEAMDB_INSERT finds entropy; the database itself is P-SEAMLDR's state here."""

    def pconfig(self, package: int, key: int) -> PconfigStatus:
        """Program a random key into the private KeyID number `key` of a package."""


class RandomEntropy:
    """An `Entropy` that never fails, over a source such as `random.Random(seed).randbytes` or `os.urandom`."""

    def __init__(self, random_bytes: Callable[[int], bytes] | None = None) -> None:
        self._random_bytes = random_bytes or random.Random(0).randbytes

    def rdrand(self, use: RdrandUse) -> int | None:
        """Never None, and never 0."""
        return int.from_bytes(self._random_bytes(8), "little") or 1

    def seamdb_nonce(self) -> bytes:
        """From the source."""
        return self._random_bytes(32)

    def seamdb_insert(self) -> SeamopsStatus:
        """Always SUCCESS."""
        return SeamopsStatus.SUCCESS

    def pconfig(self, package: int, key: int) -> PconfigStatus:
        """Always SUCCESS."""
        return PconfigStatus.SUCCESS
