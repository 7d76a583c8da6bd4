"""Files that somebody else made: read whole, but never without end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_file_within(path: str | Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises `OSError` if it cannot be read, if it has more (EFBIG), or if it is a pipe, a device or a directory (EINVAL,
    EISDIR): these may have no end, or make their reader wait.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data
