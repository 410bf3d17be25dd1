"""The keys of language models in Hugging Face's config.json: their meaning, and what it means where they are absent.

Source: transformers 5.23 (models/llama, mistral, qwen2, qwen3, gemma2, gemma3, mixtral, qwen2_moe, qwen3_moe, olmoe).
"""

from __future__ import annotations

from typing import Any

from . import causal_lm_moe

# Hugging Face's key -> ours, where the value means the same.
SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "mlp_bias": "mlp_bias",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
UNDERSTOOD = {
    *SAME,
    *("model_type", "hidden_act", "hidden_activation", "attention_bias", "query_pre_attn_scalar"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern"),
    *("_sliding_window_pattern", "quantization", "quantization_config"),
}
# What makes no difference to the answers of a loaded model.
HARMLESS = {
    *("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
    *("pretraining_tp", "cache_implementation", "transformers.js_config", "is_llama_config", "unsloth_fixed"),
    *("unsloth_version", "hidden_dropout", "attn_implementation", "_attn_implementation_autoset", "return_dict"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "task"),
    *(
        "torchscript",
        "finetuning_task",
        "keys_to_ignore_at_inference",
        "max_length",
        "min_length",
        "_from_model_config",
    ),
}
# Keys of which we understand one value.
ONLY: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
    "use_qk_norm": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}
SOFTCAPS = {"attn_logit_softcapping": ("gemma2",), "final_logit_softcapping": ("gemma2", "gemma3_text")}
_GEMMA = {"norm_plus_one": True, "sandwich_norms": True}
TYPES: dict[str, dict[str, Any]] = {  # model_type -> what it means by itself
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": ("q", "k", "v")},
    "qwen3": {"qk_norm": True},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "qk_norm": True},
    **{kind: {} for kind in causal_lm_moe.KEYS},
}
MODEL_TYPES = tuple(TYPES)
ONE_WINDOW = ("mistral", "mixtral", "qwen3_moe", "olmoe")  # or none, in all layers
# What keys mean that are absent, in transformers 5.23, where that is neither null nor false: it does not write them.
_ANY = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096}
_QWEN = {**_ANY, "hidden_act": "silu", "num_key_value_heads": 32, "max_position_embeddings": 32768}
_GEMMAS = {
    **_ANY,
    **{"hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "head_dim": 256},
    **{"query_pre_attn_scalar": 256, "tie_word_embeddings": True},
}
ABSENT: dict[str, dict[str, Any]] = {
    "llama": {**_ANY, "hidden_act": "silu", "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {**_ANY, "hidden_act": "silu", "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {**_QWEN, "max_window_layers": 28},
    "qwen3": {**_QWEN, "max_window_layers": 28, "head_dim": 128},
    "gemma2": {
        **_GEMMAS,
        **{"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    },
    "gemma3_text": {
        **_GEMMAS,
        **{"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        "sliding_window_pattern": 6,
    },
    "mixtral": {
        **{**_ANY, "hidden_act": "silu", "num_key_value_heads": 8, "max_position_embeddings": 131072},
        **{"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, **causal_lm_moe.ABSENT["mixtral"]},
    },
    "qwen2_moe": {**_QWEN, "num_key_value_heads": 16, "max_window_layers": 28, **causal_lm_moe.ABSENT["qwen2_moe"]},
    "qwen3_moe": {**_QWEN, "num_key_value_heads": 4, **causal_lm_moe.ABSENT["qwen3_moe"]},
    "olmoe": {
        **{**_ANY, "hidden_act": "silu", "max_position_embeddings": 4096},
        **{"rms_norm_eps": 1e-5, "sliding_window": None, **causal_lm_moe.ABSENT["olmoe"]},
    },
}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MOST_LAYERS = 1000
