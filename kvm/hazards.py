"""The command that plays hazards.

`python -m kvm.hazards` plays them all, `python -m kvm.hazards H5 H14b` some, and prints what was seen. Exit status: 0
if every case came out as expected, 1 if one did not, 2 if there is no such hazard.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

from kvm.hazard import Case, Hazard, Shown
from kvm.hazard_table import HAZARDS


def find(words: list[str]) -> list[Hazard]:
    """Hazards by id or slug, all if there are no words; raises KeyError with the word that names none."""
    known = {name: hazard for hazard in HAZARDS for name in (hazard.id, hazard.slug)}
    return [known[word] for word in words] if words else list(HAZARDS)


def told(hazard: Hazard, case: Case, shown: Shown) -> Iterator[str]:
    """What a case came to, as lines."""
    outcome = "bites" if shown.bites else "held"
    yield f"  {case.label}: {outcome}" + ("" if shown.bites == case.bites else ", which was NOT EXPECTED")
    for what, value in shown.seen.items():
        yield f"      {what}: {value}"


def main(words: list[str]) -> int:
    """Play hazards and print what was seen; the exit status."""
    try:
        chosen = find(words)
    except KeyError as error:
        print(f"no hazard {error.args[0]!r}; there are {', '.join(hazard.id for hazard in HAZARDS)}", file=sys.stderr)
        return 2
    expected = True
    for hazard in chosen:
        print(f"{hazard.id} {hazard.slug}\n  {hazard.history}\n  To see: {hazard.observable}.")
        for case in hazard.cases:
            shown = case.play()
            expected = expected and shown.bites == case.bites
            print("\n".join(told(hazard, case, shown)))
    return 0 if expected else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
