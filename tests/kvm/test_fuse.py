"""The FUSE protocol as bytes: what the kernel sends is understood, what it gets has the layout of its header file."""

from __future__ import annotations

import stat
import struct
from errno import EPROTO

import pytest

from kvm.fuse import (
    MAX_WRITE,
    PAGE,
    Attr,
    Entry,
    Opcode,
    ProtocolError,
    ReadIn,
    WriteIn,
    changes_owner_or_mode,
    decode_handle,
    decode_name,
    decode_open,
    decode_read,
    decode_request,
    decode_write,
    encode_answer,
    encode_attr,
    encode_entries,
    encode_entry,
    encode_init,
    encode_open,
    encode_statfs,
    encode_written,
)

INIT = bytes.fromhex(
    "680000001a0000000200000000000000000000000000000000000000000000000000000000000000"
    "070000002d00000000000200fbffff73fd05000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000"
)
"""What Linux 6.18 sent: FUSE 7.45."""
HEADER = struct.Struct("<IIQQIIIHH")
FILE = stat.S_IFREG | 0o644


def request(opcode: int, body: bytes, unique: int = 8, node: int = 3) -> bytes:
    """A request as the kernel writes it."""
    return HEADER.pack(HEADER.size + len(body), opcode, unique, node, 0, 0, 77, 0, 0) + body


def test_the_first_request_of_a_kernel_is_answered() -> None:
    """INIT of a newer kernel gets the version that we speak, no optional feature, and writes of two pages at most."""
    init = decode_request(INIT)
    assert (init.opcode, init.unique, init.node) == (Opcode.INIT, 2, 0)
    answer = encode_init(init.body)
    major, minor, readahead, flags, _, _, max_write, granularity = struct.unpack_from("<IIIIHHII", answer)
    assert len(answer) == 64
    assert (major, minor, readahead, flags, max_write, granularity) == (7, 31, 0x20000, 0, 8192, 1)
    assert MAX_WRITE > PAGE


@pytest.mark.parametrize("version", [(7, 30), (6, 45)])
def test_an_older_kernel_is_refused(version: tuple[int, int]) -> None:
    """A kernel whose structures are others is told -EPROTO."""
    with pytest.raises(ProtocolError) as caught:
        encode_init(struct.pack("<IIII", *version, 0, 0))
    assert caught.value.errno == EPROTO


def test_requests_are_taken_apart() -> None:
    """Header, names, handles, flags, offsets and data are where the kernel puts them."""
    look = decode_request(request(Opcode.LOOKUP, b"version\0"))
    assert (look.opcode, look.unique, look.node, decode_name(look.body)) == (Opcode.LOOKUP, 8, 3, "version")
    read = struct.pack("<QQIIQII", 5, 1 << 40, 4096, 1, 0xDEAD, 0o2, 0)
    assert decode_read(read) == ReadIn(5, 1 << 40, 4096)
    assert decode_write(struct.pack("<QQIIQII", 5, 7, 3, 1, 0xDEAD, 1, 0) + b"abc") == WriteIn(5, 7, b"abc")
    assert decode_open(struct.pack("<II", 0o1001, 0)) == 0o1001
    assert decode_handle(struct.pack("<QIIQ", 9, 0, 0, 0)) == 9


@pytest.mark.parametrize(("valid", "changes"), [(1 << 3, False), (1 << 5, False), (1, True), (2, True), (4 | 8, True)])
def test_what_a_setattr_changes(valid: int, changes: bool) -> None:
    """Mode, owner and group are told from size and times."""
    assert changes_owner_or_mode(struct.pack("<II", valid, 0) + bytes(80)) is changes


@pytest.mark.parametrize(
    "broken",
    [
        lambda: decode_request(INIT[:39]),
        lambda: decode_request(INIT + b"x"),
        lambda: decode_read(bytes(39)),
        lambda: decode_write(struct.pack("<QQIIQII", 5, 7, 4, 1, 0, 1, 0) + b"abc"),
        lambda: decode_open(b""),
        lambda: decode_handle(bytes(7)),
    ],
    ids=["header", "length", "read", "write", "open", "handle"],
)
def test_a_request_that_is_cut_off_is_no_request(broken: object) -> None:
    """Too few bytes for its kind raise `ProtocolError`, nothing else."""
    assert callable(broken)
    with pytest.raises(ProtocolError):
        broken()


def test_answers_have_the_sizes_of_the_header_file() -> None:
    """sizeof of fuse_entry_out, fuse_attr_out, fuse_open_out, fuse_write_out and fuse_statfs_out in fuse.h."""
    attr = Attr(4, FILE, 4096)
    answers = encode_entry(attr), encode_attr(attr), encode_open(6), encode_written(3), encode_statfs()
    assert [len(answer) for answer in answers] == [128, 104, 16, 8, 80]
    assert struct.unpack_from("<QI", encode_open(6)) == (6, 1 | 32)
    places = ("<Q", 16), ("<Q", 24), ("<I", 76)
    assert [struct.unpack_from(form, encode_attr(attr), at)[0] for form, at in places] == [4, 4096, FILE]
    assert encode_entry(attr)[40:] == encode_attr(attr)[16:]


def test_an_answer_is_a_payload_or_an_error() -> None:
    """The length counts the header, and an error has no payload."""
    assert encode_answer(8, b"abc") == struct.pack("<IiQ", 19, 0, 8) + b"abc"
    assert encode_answer(8, b"abc", error=-6) == struct.pack("<IiQ", 16, -6, 8)


@pytest.mark.parametrize("size", [40, 64, 100, 4096])
def test_a_directory_is_read_in_pieces(size: int) -> None:
    """With room for few or many names, each is found once, in order, with its number and type."""
    directories = [Entry(name, 1, stat.S_IFDIR) for name in (".", "..")]
    entries = [*directories, Entry("a", 2, FILE), Entry("link", 3, stat.S_IFLNK)]
    found, offset = [], 0
    while piece := encode_entries(entries, offset, size):
        assert len(piece) <= size and len(piece) % 8 == 0
        at = 0
        while at < len(piece):
            number, offset, length, kind = struct.unpack_from("<QQII", piece, at)
            found.append((piece[at + 24 : at + 24 + length].decode(), number, kind))
            at += 24 + length + -length % 8
    assert found == [(".", 1, 4), ("..", 1, 4), ("a", 2, 8), ("link", 3, 10)]
