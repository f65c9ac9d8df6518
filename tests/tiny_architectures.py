"""Tiny random models of every text architecture of the installed transformers, made in memory.

A model's configuration is its type's default with every size that it has made small.  Types that need more than that
are listed in `SETTINGS`; `VARIANTS` are the same types in other shapes.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_hosts import tiny_tokenizer
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS, INNER, POSITIONS = 64, 4, 4, 2, 160, 256
MOST_PARAMETERS = 20_000_000

_NAMES_OF_SIZES: dict[int, str] = {
    WIDTH: "hidden_size d_model n_embd dim emb_dim model_dim",
    INNER: "intermediate_size hidden_dim d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner ffn_hidden_size n_inner "
    "block_ff_dim",
    POSITIONS: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length",
    32: "embedding_size sliding_window",
    24: "q_lora_rank",
    20: "kv_lora_rank",
    16: "head_dim d_kv d_head kv_channels attention_window chunk_size mamba_chunk_size mamba_head_dim "
    "linear_key_head_dim linear_value_head_dim",
    12: "v_head_dim",
    8: "rotary_dim state_size ssm_state_size mamba_d_state qk_nope_head_dim qk_rope_head_dim",
    LAYERS: "num_hidden_layers n_layers n_layer num_layers encoder_layers num_encoder_layers "
    # heads and experts, as many
    "num_attention_heads n_heads n_head num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_key_heads linear_num_value_heads "
    "mamba_num_heads",
    48: "moe_intermediate_size expert_ffn_hidden_size",
    56: "shared_expert_intermediate_size",
    KEY_VALUE_HEADS: "num_key_value_heads num_kv_heads multi_query_group_num decoder_layers num_decoder_layers "
    "num_experts_per_tok moe_k",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace",
}
SIZES = {name: size for size, names in _NAMES_OF_SIZES.items() for name in names.split()}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_TURNS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_ROPE_OF_IMAGES = _ROPE | {"mrope_section": [2, 3, 3]}
_LINEAR_TURNS = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    "linear_head_dim": 16,
    "linear_num_heads": HEADS,
}
# What a type needs beside small sizes; None leaves a setting at its default.
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _LINEAR_TURNS,
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "canine": {"num_hash_buckets": 64, "num_hash_functions": 4, "downsampling_rate": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "convbert": {"head_ratio": 2, "num_groups": 1, "embedding_size": WIDTH},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
    },
    "esm": {"position_embedding_type": "rotary", "is_folding_model": False},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": False, "alibi": False},
    "fnet": {"use_tpu_fourier_optimizations": False},
    "funnel": {"block_sizes": [2, 2], "block_repeats": [1, 1], "num_hidden_layers": None, "num_decoder_layers": 1}
    | {"architectures": ["FunnelModel"]},
    "gemma3n_text": _TURNS
    | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2}
    | {"activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": _TURNS | {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0},
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": _LINEAR_TURNS
    | {"layer_types": ["linear_attention", "indexed_attention"] * 2, "qk_rope_head_dim": 0, "head_dim": None},
    "glm_image_text": {"rope_parameters": _ROPE_OF_IMAGES},
    "glm_ocr_text": {"rope_parameters": _ROPE_OF_IMAGES},
    "glm4v_text": {"rope_parameters": _ROPE_OF_IMAGES | {"partial_rotary_factor": 1.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": _MAMBA | {"layer_types": ["attention", "mamba"] * 2, "shared_intermediate_size": INNER},
    "hunyuan_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "ibert": {"quant_mode": False},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2}
    | {"use_mamba_kernels": False, "mamba_dt_rank": 4},
    "led": {"attention_window": [16] * LAYERS},
    "kimi_linear": _LINEAR_TURNS,
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 11, "shape_size": 10},
    "lfm2": _CONVOLUTIONS | {"full_attn_idxs": None, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": _CONVOLUTIONS | {"num_dense_layers": 1},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 96},
    "llama4_text": {"intermediate_size_mlp": INNER, "intermediate_size": 48, "interleave_moe_layer_step": 2},
    "longcat_flash": {"num_layers": 2, "num_key_value_heads": 4, "head_dim": 8, "zero_expert_num": 2, "moe_topk": 2},
    "longformer": {"attention_window": [16] * LAYERS},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 32},
    "modernbert-decoder": {"global_attn_every_n_layers": 2, "local_attention": 32},
    "mpt": {"attn_config": {"attn_type": "multihead_attention"}, "expansion_ratio": 3},
    "nemotron_h": {"n_groups": 1},
    "nystromformer": {"segment_means_seq_len": WIDTH, "num_landmarks": WIDTH},
    "opt": {"word_embed_proj_dim": WIDTH},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen2_5_vl_text": {"rope_parameters": _ROPE_OF_IMAGES},
    "qwen2_vl_text": {"rope_parameters": _ROPE_OF_IMAGES},
    "recurrent_gemma": {"lru_width": WIDTH},
    "reformer": {"attn_layers": ["local"] * 2, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]}
    | {"is_decoder": False, "attention_head_size": 16, "feed_forward_size": INNER},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "rwkv": {"attention_hidden_size": WIDTH},
    "squeezebert": {"embedding_size": WIDTH},
    "xlnet": {"ff_activation": "gelu"},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
_RELATIVE = {"relative_attention": True, "position_biased_input": False, "type_vocab_size": 0}
_WINDOW = {"sliding_window": 3}
# The same type in another shape: (type, settings on top of the type's own).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert_groups": ("albert", {"num_hidden_groups": 2}),
    "bert_cross": ("bert", {"is_decoder": True, "add_cross_attention": True}),
    "bert_is_decoder": ("bert", {"is_decoder": True}),
    "big_bird_sparse": ("big_bird", {"attention_type": "block_sparse", "block_size": 8, "num_random_blocks": 2}),
    "deberta-v2_full": (
        "deberta-v2",
        _RELATIVE
        | {"pos_att_type": ["p2c", "c2p"], "position_buckets": 32, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "deberta_full": ("deberta", _RELATIVE | {"pos_att_type": ["c2p", "p2c"], "max_relative_positions": -1}),
    "distilbert_sinus": ("distilbert", {"sinusoidal_pos_embds": True}),
    "electra_same_width": ("electra", {"embedding_size": WIDTH}),
    "esm_abs": ("esm", {"position_embedding_type": "absolute", "token_dropout": True}),
    "falcon_alibi_seq": ("falcon", {"parallel_attn": False, "alibi": True}),
    "falcon_mq": ("falcon", {"multi_query": True, "parallel_attn": True, "num_kv_heads": 1}),
    "falcon_new": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "multi_query": True}),
    "gpt2_cross": ("gpt2", {"add_cross_attention": True}),
    "gpt2_inverse": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_bigcode_mh": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox_seq": ("gpt_neox", {"use_parallel_residual": False}),
    "llama_bias_headdim": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}),
    "llama_rope_yarn": (
        "llama",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}
            | {"original_max_position_embeddings": 64}
        },
    ),
    "mistral_window3": ("mistral", _WINDOW),
    "opt_post": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "qwen2_moe_all": ("qwen2_moe", {"decoder_sparse_step": 1}),
    "qwen2_window": ("qwen2", _WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    "stablelm_par": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "t5_gated": ("t5", {"feed_forward_proj": "gated-gelu"}),
    "xlm_causal": ("xlm", {"causal": True}),
}


class NoTextModelError(Exception):
    """The type has no model that maps token ids alone to states, or none that is small."""

    def __init__(self, reason: str | Exception) -> None:
        known = isinstance(reason, str)
        super().__init__(reason if known else " ".join(f"{type(reason).__name__}: {reason}".split())[:200])


# What configurations and models raise that refuse their arguments.
_REFUSALS = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def all_names() -> list[str]:
    """Types with a base model and a vocabulary, in the library's order, then the variants.

    Some of them take images or sound: `tiny_architecture` makes no model of those.
    """
    return [*(name for name in MODEL_MAPPING_NAMES if _vocabulary(_fields(CONFIG_MAPPING[name]))), *VARIANTS]


@lru_cache
def architecture_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all of them."""
    tokenizer = tiny_tokenizer("bert")
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def tiny_architecture(name: str) -> nn.Module:
    """A random base model in eval mode, of a type or a variant; equal names give equal weights.

    :raises NoTextModelError: There is none.
    """
    model_type, settings = VARIANTS.get(name, (name, {}))
    config = _config(model_type, SETTINGS.get(model_type, {}) | settings)
    try:
        with torch.device("meta"):
            size = sum(value.numel() for value in AutoModel.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NoTextModelError(f"{size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = AutoModel.from_config(config).eval()
    except _REFUSALS as error:
        raise NoTextModelError(error) from error
    _randomise(model)
    _refuse_other(model)
    return model


def _fields(config_class: type) -> set[str]:
    names = set(getattr(config_class, "attribute_map", {}))
    for base in config_class.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        if base is not object:
            names |= set(inspect.signature(base.__init__).parameters)
    return names


def _vocabulary(fields: set[str]) -> str | None:
    """The field with the number of tokens."""
    return next((name for name in ("vocab_size", "n_words") if name in fields), None)


def _config(model_type: str, settings: dict[str, Any]) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    fields = _fields(config_class)
    vocabulary = _vocabulary(fields)
    if vocabulary is None:
        raise NoTextModelError("no vocabulary")
    sizes = {name: size for name, size in SIZES.items() if name in fields}
    for alias, name in getattr(config_class, "attribute_map", {}).items():
        if name in sizes:
            sizes.pop(alias, None)
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = HEADS
    tokenizer = architecture_tokenizer()
    rows = len(tokenizer) + 5
    tokens = {vocabulary: rows, "vocab_size_per_layer_input": rows, "decoder_start_token_id": tokenizer.pad_token_id}
    tokens |= {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")
    }
    tokens |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    given = sizes | {name: token for name, token in tokens.items() if name in fields} | settings
    given = {name: value for name, value in given.items() if value is not None}
    while True:
        try:
            return config_class(**given)
        except _REFUSALS as error:
            # A size that does not fit the type: its default stays.
            refused = [name for name in given if name in str(error) and name not in settings]
            if not refused:
                raise NoTextModelError(error) from error
            given = {name: value for name, value in given.items() if name not in refused}


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Every parameter matters: matrices of deviation 0.1, gains near 1, biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(model.named_parameters()):
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.dim() > 1:
            value.copy_(0.1 * noise)
        else:
            value.add_((0.1 if name.endswith("weight") else 0.05) * noise)


@torch.no_grad()
def _refuse_other(model: nn.Module) -> None:
    """Check that the model, or its encoder, maps token ids to a state of each token.

    :raises NoTextModelError: It does not.
    """
    base: Any = model
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        base = model.get_encoder()
    ids = torch.tensor([[2, 40, 55, 60, 71, 33, 3]])
    try:
        state = base(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    except _REFUSALS as error:
        raise NoTextModelError(error) from error
    if state.dim() != 3 or state.shape[:2] != ids.shape:
        raise NoTextModelError(f"its output is {tuple(state.shape)}")
