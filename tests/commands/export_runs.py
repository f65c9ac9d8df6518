"""Exports of tiny hosts as short calls, and loading them where uhl cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tiny_hosts import tiny_host
from toy_runs import TINY_LIMIT

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands import export as module
from uhl_cli.commands.options import ExportOptions, HostOptions, TuneTraining
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import encode
from uhl_cli.reports import ExportReport
from uhl_cli.train.standard import StandardClassifier

TEXTS = ("The film is warm", "", "Anna didn't cross the bridge, naïve 😀!", "a dull one " * 30, "It was raining.")
PAIRS = ("Two dogs ran.", "x", "y", "The soup was cold.", "I loved every minute " * 20)


def options_for(adapter: Path, output: Path, **changes: Any) -> ExportOptions:
    """Three steps of rank 2; names of `TuneTraining` and `ExportOptions` may be changed."""
    training: dict[str, Any] = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, "readout_learning_rate": 1e-2}
    training |= {name: changes.pop(name) for name in list(changes) if name in TuneTraining.model_fields}
    settings: dict[str, Any] = {"max_flops": TINY_LIMIT, "save_every": 3, "rank": 2} | changes
    target = HostOptions(name="tiny", device="cpu")
    return ExportOptions(adapter=adapter, target=target, output=output, training=TuneTraining(**training), **settings)


def run(
    adapter: Path, output: Path, host: Host | None = None, *, data: Any = None, evaluation: Any = None, **changes: Any
) -> ExportReport:
    """Export to a loaded host."""
    more = {name: changes.pop(name) for name in ("files", "reporter") if name in changes}
    return module.export(
        UniversalAdapter.load(adapter),
        host or tiny_host("llama", hidden_size=40, num_hidden_layers=3, seed=1),
        data,
        options_for(adapter, output, **changes),
        evaluation=evaluation,
        accelerator=Accelerator(cpu=True),
        **more,
    )


class Inside:
    """Within it, what is written is kept as it is inside uhl: `logits` has those of `TEXTS` as uhl reads them."""

    def __init__(self, host: Host, *, pairs: bool = False) -> None:
        self._host, self._pairs = host, PAIRS if pairs else None
        self._write = module._write
        self.logits: torch.Tensor | None = None
        self.ids: list[list[int]] = []

    def __enter__(self) -> Inside:
        def write(output: Path, record: Any, classifier: StandardClassifier, *rest: Any) -> None:
            # The host as it was given, not the one with the tokenizer that is saved.
            encoded = encode(self._host, TEXTS, self._pairs, max_length=record.max_length)
            with torch.inference_mode():
                self.logits = classifier.model(**encoded.model_inputs()).logits
            self.ids = encoded.input_ids.tolist()
            self._write(output, record, classifier, *rest)

        module._write = write
        return self

    def __exit__(self, *_: object) -> None:
        module._write = self._write


_ALONE = """
import json, sys, warnings
warnings.simplefilter("ignore")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "uhl_cli":
            raise ImportError("uhl is not installed here")
sys.meta_path.insert(0, Blocker())
import torch, transformers
from peft import AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification
from transformers import AutoTokenizer, pipeline
CLASSES = {"sequence": ("SequenceClassification", AutoPeftModelForSequenceClassification),
           "tokens": ("TokenClassification", AutoPeftModelForTokenClassification)}
def loaded(folder, kind, given):
    name, peft_class = CLASSES[kind]
    problems = {}
    if given is None:
        kind = getattr(transformers, "AutoModelFor" + name)
        model, found = kind.from_pretrained(folder, output_loading_info=True)
        problems = {key: sorted(map(str, value)) for key, value in found.items()}
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = peft_class.from_pretrained(folder, **given)
        problems = {"peft": [str(each.message) for each in caught if "adapter keys" in str(each.message)]}
        model = model.merge_and_unload()
    return model.eval(), AutoTokenizer.from_pretrained(folder), problems
torch.set_num_threads(1)
wanted = json.loads(sys.stdin.read())
answers = []
for each in wanted:
    model, tokenizer, problems = loaded(each["folder"], each["kind"], each["arguments"])
    batch = tokenizer(each["texts"], each["pairs"], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**batch).logits
        alone = []
        for row, text in enumerate(each["texts"]):
            pair = None if each["pairs"] is None else each["pairs"][row]
            alone.append(model(**tokenizer(text, pair, truncation=True, return_tensors="pt")).logits[0].tolist())
    name = "ner" if each["kind"] == "tokens" else "text-classification"
    more = {"aggregation_strategy": "first"} if each["kind"] == "tokens" else {"top_k": None}
    given = each["texts"][0]
    if each["pairs"] is not None:
        given = {"text": given, "text_pair": each["pairs"][0]}
    used = each["folder"] if each["arguments"] is None else model
    said = pipeline(name, model=used, tokenizer=tokenizer, **more)(given)
    if each["kind"] == "sequence":
        said = said[0] if isinstance(said[0], list) else said
        said = [found["label"] for found in said]
    else:
        said = [(found["entity_group"], found["start"], found["end"]) for found in said]
    problems = {key: value for key, value in problems.items() if value}
    answers.append({"logits": logits.tolist(), "alone": alone, "problems": problems, "said": said,
                    "ids": batch["input_ids"].tolist(), "inputs": sorted(batch),
                    "labels": [model.config.id2label[index] for index in range(model.config.num_labels)],
                    "pad": model.config.pad_token_id, "problem_type": model.config.problem_type})
assert "uhl_cli" not in sys.modules
print("ANSWERS" + json.dumps(answers))
"""


def asked(folder: Path, kind: str, *, pairs: bool = False, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """A question for `alone`; `arguments` are those of loading a peft export, None for a merged one."""
    second = list(PAIRS) if pairs else None
    return {"folder": str(folder), "kind": kind, "texts": list(TEXTS), "pairs": second, "arguments": arguments}


def alone(questions: Sequence[dict[str, Any]], cwd: Path) -> list[dict[str, Any]]:
    """What exports answer in one process where uhl cannot be imported."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "UHL_SHARED")}
    done = subprocess.run(
        [sys.executable, "-c", _ALONE],
        input=json.dumps(questions),
        cwd=cwd,
        env=kept | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("ANSWERS")[1])
