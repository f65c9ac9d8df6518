"""From bare `uhl pretrain` on what ships to standard models of two other hosts, which a process without uhl runs."""

from __future__ import annotations

import json

import pytest
import torch
from command_runs import call
from export_runs import Inside, alone, asked

from uhl_cli.commands.options import HostOptions
from uhl_cli.commands.scoring import load
from uhl_cli.data import load_task
from uhl_cli.formats.adapter import read_adapter


@pytest.mark.slow
def test_from_pretraining_to_a_process_without_uhl(tmp_path, monkeypatch):
    adapter, scored = tmp_path / "adapter.safetensors", tmp_path / "dev.tsv"
    dev = load_task("reviews", limit_evaluation=40, need_train=False).evaluation
    lines = [f"{text}\t{label}" for text, label in zip(dev.texts, dev.labels, strict=True)]
    scored.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UHL_CACHE", str(tmp_path / "cache"))  # both formats of a host take one alignment
    given = ["pretrain", "--limit-train", "200", "--limit-evaluation", "40", "--max-steps", "3", "--batch-size", "8"]
    given += ["--num-anchors", "128", "--feature-words", "0", "--transfer-set", "60", "--teacher", "adapter"]
    called = call(*given, "--device", "cpu", "--quiet")
    assert (called.code, called.out) == (0, "adapter.safetensors\n"), called.err
    manifest = read_adapter(adapter).manifest
    assert (manifest.source.name, manifest.task.name) == ("builtin:base", "reviews")
    questions, inside, reports = [], [], []
    for host in ("builtin:small", "builtin:decoder"):
        for form in ("merged", "peft"):
            output = tmp_path / f"{host.replace(':', '-')}-{form}"
            arguments = ["export", adapter, "--target", host, "--format", form, "--output", output, "--steps", "3"]
            arguments += ["--batch-size", "8", "--score-data", scored, "--device", "cpu", "--json"]
            with Inside(load(HostOptions(name=host, device="cpu"))) as found:
                called = call(*arguments)
            assert called.code == 0, called.err
            reports.append(json.loads(called.out))
            inside.append(found)
            given_to = None if form == "merged" else reports[-1]["arguments"]
            questions.append(asked(output, "sequence", arguments=given_to))
    answers = alone(questions, tmp_path)
    for answer, found in zip(answers, inside, strict=True):
        assert (answer["problems"], answer["ids"], answer["labels"]) == ({}, found.ids, ["negative", "positive"])
        assert torch.allclose(torch.tensor(answer["logits"]), found.logits, atol=1e-4)
    for first, second in ((0, 1), (2, 3)):
        merged, peft = (torch.tensor(answers[row]["logits"]) for row in (first, second))
        assert torch.allclose(merged, peft, atol=1e-4)
        assert reports[first]["scores"] == reports[second]["scores"]
        assert set(reports[first]["scores"]) == {"zero_shot", "export"}
        assert reports[first]["scores"]["export"]["examples"] == 40
