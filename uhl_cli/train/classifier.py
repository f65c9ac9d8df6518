"""The user's own fine-tuned classifier, which replaces labels: a checkpoint or a PEFT folder.

It is read as it was trained: by its own tokenizer, without anything that uhl adds for its hosts, and up to its own
longest input.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedTokenizerBase

from uhl_cli.data.examples import Examples
from uhl_cli.data.labels import LONGEST_NAME, MOST_LABELS
from uhl_cli.data.tasks import Kind
from uhl_cli.errors import HostError, first_line
from uhl_cli.formats.export import BASE_FOLDER, is_export, read_export
from uhl_cli.host.checkpoint import device_of, longest_input
from uhl_cli.host.loading import from_pretrained, load_config, quiet
from uhl_cli.host.locate import CONFIG_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, TOKENIZER_FILES, locate, locate_peft
from uhl_cli.host.positions import positions_of
from uhl_cli.host.tokenizer import load_tokenizer
from uhl_cli.ported.model import Outputs
from uhl_cli.schema import TokenizerSource

Progress = Callable[[int, int], None]

_AUTO: dict[Kind, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}
_KIND_OF_PEFT: dict[str, Kind] = {"SEQ_CLS": "sequence", "TOKEN_CLS": "tokens"}
_OTHER_PROBLEMS = {"regression": "a regression", "multi_label_classification": "a multi-label classification"}
# Byte-level tokenizers need an option to take words; the list is that of transformers' script for token tasks.
_SPACE_BEFORE_WORDS = frozenset({"bloom", "gpt2", "roberta", "deberta"})
_NEEDED = "Name a model with a sequence-classification or token-classification head, or a PEFT folder of one."
_PREFIX = "base_model.model."
# Errors of a configuration that is valid JSON but fits neither peft nor the base.
_PEFT_FAILURES = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, AttributeError, re.error)
# A number of labels that differs from every other size of a model.
_MARK = 7919


@dataclass(frozen=True, eq=False)
class Classifier:
    """A loaded classifier, frozen and in eval mode.

    :param name: Its hub id, or the last part of its path.
    :param labels: Names of its classes, in order of their ids.
    :param named: Whether its classes have names; otherwise `labels` are LABEL_0, LABEL_1 and so on.
    :param base_name: Name to load its base by as a host: for a PEFT folder the base's name, else its own.
    :param max_length: Longest input in tokens.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    named: bool
    base_name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def with_labels(self, labels: Sequence[str]) -> Classifier:
        """The same classifier with other class names."""
        return replace(self, labels=tuple(labels), named=True)

    def logits_of(
        self,
        examples: Examples,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Logits float32 [predictions, labels] on the CPU of every example, in order; see `outputs_of`."""
        return self.outputs_of(examples, batch_size=batch_size, max_length=max_length, progress=progress).logits

    @torch.inference_mode()
    def outputs_of(
        self,
        examples: Examples,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> Outputs:
        """Logits float32 on the CPU of every example, and how many texts were cut.

        A word of a token task has the logits of its first sub-token, which is what such models are trained on.  A word
        without a sub-token, because the text was cut before it, has zeros: no class is preferred.

        :param max_length: Longest input in tokens; by default, and at most, the classifier's own.
        :raises HostError: The outputs are not finite.
        """
        length = self.max_length if max_length is None else min(max_length, self.max_length)
        order = sorted(range(len(examples)), key=lambda row: -len(examples.texts[row]))
        found: dict[int, Tensor] = {}
        truncated = 0
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self._of_batch(examples, rows, length)
            found.update(zip(rows, batch.logits, strict=True))
            truncated += batch.truncated
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
        return Outputs([found[row] for row in range(len(examples))], truncated)

    def _of_batch(self, examples: Examples, rows: Sequence[int], length: int) -> Outputs:
        texts: list[Any] = [examples.texts[row] for row in rows]
        pairs = None if examples.pairs is None else [examples.pairs[row] for row in rows]
        words = examples.words
        if words is not None:
            texts = [[examples.texts[row][start:end] for start, end in words[row]] for row in rows]
        tokenizer: Any = self.tokenizer
        batch = tokenizer(
            texts, pairs, is_split_into_words=words is not None, truncation=True, max_length=length, padding=False
        )
        word_ids = [batch.word_ids(place) for place in range(len(rows))] if words is not None else []
        for place in range(len(rows)):
            if not batch["input_ids"][place]:  # an empty text without special tokens is read as one token of padding
                filler = {"input_ids": tokenizer.pad_token_id, "attention_mask": 1}
                for key, values in batch.items():
                    values[place].append(filler.get(key, 0))
        taken = inspect.signature(self.model.forward).parameters
        padded = tokenizer.pad({key: values for key, values in batch.items() if key in taken}, return_tensors="pt")
        device = next(self.model.parameters()).device
        logits: Tensor = self.model(**{key: value.to(device) for key, value in padded.items()}).logits.float().cpu()
        parts = list(logits.unsqueeze(1))
        if words is not None:
            parts = [torch.zeros(len(words[row]), logits.shape[-1]) for row in rows]
            for place, ids in enumerate(word_ids):
                for token in reversed(range(len(ids))):  # a word's first token comes last, and stays
                    if ids[token] is not None:
                        parts[place][ids[token]] = logits[place, token]
        if not all(bool(part.isfinite().all()) for part in parts):
            exact = next(self.model.parameters()).dtype == torch.float32
            hint = "Check the checkpoint." if exact else "Use --dtype float32."
            raise HostError(f"the outputs of '{self.name}' are not finite numbers.", hint)
        return Outputs(parts, sum(bool(encoding.overflowing) for encoding in batch.encodings))


def load_classifier(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    offline: bool = False,
    trust_remote_code: bool = False,
    tokenizer: TokenizerSource | None = None,
) -> Classifier:
    """The classifier `name`, a hub id or a local folder, of a transformers checkpoint or of a PEFT adapter.

    Only safetensors weights are loaded, and none may be missing: a randomly initialised head or pooler is
    useless.  A PEFT adapter's base is found by the name in its configuration.

    :param device: A torch device, or "auto": CUDA, else MPS, else CPU.
    :param dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
    :param offline: Read only the hub's cache.
    :param trust_remote_code: Run the checkpoint's own Python code.
    :param tokenizer: As in `host.checkpoint.load_host`.
    :raises HostNotFoundError: There is no such model, or no such base.
    :raises TokenizerError: Its tokenizer is missing, damaged or not fast.
    :raises HostError: It has no classification head, or one for another kind of task; or its files are missing, damaged
        or incomplete.
    """
    target = device_of(device)
    with quiet(), torch.random.fork_rng(devices=[]):  # adapters are initialised at random before their weights are read
        adapter = locate_peft(name, offline=offline)
        peft = None if adapter is None else _Peft.read(name, adapter)
        base_name = name if peft is None else peft.base_name
        located = locate(base_name, offline=offline, with_code=trust_remote_code)
        if located.gguf is not None:
            raise HostError(f"'{base_name}' is a GGUF file, which has no classification head.", _NEEDED)
        config = load_config(base_name, located.folder, trust_remote_code)
        kind = (None if peft is None else peft.kind) or _kind_of(name, config)
        num_labels = None if peft is None else peft.num_labels(config, kind, trust_remote_code)
        if num_labels is not None:
            config.num_labels = num_labels
            _name_labels(config, peft, num_labels)
        labels, named = _labels_of(name, config)
        model, missing, _ = from_pretrained(
            _AUTO[kind],
            base_name,
            located.folder,
            config,
            dtype,
            trust_remote_code,
            other_shapes=num_labels is not None,
        )
        if peft is not None:
            missing = [key for key in missing if key not in peft.shapes]
        if missing:
            raise HostError(*_lacking(name, missing, peft))
        whole: Any = model.eval()
        positions = positions_of(whole.base_model)
        if peft is not None:
            model = peft.onto(model)
        own = peft is not None and any((peft.folder / file).is_file() for file in TOKENIZER_FILES)
        settings = {"add_prefix_space": True} if kind == "tokens" and config.model_type in _SPACE_BEFORE_WORDS else {}
        words, _ = load_tokenizer(
            name,
            peft.folder if peft is not None and own else located.folder,
            config=config,
            trust_remote_code=trust_remote_code,
            source=tokenizer,
            settings=settings,
        )
        # Decoders find a text's last token by the configuration's padding.
        if config.pad_token_id is None:
            loaded: Any = model.config
            loaded.pad_token_id = words.pad_token_id
        elif 0 <= config.pad_token_id < len(words):
            words.pad_token = words.convert_ids_to_tokens(config.pad_token_id)
        try:
            model.to(target)
        except (RuntimeError, AssertionError) as error:
            problem = f"'{name}' does not fit on {target}: {first_line(error)}"
            raise HostError(problem, "Use --device cpu, or --dtype bfloat16.") from error
    shown = Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
    longest = longest_input(positions, words)
    return Classifier(shown, kind, labels, named, base_name, model.eval().requires_grad_(False), words, longest)


@dataclass(frozen=True)
class _Peft:
    """A PEFT folder: its configuration, and the shapes of its weights by the base model's names."""

    name: str
    folder: Path
    base_name: str
    kind: Kind | None
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, name: str, folder: Path) -> _Peft:
        """:raises HostError: The files are damaged, or the adapter is not for classification."""
        damaged = "Save it again with peft's save_pretrained(folder)."
        try:
            content = json.loads((folder / PEFT_CONFIG_FILE).read_text(encoding="utf-8"))
            base, task = content["base_model_name_or_path"], content.get("task_type")
            with safe_open(folder / PEFT_WEIGHTS_FILE, framework="pt") as file:
                shapes = {key.removeprefix(_PREFIX): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise HostError(f"the PEFT folder '{name}' cannot be read: {first_line(error)}", damaged) from error
        if is_export(folder) and (folder / BASE_FOLDER).is_dir():  # wherever the folder was moved to
            base = str(folder / BASE_FOLDER)
        if not isinstance(base, str) or not base:
            raise HostError(
                f"the PEFT folder '{name}' names no base.", f"Write base_model_name_or_path into {PEFT_CONFIG_FILE}."
            )
        if task is not None and (not isinstance(task, str) or task not in _KIND_OF_PEFT):
            raise HostError(f"the PEFT folder '{name}' is for {task}, not for classification.", _NEEDED)
        return cls(name, folder, base, None if task is None else _KIND_OF_PEFT[task], shapes)

    def num_labels(self, config: Any, kind: Kind, trust_remote_code: bool) -> int | None:  # noqa: ANN401
        """Number of labels of this folder's head; None without a head.

        The head's last layer is called otherwise in every family: it is what has as many rows as there are labels.
        """
        marked = copy.deepcopy(config)
        marked.num_labels = _MARK
        try:
            with torch.device("meta"):
                model = _AUTO[kind].from_config(marked, trust_remote_code=trust_remote_code)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            problem = f"the base '{self.base_name}' of '{self.name}' takes no classification head: {first_line(error)}"
            raise HostError(problem, _NEEDED) from error
        heads = [key for key, value in model.named_parameters() if value.shape[0] == _MARK and key in self.shapes]
        return self.shapes[heads[0]][0] if heads else None

    def onto(self, model: nn.Module) -> nn.Module:
        """The base with this adapter in it.

        :raises HostError: The adapter does not fit the base.
        """
        from peft import PeftConfig, PeftModel

        hint = "Check that its head is in it (modules_to_save), and that its base is the one it was trained on."
        try:
            if PeftConfig.from_pretrained(str(self.folder)).is_prompt_learning:
                raise HostError(f"the PEFT folder '{self.name}' holds a prompt, not weights.", _NEEDED)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                whole = PeftModel.from_pretrained(
                    model, str(self.folder), torch_device="cpu", autocast_adapter_dtype=False
                )
        except _PEFT_FAILURES as error:
            raise HostError(f"the PEFT folder '{self.name}' cannot be loaded: {first_line(error)}", hint) from error
        lacking = next((str(entry.message) for entry in caught if "missing adapter keys" in str(entry.message)), None)
        if lacking is not None:
            raise HostError(f"the PEFT folder '{self.name}' lacks weights.", hint)
        found: nn.Module = whole.get_base_model()
        return found


def _kind_of(name: str, config: Any) -> Kind:  # noqa: ANN401 - any family's configuration class
    """:raises HostError: The checkpoint has no classification head."""
    architectures = [str(each) for each in getattr(config, "architectures", None) or ()]
    for architecture in architectures:
        if architecture.endswith("ForSequenceClassification"):
            return "sequence"
        if architecture.endswith("ForTokenClassification"):
            return "tokens"
    raise HostError(
        f"'{name}' has no classification head: it is a {', '.join(architectures) or 'bare model'}.", _NEEDED
    )


def _name_labels(config: Any, peft: _Peft | None, num_labels: int) -> None:  # noqa: ANN401
    """Name the labels of a PEFT folder's own head from a file beside it, if there is one: its base has other labels."""
    names = {str(index): f"LABEL_{index}" for index in range(num_labels)}
    found: Any = None
    if peft is not None and is_export(peft.folder):
        found = {str(index): label for index, label in enumerate(read_export(peft.folder).task.labels)}
    elif peft is not None and (peft.folder / CONFIG_FILE).is_file():
        try:
            found = json.loads((peft.folder / CONFIG_FILE).read_text(encoding="utf-8")).get("id2label")
        except (OSError, ValueError, AttributeError):
            found = None
    if isinstance(found, dict) and set(found) == set(names):
        names = {key: str(value) for key, value in found.items()}
    config.id2label = {int(key): value for key, value in names.items()}


def _labels_of(name: str, config: Any) -> tuple[tuple[str, ...], bool]:  # noqa: ANN401
    """Labels in order of their ids, and whether they are named.

    :raises HostError: The head is for another kind of task, or its labels are not class names.
    """
    problem = _OTHER_PROBLEMS.get(str(config.problem_type))
    if problem is not None or config.num_labels < 2:
        found = problem or "a regression, with one output"
        raise HostError(f"'{name}' is {found}; only classifiers can teach.", _NEEDED)
    labels = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    if len(set(labels)) != len(labels) or not all(0 < len(label) <= LONGEST_NAME for label in labels):
        raise HostError(f"the labels of '{name}' are not distinct.", "Repair id2label in its config.json.")
    if len(labels) > MOST_LABELS:
        raise HostError(f"'{name}' has {len(labels)} labels; the maximum is {MOST_LABELS}.", _NEEDED)
    return labels, labels != tuple(f"LABEL_{index}" for index in range(len(labels)))


def _lacking(name: str, missing: Sequence[str], peft: _Peft | None) -> tuple[str, str]:
    first = f"the first is '{missing[0]}'"
    if peft is None:
        return (
            f"the checkpoint '{name}' lacks {len(missing)} weights of its head or model, {first}.",
            "They would be random: save the model after it was fine-tuned.",
        )
    return (
        f"the PEFT folder '{name}' and its base lack {len(missing)} weights of the head, {first}.",
        "They would be random: train with modules_to_save naming the head (all of its layers), and save again.",
    )
