"""What the teacher says of every word: its states at half and at full depth, standardised, kept in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uhl_cli.builtin.words import Integers, batches, tokenise
from uhl_cli.host.checkpoint import Host
from uhl_cli.reports import Reporter

BATCH_TOKENS = 8192
SAMPLE_BATCHES = 40


@dataclass(frozen=True)
class WordTargets:
    """Memory-mapped float16 [words, 2 d]: half depth, then full depth, each coordinate standardised."""

    values: NDArray[np.float16]

    @property
    def size(self) -> int:
        """Coordinates of one depth."""
        return int(self.values.shape[1] // 2)

    def of(self, words: Integers) -> Tensor:
        """float32 [words, 2 d]."""
        return torch.from_numpy(self.values[words].astype(np.float32))


@torch.inference_mode()
def word_targets(teacher: Host, texts: list[str], path: Path, reporter: Reporter) -> WordTargets:
    """Run the teacher over all texts once, in bfloat16, and keep its word states in `path`."""
    texts_tokens = tokenise(teacher.tokenizer, texts, max_length=teacher.max_length)
    rows = np.arange(len(texts))
    order = batches(texts_tokens.lengths(), rows, tokens=BATCH_TOKENS, seed=0, epoch=0)
    depth, width = teacher.num_hidden_layers, teacher.hidden_size
    assert teacher.tokenizer is not None  # it was loaded with its weights
    padding = int(teacher.tokenizer.pad_token_id or 0)

    def states(chosen: list[int]) -> tuple[Integers, Tensor]:
        batch = texts_tokens.batch(chosen, padding)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = teacher.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
            ).hidden_states
        return batch.words, torch.cat([batch.pool(hidden[place])[0] for place in (depth // 2, depth)], dim=1)

    sample = torch.cat([states(chosen)[1] for chosen in order[:SAMPLE_BATCHES]])
    mean, deviation = sample.mean(0), sample.std(0).clamp_min(1e-6)
    values = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float16, shape=(int(texts_tokens.word_starts[-1]), 2 * width)
    )
    for done, chosen in enumerate(order, 1):
        words, found = states(chosen)
        values[words] = ((found - mean) / deviation).clamp(-30, 30).numpy().astype(np.float16)
        reporter("teacher", done, len(order))
    values.flush()
    return WordTargets(values)
