"""Models put together from PyTorch's own layers: those of llm_prep under its names, and Vaswani's Transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def positions(length: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(length, width): pairs of channels hold the sine and the cosine of p / 10000^(2 i / width)."""
    place = torch.arange(length, dtype=torch.float64)[:, None]
    rate = 10000.0 ** (-2 * torch.arange((width + 1) // 2, dtype=torch.float64) / width)
    pairs = torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1)
    return pairs.flatten(1)[:, :width].to(like.dtype)


class Heads(nn.Module):
    """Projections around scaled_dot_product_attention, with as many key/value heads as are given."""

    def __init__(self, embed_dim: int, heads: int, kv_heads: int):
        super().__init__()
        width = embed_dim // heads
        self.heads, self.kv_heads = heads, kv_heads
        self.q_proj, self.out_proj = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.k_proj, self.v_proj = (nn.Linear(embed_dim, kv_heads * width) for _ in "kv")

    def forward(self, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            projection(y).unflatten(-1, (count, -1)).transpose(1, 2)
            for projection, y, count in (
                (self.q_proj, x, self.heads),
                (self.k_proj, source, self.kv_heads),
                (self.v_proj, source, self.kv_heads),
            )
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    """Two products with ReLU between them."""

    def __init__(self, embed_dim: int, hidden: int):
        super().__init__()
        self.layer_1, self.layer_2 = nn.Linear(embed_dim, hidden), nn.Linear(hidden, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer_2(F.relu(self.layer_1(x)))


class EncoderLayer(nn.Module):
    """Post-norm."""

    def __init__(self, embed_dim: int, heads: int, kv_heads: int, hidden: int):
        super().__init__()
        self.attn, self.ffn = Heads(embed_dim, heads, kv_heads), Feed(embed_dim, hidden)
        self.norm_1, self.norm_2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.norm_1(x + self.attn(x, x, mask))
        return self.norm_2(x + self.ffn(x))


class DecoderLayer(nn.Module):
    """Post-norm."""

    def __init__(self, embed_dim: int, heads: int, kv_heads: int, hidden: int):
        super().__init__()
        self.self_attention = Heads(embed_dim, heads, kv_heads)
        self.cross_attention = Heads(embed_dim, heads, kv_heads)
        self.ffn = Feed(embed_dim, hidden)
        self.layer_norm_1, self.layer_norm_2, self.layer_norm_3 = (nn.LayerNorm(embed_dim) for _ in range(3))

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, memory_mask: torch.Tensor | None
    ) -> torch.Tensor:
        x = self.layer_norm_1(x + self.self_attention(x, x, mask))
        x = self.layer_norm_2(x + self.cross_attention(x, memory, memory_mask))
        return self.layer_norm_3(x + self.ffn(x))


class Sequence(nn.Module):
    """A pooled regression, or with `causal` what follows each position; window: how many positions it sees."""

    def __init__(
        self, input_dim: int, output_dim: int, num_layers: int, causal: bool, window: int | None, **sizes: int
    ):
        super().__init__()
        self.causal, self.window = causal, window
        self.input_proj = nn.Linear(input_dim, sizes["embed_dim"])
        self.layers = nn.ModuleList(EncoderLayer(**sizes) for _ in range(num_layers))
        self.out_proj = nn.Linear(sizes["embed_dim"], output_dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.input_proj(x)
        y = y + positions(*y.shape[1:], y)
        L = x.shape[1]
        seen = None if mask is None else mask[:, None, None]
        if self.causal:
            ahead = torch.arange(L)[:, None] - torch.arange(L)
            seen = (ahead >= 0) & (ahead < (self.window or L))
        for layer in self.layers:
            y = layer(y, seen)
        if self.causal:
            return self.out_proj(y)
        if mask is None:
            return self.out_proj(y.mean(dim=1))
        weights = mask.to(y.dtype)
        return self.out_proj((y * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True))


class Pair(nn.Module):
    """An encoder and a causal decoder of continuous vectors."""

    def __init__(self, input_dim: int, output_dim: int, num_layers: int, num_decoder_layers: int, **sizes: int):
        super().__init__()
        self.encoder_input_proj, self.decoder_input_proj = (nn.Linear(input_dim, sizes["embed_dim"]) for _ in "ed")
        self.encoder_layers = nn.ModuleList(EncoderLayer(**sizes) for _ in range(num_layers))
        self.decoder_layers = nn.ModuleList(DecoderLayer(**sizes) for _ in range(num_decoder_layers))
        self.out_proj = nn.Linear(sizes["embed_dim"], output_dim)

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, source_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x, y = self.encoder_input_proj(source), self.decoder_input_proj(target)
        x, y = x + positions(*x.shape[1:], x), y + positions(*y.shape[1:], y)
        seen = None if source_mask is None else source_mask[:, None, None]
        L = target.shape[1]
        for layer in self.encoder_layers:
            x = layer(x, seen)
        for layer in self.decoder_layers:
            y = layer(y, x, torch.ones(L, L, dtype=torch.bool).tril(), seen)
        return self.out_proj(y)


class Vaswani(nn.Module):
    """nn.Transformer without norms after its stacks, between embeddings times sqrt(E) and the same table as a head."""

    def __init__(self, vocab_size: int, embed_dim: int, num_heads: int, layers: tuple[int, int], hidden: int):
        super().__init__()
        given: dict[str, Any] = {"dim_feedforward": hidden, "dropout": 0.0, "batch_first": True}
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(embed_dim, num_heads, **given), layers[0], enable_nested_tensor=False
        )
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(embed_dim, num_heads, **given), layers[1])
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.transformer = nn.Transformer(
            embed_dim, num_heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True
        )
        for layer in [*encoder.layers, *decoder.layers]:  # which are copies of one
            for parameter in layer.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * math.sqrt(self.embed.embedding_dim)
        return x + positions(*x.shape[1:], x)

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, source_padding: torch.Tensor, target_padding: torch.Tensor
    ) -> torch.Tensor:
        L = target.shape[1]
        out = self.transformer(
            self.embedded(source),
            self.embedded(target),
            tgt_mask=torch.ones(L, L, dtype=torch.bool).triu(1),
            src_key_padding_mask=source_padding,
            tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding,
        )
        return out @ self.embed.weight.T


class EncoderLayerInTraining(nn.TransformerEncoderLayer):
    """With its dropouts at work."""

    def forward(self, *given: Any, **named: Any) -> torch.Tensor:
        self.train()
        return super().forward(*given, **named)


class DecoderLayerInTraining(nn.TransformerDecoderLayer):
    """With its dropouts at work."""

    def forward(self, *given: Any, **named: Any) -> torch.Tensor:
        self.train()
        return super().forward(*given, **named)


MODULES = {
    "encoder_layer_of_torch": nn.TransformerEncoderLayer,
    "decoder_layer_of_torch": nn.TransformerDecoderLayer,
    "transformer": nn.Transformer,
    "sequence": Sequence,
    "pair": Pair,
    "vaswani": Vaswani,
    "encoder_layer_in_training": EncoderLayerInTraining,
    "decoder_layer_in_training": DecoderLayerInTraining,
}
