"""The model card (README.md) of an export: what it is, how to load it without uhl, and what it scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from uhl_cli.formats.export import BASE_FOLDER, ExportRecord
from uhl_cli.formats.markdown import PIPELINES, block, front_matter, interval, plain
from uhl_cli.metrics import Score
from uhl_cli.text import one_line

_CLASSES = {"sequence": "ForSequenceClassification", "tokens": "ForTokenClassification"}
_NAMES = {"export": "this model", "tuned": "the adapter, tuned on it", "zero_shot": "the adapter, ported to it"}


def model_card(record: ExportRecord, arguments: Mapping[str, object]) -> str:
    """The card in Markdown, with the YAML header for the hub.

    :param arguments: Arguments for loading a peft export, besides its folder.
    """
    task = record.task
    pipeline = PIPELINES[task.kind]
    header: dict[str, Any] = {
        "library_name": "transformers" if record.format == "merged" else "peft",
        "pipeline_tag": pipeline,
        "tags": ["uhl", pipeline],
    }
    if record.target.revision is not None:  # a name of the hub
        header["base_model"] = record.target.name
    lines = front_matter(header)
    lines += [f"# {plain(task.name)} on {plain(record.target.name)}", ""]
    what = {"merged": "a checkpoint", "peft": f"a LoRA of rank {record.rank}"}[record.format]
    # Earlier releases handle the padding of some decoders wrongly, see `train.standard`.
    needed = "transformers 4.50 or later" + ("" if record.format == "merged" else " and peft")
    lines += [f"This is {what} with the standard head of its family, made by `uhl export`. It needs {needed}, not uhl."]
    lines += ["", *block("python", *_loading(record, arguments)), ""]
    lines += [f"Labels: {', '.join(plain(label) for label in task.labels)}.", ""]
    lines += [f"Texts are read up to {record.max_length:,} tokens; pass `truncation=True` for longer ones.", ""]
    if record.format == "peft":
        lines += [_about_base(record), ""]
    lines += _figures("Agreement with the teacher, on texts that were held out", record.agreement)
    lines += _figures("Scores on evaluation data", record.scores)
    lines += ["## How it was made", "", f"Learnt from: {'; '.join(plain(each) for each in record.teachers)}.", ""]
    lines += [*block("bash", one_line(record.training.command)), ""]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines += [f"{record.training.steps:,} steps, saved in {record.dtype}; {plain(versions)}.", ""]
    lines += [f"Adapter file: SHA-256 `{record.adapter}`."]
    return "\n".join(lines) + "\n"


def _loading(record: ExportRecord, arguments: Mapping[str, object]) -> list[str]:
    """Python code that loads the export from `folder` and uses it."""
    kind = record.task.kind
    pipeline = "ner" if kind == "tokens" else PIPELINES[kind]
    grouped = ', aggregation_strategy="first"' if kind == "tokens" else ""
    text = "Anna lives in Paris." if kind == "tokens" else "a fine film"
    if record.format == "merged":
        call = f'pipeline("{pipeline}", folder{grouped})'
        return ["from transformers import pipeline", "", f"model = {call}", f"model({json.dumps(text)})"]
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    return [
        f"from peft import AutoPeftModel{_CLASSES[kind]}",
        "from transformers import AutoTokenizer, pipeline",
        "",
        f"model = AutoPeftModel{_CLASSES[kind]}.from_pretrained(folder{given}).merge_and_unload()",
        f'model = pipeline("{pipeline}", model, tokenizer=AutoTokenizer.from_pretrained(folder){grouped})',
        f"model({json.dumps(text)})",
    ]


def _about_base(record: ExportRecord) -> str:
    if record.base is None:
        return (
            f"The base lies in `{BASE_FOLDER}/`. peft finds it by `base_model_name_or_path` in adapter_config.json: "
            "write its new path there when you move this folder."
        )
    return f"The base is `{one_line(record.base)}`, named in adapter_config.json."


def _figures(title: str, scores: dict[str, Score]) -> list[str]:
    """A table of scores with their intervals; empty without scores."""
    rows = [(name, scores[key]) for key, name in _NAMES.items() if key in scores]
    if not rows:
        return []
    first = rows[0][1]
    lines = [f"## {title}", "", f"| {first.metric}, {first.examples:,} examples | value, 95 % interval |", "|---|---|"]
    lines += [f"| {name} | {interval(value)} |" for name, value in rows]
    return [*lines, ""]
