"""A decoder-only language model: Llama, Mistral, Qwen2, Qwen3, SmolLM2, Gemma 3 (text) and, as mixtures of experts,
Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE, by configuration.

Sources: the architectures as Hugging Face's transformers has them, whose names the weights keep (only o_proj is
out_proj here). Axes: B batch, L tokens, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ...nn.attention.layer import Attention
from ...nn.cache import CacheMaker, CacheOptions, KVCache
from ...nn.checks import check_last, check_tokens
from ...nn.layers import Embedding, GatedFeedForward, RMSNorm
from ...nn.linear import Linear
from ...nn.moe import MoE, Routing
from ...nn.transformer import auxiliary_loss, last_positions, run_layers
from .config import DTYPES, CausalLMConfig, Quantization

__all__ = ["DTYPES", "CausalLM", "CausalLMConfig", "Quantization", "auxiliary_loss", "quantize"]


class Block(nn.Module):
    """Attention, then a gated feed-forward network or a mixture, each on a norm of its own (and, with sandwich norms,
    through another) and added to what came in."""

    def __init__(self, config: CausalLMConfig, index: int):
        super().__init__()
        E, norm = config.embed_dim, lambda dims: RMSNorm(dims, config.norm_eps, plus_one=config.norm_plus_one)
        self.self_attn = Attention(
            E,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            qk_norm="rms_whole" if config.qk_norm == "whole" else "rms" if config.qk_norm else None,
            norm_eps=config.norm_eps,
            rotary=config.rotary(index),
            causal=True,
            window=config.layer_window(index),
            softcap=config.attention_softcap,
            scale=config.attention_scale,
        )
        if config.qk_norm and config.norm_plus_one:
            self.self_attn.q_norm, self.self_attn.k_norm = norm(config.head_dim), norm(config.head_dim)
        self.mlp: nn.Module
        if config.moe is not None and config.has_mixture(index):
            self.mlp = MoE(config.moe)
        else:
            self.mlp = GatedFeedForward(E, config.hidden_dim, config.activation, bias=config.mlp_bias)
        self.input_layernorm, self.post_attention_layernorm = norm(E), norm(E)
        self.sandwich = config.sandwich_norms
        if self.sandwich:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(E), norm(E)

    def __call__(self, x: mx.array, cache: KVCache | None = None, routings: list[Routing] | None = None) -> mx.array:
        """x (B, L, E) -> the same; `cache` has what came before, `routings` gets where a mixture's tokens went."""
        y = self["self_attn"](self["input_layernorm"](x), cache=cache)
        if not self.sandwich:
            x = x + y
            return x + self._feed(self["post_attention_layernorm"](x), routings)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self._feed(self.pre_feedforward_layernorm(x), routings))

    def _feed(self, x: mx.array, routings: list[Routing] | None) -> mx.array:
        y = self["mlp"](x)
        if not isinstance(self["mlp"], MoE):
            return y
        if routings is not None:
            routings.append(y[1])
        return y[0]


class Layers(nn.Module):
    """The embeddings' table, the blocks and the norm at the end."""

    def __init__(self, config: CausalLMConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.embed_dim)
        self.layers = [Block(config, index) for index in range(config.num_layers)]
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, plus_one=config.norm_plus_one)

    def __call__(
        self, x: mx.array, caches: Sequence[KVCache] | None = None, routings: list[Routing] | None = None
    ) -> mx.array:
        """Embedded tokens (B, L, E) through the blocks, not yet normed."""
        return run_layers(self["layers"], x, caches=caches, routings=routings)


class CausalLM(CacheMaker, nn.Module):
    """Tokens to the logits of the tokens after them."""

    def __init__(self, config: CausalLMConfig):
        super().__init__()
        self.config = config
        self.model = Layers(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.embed_dim, config.vocab_size, bias=False)
        if config.quantization is not None:
            quantize(self, config.quantization)

    def __call__(
        self,
        tokens: mx.array,
        *,
        caches: Sequence[KVCache] | None = None,
        last: int | None = None,
        routings: list[Routing] | None = None,
        check: bool = True,
    ) -> mx.array:
        """Computes the logits of the token after each.

        Args:
            tokens: (B, L), from 0 to vocab_size - 1.
            caches: One for each layer. They hold the tokens before these, and these are appended.
            last: Of how many of the last positions to compute the logits; by default of all.
            routings: A list that gets the Routing of every mixture, in the order of the layers.
            check: Whether to refuse tokens outside the vocabulary, for which the call waits until the tokens are
                computed. A loop that feeds a model its own tokens, as generate() does, goes without.

        Returns:
            Logits (B, L, V), or (B, last, V).

        Raises:
            ValueError: An argument does not fit, or a token is outside the vocabulary.
        """
        check_tokens("tokens", tokens, self.config.vocab_size if check else None)
        check_last(last)
        x = self.model(self.embed(tokens), caches, routings)
        return self.logits(last_positions(x, last))

    def embed(self, tokens: mx.array) -> mx.array:
        """Tokens (B, L), which are not checked -> (B, L, E)."""
        x = self.model.embed_tokens(tokens)
        return x if self.config.embed_scale is None else x * self.config.embed_scale

    def logits(self, x: mx.array) -> mx.array:
        """What the last block gives, (B, L, E) -> (B, L, V)."""
        x = self.model.norm(x)
        y = self.model.embed_tokens.as_linear(x) if self.config.tie_embeddings else self.lm_head(x)
        cap = self.config.logit_softcap
        return y if cap is None else mx.tanh(y / cap) * cap

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches()."""
        windows = map(self.config.layer_window, range(self.config.num_layers))
        return [KVCache.from_options(options.within(window)) for window in windows]


def quantize(model: nn.Module, quantization: Quantization) -> None:
    """Makes quantized layers of the matrices. ValueError for rows that the groups do not divide."""

    def choice(name: str, module: nn.Module) -> bool | dict[str, int]:
        pair = quantization.of(name) if hasattr(module, "to_quantized") else None
        if pair is None:
            return False
        bits, group_size = pair
        if module.weight.shape[-1] % group_size:
            raise ValueError(f"group_size must divide the rows of {name}, {module.weight.shape[-1]}, got {group_size}")
        return {"bits": bits, "group_size": group_size}

    nn.quantize(model, class_predicate=choice)
