"""The seal on each frame: only who has the run's key can make one, and a frame that was changed has none. Pure.

A frame is SEAL_SIZE bytes of keyed BLAKE2s over the rest, then the rest. The key itself never travels. A seal is looked
at before anything else, so noise, strangers and damage do not even reach the decoder.
"""

from __future__ import annotations

import hashlib
import hmac

KEY_SIZE = 16
"""Bytes of the key that all processes of a run share."""

SEAL_SIZE = 16
"""Bytes of a seal."""


class Seal:
    """The seal of one run; `ValueError` if the key has another length than KEY_SIZE."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise ValueError(f"the key has {len(key)} bytes, not {KEY_SIZE}")
        self._keyed = hashlib.blake2s(key=key, digest_size=SEAL_SIZE)

    def close(self, content: bytes) -> bytes:
        """The frame around `content`."""
        seal = self._keyed.copy()
        seal.update(content)
        return seal.digest() + content

    def open(self, frame: bytes | memoryview) -> memoryview | None:
        """What is in the frame; None if it has no good seal. How much of a wrong one is right does not show in time."""
        content = memoryview(frame)[SEAL_SIZE:]
        seal = self._keyed.copy()
        seal.update(content)
        return content if hmac.compare_digest(seal.digest(), frame[:SEAL_SIZE]) else None
