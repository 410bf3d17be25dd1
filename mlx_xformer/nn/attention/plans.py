"""How attention() is computed: in how many blocks of queries, and by MLX's function or by products.

Axes: B batch, H query heads, G key/value heads, L queries, S keys, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_SCORES = 2**20  # scores that a block of rows holds at once
_SMALL = 2**16  # scores up to which nothing is gained by blocks
_ROWS = 64  # queries of a block, at least
# Head widths that Metal's fused kernels take, for more than 8 queries and for up to 8 (MLX 0.32.4: 192 and 256 have a
# kernel for many queries too, which its heuristics do not choose).
_FUSED, _FUSED_FEW = (64, 72, 80, 96, 128), (64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Plan:
    """How attention is computed: in blocks of `rows` queries; each by MLX's own function (with heads padded to `width`
    if not None, on Metal) or, `explicit`, by products and a softmax of ours."""

    rows: int
    explicit: bool
    width: int | None = None


def plan(
    q: tuple[int, ...],
    k: tuple[int, ...],
    value_dim: int,
    *,
    vectorizes: bool,
    gpu: bool,
    causal: bool = False,
    window: int | None = None,
    explicit: bool = False,
) -> Plan:
    """The plan for shapes q (B, H, L, D) and k (B, G, S, D). vectorizes: our softmax outdoes MLX's (Linux's CPU);
    explicit: MLX has no function for what is asked."""
    B, H, L, D = q
    S = k[2]
    explicit = explicit or (vectorizes and B * H * L * S > _SMALL)
    rows = L
    if explicit:
        rows = max(16, BLOCK_SCORES // max(1, B * H * S))
    if window is not None and 2 * window < S:
        rows = max(_ROWS, window // 8) if not gpu else max(256, window // 4)
    elif causal and not gpu and L > 2 * _ROWS:
        rows = min(rows, max(_ROWS, L // 16))
    width = None
    if gpu and not explicit and L > 1:
        sizes = _FUSED if L > 8 else _FUSED_FEW
        if value_dim != D or D not in sizes:
            wide = max(D, value_dim)
            # Padded heads cost their width, unfused scores L x S: worth it for long sequences.
            width = next((size for size in sizes if size >= wide), None) if L * S >= 2**20 else None
    return Plan(min(rows, L), explicit, width)
