"""MultiheadAttention in PyTorch's layout against PyTorch: every option, forward, weights and gradients, both ways."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from support.oracle import Oracle

from mlx_xformer.converters.attention import LAYOUTS, attention_state, load_attention
from mlx_xformer.nn.attention.layer import Attention
from mlx_xformer.nn.attention.torch_layout import MultiheadAttention
from mlx_xformer.nn.masks import causal_mask

N, L, S, E, H = 3, 5, 7, 12, 4
RNG = np.random.default_rng(0)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def masks(name):
    """Masks that leave every row a key (PyTorch's NaN otherwise), by PyTorch's polarity."""
    rng = np.random.default_rng(5)
    padding = np.arange(S)[None] >= np.array([7, 4, 6])[:, None]
    ignore = rng.random((L, S)) > 0.6
    ignore[:, 1] = False
    rows = rng.random((N * H, L, S)) > 0.6
    rows[:, :, 0] = False
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "added padding": {"key_padding_mask": noise(N, S, seed=6)},
        "mask": {"attn_mask": ignore},
        "added": {"attn_mask": noise(L, S, seed=7)},
        "heads": {"attn_mask": rows},
        "added heads": {"attn_mask": noise(N * H, L, S, seed=8)},
        "both": {"attn_mask": ignore, "key_padding_mask": padding},
    }[name]


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as child:
        yield child


def inputs(options, batch_first, batched=True):
    widths = (E, options.get("kdim") or E, options.get("vdim") or E)
    arrays = [noise(N, length, width, seed=i) for i, (length, width) in enumerate(zip((L, S, S), widths, strict=True))]
    if not batched:
        return dict(zip(("query", "key", "value"), (x[0] for x in arrays), strict=True))
    return dict(zip(("query", "key", "value"), (x if batch_first else x.swapaxes(0, 1) for x in arrays), strict=True))


def ours(answer, options):
    """Our layer with the oracle's weights, through the converter, there and back."""
    split = "kdim" in options or "vdim" in options
    layout = "pytorch-split" if split else "pytorch"
    module = MultiheadAttention(E, H, **options)
    state = {name: mx.array(value) for name, value in answer.state.items()}
    load_attention(module, state, layout)
    back = attention_state(module, layout)
    assert back.keys() == state.keys() and all((back[name] == state[name]).all() for name in state)
    return module


def compare(oracle, options, mask, *, batch_first=True, batched=True, need_weights=True, average=True):
    given = inputs(options, batch_first, batched)
    u = noise(*given["query"].shape, seed=9)
    kwargs = {"embed_dim": E, "num_heads": H, "batch_first": batch_first, **options}
    call = {"need_weights": need_weights, "average_attn_weights": average}
    cotangents = [u]
    answer = oracle.module("mha", kwargs, {**given, **mask}, cotangents=cotangents, **call)
    module = ours(answer, {**options, "batch_first": batch_first})
    ready = {name: mx.array(value) for name, value in mask.items()}
    out, weights = module(*map(mx.array, given.values()), **ready, **call)
    assert np.abs(answer.outputs[0] - np.array(out)).max() <= 2e-6 * max(1, np.abs(answer.outputs[0]).max())
    if need_weights:
        assert np.abs(answer.outputs[1] - np.array(weights)).max() <= 2e-6
    else:
        assert weights is None
    _, gradients = mx.vjp(
        lambda *x: module(*x, **ready, **call)[0], [mx.array(x) for x in given.values()], [mx.array(u)]
    )
    for name, gradient in zip(given, gradients, strict=True):
        assert np.abs(answer.gradients[name] - np.array(gradient)).max() <= 1e-5


OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 9, "vdim": 10},
    {"kdim": 9, "vdim": 10, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
]
MASKS = ["none", "padding", "added padding", "mask", "added", "heads", "added heads", "both"]


@pytest.mark.torch
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_pytorch(oracle, options, mask):
    compare(oracle, options, masks(mask))


@pytest.mark.torch
@pytest.mark.parametrize(("batch_first", "batched"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize(("need_weights", "average"), [(False, True), (True, True), (True, False)])
def test_layouts_and_weights(oracle, batch_first, batched, need_weights, average):
    mask = masks("mask") if batched else {"attn_mask": masks("mask")["attn_mask"], "key_padding_mask": np.arange(S) > 4}
    for options in ({"add_bias_kv": True}, {"kdim": 9}):
        given = {"batch_first": batch_first, "batched": batched, "need_weights": need_weights, "average": average}
        compare(oracle, options, mask, **given)


def drawn(module, seed=0):
    """Random parameters everywhere, biases and learned positions too."""
    rng = np.random.default_rng(seed)
    module.apply(lambda x: mx.array(rng.uniform(-0.5, 0.5, x.shape).astype(np.float32)))
    return module


def test_a_layer_of_ours_and_one_of_pytorch_s_are_the_same():
    """Self-attention with the same weights, one mask in both polarities."""
    theirs = drawn(MultiheadAttention(E, H, batch_first=True))
    layer = Attention(E, H)
    load_attention(layer, attention_state(theirs, "pytorch"), "pytorch")
    x = mx.array(noise(N, L, E))
    allowed = mx.array(RNG.random((L, L)) > 0.4) | mx.eye(L).astype(mx.bool_)
    out, weights = theirs(x, x, x, attn_mask=~allowed)
    assert mx.abs(out - layer(x, mask=allowed)).max() < 1e-6
    assert mx.abs(weights - layer.weights(x, mask=allowed, average=True)).max() < 1e-6
    assert mx.abs(theirs(x, x, x, is_causal=True)[0] - layer(x, causal=True)).max() < 1e-6
    upper_left = ~causal_mask(L, S, alignment="upper_left")
    y = mx.array(noise(N, S, E, seed=1))
    assert (theirs(x, y, y, is_causal=True)[0] == theirs(x, y, y, attn_mask=upper_left)[0]).all()


def test_rows_that_see_nothing_are_0():
    module = drawn(MultiheadAttention(E, H, bias=False, batch_first=True))
    x = mx.array(noise(N, L, E))
    ignore = mx.arange(L) >= mx.array([[5], [0], [2]])
    for need in (True, False):
        out, _ = module(x, x, x, key_padding_mask=ignore, need_weights=need)
        assert (out[1] == 0).all() and (mx.abs(out[0]).max(axis=-1) > 0).all()


def test_static_keys_and_values():
    """Heads that are projected already take the place of the projections."""
    module = drawn(MultiheadAttention(E, H, batch_first=True, add_zero_attn=True))
    x, y = mx.array(noise(N, L, E)), mx.array(noise(N, S, E, seed=1))
    k, v = (mx.flatten(mx.unflatten(p(y), -1, (H, -1)).swapaxes(1, 2), 0, 1) for p in (module.k_proj, module.v_proj))
    other = mx.array(noise(N, S, E, seed=2))
    assert mx.abs(module(x, other, other, static_k=k, static_v=v)[0] - module(x, y, y)[0]).max() < 1e-6


def test_dropout():
    module = drawn(MultiheadAttention(E, H, dropout=0.5, batch_first=True))
    x = mx.array(noise(N, L, E))
    with pytest.raises(ValueError, match=r"dropout of 0\.5 needs a random key"):
        module(x, x, x)
    a, b = (module(x, x, x, dropout_key=mx.random.key(seed)) for seed in (1, 2))
    assert (a[0] != b[0]).any() and (a[1] == b[1]).all()
    module.eval()
    assert (module(x, x, x)[0] == module(x, x, x, dropout_key=mx.random.key(1))[0]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "model.attn."])
def test_there_and_back(layout, prefix):
    """Every layout, bit for bit, with float16 kept; the names are those of the layout."""
    module = drawn(MultiheadAttention(E, H) if layout.startswith("pytorch") else Attention(E, H, num_kv_heads=2))
    if layout == "pytorch-split":
        module = drawn(MultiheadAttention(E, H, kdim=9, vdim=10, add_bias_kv=True))
    module.set_dtype(mx.float16)
    state = attention_state(module, layout, prefix=prefix)
    assert all(name.startswith(prefix) and x.dtype == mx.float16 for name, x in state.items())
    known = {
        "pytorch": "in_proj_weight",
        "pytorch-split": "k_proj_weight",
        "mlx": "key_proj.bias",
        "plain": "k_proj.bias",
        "scratch": "W_K.bias",
    }
    assert prefix + known.get(layout, "W_k.weight") in state
    again = attention_state(module, layout, prefix=prefix)
    drawn(module, seed=1)
    load_attention(module, state, layout, prefix=prefix)
    back = attention_state(module, layout, prefix=prefix)
    assert all((back[name] == again[name]).all() and back[name].dtype == mx.float16 for name in again)


def test_rows_are_q_k_v():
    module = drawn(MultiheadAttention(E, H))
    packed = attention_state(module, "pytorch")["in_proj_weight"]
    for i, layer in enumerate((module.q_proj, module.k_proj, module.v_proj)):
        assert (packed[i * E : (i + 1) * E] == layer.weight).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("out_proj.bias"), "missing.*out_proj.bias"),
        (lambda s: s.update(extra=mx.zeros(3)), "extra meets no rule"),
        (lambda s: s.update(in_proj_weight=mx.zeros((30, E))), r"q_proj.weight must be \(12, 12\), got \(10, 12\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    module = MultiheadAttention(E, H)
    state = attention_state(module, "pytorch")
    change(state)
    with pytest.raises(ValueError, match="(?s)" + message):
        load_attention(module, state, "pytorch")


def test_unknown_layout():
    with pytest.raises(
        ValueError, match="layout must be one of pytorch, pytorch-split, mlx, plain, W, scratch, got 'keras'"
    ):
        load_attention(MultiheadAttention(E, H), {}, "keras")


MASKED = ((5, 3, 12), (7, 3, 12), (7, 3, 12))


@pytest.mark.parametrize(
    ("shapes", "given", "message"),
    [
        (((5, 3, 11), (7, 3, 12), (7, 3, 12)), {}, "query must have 12 channels, got 11"),
        (((5, 3, 12), (7, 2, 12), (7, 3, 12)), {}, "key must have the batch size of query, 3, got 2"),
        (((5, 3, 12), (7, 3, 12), (8, 3, 12)), {}, "value must have the length of key, 7, got 8"),
        (((5, 3, 12), (7, 12), (7, 12)), {}, "key must have 2 or 3 axes, as many as query, got shape"),
        (MASKED, {"key_padding_mask": mx.zeros((3, 9), mx.bool_)}, r"key_padding_mask .* \(3, 7\), got \(3, 9\)"),
        (MASKED, {"key_padding_mask": mx.zeros((3, 5), mx.bool_)}, r"key_padding_mask .* \(3, 7\), got \(3, 5\)"),
        (MASKED, {"attn_mask": mx.zeros((5, 5), mx.bool_)}, r"attn_mask .* \(5, 7\) or \(12, 5, 7\), got \(5, 5\)"),
        (MASKED, {"attn_mask": mx.zeros((3, 5, 7))}, r"attn_mask .* \(5, 7\) or \(12, 5, 7\), got \(3, 5, 7\)"),
        (MASKED, {"attn_mask": mx.zeros((5, 7), mx.uint8)}, "attn_mask must be boolean or float, got mlx.core.uint8"),
        (MASKED, {"static_k": mx.zeros((12, 7, 3))}, "static_k and static_v must be given both"),
        (MASKED, {"static_k": mx.zeros((12, 7, 3)), "static_v": mx.zeros((12, 6, 3))}, r"static_v .*\(12, 7, 3\), got"),
    ],
)
def test_refusals(shapes, given, message):
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(12, 4)(*(mx.zeros(s) for s in shapes), **given)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, 5, got 12"):
        MultiheadAttention(12, 5)


@pytest.mark.parametrize(("N", "L", "S"), [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_nothing_to_attend_or_to_ask(N, L, S):
    """Masks of no elements keep their shapes; without keys the output is the projection of 0, as in PyTorch."""
    module = drawn(MultiheadAttention(E, H, batch_first=True))
    x, y = mx.array(noise(N, L, E)), mx.array(noise(N, S, E, seed=1))
    given = {"key_padding_mask": mx.zeros((N, S), mx.bool_), "attn_mask": mx.zeros((L, S), mx.bool_)}
    for masks_ in (given, {"attn_mask": mx.zeros((N * H, L, S))}, {"is_causal": True}, {}):
        out, weights = module(x, y, y, **masks_)
        assert out.shape == (N, L, E) and weights.shape == (N, L, S)
        assert S or (out == module.out_proj.bias).all()


def test_every_mask_is_used():
    """The grid above holds what it says: no two masks give the same output."""
    module = drawn(MultiheadAttention(E, H, batch_first=True))
    given = [mx.array(x) for x in inputs({}, True).values()]
    outs = [np.array(module(*given, **{n: mx.array(v) for n, v in masks(name).items()})[0]) for name in MASKS]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(outs, 2))
