"""HTDemucs against the NumPy twin: every layer, every option, gradients, and the configuration's refusals."""

import json
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from support.harness import as32, assert_within_budget, check_gradient, check_module, draw, tap
from support.models import BASE, OPTIONS, options

from mlx_xformer.models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig, InferenceMode
from mlx_xformer.models.htdemucs.config import levels
from mlx_xformer.models.htdemucs.layers import DConv, DecoderLayer, EncoderLayer
from mlx_xformer.models.htdemucs.transformer import CrossTransformer, CrossTransformerLayer
from mlx_xformer.reference.models.htdemucs import layers as twin_layers
from mlx_xformer.reference.models.htdemucs import transformer as twin_transformer
from mlx_xformer.reference.models.htdemucs.model import htdemucs as twin


def config(name="base", **changes):
    return HTDemucsConfig.from_dict(options(name) | changes)


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 0.7 + 0.2


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name):
    """Every option on its own, output and the output of every level, on a signal shorter than the segment."""
    c = config(name)
    model = HTDemucs(c)
    params = draw(model, 3)
    mix = signal(1, c.audio_channels, c.segment_samples - 100, seed=4)
    taps, taps64, taps32 = tap(model), {}, {}
    ref64 = twin(params, c, mix, taps=taps64)
    ref32 = twin(as32(params), c, as32(mix), taps=taps32)
    out = model(mx.array(as32(mix)))
    assert len(taps64) >= 4 * c.depth - 4 and set(taps64) <= set(taps)
    for name in taps64:
        branches = zip(
            *(t[name] if isinstance(t[name], tuple) else (t[name],) for t in (taps, taps64, taps32)), strict=True
        )
        for values in branches:
            assert_within_budget(*values, name)
    assert_within_budget(out, ref64, ref32)


def test_batch_is_its_rows():
    c = config()
    model = HTDemucs(c)
    draw(model, 5)
    mix = mx.array(as32(signal(3, 2, c.segment_samples)))
    rows = mx.concatenate([model(mix[i : i + 1]) for i in range(3)])
    assert mx.abs(model(mix) - rows).max() <= 2e-6 * mx.abs(rows).max()


def test_position_shift():
    c = config(t_sin_random_shift=9)
    model = HTDemucs(c)
    params = draw(model, 6)
    mix = signal(1, 2, c.segment_samples)
    ref64, ref32 = (twin(p, c, m, position_shift=7) for p, m in ((params, mix), (as32(params), as32(mix))))
    assert_within_budget(model(mx.array(as32(mix)), position_shift=7), ref64, ref32)
    pair = model(mx.array(as32(np.concatenate([mix, mix]))), position_shift=(7, 0))
    assert_within_budget(pair[:1], ref64, ref32)
    assert np.abs(np.array(pair[1]) - ref64[0]).max() > 1e-3 * np.abs(ref64).max()


def test_time_only():
    c = config()
    model = HTDemucs(c)
    params = draw(model, 7)
    mix = signal(1, 2, c.segment_samples)
    ref64, ref32 = (twin(p, c, m, time_only=True) for p, m in ((params, mix), (as32(params), as32(mix))))
    out = model(mx.array(as32(mix)), mode=InferenceMode.TIME_ONLY)
    assert_within_budget(out, ref64, ref32)
    full = model(mx.array(as32(mix)))
    assert mx.abs(full - out).max() > 0.05
    for name in params:  # nothing but the waveform branch is read
        if not name.startswith(("tencoder", "tdecoder")):
            model.update(tree_unflatten([(name, mx.full(params[name].shape, mx.nan))]))
    assert (model(mx.array(as32(mix)), mode=InferenceMode.TIME_ONLY) == out).all()
    with pytest.raises(ValueError, match="mode must be FULL for a model whose branches merge"):
        HTDemucs(config("depth 5, branches merge"))(mx.array(as32(mix)), mode=InferenceMode.TIME_ONLY)


def test_input_is_left_alone_and_checked():
    c = config()
    model = HTDemucs(c)
    mix = mx.array(as32(signal(1, 2, c.segment_samples)))
    before = np.array(mix)
    mx.eval(model(mix))
    assert (np.array(mix) == before).all()
    for shape, message in [
        ((2, 100), r"mix must be \(batch, 2, samples\), got \(2, 100\)"),
        ((1, 3, 100), r"mix must be \(batch, 2, samples\), got \(1, 3, 100\)"),
        ((1, 2, 9897), "mix must have 1 to 9896 samples, got 9897"),
        ((1, 2, 0), "mix must have 1 to 9896 samples, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(mx.zeros(shape))


@pytest.mark.parametrize("depth", [2, -2])
@pytest.mark.parametrize("shape", [(2, 13, 6), (2, 11, 3, 6)])
def test_dconv(shape, depth):
    module = DConv(6, config(dconv_depth=depth))
    check_module(module, lambda p, x: twin_layers.dconv(p, x, depth=depth), signal(*shape))


def _twin_options(c, index, decoder):
    return {
        "norm_groups": c.norm_groups if index >= c.norm_starts else None,
        "context": c.context if decoder else c.context_enc,
        "dconv_depth": c.dconv_depth,
    }


@pytest.mark.parametrize("time_branch", [True, False])
def test_encoder_layer(time_branch):
    c = config(norm_starts=1, norm_groups=2)
    level = levels(c)[1]
    module = EncoderLayer(c, level, time_branch=time_branch)
    shape = (2, 29, 4) if time_branch else (2, 5, 16, 4)
    check_module(
        module,
        lambda p, x: twin_layers.encoder_layer(p, x, stride=4, padding=2, **_twin_options(c, 1, False)),
        signal(*shape),
    )


@pytest.mark.parametrize("time_branch", [True, False])
def test_decoder_layer(time_branch):
    c = config(norm_starts=1, norm_groups=2)
    level = levels(c)[1]
    layer = DecoderLayer(c, level, time_branch=time_branch)
    shape = (2, 5, 8) if time_branch else (2, 3, 4, 8)

    class First(type(layer)):
        def __call__(self, x, skip):
            return super().__call__(x, skip, 17)[0]

    module = First(c, level, time_branch=time_branch)

    def reference(p, x, skip):
        return twin_layers.decoder_layer(p, x, skip, 17, stride=4, padding=2, **_twin_options(c, 1, True))[0]

    check_module(module, reference, signal(*shape), signal(*shape, seed=1))


@pytest.mark.parametrize("name", ["base", "t_norm_first off", "t_group_norm", "t_norm_out off", "t_layer_scale off"])
@pytest.mark.parametrize("cross", [True, False])
def test_cross_transformer_layer(cross, name):
    c = config(name)
    module = CrossTransformerLayer(c, cross=cross)
    x, source = signal(2, 5, 24), signal(2, 7, 24, seed=1)
    inputs = (x, source) if cross else (x,)
    check_module(module, lambda p, *a: twin_transformer.cross_transformer_layer(p, c, *a), *inputs)


@pytest.mark.parametrize("name", ["base", "t_cross_first", "t_emb scaled"])
@pytest.mark.parametrize("branch", [0, 1])
def test_cross_transformer(name, branch):
    c = config(name)

    class Branch(CrossTransformer):
        def __call__(self, x, xt):
            return super().__call__(x, xt)[branch]

    x, xt = signal(2, 3, 5, 24), signal(2, 7, 24, seed=1)
    check_module(
        Branch(c),
        lambda p, x, xt: twin_transformer.cross_transformer(p, c, x, xt)[branch],
        x,
        xt,
        gradient=name == "base",
    )


def test_gradient_of_the_whole_model():
    """With respect to the mixture, and to one weight of every kind of layer."""
    c = config(segment="1/4", nfft=1024, depth=3, t_layers=2)
    model = HTDemucs(c)
    params = draw(model, 8)
    chosen = [
        "encoder.0.conv.weight",
        "tencoder.1.dconv.layers.1.conv.weight",
        "freq_emb.weight",
        "channel_upsampler.weight",
        "crosstransformer.layers.1.cross_attn.k_proj.weight",
        "crosstransformer.layers_t.0.ffn.linear1.weight",
        "crosstransformer.layers.0.norm_out.weight",
        "decoder.1.rewrite.weight",
        "tdecoder.2.conv_tr.weight",
    ]

    def call(mix, *weights):
        model.update(tree_unflatten(list(zip(chosen, weights, strict=True))))
        return model(mix)

    def reference(mix, *weights):
        return twin(params | dict(zip(chosen, weights, strict=True)), c, mix)

    check_gradient(call, reference, signal(1, 2, c.segment_samples), *[params[n] for n in chosen], directions=1)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype):
    c = config()
    model = HTDemucs(c)
    draw(model, 9)
    mix = (mx.array(as32(signal(1, 2, c.segment_samples))) * 30).astype(dtype)
    assert (model(mix) == model(mix.astype(mx.float32))).all()


def test_forward_arguments_are_checked():
    c = config(t_sin_random_shift=9)
    model = HTDemucs(c)
    draw(model, 6)
    mix = mx.array(as32(signal(2, 2, c.segment_samples)))
    assert (model(mix, position_shift=np.int64(3)) == model(mix, position_shift=(3, 3))).all()
    with pytest.raises(ValueError, match="position_shift must be one or 2 numbers, got 3"):
        model(mix, position_shift=(1, 2, 3))
    with pytest.raises(ValueError, match="'fast' is not a valid InferenceMode"):
        model(mix, mode="fast")
    assert (model(mix, mode="time_only") == model(mix, mode=InferenceMode.TIME_ONLY)).all()
    free = HTDemucs(config("t_emb scaled", use_train_segment=False))
    with pytest.raises(ValueError, match="mix must need at most t_max_positions = 60 tokens, got 79"):
        free(mx.zeros((1, 2, 20_000)))


def test_config_round_trip():
    for name in OPTIONS:
        c = config(name)
        assert HTDemucsConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    assert config().segment == Fraction(1237, 1000)
    assert config(segment="39/1").to_dict()["segment"] == "39/1"
    assert isinstance(HTDemucsConfig.from_dict(config(segment="39/1").to_dict()).segment, Fraction)
    assert (
        isinstance(config(segment=10).segment, int) and config(segment=7.8, samplerate=44100).segment_samples == 343980
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chanels": 3}, "HTDemucs has no option named chanels"),
        ({"cac": False}, "cac must be True, got False"),
        ({"wiener_iters": 1}, "wiener_iters must be 0, got 1"),
        ({"end_iters": 2}, "end_iters must be 0, got 2"),
        ({"wiener_residual": True}, "wiener_residual must be False"),
        ({"multi_freqs": [0.3]}, "multi_freqs must be"),
        ({"t_sparse_self_attn": True}, "t_sparse_self_attn must be False"),
        ({"t_sparse_cross_attn": True}, "t_sparse_cross_attn must be False"),
        ({"sources": []}, "sources must be one or more distinct names"),
        ({"sources": ["a", "a"]}, "sources must be one or more distinct names"),
        ({"sources": "drums"}, "sources must be of type tuple"),
        ({"sources": [1]}, "sources must be of type tuple"),
        ({"channels": "48"}, "channels must be of type int, got '48'"),
        ({"t_norm_out": 2}, "t_norm_out must be of type bool, got 2"),
        ({"channels": 0}, "channels must be above 0, got 0"),
        ({"nfft": 1002}, "nfft must be a multiple of 8, got 1002"),
        ({"kernel_size": 5}, "kernel_size less twice its quarter must be the stride, 4, got 5"),
        ({"nfft": 4080}, "stride must divide the 510 frequencies of level 1, got 4"),
        ({"segment": "x"}, "segment must be a number of seconds, got 'x'"),
        ({"segment": "1/0"}, "segment must be a number of seconds"),
        ({"segment": 0}, "segment must be above 0, got 0"),
        ({"segment": 1e-9}, "segment must hold at least one sample"),
        ({"segment": "1e999999999"}, "segment must be a number of seconds, got '1e999999999'"),
        ({"segment": 1e9}, "segment must be at most 100000, got 1000000000.0"),
        ({"t_layers": 10**9}, "t_layers must be at most 1000, got 1000000000"),
        ({"channels": 10**400}, "channels must be at most 1000000, got 10{19}$"),
        ({"segment": "999999999/1"}, "segment must be at most 100000, got 999999999"),
        ({"dconv_comp": 0}, "dconv_comp must be above 0, got 0"),
        ({"t_heads": 0}, "t_heads must be above 0, got 0"),
        ({"growth": float("nan")}, "growth must be finite, got nan"),
        ({"emb_scale": float("nan")}, "emb_scale must be finite, got nan"),
        ({"context": -1}, "context must be at least 0, got -1"),
        ({"t_emb": "scaled", "t_max_positions": 5}, "t_max_positions must be at least 39, got 5"),
        ({"nfft": 512}, "must give the branches equal frames where they merge, got 78 and 39"),
        ({"sources": ["../x"]}, "sources must be names that a file can have, got '../x'"),
        ({"sources": ["/tmp/x", "a"]}, "sources must be names that a file can have, got '/tmp/x'"),
        ({"sources": [".."]}, r"sources must be names that a file can have, got '\.\.'"),
        ({"sources": [""]}, "sources must be names that a file can have, got ''"),
        ({"sources": ["a\\b"]}, "sources must be names that a file can have"),
        ({"sources": ["a\x00b"]}, "sources must be names that a file can have"),
        ({"channels": "4" * 5000}, r"channels must be of type int, got '4{79}$"),
        ({"dconv_mode": 4}, "dconv_mode must be 0, 1, 2 or 3, got 4"),
        ({"dconv_comp": 8}, "dconv_comp must leave at least one of 4 channels, got 8"),
        ({"t_emb": "rotary"}, 't_emb must be "sin", "cape" or "scaled"'),
        ({"t_layers": -1}, "t_layers must be at least 0, got -1"),
        ({"t_heads": 5}, "transformer width must be a multiple of 4 and of t_heads = 5, got 24"),
        ({"depth": 6}, "depth must leave a frequency axis to the transformer, got 6"),
        ({"channels_time": 6}, "channels_time must give the transformer 32 channels, got 48"),
        ({"growth": 1.3, "t_layers": 0}, "growth must give the innermost level a whole number of channels, got 8.788"),
    ],
)  # fmt: skip
def test_config_refuses_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        HTDemucsConfig.from_dict(BASE | change)


def test_config_needs_sources():
    with pytest.raises(ValueError, match="HTDemucs must be given sources"):
        HTDemucsConfig.from_dict({"channels": 4})


def test_bag():
    a, b = config(), config(t_layers=1)
    bag = BagConfig((a, b), ((1.0, 0.0, 2.0), (0.5, 1.0, 1.0)), Fraction(1, 2))
    assert BagConfig.from_dict(json.loads(json.dumps(bag.to_dict()))) == bag
    model = Bag(bag)
    assert [m.config.segment for m in model.models] == [Fraction(1, 2)] * 2
    longer = Bag(BagConfig((a, b), None, 5))
    assert [m.config.segment for m in longer.models] == [a.segment] * 2
    for values, message in [
        (((),), "members must be one or more models, got none"),
        (((a, config(samplerate=44100)),), "samplerate must be the same in every member, 8000, got 44100"),
        (((a, b), ((1.0, 1.0, 1.0),)), "weights must be 2 rows of 3 numbers"),
        (((a, b), ((1.0, 1.0, 0.0), (1.0, 1.0, 0.0))), "weights must not sum to 0 for any source, .* for rest"),
    ]:
        with pytest.raises(ValueError, match=message):
            BagConfig(*values)
    with pytest.raises(ValueError, match="a bag has no option named wheights"):
        BagConfig.from_dict({"members": [], "wheights": None})
