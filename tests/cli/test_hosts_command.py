"""`uhl hosts` prints the map that was proved, and `port`, `tune` and `budget` say what of it can be edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_runs import Called, Workplace, call, port_arguments
from tiny_hosts import tiny_tokenizer
from transformers import AutoConfig, AutoModel

from uhl_cli.reports import HostReport

COMMON = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
KINDS = {
    "albert": {"intermediate_size": 96, "embedding_size": 16, "max_position_embeddings": 64},
    "gpt_neox": {"intermediate_size": 128, "max_position_embeddings": 64},
    "mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
    # Attention in the second layer alone.
    "jamba": {
        "intermediate_size": 96,
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """A folder of tiny hosts of several types, one folder a type."""
    folder = tmp_path_factory.mktemp("kinds")
    for model_type, settings in KINDS.items():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**COMMON, **settings}))
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.1 * torch.randn_like(value))
        model.save_pretrained(folder / model_type)
        tiny_tokenizer("bert").save_pretrained(folder / model_type)
    return folder


def hosts(name: Path, *more: str) -> Called:
    return call("hosts", name, "--device", "cpu", "--offline", *more, env={"COLUMNS": "200"})


def row_of(table: str, *words: str) -> list[str]:
    """The cells of the one row that begins with these words, without empty ones."""
    rows = [[cell.strip() for cell in line.split("│") if cell.strip()] for line in table.splitlines()]
    (found,) = [cells for cells in rows if cells[: len(words)] == list(words)]
    return found


def test_a_host_of_fused_modules(place):
    called = hosts(place.target)
    assert called.code == 0
    first, second = called.out.splitlines()[:2]
    assert first == f"{place.target} (gpt2, 3 x 48): updates on every layer"
    assert second.startswith("decoder, at most 64 tokens, embedding 'wte'; found in ")
    assert row_of(called.out, "0-2", "q") == ["0-2", "q", "attn.c_attn", "0-47", "attention input"]
    assert row_of(called.out, "v") == ["v", "attn.c_attn", "96-143", "attention input"]
    assert row_of(called.out, "down") == ["down", "mlp.c_proj", "all", "stream"]
    assert "layers 0-2:" not in called.out


def test_a_fused_projection_found_by_structure(kinds):
    called = hosts(kinds / "gpt_neox")
    assert called.code == 0
    assert "found in " in called.out
    q = row_of(called.out, "0-1", "q")
    assert q == ["0-1", "q", "attention.query_key_value", "0-7, 24-31, 48-55, 72-79", "attention input"]
    assert row_of(called.out, "up") == ["up", "mlp.dense_h_to_4h", "all", "mlp input"]


def test_layers_that_share_a_module(kinds):
    report = json.loads(hosts(kinds / "albert", "--json").out)
    assert [(layer["name"], layer["call"]) for layer in report["layers"]] == [
        ("encoder.albert_layer_groups.0", 0),
        ("encoder.albert_layer_groups.0", 1),
    ]


def test_json_is_the_report_and_quiet_one_line(place, kinds):
    for folder, degree in ((place.host, "all"), (kinds / "jamba", "some"), (kinds / "mamba", "stream")):
        called = hosts(folder, "--json")
        report = HostReport.model_validate_json(called.out)
        assert json.loads(called.out)["degree"] == degree
        assert (report.host, report.degree, len(report.layers)) == (str(folder), degree, 2)
        assert hosts(folder, "--quiet") == Called(0, f"{degree}\t2\t32\n", "")


def test_layers_without_modules_say_why(kinds):
    called = hosts(kinds / "jamba")
    assert f"{kinds / 'jamba'} (jamba, 2 x 32): updates on a part of the layers or of their modules" in called.out
    report = HostReport.model_validate_json(hosts(kinds / "jamba", "--json").out)
    assert "q" not in report.layers[0].modules
    assert "q" in report.layers[1].modules
    assert report.layers[0].problem
    assert f"layer 0: {report.layers[0].problem}" in called.out
    assert "no updates: the readout alone" in hosts(kinds / "mamba").out


@pytest.mark.parametrize("more", [[], ["--json"], ["--quiet"]])
def test_a_model_without_a_stream_is_refused_in_one_line(kinds, more):
    called = hosts(kinds / "xlm", *more)
    assert called.code == 1
    assert "hands a stream on" in called.error


def test_a_name_is_needed_and_must_lead_somewhere(here):
    assert call("hosts").code == 2
    called = hosts(here / "nowhere")
    assert called.code == 1
    assert "nowhere" in called.error


def test_help_fits_eighty_columns():
    called = call("hosts", "--help", env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert called.code == 0
    assert max(map(len, called.out.splitlines())) <= 80
    words = " ".join(called.out.replace("│", " ").split())
    for said in ("Show what uhl finds in a model", "uhl hosts answerdotai/ModernBERT-base", "--trust-remote-code"):
        assert said in words


def budget(place: Workplace, target: Path, *more: str) -> Called:
    given = ["budget", str(place.adapter), "--target", str(target), "--device", "cpu", "--offline"]
    return call(*given, "--max-flops", "1000", "--max-atoms", "100", *more, env={"COLUMNS": "200"})


def test_budget_says_that_fvcore_cannot_trace_a_target(place, monkeypatch):
    def untraceable(*_arguments: object) -> None:
        raise RuntimeError("0 INTERNAL ASSERT FAILED")

    assert "FLOPs by fvcore" in budget(place, place.target).out
    monkeypatch.setattr("fvcore.nn.FlopCountAnalysis.total", untraceable)
    called = budget(place, place.target)
    assert called.code == 0
    assert "FLOPs by torch" in called.out
    assert "FLOPs by fvcore" not in called.out
    assert "fvcore cannot trace this target, so torch's counter alone decides" in called.out.splitlines()


def tune(place: Workplace, target: Path, *more: str) -> Called:
    given = ["tune", str(place.adapter), "--target", str(target), "--device", "cpu", "--offline", "--max-flops", "1000"]
    given += ["--parameters", "lora", "--steps", "1", "--batch-size", "4", "--output", "tuned", "--overwrite"]
    return call(*given, *more, env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("kind", "degree", "said"),
    [
        ("jamba", "some", "updates on a part of the layers: see `uhl hosts {}`"),
        ("mamba", "stream", "no updates, the readout alone: see `uhl hosts {}`"),
        (None, "all", None),
    ],
)
def test_port_tune_and_budget_say_the_degree(place, kinds, here, kind, degree, said):
    target = place.target if kind is None else kinds / kind
    port = port_arguments(place.adapter, target, place.data)
    reports = {
        "port": (json.loads(call(*port, "--json").out), call(*port, env={"COLUMNS": "200"}).out),
        "tune": (json.loads(tune(place, target, "--json").out), tune(place, target).out),
        "budget": (json.loads(budget(place, target, "--json").out)["target"], budget(place, target).out),
    }
    for report, table in reports.values():
        assert report["degree"] == degree
        if said is None:
            assert "uhl hosts" not in table
        else:
            assert table.splitlines().count(said.format(target)) == 1
