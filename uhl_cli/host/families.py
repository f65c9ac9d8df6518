"""The table of families: the only place with names of modules, of the six commonest families.

A row is data.  `proof.resolve` proves it on the given model, so a row that does not fit is an error and never a guess.
All other families are found by running the model, see `discover`.  A row is a shortcut: it takes fewer passes, and
none on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uhl_cli.errors import UnknownFamilyError

MODULE_TYPES = ("q", "k", "v", "o", "up", "down", "gate")
"""Linear modules of a layer; the adapter's eighth type, the readout, is not a module of the host."""

READER_TYPES = frozenset({"q", "k", "v", "up", "gate"})
"""Modules whose input is the stream (or a normalised copy of it)."""

WRITER_TYPES = frozenset({"o", "down"})
"""Modules whose output is added to the stream."""


@dataclass(frozen=True)
class TargetModuleRule:
    """Where one module type is found inside a layer.

    :param path: Dotted path from the layer.
    :param slice: `(i, n)`: part i of n equal parts of a fused module's output; None: all of it.
    :param transposed: The weight is stored [in, out], as GPT-2's Conv1D does.
    """

    path: str
    slice: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """One row: the paths of the parts of a family's base model.

    :param name: Name of the row.
    :param model_types: Values of `config.model_type` that the row covers.
    :param layers: Dotted path from the base model to the list of layers.
    :param target_modules: Module type -> rule; types that the family lacks are absent.
    :param embeddings: Dotted path to the input embedding.
    :param embedding_projection: Dotted path to a linear map from embedding to hidden size; a model
        may lack the module where both sizes are equal.
    :param decoder: Attention is causal.
    :param pre_norm: Modules read a normalised copy of the stream, not the stream.
    :param pooler: Module that does not affect the hidden states; checkpoints may lack its weights.
    :param positions_after_padding: Positions count from `pad_token_id + 1`, so that many rows of the
        position table are never used.
    """

    name: str
    model_types: frozenset[str]
    layers: str
    target_modules: Mapping[str, TargetModuleRule]
    embeddings: str
    embedding_projection: str | None
    decoder: bool
    pre_norm: bool
    pooler: str | None = None
    positions_after_padding: bool = False


def _target_modules(**paths: str) -> Mapping[str, TargetModuleRule]:
    return {kind: TargetModuleRule(path) for kind, path in paths.items()}


_BERT_SITES = _target_modules(
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="bert",
        model_types=frozenset({"bert"}),
        layers="encoder.layer",
        target_modules=_BERT_SITES,
        embeddings="embeddings.word_embeddings",
        embedding_projection=None,
        decoder=False,
        pre_norm=False,
        pooler="pooler",
    ),
    Family(
        name="distilbert",
        model_types=frozenset({"distilbert"}),
        layers="transformer.layer",
        target_modules=_target_modules(
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            o="attention.out_lin",
            up="ffn.lin1",
            down="ffn.lin2",
        ),
        embeddings="embeddings.word_embeddings",
        embedding_projection=None,
        decoder=False,
        pre_norm=False,
    ),
    Family(
        name="roberta",
        model_types=frozenset({"roberta", "xlm-roberta", "camembert"}),
        layers="encoder.layer",
        target_modules=_BERT_SITES,
        embeddings="embeddings.word_embeddings",
        embedding_projection=None,
        decoder=False,
        pre_norm=False,
        pooler="pooler",
        positions_after_padding=True,
    ),
    Family(
        name="electra",
        model_types=frozenset({"electra"}),
        layers="encoder.layer",
        target_modules=_BERT_SITES,
        embeddings="embeddings.word_embeddings",
        embedding_projection="embeddings_project",
        decoder=False,
        pre_norm=False,
    ),
    Family(
        name="llama",
        model_types=frozenset({"llama", "mistral", "qwen2"}),
        layers="layers",
        target_modules=_target_modules(
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.o_proj",
            up="mlp.up_proj",
            down="mlp.down_proj",
            gate="mlp.gate_proj",
        ),
        embeddings="embed_tokens",
        embedding_projection=None,
        decoder=True,
        pre_norm=True,
    ),
    Family(
        name="gpt2",
        model_types=frozenset({"gpt2"}),
        layers="h",
        target_modules={
            "q": TargetModuleRule("attn.c_attn", slice=(0, 3), transposed=True),
            "k": TargetModuleRule("attn.c_attn", slice=(1, 3), transposed=True),
            "v": TargetModuleRule("attn.c_attn", slice=(2, 3), transposed=True),
            "o": TargetModuleRule("attn.c_proj", transposed=True),
            "up": TargetModuleRule("mlp.c_fc", transposed=True),
            "down": TargetModuleRule("mlp.c_proj", transposed=True),
        },
        embeddings="wte",
        embedding_projection=None,
        decoder=True,
        pre_norm=True,
    ),
)


def known_model_types() -> tuple[str, ...]:
    """Every `config.model_type` that has a row, sorted."""
    return tuple(sorted(kind for family in FAMILIES for kind in family.model_types))


def family_of(config: Any, model: type | None = None) -> Family:  # noqa: ANN401 - any family's configuration class
    """The row for a model with this configuration.

    A class of another author (from a checkpoint's own code, or in memory) that inherits from one of a known type gets
    that type's row; `proof.resolve` then checks that it fits.

    :param config: A transformers configuration; `model_type` and `is_encoder_decoder` are read.
    :param model: The model's class, if it is known.
    :raises UnknownFamilyError: There is no row for it; the message lists the known model types.
    """
    model_type = getattr(config, "model_type", None)
    for kind in (model_type, *_inherited(type(config), model)):
        for family in FAMILIES:
            if kind in family.model_types and not getattr(config, "is_encoder_decoder", False):
                return family
    raise UnknownFamilyError(
        f"No family row serves model type '{model_type}'; known: {', '.join(known_model_types())}.",
        "Pass the model itself or its checkpoint: its modules are then found by running it.",
    )


def _inherited(*classes: type | None) -> list[str]:
    """Model types of the transformers classes that classes of other authors inherit from, the nearest first."""
    found = []
    for given in classes:
        if given is None or given.__module__.startswith("transformers."):
            continue
        for each in given.__mro__:
            config = vars(each).get("config_class", each)
            model_type = getattr(config, "model_type", None)
            if isinstance(model_type, str) and getattr(config, "__module__", "").startswith("transformers."):
                found.append(model_type)
    return found
