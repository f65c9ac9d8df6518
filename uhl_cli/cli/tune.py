"""`uhl tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uhl_cli.cli import options as shared
from uhl_cli.cli.edge import error_edge, is_main_process, print_result, warn_truncated
from uhl_cli.progress import progress_bar


def _training(help_text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=help_text, rich_help_panel=shared.TRAINING_PANEL)
    return option


def tune(
    adapter: Annotated[Path, typer.Argument(help="Adapter file made by `uhl pretrain`.")],
    target: Annotated[str, typer.Option(help="Hub id, local folder or builtin:NAME of the model to tune on.")],
    task: Annotated[
        str | None,
        typer.Option(help="Task to tune on; by default the adapter's own. Another task gets a readout of its own."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the task file goes; by default ADAPTER.TASK.TARGET.task.safetensors beside the adapter.",
            rich_help_panel=shared.OUTPUT_PANEL,
        ),
    ] = None,
    align: Annotated[
        shared.Strategy | None,
        typer.Option(help="Alignment strategy; by default the one that the file was trained with."),
    ] = None,
    data: shared.Data = None,
    data_config: shared.DataConfig = None,
    data_revision: shared.DataRevision = None,
    train_split: shared.TrainSplit = None,
    evaluation_split: shared.EvaluationSplit = None,
    text_column: shared.TextColumn = None,
    pair_column: shared.PairColumn = None,
    label_column: shared.LabelColumn = None,
    tokens_column: shared.TokensColumn = None,
    limit_train: shared.LimitTrain = None,
    limit_evaluation: shared.LimitEvaluation = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps.", rich_help_panel=shared.TRAINING_PANEL)] = 500,
    batch_size: Annotated[int, _training("Examples per step, over all processes.")] = 32,
    learning_rate: Annotated[float, _training("Peak learning rate of delta-theta.")] = 0.1,
    readout_learning_rate: Annotated[float, _training("Peak learning rate of a new task's readout.")] = 8e-3,
    warmup_fraction: Annotated[float, _training("Share of the steps that warm up.")] = 0.06,
    active_weight: Annotated[float, _training("Weight of active atoms in the loss (lambda_F).")] = 0.01,
    delta_weight: Annotated[float, _training("Weight of delta-theta's square in the loss (lambda_Q).")] = 1e-5,
    top_k: Annotated[
        int | None, _training("Most active atoms per token, 1 or 2; by default the adapter's own number.")
    ] = None,
    max_length: Annotated[
        int | None, _training("Longest input in tokens; by default what the adapter was trained with.")
    ] = None,
    optimise: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Choose learning rate, lambda_F, lambda_Q and top-k by N trials on a held-out part of the training "
            "data first (needs optuna: pip install 'uhl\\[optimise]').",
            rich_help_panel=shared.TRAINING_PANEL,
        ),
    ] = 0,
    max_flops: Annotated[
        float, typer.Option(help="FLOP limit in percent of the target's own; parts are left out to hold it.")
    ] = 10.0,
    seed: Annotated[int, _training("Seed of everything random.")] = 0,
    save_every: Annotated[int, _training("Steps between checkpoints.")] = 200,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=shared.TRAINING_PANEL)
    ] = False,
    revision: shared.Revision = None,
    device: shared.Device = "auto",
    dtype: shared.DtypeOption = shared.Dtype.float32,
    offline: shared.Offline = False,
    trust_remote_code: shared.TrustRemoteCode = False,
    overwrite: shared.Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> None:
    """Tune 512 bytes of an adapter on a target with labels, everything else frozen, and write a small task file."""
    with error_edge(debug=debug, interrupted_hint="Go on from the last checkpoint with --resume."):
        from uhl_cli.commands.options import DataOptions, HostOptions, TuneOptions, tuning_defaults

        options = TuneOptions(
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
                train_split=train_split,
                evaluation_split=evaluation_split,
                text_column=text_column,
                pair_column=pair_column,
                label_column=label_column,
                tokens_column=tokens_column,
                limit_train=limit_train,
                limit_evaluation=limit_evaluation,
            ),
            strategy=None if align is None else align.value,
            training={
                **tuning_defaults().model_dump(),
                "max_steps": steps,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "readout_learning_rate": readout_learning_rate,
                "warmup_fraction": warmup_fraction,
                "active_weight": active_weight,
                "delta_weight": delta_weight,
                "seed": seed,
            },
            top_k=top_k,
            max_length=max_length,
            optimise=optimise,
            max_flops=max_flops,
            output=output,
            resume=resume,
            overwrite=overwrite,
            save_every=save_every,
        )
        from uhl_cli.cli.render import render_tune
        from uhl_cli.commands.tune import run_tune

        with progress_bar(quiet=quiet) as reporter:
            report = run_tune(options, reporter)
        if not is_main_process():
            return
        warn_truncated(report.truncated)
        if json:
            print_result(report.model_dump_json(indent=2))
        elif quiet:
            print_result(report.output)
        else:
            render_tune(report)
