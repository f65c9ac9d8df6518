"""Report runs to TensorBoard or Weights & Biases (both extras), besides the local files."""

from __future__ import annotations

import os
from pathlib import Path

from uhl_cli.compare.config import TRACKING
from uhl_cli.compare.options import Tracker
from uhl_cli.compare.results import RunMetrics
from uhl_cli.compare.sections import TrackingSection
from uhl_cli.errors import UsageError


def refuse_missing(tracker: Tracker) -> None:
    """Check for a tracker's package before any work.

    :raises UsageError: When it is missing.
    """
    try:
        if tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        elif tracker == "wandb":
            import wandb  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"reporting to {tracker} needs {tracker}.",
            f'Run `pip install "uhl[{tracker}]"`, or leave it out with --report-to none.',
        ) from error


def report_run(tracking: TrackingSection, metrics: RunMetrics, results: Path) -> None:
    """Report a finished run: its learning curve, dev scores and costs.  Files are below `results/tracking`.

    Weights & Biases works offline unless WANDB_MODE says otherwise.
    """
    folder = results / TRACKING
    finals = {"dev/score": metrics.score.value, "training_seconds": metrics.training_seconds}
    if metrics.zero_shot is not None:
        finals["dev/zero_shot"] = metrics.zero_shot.value
    costs = metrics.costs.model_dump()
    finals |= {f"published/{name}": value for name, value in metrics.published.items()}
    finals |= {f"costs/{name}": float(value) for name, value in costs.items() if value is not None}
    if tracking.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / metrics.run_id)) as writer:
            for point in metrics.curve:
                writer.add_scalar("train/loss", point.loss, point.step)
                writer.add_scalar("train/accuracy", point.accuracy, point.step)
            for dev in metrics.dev_curve:
                writer.add_scalar("dev/score_in_training", dev.score, dev.step)
            for name, value in finals.items():
                writer.add_scalar(name, value, 0)
    elif tracking.report_to == "wandb":
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        names = {"method": metrics.method, "host": metrics.host, "task": metrics.task, "seed": metrics.seed}
        quiet = wandb.Settings(silent=True, console="off")  # stdout is for results only
        run = wandb.init(
            entity=tracking.entity,
            project=tracking.project,
            name=metrics.run_id,
            dir=str(folder),
            mode=mode,
            config=names,
            settings=quiet,
        )
        rows: dict[int, dict[str, float]] = {}
        for point in metrics.curve:
            rows[point.step] = {"train/loss": point.loss, "train/accuracy": point.accuracy}
        for dev in metrics.dev_curve:
            rows.setdefault(dev.step, {})["dev/score_in_training"] = dev.score
        for step in sorted(rows):  # a step that is lower than an earlier one would be dropped
            run.log(rows[step], step=step)
        run.summary.update(finals)
        run.finish()
