"""Checkpoints as people have them load as the plain one does, or end in one line that says what to do."""

import json
import shutil
import warnings

import pytest
import torch
from tiny_hosts import save_tiny_host, tiny_host, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertModel

from uhl_cli.errors import HostError, HostMapError, UhlWarning, UsageError
from uhl_cli.host.checkpoint import load_host, wrap_host

CODE = """
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own-bert"

class OwnModel(BertModel):
    config_class = OwnConfig
"""
BARE_CODE = """
from transformers import BertModel, PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own-bert"

class OwnModel(BertModel):
    config_class = OwnConfig
"""
GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
MAP = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}


@pytest.fixture
def folder(tmp_path):
    return save_tiny_host(tmp_path / "host", "bert")


def edit_json(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def refused(folder, **how):
    """The one error of loading a folder; its message and hint are one line each."""
    with pytest.raises(HostError) as caught:
        load_host(str(folder), device="cpu", **how)
    assert caught.value.hint
    return str(caught.value)


def loaded(folder, **how):
    """The host in a folder, which is the plain tiny one, without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UhlWarning)
        host = load_host(str(folder), device="cpu", **how)
    assert host.fingerprint.digest == tiny_host("bert").fingerprint.digest
    return host


class Unpickled:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (type(self.mark).touch, (self.mark,))


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["..", "x"], ["/etc/x.safetensors"], ["../x.safetensors"]])
def test_an_index_names_safetensors_in_the_folder_alone(folder, tmp_path, names):
    mark = tmp_path / "unpickled"
    torch.save({"a": Unpickled(mark)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {str(place): name for place, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(folder)
    assert not mark.exists()
    assert ("can run code" in said and "save_pretrained" in said) or "not plain file names" in said


def test_weights_that_the_configuration_names_are_not_looked_for(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    assert "Rename the file to model.safetensors" in refused(folder)


def test_a_stale_index_beside_good_weights_is_not_read(folder):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded(folder)
    (folder / "model.safetensors").unlink()
    assert "model-00001-of-00002.safetensors is missing" in refused(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("attention", ["flash_attention_2", "someone/kernel:attention", "flex_attention"])
def test_attention_is_torchs_own(folder, monkeypatch, key, attention):
    edit_json(folder / "config.json", **{key: attention})
    with pytest.warns(UhlWarning, match=f"attention '{attention}'"):
        host = load_host(str(folder), device="cpu")
    assert host.model.config._attn_implementation in ("sdpa", "eager")
    assert host.fingerprint == tiny_host("bert").fingerprint


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_torch_stays(folder, attention):
    edit_json(folder / "config.json", attn_implementation=attention)
    loaded(folder)


@pytest.mark.parametrize("code", [CODE, BARE_CODE])
def test_code_of_the_checkpoint_runs_when_it_is_trusted(folder, code):
    (folder / "own.py").write_text(code)
    edit_json(folder / "config.json", model_type="own-bert", auto_map=MAP)
    assert "Add --trust-remote-code" in refused(folder)
    if code is BARE_CODE:  # a configuration that says less than BERT's
        edit_json(folder / "config.json", **BertConfig(**json.loads((folder / "config.json").read_text())).to_dict())
        edit_json(folder / "config.json", model_type="own-bert", auto_map=MAP)
    host = load_host(str(folder), device="cpu", trust_remote_code=True)
    assert type(host.model).__name__ == "OwnModel"
    assert [layer.name for layer in host.map.layers] == ["encoder.layer.0", "encoder.layer.1"]
    ids = torch.arange(5, 13).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(host.model(ids)[0], tiny_host("bert").model(ids)[0])


def test_code_of_the_checkpoint_that_is_not_run_is_said(folder):
    (folder / "own.py").write_text(CODE)
    edit_json(folder / "config.json", auto_map=MAP)
    with pytest.warns(UhlWarning, match="code of its own .*which is not run.*--trust-remote-code"):
        host = load_host(str(folder), device="cpu")
    assert type(host.model) is BertModel


@pytest.mark.parametrize("code", ["import no_such_module", "x = (", CODE.replace("OwnModel", "Other")])
def test_broken_code_is_an_error_of_ours(folder, code):
    (folder / "own.py").write_text(code)
    edit_json(folder / "config.json", model_type="own-bert", auto_map=MAP)
    refused(folder, trust_remote_code=True)


class Own(BertConfig):
    model_type = "own-in-memory"


class OwnBert(BertModel):
    config_class = Own


def test_a_class_in_memory_is_a_host():
    tokenizer = tiny_tokenizer("bert")
    plain = tiny_model("bert", tokenizer=tokenizer)
    model = OwnBert(Own(**{**plain.config.to_dict(), "model_type": "own-in-memory"}))
    model.load_state_dict(plain.state_dict())
    host = wrap_host(model, tokenizer)
    assert [layer.name for layer in host.map.layers] == ["encoder.layer.0", "encoder.layer.1"]
    assert host.fingerprint.digest == tiny_host("bert").fingerprint.digest


def test_a_peft_folder_is_said_to_be_one(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    (adapter / "adapter_config.json").write_text(content)
    said = refused(adapter)
    assert "a PEFT adapter of org/base" in said
    assert "merge_and_unload" in said
    (folder / "adapter_config.json").write_text(content)
    assert "unclear which is meant" in refused(folder)


def test_folders_near_the_checkpoint(folder, tmp_path):
    root = tmp_path / "sentence"
    shutil.copytree(folder, root / "0_Transformer")
    assert f"pass {root / '0_Transformer'}" in refused(root)
    cache = tmp_path / "models--org--name"
    shutil.copytree(folder, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    assert "pass org/name" in refused(cache)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "save_pretrained" in refused(empty)


def test_a_configuration_without_a_type(folder):
    content = json.loads((folder / "config.json").read_text())
    content.pop("model_type")
    (folder / "config.json").write_text(json.dumps(content))
    assert 'such as "model_type": "bert"' in refused(folder)


def test_weights_of_another_shape_are_named(folder):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit_json(folder / "config.json", vocab_size=rows + 7)
    said = refused(folder)
    assert f"'embeddings.word_embeddings.weight' with [{rows}, 32] in place of [{rows + 7}, 32]" in said
    assert "vocab_size" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_here(folder):
    with pytest.raises(UsageError, match="Device 'cuda' cannot be used here: ") as caught:
        load_host(str(folder), device="cuda")
    assert "--device cpu" in caught.value.hint
    assert "cuda" not in caught.value.hint


@pytest.mark.parametrize(
    "content", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "fp8"}, {"bits": 4}, [1], "x"]
)
def test_quantised_weights_that_cannot_be_read_are_refused_before_they_are_loaded(folder, content):
    (folder / "model.safetensors").write_bytes(b"damaged")
    edit_json(folder / "config.json", quantization_config=content)
    said = refused(folder)
    assert "only torchao's are read" in said or "cannot be read" in said


def test_a_torchao_checkpoint_loads_or_names_the_library(folder):
    try:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import AutoModel, TorchAoConfig

        model = AutoModel.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
        model.save_pretrained(folder)
    except ImportError:
        edit_json(folder / "config.json", quantization_config={"quant_method": "torchao", "quant_type": "int8"})
        assert "torchao" in refused(folder)
        return
    ids = torch.arange(5, 13).unsqueeze(0)
    with torch.inference_mode():
        wanted = tiny_host("bert").model(ids)[0]
        found = load_host(str(folder), device="cpu").model(ids)[0]
    assert 0 < (found - wanted).norm() < 0.2 * wanted.norm()


def test_a_model_that_does_not_run_is_an_error_of_ours():
    model = tiny_model("bert")
    model.encoder.layer[1].to(torch.float64)
    with pytest.raises(HostMapError, match="does not run on token ids: ") as caught:
        wrap_host(model, tiny_tokenizer("bert"))
    assert "dtype" in caught.value.hint


def test_a_gguf_file_is_read_or_names_the_package(tmp_path):
    """A Llama in GGUF's own names and order of rotary rows gives the states of the model that it was made from."""
    path = tmp_path / "model.gguf"
    try:
        import gguf
    except ImportError:
        path.write_bytes(b"GGUF")
        assert "pip install gguf" in refused(path)
        assert "pip install gguf" in refused(tmp_path)
        return
    tokenizer = tiny_tokenizer("llama")
    model = tiny_model("llama", tokenizer=tokenizer)
    config, content = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    special = {token["content"] for token in content["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens.append("<|endoftext|>")  # transformers adds it to every tokenizer of this kind
    tokens += [f"<spare{index}>" for index in range(config.vocab_size - len(tokens))]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    )
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        rows, kind = value.numpy().copy(), name.split(".")[-2]
        if kind in heads:
            halves = rows.reshape(heads[kind], 2, -1, rows.shape[1])
            rows = halves.swapaxes(1, 2).reshape(rows.shape)
        layer = f"blk.{name.split('.')[1]}." if name.startswith("layers.") else ""
        writer.add_tensor(f"{layer}{GGUF_NAMES[kind]}.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.arange(5, 13).unsqueeze(0)
    for name in (path, tmp_path):
        host = load_host(str(name), device="cpu")
        with torch.inference_mode():
            assert torch.allclose(host.model(ids)[0], model(ids)[0], atol=1e-5)
        read = host.tokenizer("The film is warm.", add_special_tokens=False)["input_ids"]
        assert read == tokenizer("The film is warm.", add_special_tokens=False)["input_ids"]
    shutil.copy(path, tmp_path / "second.gguf")
    assert "2 GGUF files" in refused(tmp_path)
