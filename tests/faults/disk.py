"""A disk fault at every operation on a file: one line that says so, no torn output, nothing left, and the run goes on.

    python tests/faults/disk.py --json tests/faults/disk.json

Faults are full disk, input/output error and permission denied, by turns (three seeds give each operation all of them),
at open, mkdir, rename, unlink, rmdir and fsync.  Writes fail at a size: in a file that grows beyond it, whichever
library writes it.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from operations import Operations
from runs import RUNS, STEPS, UNFINISHED, Run, of_output, prepare, tree, undisturbed

SAVE_EVERY = STEPS // 2
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
# Where an operation of this kind fails, what it should remove is still there; the next run removes it.
REMOVING = ("unlink", "rmdir", "opendir")


def failing_at(operations: Operations, place: int, number: int) -> Callable[[], None]:
    """For the child: the operation at this place fails with this error."""

    def fail(at: int, _kind: str) -> None:
        if at == place:
            raise OSError(number, os.strerror(number))

    return lambda: operations.watch(fail)


def small_files(size: int) -> Callable[[], None]:
    """For the child: a write beyond this size fails."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def check(run: Run, folder: Path, whole: dict[str, bytes | None], first: Callable[[], None], *, removing: bool) -> bool:
    """Do the run with a fault, then again without; whether the fault was an error.

    :raises AssertionError: With what is wrong.
    """
    shutil.rmtree(folder, ignore_errors=True)
    code, said = undisturbed(run, folder, save_every=SAVE_EVERY, first=first)
    found = tree(folder)
    lines = said.splitlines()
    assert code in (0, 1), f"exit code {code}: {said[-2000:]}"
    if code:
        assert len(lines) == 1, said[-2000:]
        assert lines[0].startswith("error: "), said[-2000:]
    output = of_output(found, run.output)
    complete = output == of_output(whole, run.output)
    assert complete or not output, f"a torn output: {sorted(output)}"
    assert complete or code, "no output, and no error"
    left = sorted(name for name in found if name not in output and not name.startswith(run.output + UNFINISHED))
    assert not left or removing, f"left: {left}"
    code_again, said = undisturbed(run, folder, save_every=SAVE_EVERY, again=True)
    assert code_again == 0 or (complete and "already exists" in said), f"again: {said[-2000:]}"
    found = tree(folder)
    assert found == whole, sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
    return bool(code)


def campaign(root: Path, most: int | None, seed: int) -> dict[str, object]:
    """Let every operation of every run fail in turn, or a random choice, in a prepared folder; the summary.

    :param most: Faults for each command, drawn by the seed; None for all of them.
    """
    draw = random.Random(seed)
    counts: dict[str, Counter[str]] = {}
    problems: list[str] = []
    for run in RUNS:
        operations = Operations(root / "whole")
        code, said = undisturbed(run, root / "whole", save_every=SAVE_EVERY, first=operations.watch)
        assert code == 0, said
        whole, kinds = tree(root / "whole"), operations.kinds
        shutil.rmtree(root / "whole")
        cases = [(place, ERRORS[(place + seed) % len(ERRORS)]) for place in range(len(kinds))]
        limits = sorted({0, *(size for content in whole.values() if content for size in (1, len(content) - 1))})
        cases += [(-1, size) for size in limits]
        found = counts[run.name] = Counter()
        for place, number in cases if most is None else draw.sample(cases, most):
            kind = "write" if place < 0 else kinds[place]
            operations = Operations(root / "case")
            first = small_files(number) if place < 0 else failing_at(operations, place, number)
            what = f"{run.name}: {kind} {place}, {number}"
            try:
                error = check(run, root / "case", whole, first, removing=kind in REMOVING)
                found[f"{kind}: {'an error' if error else 'no harm'}"] += 1
            except AssertionError as problem:
                problems.append(f"{what}: {problem}")
                print(problems[-1], file=sys.stderr, flush=True)
        print(run.name, dict(found), file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "faults": sum(sum(found.values()) for found in counts.values()) + len(problems),
        "problems": problems,
        "counts": {name: dict(sorted(found.items())) for name, found in counts.items()},
    }


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, help="faults for each command (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="uhl-disk-") as folder:
        root = Path(folder).resolve()
        prepare(root)
        summary = campaign(root, given.most, given.seed)
    text = json.dumps(summary, indent=1) + "\n"
    print(text, end="")
    if given.json:
        given.json.write_text(text)
    sys.exit(bool(summary["problems"]))


if __name__ == "__main__":
    main()
