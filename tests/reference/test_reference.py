"""The NumPy twin against the formulas it stands for, written out a second time as plain loops."""

import math
import random
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_xformer.reference import backend as K
from mlx_xformer.reference import separation
from mlx_xformer.reference.models.htdemucs import htdemucs
from mlx_xformer.reference.models.htdemucs import layers as HL
from mlx_xformer.reference.models.htdemucs import model as HM
from mlx_xformer.reference.models.htdemucs import transformer as HT
from mlx_xformer.reference.nn import attention as A
from mlx_xformer.reference.nn import layers as L
from mlx_xformer.reference.nn import masks, positions, spectral

DTYPES = (np.float32, np.float64)


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(got, want, tolerance=1e-13):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# A tiny model ----------------------------------------------------------------------------------------------------

CONFIG = SimpleNamespace(
    sources=("a", "b", "c"), audio_channels=2, samplerate=8000, segment=Fraction(3, 10), use_train_segment=True,
    channels=4, channels_time=None, growth=2, nfft=512, depth=3, rewrite=True, freq_emb=0.2, emb_scale=10,
    kernel_size=8, stride=4, time_stride=2, context=1, context_enc=0, norm_starts=9, norm_groups=2,
    dconv_mode=3, dconv_depth=2, dconv_comp=2, bottom_channels=12, t_layers=2, t_emb="sin", t_hidden_scale=2.0,
    t_heads=2, t_norm_in=True, t_norm_in_group=False, t_group_norm=False, t_norm_first=True, t_norm_out=True,
    t_max_period=10000.0, t_layer_scale=True, t_gelu=True, t_weight_pos_embed=1.0, t_cape_mean_normalize=True,
    t_cross_first=False,
)  # fmt: skip


def config(**changes):
    return SimpleNamespace(**{**vars(CONFIG), **changes})


def layer_shapes(cfg, name, width, cin, cout, kernel, *, decoder, flat, empty):
    """Names and shapes of one encoder or decoder layer; `width` is that of its rewrite and DConv."""
    shapes = {f"{name}.{'conv_tr' if decoder else 'conv'}": (cout, kernel, cin)}
    if not empty and cfg.rewrite:
        taps = 2 * (cfg.context if decoder else cfg.context_enc) + 1
        kernel_shape = () if taps == 1 else (taps,) if flat else (taps, taps)
        shapes[f"{name}.rewrite"] = (2 * width, *kernel_shape, width)
    if not empty and cfg.dconv_mode & (2 if decoder else 1):
        hidden = int(width / cfg.dconv_comp)
        for d in range(abs(cfg.dconv_depth)):
            shapes |= {f"{name}.dconv.layers.{d}.conv": (hidden, 3, width)}
            shapes |= {f"{name}.dconv.layers.{d}.expand": (2 * width, hidden)}
            shapes |= {f"{name}.dconv.layers.{d}.norm1": hidden, f"{name}.dconv.layers.{d}.norm2": 2 * width}
            shapes |= {f"{name}.dconv.layers.{d}.layer_scale": (width,)}
    return shapes


def transformer_shapes(cfg, dim):
    shapes = {"norm_in": dim, "norm_in_t": dim} if cfg.t_norm_in else {}
    hidden = int(dim * cfg.t_hidden_scale)
    for branch in ("layers", "layers_t"):
        for index in range(cfg.t_layers):
            name, crosses = f"{branch}.{index}", index % 2 == (0 if cfg.t_cross_first else 1)
            attn = f"{name}.cross_attn" if crosses else f"{name}.self_attn"
            shapes |= {f"{attn}.{p}_proj": (dim, dim) for p in ("q", "k", "v", "out")}
            shapes |= {f"{name}.ffn.linear1": (hidden, dim), f"{name}.ffn.linear2": (dim, hidden)}
            shapes |= {f"{name}.norm{i}": dim for i in range(1, 4 if crosses else 3)} | {f"{name}.norm_out": dim}
            shapes |= {f"{name}.gamma_{i}": (dim,) for i in (1, 2)}
    return {f"crosstransformer.{name}": shape for name, shape in shapes.items()}


def random_params(cfg, seed=0, dtype=np.float64):
    """Weights of a model without level norms; gains and biases are never 0 or 1."""
    S, C = len(cfg.sources), cfg.audio_channels
    shapes, found = {}, HM.levels(cfg)
    time_levels = sum(level.freq for level in found)
    width, cin, cin_t, freqs = cfg.channels, 2 * C, C, cfg.nfft // 2
    for i, level in enumerate(found):
        out, out_t = (2 * C * S, C * S) if i == 0 else (cin, cin_t)
        kernel = (freqs if level.merges else cfg.kernel_size) if level.freq else 2 * cfg.time_stride
        outer, outer_t = f"decoder.{cfg.depth - 1 - i}", f"tdecoder.{time_levels - 1 - i}"
        kind = {"flat": not level.freq, "empty": False}
        shapes |= layer_shapes(cfg, f"encoder.{i}", width, cin, width, kernel, decoder=False, **kind)
        shapes |= layer_shapes(cfg, outer, width, width, out, kernel, decoder=True, **kind)
        if level.freq:
            kind, k = {"flat": True, "empty": level.merges}, cfg.kernel_size
            shapes |= layer_shapes(cfg, f"tencoder.{i}", width, cin_t, width, k, decoder=False, **kind)
            shapes |= layer_shapes(cfg, outer_t, width, width, out_t, k, decoder=True, **kind)
            freqs = 1 if level.merges else freqs // cfg.stride
        if i == 0 and cfg.freq_emb:
            shapes["freq_emb"] = (freqs, width)
        cin = cin_t = width
        width *= cfg.growth
    bottom = cfg.bottom_channels
    for name in ("channel_upsampler", "channel_downsampler") if bottom else ():
        shape = (bottom, cin) if name == "channel_upsampler" else (cin, bottom)
        shapes |= {name: shape, f"{name}_t": shape}
    if cfg.t_layers:
        shapes |= transformer_shapes(cfg, bottom or cin)

    r = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.items():
        if name.endswith(("layer_scale", "gamma_1", "gamma_2")):
            params[f"{name}.scale"] = r.uniform(0.3, 0.9, shape)
        elif isinstance(shape, int):
            params |= {
                f"{name}.weight": r.uniform(0.7, 1.3, shape),
                f"{name}.bias": r.uniform(-0.2, 0.2, shape),
            }
        else:
            fan_in = 1 if name == "freq_emb" else math.prod(shape[1:])
            params[f"{name}.weight"] = r.standard_normal(shape) / math.sqrt(fan_in)
            if name != "freq_emb":
                params[f"{name}.bias"] = r.uniform(-0.1, 0.1, shape[0])
    return {name: value.astype(dtype) for name, value in params.items()}


# Kernels ---------------------------------------------------------------------------------------------------------


def test_erf_is_accurate_to_rounding():
    x = np.concatenate([np.linspace(-7, 7, 20011), np.geomspace(1e-300, 1e-3, 1009), [0.46875, 4.0, 6.0]])
    want = np.array([math.erf(v) for v in x])
    got = K.erf(x)
    assert np.all(np.abs(got - want) <= 1e-15 * np.abs(want))
    got = K.erf(x.astype(np.float32))
    want = np.array([math.erf(v) for v in x.astype(np.float32)])
    assert np.max(np.abs(got - want) / np.maximum(np.abs(want), 1e-30)) < 4e-7


def test_erf_at_the_ends():
    got = K.erf(np.array([0.0, -0.0, np.inf, -np.inf, np.nan]))
    np.testing.assert_array_equal(got, [0.0, -0.0, 1.0, -1.0, np.nan])
    assert math.copysign(1, got[1]) == -1


def test_gelu_forms():
    x = np.linspace(-6, 6, 1009)
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    close(K.gelu(x), x * phi, 1e-15)
    tanh = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    close(K.gelu_tanh(x), np.array(tanh), 1e-15)
    assert 1e-4 < np.max(np.abs(K.gelu(x) - K.gelu_tanh(x))) < 1e-3


def test_relu_sigmoid_glu():
    x = np.array([-1e4, -3.0, 0.0, 0.25, 1e4])
    np.testing.assert_array_equal(K.relu(x), [0, 0, 0, 0.25, 1e4])
    close(K.sigmoid(x), np.array([0, 1 / (1 + math.exp(3)), 0.5, 1 / (1 + math.exp(-0.25)), 1]), 1e-16)
    y = draw(3, 10, 5)
    close(K.glu(y, axis=1), y[:, :5] / (1 + np.exp(-y[:, 5:])))


def test_softmax_of_large_numbers():
    x = np.array([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4]])
    e = math.exp(-1)
    close(K.softmax(x), np.array([[1 / (1 + e), e / (1 + e), 0], [1 / 3, 1 / 3, 1 / 3]]), 1e-15)
    close(K.softmax(x.T, axis=0), K.softmax(x).T, 0)


def test_mean_var_is_biased_and_accurate_in_float32():
    x = draw(3, 5, 7, 11)
    mean, var = K.mean_var(x, (1, 3))
    for i in range(3):
        for j in range(7):
            rows = x[i, :, j].ravel()
            assert mean[i, 0, j, 0] == pytest.approx(sum(rows) / 55, rel=1e-13)
            assert var[i, 0, j, 0] == pytest.approx(sum((rows - sum(rows) / 55) ** 2) / 55, rel=1e-13)
    x = draw(2, 200_003, 3, dtype=np.float32) + np.float32(10)
    mean, var = K.mean_var(x, (1,))
    assert np.max(np.abs(mean / x.astype(np.float64).mean(axis=1, keepdims=True) - 1)) < 2e-7
    assert np.max(np.abs(var / x.astype(np.float64).var(axis=1, keepdims=True) - 1)) < 2e-6


# Layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (4, 2, 1), (1, 4, 4), (3, 1, 2)])
def test_conv1d_is_a_triple_loop(stride, padding, dilation):
    x, w, b = draw(2, 23, 3), draw(5, 3, 3, seed=1), draw(5, seed=2)
    length = (23 + 2 * padding - 2 * dilation - 1) // stride + 1
    want = np.tile(b, (2, length, 1))
    for t in range(length):
        for k in range(3):
            s = t * stride + k * dilation - padding
            if 0 <= s < 23:
                want[:, t] += np.einsum("bc,oc->bo", x[:, s], w[:, k])
    close(L.conv1d({"weight": w, "bias": b}, x, stride=stride, padding=padding, dilation=dilation), want)


def test_conv2d_is_a_loop_over_taps():
    x, w, b = draw(2, 7, 5, 3), draw(11, 3, 3, 3, seed=1), draw(11, seed=2)
    want = np.tile(b, (2, 7, 5, 1))
    for t, f, i, j in np.ndindex(7, 5, 3, 3):
        if 0 <= t + i - 1 < 7 and 0 <= f + j - 1 < 5:
            want[:, t, f] += np.einsum("bc,oc->bo", x[:, t + i - 1, f + j - 1], w[:, i, j])
    close(L.conv2d({"weight": w, "bias": b}, x, padding=1), want)


@pytest.mark.parametrize("stride", [1, 4, 9])
def test_conv_transpose1d_is_a_triple_loop(stride):
    x, w, b = draw(2, 13, 3), draw(5, 7, 3, seed=1), draw(5, seed=2)
    want = np.tile(b, (2, 12 * stride + 7, 1))
    for t in range(13):
        for k in range(7):
            want[:, t * stride + k] += np.einsum("bc,oc->bo", x[:, t], w[:, k])
    close(L.conv_transpose1d({"weight": w, "bias": b}, x, stride=stride), want)


@pytest.mark.parametrize("num_groups", [1, 3, 6])
def test_group_norm_is_its_formula(num_groups):
    x, params = draw(2, 5, 7, 6), {"weight": draw(6, seed=1), "bias": draw(6, seed=2)}
    want, size = np.empty_like(x), 6 // num_groups
    for b in range(2):
        for g in range(num_groups):
            c = slice(g * size, (g + 1) * size)
            part = x[b, :, :, c]
            normed = (part - part.mean()) / math.sqrt(part.var() + 0.01)
            want[b, :, :, c] = normed * params["weight"][c] + params["bias"][c]
    close(L.group_norm(params, x, num_groups=num_groups, eps=0.01), want)
    rows = np.stack([L.group_norm(params, x[:, :, f], num_groups=num_groups) for f in range(7)], axis=2)
    close(L.group_norm(params, x, num_groups=num_groups, axes=(1,)), rows)


def test_layer_norm_linear_feed_forward_and_layer_scale():
    x = draw(2, 3, 5)
    norm = {"weight": draw(5, seed=1), "bias": draw(5, seed=2)}
    want = [[(v - v.mean()) / math.sqrt(v.var() + 1e-5) * norm["weight"] + norm["bias"] for v in m] for m in x]
    close(L.layer_norm(norm, x), np.array(want))
    p = {
        "linear1.weight": draw(7, 5, seed=3),
        "linear1.bias": draw(7, seed=4),
        "linear2.weight": draw(5, 7, seed=5),
    }
    hidden = np.maximum(np.einsum("blc,hc->blh", x, p["linear1.weight"]) + p["linear1.bias"], 0)
    close(L.feed_forward(p, x, activation=K.relu), np.einsum("blh,ch->blc", hidden, p["linear2.weight"]))
    close(L.layer_scale({"scale": norm["bias"]}, x), np.einsum("blc,c->blc", x, norm["bias"]))
    assert L.sub({"a.b": x, "a.c.d": x, "ab.c": x}, "a").keys() == {"b", "c.d"}


# Attention and its masks -----------------------------------------------------------------------------------------


def attention_by_rows(q, k, v, scale, mask, bias):
    (B, H, n, _), (_, Hkv, S, Dv) = q.shape, v.shape
    out = np.zeros((B, H, n, Dv))
    for b, h, i in np.ndindex(B, H, n):
        g = h // (H // Hkv)
        kept = [(j, scale * q[b, h, i] @ k[b, g, j] + bias[b, h, i, j]) for j in range(S) if mask[b, h, i, j]]
        kept = [(j, math.exp(score)) for j, score in kept if score > -math.inf]
        for j, e in kept:
            out[b, h, i] += e / sum(e for _, e in kept) * v[b, g, j]
    return out


def test_attention_is_a_weighted_mean_row_by_row():
    q, k, v = draw(2, 6, 5, 3), draw(2, 2, 7, 3, seed=1), draw(2, 2, 7, 11, seed=2)
    mask = np.random.default_rng(3).random((2, 1, 5, 7)) < 0.6
    mask[1, 0, 2] = False  # a row that sees nothing by its mask
    bias = draw(6, 5, 7, seed=4)
    bias[3, 4] = -np.inf  # and one by its bias
    full = np.broadcast_to(mask, (2, 6, 5, 7)), np.broadcast_to(bias, (2, 6, 5, 7))
    got = A.attention(q, k, v, scale=0.7, mask=mask, bias=bias)
    close(got, attention_by_rows(q, k, v, 0.7, *full))
    assert np.all(got[1, :, 2] == 0) and np.all(got[:, 3, 4] == 0) and np.all(np.any(got[0, :3] != 0, axis=-1))

    lower = np.array([[j <= i + 2 for j in range(7)] for i in range(5)])
    got = A.attention(q, k, v, mask=mask, bias=bias, causal=True)
    close(got, attention_by_rows(q, k, v, 3**-0.5, full[0] & lower, full[1]))


def test_attention_of_no_keys_is_zero():
    got = A.attention(draw(1, 2, 3, 5), np.zeros((1, 2, 0, 5)), np.zeros((1, 2, 0, 7)))
    np.testing.assert_array_equal(got, np.zeros((1, 2, 3, 7)))


def test_attention_of_huge_scores_is_finite():
    q, k, v = draw(1, 1, 3, 5) * 1e4, draw(1, 1, 7, 5, seed=1), draw(1, 1, 7, 2, seed=2)
    best = np.argmax(q[0, 0] @ k[0, 0].T, axis=-1)
    close(A.attention(q, k, v)[0, 0], v[0, 0, best])


def test_attention_layer_projects_and_groups():
    x, source = draw(2, 3, 12), draw(2, 5, 12, seed=1)
    shapes = {"q_proj": (12, 12), "k_proj": (6, 12), "v_proj": (6, 12), "out_proj": (12, 12)}
    p = {f"{n}.weight": draw(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    p |= {f"{n}.bias": draw(s[0], seed=9 + i) for i, (n, s) in enumerate(shapes.items())}

    def project(name, y):
        return np.einsum("ble,oe->blo", y, p[f"{name}.weight"]) + p[f"{name}.bias"]

    q, k, v = project("q_proj", x), project("k_proj", source), project("v_proj", source)
    parts = [slice(3 * h, 3 * h + 3) for h in range(4)]
    heads = []
    for h in range(4):
        g = parts[h // 2]
        weights = K.softmax(np.einsum("bld,bsd->bls", q[..., parts[h]], k[..., g]) / math.sqrt(3))
        heads.append(np.einsum("bls,bsd->bld", weights, v[..., g]))
    want = project("out_proj", np.concatenate(heads, axis=-1))
    close(A.attention_layer(p, x, source, num_heads=4, num_kv_heads=2), want)


def test_masks_say_who_attends():
    for n, S in [(3, 5), (5, 5), (4, 2)]:
        lower, upper = masks.causal_mask(n, S), masks.causal_mask(n, S, alignment="upper_left")
        for i, j in np.ndindex(n, S):
            assert lower[i, j] == (j - (S - n) <= i) and upper[i, j] == (j <= i)
    got = masks.padding_mask([0, 2, 3], 3)
    np.testing.assert_array_equal(got[:, 0, 0], [[0, 0, 0], [1, 1, 0], [1, 1, 1]])
    assert got.shape == (3, 1, 1, 3)


# Positions -------------------------------------------------------------------------------------------------------


def test_sinusoidal_1d_is_its_formula():
    for shift, centered in [(0, False), (13, False), (0, True), (5, True)]:
        got = positions.sinusoidal_1d(11, 10, shift=shift, max_period=321.0, centered=centered)
        for t, i in np.ndindex(11, 5):
            phase = (t - 5 if centered else t + shift) / 321.0 ** (i / 4)
            assert got[t, i] == pytest.approx(math.cos(phase), abs=1e-14)
            assert got[t, 5 + i] == pytest.approx(math.sin(phase), abs=1e-14)


def test_sinusoidal_2d_has_width_first():
    got = positions.sinusoidal_2d(5, 7, 12, max_period=321.0)
    assert got.shape == (7, 5, 12)
    for w, h, i in np.ndindex(7, 5, 3):
        rate = math.exp(-math.log(321.0) * 2 * i / 6)
        want = [math.sin(w * rate), math.cos(w * rate), math.sin(h * rate), math.cos(h * rate)]
        assert got[w, h, [2 * i, 2 * i + 1, 6 + 2 * i, 7 + 2 * i]] == pytest.approx(want, abs=1e-14)


# Spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("center", "normalized"), [(True, True), (False, False)])
def test_stft_is_a_dft_of_windowed_frames(center, normalized):
    x, n, hop = draw(2, 61), 12, 5
    z = spectral.stft(x, n_fft=n, hop_length=hop, center=center, normalized=normalized)
    assert z.shape == (2, 1 + (61 + (12 if center else 0) - 12) // hop, 7)
    for t, f in np.ndindex(*z.shape[1:]):
        total = 0
        for i in range(n):
            s = t * hop + i - (n // 2 if center else 0)
            s = -s if s < 0 else 2 * 60 - s if s > 60 else s  # reflected
            window = math.sin(math.pi * i / n) ** 2
            total = total + window * x[:, s] * np.exp(-2j * math.pi * f * i / n)
        close(z[:, t, f], total / (math.sqrt(n) if normalized else 1))


@pytest.mark.parametrize(("n_fft", "hop", "length"), [(64, 16, 499), (30, 7, 113), (16, 4, 9)])
def test_istft_undoes_stft(n_fft, hop, length):
    x = draw(2, 3, length)
    for normalized in (True, False):
        z = spectral.stft(x, n_fft=n_fft, hop_length=hop, normalized=normalized)
        reached = min(length, (z.shape[-2] - 1) * hop + n_fft // 2)
        y = spectral.istft(z, n_fft=n_fft, hop_length=hop, length=length, normalized=normalized)
        close(y[..., :reached], x[..., :reached])
        longer = spectral.istft(z, n_fft=n_fft, hop_length=hop, length=length + 997, normalized=normalized)
        close(longer[..., :reached], x[..., :reached])
        assert np.all(longer[..., length + n_fft :] == 0)


def test_istft_ignores_what_a_real_signal_cannot_have():
    z = draw(5, 9) + 1j * draw(5, 9, seed=1)
    real = z.copy()
    real[:, [0, -1]] = real[:, [0, -1]].real
    args = {"n_fft": 16, "hop_length": 4, "length": 16}
    close(spectral.istft(z, **args), spectral.istft(real, **args))


def test_reflect_pad_extends_short_inputs_with_zeros_first():
    x = np.array([1.0, 2, 3, 4])
    np.testing.assert_array_equal(spectral.reflect_pad(x, 2, 3), [3, 2, 1, 2, 3, 4, 3, 2, 1])
    np.testing.assert_array_equal(spectral.reflect_pad(x, 2, 6), [3, 2, 1, 2, 3, 4, 0, 0, 0, 0, 0, 4])
    np.testing.assert_array_equal(spectral.reflect_pad(x[:2], 5, 1), [0, 0, 0, 0, 0, 1, 2, 0])


# HTDemucs --------------------------------------------------------------------------------------------------------


def test_dconv_treats_each_frequency_as_a_sequence():
    cfg = config(dconv_depth=3)
    params = L.sub(random_params(cfg), "encoder.1.dconv")
    x = draw(2, 13, 5, 8)
    got = HL.dconv(params, x, depth=3)
    close(got, np.stack([HL.dconv(params, x[:, :, f], depth=3) for f in range(5)], axis=2))
    y = x[:, :, 0]
    for d in range(3):
        p = L.sub(params, f"layers.{d}")
        h = L.conv1d(L.sub(p, "conv"), y, padding=2**d, dilation=2**d)
        h = K.gelu(L.group_norm(L.sub(p, "norm1"), h, num_groups=1))
        h = L.group_norm(L.sub(p, "norm2"), L.linear(L.sub(p, "expand"), h), num_groups=1)
        y = y + p["layer_scale.scale"] * h[..., :8] / (1 + np.exp(-h[..., 8:]))
    close(got[:, :, 0], y)
    assert not np.allclose(got, HL.dconv(params, x, depth=-3))


def test_encoder_pads_time_on_the_right_and_decoder_cuts_it_back():
    cfg = config(dconv_mode=0)
    params = random_params(cfg)
    conv = {"stride": 4, "padding": 2}
    x = draw(1, 23, 2)
    longer = np.concatenate([x, np.zeros((1, 1, 2))], axis=1)
    enc = L.sub(params, "tencoder.0")
    close(HL.encoder_layer(enc, x, **conv), HL.encoder_layer(enc, longer, **conv), 0)
    y, pre = HL.decoder_layer(L.sub(params, "tdecoder.2"), draw(1, 6, 4), draw(1, 6, 4), 23, last=True, **conv)
    whole = L.conv_transpose1d(L.sub(params, "tdecoder.2.conv_tr"), pre, stride=4)
    close(y, whole[:, 2:25], 0)


def normed(*names, width, seed=0):
    r = np.random.default_rng(seed)
    leaves = {f"{name}.weight": r.uniform(0.7, 1.3, width) for name in names}
    return leaves | {f"{name}.bias": r.uniform(-0.2, 0.2, width) for name in names}


def test_encoder_layer_is_its_parts_in_order():
    params = L.sub(random_params(config(context_enc=1)), "encoder.1")
    params |= normed("norm1", width=8) | normed("norm2", width=16, seed=1)
    x, inject = draw(2, 5, 16, 4), draw(2, 5, 8, seed=1)
    kw = {"stride": 4, "padding": 2, "norm_groups": 2, "context": 1, "dconv_depth": 2}
    y = np.stack([L.conv1d(L.sub(params, "conv"), x[:, t], stride=4, padding=2) for t in range(5)], axis=1)
    y = K.gelu(L.group_norm(L.sub(params, "norm1"), y + inject[:, :, None], num_groups=2))
    y = HL.dconv(L.sub(params, "dconv"), y, depth=2)
    y = L.group_norm(L.sub(params, "norm2"), L.conv2d(L.sub(params, "rewrite"), y, padding=1), num_groups=2)
    close(HL.encoder_layer(params, x, inject, **kw), y[..., :8] / (1 + np.exp(-y[..., 8:])))
    close(
        HL.encoder_layer(params, x[:, 0], empty=True, **kw),
        L.conv1d(L.sub(params, "conv"), x[:, 0], stride=4, padding=2),
    )


def test_decoder_layer_is_its_parts_in_order():
    params = L.sub(random_params(config()), "decoder.1")
    params |= normed("norm1", width=16) | normed("norm2", width=4, seed=1)
    x, skip = draw(2, 5, 3, 8), draw(2, 5, 3, 8, seed=1)
    kw = {"stride": 4, "padding": 2, "norm_groups": 2, "context": 1, "dconv_depth": 2}
    y = L.conv2d(L.sub(params, "rewrite"), x + skip, padding=1)
    y = L.group_norm(L.sub(params, "norm1"), y, num_groups=2)
    y = HL.dconv(L.sub(params, "dconv"), y[..., :8] / (1 + np.exp(-y[..., 8:])), depth=2)
    z = np.stack([L.conv_transpose1d(L.sub(params, "conv_tr"), y[:, t], stride=4) for t in range(5)], axis=1)
    z = L.group_norm(L.sub(params, "norm2"), z, num_groups=2)[:, :, 2:14]
    got, pre = HL.decoder_layer(params, x, skip, 5, **kw)
    close(got, K.gelu(z))
    close(pre, y)
    close(HL.decoder_layer(params, x, skip, 5, last=True, **kw)[0], z)
    bare = HL.decoder_layer(params, pre, None, 5, empty=True, **kw)
    close(bare[0], K.gelu(z))
    close(bare[1], pre, 0)


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("groups", [False, True, 3])
def test_cross_transformer_layer_is_its_parts_in_order(crosses, first, groups):
    cfg = config(t_norm_first=first, t_group_norm=groups, t_gelu=groups != 3, t_layer_scale=not first or crosses)
    params = L.sub(random_params(cfg), f"crosstransformer.layers.{int(crosses)}")
    x, source = draw(2, 5, 12), draw(2, 7, 12, seed=1) if crosses else None

    def norm(name, y):
        if groups:
            return L.group_norm(L.sub(params, name), y, num_groups=int(groups))
        return L.layer_norm(L.sub(params, name), y)

    def attend(q, k):
        return A.attention_layer(L.sub(params, "cross_attn" if crosses else "self_attn"), q, k, num_heads=2)

    def feed(y):
        return L.feed_forward(L.sub(params, "ffn"), y, activation=K.relu if groups == 3 else K.gelu)

    one, two = (params[f"gamma_{i}.scale"] if cfg.t_layer_scale else 1 for i in (1, 2))
    if first:
        y = x + one * attend(norm("norm1", x), norm("norm2", source) if crosses else None)
        y = y + two * feed(norm("norm3" if crosses else "norm2", y))
        y = L.group_norm(L.sub(params, "norm_out"), y, num_groups=1)
    else:
        y = norm("norm1", x + one * attend(x, source))
        y = norm("norm2", y + two * feed(y))
    close(HT.cross_transformer_layer(params, cfg, x, source), y)


def test_tokens_enter_normed_with_their_positions():
    x, xt = draw(2, 3, 5, 12), draw(2, 7, 12, seed=1)
    params = normed("norm_in", width=12) | normed("norm_in_t", width=12, seed=1)
    params["position_embeddings.weight"] = draw(11, 12, seed=2)
    one_d = positions.sinusoidal_1d
    for emb, table_t in [
        ({"t_emb": "sin"}, one_d(7, 12, shift=4, max_period=99.0)),
        ({"t_emb": "cape"}, one_d(7, 12, max_period=99.0, centered=True)),
        ({"t_emb": "cape", "t_cape_mean_normalize": False}, one_d(7, 12, max_period=99.0)),
        ({"t_emb": "scaled"}, 3 * params["position_embeddings.weight"][:7]),
    ]:
        for options, norm in [
            ({"t_norm_in_group": 4}, L.layer_norm),
            ({"t_norm_in": False}, lambda p, y: y),
            ({"t_norm_in": False, "t_norm_in_group": 4}, lambda p, y: L.group_norm(p, y, num_groups=4)),
        ]:
            cfg = config(t_layers=0, t_weight_pos_embed=0.3, t_max_period=99.0, **emb, **options)
            got, got_t = HT.cross_transformer(params, cfg, x, xt, position_shift=4)
            close(got, norm(L.sub(params, "norm_in"), x) + 0.3 * positions.sinusoidal_2d(5, 3, 12, max_period=99.0))
            close(got_t, norm(L.sub(params, "norm_in_t"), xt) + 0.3 * table_t)


def test_cross_layers_exchange_the_old_values():
    cfg = config(t_layers=1, t_cross_first=True)
    params = L.sub(random_params(cfg), "crosstransformer")
    x, xt = draw(2, 3, 5, 12), draw(2, 7, 12, seed=1)
    got, got_t = HT.cross_transformer(params, cfg, x, xt)
    flat = np.stack([x[:, t, f] for t in range(3) for f in range(5)], axis=1)  # t-major
    table = positions.sinusoidal_2d(5, 3, 12)
    flat = L.layer_norm(L.sub(params, "norm_in"), flat)
    flat = flat + np.stack([table[t, f] for t in range(3) for f in range(5)])
    old = L.layer_norm(L.sub(params, "norm_in_t"), xt) + positions.sinusoidal_1d(7, 12)
    layer, layer_t = L.sub(params, "layers.0"), L.sub(params, "layers_t.0")
    close(got.reshape(2, 15, 12), HT.cross_transformer_layer(layer, cfg, flat, old))
    close(got_t, HT.cross_transformer_layer(layer_t, cfg, old, flat))


def test_waveform_undoes_spectrogram_but_for_the_frames_beyond_the_ends():
    cfg = config()
    t = np.arange(2311)
    x = np.stack([np.sin(0.03 * t + 1) + 0.5, np.cos(0.2 * t) * np.exp(-t / 900)])[None]
    z = HM.spectrogram(cfg, x)
    assert z.shape == (1, 2, 19, 256)  # ceil(2311 / 128) frames, no Nyquist
    kept = np.zeros(2311)
    for centre in 128 * np.arange(19) + 64:
        inside = np.abs(t - centre) < 256
        kept[inside] += np.cos(math.pi * (t[inside] - centre) / 512) ** 4  # the squared Hann window
    close(HM.waveform(cfg, z, 2311), x * kept / 1.5, 1e-4)


@pytest.mark.parametrize("merges", [False, True])
def test_htdemucs_is_its_parts_in_order(merges):
    cfg = config(depth=2, nfft=64 if merges else 512, bottom_channels=12)
    params, mix = random_params(cfg), draw(2, 2, 2400, seed=4) + 0.1
    z = HM.spectrogram(cfg, mix)
    x = np.stack([z[:, 0].real, z[:, 0].imag, z[:, 1].real, z[:, 1].imag], axis=-1)  # (B, T, F, 4)
    xt = mix.transpose(0, 2, 1)
    mean, std = x.mean(axis=(1, 2, 3), keepdims=True), x.std(axis=(1, 2, 3), keepdims=True, ddof=1)
    mean_t, std_t = xt.mean(axis=(1, 2), keepdims=True), xt.std(axis=(1, 2), keepdims=True, ddof=1)

    def encode(name, *args, padding=2, **options):
        return HL.encoder_layer(L.sub(params, name), *args, stride=4, padding=padding, dconv_depth=2, **options)

    def decode(name, *args, padding=2, **options):
        return HL.decoder_layer(L.sub(params, name), *args, stride=4, padding=padding, dconv_depth=2, **options)

    def resample(name, y):
        return L.linear(L.sub(params, f"channel_{name}"), y)

    a = encode("encoder.0", (x - mean) / (std + 1e-5)) + 0.2 * 10 * params["freq_emb.weight"]
    a_t = encode("tencoder.0", (xt - mean_t) / (std_t + 1e-5))
    b_t = encode("tencoder.1", a_t, empty=merges)
    b = encode("encoder.1", a, b_t if merges else None, padding=0 if merges else 2)
    c, c_t = resample("upsampler", b), resample("upsampler_t", b_t)
    c, c_t = HT.cross_transformer(L.sub(params, "crosstransformer"), cfg, c, c_t)
    c, c_t = resample("downsampler", c), resample("downsampler_t", c_t)
    d, pre = decode("decoder.0", c, b, None, padding=0 if merges else 2)
    d_t, _ = decode("tdecoder.0", pre[:, :, 0] if merges else c_t, None if merges else b_t, 600, empty=merges)
    e = decode("decoder.1", d, a, None, last=True)[0] * std + mean  # (B, T, F, 12): source, channel, re/im
    e_t = decode("tdecoder.1", d_t, a_t, 2400, last=True)[0] * std_t + mean_t  # (B, 2400, 6): source, channel

    got = htdemucs(params, cfg, mix)
    for source, channel in np.ndindex(3, 2):
        i = 2 * source + channel
        spectral_part = HM.waveform(cfg, e[..., 2 * i] + 1j * e[..., 2 * i + 1], 2400)
        close(got[:, source, channel], spectral_part + e_t[..., i], 1e-11)


def test_a_short_segment_is_padded_on_the_right():
    cfg, x = config(), draw(1, 2, 1237)
    params = random_params(cfg)
    whole = np.pad(x, ((0, 0), (0, 0), (0, 2400 - 1237)))
    close(htdemucs(params, cfg, x), htdemucs(params, cfg, whole)[..., :1237], 0)
    shorter = config(use_train_segment=False)
    assert np.max(np.abs(htdemucs(params, shorter, x) - htdemucs(params, cfg, x))) > 1e-3


def test_time_only_is_the_waveform_branch_without_the_transformer():
    cfg, x = config(), draw(2, 2, 2400)
    params = random_params(cfg)
    time = {name: value for name, value in params.items() if name.startswith(("tencoder", "tdecoder"))}
    got = htdemucs(time, cfg, x, time_only=True)
    full = htdemucs(params, config(t_layers=0), x)
    silent = dict(params) | {f"decoder.2.conv_tr.{n}": params[f"decoder.2.conv_tr.{n}"] * 0 for n in ("weight", "bias")}
    branch = htdemucs(silent, config(t_layers=0), x)
    mean = HM.waveform(cfg, np.ones((2, 3, 2, 19, 256)) * spectral_mean(cfg, x), 2400)  # silence, denormalised
    close(got, branch - mean, 1e-11)
    assert np.max(np.abs(got - full)) > 1e-2


def spectral_mean(cfg, x):
    z = HM.spectrogram(cfg, x)
    mean = (z.real.mean(axis=(1, 2, 3)) + z.imag.mean(axis=(1, 2, 3))) / 2
    return (mean * (1 + 1j))[:, None, None, None, None]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"t_emb": "cape", "t_cross_first": True, "t_gelu": False},
        {"nfft": 1024, "depth": 4, "bottom_channels": 0, "segment": Fraction(1, 10)},
        {"nfft": 1024, "depth": 5, "t_layers": 0, "context_enc": 1, "segment": Fraction(1, 10)},
        {"audio_channels": 1, "rewrite": False, "freq_emb": 0, "t_norm_first": False},
    ],
)
def test_htdemucs_in_float32_follows_float64(changes):
    cfg = config(**changes)
    params, mix = random_params(cfg), draw(2, cfg.audio_channels, int(cfg.segment * 8000), seed=5)
    taps, taps32 = {}, {}
    want = htdemucs(params, cfg, mix, position_shift=3, taps=taps)
    params32 = {name: value.astype(np.float32) for name, value in params.items()}
    got = htdemucs(params32, cfg, mix.astype(np.float32), position_shift=3, taps=taps32)
    assert want.dtype == np.float64 and got.dtype == np.float32 and want.shape == (*mix.shape[:1], 3, *mix.shape[1:])
    assert 0 < np.max(np.abs(got - want)) < 1e-5 * np.max(np.abs(want))
    assert taps.keys() == taps32.keys() and {"encoder.0", "tencoder.0", "decoder.0", "tdecoder.0"} <= taps.keys()
    for name, value in taps32.items():
        parts = value if isinstance(value, tuple) else (value,)
        assert all(part.dtype == np.float32 for part in parts), name


# Whole tracks ----------------------------------------------------------------------------------------------------


def apply_to(mix, forward, **options):
    defaults = {
        "sources": 2,
        "samplerate": 10,
        "training_samples": 6,
        "shifts": 0,
        "overlap": 0.5,
        "rng": random.Random(1),
    }
    return separation.apply(forward, mix, **{**defaults, **options})


def test_chunks_are_padded_with_what_lies_around_them():
    seen = []
    apply_to(np.arange(1.0, 11.0)[None], lambda x, position_shift: seen.append(x[0]) or np.stack([x, x]))
    want = [[1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 9], [6, 7, 8, 9, 10, 0], [8, 9, 10, 0, 0, 0]]
    np.testing.assert_array_equal(seen, want)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 31])
@pytest.mark.parametrize(
    "options", [{}, {"shifts": 3}, {"overlap": 0.25, "transition_power": 2.0, "segment": Fraction(1, 2)}]
)
def test_a_model_that_copies_gives_the_mix_back(length, options):
    mix = draw(2, length)
    close(apply_to(mix, lambda x, position_shift: np.stack([x, 2 * x]), **options), np.stack([mix, 2 * mix]))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_overlaps_are_weighted_by_triangles(power):
    calls = iter(range(9))
    got = apply_to(
        np.zeros((1, 9)),
        lambda x, position_shift: np.full((2, *x.shape), next(calls)),
        transition_power=power,
    )
    ramp = [(min(i + 1, 6 - i) / 3) ** power for i in range(6)]
    for t in range(9):
        parts = [(call, ramp[t - 3 * call]) for call in range(3) if 0 <= t - 3 * call < 6]
        want = sum(c * w for c, w in parts) / sum(w for _, w in parts)
        assert got[0, 0, t] == pytest.approx(want, rel=1e-14)


def test_shifts_draw_in_order_and_move_the_audio():
    rng, seen = random.Random(7), []

    def forward(x, position_shift):
        seen.append((position_shift, x[0].copy()))
        return np.stack([x, x])

    apply_to(np.arange(1.0, 10.0)[None], forward, shifts=2, random_shift=3, rng=random.Random(7))
    padded, want = np.concatenate([np.zeros(5), np.arange(1.0, 10.0), np.zeros(5)]), []
    for _ in range(2):
        offset = rng.randint(0, 5)
        for start in range(offset, 14, 3):
            position_shift = rng.randrange(4)
            length = min(6, 14 - start)
            first = start - (6 - length) // 2
            want.append((position_shift, np.concatenate([padded[first:], np.zeros(6)])[:6]))
    assert [shift for shift, _ in seen] == [shift for shift, _ in want]
    for (_, got), (_, audio) in zip(seen, want, strict=True):
        np.testing.assert_array_equal(got, audio)


def test_no_position_draw_without_sinusoids():
    rng = random.Random(3)
    apply_to(draw(1, 20), lambda x, position_shift: np.stack([x, x]), random_shift=None, rng=rng)
    assert rng.random() == random.Random(3).random()


def test_chunks_of_a_model_without_training_segment_stay_short():
    seen = []
    apply_to(draw(1, 8), lambda x, position_shift: seen.append(x.shape[-1]) or np.stack([x, x]), pad_chunks=False)
    assert seen == [6, 5, 2]


def test_bag_weighs_each_source():
    mix = draw(2, 11)
    members = [{"forward": lambda x, position_shift, g=g: np.stack([g * x, g * x])} for g in (1.0, 4.0)]
    common = {
        "sources": 2,
        "samplerate": 10,
        "training_samples": 6,
        "shifts": 1,
        "overlap": 0.25,
        "rng": random.Random(2),
    }
    got = separation.bag(members, mix, weights=[[1.0, 3.0], [0.0, 1.0]], **common)
    close(got, np.stack([mix, (3 * 1 + 1 * 4) / 4 * mix]))
    close(separation.bag(members, mix, **common), np.stack([2.5 * mix, 2.5 * mix]))


def test_normalise_uses_the_unbiased_deviation_of_the_mono_mix():
    wav = draw(2, 7) + 3
    mono = (wav[0] + wav[1]) / 2
    mean = sum(mono) / 7
    std = math.sqrt(sum((mono - mean) ** 2) / 6) + 1e-8
    got, *scale = separation.normalise(wav)
    assert scale == pytest.approx([mean, std], rel=1e-14)
    close(got, (wav - mean) / std)
    close(separation.denormalise(got, *scale), wav)


# Contracts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_function_keeps_the_dtype(dtype):
    x, w = draw(2, 6, 4, dtype=dtype), draw(4, 3, 4, seed=1, dtype=dtype)
    norm = {"weight": w[0, 0], "bias": w[1, 0]}
    dense = {"weight": w[:, 0], "bias": w[1, 0]}
    outputs = [f(x) for f in (K.erf, K.gelu, K.gelu_tanh, K.relu, K.sigmoid, K.glu, K.softmax)]
    outputs += K.mean_var(x, (0, 2))
    outputs += [L.linear(dense, x), L.layer_norm(norm, x), L.group_norm(norm, x, num_groups=2)]
    outputs += [
        L.layer_scale({"scale": w[0, 0]}, x),
        L.conv1d({"weight": w}, x),
        L.conv_transpose1d({"weight": w}, x, stride=2),
    ]
    outputs += [L.conv2d({"weight": w[:, None]}, x[:, None], padding=1)]
    q, bias = x[:, None], draw(6, 6)
    outputs += [A.attention(q, q, q, scale=np.float64(0.3), bias=bias, causal=True)]
    attn = {f"{n}_proj.{leaf}": value for n in ("q", "k", "v", "out") for leaf, value in dense.items()}
    outputs += [A.attention_layer(attn, x, num_heads=2, mask=masks.causal_mask(6, 6))]
    z = spectral.stft(x.reshape(2, 24), n_fft=8, hop_length=2)
    assert z.dtype == np.result_type(dtype, np.complex64)
    outputs += [spectral.istft(z, n_fft=8, hop_length=2, length=24), spectral.reflect_pad(x, 3, 7)]
    wav, *scale = separation.normalise(x[0])
    copy = {"forward": lambda x, position_shift: np.stack([x, x])}
    common = {
        "sources": 2,
        "samplerate": 10,
        "training_samples": 5,
        "rng": random.Random(0),
        "transition_power": 1.5,
    }
    outputs += [wav, separation.denormalise(wav, *scale), separation.apply(mix=wav, **copy, **common)]
    outputs += [separation.bag([copy, copy], wav, weights=[[0.1, 0.2], [0.3, 0.4]], **common)]
    assert [y.dtype for y in outputs] == [np.dtype(dtype)] * len(outputs)


def test_nothing_changes_its_arguments():
    cfg, mix = config(), draw(1, 2, 2400)
    params = random_params(cfg)
    before = {name: value.copy() for name, value in params.items()} | {"mix": mix.copy()}
    htdemucs(params, cfg, mix)[:] = 0
    apply_to(mix[0], lambda x, position_shift: np.stack([x, x]), training_samples=2400)[:] = 0
    for name, value in (params | {"mix": mix}).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def raises(message, function, *args, **options):
    with pytest.raises(ValueError, match=message) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_named():
    q, k = draw(1, 4, 5, 3), draw(1, 3, 2, 3)
    raises("multiple of key/value heads, got 4 and 3", A.attention, q, k, k)
    raises("at most as many as keys, got 5 and 2", A.attention, q, k[:, :1], k[:, :1], causal=True)
    raises("mask must be boolean, got float64", A.attention, q, q, q, mask=np.ones((5, 5)))
    raises("fit together", A.attention, q, q[..., :2], q)
    raises("alignment must be", masks.causal_mask, 2, 3, alignment="left")
    raises("lengths must be between 0 and 3, got", masks.padding_mask, [4], 3)
    raises("dim must be even and at least 4, got 5", positions.sinusoidal_1d, 3, 5)
    raises("dim must be even and at least 4, got 2", positions.sinusoidal_1d, 3, 2)
    raises("dim must be divisible by 4, got 6", positions.sinusoidal_2d, 3, 3, 6)
    raises("must be even, got 5", K.glu, draw(3, 5))
    raises("divisible by num_groups, got 5 and 2", L.group_norm, {}, draw(3, 5), num_groups=2)
    raises("hold one kernel of 5, got 4", L.conv1d, {"weight": draw(1, 3, 1)}, draw(1, 4, 1), dilation=2)
    raises("samples must be more than", spectral.stft, draw(8), n_fft=16, hop_length=4)
    raises("samples must be at least", spectral.stft, draw(8), n_fft=16, hop_length=4, center=False)
    raises("frequencies must be", spectral.istft, draw(3, 8) + 0j, n_fft=16, hop_length=4, length=8)
    raises("cover every sample", spectral.istft, draw(3, 9) + 0j, n_fft=16, hop_length=16, length=32)
    cfg = config()
    params, mix = random_params(cfg), draw(1, 2, 2401)
    raises("at most the training segment of 2400, got 2401", htdemucs, params, cfg, mix)
    raises("must be float32 like the mix, got float64", htdemucs, params, cfg, mix.astype(np.float32))
    raises("time_only must be False", htdemucs, params, config(nfft=1024, depth=4), mix, time_only=True)
    raises("t_emb must be", htdemucs, params, config(t_emb="rope"), mix[..., :9])
    scaled = dict(params) | {"crosstransformer.position_embeddings.weight": draw(37, 12)}
    raises("at most t_max_positions = 37, got 38", htdemucs, scaled, config(t_emb="scaled"), mix[..., :9])
    raises("samples must be at least 2, got 1", separation.normalise, draw(2, 1))
    raises("samples must be at least 1, got 0", apply_to, draw(2, 0), None)
    raises("transition_power must be at least 1", apply_to, draw(2, 9), None, transition_power=0.5)
    raises("overlap must leave", apply_to, draw(2, 9), None, overlap=1.0)
    raises("must be at most 6 samples, got 7", separation.Chunk(draw(1, 9), 0, 7).padded, 6)
    raises("one row per model", separation.bag, [{}], draw(1, 9), weights=[[1.0], [1.0]])
    raises("must not sum to 0", separation.bag, [{}], draw(1, 9), weights=[[1.0, 0.0]])
