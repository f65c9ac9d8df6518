"""Zero-shot scores on other architectures: a builtin host's weights carried into other architectures.

    python tests/benchmarks/carried_hosts.py --text SHARED/data/text/wiki.txt.gz --teacher SHARED/hosts/minilm-l3 \
        --work FOLDER --output tests/benchmarks/results/carried_hosts.json

Most architectures here can compute the very function of `builtin:small` or `builtin:decoder`: their own parts
(relative positions, multipliers, routers) are given values that change nothing.  Such a host must score what the
builtin host does, whatever its modules are called and however they are fused.  The others start from what fits (some
from the embeddings alone) and are trained by the builtin hosts' recipe for `--steps` short steps; these must beat the
head-only control.  Each host is a checkpoint folder that the command `uhl port` reads.  Finished folders in WORK and
finished rows in OUTPUT are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast, T5EncoderModel

from uhl_cli.builtin.corpus import build_corpus, read_paragraphs, teacher_words
from uhl_cli.builtin.make import CORPUS_SEED, train_host
from uhl_cli.builtin.recipes import MAX_LENGTH, RECIPES, Recipe
from uhl_cli.builtin.words import WordTargets, tokenise, word_targets
from uhl_cli.data import load_task
from uhl_cli.host.builtin import builtin_path
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.host.encode import encode
from uhl_cli.host.tokenizer import load_tokenizer
from uhl_cli.progress import progress_bar

State = dict[str, Tensor]
ROOT = Path(__file__).parents[2]
COMMAND = "python tests/benchmarks/carried_hosts.py --text TEXT --teacher HOST --work FOLDER --output FILE"


@dataclass(frozen=True)
class Architecture:
    """A model type and how a builtin host's weights become its own.

    :param source: Name of the builtin host.
    :param model_type: As transformers names it.
    :param settings: Settings beyond the shape, or in place of it.
    :param carry: The source's weights as this type's.
    :param spare: Matches weights that `carry` does not give, because they have no effect or are trained.
    :param trained: The function is another, so the host is trained.
    :param base: Class of the model, if not AutoModel's.
    :param padding: Id of the padding token, which changes places with the source's.
    """

    source: str
    model_type: str
    settings: Mapping[str, Any]
    carry: Callable[[State], State]
    spare: str = "^$"
    trained: bool = False
    base: Any = None
    padding: int = 0


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    """The weights under names in which each pattern, in turn, is replaced."""
    result = {}
    for name, value in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def without_types(state: State) -> State:
    """The weights of a BERT whose positions contain the embedding of segment 0."""
    state = dict(state)
    types = state.pop("embeddings.token_type_embeddings.weight")
    state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"] + types[0]
    return state


def shifted(positions: Tensor) -> Tensor:
    """Positions that count from 2."""
    return torch.cat([torch.zeros(2, positions.shape[1]), positions])


def per_layer(state: State, pattern: str) -> list[tuple[str, str]]:
    """(name, its layer's prefix) of the weights whose name contains the pattern."""
    return [(name, name[: re.search(pattern, name).start()]) for name in state if re.search(pattern, name)]  # type: ignore[union-attr]


def ernie(state: State) -> State:
    return state | {"embeddings.task_type_embeddings.weight": torch.zeros(3, 192)}


def mpnet(state: State) -> State:
    """Padding has id 1 and positions begin after it; the relative bias is zero."""
    state = renamed(
        without_types(state),
        (r"attention\.self\.(.)\w+", r"attention.attn.\1"),
        (r"attention\.output\.dense", "attention.attn.o"),
        (r"attention\.output\.LayerNorm", "attention.LayerNorm"),
    )
    words = state["embeddings.word_embeddings.weight"]
    state["embeddings.word_embeddings.weight"] = torch.cat([words[[1, 0]], words[2:]])
    state["embeddings.position_embeddings.weight"] = shifted(state["embeddings.position_embeddings.weight"])
    return state | {"encoder.relative_attention_bias.weight": torch.zeros(32, 6)}


def deberta(state: State) -> State:
    """q, k and v of each head follow each other; relative embeddings are zero, and k's bias has no effect."""
    state = without_types(state)
    for name, layer in per_layer(state, r"query\.weight"):
        q, k, v = (state.pop(f"{layer}{part}.weight").unflatten(0, (6, 32)) for part in ("query", "key", "value"))
        # Scores are divided by the root of the number of terms, which is three.
        state[f"{layer}in_proj.weight"] = torch.stack([sqrt(3) * q, k, v], 1).flatten(0, 2)
        state[f"{layer}q_bias"] = sqrt(3) * state.pop(f"{layer}query.bias")
        state[f"{layer}v_bias"] = state.pop(f"{layer}value.bias")
        state[f"{layer}pos_q_proj.bias"] = torch.zeros(192)
        del state[f"{layer}key.bias"], name
    return state | {"encoder.rel_embeddings.weight": torch.zeros(256, 192)}


def deberta_v2(state: State) -> State:
    """Relative embeddings are zero, so relative positions add (bias of q) k: half of the bias is left to each."""
    state = renamed(without_types(state), (r"self\.(query|key|value)", r"self.\1_proj"))
    for name, _ in per_layer(state, r"query_proj\.weight"):
        state[name] = sqrt(3) * state[name]
    for name, _ in per_layer(state, r"query_proj\.bias"):
        state[name] = sqrt(3) / 2 * state[name]
    norm = {"encoder.LayerNorm.weight": torch.ones(192), "encoder.LayerNorm.bias": torch.zeros(192)}
    return state | norm | {"encoder.rel_embeddings.weight": torch.zeros(64, 192)}


def albert(state: State) -> State:
    """Each layer is a group of its own; the map from embeddings to the stream is the identity."""
    state = renamed(
        state,
        (r"encoder\.layer\.(\d+)", r"encoder.albert_layer_groups.\1.albert_layers.0"),
        (r"attention\.(self|output)", "attention"),
        (r"intermediate\.dense", "ffn"),
        (r"output\.dense", "ffn_output"),
        (r"output\.LayerNorm", "full_layer_layer_norm"),
    )
    into = "encoder.embedding_hidden_mapping_in"
    return state | {f"{into}.weight": torch.eye(192), f"{into}.bias": torch.zeros(192)}


def albert_shared(state: State) -> State:
    """One layer, the source's first, is called four times."""
    return {name: value for name, value in albert(state).items() if not re.search(r"groups\.[1-9]", name)}


def bart(state: State) -> State:
    """The encoder; the decoder is left random, and is no part of the host."""
    state = renamed(
        without_types(state),
        (r"embeddings\.word_embeddings", "shared"),
        (r"embeddings\.position_embeddings", "encoder.embed_positions"),
        (r"embeddings\.LayerNorm", "encoder.layernorm_embedding"),
        (r"encoder\.layer\.", "encoder.layers."),
        (r"attention\.self\.(.)\w+", r"self_attn.\1_proj"),
        (r"attention\.output\.dense", "self_attn.out_proj"),
        (r"attention\.output\.LayerNorm", "self_attn_layer_norm"),
        (r"intermediate\.dense", "fc1"),
        (r"output\.dense", "fc2"),
        (r"output\.LayerNorm", "final_layer_norm"),
    )
    state["encoder.embed_positions.weight"] = shifted(state["encoder.embed_positions.weight"])
    words = state["shared.weight"]
    return state | {"encoder.embed_tokens.weight": words, "decoder.embed_tokens.weight": words}


def gemma(state: State) -> State:
    """Norms add 1 to their weights; embeddings are multiplied by the root of the width."""
    state = {name: value - 1 if "norm" in name else value for name, value in state.items()}
    state["embed_tokens.weight"] = state["embed_tokens.weight"] / sqrt(192)
    return state


def phi3(state: State) -> State:
    """q, k and v are one module, and gate and up."""
    state = dict(state)
    for _, layer in per_layer(state, r"self_attn\.q_proj"):
        parts = [state.pop(f"{layer}self_attn.{part}_proj.weight") for part in "qkv"]
        state[f"{layer}self_attn.qkv_proj.weight"] = torch.cat(parts)
        parts = [state.pop(f"{layer}mlp.{part}_proj.weight") for part in ("gate", "up")]
        state[f"{layer}mlp.gate_up_proj.weight"] = torch.cat(parts)
    return state


def granite(state: State) -> State:
    """What layers write is halved before it is added, and embeddings are multiplied by 4."""
    state = {name: 2 * value if re.search("o_proj|down_proj", name) else value for name, value in state.items()}
    state["embed_tokens.weight"] = state["embed_tokens.weight"] / 4
    return state


def mixtral(state: State) -> State:
    """Four experts that are the same; what the router says has no effect."""
    state = dict(state)
    for _, layer in per_layer(state, r"mlp\.gate_proj"):
        gate, up, down = (state.pop(f"{layer}mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        state[f"{layer}mlp.experts.gate_up_proj"] = torch.cat([gate, up]).expand(4, -1, -1).clone()
        state[f"{layer}mlp.experts.down_proj"] = down.expand(4, -1, -1).clone()
    return state


def words_as(*names: str, source: str = "embeddings.word_embeddings.weight") -> Callable[[State], State]:
    """The embeddings alone, under each of the names."""
    return lambda state: dict.fromkeys(names, state[source])


_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
_PADDED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": 192, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
_BART = {
    "d_model": 192,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 768,
    "decoder_layers": 1,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
}
_V2 = {**_RELATIVE, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 32}
_ALBERT = {"embedding_size": 192, "num_hidden_groups": 4}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
_MULTIPLIERS = {"residual_multiplier": 0.5, "embedding_multiplier": 4.0, "attention_multiplier": 32**-0.5}
_ENDS = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES: Mapping[str, Architecture] = {
    "ernie": Architecture("small", "ernie", {"use_task_id": True}, ernie),
    "mpnet": Architecture("small", "mpnet", {"max_position_embeddings": 130}, mpnet, padding=1),
    "deberta": Architecture("small", "deberta", _RELATIVE, deberta, spare="pos_proj|pos_q_proj.weight"),
    "deberta-v2": Architecture("small", "deberta-v2", _V2, deberta_v2),
    "albert": Architecture("small", "albert", _ALBERT, albert),
    "bart": Architecture("small", "bart", _BART, bart, spare="^decoder"),
    "gemma": Architecture("decoder", "gemma", {"hidden_act": "silu", "hidden_activation": "silu"}, gemma),
    "phi3": Architecture("decoder", "phi3", {"sliding_window": None}, phi3),
    "granite": Architecture("decoder", "granite", _MULTIPLIERS, granite),
    "mixtral": Architecture("decoder", "mixtral", _EXPERTS, mixtral, spare=r"mlp\.gate\.weight"),
    "albert-shared": Architecture("small", "albert", {"embedding_size": 192}, albert_shared, trained=True),
    "modernbert": Architecture(
        "small",
        "modernbert",
        {**_ENDS, "intermediate_size": 512, "global_attn_every_n_layers": 3},
        words_as("embeddings.tok_embeddings.weight"),
        spare="norm|layers",
        trained=True,
    ),
    "t5": Architecture(
        "small",
        "t5",
        _T5,
        words_as("shared.weight", "encoder.embed_tokens.weight"),
        spare="block|norm",
        trained=True,
        base=T5EncoderModel,
    ),
    "gpt_neox": Architecture(
        "decoder",
        "gpt_neox",
        {"intermediate_size": 768},
        words_as("embed_in.weight", source="embed_tokens.weight"),
        spare="norm|layers",
        trained=True,
    ),
    "qwen3": Architecture("decoder", "qwen3", {}, dict, spare="[qk]_norm", trained=True),
}


def build(architecture: Architecture, source: Host) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model of the architecture with the source's weights, and its tokenizer; the random state is left as it was.

    :raises ValueError: A weight has no place in the model, or one of the model's is not given.
    """
    shape: dict[str, Any] = {
        "vocab_size": 14_336,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "intermediate_size": source.model.config.intermediate_size,
        "max_position_embeddings": MAX_LENGTH,
        **(_PADDED if source.decoder else {"hidden_act": "gelu", "layer_norm_eps": 1e-12}),
        "pad_token_id": architecture.padding,
    }
    if source.decoder:
        shape |= {"num_key_value_heads": 6, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
        shape |= {"original_max_position_embeddings": MAX_LENGTH}
    still = {f"{part}_dropout{end}": 0.0 for part in ("hidden", "attention") for end in ("", "_prob")}
    still |= {"attention_probs_dropout_prob": 0.0, "dropout_rate": 0.0}
    config = AutoConfig.for_model(architecture.model_type, **(shape | still | dict(architecture.settings)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config) if architecture.base is None else architecture.base(config)
    weights = {name: value for name, value in source.model.state_dict().items() if not name.startswith("pooler")}
    found = model.load_state_dict(architecture.carry(weights), strict=False)
    missing = [name for name in found.missing_keys if not re.search(architecture.spare, name)]
    missing = [name for name in missing if not name.startswith("pooler")]
    if found.unexpected_keys or missing:
        raise ValueError(f"{architecture.model_type}: unexpected {found.unexpected_keys}, missing {missing}")
    return model.eval(), _tokenizer(architecture)


def _tokenizer(architecture: Architecture) -> PreTrainedTokenizerFast:
    folder = builtin_path(architecture.source)
    tokenizer: Any = load_tokenizer(architecture.source, folder, config=None)[0]
    if architecture.padding:
        other, text = tokenizer.convert_ids_to_tokens(architecture.padding), tokenizer.backend_tokenizer.to_str()
        # The two tokens change places everywhere: in the vocabulary and in what is put around a text.
        swap = {tokenizer.pad_token: architecture.padding, other: tokenizer.pad_token_id}
        content = json.loads(text)
        content["model"]["vocab"] |= swap
        for token in content["added_tokens"]:
            token["id"] = swap.get(token["content"], token["id"])
        content["added_tokens"].sort(key=lambda token: token["id"])
        for processor in content["post_processor"]["processors"]:
            for token in processor.get("special_tokens", {}).values():
                token["ids"] = [
                    swap.get(name, number) for name, number in zip(token["tokens"], token["ids"], strict=True)
                ]
        names = {name: getattr(tokenizer, name) for name in ("pad_token", "cls_token", "sep_token", "mask_token")}
        backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **names)
    return tokenizer


@torch.inference_mode()
def largest_difference(one: Host, other: Host, texts: list[str]) -> float:
    """Largest difference of the last states of two hosts, whose tokens are the same, where tokens are attended."""
    first, second = encode(one, texts), encode(other, texts)
    states = [host.map.base(**batch.model_inputs())[0] for host, batch in ((one, first), (other, second))]
    return float((states[0] - states[1])[first.attention_mask.bool()].abs().max())


def write(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A checkpoint folder that says of its tokenizer what every release of transformers understands."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Lessons:
    """Texts and what the teacher's words are in them."""

    texts: list[str]
    targets: WordTargets


def lessons(text: Path, teacher_name: str, work: Path, limit: int) -> Lessons:
    """The first `limit` texts of the builtin hosts' corpus; the teacher's states are kept in `work`."""
    teacher = load_host(teacher_name, device="cpu")
    texts = build_corpus(read_paragraphs(text), teacher_words(teacher.tokenizer), seed=CORPUS_SEED)
    texts = [texts[row] for row in np.random.default_rng(CORPUS_SEED).permutation(len(texts))[:limit]]
    path = work / f"teacher-{len(texts)}.npy"
    if not path.exists():
        with progress_bar(quiet=False) as reporter:
            word_targets(teacher, texts, path.with_suffix(".part.npy"), reporter)
        path.with_suffix(".part.npy").replace(path)
    return Lessons(texts, WordTargets(np.load(path, mmap_mode="r")))


def train(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lessons: Lessons
) -> dict[str, Any]:
    """Train the model in place, and return a record of it."""
    started = time.monotonic()
    tokenised = tokenise(tokenizer, lessons.texts, max_length=MAX_LENGTH)
    model.train()
    with progress_bar(quiet=False) as reporter:
        _, held_out = train_host(recipe, tokenizer, tokenised, lessons.targets, reporter, model)
    seconds = round(time.monotonic() - started)
    return {"steps": recipe.steps, "batch_tokens": recipe.batch_tokens, "seconds": seconds, "held_out": held_out}


def port(adapter: Path, target: str) -> dict[str, Any]:
    """What the command `uhl port --task reviews --controls --no-cache --json` reports."""
    command = [sys.executable, "-m", "uhl_cli", "port", str(adapter), "--target", target, "--task", "reviews"]
    command += ["--controls", "--no-cache", "--json", "--quiet"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    report: dict[str, Any] = json.loads(found.stdout)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ROOT / "adapters" / "reviews-builtin-base.safetensors")
    parser.add_argument("--text", type=Path, help="plain English, for the hosts that are trained")
    parser.add_argument("--teacher", help="the encoder that they learn from")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--limit-texts", type=int, default=8_000)
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else {}
    learned: Lessons | None = None
    dev = list(load_task("reviews").evaluation.texts)
    for name in arguments.names:
        if name in results:
            continue
        architecture, folder = ARCHITECTURES[name], arguments.work / name
        builtin = f"builtin:{architecture.source}"
        source = load_host(builtin, device="cpu")
        record: dict[str, Any] = {"source": builtin, "trained": None}
        if not (folder / "tokenizer_config.json").exists():
            model, tokenizer = build(architecture, source)
            if architecture.trained:
                if learned is None:
                    learned = lessons(arguments.text, arguments.teacher, arguments.work, arguments.limit_texts)
                chosen = {"steps": arguments.steps, "learning_rate": arguments.learning_rate}
                recipe = replace(RECIPES[architecture.source], batch_tokens=arguments.batch_tokens, **chosen)
                record["trained"] = train(recipe, model, tokenizer, learned)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trained.json").write_text(json.dumps(record["trained"]))
            write(folder, model.eval(), tokenizer)
        record["trained"] = json.loads((folder / "trained.json").read_text())
        started = time.monotonic()
        host = load_host(str(folder), device="cpu")
        record["degree"], record["load_seconds"] = host.map.degree, round(time.monotonic() - started, 1)
        record["largest_difference"] = None if architecture.trained else largest_difference(source, host, dev[:64])
        for key, target in ((builtin, builtin), (name, str(folder))):
            if key not in results:
                report = port(arguments.adapter, target)
                kinds = ("ported", "readout_only", "head_only", "full_updates")
                scores = {kind: report["scores"][kind] for kind in kinds if kind in report["scores"]}
                keys = ("left_out", "feature_quality", "seconds")
                results[key] = {"scores": scores, "above_head": report["gains"]["head_only"]}
                results[key] |= {part: report[part] for part in keys}
        results[name] = record | results[name]
        values = {kind: round(score["value"], 4) for kind, score in results[name]["scores"].items()}
        at_source = results[builtin]["scores"]["ported"]["value"]
        print(f"{name}: {record} {values}, {builtin} {at_source:.4f}", file=sys.stderr, flush=True)
        content = {"command": COMMAND, "adapter": arguments.adapter.name, "results": results}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
