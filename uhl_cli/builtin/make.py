"""Train the builtin hosts.

    python -m uhl_cli.builtin.make --text TEXT --teacher HOST --output uhl_cli/builtin/hosts --work FOLDER

TEXT is plain English, a paragraph a line; HOST any encoder that `uhl` takes.  Finished hosts in OUTPUT are
kept, so an interrupted run continues with the first missing host.  The same command gives the same hosts on
the same machine and number of threads; the seeds are in `recipes`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from uhl_cli.builtin.corpus import build_corpus, chunks, read_paragraphs, teacher_words, train_tokenizer
from uhl_cli.builtin.recipes import MAX_LENGTH, RECIPES, VOCAB_SIZE, Recipe
from uhl_cli.builtin.student import Student
from uhl_cli.builtin.words import TokenisedTexts, WordTargets, batches, tokenise, word_targets
from uhl_cli.files import write_bytes, write_text
from uhl_cli.host.checkpoint import load_host
from uhl_cli.host.packed import pack
from uhl_cli.progress import progress_bar
from uhl_cli.reports import Reporter
from uhl_cli.train.loop import learning_rate_factor

CORPUS_SEED = 7
HELD_OUT_TEXTS = 500


def train_host(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    texts: TokenisedTexts,
    targets: WordTargets,
    reporter: Reporter,
    model: PreTrainedModel | None = None,
) -> tuple[Student, dict[str, float]]:
    """A trained student and its losses on held-out texts.

    :param model: Its body, of the recipe's shape; by default the recipe's own, at random.
    """
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    student = Student(recipe, tokenizer, targets.size, model)
    matrices = [value for value in student.parameters() if value.dim() > 1]
    vectors = [value for value in student.parameters() if value.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    prepared, optimizer = accelerator.prepare(student, optimizer)
    padding, lengths = int(tokenizer.pad_token_id), texts.lengths()
    rows = np.random.default_rng(CORPUS_SEED).permutation(len(lengths))
    held, rows = rows[:HELD_OUT_TEXTS], rows[HELD_OUT_TEXTS:]
    step, epoch = 0, 0
    while step < recipe.steps:
        for chosen in batches(lengths, rows, tokens=recipe.batch_tokens, seed=recipe.seed, epoch=epoch):
            if step == recipe.steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe.steps, 0.05)
            batch = texts.batch(chosen, padding)
            with accelerator.autocast():
                losses = prepared(batch, targets.of(batch.words), recipe.seed * 1_000_003 + step)
            accelerator.backward(losses.total)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            note = f"language {float(losses.language):.3f}  missed {float(losses.distillation):.3f}"
            reporter(f"training {recipe.name}", step, recipe.steps, note)
        epoch += 1
    return student, _held_out(student, texts, targets, held, padding, recipe)


@torch.inference_mode()
def _held_out(
    student: Student, texts: TokenisedTexts, targets: WordTargets, held: np.ndarray, padding: int, recipe: Recipe
) -> dict[str, float]:
    student.eval()
    found = []
    for chosen in batches(texts.lengths(), held, tokens=recipe.batch_tokens, seed=0, epoch=0):
        batch = texts.batch(chosen, padding)
        losses = student(batch, targets.of(batch.words), 1)
        found.append((float(losses.language), float(losses.distillation)))
    language, missed = np.mean(found, axis=0)
    return {"language_loss": round(float(language), 4), "teacher_variance_missed": round(float(missed), 4)}


def write_host(folder: Path, student: Student, tokenizer: PreTrainedTokenizerFast, record: dict[str, object]) -> None:
    """Configuration, tokenizer, record and, last, the weights: a folder with weights is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    student.body.config._attn_implementation = None  # users get their own library's default
    student.body.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes a class that transformers 4 does not know; both know this one.
    write_text(path, json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    write_text(folder / "training.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    write_bytes(folder / "model.safetensors", pack(student.body.state_dict()))


def make_hosts(
    recipes: Sequence[Recipe],
    text: Path,
    teacher_name: str,
    output: Path,
    work: Path,
    *,
    limit_texts: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    command: str = "python -m uhl_cli.builtin.make --text TEXT --teacher HOST --output FOLDER --work FOLDER",
    reporter: Reporter,
) -> None:
    """Train every host that is not in `output` yet.

    :param work: Folder for the teacher's states, which are kept for the next call.
    :param vocab_size: Most pieces of the tokenizers.
    :param command: The command, for the hosts' records.
    """
    missing = [recipe for recipe in recipes if not (output / recipe.name / "model.safetensors").exists()]
    teacher = load_host(teacher_name, device="cpu")
    paragraphs = read_paragraphs(text)
    texts = build_corpus(paragraphs, teacher_words(teacher.tokenizer), seed=CORPUS_SEED)
    texts = [texts[row] for row in np.random.default_rng(CORPUS_SEED).permutation(len(texts))]
    texts = texts[:limit_texts]
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"teacher-{len(texts)}.npy"
    if path.exists():
        targets = WordTargets(np.load(path, mmap_mode="r"))
    else:
        targets = word_targets(teacher, texts, path.with_suffix(".part.npy"), reporter)
        path.with_suffix(".part.npy").replace(path)
    for recipe in missing:
        started = time.monotonic()
        tokenizer = train_tokenizer(recipe.kind, chunks(paragraphs), vocab_size=vocab_size)
        tokenised = tokenise(tokenizer, texts, max_length=MAX_LENGTH)
        student, held_out = train_host(recipe, tokenizer, tokenised, targets, reporter)
        record: dict[str, object] = {
            **recipe.__dict__,
            "command": command,
            "teacher": teacher.fingerprint.digest,
            "texts": len(texts),
            "tokens": len(tokenised.tokens),
            "held_out": held_out,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        write_host(output / recipe.name, student, tokenizer, record)
        reporter(f"{recipe.name}: {held_out}, {time.monotonic() - started:.0f} s", 1, 1)


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hosts", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--work", type=Path, required=True, help="folder for the teacher's states, about 8 GB")
    parser.add_argument("--limit-texts", type=int, help="for trials")
    parser.add_argument("--steps", type=int, help="for trials")
    arguments = parser.parse_args()
    recipes = [RECIPES[name] for name in arguments.hosts]
    if arguments.steps:
        recipes = [replace(recipe, steps=arguments.steps) for recipe in recipes]
    with progress_bar(quiet=False) as reporter:
        make_hosts(
            recipes,
            arguments.text,
            arguments.teacher,
            arguments.output,
            arguments.work,
            limit_texts=arguments.limit_texts,
            reporter=reporter,
        )


if __name__ == "__main__":
    main()
