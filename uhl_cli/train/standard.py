"""The target as transformers' own classifier with a peft LoRA: `export` trains it, and it loads without uhl.

The classifier is the family's class with its standard head.  The LoRA is on the linear modules of all layers; the
head, and the pooler where the class has one, are fully trained.  The host that it is made from is not changed.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from uhl_cli.adapter.module import LoraFactors, linear_modules
from uhl_cli.data.examples import Examples
from uhl_cli.data.tasks import Task
from uhl_cli.errors import HostError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded, encode
from uhl_cli.host.hostmap import TargetModule, dense
from uhl_cli.host.loading import RELEASE
from uhl_cli.ported.model import encode_examples
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.model import Losses, task_loss, unfused_attention
from uhl_cli.train.student import ALPHA_OVER_RANK, BETAS

_AUTO: dict[str, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}
_HEAD_NAMES = {"sequence": "sequence classification", "tokens": "token classification"}
_UP_TO_NUMBER = re.compile(r"^.*?\.\d+\.")
_TASK_TYPES = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS"}


def refuse_headless(host: Host, task: Task) -> None:
    """Return only if transformers has a standard head of the task's kind on models like the host.

    :raises HostError: It has none, or one that reads more than the host, as of encoder-decoders; names the type.
    """
    config: Any = host.model.config
    hint = "`uhl tune --parameters lora` keeps a LoRA with uhl's own readout."
    head = f"head for {_HEAD_NAMES[task.kind]} on models of type '{config.model_type}'"
    if type(config) not in _AUTO[task.kind]._model_mapping:
        raise HostError(f"transformers has no {head}.", hint)
    if not isinstance(host.model, AutoModel._model_mapping[type(config)]):
        raise HostError(f"transformers' {head} needs all of it, and the host is its {type(host.model).__name__}.", hint)


def refuse_misread_padding(host: Host, task: Task) -> None:
    """Return only if this transformers release finds a text's end when a decoder's begin token is also its padding.

    :raises HostError: It takes the begin token for padding, and reads the end of the batch.
    """
    tokenizer: Any = host.tokenizer
    if task.kind != "sequence" or not host.decoder or RELEASE >= (4, 50):
        return
    if int(encode(host, ["a"]).input_ids[0, 0]) == tokenizer.pad_token_id:
        raise HostError(
            f"in this release of transformers, a head on '{host.name}' reads padding as text.",
            "Run `pip install 'transformers>=4.50'`.",
        )


def standard_model(host: Host, task: Task, *, seed: int) -> PreTrainedModel:
    """The family's classifier with the host's weights in float32, in eval mode; its head is initialised by the seed.

    Its configuration names the labels, and for a decoder the padding token, by which the head finds a text's end.

    :raises HostError: See `refuse_headless`; or the weights of the family's class differ from the host's.
    """
    refuse_headless(host, task)
    config: Any = copy.deepcopy(host.model.config)
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {label: index for index, label in enumerate(task.labels)}
    config.problem_type = "single_label_classification" if task.kind == "sequence" else None
    config.architectures = None
    config._name_or_path = ""
    if host.decoder:
        tokenizer: Any = host.tokenizer
        config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = _AUTO[task.kind].from_config(config).float()
    base: nn.Module = model.base_model
    weights = {name: dense(value) for name, value in host.model.state_dict().items()}
    outcome = base.load_state_dict(weights, strict=False)
    apart = tuple(f"{name}." for name in (host.map.pooler, *_poolers(base, host)) if name)
    odd = [name for name in (*outcome.missing_keys, *outcome.unexpected_keys) if not name.startswith(apart)]
    if odd:
        raise HostError(
            f"the weights of '{host.name}' do not match transformers' classifier; the first mismatch is '{odd[0]}'.",
            "Use an unmodified checkpoint of this model type.",
        )
    return model.to(host.device).eval()


def save_base(host: Host, task: Task, folder: Path, dtype: torch.dtype) -> None:
    """Write the host as a checkpoint, without a head, whose configuration names the task's labels."""
    base: Any = standard_model(host, task, seed=0).base_model
    base.to(dtype).save_pretrained(str(folder))


class StandardClassifier(nn.Module):
    """A standard model with a LoRA, as `train.loop.run_steps` takes it.

    :param host: Where the weights are from; its tokenizer must be the one that is saved (see `host.standalone`).
    :param start: LoRA factors to start from, by the host's module names; by default the LoRA starts as zero.
    """

    def __init__(self, host: Host, task: Task, *, rank: int, seed: int, start: LoraFactors | None = None) -> None:
        super().__init__()
        self._host = host
        self.task = task
        self.rank = rank if start is None else start.rank
        model = standard_model(host, task, seed=seed)
        base: nn.Module = model.base_model
        heads = [name for name, part in model.named_children() if part is not base]
        whole = [name for name in heads if any(True for _ in getattr(model, name).parameters())]
        whole += _poolers(base, host)
        linears = linear_modules(host.map).values()
        config = LoraConfig(
            task_type=_TASK_TYPES[task.kind],
            r=self.rank,
            lora_alpha=int(ALPHA_OVER_RANK * self.rank),
            lora_dropout=0.0,
            target_modules=sorted(_names_for_peft(model, linears)),
            modules_to_save=list(whole),
            fan_in_fan_out=any(linear.transposed for linear in linears),
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            warnings.simplefilter("ignore")  # peft warns about modules chosen by hand
            self.model: Any = get_peft_model(model, config)
        self._whole = whole
        self.model.eval()
        with torch.no_grad():
            for name, (down, up) in ({} if start is None else start.by_module).items():
                layer: Any = base.get_submodule(name)
                layer.lora_A["default"].weight.copy_(down)
                layer.lora_B["default"].weight.copy_(up.float() / layer.scaling["default"])

    @property
    def config(self) -> Any:  # noqa: ANN401 - any family's configuration class
        """The standard model's configuration."""
        return self.model.config

    @property
    def trained(self) -> nn.ParameterDict:
        """The trained parameters, for checkpoints; shared with the model."""
        found = {name.replace(".", "/"): value for name, value in self.model.named_parameters() if value.requires_grad}
        return nn.ParameterDict(found)

    def optimizer(self, config: TrainingConfig) -> torch.optim.AdamW:
        """AdamW over the trained parameters, without decay; the LoRA has its own learning rate."""
        factors = [value for name, value in self.trained.items() if "lora_" in name]
        others = [value for name, value in self.trained.items() if "lora_" not in name]
        rates = ((factors, config.learning_rate), (others, config.readout_learning_rate))
        groups = [{"params": some, "lr": rate, "base_lr": rate, "weight_decay": 0.0} for some, rate in rates]
        return torch.optim.AdamW(groups, betas=BETAS)

    def forward(self, encoded: Encoded, words: Tensor | None, targets: Tensor, _seed: int) -> Losses:
        """Losses of one batch; see `TrainedModel.forward`.  Words that were cut off are ignored."""
        with unfused_attention(self._host):
            logits, present = self.predictions(encoded, words)
        if present.any():
            task, correct = task_loss(logits[present], targets[present])
        else:
            task, correct = 0 * logits.sum(), present.sum()
        return Losses(task, task.detach(), correct, logits.new_zeros(()), False)

    def predictions(self, encoded: Encoded, words: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [predictions, labels], and which predictions are valid: a word's logits are those of its first token.

        :param words: Averaging weights of a token task's words, see `ported.model.encode_examples`.
        """
        logits: Tensor = self.model(**encoded.model_inputs()).logits
        if words is None:
            return logits, torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        used = words > 0
        present = used.any(1)
        return logits.flatten(0, 1)[used.float().argmax(1)] * present.unsqueeze(-1), present

    @torch.inference_mode()
    def logits_of(
        self,
        examples: Examples,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Logits float32 [predictions, labels] of every example, in order, on the CPU; zeros for words cut off."""
        order = sorted(range(len(examples)), key=lambda row: -len(examples.texts[row]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            encoded, words, counts = encode_examples(self._host, examples, rows, max_length=max_length)
            logits, _ = self.predictions(encoded.to(self._host.device), words)
            found.update(zip(rows, torch.split(logits.float().cpu(), counts), strict=True))
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
        return [found[row] for row in range(len(examples))]

    def merge(self) -> None:
        """Merge the LoRA into the weights, which leaves the standard model."""
        self.model = self.model.merge_and_unload().eval()

    def round_to(self, dtype: torch.dtype) -> None:
        """Convert the weights to another type.  Buffers are unchanged, as when a checkpoint is loaded."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    def save(self, folder: Path, *, base: str | None = None, revision: str | None = None) -> None:
        """Write the checkpoint (before `merge`, peft's two files) in the precision of the weights.

        :param base: Name or path of the base for peft's configuration; `revision` is its revision on the hub.
        """
        if isinstance(self.model, PeftModel):
            config = self.model.peft_config["default"]
            config.base_model_name_or_path, config.revision = base, revision
            config.modules_to_save = list(self._whole)  # peft adds names of other families' heads
            # Embeddings are not trained; without this, peft asks the hub.
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            self.model.save_pretrained(str(folder))


def _poolers(base: nn.Module, host: Host) -> list[str]:
    """Parts of a classifier's base model that the host lacks, or that do not affect its hidden states."""
    children = [name for name, _ in base.named_children()]
    return [name for name in children if name == host.map.pooler or getattr(host.model, name, None) is None]


def _names_for_peft(model: nn.Module, linears: Collection[TargetModule]) -> set[str]:
    """The names of the modules within their layers, if peft finds by these the same modules as by the full names.

    peft takes every module whose name ends with one that it is given.
    """
    names = {linear.name for linear in linears}
    short = {_UP_TO_NUMBER.sub("", name) for name in names}

    def found(some: set[str]) -> set[str]:
        ends = tuple(f".{name}" for name in some)
        return {name for name, _ in model.named_modules() if f".{name}".endswith(ends)}

    return short if found(short) == found(names) else names
