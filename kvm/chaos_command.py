"""The command `chaos`: a plan file, or rounds of random plans, judged; what fails is shrunk."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from bus.files import read_file_within
from bus.points import POINTS
from bus.report import console_for, print_stories
from kvm.campaign import Round, rounds, run_round, shrink
from kvm.chaos_report import print_points, print_rounds, print_strikes
from kvm.plan import MAX_PLAN_BYTES, Plan, PlanError, parse_plan
from kvm.summary import SAFE, UNFINISHED, VIOLATED, summarize_run
from kvm.topology import MAX_CPUS
from kvm.watching import Watching
from seamldr.strategies import DEFAULT

STATUS = {"held": SAFE, "broken": VIOLATED, "unfinished": UNFINISHED}


def add_chaos_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `chaos`."""
    add = parser.add_argument
    add("plan", nargs="?", metavar="PLAN.toml", help="a plan to run; without one: random rounds")
    add("--rounds", type=int, default=10, metavar="R", help="random rounds (default 10)")
    add("--seed", type=int, default=1, metavar="S", help="of the first round; each further one counts up (default 1)")
    add("--cpus", type=int, default=8, metavar="N", help="CPUs of a random round (default 8)")
    add("--strategy", default=DEFAULT, metavar="NAME|FILE.py:FUNCTION", help=f"of random rounds (default {DEFAULT})")
    add("--knob", action="append", default=[], metavar="NAME=VALUE", help="of random rounds; repeat")
    add("--run-dir", metavar="DIR", help="where rounds go (default: a new one under runs/)")
    add("--keep", action="store_true", help="keep the records of rounds that held, too")
    add("--no-shrink", action="store_true", help="do not look for a smaller plan that fails in the same way")
    add("--watch", action="store_true", help="show the machine of the plan while it runs, on stderr")
    add("--list-points", action="store_true", help="print the points at which a fault can strike, and end")
    add("--json", action="store_true", help="print exactly one JSON object")
    parser.set_defaults(command=chaos_command)


def read_plan(path: str, cpus: int | None = None) -> Plan:
    """The plan in a file, for a machine of `cpus` CPUs if that is given; raises `PlanError` with file and line."""
    try:
        return parse_plan(read_file_within(path, MAX_PLAN_BYTES), cpus)
    except OSError as error:
        raise PlanError(f"plan {path} cannot be read: {error.strerror}") from None
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def chaos_command(arguments: argparse.Namespace) -> int:
    """Run it; the exit status."""
    if arguments.list_points:
        return _list_points(arguments)
    directory = _directory(arguments.run_dir)
    if arguments.plan:
        return _one(arguments, read_plan(arguments.plan), directory)
    if arguments.watch:
        raise PlanError("--watch goes with a plan")
    return _campaign(arguments, directory)


def _list_points(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(msgspec.json.encode({name: point.sentence for name, point in POINTS.items()}).decode())
    else:
        print_points(console_for(sys.stdout))
    return SAFE


def _directory(given: str | None) -> Path:
    path = Path(given) if given else Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-chaos"
    number = 0
    while given is None and path.exists():
        number += 1
        path = path.with_name(f"{path.name.partition('-chaos')[0]}-chaos-{number}")
    if path.exists() and any(path.iterdir()):
        raise PlanError(f"run directory {path} is not empty; name a new one")
    return path


def _one(arguments: argparse.Namespace, plan: Plan, directory: Path) -> int:
    """One plan, as `run` shows a run, with what became of its faults."""
    if arguments.watch:
        with Watching(plan.strategy) as watching:
            done = run_round(plan, directory, watching.follow)
    else:
        done = run_round(plan, directory)
    if arguments.json:
        print(msgspec.json.encode(done.as_dict()).decode())
        return STATUS[done.outcome]
    console = console_for(sys.stdout)
    print_strikes(console, done.strikes)
    print_rounds(console, [done])
    _tell_failure(console, done)
    return STATUS[done.outcome]


def _campaign(arguments: argparse.Namespace, directory: Path) -> int:
    for name, low, high in (("rounds", 1, 1_000_000), ("seed", 0, 1 << 62), ("cpus", 1, MAX_CPUS)):
        if not low <= getattr(arguments, name) <= high:
            raise PlanError(f"{name} is {low} to {high}, not {getattr(arguments, name)}")
    knobs = _knobs(arguments)
    done: list[Round] = []
    with _progress() as progress:
        task = progress.add_task("chaos", total=arguments.rounds)
        for one in rounds(
            arguments.rounds,
            arguments.seed,
            directory,
            cpus=arguments.cpus,
            strategy=arguments.strategy,
            knobs=knobs,
            keep=arguments.keep,
        ):
            done.append(one)
            progress.update(task, advance=1, description=f"seed {one.plan.seed}: {one.outcome}")
            if not sys.stderr.isatty() and (one.outcome != "held" or len(done) % 10 == 0):
                print(f"seamlab: round {len(done)}, seed {one.plan.seed}: {one.outcome}", file=sys.stderr, flush=True)
        failed = next((one for one in done if one.outcome == "broken"), None)
        smallest = failed
        if failed is not None and not arguments.no_shrink:
            shrinking = progress.add_task("shrinking", total=None)

            def on_try(plan: Plan) -> None:
                progress.update(shrinking, description=f"shrinking: {len(plan.fault)} faults, {plan.cpus} CPUs")

            smallest = shrink(failed, directory / "shrunk", on_try)
    if arguments.json:
        found = None if smallest is None else smallest.as_dict()
        print(msgspec.json.encode({"schema": 1, "rounds": [one.as_dict() for one in done], "smallest": found}).decode())
    else:
        console = console_for(sys.stdout)
        print_rounds(console, done)
        if smallest is not None:
            print_strikes(console, smallest.strikes)
            _tell_failure(console, smallest)
    return max((STATUS[one.outcome] for one in done), key=lambda status: (status == VIOLATED, status))


def _knobs(arguments: argparse.Namespace) -> dict[str, str | int]:
    pairs = [setting.partition("=") for setting in arguments.knob]
    return {name: value for name, _, value in pairs}


def _tell_failure(console: Console, failed: Round) -> None:
    if failed.outcome == "held":
        return
    if failed.broken:
        print_stories(console, summarize_run(Path(failed.run_dir)))
    console.print(Text(f"Run it again: seamlab chaos {failed.run_dir}/plan.toml"), soft_wrap=True)
    console.print(Text(f"Look closer:  seamlab why {failed.run_dir}"), soft_wrap=True)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
