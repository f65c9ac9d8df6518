"""On a GPU: what holds on the CPU holds there, and a file goes to and fro.  `python -m pytest -m cuda`."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_adapters import tiny_folded, tiny_universal, unpacked
from tiny_hosts import FAMILIES, SENTENCES, save_tiny_host, tiny_host

from uhl_cli.adapter.attach import attach
from uhl_cli.host.checkpoint import load_host
from uhl_cli.host.encode import encode

pytestmark = pytest.mark.cuda
SHORT = ["--task", "reviews", "--max-steps", "12", "--num-anchors", "128", "--offline", "--quiet", "--json"]


def output_of(host):
    encoded = encode(host, SENTENCES[:6]).to(host.device)
    with torch.inference_mode():
        return host.model(**encoded.model_inputs()).last_hidden_state


def logits_of(place, adapter, device, dtype="float32"):
    ported = adapter.port(load_host(str(place), device=device, dtype=dtype), max_flops=1e6)
    return ported(SENTENCES).float().cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_adapter_leaves_the_host_bit_for_bit(family, tmp_path):
    host = load_host(str(save_tiny_host(tmp_path, family)), device="cuda")
    before = output_of(host)
    folded = tiny_folded(tiny_host(family), zero=True)[0]
    for placed in (unpacked(folded).to(host.device), folded.for_inference(host.device, torch.float32)):
        with attach(host.map, placed):
            assert torch.equal(output_of(host), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_ported_model_says_what_it_says_on_the_cpu_and_leaves_no_trace(family, tmp_path):
    place = save_tiny_host(tmp_path, family)
    adapter = tiny_universal(tiny_host("bert", hidden_size=48, seed=1), featured=True)
    host = load_host(str(place), device="cuda")
    before, weights = output_of(host), {name: value.clone() for name, value in host.model.state_dict().items()}
    found = adapter.port(host, max_flops=1e6)(SENTENCES).cpu()
    wanted = logits_of(place, adapter, "cpu")
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, atol=0.01 * float(wanted.std()), rtol=0.01)
    assert torch.equal(output_of(host), before)
    assert all(torch.equal(value, weights[name]) for name, value in host.model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(dtype, tmp_path):
    place = save_tiny_host(tmp_path, "bert")
    adapter = tiny_universal(tiny_host("bert", hidden_size=48, seed=1), featured=True)
    wide, half = (logits_of(place, adapter, "cuda", name) for name in ("float32", dtype))
    assert half.isfinite().all()
    assert torch.nn.functional.cosine_similarity(wide - wide.mean(0), half - half.mean(0)).mean() > 0.9


def test_a_file_made_there_serves_here_and_there(tmp_path):
    from command_runs import start

    file = tmp_path / "adapter.safetensors"
    made = start("pretrain", "--host", "builtin:tiny", *SHORT, "--device", "cuda", "--output", file, cwd=tmp_path)
    assert made.code == 0, made.err
    scores = []
    for device in ("cuda", "cpu"):
        given = ["--task", "reviews", "--offline", "--quiet", "--json", "--device", device]
        ported = start("port", file, "--target", "builtin:small", *given, cwd=tmp_path)
        assert ported.code == 0, ported.err
        scores.append(json.loads(ported.out)["scores"]["ported"]["value"])
    assert abs(scores[0] - scores[1]) < 0.02
    given = ["--task", "reviews", "--steps", "12", "--offline", "--quiet", "--json", "--device", "cuda"]
    tuned = start("tune", file, "--target", "builtin:small", *given, "--output", tmp_path / "task", cwd=tmp_path)
    assert tuned.code == 0, tuned.err
    assert json.loads(tuned.out)["steps"] == 12
