"""How long `uhl` takes to say something: commands against the interpreter's own start, interleaved, medians.

    python tests/benchmarks/startup.py --output tests/benchmarks/results/startup.json

`loading a file` is `UniversalAdapter.load` alone, in this process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from uhl_cli.api import UniversalAdapter

ADAPTER = str(Path(__file__).parents[2] / "adapters" / "sst2-minilm-l6.safetensors")
COMMANDS = {
    "uhl --help": ["--help"],
    "uhl --version": ["--version"],
    "uhl pretrain --help": ["pretrain", "--help"],
    "uhl port --help": ["port", "--help"],
    "uhl demo --help": ["demo", "--help"],
    "uhl inspect FILE": ["inspect", ADAPTER],
    "uhl budget FILE": ["budget", ADAPTER],
}
LOADING = "loading a file"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=30)
    arguments = parser.parse_args()
    script = shutil.which("uhl", path=str(Path(sys.executable).parent))
    calls = {"python -c pass": [sys.executable, "-c", "pass"]}
    calls |= {name: [sys.executable, script, *rest] for name, rest in COMMANDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*calls, LOADING)}
    for repetition in range(arguments.repetitions + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            subprocess.run(call, check=True, capture_output=True)
            if repetition >= 2:  # the first rounds fill the file cache
                seconds[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        UniversalAdapter.load(ADAPTER)
        if repetition >= 2:
            seconds[LOADING].append(time.perf_counter() - started)
    own = statistics.median(seconds["python -c pass"])
    results = {}
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        median = statistics.median(values)
        results[name] = {"median": median, "quartiles": [quartiles[0], quartiles[2]], "ratio": median / own}
        if name in calls:
            results[name]["over the interpreter"] = median - own
        print(f"{name}: {median:.3f} s, {median / own:.1f} of the interpreter's own start", file=sys.stderr)
    arguments.output.write_text(json.dumps({"repetitions": arguments.repetitions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
