"""What labelling a large file takes: `uhl predict` beside a bare `transformers.pipeline`, each in processes of its own.

    uhl tune FILE --target HOST --parameters lora --output LORA
    uhl export FILE --target HOST --task-file LORA --format merged --output MERGED
    python tests/benchmarks/predict.py --shared SHARED --adapter FILE --target HOST --lora LORA --merged MERGED \
        --output tests/benchmarks/results/predict.json

The file holds SST-2's training sentences, as often as it takes.  Systems: the merged folder by `uhl predict` and by the
pipeline (batches of the same size, in the order of the file, its lines read one by one and JSON lines written too), the
LoRA's folder unmerged, and the adapter file routed.  They take turns.  Lines a second are counted from the end of
loading to the last line, medians of all turns; a ratio is to the pipeline's, of the same run, with the smallest and
largest ratio of single turns.  Peak memory is that of the whole process (ru_maxrss), for the file and for its first
thousand lines: what the length of a file adds is the difference.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import transformers

from uhl_cli.files import write_text

FEW = 1000
BARE = "pipeline, merged"


def write_lines(path: Path, shared: Path, count: int) -> None:
    """So many lines of text."""
    with (shared / "data" / "sst2" / "train.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        sentences = list(islice((row["sentence"] for row in rows), count))
    with path.open("w", encoding="utf-8") as out:
        out.writelines(f"{sentence}\n" for sentence in islice(cycle(sentences), count))


def bare(model: str, path: Path, output: Path, batch_size: int, device: str) -> None:
    """The pipeline on its own; prints its seconds without loading."""
    speaks = transformers.pipeline(
        "text-classification", model=model, top_k=None, batch_size=batch_size, device=device, truncation=True
    )

    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)

    started = time.monotonic()
    with output.open("w", encoding="utf-8") as out:
        for text, said in zip(lines(), speaks(lines()), strict=True):
            scores = {f"probability_{each['label']}": each["score"] for each in said}
            out.write(json.dumps({"text": text, "label": said[0]["label"]} | scores, ensure_ascii=False) + "\n")
    print(json.dumps({"seconds": time.monotonic() - started}))


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds of labelling, as the process itself reports them, and its peak memory in bytes."""
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        said = printed.read()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    unit = 1 if platform.system() == "Darwin" else 1024
    return json.loads(said)["seconds"], usage.ru_maxrss * unit


def commands(arguments: argparse.Namespace, texts: Path, output: Path) -> dict[str, list[str]]:
    """How each system is called to label a file."""
    size, device = str(arguments.batch_size), arguments.device
    given = ["--input", str(texts), "--output", str(output), "--overwrite", "--json", "--quiet"]
    given += ["--batch-size", size, "--device", device, "--offline"]
    predict = [sys.executable, "-m", "uhl_cli", "predict"]
    here = [sys.executable, __file__, "--bare", str(arguments.merged), "--texts", str(texts), "--output", str(output)]
    return {
        BARE: [*here, "--batch-size", size, "--device", device],
        "merged": [*predict, str(arguments.merged), *given],
        "LoRA, unmerged": [*predict, str(arguments.lora), *given, "--target", arguments.target],
        "adapter, routed": [*predict, str(arguments.adapter), *given, "--target", arguments.target],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--adapter", type=Path, default=Path("adapters/sst2-minilm-l6.safetensors"))
    parser.add_argument("--target", help="the host that the LoRA and the merged folder were made for")
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--merged", type=Path)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        bare(arguments.bare, arguments.texts, arguments.output, arguments.batch_size, arguments.device)
        return
    with tempfile.TemporaryDirectory() as folder:
        many, few, output = (Path(folder) / name for name in ("many.txt", "few.txt", "out.jsonl"))
        write_lines(many, arguments.shared, arguments.lines)
        write_lines(few, arguments.shared, min(FEW, arguments.lines))
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, list[int]] = {}
        for turn in range(arguments.turns):
            for name, command in commands(arguments, many, output).items():
                taken, peak = measured(command)
                seconds.setdefault(name, []).append(taken)
                peaks.setdefault(name, []).append(peak)
                print(f"turn {turn + 1}, {name}: {arguments.lines / taken:.0f} lines a second", file=sys.stderr)
        small = {name: measured(command)[1] for name, command in commands(arguments, few, output).items()}
    results: dict[str, Any] = {}
    for name, values in seconds.items():
        ratios = [base / own for base, own in zip(seconds[BARE], values, strict=True)]
        results[name] = {
            "lines_per_second": arguments.lines / statistics.median(values),
            "ratio": statistics.median(seconds[BARE]) / statistics.median(values),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "peak_bytes": max(peaks[name]),
            f"peak_bytes_of_{min(FEW, arguments.lines)}_lines": small[name],
        }
        row = results[name]
        print(f"{name}: {row['lines_per_second']:.0f} lines a second, {row['ratio']:.2f} of the pipeline's")
    content = {name: getattr(arguments, name) for name in ("lines", "turns", "batch_size", "device")}
    content |= {
        "target": arguments.target.rstrip("/").split("/")[-1],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": results,
    }
    content |= {"threads": torch.get_num_threads()}
    write_text(arguments.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
