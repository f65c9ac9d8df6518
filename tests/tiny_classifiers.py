"""Tiny classifiers by transformers and peft alone, saved as their users save them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_hosts import tiny_config, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

AUTO = {"sequence": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}


def tiny_classifier(family: str, labels: Sequence[str], kind: str = "sequence", **settings: Any) -> nn.Module:
    """A random classifier whose outputs differ from text to text."""
    config = tiny_config(family, len(tiny_tokenizer(family)), hidden_size=32, num_hidden_layers=2)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AUTO[kind].from_config(config)
    model.base_model.load_state_dict(tiny_model(family).state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("classifier", "score")):
                parameter.normal_(std=0.5)
    return model.eval()


def save(path: Path, family: str, model: nn.Module) -> Path:
    """Save model and tokenizer."""
    model.save_pretrained(path)
    tiny_tokenizer(family).save_pretrained(path)
    return path


def fine_tuned(
    model: nn.Module, family: str, texts: Sequence[str], labels: Sequence[int], steps: int = 120
) -> nn.Module:
    """The same model, trained in place until it knows these texts."""
    batch = dict(tiny_tokenizer(family)(list(texts), padding=True, return_tensors="pt"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(steps):
        loss = model(**batch, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.01
    return model.eval()


def with_lora(model: nn.Module, kind: str | None = "sequence", **settings: Any) -> nn.Module:
    """The model with a LoRA of random factors; with a kind of task, the head is saved with it."""
    task_type = None if kind is None else {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS"}[kind]
    torch.manual_seed(1)
    config = LoraConfig(task_type=task_type, r=2, target_modules=["query", "value"], **settings)
    found = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return found.eval()
