"""attention() beyond its plain form: windows, sinks, soft caps, dropout, weights; blocks, bands and their plan."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, check_forward, check_gradient

from mlx_xformer.nn.attention import core, scores
from mlx_xformer.nn.attention.core import attention, attention_weights
from mlx_xformer.nn.attention.layer import Attention
from mlx_xformer.nn.attention.plans import Plan, plan
from mlx_xformer.nn.masks import causal_mask, segment_mask, sliding_mask
from mlx_xformer.reference.nn import attention as twin

B, H, G, D, DV = 2, 6, 3, 11, 13
FEW, MANY = (5, 7), (197, 211)  # L, S: in one piece, and in many blocks


def tensors(sizes, seed=0, groups=G):
    rng = np.random.default_rng(seed)
    L, S = sizes
    return rng.normal(size=(B, H, L, D)), rng.normal(size=(B, groups, S, D)), rng.normal(size=(B, groups, S, DV))


def options(sizes, *names):
    """Arguments by name, some of them arrays; the mask and the bias leave a row without a key each."""
    L, S = sizes
    rng = np.random.default_rng(1)
    mask, bias = rng.random((B, 1, L, S)) > 0.3, rng.normal(size=(H, L, S))
    mask[1, 0, 2], bias[4, 3] = False, -np.inf
    known = {
        "causal": True,
        "window": 3 if sizes == FEW else 31,
        "mask": mask,
        "bias": bias,
        "sinks": rng.normal(size=H),
        "by_distance": rng.normal(size=(H, S + L - 1)),
        "softcap": 1.7,
        "scale": 0.41,
    }
    return {name: known[name] for name in names}


def ours(given, function=attention):
    ready = {n: mx.array(x.astype(np.float32) if x.dtype == np.float64 else x) if isinstance(x, np.ndarray) else x
             for n, x in given.items()}  # fmt: skip
    return lambda *arrays: function(*arrays, **ready)


def theirs(given, function=twin.attention):
    def call(*arrays):
        ready = {n: x.astype(arrays[0].dtype) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x
                 for n, x in given.items()}  # fmt: skip
        return function(*arrays, **ready)

    return call


NAMES = ["causal", "window", "mask", "bias", "by_distance", "sinks", "softcap"]
CASES = [
    (),
    *((n,) for n in NAMES),
    *itertools.combinations(NAMES, 2),
    ("causal", "window", "mask", "bias"),
    tuple(NAMES),
]


@pytest.mark.parametrize("case", CASES, ids="+".join)
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=str)
def test_against_the_twin(sizes, case):
    given = options(sizes, *case, "scale")
    check_forward(ours(given), theirs(given), *tensors(sizes))


@pytest.mark.parametrize("case", [*((n,) for n in NAMES), tuple(NAMES)], ids="+".join)
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=str)
def test_gradients(sizes, case):
    given = options(sizes, *case)
    check_gradient(ours(given), theirs(given), *tensors(sizes))


def test_gradient_of_sinks():
    q, k, v = tensors(FEW)
    given = options(FEW, "causal")
    call = lambda *x: attention(*x[:3], sinks=x[3], **given)  # noqa: E731
    check_gradient(call, lambda *x: twin.attention(*x[:3], sinks=x[3], **given), q, k, v, np.linspace(-1, 2, H))


@pytest.mark.parametrize("sizes", [FEW, MANY], ids=str)
@pytest.mark.parametrize("names", [("mask",), ("bias",), ("mask", "softcap"), ("bias", "window"), ("mask", "sinks")])
def test_rows_that_see_nothing(sizes, names):
    """Their output is 0 and so is their gradient, on every path."""
    arrays = [mx.array(x.astype(np.float32)) for x in tensors(sizes)]
    given = options(sizes, *names)
    out, gradients = mx.vjp(ours(given), arrays, [mx.ones((B, H, sizes[0], DV))])
    blind = (1, slice(None), 2) if "mask" in names else (slice(None), 4, 3)
    assert (np.array(out[0])[blind] == 0).all() and (np.array(gradients[0])[blind] == 0).all()
    assert all(np.isfinite(np.array(g)).all() for g in gradients)
    assert (np.abs(np.array(out[0])[0, 0]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("case", CASES, ids="+".join)
def test_weights(case):
    given = options(FEW, *case)
    q, k, _ = tensors(FEW)
    check_forward(ours(given, attention_weights), theirs(given, twin.attention_weights), q, k)
    averaged = np.array(
        ours({**given, "average": True}, attention_weights)(*(mx.array(x.astype(np.float32)) for x in (q, k)))
    )
    assert_within_budget(averaged, *(theirs(given, twin.attention_weights)(q.astype(d), k.astype(d)).mean(axis=1)
                                     for d in (np.float64, np.float32)))  # fmt: skip
    total = averaged.sum(axis=-1)
    if not {"mask", "bias", "sinks"} & set(case):
        assert np.abs(total - 1).max() < 1e-6


def test_uniform_weights_of_equal_tokens():
    q = mx.broadcast_to(mx.random.normal((1, 2, 1, 8)), (1, 2, 50, 8))
    assert mx.abs(attention_weights(q, q) - 1 / 50).max() < 1e-8
    out = attention(q, q, mx.random.normal((1, 2, 50, 8)))
    assert mx.abs(out - out[:, :, :1]).max() < 1e-6  # a matrix product may round its last rows differently


def test_weights_by_hand():
    """Two tokens, identity projections, two heads of width 2: softmax of (1 / sqrt 2, 0)."""
    x = mx.array([[1.0, 0, 0, 0], [0, 1, 0, 0]]).reshape(1, 2, 2, 2).swapaxes(1, 2)
    near = math.exp(math.sqrt(0.5)) / (1 + math.exp(math.sqrt(0.5)))
    expected = np.array([[[near, 1 - near], [1 - near, near]], [[0.5, 0.5], [0.5, 0.5]]])
    assert near == pytest.approx(0.6698, abs=1e-4)
    assert np.abs(np.array(attention_weights(x, x))[0] - expected).max() < 1e-7


@pytest.mark.parametrize("sizes", [FEW, MANY], ids=str)
def test_dropout(sizes):
    """With unit vectors for values the output is the weights themselves: each is 0 or 1 / (1 - p) times as large."""
    q, k, _ = (mx.array(x.astype(np.float32)) for x in tensors(sizes))
    S = sizes[1]
    v = mx.broadcast_to(mx.eye(S), (B, G, S, S))
    weights = np.array(attention_weights(q, k))
    assert np.abs(np.array(attention(q, k, v, dropout=0.0)) - weights).max() < 1e-6
    dropped = np.array(attention(q, k, v, dropout=0.3, key=mx.random.key(3)))
    kept = dropped != 0
    assert np.abs(dropped - np.where(kept, weights / 0.7, 0)).max() < 1e-6
    share, count = kept.mean(), kept.size
    assert abs(share - 0.7) < 5 * math.sqrt(0.3 * 0.7 / count)
    again, other = (np.array(attention(q, k, v, dropout=0.3, key=mx.random.key(s))) for s in (3, 4))
    assert (again == dropped).all() and ((other != 0) != kept).any()
    if sizes == MANY:  # the blocks have draws of their own
        assert (kept[:, :, :64] != kept[:, :, 64:128]).any()


@pytest.mark.parametrize("block", [1, 7, 50, 211])
def test_online_softmax(block):
    """The algorithm that fused kernels follow gives what the whole softmax gives."""
    q, k, v = (x[0, 0] for x in tensors(MANY))
    whole = twin.attention(q[None, None], k[None, None], v[None, None], scale=0.5)[0, 0]
    assert np.abs(twin.online_attention(q, k, v, block=block, scale=0.5) - whole).max() < 1e-13


def test_a_window_is_a_band():
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors(MANY))
    band = sliding_mask(*MANY, 31)
    for causal in (False, True):
        mask = band & causal_mask(*MANY) if causal else band
        assert mx.abs(attention(q, k, v, window=31, causal=causal) - attention(q, k, v, mask=mask)).max() < 1e-5
    assert mx.abs(attention(q, k, v, window=10_000) - attention(q, k, v)).max() < 1e-5


def test_packed_sequences_are_single_ones():
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors((7, 7), groups=H))
    ids = mx.array([[0, 0, 0, 1, 1, 1, 1], [4, 4, 5, 5, 5, -1, -1]])
    out = attention(q, k, v, mask=segment_mask(ids), causal=True)
    for row, first, last in ((0, 0, 3), (0, 3, 7), (1, 0, 2), (1, 2, 5)):
        some = (slice(row, row + 1), slice(None), slice(first, last))
        assert mx.abs(out[some] - attention(q[some], k[some], v[some], causal=True)).max() < 1e-6
    assert (out[1, :, 5:] == 0).all()


def test_memory_of_a_window_is_linear():
    """L = 2048, 4096, 8192 with a window of 256: each twice the last; the whole scores alone would be 16 times."""
    peaks = []
    for L in (2048, 4096, 8192):
        q, k, v = (mx.random.normal((1, 2, L, 32)) for _ in range(3))
        mx.eval(q, k, v)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(attention(q, k, v, causal=True, window=256))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 2.2 * peaks[0] and peaks[2] < 2.2 * peaks[1]
    assert peaks[2] < 2 * 8192 * 8192 * 4 / 8


@pytest.mark.parametrize("options", [{"alibi": True}, {"relative": (32, 128)}], ids=str)
def test_memory_of_a_window_with_distances_is_linear(options):
    """ALiBi and T5's bias of a windowed layer are never held for all pairs."""
    layer, peaks = Attention(32, 2, causal=True, window=256, **options), []
    for L in (2048, 4096):
        x = mx.random.normal((1, L, 32))
        mx.eval(x, layer.parameters())
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(layer(x))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 2.2 * peaks[0] and peaks[1] < 2 * 4096 * 4096 * 4 / 4


METAL = {"vectorizes": False, "gpu": True}
LINUX = {"vectorizes": True, "gpu": False}


@pytest.mark.parametrize(
    ("shape", "value_dim", "given", "expected"),
    [
        # (L, S, D): Metal's fused kernel where there is one, in one piece
        ((1024, 1024, 64), 64, METAL, (1024, False, None)),
        ((1024, 1024, 128), 128, {**METAL, "causal": True}, (1024, False, None)),
        ((1, 4096, 128), 128, METAL, (1, False, None)),
        ((8, 4096, 256), 256, METAL, (8, False, None)),
        # heads that it does not take are padded where the scores are large
        ((1024, 1024, 48), 48, METAL, (1024, False, 64)),
        ((1024, 1024, 88), 64, METAL, (1024, False, 96)),
        ((2048, 2048, 192), 192, METAL, (2048, False, None)),
        ((512, 512, 48), 48, METAL, (512, False, None)),
        # bands, and what MLX has no function for
        ((4096, 4096, 64), 64, {**METAL, "window": 512}, (256, False, None)),
        ((4096, 4096, 64), 64, {**METAL, "window": 2048}, (4096, False, None)),
        ((1024, 1024, 64), 64, {**METAL, "explicit": True}, (128, True, None)),
        # Linux's CPU: our softmax in blocks, MLX's where there is little to do
        ((1024, 1024, 64), 64, LINUX, (128, True, None)),
        ((64, 64, 64), 64, LINUX, (64, False, None)),
        ((2048, 2048, 64), 64, {**LINUX, "causal": True}, (64, True, None)),
        ((4096, 4096, 64), 64, {**LINUX, "window": 512}, (64, True, None)),
        ((1, 4096, 64), 64, {**LINUX, "window": 512}, (1, False, None)),
        # another CPU, or half precision
        ((1024, 1024, 64), 64, {"vectorizes": False, "gpu": False}, (1024, False, None)),
        ((1024, 1024, 64), 64, {"vectorizes": False, "gpu": False, "causal": True}, (64, False, None)),
    ],
    ids=str,
)
def test_plan(shape, value_dim, given, expected):
    L, S, D = shape
    found = plan((1, 8, L, D), (1, 8, S, D), value_dim, **given)
    assert (found.rows, found.explicit, found.width) == expected


@pytest.mark.parametrize("case", [(), ("mask",), ("bias", "sinks"), ("causal",)], ids="+".join)
def test_padded_heads(monkeypatch, case):
    """What is planned on Metal for heads without a kernel, run here."""
    monkeypatch.setattr(core, "plan", lambda q, *_, **__: Plan(q[2], False, 16))
    given = options(FEW, *case, "scale", "sinks")
    check_forward(ours(given), theirs(given), *tensors(FEW))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("case", [(), *((n,) for n in NAMES), tuple(NAMES)], ids="+".join)
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=str)
def test_half_precision(sizes, case, dtype):
    """c = 3 of the rounding unit: weights and products are rounded, sums are float32."""
    given = options(sizes, *case)
    half = [mx.array(x.astype(np.float32)).astype(dtype) for x in tensors(sizes)]
    out = ours(given)(*half)
    exact = {n: np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32), np.float64)
             if isinstance(x, np.ndarray) and x.dtype == np.float64 else x for n, x in given.items()}  # fmt: skip
    truth = twin.attention(*(np.array(x.astype(mx.float32), np.float64) for x in half), **exact)
    unit = {mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype]
    assert out.dtype == dtype
    assert np.abs(np.array(out.astype(mx.float32)) - truth).max() <= 3 * unit * np.abs(truth).max()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 3, "L": 8}, "window needs at most as many queries as keys, 7, got 8"),
        ({"sinks": mx.zeros(5)}, r"sinks must be one number per head, \(6,\), got shape \(5,\)"),
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": 0.5}, "dropout of 0.5 needs a random key, got none"),
    ],
    ids=str,
)
def test_refusals(given, message):
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors((given.pop("L", 5), 7)))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **given)


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_])
def test_only_floats_attend(dtype):
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors(FEW))
    with pytest.raises(ValueError, match=f"q must be a float, got {dtype}"):
        attention(q.astype(dtype), k, v, softcap=1.0)
    with pytest.raises(ValueError, match=r"mask must be an mx\.array, got ndarray"):
        attention(q, k, v, mask=np.ones((5, 7), bool))


@pytest.mark.parametrize("case", [(), ("mask",), ("softcap",), ("bias",)], ids="+".join)
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=str)
def test_the_dtype_is_that_of_the_queries(sizes, case):
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors(sizes))
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        assert ours(options(sizes, *case))(q.astype(dtype), k, v).dtype == dtype


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_has_scores_in_float32(dtype):
    """Scores that float16 does not hold, and a large bias that is the same for all keys and so changes nothing."""
    q, k, v = (mx.array(x.astype(np.float32)).astype(dtype) for x in tensors(FEW))
    wide = attention(*(x.astype(mx.float32) for x in (q * 1e3, k * 1e2, v)))
    assert mx.abs(attention(q * 1e3, k * 1e2, v).astype(mx.float32) - wide).max() <= 2.0**-7 * mx.abs(wide).max()
    shifted, plain = (attention(q, k, v, bias=mx.full((1, 7), x)).astype(mx.float32) for x in (1000.0, 0.0))
    assert mx.abs(shifted - plain).max() <= {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}[dtype] * mx.abs(plain).max()


@pytest.mark.parametrize("sizes", [FEW, MANY], ids=str)
@pytest.mark.parametrize("given", [{"mask": True}, {"causal": True}, {"causal": True, "window": 3}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_nan_in_a_hidden_key_stays_hidden(sizes, given, bias):
    L, S = sizes
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors(sizes))
    if "mask" in given:
        given = {"mask": mx.arange(S) < S - 1}
    bad = mx.concatenate([k[:, :, :-1], mx.full((B, G, 1, D), mx.nan)], axis=2)
    extra = {"bias": mx.zeros((L, S))} if bias else {}
    some, all_ = (np.array(attention(q, x, v, **given, **extra)) for x in (bad, k))
    seeing = slice(L) if "mask" in given else slice(L - 1)
    assert np.abs(some[:, :, seeing] - all_[:, :, seeing]).max() < 1e-6


def test_blocks_skip_what_is_hidden():
    """The keys of a block end with its last query, and begin with the window of its first."""
    hidden = scores.Hidden(100, 130, None, None, True, None)
    assert hidden.keys(range(0, 10)) == range(0, 40) and hidden.keys(range(90, 100)) == range(0, 130)
    hidden = scores.Hidden(100, 130, None, None, True, 7)
    assert hidden.keys(range(0, 10)) == range(24, 40) and hidden.keys(range(90, 100)) == range(114, 130)
    assert scores.Hidden(100, 130, None, None, False, 7).keys(range(0, 10)) == range(24, 46)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"causal": True}, "causal"),
        ({"causal": True, "sinks": mx.zeros(H)}, "causal"),
        ({"causal": True, "window": 300}, "causal"),
        ({"causal": True, "window": 3}, None),
        ({"causal": True, "mask": mx.ones((1, 211), mx.bool_)}, None),
        ({"window": 300}, None),
    ],
    ids=str,
)
def test_causal_by_name_on_a_gpu(monkeypatch, given, name):
    """What Metal's and CUDA's kernels are told, run here: by name they skip the blocks above the diagonal."""
    told, function = [], mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(core, "plan", lambda q, *_, **__: Plan(q[2], False, None))
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda *x, **o: told.append(o["mask"]) or function(*x, **o)
    )
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors(MANY))
    out = attention(q, k, v, **given)
    assert [mask if isinstance(mask, str) else None for mask in told] == [name]
    monkeypatch.undo()
    assert mx.abs(out - attention(q, k, v, **given)).max() < 1e-5


def test_nothing_to_attend_or_to_ask():
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors(FEW))
    assert (attention(q, k[:, :, :0], v[:, :, :0], softcap=1.0) == mx.zeros((B, H, 5, DV))).all()
    for some in (attention(q[:, :, :0], k, v, window=2), attention(q[:, :, :0], k, v)):
        assert some.shape == (B, H, 0, DV)
    assert attention(q[:0], k[:0], v[:0], causal=True).shape == (0, H, 5, DV)
    assert attention_weights(q, k[:, :, :0], softcap=1.0).shape == (B, H, 5, 0)
    assert attention_weights(q[:, :, :0], k, average=True).shape == (B, 0, 7)


@pytest.mark.parametrize("sizes", [FEW, MANY], ids=str)
@pytest.mark.parametrize("case", [(), ("mask",), ("softcap",), ("bias", "causal")], ids="+".join)
@pytest.mark.parametrize("wide", [mx.float32, mx.bfloat16])
def test_keys_and_values_beyond_the_range_of_the_queries_dtype(sizes, case, wide):
    """Keys of 70000 and more are inf in float16: they are computed with as they are; values are clipped at the end."""
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors(sizes))
    q = (q * 1e-4).astype(mx.float16)
    k = (k * 1e5).astype(wide)
    assert mx.abs(k).max() > 70000
    out = ours(options(sizes, *case))(q, k, v.astype(wide))
    exact = ours(options(sizes, *case))(*(x.astype(mx.float32) for x in (q, k, v.astype(wide))))
    assert out.dtype == mx.float16 and mx.abs(out.astype(mx.float32) - exact).max() <= 2.0**-9 * mx.abs(exact).max()
    high = ours(options(sizes, *case))(q, k, mx.full(v.shape, 1e6, wide))
    assert set(np.array(high.astype(mx.float32)).ravel().tolist()) <= {65504.0, 0.0}
    weights = ours(options(sizes, *case), attention_weights)(q, k)
    assert mx.isfinite(weights).all()


def test_a_large_bias_and_large_sinks_stay_finite_in_float16():
    q, k, v = (mx.array(x.astype(np.float32)).astype(mx.float16) for x in tensors(FEW))
    for given in (
        {"bias": mx.full((1, 7), 1e6)},
        {"sinks": mx.full((6,), 1e6)},
        {"by_distance": mx.full((6, 11), -1e6)},
    ):
        assert mx.isfinite(attention(q, k, v, **given)).all()


@pytest.mark.parametrize("case", CASES, ids="+".join)
def test_one_head_without_an_axis_of_heads(case):
    """(B, L, D) is (B, 1, L, D), with masks over (B, L, S); the twin takes it too."""
    given = options((5, 7), *case, "scale")
    for name, last in (("sinks", 1), ("by_distance", 1)):
        if name in given:
            given[name] = given[name][:last]
    for name in ("mask", "bias"):
        if name in given:
            full = np.broadcast_to(given[name], (2, 6, 5, 7))
            given[name] = full[:, 0]
    q, k, v = (x[:, 0] for x in tensors((5, 7)))
    check_forward(ours(given), theirs(given), q, k, v)
    check_gradient(ours(given), theirs(given), q, k, v)
    found = ours(given)(*(mx.array(x.astype(np.float32)) for x in (q, k, v)))
    four = {n: x[:, None] if n in ("mask", "bias") else x for n, x in given.items()}
    same = ours(four)(*(mx.array(x[:, None].astype(np.float32)) for x in (q, k, v)))[:, 0]
    assert found.shape == (2, 5, v.shape[-1]) and (found == same).all()
    check_forward(ours(given, attention_weights), theirs(given, twin.attention_weights), q, k)


def test_axes_that_differ_are_refused():
    q, k, v = (mx.array(x.astype(np.float32)) for x in tensors(FEW))
    with pytest.raises(ValueError, match=r"k must be \(batch, length, dim\), as q is, \(2, 5, .*\), got shape \(2, "):
        attention(q[:, 0], k, v)
    with pytest.raises(ValueError, match=r"k must be \(batch, heads, length, dim\) .*, got shape \(2, 7, "):
        attention(q, k[:, 0], v[:, 0])


@pytest.mark.parametrize("case", [(), ("mask",)], ids="+".join)
def test_infinite_values_stay_infinite_in_float16(case):
    q, k, v = (mx.array(x.astype(np.float32)).astype(mx.float16) for x in tensors(FEW))
    v[0, 0, 1, 3] = mx.inf
    assert mx.isinf(ours(options(FEW, *case))(q, k, v)).any()
