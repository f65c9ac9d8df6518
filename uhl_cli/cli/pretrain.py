"""`uhl pretrain`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from uhl_cli.cli import options as shared
from uhl_cli.cli.edge import error_edge, is_main_process, print_result, warn_truncated
from uhl_cli.progress import progress_bar

ADAPTER_PANEL = "Adapter"


class MixedPrecision(str, Enum):
    """Autocast precision of training."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


def _training(help_text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=help_text, rich_help_panel=shared.TRAINING_PANEL)
    return option


def pretrain(
    host: Annotated[
        str, typer.Option(help="Hub id, local folder or builtin:NAME of the source model.")
    ] = "builtin:base",
    task: Annotated[
        str,
        typer.Option(help="reviews, sst2, boolq, conll2003, amazon, or a hub id, file or folder of your own data."),
    ] = "reviews",
    output: Annotated[
        Path, typer.Option(help="Where the adapter file goes.", rich_help_panel=shared.OUTPUT_PANEL)
    ] = Path("adapter.safetensors"),
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
    anchors: Annotated[
        str | None,
        typer.Option(
            help="Texts to align by. They are SHIPPED IN THE FILE. By default words from the task's own training "
            "texts; 'general' takes sentences of this package and FILE your own (one text a "
            "line), for when your training text must not leave your house.",
            rich_help_panel=ADAPTER_PANEL,
        ),
    ] = None,
    num_anchors: Annotated[
        int,
        typer.Option(help="Anchor words; each takes some 250 bytes.", rich_help_panel=ADAPTER_PANEL),
    ] = 2048,
    feature_words: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Most words of the feature bank, whose texts ship as well; 0 for none. By default it takes what the "
            "anchors leave of --max-bytes, if there is text for it.",
            rich_help_panel=ADAPTER_PANEL,
        ),
    ] = None,
    align: Annotated[
        shared.Strategy, typer.Option(help="Alignment strategy.", rich_help_panel=ADAPTER_PANEL)
    ] = shared.Strategy.anchors,
    licence: Annotated[
        str, typer.Option(help="Licence to record in the file.", rich_help_panel=ADAPTER_PANEL)
    ] = "unspecified",
    max_bytes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Largest file: refused before training; the feature bank fills it.",
            rich_help_panel=ADAPTER_PANEL,
        ),
    ] = 1_000_000,
    max_flops: Annotated[
        float, typer.Option(help="FLOP limit on the source, in percent.", rich_help_panel=ADAPTER_PANEL)
    ] = 10.0,
    epochs: Annotated[float, _training("Passes over the training data.")] = 3.0,
    max_steps: Annotated[int | None, _training("Stop after this many steps instead.")] = None,
    batch_size: Annotated[int, _training("Examples per step, over all processes.")] = 32,
    learning_rate: Annotated[float, _training("Peak learning rate of the updates.")] = 2e-3,
    readout_learning_rate: Annotated[float, _training("Peak learning rate of the readout.")] = 1e-3,
    weight_decay: Annotated[float, _training("Weight decay of matrices.")] = 0.01,
    warmup_fraction: Annotated[float, _training("Share of the steps that warm up.")] = 0.06,
    active_weight: Annotated[float, _training("Weight of active atoms in the loss (lambda_F).")] = 0.01,
    noise: Annotated[float, _training("Alignment noise of the readout's input, in standard deviations.")] = 1.0,
    update_noise: Annotated[float, _training("Alignment noise of the updates' input.")] = 0.0,
    update_dropout: Annotated[float, _training("Share of the steps that leave the updates off.")] = 0.5,
    views: Annotated[int, _training("Imitated widths shown to the hyper-MLP.")] = 4,
    updates: Annotated[
        bool,
        typer.Option(
            "--updates/--no-updates",
            help="Train the weight updates, or the readout alone.",
            rich_help_panel=shared.TRAINING_PANEL,
        ),
    ] = True,
    max_length: Annotated[int, _training("Longest input in tokens.")] = 128,
    mixed_precision: Annotated[MixedPrecision, _training("Autocast precision.")] = MixedPrecision.no,
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
    """Train a universal adapter on a frozen host and write one file under 1 MB."""
    with error_edge(debug=debug, interrupted_hint="Go on from the last checkpoint with --resume."):
        from uhl_cli.commands.options import DataOptions, HostOptions, PretrainOptions
        from uhl_cli.schema import AdapterConfig, TrainingConfig

        options = PretrainOptions(
            host=HostOptions(
                name=host,
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
            output=output,
            anchors=anchors,
            num_anchors=num_anchors,
            feature_words=feature_words,
            adapter=AdapterConfig(strategy=align.value),
            training=TrainingConfig(
                epochs=epochs,
                max_steps=max_steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                readout_learning_rate=readout_learning_rate,
                weight_decay=weight_decay,
                warmup_fraction=warmup_fraction,
                active_weight=active_weight,
                noise=noise,
                update_noise=update_noise,
                update_dropout=update_dropout,
                width_views=views,
                updates=updates,
                max_length=max_length,
                mixed_precision=mixed_precision.value,
                seed=seed,
            ),
            licence=licence,
            max_bytes=max_bytes,
            max_flops=max_flops,
            resume=resume,
            overwrite=overwrite,
            save_every=save_every,
        )
        from uhl_cli.cli.render import render_pretrain
        from uhl_cli.commands.pretrain import run_pretrain

        with progress_bar(quiet=quiet) as reporter:
            report = run_pretrain(options, reporter)
        if not is_main_process():
            return
        warn_truncated(report.truncated)
        if json:
            print_result(report.model_dump_json(indent=2))
        elif quiet:
            print_result(report.output)
        else:
            render_pretrain(report)
