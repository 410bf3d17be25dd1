"""scratch's and ferrotorch's files of tensors: recognised by names, there and back, and what is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_xformer import cli
from mlx_xformer.converters.attention import attention_state, load_attention
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families.guides import ferrotorch, scratch
from mlx_xformer.converters.rules import apply_rules, invert
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.nn.attention.layer import Attention
from mlx_xformer.reference.nn.attention import attention_layer

E, D, H, M, HIDDEN, V, N = 21, 5, 3, 13, 17, 19, 2
HEADS = {"num_heads": H}


def noise(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def attention(source=E):
    shapes = {"W_Q": (H * D, E), "W_K": (H * D, source), "W_V": (E, source), "W_O": (E, E)}
    return {f"{name}.weight": noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def stack_state(memory=M, prefix=""):
    """A file of scratch, by hand."""
    state = {}
    for block in range(N):
        parts = {f"attention_layer.{name}": x + block for name, x in attention().items()}
        if memory:
            parts |= {f"cross_attention_layer.{name}": x - block for name, x in attention(memory).items()}
        parts |= {"ffn.lin_1.weight": noise(HIDDEN, E), "ffn.lin_1.bias": noise(HIDDEN)}
        parts |= {"ffn.lin_2.weight": noise(E, HIDDEN), "ffn.lin_2.bias": noise(E)}
        for n in (1, 2, 3) if memory else (1, 2):
            parts |= {f"norm_{n}.gamma": 1.3 + noise(E, seed=n) / 9, f"norm_{n}.beta": noise(E, seed=n + 5)}
        state |= {f"{prefix}blocks.{block}.{name}": x for name, x in parts.items()}
    return state


def model_state(buffers=True):
    state = {"embed.weight": noise(V, E), "unembed.weight": noise(V, E, seed=1), "unembed.bias": noise(V)}
    state |= stack_state(prefix="decoder.")
    return state | ({"pos.pe": noise(37, 1, E), "mask": noise(41, 41)} if buffers else {})


def layer_state(bias=True, kv_heads=H):
    rows = {"q": E, "k": kv_heads * E // H, "v": kv_heads * E // H, "out": E}
    state = {f"{name}_proj.weight": noise(n, E, seed=i) for i, (name, n) in enumerate(rows.items())}
    return state | ({f"{name}_proj.bias": noise(n, seed=i) for i, (name, n) in enumerate(rows.items())} if bias else {})


def converted(folder, state, settings, name="theirs", **options):
    save_file(state, folder / f"{name}.safetensors")
    return convert(folder / f"{name}.safetensors", folder / "ours", settings=settings, **options)


def back(folder):
    convert(folder / "ours", folder / "back", to="pytorch")
    return load_file(folder / "back" / "model.safetensors"), json.loads((folder / "back" / "config.json").read_text())


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and np.array_equal(ours[name], x), name


@pytest.mark.parametrize("memory", [None, M])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_stack_there_and_back(tmp_path, memory, dtype):
    state = {name: x.astype(dtype) for name, x in stack_state(memory).items()}
    report = converted(tmp_path, state, {**HEADS, "causal": True, "ffn_dropout": 0.25})
    assert report.family == "scratch" and "W_Q" in report.reason and len(report.rows) == len(state)
    config = load_model(tmp_path / "ours").config
    assert (config.model_dim, config.key_dim, config.hidden_dim, config.num_heads) == (E, D, HIDDEN, H)
    assert (config.enc_out_dim, config.num_stack, config.causal, config.ffn_dropout) == (memory, N, True, 0.25)
    assert (config.norm, config.norm_eps, config.attention_dropout) == ("unbiased", 1e-6, 0.1)
    again, settings = back(tmp_path)
    same(again, state)
    convert(tmp_path / "back" / "model.safetensors", tmp_path / "again", settings=settings)
    assert load_model(tmp_path / "again").config == config


def test_stack_means_what_its_author_s_formulas_say(tmp_path):
    """One head of one block by hand: scores of W_Q and W_K over sqrt(key_dim), values of W_V, W_O, and the unbiased
    norm, all in the rows of the file."""
    state = stack_state(None)
    converted(tmp_path, state, HEADS)
    block = load_model(tmp_path / "ours").blocks[1]
    x = noise(7, E, seed=3).astype(np.float64)
    given = {name.removeprefix("blocks.1."): y.astype(np.float64) for name, y in state.items() if "blocks.1." in name}

    def norm(n, x):
        deviation = x.std(-1, ddof=1, keepdims=True) + 1e-6
        return given[f"norm_{n}.gamma"] * (x - x.mean(-1, keepdims=True)) / deviation + given[f"norm_{n}.beta"]

    def rows(name, head, width):
        return given[f"attention_layer.W_{name}.weight"][head * width : (head + 1) * width]

    y, heads = norm(1, x), []
    for head in range(H):
        scores = (y @ rows("Q", head, D).T) @ (y @ rows("K", head, D).T).T / np.sqrt(D)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads.append(weights @ (y @ rows("V", head, E // H).T))
    x1 = x + np.concatenate(heads, axis=-1) @ given["attention_layer.W_O.weight"].T
    inner = np.maximum(norm(2, x1) @ given["ffn.lin_1.weight"].T + given["ffn.lin_1.bias"], 0)
    expected = x1 + inner @ given["ffn.lin_2.weight"].T + given["ffn.lin_2.bias"]
    out = np.array(block(mx.array(x.astype(np.float32))[None]))[0]
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("buffers", [True, False])
def test_model_there_and_back(tmp_path, buffers):
    """The buffers are dropped, by name in the report; pos.pe tells max_len."""
    state = model_state(buffers)
    report = converted(tmp_path, state, {**HEADS, "padding_idx": 3})
    assert report.family == "scratch_encoder_decoder" and report.reason.startswith("embed and unembed beside decoder.")
    dropped = {name for row in report.rows if not row.targets for name in row.sources}
    assert dropped == ({"mask", "pos.pe"} if buffers else set())
    config = load_model(tmp_path / "ours").config
    assert (config.vocab_size, config.max_len, config.padding_idx) == (V, 37 if buffers else 5000, 3)
    assert config.stack.causal and config.stack.enc_out_dim == M
    again, settings = back(tmp_path)
    same(again, model_state(False))
    convert(tmp_path / "back" / "model.safetensors", tmp_path / "again", settings=settings)
    assert load_model(tmp_path / "again").config == config


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [H, 1])
def test_ferrotorch_there_and_back(tmp_path, bias, kv_heads):
    state = layer_state(bias, kv_heads)
    report = converted(tmp_path, state, {**HEADS, "causal": True})
    assert report.family == "ferrotorch" and "q_proj, k_proj, v_proj and out_proj" in report.reason
    layer = load_model(tmp_path / "ours")
    assert layer.config.kv_heads == kv_heads and layer.config.causal
    x = noise(2, 7, E, seed=9)
    double = {name: y.astype(np.float64) for name, y in state.items()}
    expected = attention_layer(double, x.astype(np.float64), num_heads=H, num_kv_heads=kv_heads, causal=True)
    assert np.abs(np.array(layer(mx.array(x))) - expected).max() < 2e-5 * np.abs(expected).max()
    again, settings = back(tmp_path)
    same(again, state)
    assert settings == {"num_heads": H, "causal": True}


@pytest.mark.parametrize("names", [("W_Q", "W_K", "W_V", "W_O"), ("q_proj", "k_proj", "v_proj", "out_proj")])
def test_attention_layers_as_parts(names):
    """Of scratch, with keys of their own width and a memory, and of ferrotorch, into an Attention and back."""
    layout, source = ("scratch", M) if names[0] == "W_Q" else ("plain", None)
    state = attention(M) if source else layer_state()
    sizes = {"head_dim": D, "value_dim": E // H, "kv_dim": M, "bias": False} if source else {}
    module = Attention(E, H, **sizes)
    load_attention(module, {f"a.{name}": mx.array(x) for name, x in state.items()}, layout, prefix="a.")
    assert np.array_equal(np.array(module.k_proj.weight), state[f"{names[1]}.weight"])
    same({name: np.array(x) for name, x in attention_state(module, layout).items()}, state)


@pytest.mark.parametrize(
    ("kind", "state", "settings"),
    [
        (scratch.STACK, stack_state(), HEADS),
        (scratch.ENCODER_DECODER, model_state(False), HEADS),
        (ferrotorch.CONVERTERS[0], layer_state(), HEADS),
    ],
)
def test_tables_invert(kind, state, settings):
    tensors = {name: mx.array(x) for name, x in state.items()}
    rules = kind.rules(kind.config(settings, tensors), tensors)
    ours = apply_rules(rules, tensors, parameter_shapes(kind.family, kind.config(settings, tensors).to_dict()))
    again = apply_rules(invert(rules), ours, {name: x.shape for name, x in tensors.items()})
    assert len(again) == len(tensors) and all(mx.array_equal(again[name], x) for name, x in tensors.items())


def test_a_scalar_for_positions_tells_nothing(tmp_path):
    converted(tmp_path, model_state() | {"pos.pe": np.array(1, np.float32)}, HEADS)
    assert load_model(tmp_path / "ours").config.max_len == 5000


def without(state, *names):
    return {name: x for name, x in state.items() if name not in names}


NAMED = "blocks.1.attention_layer.W_O.weight"


@pytest.mark.parametrize(
    ("state", "settings", "message"),
    [
        (stack_state(), {}, "num_heads must be set to how many heads there are, from 1, got None"),
        (stack_state(), {"num_heads": "3"}, "num_heads must be set to how many heads there are"),
        (stack_state(), {"num_heads": 2}, "num_heads must divide the rows of W_Q, 15, got 2"),
        (stack_state(), {"num_heads": 5}, "model_dim must be a multiple of num_heads, 5, got 21"),
        (stack_state(), {**HEADS, "colour": 1}, "the stack has no option named colour"),
        (
            stack_state(),
            {**HEADS, "key_dim": 7},
            "misshapen: blocks.0.attention_layer.W_Q|self_attn.q_proj.weight must be",
        ),
        (without(stack_state(), NAMED), HEADS, "missing: blocks.1.self_attn.out_proj.weight"),
        (stack_state() | {NAMED: noise(3, 5)}, HEADS, r"must be \(21, 21\), got \(3, 5\)"),
        (stack_state() | {"blocks.0.ffn.lin_1.weight": noise(3)}, HEADS, r"lin_1.weight must be a matrix, got \(3,\)"),
        (
            without(model_state(), "decoder.blocks.0.ffn.lin_2.bias"),
            HEADS,
            "missing: decoder.blocks.0.mlp.linear2.bias",
        ),
        (model_state() | {"embed.weight": np.array(1, np.float32)}, HEADS, r"embed.weight must be a matrix, got \(\)"),
        (model_state() | {"pos.pe": noise(0, 1, E)}, HEADS, "max_len must be a whole number from 1 to .* got 0"),
        (model_state(), {**HEADS, "padding_idx": 19}, "padding_idx must be a token from 0 to 18, got 19"),
        (layer_state(), {}, "num_heads must be set to how many heads there are"),
        (layer_state(), {"num_heads": 2}, "num_heads must divide the columns of q_proj.weight, 21, got 2"),
        (
            layer_state() | {"k_proj.weight": noise(9, E)},
            HEADS,
            "k_proj.weight must be a multiple of a head's 7, got 9",
        ),
        (layer_state() | {"k_proj.weight": noise(9)}, HEADS, "must be matrices"),
        (layer_state() | {"q_proj.weight": noise(E, 0)}, HEADS, "must divide the columns of q_proj.weight, 0, got 3"),
        (layer_state() | {"out_proj.weight": noise(3, E)}, HEADS, r"out_proj.weight must be \(21, 21\), got \(3, 21\)"),
        (layer_state(), {**HEADS, "colour": 1}, "the attention layer has no option named colour"),
    ],
)
def test_files_that_are_refused(tmp_path, state, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        converted(tmp_path, state, settings)
    assert str(error.value).startswith(str(tmp_path / "theirs.safetensors"))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "state",
    [
        stack_state() | {"extra.weight": noise(3)},
        model_state() | {"dac.weight": noise(3)},
        without(layer_state(), "k_proj.bias"),
        without(layer_state(False), "v_proj.weight"),
    ],
)
def test_nothing_is_guessed(tmp_path, state):
    """With names that are none of theirs, or some of theirs missing, a file is of no kind."""
    tensors = {name: mx.array(x) for name, x in state.items()}
    assert all(kind.detect(tensors) is None for kind in (scratch, scratch.ENCODER_DECODER, ferrotorch))
    with pytest.raises((ValueError, OSError)):
        converted(tmp_path, state, HEADS)


def test_help_tells_no_default_of_settings(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    assert "(default: [])" not in capsys.readouterr().out


def test_commands(tmp_path, capsys):
    save_file(model_state(), tmp_path / "a.safetensors")
    given = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "ours")]
    assert cli.main(given) == 1
    assert "num_heads must be set" in capsys.readouterr().err
    assert cli.main([*given, "--set", "num_heads=3", "--set", "attention_dropout=0.2"]) == 0
    assert "family      scratch_encoder_decoder (embed and unembed beside" in capsys.readouterr().out
    assert load_model(tmp_path / "ours").config.stack.attention_dropout == 0.2
    assert cli.main(["parity", str(tmp_path / "ours"), "--seeds", "1"]) == 0
    assert cli.main(["info", str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    assert (
        cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "b"), "--to", "pytorch", "--set", "num_heads=7"])
        == 1
    )
    assert 'settings must not be given with to="pytorch"' in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "nothing.pt"), str(tmp_path / "b"), "--set", "num_heads=7"]) == 1
    assert capsys.readouterr().err.endswith("nothing.pt: no such file or folder\n")
