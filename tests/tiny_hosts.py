"""Tiny hosts of every family with random weights and real tokenizers, made without any network."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from uhl_cli.host.checkpoint import Host, wrap_host

FAMILIES = ("bert", "distilbert", "roberta", "xlm-roberta", "electra", "llama", "mistral", "qwen2", "gpt2")
DECODERS = ("llama", "mistral", "qwen2", "gpt2")
# Parameters of a test that takes long: an encoder and a decoder always, the others among the integration tests.
SWEEP = tuple(
    pytest.param(family, marks=() if family in ("bert", "gpt2") else pytest.mark.integration) for family in FAMILIES
)
MAX_POSITIONS = 64
HEADS = 4

SENTENCES = (
    "The film is a quiet study of a fisherman and his daughter.",
    "I loved every minute of it, and so did my mother.",
    "What a waste of time: nothing happens, and then it ends.",
    "Anna lives in Paris and works for the United Nations.",
    "The company opened a new office in Berlin last year.",
    "It was raining when the train from Madrid arrived.",
    "He didn't know whether to laugh or to cry.",
    "A warm, funny and surprisingly clever comedy.",
    "The plot makes no sense, but the pictures are beautiful.",
    "Two dogs ran across the green field behind the house.",
    "She bought three books, a lamp and a small table.",
    "Prices rose by four percent in the first quarter.",
    "The committee will meet again on Monday morning.",
    "Nobody expected the old bridge to hold for so long.",
    "Our teacher explained how plants turn light into food.",
    "The soup was cold, the bread was stale, the wine was gone.",
    "Scientists have found water under the surface of the moon.",
    "They walked slowly along the river until it was dark.",
    "This is the best album that the band has ever made.",
    "The bank refused to lend the farmer any more money.",
    "A young doctor from Lima won the prize this year.",
    "The actors try hard, but the script gives them nothing.",
    "Please close the window before you leave the room.",
    "The museum is open every day except on Tuesday.",
)


@lru_cache
def _wordpiece() -> Tokenizer:
    # Built by hand, because the trainer's vocabulary differs from process to process.  Every other word is whole,
    # the rest fall into characters.
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for sentence in SENTENCES for word in re.findall(r"\w+|[^\w\s]", sentence.lower())})
    letters = sorted({letter for word in words for letter in word})
    entries = [*special, *letters, *(f"##{letter}" for letter in letters), *(w for w in words[::2] if len(w) > 1)]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


@lru_cache
def _bytelevel(*special: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer in the family's manner, trained on `SENTENCES`."""
    if family in ("bert", "distilbert", "electra"):
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        tokenizer = _wordpiece()
    elif family in ("roberta", "xlm-roberta"):
        names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>"}
        tokenizer = Tokenizer.from_str(_bytelevel("<s>", "<pad>", "</s>", "<unk>").to_str())
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    elif family == "gpt2":
        names = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
        tokenizer = _bytelevel("<|endoftext|>")
    elif family == "qwen2":  # no begin token, as in the published checkpoints
        names = {"eos": "<|endoftext|>", "pad": "<|endoftext|>"}
        tokenizer = Tokenizer.from_str(_bytelevel("<|endoftext|>").to_str())
        tokenizer.normalizer = normalizers.NFC()
    else:
        names = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
        tokenizer = Tokenizer.from_str(_bytelevel("<unk>", "<s>", "</s>").to_str())
        if family == "llama":  # begins by itself; the tiny mistral does not
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        model_max_length=MAX_POSITIONS,
        **{f"{name}_token": token for name, token in names.items()},
    )


def tiny_config(family: str, tokens: int, *, hidden_size: int, num_hidden_layers: int) -> PretrainedConfig:
    """A configuration of the family; no two widths are equal where the family lets them differ."""
    ffn = 3 * hidden_size
    common = {"vocab_size": tokens + 3, "pad_token_id": 0}
    if family == "distilbert":
        sizes = {"dim": hidden_size, "n_layers": num_hidden_layers, "n_heads": HEADS, "hidden_dim": ffn}
        sizes["max_position_embeddings"] = MAX_POSITIONS
    elif family == "gpt2":
        sizes = {"n_embd": hidden_size, "n_layer": num_hidden_layers, "n_head": HEADS, "n_inner": ffn}
        sizes |= {"n_positions": MAX_POSITIONS, "bos_token_id": 0, "eos_token_id": 0}
    else:
        sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "intermediate_size": ffn}
        sizes |= {"num_attention_heads": HEADS, "max_position_embeddings": MAX_POSITIONS}
    if family in ("llama", "mistral", "qwen2"):
        sizes["num_key_value_heads"] = HEADS // 2
    if family == "electra":
        sizes["embedding_size"] = hidden_size // 2
    if family in ("roberta", "xlm-roberta"):
        common["pad_token_id"] = 1
        sizes |= {"type_vocab_size": 1, "max_position_embeddings": MAX_POSITIONS + 2}
    return CONFIG_MAPPING[family](**common, **sizes)


def tiny_model(
    family: str,
    *,
    hidden_size: int = 32,
    num_hidden_layers: int = 2,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> nn.Module:
    """A random base model whose every part matters: matrices of deviation 0.2, nonzero biases."""
    tokens = len(tokenizer or tiny_tokenizer(family))
    config = tiny_config(family, tokens, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
    model = AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            norm_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if norm_gain else (0.2 if parameter.dim() > 1 else 0.05) * noise)
    return model.eval()


def tiny_host(family: str, *, hidden_size: int = 32, num_hidden_layers: int = 2, seed: int = 0) -> Host:
    """A tiny host in memory; equal arguments give equal weights."""
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(
        family, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, seed=seed, tokenizer=tokenizer
    )
    return wrap_host(model, tokenizer, name=f"tiny-{family}")


def save_tiny_host(
    path: Path | str, family: str, *, hidden_size: int = 32, num_hidden_layers: int = 2, seed: int = 0
) -> Path:
    """Write a tiny host as a transformers folder: config.json, model.safetensors, fast tokenizer."""
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(
        family, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, seed=seed, tokenizer=tokenizer
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def save_rebuilt_host(path: Path | str, family: str) -> Path:
    """`save_tiny_host` with a tokenizer.json that splits at punctuation, which transformers 5 does not run.

    It builds the tokenizers of "qwen2", "roberta" and "gpt2" from their class.
    """
    folder = save_tiny_host(path, family)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("tokenizer_class")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
