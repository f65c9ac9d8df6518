"""Run the fuzzer: `python tests/fuzz/fuzz_run.py --cases 1000000 --state tests/fuzz/results.json`.

Case i depends on the seed and on i alone.  Cases run in chunks, each in a process of its own with a limit of memory; a
process that dies or hangs is a finding too, and the rest of its chunk goes on.  The state file is the summary: started
again with it, the run goes on where it stopped.  Two seeds can run at once; `results.json` and `results-1.json` are
550,000 and 450,000 cases of the seeds 0 and 1.  `--case I` runs one case and shows what it does.

A finding is: an exception other than `UhlError`, a message that is not one printable line, a case of more than 5 s (of
the processor, where it took that long by the clock) or 1 GB, a dead process, numbers that are not finite, or a file
that the reader refuses and `uhl inspect --verify` does not.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":
    for _name, _value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ[_name] = _value
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from fuzz_targets import Target, described, problems_of, uhl_targets

from uhl_cli.errors import UhlError
from uhl_cli.files import write_text

MAX_SECONDS = 5.0
MAX_BYTES = 2**30
CHUNK = 1000
_LOG_BYTES = 2**22
# A process that finishes no case for so long is stopped; twice at the same case is a finding.
_HANG = 20.0
_NO_END = "no end after"
# Share of the cases that `uhl inspect` reads as well.
_INSPECTED = 0.05


@dataclass
class Outcome:
    """What a case did: refused when read or when run, or accepted and perhaps run; `problem` if it is a finding."""

    target: str
    kind: str
    seconds: float = 0.0
    problem: str = ""


def run_case(targets: Sequence[Target], seed: int, index: int, folder: Path) -> Outcome:
    """Case `index`, in a folder that holds nothing but files of other cases."""
    draw = Random(seed * 2**40 + index)
    target = draw.choices(targets, [each.weight for each in targets])[0]
    runs, inspected = draw.random() < target.run_share, draw.random() < _INSPECTED
    path = target.make(folder, draw)
    outcome = Outcome(target.name, "refused")
    start = time.perf_counter()
    try:
        _follow(target, path, outcome, runs=runs, inspected=inspected)
    except UhlError as error:
        outcome.problem = outcome.problem or _flaw(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - any other exception is what the fuzzer looks for; Rust's panics too
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [each for each in traceback.extract_tb(error.__traceback__) if "uhl_cli" in each.filename][-1:]
        where = " in ".join(f"{Path(each.filename).name}:{each.lineno}" for each in (last, *ours))
        outcome.problem = f"{type(error).__name__}: {str(error)[:200]} at {where}"
    outcome.seconds = time.perf_counter() - start
    return outcome


def _follow(target: Target, path: Path, outcome: Outcome, *, runs: bool, inspected: bool) -> None:
    """Read, inspect and run a mutant; `outcome.kind` says how far it came.

    :raises UhlError: It was refused.
    """
    if inspected and target.judge is not None:
        _compare_with_verify(target.judge, path, outcome)
    content = target.read(path)
    outcome.kind = "accepted"
    if runs:
        outcome.kind = "refused when run"
        if not all(bool(torch.isfinite(values).all()) for values in target.run(content, path)):
            outcome.problem = "its outputs are not finite"
        outcome.kind = "run"


def _compare_with_verify(judge: Callable[[Path], Any], path: Path, outcome: Outcome) -> None:
    """What the reader refuses, `uhl inspect --verify` refuses; what it accepts, `uhl inspect` describes."""
    try:
        judge(path)
    except UhlError as error:
        if not problems_of(path):
            outcome.problem = f"the reader says {error}; --verify finds nothing"
    else:
        problems_of(path)
        described(path)


def _flaw(error: UhlError) -> str:
    """What is wrong with a typed error: not one line, no hint, or made of a lack of memory."""
    if not str(error).isprintable() or not error.message or not error.hint:
        return f"not one line with a hint: {str(error)!r}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return f"{type(cause).__name__} inside: {error}"
        cause = cause.__cause__ or cause.__context__
    return ""


def run_chunk(targets: Sequence[Target], seed: int, start: int, end: int, *, hang: float = _HANG) -> dict[str, Any]:
    """Cases [start, end) in processes of their own: counts by target and kind, findings, slowest, memory."""
    totals: dict[str, Any] = fresh_state(seed)
    stopped = -1
    while start < end:
        log = mmap.mmap(-1, _LOG_BYTES)  # a write to it takes no system call, and outlives the process
        with tempfile.TemporaryDirectory() as name:
            reason = _in_process(targets, seed, start, end, Path(name), log, hang)
        outcomes = [json.loads(line) for line in log[8 : 8 + _filled(log)].splitlines()]
        for index, outcome in enumerate(outcomes, start):
            _count(totals, outcome["target"], outcome["kind"])
            totals["slowest"] = max(totals["slowest"], [outcome["seconds"], index])
            totals["most_bytes"] = max(totals["most_bytes"], outcome["grown"])
            if outcome["problem"]:
                totals["findings"].append({"case": index} | {key: outcome[key] for key in ("target", "problem")})
        start += len(outcomes)
        if reason.startswith(_NO_END) and stopped != start:  # again, for the machine may have stood still
            stopped = start
        elif reason:
            totals["findings"].append({"case": start, "target": "?", "problem": reason})
            _count(totals, "?", "died")
            start += 1
    return totals


def _filled(log: mmap.mmap) -> int:
    return int.from_bytes(log[:8], "little")


def _in_process(
    targets: Sequence[Target], seed: int, start: int, end: int, folder: Path, log: mmap.mmap, hang: float
) -> str:
    """Run the cases in a child, which writes a line for each into the log; why it stopped early, if it did."""
    child = os.fork()
    if child == 0:
        try:
            _work(targets, seed, start, end, folder, log)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(70)
    seen, since = 0, time.monotonic()
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else f"the process died ({code})"
        if _filled(log) != seen:
            seen, since = _filled(log), time.monotonic()
        if time.monotonic() - since > hang:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"{_NO_END} {hang:g} s"
        time.sleep(0.05)


def _work(targets: Sequence[Target], seed: int, start: int, end: int, folder: Path, log: mmap.mmap) -> None:
    """The child's part."""
    warnings.simplefilter("ignore")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES, taken + MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _peak()
    for index in range(start, end):
        outcome = run_case(targets, seed, index, folder)
        if outcome.seconds > MAX_SECONDS and not outcome.problem:  # again, for the machine may have been busy
            start = time.process_time()
            run_case(targets, seed, index, folder)
            outcome.seconds = time.process_time() - start
            if outcome.seconds > MAX_SECONDS:
                outcome.problem = f"it took {outcome.seconds:.1f} s"
        # A system call: not after every case.
        grown = _peak() - before if index % 50 == 0 or index == end - 1 else 0
        line = json.dumps(asdict(outcome) | {"grown": grown}).encode() + b"\n"
        filled = _filled(log)
        log[8 + filled : 8 + filled + len(line)] = line
        log[:8] = (filled + len(line)).to_bytes(8, "little")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count(totals: dict[str, Any], target: str, kind: str) -> None:
    counts = totals["counts"].setdefault(target, {})
    counts[kind] = counts.get(kind, 0) + 1


def _add(totals: dict[str, Any], more: dict[str, Any]) -> None:
    """Add a chunk's totals."""
    for target, counts in more["counts"].items():
        own = totals["counts"].setdefault(target, {})
        for kind, number in counts.items():
            own[kind] = own.get(kind, 0) + number
    totals["findings"] += more["findings"]
    for name in ("slowest", "most_bytes"):
        totals[name] = max(totals[name], more[name])


def go_on(targets: Sequence[Target], state: dict[str, Any], cases: int, keep: Path | None = None) -> dict[str, Any]:
    """Run up to `cases` cases in all from where the state stopped; writes it to `keep` after every chunk."""
    while state["cases"] < cases:
        started, end = time.monotonic(), min(state["cases"] + CHUNK, cases)
        _add(state, run_chunk(targets, state["seed"], state["cases"], end))
        state["cases"] = end
        state["seconds"] = round(state["seconds"] + time.monotonic() - started, 1)
        if keep is not None:
            write_text(keep, json.dumps(state, indent=1, sort_keys=True) + "\n")
            print(
                f"{end:,} cases, {len(state['findings'])} findings, {end / state['seconds']:.0f} a second", flush=True
            )
    return state


def fresh_state(seed: int) -> dict[str, Any]:
    """The state before the first case."""
    return {
        "seed": seed,
        "cases": 0,
        "seconds": 0.0,
        "counts": {},
        "findings": [],
        "slowest": [0.0, 0],  # seconds, case
        "most_bytes": 0,
    }


def main() -> int:
    """Run the fuzzer from the command line; the exit status is 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, help="number of cases in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("fuzz.json"), help="summary, from which a run goes on")
    parser.add_argument("--only", default="", help="only the targets whose name holds this")
    parser.add_argument("--case", type=int, help="run this case alone, and keep its mutant")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-case"), help="folder for that mutant")
    given = parser.parse_args()
    targets = [target for target in uhl_targets() if given.only in target.name]
    if given.case is not None:
        given.keep.mkdir()
        print(run_case(targets, given.seed, given.case, given.keep))
        return 0
    state = json.loads(given.state.read_text()) if given.state.exists() else fresh_state(given.seed)
    found = go_on(targets, state, given.cases, given.state)["findings"]
    for finding in found[:50]:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
