"""MetalAudio's layout of the cross-transformer: names, shapes and bits, there and back, and what is refused."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from support.harness import assert_within_budget

from mlx_xformer.converters.families.guides import metalaudio
from mlx_xformer.models.guides.metalaudio import CrossTransformerConfig, CrossTransformerEncoder
from mlx_xformer.reference.models.guides.metalaudio import cross_transformer_encoder

B, LT, LF, E, H, HIDDEN, N = 2, 5, 7, 6, 2, 11, 2
CONFIG = CrossTransformerConfig(E, H, N, HIDDEN)
PREFIXES = ["cross_transformer", "", "model.0.x"]


def names(attention_bias=True, ffn_bias=True, layers=N):
    """Every name of the layout, written out from MetalAudio, and its shape."""
    one = {}
    for branch in ("time", "freq"):
        for step in ("self", "cross", "ffn"):
            one |= {f"norm_{branch}_{step}.weight": (E,), f"norm_{branch}_{step}.bias": (E,)}
        for kind in ("self", "cross"):
            one |= {f"{kind}_attn_{branch}.in_proj_weight": (3 * E, E), f"{kind}_attn_{branch}.out_proj.weight": (E, E)}
            if attention_bias:
                one |= {f"{kind}_attn_{branch}.in_proj_bias": (3 * E,), f"{kind}_attn_{branch}.out_proj.bias": (E,)}
        one |= {f"ffn_{branch}.linear1.weight": (HIDDEN, E), f"ffn_{branch}.linear2.weight": (E, HIDDEN)}
        if ffn_bias:
            one |= {f"ffn_{branch}.linear1.bias": (HIDDEN,), f"ffn_{branch}.linear2.bias": (E,)}
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}


def state(prefix="cross_transformer", dtype=mx.float32, seed=0, **options):
    """Random tensors of the layout."""
    rng = np.random.default_rng(seed)
    start = prefix + "." if prefix else ""
    return {
        start + name: mx.array((rng.normal(size=shape) * 0.5 + 0.3).astype(np.float32)).astype(dtype)
        for name, shape in names(**options).items()
    }


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.shape == b[name].shape and x.dtype == b[name].dtype, name
        assert mx.array_equal(mx.view(x, mx.uint8), mx.view(b[name], mx.uint8)), name


def write(path, tensors):
    save_file({name: np.array(x) for name, x in tensors.items()}, path)
    return path


def inputs():
    rng = np.random.default_rng(5)
    return rng.normal(size=(B, LT, E)), rng.normal(size=(B, LF, E))


def run(model):
    return [np.array(x) for x in model(*[mx.array(x.astype(np.float32)) for x in inputs()])]


# There and back


def test_a_layer_has_36_names():
    assert len(names(layers=1)) == 36 and len(names(False, False, 1)) == 24
    found = {n: x.shape for n, x in metalaudio.to_metalaudio(fresh(CONFIG), CONFIG, "").items()}
    assert found == names()


def fresh(config):
    return dict(tree_flatten(CrossTransformerEncoder(config).parameters()))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("biases", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_there_and_back(prefix, biases, dtype):
    options = dict(zip(("attention_bias", "ffn_bias"), biases, strict=True))
    tensors = state(prefix, dtype, **options)
    config = metalaudio.config(tensors, num_heads=H, prefix=prefix)
    assert config == CrossTransformerConfig(E, H, N, HIDDEN, **options)
    weights = metalaudio.to_mlx(tensors, config, prefix)
    assert {n: x.shape for n, x in weights.items()} == {n: x.shape for n, x in fresh(config).items()}
    same_bits(metalaudio.to_metalaudio(weights, config, prefix), tensors)


def test_rows_of_queries_keys_and_values():
    tensors = state()
    ours = metalaudio.to_mlx(tensors, CONFIG)
    for leaf in ("weight", "bias"):
        packed = tensors[f"cross_transformer.layers.1.cross_attn_freq.in_proj_{leaf}"]
        for part, x in enumerate("qkv"):
            split = ours[f"layers.1.cross_attn_freq.{x}_proj.{leaf}"]
            assert mx.array_equal(split, packed[E * part : E * (part + 1)])


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_file_is_loaded_and_computes(tmp_path, prefix, biases):
    """The twin is given the tensors under names made by hand here."""
    tensors = state(prefix, attention_bias=biases, ffn_bias=biases)
    model = metalaudio.load(write(tmp_path / "a.safetensors", tensors), num_heads=H, prefix=prefix)
    assert not model.training and model.config.attention_bias == biases
    params = {}
    for name, x in tensors.items():
        name = name.removeprefix(f"{prefix}.")
        if ".in_proj_" in name:
            at, leaf = name.split("in_proj_")
            params |= {f"{at}{p}_proj.{leaf}": y for p, y in zip("qkv", np.split(np.array(x), 3), strict=True)}
        else:
            params[name] = np.array(x)
    ref64 = cross_transformer_encoder({n: p.astype(np.float64) for n, p in params.items()}, model.config, *inputs())
    ref32 = cross_transformer_encoder(params, model.config, *[x.astype(np.float32) for x in inputs()])
    for out, truth, budget in zip(run(model), ref64, ref32, strict=True):
        assert_within_budget(out, truth, budget)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 2)])
def test_parts_that_change_places_are_seen(first, second):
    tensors = state()
    ours = metalaudio.to_mlx(tensors, CONFIG)
    name = "cross_transformer.layers.0.cross_attn_time.in_proj_weight"
    parts = mx.split(tensors[name], 3)
    parts[first], parts[second] = parts[second], parts[first]
    swapped = metalaudio.to_mlx(tensors | {name: mx.concatenate(parts)}, CONFIG)
    models = [CrossTransformerEncoder(CONFIG) for _ in range(2)]
    for model, weights in zip(models, (ours, swapped), strict=True):
        model.load_weights(list(weights.items()))
    assert np.abs(run(models[0])[0] - run(models[1])[0]).max() > 1e-3


def test_stored_halves_and_doubles_compute_in_float32(tmp_path):
    tensors = state()
    for kind in (np.float16, np.float64):
        path = tmp_path / f"{np.dtype(kind)}.safetensors"
        save_file({n: np.array(x).astype(kind) for n, x in tensors.items()}, path)
        model = metalaudio.load(path, num_heads=H, activation="gelu")
        assert {x.dtype for _, x in tree_flatten(model.parameters())} == {mx.float32}
        expected = np.array(tensors["cross_transformer.layers.0.norm_time_ffn.bias"]).astype(kind).astype(np.float32)
        assert (np.array(model.layers[0].norm_time_ffn.bias) == expected).all()
        assert model.config.activation == "gelu"


def test_a_bias_that_is_not_there_is_not_kept():
    """A model that had biases does not take tensors without, and is as before; one made for them has none."""
    model = CrossTransformerEncoder(CONFIG)
    model.load_weights(list(metalaudio.to_mlx(state(), CONFIG).items()))
    before, bare = run(model), state(attention_bias=False, ffn_bias=False)
    with pytest.raises(ValueError, match="24 missing"):
        metalaudio.to_mlx(bare, CONFIG)
    config = metalaudio.config(bare, num_heads=H)
    with pytest.raises(ValueError, match="Missing 40 parameters"):
        model.load_weights(list(metalaudio.to_mlx(bare, config).items()), strict=True)
    assert all((a == b).all() for a, b in zip(run(model), before, strict=True))
    assert not any(".bias" in n and "norm" not in n for n in fresh(config))
    with pytest.raises(ValueError, match=r"24 unexpected(.|\n)*unexpected: .*in_proj_bias \(18,\)"):
        metalaudio.to_mlx(state(), config)


def test_tensors_of_other_modules_are_theirs():
    others = {"cross_transformer2.layers.0.x": mx.zeros(3), "time_encoder.0.conv.weight": mx.zeros((2, 3))}
    tensors = state()
    assert metalaudio.config(tensors | others, num_heads=H) == CONFIG
    same_bits(metalaudio.to_mlx(tensors | others, CONFIG), metalaudio.to_mlx(tensors, CONFIG))


# What is refused

FFN, ATTENTION = "cross_transformer.layers.1.ffn_freq.", "cross_transformer.layers.0.self_attn_time."


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({FFN + "linear1.weight": None}, [f"missing: {FFN}linear1.weight (11, 6)"]),
        ({FFN + "linear2.bias": None}, [f"missing: {FFN}linear2.bias (6,)"]),
        ({ATTENTION + "in_proj_bias": None}, [f"missing: {ATTENTION}in_proj_bias (18,)"]),
        ({ATTENTION + "gate.weight": mx.zeros((2, 3))}, [f"unexpected: {ATTENTION}gate.weight (2, 3)"]),
        ({ATTENTION + "q_proj.weight": mx.zeros((6, 6))}, [f"unexpected: {ATTENTION}q_proj.weight (6, 6)"]),
        (
            {"cross_transformer.norm_in.weight": mx.zeros(6)},
            ["unexpected: cross_transformer.norm_in.weight (6,)"],
        ),
        (
            {ATTENTION + "in_proj_weight": mx.zeros((17, 6))},
            [f"misshapen: {ATTENTION}in_proj_weight must be (18, 6), got (17, 6)"],
        ),
        (
            {ATTENTION + "out_proj.weight": mx.zeros((36,))},  # as many numbers, and no matrix
            [f"misshapen: {ATTENTION}out_proj.weight must be (6, 6), got (36,)"],
        ),
        (
            {FFN + "linear2.weight": mx.zeros((11, 6))},
            [f"misshapen: {FFN}linear2.weight must be (6, 11), got (11, 6)"],
        ),
        ({FFN + "linear1.bias": mx.zeros(11, mx.int64)}, [f"no float: {FFN}linear1.bias is mlx.core.int64"]),
        (
            {FFN + "linear1.bias": None, FFN + "more": mx.zeros(3), ATTENTION + "in_proj_bias": mx.zeros(6)},
            [
                "1 misshapen, 1 missing, 1 unexpected",
                "in_proj_bias must be (18,), got (6,)",
                "linear1.bias",
                "more (3,)",
            ],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit(tmp_path, change, lines):
    tensors = {name: x for name, x in (state() | change).items() if x is not None}
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError) as error:
        metalaudio.load(path, num_heads=H)
    assert str(error.value).startswith(f"{path}: ") and all(line in str(error.value) for line in lines)


def test_a_layer_left_out_is_named():
    tensors = {name: x for name, x in state(layers=3).items() if ".layers.1." not in name}
    with pytest.raises(ValueError, match=r"36 missing, 36 unexpected\n  missing: cross_transformer\.layers\.1\."):
        metalaudio.to_mlx(tensors, metalaudio.config(tensors, num_heads=H))


def test_one_attention_with_biases_is_not_enough():
    bare, full = state(attention_bias=False), state()
    mixed = bare | {name: x for name, x in full.items() if name.startswith(ATTENTION)}
    with pytest.raises(ValueError) as error:
        metalaudio.to_mlx(mixed, metalaudio.config(mixed, num_heads=H))
    assert "14 missing\n" in str(error.value)
    assert "missing: cross_transformer.layers.0.self_attn_freq.in_proj_bias (18,)" in str(error.value)


def test_what_goes_back_is_as_strict():
    weights = metalaudio.to_mlx(state(), CONFIG)
    del weights["layers.0.self_attn_time.k_proj.bias"]
    weights |= {"layers.1.norm_freq_ffn.weight": mx.zeros(7), "layers.2.x": mx.zeros(1)}
    with pytest.raises(ValueError) as error:
        metalaudio.to_metalaudio(weights, CONFIG)
    for line in (
        "missing: layers.0.self_attn_time.k_proj.bias (6,)",
        "misshapen: layers.1.norm_freq_ffn.weight must be (6,), got (7,)",
        "unexpected: layers.2.x (1,)",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("given", "prefix", "message"),
    [
        (
            "a.b",
            "cross_transformer",
            r"no tensor is named cross_transformer\.layers\.0\.norm_.* \(the prefix is 'a.b'\)",
        ),
        ("", "cross_transformer", r"\(the prefix is ''\)"),
        ("a.b", "", r"no tensor is named layers\.0\.norm_.* \(the prefix is 'a.b'\)"),
        ("a", "a.", "prefix must have no braces and no dot at its end, got 'a.'"),
        ("a", "{i}", "prefix must have no braces and no dot at its end, got '{i}'"),
    ],
)
def test_prefixes(given, prefix, message):
    with pytest.raises(ValueError, match=message):
        metalaudio.config(state(given), num_heads=H, prefix=prefix)


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"\(the names are a, b\)"):
        metalaudio.config({"b": mx.zeros(1), "a": mx.zeros(1)}, num_heads=H)
    with pytest.raises(ValueError, match=r"\(there is no tensor at all\)"):
        metalaudio.config({}, num_heads=H)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, 4, got 6"):
        metalaudio.config(state(), num_heads=4)
    with pytest.raises(FileNotFoundError, match="no such file"):
        metalaudio.load(tmp_path / "nothing.safetensors", num_heads=H)
    path = write(tmp_path / "a.safetensors", state())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.safetensors: "):
        metalaudio.load(path, num_heads=H)


def test_hostile_sizes_make_no_model():
    tensors = {f"layers.{'9' * n}.norm_time_self.weight": mx.zeros(6) for n in range(1, 1100)}
    with pytest.raises(ValueError, match="num_layers must be a whole number from 1 to 1000, got 1099"):
        metalaudio.config(tensors, num_heads=H, prefix="")
    wide = {"layers.0.norm_time_self.weight": mx.zeros(10**6), "layers.0.ffn_time.linear1.weight": mx.zeros((10**7, 1))}
    config = metalaudio.config(wide, num_heads=H, prefix="")  # whose weights would be terabytes
    with pytest.raises(ValueError, match=r"linear1\.weight must be \(10000000, 1000000\), got \(10000000, 1\)"):
        metalaudio.to_mlx(wide, config, "")
