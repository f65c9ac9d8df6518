"""Every text architecture of the installed transformers: what of a tiny random model of each uhl edits and tunes.

    python tests/benchmarks/architectures.py --output tests/benchmarks/results/architectures.json [--only NAME ...]

One row each.  Rows that the output holds are kept, but for those of `--only`.  The exit code is 1 if a row crashed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_adapters import SMALL, tiny_universal
from tiny_architectures import NoTextModelError, all_names, architecture_tokenizer, tiny_architecture
from tiny_hosts import SENTENCES, tiny_host

from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.api import UniversalAdapter
from uhl_cli.errors import UhlError
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import Host, wrap_host
from uhl_cli.host.encode import encode
from uhl_cli.host.hostmap import MODULE_TYPES
from uhl_cli.host.loading import quiet
from uhl_cli.train.student import Student, StudentModel, Trained

TEXTS = (*SENTENCES[:4], "rain")
STEPS = 3
DEGREES = ("all", "some", "stream", "refused", "crash")


def final_state(host: Host) -> Tensor:
    """The host's own final state of the texts."""
    with torch.no_grad():
        state: Tensor = host.map.base(**encode(host, TEXTS).model_inputs())[0]
    return state


def hooks_of(model: nn.Module) -> int:
    """Number of hooks of all kinds on all modules."""
    return sum(
        len(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if "hook" in name and hasattr(value, "__len__")
    )


def silent(adapter: PortedAdapter) -> PortedAdapter:
    """The adapter with all of its hooks, and updates that are zero."""
    layers = {index: layer.scaled(0.0) for index, layer in adapter.by_layer.items()}
    return PortedAdapter(adapter.threshold, layers, adapter.readout)


def tuned(adapter: UniversalAdapter, host: Host, trained: Trained, before: Tensor) -> dict[str, Any]:
    """A few steps of training: whether the loss fell, the output moved, and how many modules' LoRA had gradients."""
    aligned = adapter.align(host, max_flops=1e9)
    delta = adapter.stored["delta_theta"]
    shape = (delta.shape[0], delta.shape[1])
    student = Student(adapter.start(aligned), host.map, trained, readout=False, delta_shape=shape, rank=2)
    parameters = [value for value in student.parameters() if value.requires_grad]
    found: dict[str, Any] = {"modules": 0 if student.adapter().lora is None else len(student.adapter().lora.by_module)}
    if not found["modules"]:
        return found
    optimizer = torch.optim.AdamW(parameters, lr=0.005, weight_decay=0.0)
    model, encoded = StudentModel(student, host), encode(host, TEXTS)
    targets = torch.arange(len(TEXTS)) % SMALL.num_labels
    losses = []
    for step in range(STEPS + 1):
        loss = model(encoded, None, targets, 0).total
        losses.append(float(loss.detach()))
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found["loss"] = [round(losses[0], 4), round(losses[-1], 4)]
    if trained == "lora":
        ups = [value.grad for name, value in student.factors.items() if name.startswith("up:")]
        found["reached"] = sum(bool(grad is not None and grad.any()) for grad in ups)
    with torch.no_grad(), attach(host.map, student.adapter()):
        found["moved"] = not torch.equal(final_state(host), before)
    return found


def row_of(adapter: UniversalAdapter, model: nn.Module, row: dict[str, Any]) -> None:
    """Fill a row; what was found before an error stays in it."""
    host = wrap_host(model, architecture_tokenizer())
    row["degree"] = host.map.degree
    problems = dict.fromkeys(layer.problem for layer in host.map.layers if layer.problem)
    row["problem"] = "; ".join(problems)
    kinds = Counter(kind for layer in host.map.layers for kind in layer.target_modules)
    row["layers"] = len(host.map.layers)
    row["updates"] = {kind: kinds[kind] for kind in MODULE_TYPES if kinds[kind]}
    host.model.requires_grad_(False)
    weights = {name: value.clone() for name, value in host.model.state_dict().items()}
    before, hooks = final_state(host), hooks_of(host.model)
    ported = adapter.port(host, max_flops=1e9, strength=1.0)
    zero = adapter.port(host, max_flops=1e9, strength=0.0)
    with torch.no_grad():
        logits, others = ported(list(TEXTS)), zero(list(TEXTS))
    row["ported"] = bool(logits.isfinite().all()) and not torch.equal(logits, others)
    still = True
    for bare in (zero.adapter, silent(ported.adapter)):
        with attach(host.map, bare):
            still = still and torch.equal(final_state(host), before)
    row["zero_strength_is_the_host"] = still
    row["delta_theta"] = tuned(adapter, host, "delta-theta", before)
    row["lora"] = tuned(adapter, host, "lora", before)
    same = all(torch.equal(value, weights[name]) for name, value in host.model.state_dict().items())
    row["restored"] = same and hooks_of(host.model) == hooks and torch.equal(final_state(host), before)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Context manager: it raises TimeoutError once so many seconds have passed."""

    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def survey(adapter: UniversalAdapter, name: str, limit: int) -> dict[str, Any]:
    """The row of one architecture.

    :raises NoTextModelError: It is none.
    """
    model = tiny_architecture(name)
    row: dict[str, Any] = {"name": name, "class": type(model).__name__, "degree": "refused", "problem": ""}
    start = time.perf_counter()
    try:
        with limited(limit):
            row_of(adapter, model, row)
    except UhlError as error:
        row["problem"] = f"{error.message} {row['problem']}".strip()
    except TimeoutError as error:
        row["problem"] = f"{error}; {row['problem']}"
    except Exception as error:  # noqa: BLE001 - a crash is what the table counts
        row["degree"] = "crash"
        row["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of rows."""
    degrees = Counter(row["degree"] for row in rows)
    hosts = [row for row in rows if row["degree"] in DEGREES[:3]]
    tunable = [row for row in hosts if row.get("lora", {}).get("modules")]
    return {
        "architectures": len(rows),
        **{degree: degrees[degree] for degree in DEGREES},
        "ported": sum(row.get("ported", False) for row in hosts),
        "zero_strength_is_the_host": sum(row.get("zero_strength_is_the_host", False) for row in hosts),
        "tuned": sum(row["lora"].get("moved", False) and row["delta_theta"].get("moved", False) for row in tunable),
        "without_linear_modules": len(hosts) - len(tunable),
        "restored": sum(row.get("restored", False) for row in hosts),
    }


def written(rows: list[dict[str, Any]], others: dict[str, str]) -> str:
    """The table as JSON, a line each row."""
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    ends = {"transformers": transformers.__version__, "torch": torch.__version__, "summary": summary(rows)}
    head = json.dumps(ends, indent=1)[1:-2]
    reasons = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(reason)}" for name, reason in others.items())
    return f'{{{head},\n "rows": [\n  {lines}\n ],\n "no_text_model": {{\n  {reasons}\n }}\n}}\n'


def main() -> int:
    """Make what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--limit", type=int, default=120, help="seconds a row may take")
    arguments = parser.parse_args()
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": [], "no_text_model": {}}
    rows = {row["name"]: row for row in known["rows"] if row["name"] not in arguments.only}
    others: dict[str, str] = {name: why for name, why in known["no_text_model"].items() if name not in arguments.only}
    adapter = tiny_universal(tiny_host("bert"))
    for name in arguments.only or all_names():
        if name in rows or name in others:
            continue
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows[name] = row = survey(adapter, name, arguments.limit)
                print(f"{name}: {row['degree']}, {row['seconds']} s. {row['problem'][:160]}", flush=True)
            except NoTextModelError as error:
                others[name] = str(error)
        ordered = [rows[known] for known in all_names() if known in rows]
        write_text(arguments.output, written(ordered, others))
    ordered = list(rows.values())
    print(", ".join(f"{number} {key}" for key, number in summary(ordered).items()))
    slowest = sorted(ordered, key=lambda row: -row["seconds"])[:5]
    print("slowest:", ", ".join(f"{row['name']} {row['seconds']} s" for row in slowest))
    return int(any(row["degree"] == "crash" for row in ordered))


if __name__ == "__main__":
    sys.exit(main())
