"""`uhl port`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uhl_cli.cli import options as shared
from uhl_cli.cli.edge import error_edge, print_result, warn_truncated
from uhl_cli.progress import progress_bar


def port(
    adapter: Annotated[Path, typer.Argument(help="Adapter file made by `uhl pretrain`.")],
    target: Annotated[str, typer.Option(help="Hub id, local folder or builtin:NAME of the model to port to.")],
    align: Annotated[
        shared.Strategy | None,
        typer.Option(help="Alignment strategy; by default the one that the file was trained with."),
    ] = None,
    task_file: Annotated[
        Path | None, typer.Option(help="Task file of `uhl tune` to use with the adapter; scores are then tuned ones.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task to score on, when not the adapter's own name for it.",
            rich_help_panel=shared.DATA_PANEL,
        ),
    ] = None,
    data: shared.Data = None,
    data_config: shared.DataConfig = None,
    data_revision: shared.DataRevision = None,
    evaluation_split: shared.EvaluationSplit = None,
    text_column: shared.TextColumn = None,
    pair_column: shared.PairColumn = None,
    label_column: shared.LabelColumn = None,
    tokens_column: shared.TokensColumn = None,
    limit_evaluation: shared.LimitEvaluation = None,
    score: Annotated[
        bool,
        typer.Option(
            "--score/--no-score",
            help="Score zero-shot where the data can be had.",
            rich_help_panel=shared.DATA_PANEL,
        ),
    ] = True,
    revision: shared.Revision = None,
    device: shared.Device = "auto",
    dtype: shared.DtypeOption = shared.Dtype.float32,
    offline: shared.Offline = False,
    trust_remote_code: shared.TrustRemoteCode = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch when scoring.")] = 64,
    max_flops: Annotated[
        float, typer.Option(help="FLOP limit in percent of the target's own; parts are left out to hold it.")
    ] = 10.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random-update control and of subsets.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep the ported adapter in, to load without aligning again.",
            rich_help_panel=shared.OUTPUT_PANEL,
        ),
    ] = None,
    overwrite: shared.Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> None:
    """Carry an adapter file into another model and score it there, with no label and no gradient."""
    with error_edge(debug=debug, interrupted_hint="Nothing was written."):
        from uhl_cli.commands.options import DataOptions, HostOptions, PortOptions

        asked = (
            task,
            data,
            data_config,
            data_revision,
            evaluation_split,
            text_column,
            pair_column,
            label_column,
            tokens_column,
        )
        options = PortOptions(
            adapter=adapter,
            target=HostOptions(
                name=target,
                revision=revision,
                device=device,
                dtype=dtype.value,
                offline=offline,
                trust_remote_code=trust_remote_code,
            ),
            data=DataOptions(
                task=task,
                data=data,
                config=data_config,
                revision=data_revision,
                evaluation_split=evaluation_split,
                text_column=text_column,
                pair_column=pair_column,
                label_column=label_column,
                tokens_column=tokens_column,
                limit_evaluation=limit_evaluation,
            ),
            data_required=any(value is not None for value in asked),
            task_file=task_file,
            strategy=None if align is None else align.value,
            score=score,
            batch_size=batch_size,
            max_flops=max_flops,
            seed=seed,
            output=output,
            overwrite=overwrite,
        )
        from uhl_cli.cli.render import render_port
        from uhl_cli.commands.port import run_port

        with progress_bar(quiet=quiet) as reporter:
            _, report = run_port(options, reporter)
        warn_truncated(report.truncated)
        if json:
            print_result(report.model_dump_json(indent=2))
        elif quiet:
            ported = report.scores.get("ported")
            print_result("not-scored" if ported is None else f"{ported.value:.6f}")
        else:
            render_port(report)
