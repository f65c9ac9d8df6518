"""The teacher of a transfer set: the user's own classifier, or the better of the adapter on its source and a LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from uhl_cli.commands.options import PretrainOptions
from uhl_cli.commands.scoring import references_of
from uhl_cli.commands.transfer_set import Teacher, Wanted, make_transfer_set
from uhl_cli.data import Examples, TaskData
from uhl_cli.formats.checkpoint import run_digest
from uhl_cli.formats.transfer import StoredTransfer
from uhl_cli.metrics import Score, score
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import Reporter, phase
from uhl_cli.train.classifier import Classifier
from uhl_cli.train.loop import StepReport
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.teacher import lora_teacher, teacher_config

# Training examples that neither teacher sees, to choose the better one by.
HELD_OUT, MOST_HELD_OUT, LEAST_HELD_OUT = 0.05, 1000, 50
_NAMES = {"adapter": "the source with the adapter", "lora": "a LoRA of the source, rank 8, trained with labels"}


def held_for_teachers(examples: Examples, options: PretrainOptions) -> tuple[Examples, Examples | None]:
    """(rest, held out): the latter is None if there is no choice to make, or too few examples to make it."""
    choosing = options.teacher == "auto" and options.transfer_set != "0"
    fraction = min(HELD_OUT, MOST_HELD_OUT / len(examples))
    if not choosing or fraction * len(examples) < LEAST_HELD_OUT:
        return examples, None
    return examples.split(fraction, seed=options.training.seed)


@dataclass(frozen=True)
class TeacherMaker:
    """Makes the teachers of a transfer set and records the outputs of the chosen one.

    :param ported: The finished adapter on its source.
    :param own: The user's classifier; if given, no other teacher is made.
    :param judges: Held-out training examples that the teachers are compared on.
    """

    ported: PortedModel
    own: Classifier | None
    examples: Examples
    judges: Examples | None
    data: TaskData
    options: PretrainOptions
    accelerator: Accelerator
    files: RunFiles | None
    digest: str
    reporter: Reporter

    def teacher(self) -> tuple[tuple[Teacher, str], dict[str, Score]]:
        """The teacher with its name, and the scores it was chosen by, if there was a choice."""
        options = self.options
        if self.own is not None:
            return (self.own, self.own.name), {}
        if options.teacher == "adapter" or (options.teacher == "auto" and self.judges is None):
            return (self.ported, _NAMES["adapter"]), {}
        lora = self._lora()
        if self.judges is None:
            return (lora, _NAMES["lora"]), {}
        scores = {name: self._score(model, self.judges) for name, model in (("adapter", self.ported), ("lora", lora))}
        if scores["lora"].value >= scores["adapter"].value:
            return (lora, _NAMES["lora"]), scores
        return (self.ported, _NAMES["adapter"]), scores

    def transfer_set(self, wanted: Wanted, teacher: tuple[Teacher, str], *, room: int) -> StoredTransfer:
        """The transfer set with the teacher's outputs, see `make_transfer_set`.  The user's own reads whole texts."""
        model, name = teacher
        evaluation = self.data.evaluation
        found = None if not evaluation else self._score(model, evaluation)
        length = None if model is self.own else self.options.training.max_length
        batch_size = self.options.evaluation_batch_size
        progress = phase(self.reporter, "transfer set")
        # Outputs are stored in coarse steps, so the precision of training is enough.
        with self.accelerator.autocast():
            return make_transfer_set(
                wanted, model, name, found, room=room, batch_size=batch_size, max_length=length, progress=progress
            )

    def _lora(self) -> PortedModel:
        def on_step(report: StepReport) -> None:
            note = f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}"
            self.reporter("teacher", report.step, report.steps, note)

        config = teacher_config(len(self.examples), self.options.training)
        return lora_teacher(
            self.ported,
            self.examples,
            config,
            accelerator=self.accelerator,
            files=self.files,
            digest=run_digest({"adapter": self.digest, "teacher": config.model_dump(mode="json")}),
            resume=self.options.resume,
            save_every=self.options.save_every,
            on_step=on_step,
        )

    def _score(self, model: Teacher, examples: Examples) -> Score:
        size, task = self.options.evaluation_batch_size, self.data.task
        logits = model.logits_of(examples, batch_size=size, progress=phase(self.reporter, "scoring: teacher"))
        rows = [part.argmax(-1).tolist() for part in logits]
        classes = rows if task.kind == "tokens" else [row[0] for row in rows]
        return score(task.metric, classes, references_of(examples), task.labels)
