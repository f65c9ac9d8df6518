"""`uhl tune`."""

from __future__ import annotations

import shlex
from functools import partial
from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table, interval, is_main_process

if TYPE_CHECKING:
    from uhl_cli.commands.options import TuneOptions
    from uhl_cli.reports import SearchReport, TuneReport


def _record() -> type[TuneOptions]:
    from uhl_cli.commands.options import TuneOptions

    return TuneOptions


@command(
    _record,
    example="uhl tune adapter.safetensors --target distilbert-base-uncased --parameters lora --score-data sst2",
    panels={
        "Training": ("parameters", "rank", "top-k", "max-length", "optimise", "resume", "save-every"),
        "Data": ("score-data",),
    },
    metavars={"optimise": "N"},
    interrupted="There is no checkpoint yet; run it again.",
)
def tune(options: TuneOptions, output: Output) -> None:
    """Tune a target: without labels on the texts in the adapter file, or with the labels of --task or --data.

    It trains 512 bytes (delta-theta) or, with --parameters lora, a LoRA and a readout; everything else is frozen.
    Without labels, the target learns the teacher's outputs for the texts in the file; no data is read except that of
    --score-data, which is used for scores only. With labels:
    `uhl tune adapter.safetensors --target distilbert-base-uncased --task sst2`.
    """
    from uhl_cli.commands.tune import run_tune

    with output.progress() as reporter:
        report = run_tune(options, reporter)
    if is_main_process():
        if report.unread:
            output.note(
                f"texts and spans of the transfer set left out, because the target's tokenizer knows no token of "
                f"them: {report.unread:,}.",
                "warning: ",
            )
        output.warn_truncated(report.truncated)
        output.warn_worse(report, made="tuned", before="zero_shot")
        output.result(report, quiet=[(report.output,)], table=partial(_table, target=options.target.name))


def _table(output: Output, report: TuneReport, *, target: str) -> None:
    """Print what `tune` did; `target` is the name that the user gave."""
    host = report.target.fingerprint
    shape = f"{host.model_type}, {host.num_hidden_layers} x {host.hidden_size}"
    what = "delta-theta" if report.parameters == "delta-theta" else "a LoRA"
    by = "labels" if report.supervision == "labels" else "the transfer set, no labels"
    table = Table(
        f"{report.output}: {report.task} on {report.target.name} ({shape}), {what} tuned by {by}",
        left=["what"],
        right=["value", "tuned minus this"],
    )
    for name, score in report.agreement.items():
        label = {"zero_shot": "before", "tuned": "tuned"}[name]
        table.row(f"agreement with the teacher, {label}: {score.metric}, {score.examples} held-out", interval(score))
    rows = {"zero_shot": "before, zero-shot", "majority_class": "majority class", "tuned": "tuned"}
    for name, label in rows.items():
        if name in report.scores:
            score = report.scores[name]
            said = f"{label}: {score.metric}, {score.examples} examples"
            table.row(said, interval(score), interval(report.gains.get(name)) if name != "tuned" else "")
    if report.parameters == "lora":
        table.row("bytes of the LoRA", f"{report.lora_bytes:,}")
        table.row("bytes of the readout", f"{report.readout_bytes:,}")
        table.row("bytes of the file in the folder", f"{report.bytes:,}")
    else:
        table.row("bytes of delta-theta", f"{report.delta_bytes:,}")
        if not report.own_task:
            table.row("bytes of the new readout", f"{report.readout_bytes:,}")
        table.row("bytes of the task file", f"{report.bytes:,}")
    if report.parameters == "delta-theta" and report.supervision == "labels":
        atoms = report.atoms_per_token
        table.row("active atoms per token", "-" if atoms is None else f"{atoms:.2f}")
    table.row(f"FLOP overhead at {report.flops.sequence_length} tokens", f"{report.flops.percent:.2f} %")
    table.row("training examples, steps", f"{report.train_examples:,}, {report.steps:,}")
    table.row("seconds", f"{report.seconds:.0f}")
    output.table(table)
    output.degree(report.degree, target)
    if report.left_out:
        output.line(f"left out to hold the FLOP limit: {', '.join(report.left_out)}")
    if report.search is not None:
        output.table(_trials(report, report.search))
    if not report.scores:
        why = "the data has no evaluation examples" if report.supervision == "labels" else "--score-data names no data"
        named = shlex.join([report.adapter, "--target", target, "--task-file", report.output])
        output.line(f"not scored, as {why}; to score it: uhl port {named} --data FILE")


def _trials(report: TuneReport, search: SearchReport) -> Table:
    """All trials of the search, the chosen one marked."""
    names = ["learning_rate", "readout_learning_rate", "active_weight", "delta_weight", "top_k", "score"]
    names = [name for name in names if getattr(search.trials[0], name) is not None]
    title = f"search: scores on {search.held_out:,} held-out training examples"
    if report.supervision == "transfer set":
        title = f"search: agreement with the teacher on {search.held_out:,} held-out texts and spans"
    table = Table(title, right=[name.replace("_", " ") for name in ["trial", *names]])
    for trial in search.trials:
        values = [f"{getattr(trial, name):.3g}" for name in names[:-1]]
        mark = "* " if trial.number == search.best else ""
        table.row(f"{mark}{trial.number + 1}", *values, f"{trial.score:.3f}")
    return table
