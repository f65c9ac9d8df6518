"""Hosts load from folders, the hub's cache and memory; every bad input has its typed error."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hosts import FAMILIES, save_tiny_host, tiny_host, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from uhl_cli.errors import (
    HostError,
    HostNotFoundError,
    TokenizerError,
    UnknownModelTypeError,
    UsageError,
)
from uhl_cli.host import locate
from uhl_cli.host.checkpoint import load_host, wrap_host


@pytest.fixture
def folder(tmp_path):
    return save_tiny_host(tmp_path / "host", "bert")


def edit_json(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_as_it_was_saved(tmp_path, family):
    saved = tiny_host(family)
    host = load_host(str(save_tiny_host(tmp_path / "host", family)), device="cpu")
    assert host.fingerprint == saved.fingerprint
    assert (host.hidden_size, host.num_hidden_layers, host.max_length) == (32, 2, 64)
    assert host.decoder == saved.decoder
    assert host.device == torch.device("cpu")
    assert host.revision is None
    assert host.tokenizer.pad_token_id is not None
    assert host.tokenizer.padding_side == "right"
    assert not any(module.training for module in host.model.modules())
    assert not any(parameter.requires_grad for parameter in host.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_computes_the_same_and_may_be_changed(family):
    host = tiny_host(family)
    copied = host.copied()
    ids = torch.arange(5, 13).unsqueeze(0)
    with torch.inference_mode():
        before = host.map.base(input_ids=ids).last_hidden_state
        assert torch.equal(copied.map.base(input_ids=ids).last_hidden_state, before)
        for layer in copied.map.layers:
            for linear in layer.target_modules.values():
                linear.weight().zero_()
        assert not torch.equal(copied.map.base(input_ids=ids).last_hidden_state, before)
        assert torch.equal(host.map.base(input_ids=ids).last_hidden_state, before)
    assert copied.map.base is copied.model
    assert (copied.tokenizer, copied.fingerprint) == (host.tokenizer, host.fingerprint)


def test_load_is_silent_and_restores_the_callers_settings(folder, capfd):
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    transformers_logging.set_verbosity_info()
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    capfd.readouterr()
    try:
        load_host(str(folder))
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        transformers_logging.set_verbosity_warning()
    out, error = capfd.readouterr()
    assert (out, error) == ("", "")
    assert transformers_logging.is_progress_bar_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_dtype_is_as_asked(folder, dtype):
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert next(load_host(str(folder), dtype=dtype).model.parameters()).dtype == expected


def test_wrap_host_leaves_the_callers_tokenizer(folder):
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.padding_side = "left"
    host = wrap_host(tiny_model("gpt2", tokenizer=tokenizer), tokenizer)
    assert host.name == "in-memory"
    assert host.tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "left")


def test_wrap_host_leaves_the_models_flags():
    model = tiny_model("bert").train()
    model.encoder.layer[0].eval()  # a mixture of modes and of flags, which must come back as it was
    next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    wrap_host(model, tiny_tokenizer("bert"))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert len(set(modes)) == len(set(flags)) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("builtin:none", "no builtin host 'none'"),
        ("./nothing/here", "no folder"),
        ("/nothing/here", "no folder"),
        ("~/nothing-here", "no folder"),
        ("some/deep/path", "no folder"),
        ("name/", "no folder"),
        ("not a hub id!", "neither a folder nor a valid hub id"),
        ("org/na--me", "neither a folder nor a valid hub id"),
        ("", "neither a folder nor a valid hub id"),
    ],
)
def test_names_that_lead_nowhere(name, words):
    with pytest.raises(HostNotFoundError, match=words) as caught:
        load_host(name)
    assert caught.value.hint


def test_file_is_no_host(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(HostNotFoundError, match="is a file"):
        load_host(str(tmp_path / "model.safetensors"))


def test_hub_id_that_is_not_cached_while_offline(tmp_path):
    with pytest.raises(HostNotFoundError, match="not in the cache") as caught:
        load_host("org/name", offline=True, cache_dir=tmp_path)
    assert "network" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "restricted"),
        ("RepositoryNotFoundError", "no model"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("HfHubHTTPError", "could not be fetched: refused"),
    ],
)
def test_errors_of_the_hub_are_typed(monkeypatch, error, words):
    kind = getattr(huggingface_hub.errors, error)

    def fail(*_args, **_kwargs):
        raised = kind.__new__(kind)
        Exception.__init__(raised, "refused\nand more")
        monkeypatch.setattr(kind, "__str__", lambda _self: "refused\nand more")
        raise raised

    monkeypatch.setattr(locate, "snapshot_download", fail)
    with pytest.raises(HostNotFoundError, match=words) as caught:
        load_host("org/name", revision="v9")
    assert caught.value.hint


def test_only_the_needed_files_are_asked_of_the_hub(monkeypatch, folder):
    asked = []

    def record(name, *, allow_patterns, **_kwargs):
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(locate, "snapshot_download", record)
    assert load_host("org/name").revision == folder.name
    assert "config.json" in asked
    assert "model.safetensors" in asked
    assert not any(name.endswith((".bin", ".py", "*")) for name in asked)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folder_that_lacks_a_part(folder, gone):
    (folder / gone).unlink()
    kind = TokenizerError if gone == "tokenizer.json" else HostError
    with pytest.raises(kind) as caught:
        load_host(str(folder))
    assert type(caught.value) is kind
    assert caught.value.hint


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": {"type": "Nothing"}}'])
def test_damaged_file(folder, damaged, content):
    (folder / damaged).write_bytes(content)
    kind = TokenizerError if damaged == "tokenizer.json" else HostError
    with pytest.raises(kind) as caught:
        load_host(str(folder))
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_truncated_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(HostError, match="cannot be loaded"):
        load_host(str(folder))


def test_pickled_weights_are_not_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(HostError, match="pickled") as caught:
        load_host(str(folder))
    assert "save_pretrained" in caught.value.hint


def test_missing_weights_are_an_error_and_never_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HostError, match=r"lacks 1 weights.*encoder\.layer\.1\.output\.dense\.weight"):
        load_host(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_layers_that_the_configuration_leaves_out_are_an_error(tmp_path, family):
    path = tmp_path / "host"
    save_tiny_host(path, family, num_hidden_layers=3)
    config = json.loads((path / "config.json").read_text())
    count = next(name for name in ("num_hidden_layers", "n_layers", "n_layer") if name in config)
    kinds = {"layer_types": config["layer_types"][:1]} if config.get("layer_types") else {}
    edit_json(path / "config.json", **{count: 1}, **kinds)
    with pytest.raises(HostError, match="does not use, the first is") as caught:
        load_host(str(path))
    assert ".1." in f".{caught.value.message}"


def test_heads_and_buffers_of_older_releases_are_not_in_the_way(folder):
    weights = load_file(folder / "model.safetensors")
    rest = {"cls.predictions.bias": torch.zeros(3), "encoder.layer.0.attention.self.inv_freq": torch.zeros(2)}
    save_file(weights | rest, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_host(str(folder)).num_hidden_layers == 2


def test_a_token_beyond_the_embeddings_is_named(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    token = max(vocabulary, key=vocabulary.get)
    vocabulary[token] = 100_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(HostError, match="has id 100000") as caught:
        load_host(str(folder))
    assert repr(token) in caught.value.message


def test_weights_of_other_shapes(folder):
    edit_json(folder / "config.json", intermediate_size=64)
    with pytest.raises(HostError, match="cannot be loaded"):
        load_host(str(folder))


def test_missing_shard_and_bad_index(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(HostError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_host(str(folder))
    for content in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', '{"weight_map": 3}'):
        index.write_text(content)
        with pytest.raises(HostError, match=r"index|file names"):
            load_host(str(folder))


def test_sharded_weights_load(folder):
    host = load_host(str(folder))
    host.model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert load_host(str(folder)).fingerprint == host.fingerprint


@pytest.mark.parametrize(
    ("model_type", "words"), [("no-such-type", "knows no model type 'no-such-type'"), (None, "names no model_type")]
)
def test_unknown_type_is_refused_before_weights_are_read(folder, model_type, words):
    (folder / "model.safetensors").write_bytes(b"damaged")
    edit_json(folder / "config.json", model_type=model_type)
    with pytest.raises(UnknownModelTypeError, match=words):
        load_host(str(folder))


def test_the_encoder_of_an_encoder_decoder_is_the_host(tmp_path):
    tokenizer = tiny_tokenizer("bert")
    config = AutoConfig.for_model(
        "t5", vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=96, num_layers=2, num_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    host = load_host(str(tmp_path), device="cpu")
    assert type(host.model).__name__ == "T5Stack"
    assert host.num_hidden_layers == 2
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.k.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HostError, match="lacks 1 weights"):
        load_host(str(tmp_path), device="cpu")


def test_flag_of_an_encoder_decoder_on_a_model_without_one(folder):
    before = load_host(str(folder))
    edit_json(folder / "config.json", is_encoder_decoder=True)
    host = load_host(str(folder))
    assert [layer.target_modules.keys() for layer in host.map.layers] == [
        layer.target_modules.keys() for layer in before.map.layers
    ]


def test_tokenizer_larger_than_the_embedding():
    tokenizer = tiny_tokenizer("bert")
    model = tiny_model("bert", tokenizer=tokenizer)
    tokenizer.add_tokens([f"new{index}" for index in range(4)])
    with pytest.raises(HostError, match="embeddings"):
        wrap_host(model, tokenizer)


def test_slow_tokenizer_and_one_without_special_tokens():
    tokenizer = copy.deepcopy(tiny_tokenizer("gpt2"))
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.unk_token = None
    with pytest.raises(TokenizerError, match="no padding"):
        wrap_host(tiny_model("gpt2"), tokenizer)

    class Slow:
        is_fast = False

    with pytest.raises(TokenizerError, match="not fast"):
        wrap_host(tiny_model("gpt2"), Slow())


def test_unusable_device_and_dtype(folder):
    with pytest.raises(UsageError, match="Device 'toaster'"):
        load_host(str(folder), device="toaster")
    with pytest.raises(UsageError, match="float64"):
        load_host(str(folder), dtype="float64")


def make_cache(root: Path, folder: Path, revisions: dict[str, str]) -> None:
    """The hub's own layout: blobs, and snapshots of links to them, named by commit."""
    repository = root / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    for ref, commit in revisions.items():
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = repository / "blobs" / f"{commit[:8]}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))


@pytest.mark.integration
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_hub_cache_serves_offline(tmp_path, folder, variable):
    commits = {"main": "a" * 40, "v1": "b" * 40}
    root = tmp_path / "cache"
    make_cache(root / "hub" if variable == "HF_HOME" else root, folder, commits)
    script = (
        "from uhl_cli.errors import HostNotFoundError\n"
        "from uhl_cli.host.checkpoint import load_host\n"
        "for revision in (None, 'v1', 'b' * 40):\n"
        "    host = load_host('org/name', revision=revision)\n"
        "    print(host.revision, host.fingerprint.digest)\n"
        "for arguments in (dict(name='org/name', revision='v2'), dict(name='org/other')):\n"
        "    try:\n"
        "        load_host(**arguments)\n"
        "    except HostNotFoundError as error:\n"
        "        print(type(error).__name__)\n"
    )
    dropped = ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {variable: str(root), "HF_HUB_OFFLINE": "1"}
    root_of_package = str(Path(locate.__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root_of_package, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    digest = load_host(str(folder)).fingerprint.digest
    assert result.stdout.splitlines() == [
        f"{'a' * 40} {digest}",
        f"{'b' * 40} {digest}",
        f"{'b' * 40} {digest}",
        "HostNotFoundError",
        "HostNotFoundError",
    ]


def test_partly_cached_model_names_what_is_missing(tmp_path, folder):
    (folder / "model.safetensors").unlink()
    make_cache(tmp_path / "cache", folder, {"main": "c" * 40})
    with pytest.raises(HostError, match=r"model\.safetensors is missing"):
        load_host("org/name", offline=True, cache_dir=tmp_path / "cache")
