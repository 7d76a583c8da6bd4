"""The soaks: a million messages over a good bus; a hundred thousand IPIs over one that drops and repeats frames."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from bus.clock import LamportClock
from bus.endpoint import Statistics, open_endpoint
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


CPUS = 5
IPIS = 5_000
SHARE = 0.1


def start_cpu(directory: str, number: int) -> subprocess.Popen[str]:
    script = str(Path(__file__).with_name("soak_node.py"))
    others = ",".join(f"cpu{other}" for other in range(CPUS) if other != number)
    command = [sys.executable, script, directory, f"cpu{number}", others, str(IPIS), str(SHARE), str(number)]
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_hundred_thousand_ipis_survive_a_bad_bus(directory: str) -> None:
    """Five processes send each other 5,000 IPIs a pair; 10 % of all frames are dropped, 10 % doubled.

    Each process checks that the IPIs of each other one come in order, none missing, none twice, also while it waits
    for the others to be done.
    """
    cpus = [start_cpu(directory, number) for number in range(CPUS)]
    try:
        lines = [cpu.stdout.readline() for cpu in cpus if cpu.stdout]
        for cpu in cpus:
            cpu.communicate()
        assert [cpu.returncode for cpu in cpus] == [0] * CPUS
        assert [line.split()[:1] for line in lines] == [["heard"]] * CPUS
        counts = [msgspec.json.decode(line.partition(" ")[2], type=Statistics) for line in lines]
        assert sum(count.sent for count in counts) == sum(count.delivered for count in counts) == 100_000
        for count in counts:
            assert count.acknowledged == count.delivered == 20_000
            frames = count.sent + count.resent
            assert count.dropped > 0.09 * frames and count.duplicated > 0.08 * frames
            assert count.duplicates > 0 and count.resent > 0
    finally:
        for cpu in cpus:
            cpu.kill()
            cpu.wait()
