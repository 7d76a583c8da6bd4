"""Text of others, fit for a terminal: a record, a plan or a file name may hold what would move its cursor."""

from __future__ import annotations

_CONTROLS = {code: "\ufffd" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


def plain(text: str) -> str:
    """The text with every control character but newline and tab replaced.

    >>> plain("a\\x1b[2Jb")
    'a\ufffd[2Jb'
    """
    return text if text.isprintable() else text.translate(_CONTROLS)
