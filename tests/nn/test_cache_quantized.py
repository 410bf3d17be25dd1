"""Keys and values in 8 and 4 bits: the codes, and attention to them, against the twin over what the codes mean."""

import itertools
import math
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget

from mlx_xformer.nn.attention import core
from mlx_xformer.nn.attention.core import attention
from mlx_xformer.nn.cache import Quantized, quantized
from mlx_xformer.reference.nn import attention as twin
from mlx_xformer.reference.nn import linear

B, D, DV = 2, 11, 37
GROUPS = {"MHA": (5, 5), "GQA": (6, 2), "MQA": (3, 1)}
LENGTHS = {"one query": (1, 61), "few": (2, 61), "many": (67, 131), "blocks": (131, 131)}
OPTIONS = ("causal", "window", "mask", "bias", "sinks", "softcap")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("width", [1, 31, 32, 40, 64, 80, 96, 128, 192])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes(bits, width, dtype):
    """Those of the twin, bit for bit in float32; off by half a step at most, or by one at the end of a range."""
    x = np.random.default_rng(width).normal(size=(2, 3, 5, width)).astype(np.float32)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = 0, 1.5, np.abs(x[0, 0, 2])
    given = mx.array(x).astype(dtype)
    found = Quantized.of(given, bits)
    assert (found.shape, found.ndim, found.dtype) == (x.shape, 4, dtype)
    assert found.group_size in (32, 64) and found.packed.shape[-1] * 32 // bits % found.group_size == 0
    exact = np.array(given.astype(mx.float32))
    more = found.packed.shape[-1] * 32 // bits - width
    codes, scales, biases = linear.quantize(np.pad(exact, [(0, 0)] * 3 + [(0, more)]), bits, found.group_size)
    meant = np.array(found.dequantized(mx.float32))
    if dtype == mx.float32:
        assert (np.array(found.packed) == linear.pack(codes, bits)).all()
        assert (linear.unpack(np.array(found.packed), bits) == codes).all()
        assert (np.array(found.scales) == scales).all() and (np.array(found.biases) == biases).all()
        assert np.abs(meant - linear.dequantize(codes, scales, biases)[..., :width]).max() <= 1e-6
    unit = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype]
    step = np.repeat(np.abs(scales), found.group_size, axis=-1)[..., :width]
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    error = np.abs(meant - exact)
    assert (error <= step * (1 + 2**bits * unit) + 2 * unit * largest).all()
    assert np.median(error / step) <= 0.5


def given(heads, sizes, *names, seed=0):
    """Queries, keys, values and options, the mask and the bias with a row that sees nothing each."""
    (H, G), (L, S), rng = GROUPS[heads], LENGTHS[sizes], np.random.default_rng(seed)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((B, H, L, D), (B, G, S, D), (B, G, S, DV))]
    mask, bias = rng.random((B, 1, L, S)) > 0.3, rng.normal(size=(H, L, S)).astype(np.float32)
    mask[1, 0, L // 2], bias[-1, L // 2] = False, -np.inf
    options = {"causal": True, "window": 23, "mask": mask, "bias": bias, "softcap": 1.7}
    options["sinks"] = rng.normal(size=H).astype(np.float32)
    return arrays, {name: options[name] for name in names}


def check(arrays, options, bits, dtype=mx.float32):
    """attention() to the codes against the twin over what they mean, whose float32 form computes that in float32."""
    q, k, v = (mx.array(x).astype(dtype) for x in arrays)
    k, v = Quantized.of(k, bits), Quantized.of(v, bits)
    out = attention(q, k, v, **{n: mx.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()})
    answers = []
    for precision in (np.float64, np.float32):
        pair = []
        for x in (k, v):
            scales, biases = (np.array(y.astype(mx.float32), precision) for y in (x.scales, x.biases))
            codes = linear.unpack(np.array(x.packed), bits)
            pair.append(linear.dequantize(codes, scales, biases)[..., : x.width])
        ready = {n: x.astype(precision) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x
                 for n, x in options.items()}  # fmt: skip
        answers.append(twin.attention(np.array(q.astype(mx.float32), precision), *pair, **ready))
    assert out.dtype == dtype
    if dtype == mx.float32:
        assert_within_budget(np.array(out), *answers)
    else:  # the output is rounded; sums are float32
        unit = {mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype]
        assert np.abs(np.array(out.astype(mx.float32)) - answers[0]).max() <= 3 * unit * np.abs(answers[0]).max()


CASES = [(), *((name,) for name in OPTIONS), ("causal", "mask"), ("causal", "window", "bias"), OPTIONS]


@pytest.mark.parametrize("case", CASES, ids="+".join)
@pytest.mark.parametrize("sizes", LENGTHS)
@pytest.mark.parametrize(("heads", "bits"), list(itertools.product(GROUPS, (8, 4))))
def test_against_the_twin(heads, bits, sizes, case):
    """GQA with a bias for each head, sinks and widths without a group among them, which mlx-lm 0.32.2 refuses."""
    check(*given(heads, sizes, *case), bits)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("case", [(), ("causal", "bias"), OPTIONS], ids="+".join)
@pytest.mark.parametrize("sizes", LENGTHS)
def test_half_precision(sizes, case, dtype):
    check(*given("GQA", sizes, *case), 8, dtype)


@pytest.mark.parametrize(
    "shape", [(61,), (67, 1), (1, 1, 1, 131), (2, 1, 1, 131), (2, 6, 67, 131), (6, 1, 1), ()], ids=str
)
def test_masks_and_biases_of_any_shape(shape):
    rng = np.random.default_rng(0)
    shape = tuple(131 if n == 61 else n for n in shape)
    arrays, _ = given("GQA", "many")
    extra = {"mask": np.asarray(rng.random(shape) > 0.3), "bias": np.asarray(rng.normal(size=shape), np.float32)}
    check(arrays, extra, 8)


@pytest.mark.parametrize("case", [(), ("causal",), ("window",), ("causal", "window", "mask", "bias")], ids="+".join)
def test_small_pieces(case, monkeypatch):
    """Stretches of positions and blocks of queries, as at long contexts."""
    monkeypatch.setattr(quantized, "_FLOATS", 1)  # 64 positions
    monkeypatch.setattr(core, "_BLOCK", 1)  # 16 queries
    for sizes in LENGTHS:
        check(*given("GQA", sizes, *case), 8)
        check(*given("MHA", sizes, *case), 4)


@pytest.mark.parametrize("case", [(), ("causal", "bias"), OPTIONS], ids="+".join)
def test_what_a_gpu_is_given(case, monkeypatch):
    """Its choices, run here: quantized products for up to 8 queries, and whole heads for more."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr("mlx_xformer.backend.dispatch.vectorizes", lambda x: False)
    for sizes in LENGTHS:
        check(*given("GQA", sizes, *case), 8)


def test_what_cuda_is_given(monkeypatch):
    """It has no product with parts of a longer line, as caches show them: strided heads come in order."""
    function, seen = mx.quantized_matmul, []
    monkeypatch.setattr("mlx_xformer.backend.dispatch.HAS_CUDA", True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, *y, **o: seen.extend(y) or function(x, *y, **o))
    line = Quantized.of(mx.random.normal((2, 3, 64, 32)), 8)
    part = Quantized(*(x[:, :, 5:43] for x in line.parts), line.group_size, 8, 32)
    x = mx.random.normal((2, 3, 1, 32))
    out = part.scores(x), part.weighed(mx.random.normal((2, 3, 1, 38)))
    mx.eval(out, seen)
    assert len(seen) == 6
    for y in seen:
        assert memoryview(y).strides == tuple(4 * math.prod(y.shape[axis + 1 :]) for axis in range(4))
    assert mx.allclose(out[0], x @ part.dequantized().swapaxes(-1, -2), atol=1e-4)


def test_gradient_of_the_queries():
    """That of attention to the floats."""
    for sizes in LENGTHS:
        arrays, options = given("GQA", sizes, "causal", "softcap")
        q, k, v = (mx.array(x) for x in arrays)
        k, v = Quantized.of(k, 8), Quantized.of(v, 8)
        floats = k.dequantized(), v.dequantized()
        u = mx.array(np.random.default_rng(1).normal(size=(*q.shape[:3], DV)).astype(np.float32))
        found, wanted = (mx.vjp(partial(attention, k=x, v=y, **options), [q], [u])[1][0] for x, y in ((k, v), floats))
        assert mx.abs(found - wanted).max() <= 2e-5 * mx.abs(wanted).max()


def test_nothing_to_attend_or_to_ask():
    k, v = Quantized.of(mx.zeros((B, 2, 5, D)), 8), Quantized.of(mx.zeros((B, 2, 5, DV)), 8)
    assert attention(mx.zeros((B, 4, 0, D)), k, v).shape == (B, 4, 0, DV)
    q = mx.random.normal((B, 4, 3, D))
    assert (attention(q, k, v, mask=mx.zeros((1, 5), mx.bool_)) == mx.zeros((B, 4, 3, DV))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k, v.dequantized(), {}), "quantized keys need quantized values, and no dropout"),
        (lambda q, k, v: (q, k.dequantized(), v, {}), "quantized keys need quantized values"),
        (lambda q, k, v: (q, k, v, {"dropout": 0.1, "key": mx.random.key(0)}), "and no dropout"),
        (lambda q, k, v: (q[..., :5], k, v, {}), "k must have the head_dim of q, 5, got 11"),
        (lambda q, k, v: (q[:, :3], k, v, {}), "num_kv_heads must divide num_heads, 3, got 2"),
        (lambda q, k, v: (q, k, v, {"window": 0}), "window must be at least 1, got 0"),
    ],
)
def test_refusals(change, message):
    q, k, v = (mx.array(x) for x in given("GQA", "few")[0])
    q, k, v, options = change(q, Quantized.of(k, 8), Quantized.of(v, 8))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **options)
