"""Run every benchmark of this directory, one after the other, and show their tables.

    python tests/bench/run.py
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """0 if all of them came to their end."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    status = 0
    for path in sorted(HERE.glob("bench_*.py")):
        print(f"== {path.name}", flush=True)
        status |= subprocess.run([sys.executable, str(path)], env=environment, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
