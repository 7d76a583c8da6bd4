"""`python -m cpu.vmx SCRIPT.json`: run a script and print its results as JSON. Exit status 2: the script is bad."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from .script import Script, ScriptError, run_script


def main(arguments: list[str]) -> int:
    """Run the script file named by the only argument; the exit status."""
    if len(arguments) != 1:
        print("usage: python -m cpu.vmx SCRIPT.json", file=sys.stderr)
        return 2
    try:
        script = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=Script)
        results = run_script(script.config, script.ops)
    except (OSError, msgspec.MsgspecError, ScriptError) as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return 2
    print(msgspec.json.format(msgspec.json.encode(results), indent=1).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
