"""Files that know when they are opened: order, completeness and absence, as clients in other threads meet them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from kvm.leased import open_tree

T = TypeVar("T")


async def client(work: Callable[[], T]) -> T:
    """Run blocking work of a client beside the tree."""
    return await trio.to_thread.run_sync(work)


async def test_a_read_finds_what_is_true_at_its_open(tmp_path: Path) -> None:
    """Each open asks anew, and waits for the answer."""
    asked: list[int] = []

    async def show() -> str:
        await trio.lowlevel.checkpoint()
        asked.append(len(asked))
        return f"{len(asked)}\n"

    async with open_tree(tmp_path) as tree:
        tree.file("devices/number", 0o444, show)
        for expected in ("1\n", "2\n", "3\n"):
            assert await client((tmp_path / "devices/number").read_text) == expected
    assert len(asked) == 3


async def test_a_read_comes_after_all_writes_before_it(tmp_path: Path) -> None:
    """A client that writes one file and then opens another finds its write taken in, every time."""
    stored: list[str] = []

    async def show() -> str:
        return stored[-1]

    def write_and_read() -> list[str]:
        answers = []
        for number in range(100):
            (tmp_path / "devices/in").write_text(f"{number}\n")
            answers.append((tmp_path / "devices/out").read_text())
        return answers

    async with open_tree(tmp_path) as tree:
        tree.file("devices/in", 0o200, show, stored.append)
        tree.file("devices/out", 0o444, show)
        answers = await client(write_and_read)
    assert answers == [str(number) for number in range(100)]


async def test_no_write_is_lost_or_reordered(tmp_path: Path) -> None:
    """Writes that follow each other as fast as they can all arrive, once each and in order."""
    stored: list[str] = []

    async def show() -> str:
        return "shown\n"

    def write() -> str:
        for number in range(200):
            (tmp_path / "devices/in").write_text(f"{number}\n")
        return (tmp_path / "devices/out").read_text()

    async with open_tree(tmp_path) as tree:
        tree.file("devices/in", 0o644, show, stored.append)
        tree.file("devices/out", 0o444, show)
        await client(write)
    assert stored == [str(number) for number in range(200)]


async def test_several_writes_through_one_opening(tmp_path: Path) -> None:
    """A client may keep a file open and write to it again; what was there to read is not taken for its writing."""
    stored: list[str] = []

    async def show() -> str:
        return "0\n"

    def write() -> None:
        fd = os.open(tmp_path / "devices/in", os.O_WRONLY)
        for text in (b"1\n", b"0\n"):
            os.write(fd, text)
            (tmp_path / "devices/out").read_text()
        os.close(fd)
        (tmp_path / "devices/out").read_text()

    async with open_tree(tmp_path) as tree:
        tree.file("devices/in", 0o644, show, stored.append)
        tree.file("devices/out", 0o444, show)
        await client(write)
    assert stored == ["1", "0"]


async def test_a_file_held_open_follows(tmp_path: Path) -> None:
    """Who keeps a file open and reads it again finds what was pushed since."""

    async def show() -> str:
        return "old\n"

    async with open_tree(tmp_path) as tree:
        file = tree.file("devices/out", 0o444, show)
        held = await client((tmp_path / "devices/out").open)
        with held:
            assert held.read() == "old\n"
            file.push("new\n")
            held.seek(0)
            assert held.read() == "new\n"


async def test_a_hidden_file_is_not_there(tmp_path: Path) -> None:
    """An open of a hidden file fails; put back, it answers again."""

    async def show() -> str:
        return "there\n"

    async with open_tree(tmp_path) as tree:
        file = tree.file("devices/out", 0o444, show)
        file.hide(True)
        with pytest.raises(FileNotFoundError):
            await client((tmp_path / "devices/out").read_text)
        file.hide(False)
        assert await client((tmp_path / "devices/out").read_text) == "there\n"


async def test_a_buffer_gathers_what_all_write(tmp_path: Path) -> None:
    """Pieces written at their offsets through several openings make one content; cleared, it is empty."""

    def write() -> None:
        for offset, piece in ((4, b"efgh"), (0, b"abcd")):
            fd = os.open(tmp_path / "devices/data", os.O_WRONLY)
            os.pwrite(fd, piece, offset)
            os.close(fd)

    async with open_tree(tmp_path) as tree:
        data = tree.buffer("devices/data", 0o644, lambda writing: 0)
        await client(write)
        assert (data.size, data.read(100)) == (8, b"abcdefgh")
        data.clear()
        assert data.size == 0


async def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    """However often files are opened, by whom who does not want to wait too, the tree keeps no descriptors of them."""

    async def show() -> str:
        return "text\n"

    def impatient() -> None:
        for _ in range(50):
            try:
                os.close(os.open(tmp_path / "devices/out", os.O_RDONLY | os.O_NONBLOCK))
            except BlockingIOError:
                (tmp_path / "devices/other").read_text()

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async with open_tree(tmp_path) as tree:
        tree.file("devices/out", 0o444, show)
        tree.file("devices/other", 0o444, show)
        before = descriptors()
        await client(impatient)
        assert await client((tmp_path / "devices/other").read_text) == "text\n"
        tree.look()
        assert descriptors() <= before + 2


async def test_nothing_is_left_under_the_root(tmp_path: Path) -> None:
    """The directory is empty afterwards, and one that is not empty before is left alone."""

    async def show() -> str:
        return ""

    async with open_tree(tmp_path) as tree:
        tree.file("class/x/y", 0o444, show)
        assert await client((tmp_path / "class/x/y").read_text) == ""
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_tree(tmp_path):
            pass
    assert caught.group_contains(FileExistsError)
    assert (tmp_path / "mine").read_text() == "precious"


async def test_reading_is_not_writing(tmp_path: Path) -> None:
    """What the tree itself puts into a file for a reader is not taken for something that the reader wrote."""
    stored: list[str] = []

    async def show() -> str:
        return "0\n"

    async with open_tree(tmp_path) as tree:
        tree.file("devices/in", 0o644, show, stored.append)
        for _ in range(3):
            assert await client((tmp_path / "devices/in").read_text) == "0\n"
        tree.take_in()
    assert stored == []


async def test_looking_takes_in_what_was_written_first(tmp_path: Path) -> None:
    """Whoever waits in an open is answered after all writes that are done by then, though no event was awaited."""
    stored: list[str] = []

    async def show() -> str:
        return ""

    async with open_tree(tmp_path) as tree:
        tree.file("devices/in", 0o200, show, stored.append)
        fd = await client(lambda: os.open(tmp_path / "devices/in", os.O_WRONLY))
        os.write(fd, b"1\n")
        tree.look()
        assert stored == ["1"]
        os.close(fd)
