"""attention() and Attention against the NumPy twin, and the contracts: masks, empty rows, causality, grouping."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import check_forward, check_gradient, check_module, draw

from mlx_xformer.nn.attention import (
    Attention,
    AttentionConfig,
    CrossAttention,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    attention,
    get_attention,
    initialize,
)
from mlx_xformer.nn.rotary import Rotary
from mlx_xformer.reference.nn.attention import attention as twin
from mlx_xformer.reference.nn.attention import attention_layer as twin_layer

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
        ({"q": (B, H, L)}, r"k must be \(batch, length, dim\), as q is, \(2, 6, 5\), got shape \(2, 3, 7, 11\)"),
        ({"q": (B, H, L, 0), "k": (B, G, S, 0)}, r"q must be .* dim above 0, got shape \(2, 6, 5, 0\)"),
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


E, HEADS = 18, 6
GRID = {
    "multi-head": {},
    "grouped": {"num_kv_heads": 2},
    "multi-query": {"num_kv_heads": 1},
    "no biases": {"bias": False},
    "some biases": {"bias": ("q", "v")},
    "widths": {"head_dim": 5, "value_dim": 7, "out_dim": 11, "num_kv_heads": 3},
    "rms": {"qk_norm": "rms", "num_kv_heads": 2},
    "rms, whole": {"qk_norm": "rms_whole", "num_kv_heads": 2, "norm_eps": 1e-2},
    "layer norm": {"qk_norm": "layer", "head_dim": 5, "norm_eps": 1e-3},
    "alibi": {"alibi": True, "causal": True},
    "alibi both ways": {"alibi": True, "window": 3},
    "relative": {"relative": (8, 20)},
    "relative, causal": {"relative": (8, 20), "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "capped": {"softcap": 1.3, "scale": 0.7, "window": 2, "causal": True},
    "everything": {
        "num_kv_heads": 3,
        "head_dim": 4,
        "value_dim": 5,
        "out_dim": 7,
        "bias": ("k", "out"),
        "qk_norm": "rms",
        "alibi": True,
        "relative": (8, 20),
        "causal": True,
        "window": 4,
        "sinks": True,
        "softcap": 2.0,
    },
}


def theirs_of(options, **given):
    """The twin of a layer; which projections have biases is told by the parameters."""
    kept = {
        name: value
        for name, value in options.items()
        if name not in ("bias", "head_dim", "value_dim", "out_dim", "sinks")
    }
    return lambda p, *x: twin_layer(p, *x, num_heads=HEADS, **kept, **given)


@pytest.mark.parametrize("name", GRID)
def test_self_attention(name):
    """Forward and the gradient of every parameter, with biases, gains, tables and sinks drawn at random."""
    x = np.random.default_rng(1).normal(size=(2, 7, E))
    module = Attention(E, HEADS, **GRID[name])
    assert set(module.config.bias) == {
        p[0] if p[0] != "o" else "out" for p in ("q_proj", "k_proj", "v_proj", "out_proj") if "bias" in module[p]
    }
    check_module(module, theirs_of(GRID[name]), x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("at", ["offset", "rows", "positions"])
def test_rotary_attention(interleaved, at):
    x = np.random.default_rng(1).normal(size=(2, 7, E))
    rotary = {"dims": 4, "theta": 100.0, "interleaved": interleaved}
    module = Attention(E, HEADS, head_dim=6, rotary=Rotary(**rotary), causal=True, num_kv_heads=2)
    places = {"offset": np.arange(7)[None] + [[5], [5]], "rows": np.arange(7)[None] + [[5], [0]]}.get(
        at, np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
    )
    given = {"offset": 5, "rows": mx.array([5, 0])}.get(at)
    call = (lambda x: module(x, positions=mx.array(places))) if given is None else (lambda x: module(x, offset=given))
    twin_call = theirs_of({"causal": True, "num_kv_heads": 2}, rotary=rotary, positions=places)

    params = draw(module, 3)
    check_forward(lambda x: call(x), lambda x: twin_call({n: p.astype(x.dtype) for n, p in params.items()}, x), x)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_cross_attention(groups):
    """Keys and values from a source of another width and length, values from a third."""
    rng = np.random.default_rng(1)
    x, source, values = rng.normal(size=(2, 5, E)), rng.normal(size=(2, 7, 10)), rng.normal(size=(2, 7, 11))
    module = Attention(E, HEADS, kv_dim=10, num_kv_heads=groups)
    check_module(module, theirs_of({"num_kv_heads": groups}), x, source)
    module = Attention(E, HEADS, kv_dim=10, v_dim=11, num_kv_heads=groups, value_dim=4)
    check_module(module, theirs_of({"num_kv_heads": groups}), x, source, values)


def test_masks_reach_the_layer():
    x = np.random.default_rng(1).normal(size=(2, 7, E))
    rng = np.random.default_rng(2)
    mask, bias = rng.random((2, 1, 7, 7)) > 0.3, rng.normal(size=(HEADS, 7, 7))
    module = Attention(E, HEADS, alibi=True)
    params = draw(module, 4)
    check_forward(
        lambda x: module(x, mask=mx.array(mask), bias=mx.array(bias.astype(np.float32)), causal=True),
        lambda x: theirs_of({"alibi": True}, mask=mask, bias=bias.astype(x.dtype), causal=True)(
            {n: p.astype(x.dtype) for n, p in params.items()}, x
        ),
        x,
    )


def test_without_a_batch_axis():
    module = Attention(18, 6, kv_dim=10, v_dim=11)
    x, source, values = (mx.random.normal((n, width)) for n, width in ((5, 18), (7, 10), (7, 11)))
    out = module(x, source, values, mask=mx.ones((5, 7), mx.bool_))
    assert out.shape == (5, 18) and mx.allclose(out, module(x[None], source[None], values[None])[0], atol=1e-6)
    weights = module.weights(x, source, average=True)
    assert weights.shape == (5, 7) and mx.allclose(weights, module.weights(x[None], source[None], average=True)[0])
    with pytest.raises(ValueError, match="positions need an Attention with rotary positions"):
        module(x, source, values, positions=mx.arange(5))


def test_scale():
    assert Attention(64, 8).scale == pytest.approx(0.35355, abs=1e-5) and Attention(512, 8).scale == 0.125
    assert Attention(64, 8, scale=0.5).scale == 0.5 and Attention(64, 8, head_dim=16).scale == 0.25


def test_layer_weights():
    """They are what the values are multiplied with."""
    module = Attention(18, 6, num_kv_heads=2, alibi=True, causal=True, softcap=1.5)
    draw(module, 1)
    x = mx.random.normal((2, 5, 18))
    weights = module.weights(x)
    values = mx.repeat(module.v_proj(x).reshape(2, 5, 2, 3).swapaxes(1, 2), 3, axis=1)
    out = module.out_proj((weights @ values).swapaxes(1, 2).reshape(2, 5, 18))
    assert mx.allclose(out, module(x), atol=1e-6)
    assert mx.allclose(module.weights(x, average=True), weights.mean(axis=1)) and (weights[:, :, 0, 1:] == 0).all()


def test_dropout_is_for_training():
    module = Attention(18, 6, dropout=0.5)
    x = mx.random.normal((2, 5, 18))
    with pytest.raises(ValueError, match=r"dropout of 0\.5 needs a random key"):
        module(x)
    a, b = (module(x, key=mx.random.key(seed)) for seed in (1, 2))
    assert (a != b).any() and (a == module(x, key=mx.random.key(1))).all()
    module.eval()
    assert (module(x) == module(x, key=mx.random.key(1))).all()
    mean = sum(module.train()(x, key=mx.random.key(seed)) for seed in range(400)) / 400
    module.eval()
    assert mx.abs(mean - module(x)).mean() < 0.1 * mx.abs(a - module(x)).mean()


def test_kinds():
    """Thin constructors over one class; groups of one and of all heads are multi-query and multi-head."""
    assert [get_attention(kind, 18, 6).config.num_kv_heads for kind in ("mha", "mqa", "gqa", "cross")] == [6, 1, 3, 6]
    assert get_attention("gqa", 18, 6, num_kv_heads=2).config.num_kv_heads == 2
    assert get_attention("mqa", 18, 6, num_kv_heads=3).config.num_kv_heads == 1
    assert get_attention("cross", 18, 6, kv_dim=10).k_proj.weight.shape == (18, 10)
    assert type(MultiHeadAttention(18, 6)) is type(CrossAttention(18, 6)) is Attention
    assert GroupedQueryAttention(18, 1).config.num_kv_heads == 1
    x = mx.random.normal((2, 5, 18))
    for groups, kind in ((1, MultiQueryAttention), (6, MultiHeadAttention)):
        grouped, other = Attention(18, 6, num_kv_heads=groups), kind(18, 6)
        draw(grouped, 2), draw(other, 2)
        assert (grouped(x) == other(x)).all()
    with pytest.raises(ValueError, match="kind must be one of mha, mqa, gqa, cross, got 'flash'"):
        get_attention("flash", 18, 6)


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_counts(bias):
    """4 E^2; E^2 (2 + 2 G / H); E^2 (2 + 2 / H); and the biases. 4096 / 32 / 8 makes keys of 8 * 128."""
    for kind, groups in (("mha", 8), ("mqa", 1), ("gqa", 4)):
        module = get_attention(kind, 64, 8, bias=bias)
        count = sum(p.size for _, p in tree_flatten(module.parameters()))
        assert count == 64 * 64 * (2 + 2 * groups // 8 if groups == 8 else 2 + 2 * groups / 8) + bias * (
            128 + 16 * groups
        )
        assert len(tree_flatten(module.parameters())) == (8 if bias else 4)
    config = AttentionConfig(4096, 32, num_kv_heads=8)
    assert config.head_dim == 128 and config.num_kv_heads * config.head_dim == 1024


@pytest.mark.parametrize(("length", "count"), [(1, 1), (8, 3), (64, 2), (1000, 1)])
def test_any_length_with_one_instance(length, count):
    module = Attention(16, 4)
    x = mx.random.normal((count, length, 16))
    first = module(x)
    module(mx.random.normal((2, 13, 16)))
    assert (module(x) == first).all() and first.shape == x.shape


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_token_takes_the_general_way(groups):
    """Its value, projected; a NaN in the query is not swallowed, and gradients are 0, not missing."""
    module = Attention(16, 4, num_kv_heads=groups)
    draw(module, 1)
    x = mx.random.normal((3, 1, 16))
    values = mx.repeat(module.v_proj(x).reshape(3, groups, 4), 4 // groups, axis=1)
    assert mx.allclose(module(x), module.out_proj(values.reshape(3, 1, 16)), atol=1e-6)
    assert mx.isnan(module(mx.full((3, 1, 16), mx.nan), x)).all()
    gradient = mx.grad(lambda w: module.update({"q_proj": {"weight": w}})(x).sum())(module.q_proj.weight)
    assert gradient.shape == (16, 16) and mx.abs(gradient).max() < 1e-6


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((18, 4), {}, "embed_dim must be a multiple of num_heads, 4, got 18"),
        ((18, 0), {}, "num_heads must be a whole number from 1 to 100000, got 0"),
        ((18, 6), {"num_kv_heads": 4}, "num_kv_heads must divide num_heads, 6, got 4"),
        ((18, 6), {"num_kv_heads": 0}, "num_kv_heads must be a whole number from 1 to 100000, got 0"),
        ((18, 6), {"value_dim": 0}, "value_dim must be a whole number from 1 to 100000, got 0"),
        ((18, 6), {"bias": ("q", "o")}, "bias must be True, False or names among q, k, v, out, got"),
        ((18, 6), {"qk_norm": "batch"}, "qk_norm must be one of rms, layer, rms_whole, got 'batch'"),
        ((18, 6), {"window": 0}, "window must be a whole number from 1 to 100000000, got 0"),
        ((18, 6), {"bias": None}, "bias must be True, False or names among q, k, v, out, got None"),
        ((18, 6), {"softcap": -1}, "softcap must be a number above 0, got -1"),
        ((18, 6), {"dropout": 2}, "dropout must be a number from 0 to below 1, got 2"),
        ((18, 6), {"relative": (7, 20)}, r"relative must be \(num_buckets, max_distance\), got \(7, 20\): .* even"),
        ((18, 6), {"relative": (8, 2)}, r"relative must be .*, got \(8, 2\): max_distance must be above 2"),
        (("18", 6), {}, "embed_dim must be a whole number from 1 to 1000000, got '18'"),
        ((18.0, 6), {}, r"embed_dim must be a whole number from 1 to 1000000, got 18\.0"),
        ((18, True), {}, "num_heads must be a whole number from 1 to 100000, got True"),
        ((18, 6), {"head_dim": 3.0}, r"head_dim must be a whole number from 1 to 100000, got 3\.0"),
        ((18, 6), {"norm_eps": 0.0}, r"norm_eps must be a number above 0, got 0\.0"),
        ((18, 6), {"norm_eps": -1e-6}, "norm_eps must be a number above 0, got -1e-06"),
        ((18, 6), {"causal": 1}, "causal must be true or false, got 1"),
        ((18, 6), {"rotary": Rotary(4)}, "rotary dims must be at most head_dim, 3, got 4"),
    ],
)
def test_attention_layer_errors(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        Attention(*sizes, **options)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 5, 17),), {}, "x must have 18 channels, got 17"),
        (((2, 3, 5, 18),), {}, r"x must be \(batch, length, channels\), got shape \(2, 3, 5, 18\)"),
        (((2, 5, 18), (2, 7, 18)), {"kv_dim": 10}, "source must have 10 channels, got 18"),
        (((2, 5, 18), (3, 7, 18)), {}, "source must have the batch size of x, 2, got 3"),
        (((2, 5, 18), (2, 7, 18), (2, 7, 18)), {"v_dim": 9}, "value_source must have 9 channels, got 18"),
        (((2, 5, 18), (2, 7, 18), (2, 8, 18)), {}, "value_source must have the length of source, 7, got 8"),
        (((5, 18), (1, 7, 18)), {}, r"source must be \(length, channels\), as x is, got shape \(1, 7, 18\)"),
        (((2, 8, 18), (2, 7, 18)), {"causal": True}, "causal needs at most as many queries as keys, 7, got 8"),
        (((2, 5, 18), (2, 7, 18)), {"rotary": Rotary(2)}, "rotary positions need self-attention, got a source"),
    ],
    ids=str,
)
def test_attention_call_errors(shapes, options, message):
    module = Attention(18, 6, **options)
    with pytest.raises(ValueError, match=message):
        module(*(mx.zeros(shape) for shape in shapes))


def test_initialize():
    """PyTorch's bounds for E = 512: 0.0541 for the packed three, 0.0442 for the output; apart 0.0765 each."""
    layer = Attention(512, 8)
    draw(layer, 1)
    for scheme, bounds in (("torch", (0.0541, 0.0541, 0.0541, 0.0442)), ("xavier", (0.0765,) * 4)):
        initialize(layer, scheme, key=mx.random.key(3))
        for name, bound in zip(("q_proj", "k_proj", "v_proj", "out_proj"), bounds, strict=True):
            weight = np.array(layer[name].weight)
            assert np.abs(weight).max() == pytest.approx(bound, rel=2e-3)
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=1e-2) and (layer[name].bias == 0).all()
    assert (layer.q_proj.weight != layer.k_proj.weight).any()
    before = layer.q_proj.weight
    initialize(layer, "xavier", key=mx.random.key(3))
    assert (layer.q_proj.weight == before).all()
    apart = Attention(64, 8, kv_dim=32, num_kv_heads=2)
    initialize(apart, "torch", key=mx.random.key(3))
    assert mx.abs(apart.k_proj.weight).max().item() == pytest.approx((6 / (32 + 16)) ** 0.5, rel=2e-2)
    with pytest.raises(ValueError, match=r"scheme must be .*, got 'kaiming'"):
        initialize(layer, "kaiming", key=mx.random.key(0))


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_a_mask_wider_than_the_keys_is_refused(name):
    """Only a cache shows some of the positions so far, for which the last columns count."""
    x = mx.random.normal((1, 5, 6))
    given = mx.ones((5, 7), mx.bool_) if name == "mask" else mx.zeros((5, 7))
    layer = Attention(6, 2)
    for call in (layer, layer.weights):
        with pytest.raises(ValueError, match=f"{name} must"):
            call(x, **{name: given})
