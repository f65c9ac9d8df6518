"""The model card (README.md) of an adapter file or a task file on the hub."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from uhl_cli.formats.adapter import AdapterFile
from uhl_cli.formats.markdown import PIPELINES, block, front_matter, interval, plain
from uhl_cli.formats.parts import bytes_by_part
from uhl_cli.formats.sharing import SharedFile
from uhl_cli.formats.task import TaskRecord
from uhl_cli.hub.reference import USUAL, Reference
from uhl_cli.metrics import Score
from uhl_cli.schema import HostRecord, Manifest
from uhl_cli.text import one_line

CARD = "README.md"
UNSPECIFIED = "unspecified"
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
# How `data` names a split of a hub dataset.
_DATASET = re.compile(r"(?:^|[,;] )([\w.-]+/[\w.-]+) \([^()]*\)", re.ASCII)
_METRICS = {"accuracy": "accuracy", "f1": "f1", "entity_f1": "f1"}


def adapter_card(
    shared: SharedFile,
    repo: str,
    *,
    revision: str | None = None,
    licence: str | None = None,
    languages: Sequence[str] = (),
) -> str:
    """The card in Markdown, with the YAML header for the hub.

    :param repo: Repository, and `revision` the branch, that it goes to.
    :param licence: An identifier of the hub, or a name of any other; by default the one in the file.
    :param languages: Codes of the languages of the texts.
    """
    content, record = shared.content, _record(shared)
    task = record.task
    trained_on = record.source if isinstance(record, Manifest) else record.target
    title = f"{plain(task.name)}, {'trained' if isinstance(record, Manifest) else 'tuned'} on {plain(trained_on.name)}"
    name = Reference(repo, revision, None if shared.name == USUAL else shared.name)
    lines = front_matter(_header(record, trained_on, _licence(record, licence), languages))
    lines += [f"# {title}", "", _about(shared, record), ""]
    lines += [f"Labels: {', '.join(plain(label) for label in task.labels)}.", ""]
    lines += ["## Use", "", *_use(record, name), ""]
    lines += _scores(record)
    lines += ["## Size", "", "| part | bytes |", "|---|---|"]
    lines += [f"| {part} | {size:,} |" for part, size in bytes_by_part(shared.contents).items()]
    lines += [f"| the file | {len(shared.data):,} |", ""]
    lines += ["## Texts in the file", "", _texts(shared), ""]
    lines += ["## How it was made", "", *block("bash", one_line(record.training.command)), ""]
    versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    lines += [
        f"{record.training.steps:,} steps on {record.training.train_examples:,} examples "
        f"({plain(record.training.data)}); {plain(versions)}.",
        "",
    ]
    digest = content.digest if isinstance(content, AdapterFile) else shared.contents.digest
    lines += [f"Format {record.format_version}, SHA-256 `{one_line(digest)}`."]
    return "\n".join(lines) + "\n"


def _record(shared: SharedFile) -> Manifest | TaskRecord:
    content = shared.content
    return content.manifest if isinstance(content, AdapterFile) else content.record


def _licence(record: Manifest | TaskRecord, given: str | None) -> str | None:
    """The licence to name; None if nobody said."""
    licence = given or (record.licence if isinstance(record, Manifest) else UNSPECIFIED)
    return None if licence == UNSPECIFIED else one_line(licence)


def _header(
    record: Manifest | TaskRecord, trained_on: HostRecord, licence: str | None, languages: Sequence[str]
) -> dict[str, Any]:
    """The metadata, in the hub's words."""
    task, pipeline = record.task, PIPELINES[record.task.kind]
    header: dict[str, Any] = {"library_name": "uhl", "pipeline_tag": pipeline}
    if licence is not None:
        known = licence.lower().replace(" ", "-")
        header |= {"license": known} if _LICENCE_ID.fullmatch(known) else {"license": "other", "license_name": licence}
    if languages:
        header["language"] = [one_line(language) for language in languages]
    if trained_on.revision is not None:  # a name of the hub
        header |= {"base_model": one_line(trained_on.name), "base_model_relation": "adapter"}
    datasets = list(dict.fromkeys(_DATASET.findall(record.training.data)))
    if datasets:
        header["datasets"] = datasets
    header["tags"] = ["uhl", "adapter", pipeline]
    if record.score is not None:
        header["metrics"] = [_METRICS[task.metric]]
        metric = {"type": _METRICS[task.metric], "value": record.score.value, "name": one_line(record.score.metric)}
        result = {
            "task": {"type": pipeline, "name": one_line(task.name)},
            "dataset": {"type": datasets[0] if datasets else one_line(task.name), "name": one_line(task.name)},
            "metrics": [metric],
        }
        header["model-index"] = [{"name": f"{one_line(task.name)} adapter", "results": [result]}]
    return header


def _about(shared: SharedFile, record: Manifest | TaskRecord) -> str:
    size = f"{len(shared.data):,} bytes"
    if isinstance(record, Manifest):
        host = record.source.fingerprint
        return (
            f"A universal adapter of {size}: `uhl` ports it to any transformer checkpoint, without labels and without "
            f"training. It was trained on {plain(record.source.name)} ({plain(host.model_type)}, "
            f"{host.num_hidden_layers} layers of width {host.hidden_size})."
        )
    return (
        f"A task file of {size}: what `uhl tune` added to the adapter file with SHA-256 `{record.adapter}` on "
        f"{plain(record.target.name)}, by {record.supervision}. It is used with that adapter."
    )


def _use(record: Manifest | TaskRecord, name: Reference) -> list[str]:
    """Commands and code of three lines each."""
    quoted = shlex.quote(str(name))
    text = "Anna lives in Paris." if record.task.kind == "tokens" else "a fine film"
    texts = " ".join(shlex.quote(each) for each in ([text, "a dull one"] if record.task.pair_column else [text]))
    given = f'"{name.repo}"' + (f", revision={json.dumps(name.revision)}" if name.revision else "")
    given += f", filename={json.dumps(name.file)}" if name.file else ""
    if isinstance(record, Manifest):
        bash = [f"uhl port {quoted} --target MODEL", f"uhl predict {quoted} {texts} --target MODEL"]
        python = [f"adapter = UniversalAdapter.from_pretrained({given})", "ported = adapter.port(model, tokenizer)"]
        return [
            *block("bash", "pip install uhl", *bash),
            "",
            *block("python", "from uhl_cli import UniversalAdapter", *python),
        ]
    port = [f"uhl {command} ADAPTER --task-file {quoted}" for command in ("port", f"predict {texts}")]
    port[1] = f"uhl predict ADAPTER {texts} --task-file {quoted}"
    file = json.dumps(name.file or USUAL)
    python = [
        "from huggingface_hub import hf_hub_download",
        f'task = hf_hub_download("{name.repo}", {file}'
        + (f", revision={json.dumps(name.revision)})" if name.revision else ")"),
        "ported = adapter.port(model, tokenizer, task=task)",
    ]
    return [
        *block("bash", "pip install uhl", *(f"{line} --target MODEL" for line in port)),
        "",
        *block("python", *python),
    ]


def _scores(record: Manifest | TaskRecord) -> list[str]:
    """A table of what the file records: scores with their intervals, and controls."""
    rows: list[tuple[str, Score]] = []
    if isinstance(record, Manifest):
        rows += [("the adapter on its source model", record.score)] if record.score else []
        transfer = record.parts.transfer
        if transfer is not None and transfer.teacher_score is not None:
            rows.append((f"teacher of the transfer set: {plain(transfer.teacher)}", transfer.teacher_score))
    else:
        on = plain(record.target.name)
        rows += [(f"tuned on {on}", record.score)] if record.score else []
        rows += [(f"control: before tuning, on {on}", record.before)] if record.before else []
    if not rows:
        return []
    lines = ["## Scores", "", "| what | metric | examples | value, 95 % interval |", "|---|---|---|---|"]
    lines += [f"| {what} | {plain(each.metric)} | {each.examples:,} | {interval(each)} |" for what, each in rows]
    total = sum(record.label_counts)
    if record.task.metric == "accuracy" and total:
        most = max(record.label_counts)
        lines.append(
            f"| control: the most frequent label, in the training data | accuracy | {total:,} | {most / total:.3f} |"
        )
    return [*lines, "", "On another model it scores otherwise: `uhl port` prints scores and controls there.", ""]


def _texts(shared: SharedFile) -> str:
    if not shared.texts and not shared.unknown:
        return "None of a data set."
    said = [f"{count:,} {part}" for part, count in shared.texts.items()]
    said += [f"the part {plain(name)}, which may hold texts" for name in shared.unknown]
    return f"{', '.join(said)}. `uhl inspect FILE --anchors --transfer` prints them."
