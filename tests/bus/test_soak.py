"""The soak: a million messages from four processes into one, in order and once each, without a stall."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from bus.clock import LamportClock
from bus.endpoint import open_endpoint
from bus.link import Identity
from bus.messages import Ring

ROOT = Path(__file__).resolve().parents[2]
SENDERS = 4
EACH = 250_000


@pytest.fixture
def directory() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="bus", dir="/tmp")
    yield path
    shutil.rmtree(path)


def start_sender(directory: str, node: str) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("soak_sender.py")
    command = [sys.executable, str(script), directory, node, "sink", str(EACH)]
    return subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
async def test_a_million_messages_arrive_once_and_in_order(directory: str) -> None:
    """Four processes send 250,000 messages each; none is lost, repeated or out of order, and nothing stalls."""
    refused: list[str] = []
    identity = Identity("sink", 1)
    async with open_endpoint(identity, directory, b"k" * 16, LamportClock(), lambda r, h: refused.append(r)) as sink:
        expected = {f"source{n}": 0 for n in range(SENDERS)}
        for node in expected:
            sink.member(node, 1, "online")
        senders = [start_sender(directory, node) for node in expected]
        try:
            with trio.fail_after(120):
                while any(n < EACH for n in expected.values()):
                    await sink.wait()
                    for delivery in sink.drain_nowait():
                        node = delivery.source.node
                        assert delivery.body == Ring(expected[node])
                        expected[node] += 1
                while any(sender.poll() is None for sender in senders):  # noqa: ASYNC110
                    await trio.sleep(0.01)
                assert not sink.drain_nowait()
        finally:
            for sender in senders:
                sender.kill()
                sender.wait()
        assert [sender.returncode for sender in senders] == [0] * SENDERS
        assert not refused
        assert sink.statistics().delivered == SENDERS * EACH
