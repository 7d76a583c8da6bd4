"""`python -m cpu.vmx SCRIPT.json`: run a script and print its results as JSON. Exit status 2: the script is bad."""

from __future__ import annotations

import sys

import msgspec

from bus.files import read_file_within

from .script import Script, run_script

MAX_SCRIPT = 16 << 20
"""Bytes of a script."""


def main(arguments: list[str]) -> int:
    """Run the script file named by the only argument; the exit status."""
    if len(arguments) != 1:
        print("usage: python -m cpu.vmx SCRIPT.json", file=sys.stderr)
        return 2
    try:
        script = msgspec.json.decode(read_file_within(arguments[0], MAX_SCRIPT), type=Script)
        results = run_script(script.config, script.ops)
    except OSError as error:
        return _refuse(arguments[0], error.strerror)
    except RecursionError:
        return _refuse(arguments[0], "nested too deeply")
    except ValueError as error:  # no JSON, no UTF-8, not as a script has to be
        return _refuse(arguments[0], str(error))
    print(msgspec.json.format(msgspec.json.encode(results), indent=1).decode())
    return 0


def _refuse(path: str, why: str | None) -> int:
    print(f"{path}: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
