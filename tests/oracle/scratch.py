"""scratch's stack and token model as PyTorch compositions under that author's names: attention by PyTorch's own
function, with keys and values of different widths; the norm by torch.std, or PyTorch's. No gain or bias is 0 or 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def drawn(size: int, low: float, high: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(size).uniform_(low, high))


class Norm(nn.Module):
    def __init__(self, width: int, eps: float, unbiased: bool):
        super().__init__()
        self.gamma, self.beta = drawn(width, 0.7, 1.3), drawn(width, -0.2, 0.2)
        self.eps, self.unbiased = eps, unbiased

    def forward(self, x):
        if not self.unbiased:
            return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, self.eps)
        deviation = torch.std(x, dim=-1, keepdim=True)
        return (x - x.mean(dim=-1, keepdim=True)) / (deviation + self.eps) * self.gamma + self.beta


class Attend(nn.Module):
    def __init__(self, width: int, key_dim: int, heads: int, source: int):
        super().__init__()
        self.heads = heads
        self.W_Q = nn.Linear(width, heads * key_dim, bias=False)
        self.W_K = nn.Linear(source, heads * key_dim, bias=False)
        self.W_V = nn.Linear(source, width, bias=False)
        self.W_O = nn.Linear(width, width, bias=False)

    def forward(self, x, source, causal: bool):
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.W_Q(x), self.W_K(source), self.W_V(source))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.W_O(y.transpose(1, 2).flatten(2))


class Network(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.lin_1, self.lin_2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.lin_2(F.relu(self.lin_1(x)))


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        key_dim: int,
        hidden: int,
        heads: int,
        source: int | None,
        eps: float,
        unbiased: bool,
        causal: bool,
    ):
        super().__init__()
        self.causal, self.source = causal, source
        self.attention_layer = Attend(width, key_dim, heads, width)
        self.ffn = Network(width, hidden)
        self.norm_1, self.norm_2 = Norm(width, eps, unbiased), Norm(width, eps, unbiased)
        if source:
            self.cross_attention_layer = Attend(width, key_dim, heads, source)
            self.norm_3 = Norm(width, eps, unbiased)

    def forward(self, x, memory=None):
        y = self.norm_1(x)
        x = x + self.attention_layer(y, y, self.causal)
        if self.source:
            x = x + self.cross_attention_layer(self.norm_3(x), memory, False)
        return x + self.ffn(self.norm_2(x))


class Stack(nn.Module):
    """count blocks; the options are those of Block."""

    def __init__(self, count: int, **options):
        super().__init__()
        self.blocks = nn.ModuleList([Block(**options) for _ in range(count)])

    def forward(self, x, memory=None):
        for block in self.blocks:
            x = block(x, memory)
        return x


class Model(nn.Module):
    """Tokens to logits, with the buffers that the original's state has."""

    def __init__(self, vocab: int, positions: int, padding_idx: int, **options):
        super().__init__()
        width = options["width"]
        self.embed = nn.Embedding(vocab, width, padding_idx=padding_idx)
        self.decoder = Stack(**options)
        self.unembed = nn.Linear(width, vocab)
        place, rate = torch.arange(positions)[:, None], 10000 ** (-torch.arange(0, width, 2) / width)
        table = torch.zeros(positions, 1, width)
        table[:, 0, 0::2] = torch.sin(place * rate)
        table[:, 0, 1::2] = torch.cos(place * rate)[:, : width // 2]
        self.pos = nn.Module()
        self.pos.register_buffer("pe", table)
        self.register_buffer("mask", torch.full((positions, positions), -torch.inf).triu(1))

    def forward(self, tokens, memory=None):
        x = self.embed(tokens.long()) + self.pos.pe[: tokens.shape[1], 0]
        return self.unembed(self.decoder(x, memory))


class Loss(Model):
    """Of every token but the first, by those before it; padding is passed over."""

    def forward(self, tokens, memory=None):
        logits = super().forward(tokens[:, :-1], memory)
        pad = self.embed.padding_idx
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].long().flatten(), ignore_index=pad)


MODULES = {"scratch_stack": Stack, "scratch_model": Model, "scratch_loss": Loss}
