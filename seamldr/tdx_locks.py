"""The module's locks: try-locks that remember their owners.

Nothing inside the module waits; a lock that is not free makes the leaf return a BUSY status. All locks are
shared/exclusive here; a mutex is one that is only taken exclusively. Owners are LP ids, so that what a killed LP left
locked can be seen. Source: Intel TDX module, `src/common/helpers/tdx_locks.h`.
"""

from __future__ import annotations

import msgspec


class Lock(msgspec.Struct, array_like=True):
    """A shared/exclusive try-lock. An LP that holds it and tries again is refused like any other."""

    exclusive: int | None = None
    shared: list[int] = msgspec.field(default_factory=list)

    @property
    def free(self) -> bool:
        """True if nobody holds the lock."""
        return self.exclusive is None and not self.shared

    def try_exclusive(self, lp: int) -> bool:
        """Take the lock alone; False if anybody holds it."""
        if not self.free:
            return False
        self.exclusive = lp
        return True

    def try_shared(self, lp: int) -> bool:
        """Take the lock with other readers; False if it is held exclusively."""
        if self.exclusive is not None:
            return False
        self.shared.append(lp)
        return True

    def release(self, lp: int) -> None:
        """Drop what `lp` took last."""
        if self.exclusive == lp:
            self.exclusive = None
        else:
            self.shared.remove(lp)
