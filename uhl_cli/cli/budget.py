"""`uhl budget`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uhl_cli.cli import options as shared
from uhl_cli.cli.edge import error_edge, print_result
from uhl_cli.progress import progress_bar, stderr

LIMITS_PANEL = "Limits"


def budget(
    adapter: Annotated[Path, typer.Argument(help="Adapter file made by `uhl pretrain`.")],
    target: Annotated[
        str | None, typer.Option(help="Hub id, local folder or builtin:NAME of the model to measure the file on.")
    ] = None,
    target_config: Annotated[
        str | None,
        typer.Option(
            help="The same without weights: a config.json, a folder or a hub id, of which the configuration alone "
            "is read; FLOPs and bytes are counted in seconds, however large the model."
        ),
    ] = None,
    task_file: Annotated[
        Path | None, typer.Option(help="Task file of `uhl tune` to use with the adapter; its bytes are listed apart.")
    ] = None,
    align: Annotated[
        shared.Strategy | None,
        typer.Option(help="Alignment strategy; by default the one that the file was trained with."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of each sequence that is counted.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in the pass that is counted.")] = 1,
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Limit of the adapter file in bytes.", rich_help_panel=LIMITS_PANEL)
    ] = 1_000_000,
    max_flops: Annotated[
        float | None,
        typer.Option(
            help="FLOP limit in percent of the target's own; as `port` does, parts are left out to hold it.",
            show_default="10",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = None,
    max_atoms: Annotated[
        float | None,
        typer.Option(min=0, help="Limit of active atoms per token.", show_default="2", rich_help_panel=LIMITS_PANEL),
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Also measure the wall-clock overhead.")] = False,
    repetitions: Annotated[int, typer.Option(min=3, help="Pairs of passes that --time takes.")] = 20,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task whose evaluation data active atoms are measured on; by default the anchor texts serve.",
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
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of --limit-evaluation.", rich_help_panel=shared.DATA_PANEL)
    ] = 0,
    revision: shared.Revision = None,
    device: shared.Device = "auto",
    dtype: shared.DtypeOption = shared.Dtype.float32,
    offline: shared.Offline = False,
    trust_remote_code: shared.TrustRemoteCode = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> None:
    """Say what a file costs, and on a target its FLOPs, memory and active atoms; exit 3 beyond a limit, else 0.

    With --quiet one line for scripts: bytes, FLOP percent and active atoms, tab separated, a dash for what was not
    measured.
    """
    with error_edge(debug=debug, interrupted_hint="Nothing was written."):
        from uhl_cli.budget.report import BudgetOptions
        from uhl_cli.budget.run import run_budget
        from uhl_cli.commands.options import DataOptions, HostOptions
        from uhl_cli.errors import BudgetError

        def host(name: str | None) -> HostOptions | None:
            if name is None:
                return None
            return HostOptions(
                name=name,
                revision=revision,
                device=device,
                dtype=dtype.value,
                offline=offline,
                trust_remote_code=trust_remote_code,
            )

        data_options = DataOptions(
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
        )
        options = BudgetOptions(
            adapter=adapter,
            target=host(target),
            target_config=host(target_config),
            task_file=task_file,
            strategy=None if align is None else align.value,
            data=data_options,
            data_asked=data_options != DataOptions(),
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_bytes=max_bytes,
            max_flops=max_flops,
            max_atoms=max_atoms,
            time=time,
            repetitions=repetitions,
            seed=seed,
        )
        with progress_bar(quiet=quiet) as reporter:
            report = run_budget(options, reporter)
        if report.target is not None and report.target.sequence_length < sequence_length:
            stderr().print(
                f"warning: the target takes {report.target.sequence_length} tokens at most; counted at that length.",
                markup=False,
                highlight=False,
            )
        if json:
            print_result(report.model_dump_json(indent=2))
        elif quiet:
            measured = report.target
            percent = "-" if measured is None else f"{measured.flops.percent:.4f}"
            atoms = "-" if measured is None or measured.atoms is None else f"{measured.atoms.per_token:.4f}"
            print_result(f"{report.file.bytes}\t{percent}\t{atoms}")
        else:
            from uhl_cli.cli.render_budget import render_budget

            render_budget(report)
        if report.beyond:
            raise BudgetError(
                f"{adapter} is beyond its budget: {'; '.join(report.beyond)}.",
                "Raise the limit, or choose another target.",
            )
