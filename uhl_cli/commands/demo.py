"""`uhl demo`: train, port and tune with the models and data of the package, without any download."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uhl_cli.commands.options import (
    DataOptions,
    DemoOptions,
    HostOptions,
    PortOptions,
    PretrainOptions,
    TuneOptions,
    TuneTraining,
)
from uhl_cli.commands.port import run_port
from uhl_cli.commands.pretrain import run_pretrain
from uhl_cli.commands.tune import run_tune
from uhl_cli.errors import OutputError
from uhl_cli.files import claimed
from uhl_cli.reports import DemoReport, Reporter, silent
from uhl_cli.schema import TrainingConfig

ADAPTER_NAME = "demo.safetensors"


def run_demo(options: DemoOptions, reporter: Reporter = silent) -> DemoReport:
    """Pretrain on the source, port to the target and tune there without labels, with the other commands' functions.

    :raises OutputError: When the folder holds a demo already.
    :raises UhlError: Any other of its kinds that a step raises.
    """
    started = time.monotonic()
    with _folder(options.output) as folder:
        source = HostOptions(name=options.source, device=options.device)
        target = HostOptions(name=options.target, device=options.device)
        data = DataOptions(task=options.task)
        path = folder / ADAPTER_NAME
        training = TrainingConfig(epochs=options.epochs, seed=options.seed)
        # A LoRA teacher takes another minute, and on so small a task it is no better.
        pretrain_options = PretrainOptions(
            host=source, data=data, output=path, training=training, teacher="adapter", licence="MIT", overwrite=True
        )
        pretrained = run_pretrain(pretrain_options, reporter)
        port_options = PortOptions(adapter=path, target=target, data=data, controls=True, seed=options.seed)
        _, ported = run_port(port_options, reporter)
        tuning = TuneTraining(max_steps=options.tune_steps, seed=options.seed)
        tune_options = TuneOptions(
            adapter=path,
            target=target,
            score_data=options.task,
            parameters="lora",
            training=tuning,
            overwrite=True,
        )
        tuned = run_tune(tune_options, reporter)
    return DemoReport(
        pretrain=pretrained,
        port=ported,
        tune=tuned,
        max_bytes=pretrain_options.max_bytes,
        max_flops=port_options.max_flops,
        output=None if options.output is None else str(options.output),
        seconds=time.monotonic() - started,
    )


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """The folder for the files: the user's, or a temporary one."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="uhl-demo-") as name:
            yield Path(name)
        return
    with claimed(output / "demo"):
        if (output / ADAPTER_NAME).exists():
            raise OutputError(f"{output / ADAPTER_NAME} already exists.", "Choose another --output.")
        before = set(output.iterdir())
        try:
            yield output
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                error.args = ()  # a step's advice to resume it
            for made in set(output.iterdir()) - before:
                with suppress(OSError):
                    shutil.rmtree(made) if made.is_dir() else made.unlink()
            raise
