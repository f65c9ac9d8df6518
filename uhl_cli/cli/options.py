"""Options that several commands share, declared once."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

HOST_PANEL = "Host"
DATA_PANEL = "Data"
OUTPUT_PANEL = "Output"
TRAINING_PANEL = "Training"


class Strategy(str, Enum):
    """How a host is aligned to canonical space."""

    anchors = "anchors"
    size = "size"


class Dtype(str, Enum):
    """Precision of the host's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, mps, or auto for the best there is.", rich_help_panel=HOST_PANEL),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the host's weights.", rich_help_panel=HOST_PANEL)]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of the host on the hub.", rich_help_panel=HOST_PANEL),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use only what is local or cached.", rich_help_panel=HOST_PANEL)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run model code from the host's repository.", rich_help_panel=HOST_PANEL),
]
Data = Annotated[
    str | None,
    typer.Option(help="Local file or folder, or hub id, to read the task's data from.", rich_help_panel=DATA_PANEL),
]
DataConfig = Annotated[str | None, typer.Option(help="Configuration of a hub data set.", rich_help_panel=DATA_PANEL)]
DataRevision = Annotated[str | None, typer.Option(help="Revision of a hub data set.", rich_help_panel=DATA_PANEL)]
TrainSplit = Annotated[str | None, typer.Option(help="Split to train on.", rich_help_panel=DATA_PANEL)]
EvaluationSplit = Annotated[str | None, typer.Option(help="Split to score on.", rich_help_panel=DATA_PANEL)]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text.", rich_help_panel=DATA_PANEL)]
PairColumn = Annotated[str | None, typer.Option(help="Column of the second text.", rich_help_panel=DATA_PANEL)]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column of the label, or of the tags.", rich_help_panel=DATA_PANEL)
]
TokensColumn = Annotated[
    str | None, typer.Option(help="Column of the words of a token task.", rich_help_panel=DATA_PANEL)
]
LimitTrain = Annotated[
    int | None, typer.Option(min=1, help="Train on a random subset of this size.", rich_help_panel=DATA_PANEL)
]
LimitEvaluation = Annotated[
    int | None, typer.Option(min=1, help="Score on a random subset of this size.", rich_help_panel=DATA_PANEL)
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=OUTPUT_PANEL)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress; print only what a script needs.", rich_help_panel=OUTPUT_PANEL),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT_PANEL)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there already.", rich_help_panel=OUTPUT_PANEL)
]
