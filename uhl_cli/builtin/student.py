"""The model that is trained into a builtin host: its body, a language-modelling head, and two distillation maps.

Only the body ships.  An encoder predicts masked tokens, a decoder the next token; both also predict, by a linear
map of each word's state, the teacher's states of that word at half and at full depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast

from uhl_cli.builtin.recipes import MAX_LENGTH, Recipe
from uhl_cli.builtin.words import Batch

MASKED = 0.15
# Share of a decoder's positions whose next token is predicted in a step; the rest would not be worth their cost.
PREDICTED = 0.25
DISTILLATION_WEIGHT = 5.0


@dataclass(frozen=True)
class StudentLosses:
    """`language` in nats a token; `distillation` is the mean unexplained share of the teacher's variance."""

    total: Tensor
    language: Tensor
    distillation: Tensor


def body(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A randomly initialised model of the recipe's shape; uses torch's global random state."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.num_attention_heads,
        "intermediate_size": recipe.intermediate_size,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "eager",
    }
    if recipe.kind == "encoder":
        config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        encoder: PreTrainedModel = BertModel(config, add_pooling_layer=False)
        return encoder
    heads = {"num_key_value_heads": recipe.num_attention_heads, "tie_word_embeddings": True}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    decoder: PreTrainedModel = LlamaModel(LlamaConfig(**shape, **heads, **ends))
    return decoder


class Student(nn.Module):
    """Body (the recipe's, or a given model of its shape) and heads; see the module."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        teacher_size: int,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.body: PreTrainedModel = body(recipe, tokenizer) if model is None else model
        width = recipe.hidden_size
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(len(tokenizer)))
        self.at_half = nn.Linear(width, teacher_size)
        self.at_full = nn.Linear(width, teacher_size)
        self._mask_token = tokenizer.mask_token_id
        self._vocab_size = len(tokenizer)

    def forward(self, batch: Batch, targets: Tensor, seed: int) -> StudentLosses:
        """Losses of a batch; `targets` [words, 2 teacher_size]; `seed` draws the masks."""
        generator = torch.Generator().manual_seed(seed)
        ids = batch.input_ids
        if self.recipe.kind == "encoder":
            ids, chosen, labels = self._mask(batch, generator)
        else:
            inside = batch.attention_mask[:, 1:].bool()
            drawn = torch.rand(inside.shape, generator=generator) < PREDICTED
            chosen = functional.pad(inside & drawn, (0, 1))
            labels = batch.input_ids[functional.pad(inside & drawn, (1, 0))]
        output = self.body(input_ids=ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        final = output.last_hidden_state
        embeddings = self.body.get_input_embeddings().weight
        logits = functional.linear(self.transform(final[chosen]), embeddings, self.bias)
        language = functional.cross_entropy(logits.float(), labels)
        middle = output.hidden_states[self.recipe.num_hidden_layers // 2]
        half, present = batch.pool(middle)
        full, _ = batch.pool(final)
        predicted = torch.cat([self.at_half(half), self.at_full(full)], dim=1).float()
        missed = (predicted - targets).square()[present]
        distillation = missed.mean()
        return StudentLosses(language + DISTILLATION_WEIGHT * distillation, language.detach(), distillation.detach())

    def _mask(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """BERT's recipe: of the chosen tokens 80 % are masked, 10 % exchanged, 10 % kept."""
        ids = batch.input_ids
        chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & (batch.places.view_as(ids) >= 0)
        if not chosen.any():
            chosen[0, min(1, ids.shape[1] - 1)] = True
        fate = torch.rand(ids.shape, generator=generator)
        drawn = torch.randint(self._vocab_size, ids.shape, generator=generator)
        masked = torch.where(chosen & (fate < 0.8), torch.full_like(ids, self._mask_token), ids)
        masked = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), drawn, masked)
        return masked, chosen, ids[chosen]
