"""Tokenizers of the builtin hosts, trained by us: byte-level BPE, lower-case for encoders, cased for decoders.

Not WordPiece: its trainer breaks ties at random, so the same command would not give the same host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from uhl_cli.builtin.corpus import opinions
from uhl_cli.builtin.recipes import MAX_LENGTH, VOCAB_SIZE

# Our own sentences of praise and blame count this often, so that most of their words get a piece of their own.
OPINION_WEIGHT = 30
_ENCODER = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_DECODER = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def train_tokenizer(kind: Literal["encoder", "decoder"], texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `VOCAB_SIZE` pieces for the hosts of one kind; the same for the same input."""
    special = _ENCODER if kind == "encoder" else _DECODER
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "encoder":
        tokenizer.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *(opinions() * OPINION_WEIGHT)], trainer)
    single, pair = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if kind == "encoder" else ("<s> $A", "<s> $A $B")
    framing = [(name, tokenizer.token_to_id(name)) for name in special.values() if name in single]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=single, pair=pair, special_tokens=framing),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **special)
