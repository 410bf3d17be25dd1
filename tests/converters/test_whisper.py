"""Conversions of Whisper: folders and files of Hugging Face, CTranslate2's folders, what they lack, hostile files."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.harness import same_tensors
from support.models import WHISPER_ALIASES as ALIASES
from support.models import WHISPER_CONFIG as CONFIG
from support.models import WHISPER_SCALARS as SCALARS
from support.models import ctranslate2_text as text
from support.models import ctranslate2_variable as variable
from support.models import whisper
from support.models import whisper_tensors as theirs
from support.models import whisper_weights as weights
from support.models import write_ctranslate2 as ctranslate2
from support.models import write_hugging_face as hugging_face

from mlx_xformer.cli import main
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import whisper as names
from mlx_xformer.converters.formats.ctranslate2 import open_ctranslate2
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.converters.layouts import ZeroPart
from mlx_xformer.converters.rules import apply_rules, inverse_shapes, invert
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.models.whisper import Whisper
from mlx_xformer.storage.checkpoint import read_checkpoint

MODEL = whisper()
SUPPRESSED = {"suppress_ids": [1, 7], "suppress_ids_begin": [2], "alignment_heads": [[1, 0]], "lang_ids": [50]}


def same_weights(folder, dtype=mx.float16):
    same_tensors(read_checkpoint(folder).weights, weights(MODEL, dtype))


def test_folder_of_hugging_face(tmp_path):
    """There and back, bit for bit; the configuration means the same."""
    report = convert(hugging_face(tmp_path / "hf", MODEL), tmp_path / "mlx")
    assert report.family == "whisper" and report.reason == "model_type whisper"
    same_weights(tmp_path / "mlx")
    assert load_model(tmp_path / "mlx").config == CONFIG
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(*(read_source(tmp_path / side / "model.safetensors").tensors for side in ("back", "hf")))
    assert (tmp_path / "back/config.json").read_text().split() == json.dumps(names.original(CONFIG), indent=2).split()


def test_file_of_hugging_face(tmp_path, capsys):
    """Without its config.json: the names tell the kind, the shapes all sizes but the number of heads."""
    file = hugging_face(tmp_path / "hf", MODEL) / "model.safetensors"
    report = convert(file, tmp_path / "mlx", settings={"num_heads": 2})
    assert report.reason.startswith("names of transformers' Whisper: model.encoder.conv1.weight")
    same_weights(tmp_path / "mlx")
    assert load_model(tmp_path / "mlx").config == CONFIG
    assert main(["convert", str(file), str(tmp_path / "again"), "--set", "num_heads=2"]) == 0
    assert "all accounted for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "settings must be num_heads for a file of transformers' Whisper, got none"),
        ({"heads": 2}, "settings must be num_heads for a file of transformers' Whisper, got heads"),
        ({"num_heads": 3}, "embed_dim must be a multiple of num_heads, 3, got 22"),
    ],
)
def test_settings_of_a_file(tmp_path, settings, message):
    file = hugging_face(tmp_path / "hf", MODEL) / "model.safetensors"
    with pytest.raises(ValueError) as error:
        convert(file, tmp_path / "mlx", settings=settings)
    assert str(error.value) == f"{file}: {message}" and not (tmp_path / "mlx").exists()


def test_a_head_that_is_stored_must_be_the_table(tmp_path):
    tensors = theirs(MODEL, "hugging face")
    table = tensors["model.decoder.embed_tokens.weight"]
    hugging_face(tmp_path / "hf", MODEL)
    save_file({**tensors, "proj_out.weight": table}, tmp_path / "hf/model.safetensors")
    assert "proj_out.weight (53, 22) F16 -> dropped on purpose" in convert(tmp_path / "hf", tmp_path / "mlx").table()
    same_weights(tmp_path / "mlx")
    for other in (table + np.float16(1), table[:-1]):
        save_file({**tensors, "proj_out.weight": other}, tmp_path / "hf/model.safetensors")
        with pytest.raises(
            ValueError, match=r"proj_out\.weight must be model\.decoder\.embed_tokens\.weight, the table"
        ):
            convert(tmp_path / "hf", tmp_path / "other")


def test_absent_keys_are_those_of_tiny():
    config = names.config({"model_type": "whisper"}, {})
    assert (config.vocab_size, config.embed_dim, config.num_heads, config.hidden_dim) == (51865, 384, 6, 1536)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, 'activation_function must be "gelu", got relu'),
        ({"scale_embedding": True}, "scale_embedding must be false, got True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true, got False"),
        ({"use_weighted_layer_sum": True}, "use_weighted_layer_sum must be false, got True"),
        ({"decoder_attention_heads": 11}, "decoder_attention_heads must be the encoder's, 2, got 11"),
        ({"decoder_ffn_dim": 31}, "decoder_ffn_dim must be the encoder's, 29, got 31"),
        ({"d_model": "22"}, "embed_dim must be a whole number from 1 to 1000000, got '22'"),
        ({"rope_theta": 1e4}, "config.json has keys that are not handled: rope_theta"),
    ],
)
def test_configurations_that_are_refused(tmp_path, changes, message):
    folder = hugging_face(tmp_path / "hf", MODEL, **changes)
    with pytest.raises(ValueError) as error:
        convert(folder, tmp_path / "mlx")
    assert str(error.value) == f"{folder}: {message}" and not (tmp_path / "mlx").exists()


def test_what_is_left_over_or_missing_is_listed(tmp_path):
    tensors = theirs(MODEL, "hugging face")
    del tensors["model.decoder.layers.2.encoder_attn.v_proj.bias"]
    tensors["model.decoder.layers.2.encoder_attn.k_proj.bias"] = np.zeros(22, np.float16)
    tensors["model.encoder.conv3.bias"] = np.zeros(22, np.float16)
    hugging_face(tmp_path / "hf", MODEL)
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "hf", tmp_path / "mlx")
    for line in (
        "leftover: model.encoder.conv3.bias meets no rule",
        "missing: decoder.stack.layers.2.cross_attn.v_proj.bias (22,)",
        "unexpected: decoder.stack.layers.2.cross_attn.k_proj.bias (22,), from",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("layout", ["hugging face", "ctranslate2"])
def test_every_rule_inverts(layout):
    ours, given = weights(MODEL, mx.float16), theirs(MODEL, layout)
    rules = names.rules(CONFIG, given)
    shapes = {name: x.shape for name, x in ours.items()}
    assert inverse_shapes(rules, shapes) == {name: x.shape for name, x in given.items()}
    tensors = {name: mx.array(x) for name, x in given.items()}
    made = apply_rules(rules, tensors, parameter_shapes("whisper", CONFIG.to_dict()))
    same_tensors(made, ours)
    same_tensors(apply_rules(invert(rules), made, inverse_shapes(rules, shapes)), tensors)


def test_zero_part():
    x = mx.arange(1, 13).reshape(6, 2)
    for count, index in ((2, 0), (3, 1), (4, 3)):
        layout = ZeroPart(count, index)
        back = layout.inverse()(x)
        size = 6 // (count - 1)
        assert back.shape == (6 + size, 2) and not mx.any(back[index * size : (index + 1) * size]).item()
        assert (layout(back) == x).all() and layout.inverse().inverse() == layout
    with pytest.raises(ValueError, match="part 2 of its 3 parts of rows must be zeros"):
        ZeroPart(3, 1)(x)
    with pytest.raises(ValueError, match="must have rows in 4 equal parts"):
        ZeroPart(4, 1)(x)


# CTranslate2


def folder_of_ctranslate2(path, **given):
    ctranslate2(path / "model.bin", theirs(MODEL, "ctranslate2"), **given)
    (path / "config.json").write_text(json.dumps(SUPPRESSED))
    (path / "tokenizer.json").write_text("{}")
    (path / "vocabulary.txt").write_text("a\nb\n")
    return path


def test_folder_of_ctranslate2(tmp_path):
    """Bit for bit, with every scalar and every other name told; from there to Hugging Face's names."""
    report = convert(folder_of_ctranslate2(tmp_path / "ct2"), tmp_path / "mlx")
    assert report.reason.startswith("names of CTranslate2's Whisper: encoder/conv1/weight")
    same_weights(tmp_path / "mlx")
    assert load_model(tmp_path / "mlx").config == CONFIG
    table = report.table()
    assert all(f"{name} () {kind} -> dropped on purpose" in table for name, (kind, _) in SCALARS.items())
    assert "decoder/projection/weight (53, 22) F16 -> dropped on purpose" in table
    told = json.loads((tmp_path / "mlx/generation_config.json").read_text())
    assert told == {"suppress_tokens": [1, 7], "begin_suppress_tokens": [2]}
    assert (tmp_path / "mlx/tokenizer.json").read_text() == "{}" and not (tmp_path / "mlx/vocabulary.txt").exists()
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(
        read_source(tmp_path / "back/model.safetensors").tensors,
        {name: mx.array(x) for name, x in theirs(MODEL, "hugging face").items()},
    )


def test_file_of_ctranslate2(tmp_path):
    file = folder_of_ctranslate2(tmp_path / "ct2") / "model.bin"
    convert(file, tmp_path / "mlx")
    same_weights(tmp_path / "mlx")
    assert isinstance(load_model(tmp_path / "mlx"), Whisper)
    with pytest.raises(ValueError, match="settings must be none for CTranslate2's Whisper, got num_heads"):
        convert(file, tmp_path / "again", settings={"num_heads": 2})
    source = read_source(file)
    assert source.metadata == {"ctranslate2": "WhisperSpec", "revision": "3"} and len(source.tensors) == 105


def test_a_bias_of_keys_is_refused(tmp_path):
    tensors = theirs(MODEL, "ctranslate2")
    tensors["encoder/layer_1/self_attention/linear_0/bias"][22 + 5] = 0.5
    with pytest.raises(ValueError, match=r"layer_1/self_attention/linear_0/bias \(66,\) part 2 of its 3 parts of rows"):
        convert(ctranslate2(tmp_path / "model.bin", tensors), tmp_path / "mlx")


@pytest.mark.parametrize(
    ("name", "scalar", "message"),
    [
        ("decoder/activation", ("I8", 1), "decoder/activation must be 3, got 1"),
        ("decoder/pre_norm", ("I8", 0), "decoder/pre_norm must be 1, got 0"),
        ("decoder/num_heads", ("I16", 11), "decoder/num_heads must be the encoder's, 2, got 11"),
        ("decoder/scale_embeddings", None, "decoder/scale_embeddings must be one number"),
        ("decoder/rotary_dim", ("I16", 8), "leftover: decoder/rotary_dim meets no rule"),
    ],
)
def test_scalars_that_are_refused(tmp_path, name, scalar, message):
    scalars = {key: value for key, value in {**SCALARS, name: scalar}.items() if value is not None}
    file = ctranslate2(tmp_path / "model.bin", theirs(MODEL, "ctranslate2"), scalars=scalars)
    with pytest.raises(ValueError) as error:
        convert(file, tmp_path / "mlx")
    assert message in str(error.value) and not (tmp_path / "mlx").exists()


def test_another_head_is_refused(tmp_path):
    tensors = theirs(MODEL, "ctranslate2")
    tensors["decoder/projection/weight"] = tensors["decoder/embeddings/weight"][::-1]
    file = ctranslate2(tmp_path / "model.bin", tensors, aliases={})
    with pytest.raises(ValueError, match="decoder/projection/weight must be decoder/embeddings/weight, the table"):
        convert(file, tmp_path / "mlx")


def test_another_model_of_ctranslate2(tmp_path):
    """One that is no Whisper, and one that is not all of it."""
    tensors = theirs(MODEL, "ctranslate2")
    del tensors["encoder/conv1/weight"]
    for spec, some in (
        ("TransformerSpec", {"encoder/embeddings/weight": np.ones((5, 4), np.float16)}),
        ("WhisperSpec", tensors),
    ):
        file = ctranslate2(tmp_path / spec / "model.bin", some, scalars={}, aliases={}, spec=spec)
        for source in (file, file.parent):
            with pytest.raises(ValueError) as error:
                convert(source, tmp_path / "mlx")
            assert str(error.value) == f"{file}: a model of CTranslate2's must be a whole Whisper, got a {spec}"


def head(version=6, spec="WhisperSpec", count=1):
    return struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, count)


ONE = variable("a", np.ones((2, 3), np.float16), 4)
NONE = struct.pack("<I", 0)
HOSTILE = {
    "another version": (head(5) + ONE + NONE, "CTranslate2's binary version must be 6, got 5"),
    "another dtype": (
        head() + variable("a", np.ones(3, np.float16), 6) + NONE,
        "a must have one of the dtypes F32, I8, I16, I32, F16, BF16, got number 6",
    ),
    "more bytes than the shape": (
        head() + text("a") + struct.pack("<BIIBI", 2, 2, 3, 4, 14) + bytes(14) + NONE,
        "a must have as many bytes as (2, 3) F16 takes, got 14",
    ),
    "a product that wraps": (
        head() + text("a") + struct.pack("<BIIBI", 2, 2**31, 2**31, 4, 0) + NONE,
        "a must have as many bytes as (2147483648, 2147483648) F16 takes, got 0",
    ),
    "an axis beyond MLX's": (
        head() + text("a") + struct.pack("<BIIBI", 2, 2**32 - 1, 0, 4, 0) + NONE,
        "a must have as many bytes as (4294967295, 0) F16 takes, got 0",
    ),
    "more than there is": (
        head() + text("a") + struct.pack("<BIBI", 1, 2**31 - 4, 1, 2**31 - 4) + bytes(9),
        "the file is truncated or damaged: 2147483644 bytes must follow, got 9",
    ),
    "many axes": (head() + text("a") + struct.pack("<B", 9) + bytes(99), "a must have at most 8 axes, got 9"),
    "many variables": (head(count=2**32 - 1) + ONE, "the file is truncated or damaged: 2 bytes must follow, got 0"),
    "many names": (
        head() + ONE + struct.pack("<I", 2**32 - 1),
        "the file is truncated or damaged: 2 bytes must follow",
    ),
    "one name twice": (head(count=2) + ONE + ONE + NONE, "a must be there once, got it again"),
    "another name of nothing": (
        head() + ONE + struct.pack("<I", 1) + text("b") + text("c"),
        "b must be a new name of a variable, got c",
    ),
    "another name that is taken": (
        head() + ONE + struct.pack("<I", 1) + text("a") + text("a"),
        "a must be a new name of a variable, got a",
    ),
    "more at the end": (head() + ONE + NONE + b"x", "the file must end after its names, got 1 bytes more"),
    "a name without its end": (
        head() + struct.pack("<H", 3) + b"abc" + bytes(20),
        "a name must be printable ASCII that ends in a zero byte, got b'abc'",
    ),
    "a name with a line break": (
        head() + text("a\nb") + bytes(20),
        r"a name must be printable ASCII that ends in a zero byte, got b'a\nb\x00'",
    ),
    "a name without letters": (head() + struct.pack("<H", 0) + bytes(20), "a name must be printable ASCII"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_source(tmp_path / "model.bin")
    assert str(error.value).startswith(f"{tmp_path / 'model.bin'}: {message}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_every_truncation_is_one_line(tmp_path, capsys):
    """Cut anywhere, or with any byte of its head changed: a line, and nothing written."""
    small = {name: x for name, x in theirs(MODEL, "ctranslate2").items() if x.size < 30}
    whole = ctranslate2(tmp_path / "model.bin", small).read_bytes()
    draw = np.random.default_rng(7)
    for cut in (*range(60), *draw.integers(60, len(whole), 60).tolist()):
        (tmp_path / "model.bin").write_bytes(whole[:cut])
        assert main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "out")]) == 1
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith("mlx-xformer: ")
    for at in draw.integers(0, len(whole), 120).tolist():
        changed = bytearray(whole)
        changed[at] ^= 1 << int(draw.integers(8))
        (tmp_path / "model.bin").write_bytes(bytes(changed))
        assert main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "out")]) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_config_beside_it(tmp_path):
    folder = folder_of_ctranslate2(tmp_path / "ct2")
    for content, message in (("{", "not JSON"), ("[]", "must be an object, got a list")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "mlx")
    (folder / "config.json").unlink()
    convert(folder, tmp_path / "mlx")
    assert not (tmp_path / "mlx/generation_config.json").exists()


def test_aliases_share_their_bytes(tmp_path):
    file = ctranslate2(tmp_path / "model.bin", theirs(MODEL, "ctranslate2"))
    tensors, _ = open_ctranslate2(file)
    (name, known), *_ = ALIASES.items()
    assert tensors[name] is tensors[known]
