"""Upload a TDX module image through /sys, with the paths and the order of calls that the v3 interface asks for.

usage: upload.py SYSFS IMAGE SECONDS [NODE]; prints one JSON object. Exit 0 updated, 1 failed, 2 timeout.
"""

import json
import sys
import time
from pathlib import Path


def read(path):
    """The content without its newline, None if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def main(root, image, seconds, name="seamldr_upload"):
    """Do what a client does; the exit status."""
    node, device = Path(root, "class/firmware", name), Path(root, "devices/faux/tdx_host")
    before = read(device / "version")
    loader, remaining = device / "seamldr/version", device / "seamldr/num_remaining_updates"
    slots = read(remaining)
    (node / "loading").write_text("1")
    with open(node / "data", "wb") as data:
        data.write(Path(image).read_bytes())
    (node / "loading").write_text("0")
    deadline = time.monotonic() + float(seconds)
    seen = []
    while (status := read(node / "status")) != "idle":
        seen += [status] if status not in seen else []
        if time.monotonic() > deadline:
            return 2
        time.sleep(0.02)
    error = read(node / "error")
    print(json.dumps({
        "before": before, "after": read(device / "version"), "seamldr": read(loader), "slots": [slots, read(remaining)],
        "seen": seen, "error": error, "remaining_size": read(node / "remaining_size"),
    }))
    return 1 if error else 0


sys.exit(main(*sys.argv[1:]))
