"""attention() and Attention against the NumPy twin, and the contracts: masks, empty rows, causality, grouping."""

import mlx.core as mx
import numpy as np
import pytest
from harness import check_forward, check_gradient, check_module

from mlx_xformer.attention import Attention, attention
from mlx_xformer.reference.attention import attention as twin
from mlx_xformer.reference.attention import attention_layer as twin_layer

B, H, G, L, S, D, DV = 2, 6, 3, 5, 7, 11, 13


def tensors(seed=0, H=H, G=G, L=L, S=S):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, H, L, D)), rng.normal(size=(B, G, S, D)), rng.normal(size=(B, G, S, DV))


def masks(seed=0):
    """A boolean mask with one row that attends nothing, and a bias with one more."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, 1, L, S)) > 0.4
    mask[1, 0, 2] = False
    bias = rng.normal(size=(H, L, S))
    bias[4, 3] = -np.inf
    bias[0, 0, 1] = -np.inf
    return mask, bias


CASES = {
    "plain": {},
    "scale": {"scale": 0.37},
    "mask": {"mask": masks()[0]},
    "bias": {"bias": masks()[1]},
    "mask and bias": {"mask": masks()[0], "bias": masks()[1]},
    "causal": {"causal": True},
    "causal and mask": {"causal": True, "mask": masks()[0]},
    "causal and bias": {"causal": True, "bias": masks()[1]},
    "nothing to attend": {"mask": np.zeros((1, 1, 1, S), bool)},
}


def ours(**options):
    given = {k: mx.array(v.astype(np.float32) if v.dtype == np.float64 else v) if isinstance(v, np.ndarray) else v
             for k, v in options.items()}  # fmt: skip
    return lambda q, k, v: attention(q, k, v, **given)


def theirs(**options):
    def call(q, k, v):
        cast = {key: o.astype(q.dtype) if isinstance(o, np.ndarray) and o.dtype == np.float64 else o
                for key, o in options.items()}  # fmt: skip
        return twin(q, k, v, **cast)

    return call


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_attention(case, groups):
    q, k, v = tensors(G=groups)
    check_forward(ours(**CASES[case]), theirs(**CASES[case]), q, k, v)


@pytest.mark.parametrize("case", CASES)
def test_attention_gradient(case):
    check_gradient(ours(**CASES[case]), theirs(**CASES[case]), *tensors())


@pytest.mark.parametrize("case", ["mask", "bias", "mask and bias", "nothing to attend"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_without_keys_give_zero(case, dtype):
    q, k, v = (mx.array(a.astype(np.float32)).astype(dtype) * 30 for a in tensors())
    options = {
        n: mx.array(o.astype(np.float32)) if o.dtype == np.float64 else mx.array(o) for n, o in CASES[case].items()
    }

    def total(q, k, v):
        return attention(q, k, v, **options).astype(mx.float32).sum()

    out = np.array(attention(q, k, v, **options).astype(mx.float32))
    gradients = [np.array(g.astype(mx.float32)) for g in mx.grad(total, argnums=(0, 1, 2))(q, k, v)]
    assert all(np.isfinite(a).all() for a in [out, *gradients])
    empty = np.zeros((B, H, L), bool)
    if "mask" in CASES[case]:
        empty |= ~np.broadcast_to(CASES[case]["mask"], (B, H, L, S)).any(-1)
    if "bias" in CASES[case]:
        empty |= np.broadcast_to(np.isneginf(CASES[case]["bias"]).all(-1), (B, H, L))
    assert empty.any() and (out[empty] == 0).all() and (gradients[0][empty] == 0).all()
    if not empty.all():
        assert (np.abs(out[~empty]).max(-1) > 0).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_finite_minus_infinity_blocks_too(dtype):
    """-1e9 in every column of a row: in float16 it is -inf and the row gives 0; elsewhere the row is a mean."""
    q, k, v = (mx.array(a.astype(np.float32)).astype(dtype) for a in tensors())
    bias = np.zeros((L, S), np.float32)
    bias[2], bias[3, 1:] = -1e9, -1e9
    out = np.array(attention(q, k, v, bias=mx.array(bias)).astype(mx.float32))
    assert np.isfinite(out).all()
    assert (out[:, :, 2] == 0).all() == (dtype == mx.float16)
    first = np.repeat(np.array(v.astype(mx.float32))[:, :, 0], H // G, axis=1)
    assert np.abs(out[:, :, 3] - first).max() <= 2e-2


def test_one_mask_for_all():
    q, k, v = (mx.array(a.astype(np.float32)) for a in tensors())
    assert mx.allclose(attention(q, k, v, mask=mx.array(True)), attention(q, k, v), atol=1e-6)
    assert (attention(q, k, v, mask=mx.array(False)) == 0).all()


def test_half_precision():
    q, k, v = tensors(3)
    for dtype, eps in ((mx.float16, 2**-10), (mx.bfloat16, 2**-7)):
        half = [mx.array(a.astype(np.float32)).astype(dtype) for a in (q, k, v)]
        exact = twin(*[np.array(a.astype(mx.float32), np.float64) for a in half])
        out = np.array(attention(*half).astype(mx.float32))
        assert np.abs(out - exact).max() <= 2 * eps * np.abs(exact).max()


def test_causal_is_lower_right():
    """One query after six cached positions sees all seven; the last of seven queries alone gives the same."""
    q, k, v = (mx.array(a.astype(np.float32)) for a in tensors(L=S))
    whole, last = attention(q, k, v, causal=True), attention(q[:, :, -1:], k, v, causal=True)
    assert mx.allclose(whole[:, :, -1:], last, atol=1e-6)
    assert not mx.allclose(whole[:, :, :1], attention(q[:, :, :1], k, v), atol=1e-3)


def test_large_scores_and_no_keys():
    q, k, v = tensors()
    check_forward(ours(), theirs(), q * 1e4, k, v)
    q, k, v = tensors(S=0)
    assert (
        np.array(ours()(*[mx.array(a.astype(np.float32)) for a in (q, k, v)])).tolist()
        == np.zeros((B, H, L, DV)).tolist()
    )


def test_arguments_are_left_alone():
    q, k, v = (mx.array(a.astype(np.float32)) for a in tensors())
    mask, bias = mx.array(masks()[0]), mx.array(masks()[1].astype(np.float32))
    before = [np.array(a) for a in (q, k, v, mask, bias)]
    attention(q, k, v, mask=mask, bias=bias)
    assert all((np.array(a) == b).all() for a, b in zip((q, k, v, mask, bias), before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (B, H, L)}, r"q must be \(batch, heads, length, dim\), got shape \(2, 6, 5\)"),
        ({"k": (3, G, S, D)}, "k must have the batch size of q, 2, got 3"),
        ({"k": (B, G, S, 12)}, "k must have the head_dim of q, 11, got 12"),
        ({"v": (B, G, 8, DV)}, r"v must have the heads and length of k, \(3, 7\), got \(3, 8\)"),
        ({"k": (B, 4, S, D), "v": (B, 4, S, DV)}, "num_kv_heads must divide num_heads, 6, got 4"),
        ({"mask": (L, S), "dtype": mx.float32}, "mask must be boolean"),
        ({"mask": (4, S), "dtype": mx.bool_}, r"mask must broadcast to .* \(2, 6, 5, 7\), got shape \(4, 7\)"),
        ({"bias": (L, S), "dtype": mx.bool_}, "bias must be a float"),
        ({"bias": (3, L, S), "dtype": mx.float32}, r"bias must broadcast .*, got shape \(3, 5, 7\)"),
        ({"q": (B, H, 8, D), "causal": True}, "causal needs at most as many queries as keys, 7, got 8"),
    ],
)
def test_errors_name_the_argument(change, message):
    shapes = {"q": (B, H, L, D), "k": (B, G, S, D), "v": (B, G, S, DV)}
    arrays = {name: mx.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    arrays |= {name: mx.zeros(change[name], dtype=change["dtype"]) for name in ("mask", "bias") if name in change}
    with pytest.raises(ValueError, match=message):
        attention(**arrays, causal=change.get("causal", False))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_self_attention(kv_heads, bias):
    module = Attention(18, 6, num_kv_heads=kv_heads, bias=bias)
    x = np.random.default_rng(1).normal(size=(2, 5, 18))
    check_module(module, lambda p, x: twin_layer(p, x, num_heads=6, num_kv_heads=kv_heads), x)


def test_without_a_batch_axis():
    module = Attention(18, 6)
    x = mx.random.normal((5, 18))
    assert mx.allclose(module(x), module(x[None])[0]) and module(x, x[:3]).shape == (5, 18)


def test_cross_attention():
    module = Attention(18, 6, kv_dim=10)
    rng = np.random.default_rng(1)
    x, source = rng.normal(size=(2, 5, 18)), rng.normal(size=(2, 7, 10))
    check_module(module, lambda p, x, s: twin_layer(p, x, s, num_heads=6), x, source)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((18, 4), {}, "embed_dim must be a multiple of num_heads, 4, got 18"),
        ((18, 6), {"num_kv_heads": 4}, "num_kv_heads must divide num_heads, 6, got 4"),
        ((18, 6), {"num_kv_heads": 0}, "num_kv_heads must divide num_heads, 6, got 0"),
    ],
)
def test_attention_layer_errors(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        Attention(*sizes, **options)
