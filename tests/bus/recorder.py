"""A process that writes the id of each message that it takes to a file, one line each, until it is stopped.

Arguments: directory, own node, the node that it listens to, file.
"""

import os
import sys

import trio

from bus.clock import LamportClock
from bus.endpoint import open_endpoint
from bus.link import Identity


def on_refused(reason: str, head: bytes) -> None:
    raise SystemExit(f"refused: {reason} {head!r}")


async def main(directory: str, node: str, source: str, path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    async with open_endpoint(Identity(node, 1), directory, b"k" * 16, LamportClock(), on_refused) as endpoint:
        endpoint.member(source, 1, "online")
        while True:
            await endpoint.wait()
            for delivery in endpoint.drain_nowait(16):
                os.write(file, delivery.id.encode() + b"\n")


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:5])
