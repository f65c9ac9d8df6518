"""kill -9 at random moments: after it the run, resumed or repeated, ends with the same bytes, and nothing else is left.

Every other moment is a random time; the others are before a random operation on a file, since a write is soon over.

python tests/faults/kills.py --kills 200 --json tests/faults/kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from operations import Operations
from runs import RUNS, UNFINISHED, Run, of_output, prepare, tree, undisturbed
from warm import ended, start

SAVE_EVERY = 3
# Of the resumed runs, this share is killed once more.
TWICE = 0.3


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its files, how long it takes, and how many operations on files it does."""

    files: dict[str, bytes | None]
    seconds: float
    operations: int


def killed(run: Run, folder: Path, whole: Whole, draw: random.Random, *, by_time: bool, again: bool) -> bool:
    """Start the run and kill it at a random moment; whether it was still running."""
    operations, fatal = Operations(folder), draw.randrange(whole.operations)

    def watch() -> None:
        if not by_time:
            operations.watch(lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == fatal else None)

    with Path(os.devnull).open("wb") as nowhere:
        child = start(run.call(again=again, save_every=SAVE_EVERY), folder, nowhere.fileno(), watch)
    if by_time:
        time.sleep(draw.uniform(0.0, whole.seconds))
        os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def torn(run: Run, found: dict[str, bytes | None], whole: dict[str, bytes | None]) -> list[str]:
    """What is wrong in a folder right after a kill."""
    problems = []
    output = of_output(found, run.output)
    files = {name for name, content in output.items() if content is not None}
    if files and output != of_output(whole, run.output):
        problems.append("a torn output")
    allowed = (f"{run.output}{UNFINISHED}", f".{run.output}.", run.output)
    problems += [f"{name} is not documented" for name in found if not name.startswith(allowed)]
    return problems


def one(run: Run, folder: Path, undisturbed_run: Whole, draw: random.Random, *, by_time: bool) -> Counter[str]:
    """Kill the run once or twice, then let it end; what was counted.

    :raises AssertionError: With what is wrong.
    """
    counts: Counter[str] = Counter()
    whole = undisturbed_run.files
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    while True:
        again = counts["kills"] > 0
        if not killed(run, folder, undisturbed_run, draw, by_time=by_time, again=again):
            if not again:  # it was faster than before
                shutil.rmtree(folder)
                folder.mkdir()
                continue
            break
        counts["kills"] += 1
        found = tree(folder)
        counts["by time"] += by_time
        counts["with a checkpoint"] += any(name.endswith("/checkpoint.safetensors") for name in found)
        counts["while a file was written"] += any(".uhl-tmp" in name for name in found)
        counts["with the output complete"] += of_output(found, run.output) == of_output(whole, run.output)
        problems = torn(run, found, whole)
        assert not problems, problems
        if draw.random() >= TWICE:
            break
    code, said = undisturbed(run, folder, save_every=SAVE_EVERY, again=True)
    found = tree(folder)
    done = code == 0 or (code == 1 and "already exists" in said)
    assert done, f"exit code {code}: {said[-2000:]}"
    assert found == whole, sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
    return counts


def campaign(kills: int, seed: int, root: Path) -> dict[str, object]:
    """Kill the commands in turn at random moments, at least `kills` times, in a prepared folder; the summary."""
    draw = random.Random(seed)
    wholes = {}
    for run in RUNS:
        operations, started = Operations(root / "whole"), time.monotonic()
        code, said = undisturbed(run, root / "whole", save_every=SAVE_EVERY, first=operations.watch)
        assert code == 0, said
        files = tree(root / "whole")
        wholes[run.name] = Whole(files, time.monotonic() - started, len(operations.kinds))
        assert of_output(files, run.output) == files, "something is left after success"
        shutil.rmtree(root / "whole")
    counts: dict[str, Counter[str]] = {run.name: Counter() for run in RUNS}
    problems: list[str] = []
    number = 0
    while number < len(RUNS) or sum(found["kills"] for found in counts.values()) < kills:
        run = RUNS[number % len(RUNS)]
        number += 1
        try:
            by_time = number % 2 == 1  # there is an odd number of commands, so that each meets both
            counts[run.name].update(one(run, root / "case", wholes[run.name], draw, by_time=by_time))
        except AssertionError as error:
            problems.append(f"{run.name}: {error}")
            counts[run.name]["kills"] += 1
        print(number, run.name, dict(counts[run.name]), problems[-1:], file=sys.stderr, flush=True)
    total = sum(counts.values(), Counter())
    return {
        "seed": seed,
        "kills": total["kills"],
        "runs killed": number,
        "differing outputs, torn files, leftovers": len(problems),
        "problems": problems,
        "counts": {name: dict(sorted(found.items())) for name, found in counts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="uhl-kills-") as folder:
        root = Path(folder).resolve()
        prepare(root)
        summary = campaign(given.kills, given.seed, root)
    text = json.dumps(summary, indent=1) + "\n"
    print(text, end="")
    if given.json:
        given.json.write_text(text)
    sys.exit(bool(summary["problems"]))


if __name__ == "__main__":
    main()
