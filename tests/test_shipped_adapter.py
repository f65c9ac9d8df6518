"""The adapters that ship: whole, within the limits, portable, and as good as their card says."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from tiny_hosts import tiny_host
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from uhl_cli import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, PortOptions
from uhl_cli.commands.port import run_port
from uhl_cli.errors import UhlWarning
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.ported.aligned import align_host

FOLDER = Path(__file__).parents[1] / "adapters"
SST2 = FOLDER / "sst2-minilm-l6.safetensors"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_is_whole_small_and_has_a_card(path: Path):
    content = read_adapter(path)
    assert path.stat().st_size <= 1_000_000
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert content.manifest.training.command in card
    assert f"{content.manifest.score.value:.3f}" in card
    assert content.manifest.licence in card


def test_ships_no_text_of_a_data_set():
    content = read_adapter(SST2)
    assert content.manifest.anchors.origin == "general"
    assert content.transfer is not None
    assert content.transfer.record.user_texts == 0
    assert content.transfer.record.general is not None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_can_be_tuned_without_labels(path: Path):
    transfer = UniversalAdapter.load(path).transfer_set()
    assert len(transfer.texts) > 2000
    assert transfer.log_odds().shape == (len(transfer.examples()), 2)


@pytest.mark.parametrize(
    "family", ["distilbert", *(pytest.param(name, marks=pytest.mark.integration) for name in ("gpt2", "llama"))]
)
def test_ports_to_hosts_of_other_shape_and_restores_them(family: str):
    host = tiny_host(family, hidden_size=48, num_hidden_layers=3)
    ids = torch.arange(5, 17).unsqueeze(0)
    with torch.inference_mode():
        before = host.map.base(input_ids=ids).last_hidden_state
        # With all updates: the transfer set may leave them out, and then nothing changes inside the host.
        ported = UniversalAdapter.load(SST2).port(host, max_flops=1000, strength=1.0)
        logits = ported(["a fine film", "not a fine film at all"])
        with ported.attached():
            inside = host.map.base(input_ids=ids).last_hidden_state
        after = host.map.base(input_ids=ids).last_hidden_state
    assert logits.shape == (2, 2)
    assert torch.isfinite(logits).all()
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)


def shuffled(host: Host) -> Host:
    """The host with a tokenizer of the same tokens, whose ids belong to other ones."""
    state = json.loads(host.tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in state["added_tokens"]}
    vocabulary = state["model"]["vocab"]
    tokens = [token for token in vocabulary if token not in special]
    ids = [vocabulary[token] for token in tokens]
    random.Random(0).shuffle(ids)
    vocabulary |= zip(tokens, ids, strict=True)
    roles = {f"{role}_token": getattr(host.tokenizer, f"{role}_token") for role in ("pad", "unk", "bos", "eos")}
    kept = {role: token for role, token in roles.items() if token is not None}
    backend = Tokenizer.from_str(json.dumps(state))
    return wrap_host(host.model, PreTrainedTokenizerFast(tokenizer_object=backend, **kept))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["builtin:tiny", "builtin:decoder"])
def test_a_tokenizer_of_another_model_is_a_warning(name: str, path: Path):
    host, bank = load_host(name, device="cpu"), UniversalAdapter.load(path).bank
    with warnings.catch_warnings():
        warnings.simplefilter("error", UhlWarning)
        align_host(host, bank, "anchors", joint=False)
    with pytest.warns(UhlWarning, match="check that the tokenizer belongs to the weights"):
        align_host(shuffled(host), bank, "anchors", joint=False)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(("target", "least"), [("minilm-l6", 0.86), ("minilm-l3", 0.78), ("wiki-256x4", 0.77)])
def test_scores_on_real_hosts(shared: Path, target: str, least: float):
    _, report = run_port(
        PortOptions(
            adapter=SST2,
            target=HostOptions(name=str(shared / "hosts" / target), device="cpu"),
            data=DataOptions(data=str(shared / "data" / "sst2")),
            controls=target == "wiki-256x4",
        )
    )
    scores = {name: score.value for name, score in report.scores.items()}
    assert report.scores["ported"].examples == 872
    assert scores["ported"] >= least
    # Controls: what the score would be without what the adapter brings.
    for control in ("majority_class", *(("head_only", "size") if target == "wiki-256x4" else ())):
        assert report.gains[control].low > 0, (control, scores)
    assert report.flops.percent <= 10
    if target == "minilm-l6":  # the file's score is what training reported, to within a float's last bits
        assert scores["ported"] == pytest.approx(read_adapter(SST2).manifest.score.value, abs=2 / 872)
    print(json.dumps(scores))
