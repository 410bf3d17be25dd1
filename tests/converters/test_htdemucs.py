"""Conversions of HTDemucs: names, shapes and bits, there and back."""

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from support.harness import data_folder, same_tensors
from support.models import OPTIONS, options
from support.oracle import pickle_global, save_torch

from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import htdemucs
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.converters.rules import apply_rules, inverse_shapes, invert
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.models.htdemucs import Bag, HTDemucs, HTDemucsConfig
from mlx_xformer.storage.checkpoint import read_checkpoint

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "htdemucs_names.json").read_text())["models"]


TINY = options("base") | {"channels": 2, "bottom_channels": 12, "t_layers": 2}


def source_shapes(config):
    """Names and shapes as the original has them."""
    return inverse_shapes(htdemucs.rules(config), parameter_shapes("htdemucs", config.to_dict()))


def random_state(config, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in source_shapes(config).items()}


def write_original(folder, signature, config, seed=0, **metadata):
    state = random_state(config, seed)
    save_file(state, folder / f"{signature}.safetensors", htdemucs.metadata(config) | metadata)
    return state


def tiny(**changes):
    return HTDemucsConfig.from_dict(TINY | changes)


@pytest.mark.parametrize("name", GOLDEN)
def test_official_names_and_shapes_are_the_original_s(name):
    golden = GOLDEN[name]
    shapes = source_shapes(HTDemucsConfig.from_dict(golden["config"]))
    assert (len(shapes), sum(math.prod(s) for s in shapes.values())) == (golden["tensors"], golden["parameters"])
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == golden["sha256"]


def test_official_counts_are_the_published_ones():
    assert (GOLDEN["htdemucs"]["tensors"], GOLDEN["htdemucs"]["parameters"]) == (533, 41_984_456)
    assert (GOLDEN["htdemucs_6s"]["tensors"], GOLDEN["htdemucs_6s"]["parameters"]) == (525, 27_414_996)


@pytest.mark.parametrize(
    ("name", "shape", "theirs"),
    [
        ("encoder.0.conv.weight", (4, 8, 4), (4, 4, 8, 1)),
        ("tencoder.0.conv.weight", (4, 8, 2), (4, 2, 8)),
        ("decoder.3.conv_tr.weight", (12, 8, 4), (4, 12, 8, 1)),
        ("tdecoder.3.conv_tr.weight", (6, 8, 4), (4, 6, 8)),
        ("encoder.1.rewrite.weight", (16, 8), (16, 8, 1, 1)),
        ("decoder.2.rewrite.weight", (16, 3, 3, 8), (16, 8, 3, 3)),
        ("tdecoder.2.rewrite.weight", (16, 3, 8), (16, 8, 3)),
        ("channel_upsampler.weight", (24, 32), (24, 32, 1)),
        ("freq_emb.weight", (512, 4), None),
    ],
)
def test_layouts(name, shape, theirs):
    config = HTDemucsConfig.from_dict(options("base"))
    assert parameter_shapes("htdemucs", config.to_dict())[name] == shape
    if theirs:
        assert source_shapes(config)[name] == theirs


def test_axes_keep_their_meaning():
    """Each kind of kernel, filled with numbers that tell the axes apart."""
    config = HTDemucsConfig.from_dict(options("base") | {"depth": 2})
    state = {n: np.arange(math.prod(s), dtype=np.float32).reshape(s) for n, s in source_shapes(config).items()}
    shapes = parameter_shapes("htdemucs", config.to_dict())
    arrays = {n: mx.array(a) for n, a in state.items()}
    out = {n: np.array(x) for n, x in apply_rules(htdemucs.rules(config), arrays, shapes).items()}
    o, k, c = 3, 5, 2
    assert out["encoder.1.conv.weight"][o, k, c] == state["encoder.1.conv.weight"][o, c, k, 0]
    assert out["tencoder.1.conv.weight"][o, k, c] == state["tencoder.1.conv.weight"][o, c, k]
    assert out["decoder.0.conv_tr.weight"][o, k, c] == state["decoder.0.conv_tr.weight"][c, o, k, 0]
    assert out["tdecoder.0.conv_tr.weight"][o, k, c] == state["tdecoder.0.conv_tr.weight"][c, o, k]
    t, f = 2, 1
    assert out["decoder.0.rewrite.weight"][o, t, f, c] == state["decoder.0.rewrite.weight"][o, c, f, t]
    assert out["tdecoder.0.rewrite.weight"][o, t, c] == state["tdecoder.0.rewrite.weight"][o, c, t]
    assert out["encoder.0.dconv.layers.1.conv.weight"][1, t, c] == state["encoder.0.dconv.layers.1.0.weight"][1, c, t]
    packed = state["crosstransformer.layers_t.1.cross_attn.in_proj_weight"]
    for part, x in enumerate("qkv"):
        ours = out[f"crosstransformer.layers_t.1.cross_attn.{x}_proj.weight"]
        assert np.array_equal(ours, packed[24 * part : 24 * (part + 1)])


@pytest.mark.parametrize("name", OPTIONS)
def test_names_and_layouts_there_and_back(name):
    config = HTDemucsConfig.from_dict(options(name))
    table = htdemucs.rules(config)
    state = {name: mx.array(x) for name, x in random_state(config).items()}
    ours = apply_rules(table, state, parameter_shapes("htdemucs", config.to_dict()))
    same_tensors(apply_rules(invert(table), ours, {n: x.shape for n, x in state.items()}), state)
    assert htdemucs.config(htdemucs.metadata(config)) == config


@pytest.mark.parametrize("name", ["base", "depth 6, below the merge", "t_emb scaled", "segment as a float"])
def test_files_there_and_back(tmp_path, name):
    config = HTDemucsConfig.from_dict(options(name))
    write_original(tmp_path, "0a1b2c3d", config)
    report = convert(tmp_path, tmp_path / "mlx")
    assert report.written and report.family == "htdemucs"
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    first, second = (read_source(folder / "0a1b2c3d.safetensors") for folder in (tmp_path, tmp_path / "back"))
    same_tensors(first.tensors, second.tensors)
    assert htdemucs.config(second.metadata) == config
    convert(tmp_path / "back", tmp_path / "again")
    same_tensors(read_checkpoint(tmp_path / "mlx").weights, read_checkpoint(tmp_path / "again").weights)
    assert isinstance(load_model(tmp_path / "again"), HTDemucs)


def write_bag(folder, **extra):
    configs = [tiny(), tiny(segment=Fraction(3, 2), context_enc=1), tiny(bottom_channels=0, t_heads=4)]
    for n, config in enumerate(configs):
        write_original(folder, f"sig{n}", config, seed=n)
    (folder / "three.yaml").write_text(yaml.safe_dump({"models": ["sig0", "sig1", "sig2"], **extra}))
    return configs


def test_a_bag_there_and_back(tmp_path):
    weights = [[1.0, 0.0, 0.25], [0.0, 1.0, 0.5], [0.5, 0.0, 0.25]]
    configs = write_bag(tmp_path, weights=weights, segment=1.125)
    report = convert(tmp_path / "three.yaml", tmp_path / "mlx", family="htdemucs")
    assert report.family == "htdemucs_bag" and "become" in str(report)
    bag = load_model(tmp_path / "mlx")
    assert isinstance(bag, Bag) and bag.config.members == tuple(configs)
    assert bag.config.weights == tuple(map(tuple, weights)) and bag.config.segment == 1.125
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    packages = sorted((tmp_path / "back").glob("*.th"))
    assert [p.name[:5] for p in packages] == ["sig0-", "sig1-", "sig2-"]
    assert sorted(set((tmp_path / "back").iterdir()) - set(packages)) == [
        tmp_path / "back" / name for name in (*(f"sig{n}.safetensors" for n in range(3)), "three.yaml")
    ]
    for n in range(3):
        first, second = (read_source(f / f"sig{n}.safetensors") for f in (tmp_path, tmp_path / "back"))
        same_tensors(first.tensors, second.tensors)
    assert yaml.safe_load((tmp_path / "back" / "three.yaml").read_text()) == {
        "models": ["sig0", "sig1", "sig2"],
        "weights": weights,
        "segment": 1.125,
    }


def test_a_bag_of_one_that_adds_nothing_is_its_model(tmp_path):
    write_original(tmp_path, "sig", tiny())
    (tmp_path / "one.yaml").write_text("models: [sig]\n")
    assert convert(tmp_path, tmp_path / "a").family == "htdemucs"
    (tmp_path / "one.yaml").write_text("models: [sig]\nsegment: 1\n")
    assert convert(tmp_path, tmp_path / "b").family == "htdemucs_bag"


def test_safetensors_and_th_give_the_same_tensors(tmp_path):
    config = tiny()
    state = write_original(tmp_path, "sig", config)
    values = json.loads(htdemucs.metadata(config)["kwargs"])
    kwargs = {k: getattr(config, k) if k == "segment" else v for k, v in values.items()}
    package = {"klass": pickle_global("demucs.htdemucs", "HTDemucs"), "args": (), "kwargs": kwargs}
    save_torch(tmp_path / "sig.th", state, package)
    digest = read_source(tmp_path / "sig.th").sha256[:8]
    (tmp_path / "sig.th").rename(tmp_path / f"sig-{digest}.th")
    convert(tmp_path / "sig.safetensors", tmp_path / "a")
    convert(tmp_path / f"sig-{digest}.th", tmp_path / "b")
    a, b = (read_checkpoint(tmp_path / x) for x in "ab")
    same_tensors(a.weights, b.weights)
    assert a.config == b.config
    assert [s["signature"] for s in a.provenance["sources"] + b.provenance["sources"]] == ["sig", "sig"]
    (tmp_path / f"sig-{digest}.th").rename(tmp_path / "sig-01234567.th")
    with pytest.raises(ValueError, match=r"sig-01234567\.th: SHA-256 must begin with 01234567"):
        convert(tmp_path / "sig-01234567.th", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_provenance_and_report(tmp_path):
    write_original(tmp_path, "sig", tiny())
    report = convert(tmp_path, tmp_path / "out", origin={"repository": "x/y"})
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.provenance["sources"] == [
        {"signature": "sig", "file": "sig.safetensors", "sha256": read_source(tmp_path / "sig.safetensors").sha256}
    ]
    assert checkpoint.provenance["repository"] == "x/y" and checkpoint.provenance["mlx"] == mx.__version__
    assert {x.dtype for x in checkpoint.weights.values()} == {mx.float16}
    shapes = source_shapes(tiny())
    assert sum(len(row.sources) for row in report.rows) == len(shapes)
    assert report.parameters == sum(math.prod(s) for s in shapes.values()) and report.bytes == 2 * report.parameters
    assert f"{len(shapes)} ({len(shapes)} F16), all accounted for" in str(report)
    line = next(line for line in report.table().splitlines() if line.startswith("encoder.0.conv.weight"))
    assert line == "encoder.0.conv.weight (2, 4, 8, 1) F16 -> encoder.0.conv.weight (2, 8, 4)"


def test_a_dry_run_writes_nothing(tmp_path):
    write_original(tmp_path, "sig", tiny())
    report = convert(tmp_path, tmp_path / "out", dry_run=True)
    assert not report.written and "dry run" in str(report) and not (tmp_path / "out").exists()
    convert(tmp_path, tmp_path / "out")
    report = convert(tmp_path / "out", tmp_path / "back", to="pytorch", dry_run=True)
    assert report.files == ("sig.safetensors", "sig.th", "out.yaml") and not (tmp_path / "back").exists()


def change(folder, edit, **metadata):
    """The tiny model with its tensors edited."""
    state = write_original(folder, "sig", tiny(), **metadata)
    edit(state)
    save_file(state, folder / "sig.safetensors", htdemucs.metadata(tiny()) | metadata)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda s: s.pop("freq_emb.embedding.weight"), "missing: freq_emb.weight (512, 2)"),
        (lambda s: s.update(extra=np.zeros(3, np.float16)), "leftover: extra meets no rule"),
        (
            lambda s: s.update({"encoder.9.conv.bias": np.zeros(3, np.float16)}),
            "unexpected: encoder.9.conv.bias (3,), from encoder.9.conv.bias (3,)",
        ),
        (
            lambda s: s.update({"encoder.0.conv.bias": np.zeros(3, np.float16)}),
            "encoder.0.conv.bias must be (2,), got (3,)",
        ),
        (
            lambda s: s.update({"tencoder.0.conv.weight": s["tencoder.0.conv.weight"][..., None]}),
            "tencoder.0.conv.weight (2, 2, 8, 1) must have 3 axes, got 4 for tencoder.0.conv.weight (2, 8, 2)",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, edit, line):
    change(tmp_path, edit)
    with pytest.raises(ValueError) as error:
        convert(tmp_path, tmp_path / "out")
    assert line in str(error.value) and str(error.value).startswith(str(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"klass": "demucs.hdemucs.HDemucs"}, "the older Hybrid Demucs"),
        ({"klass": "demucs.demucs.Demucs"}, r"the older Demucs \(mdx\)"),
        ({"klass": "os.system"}, "got os.system"),
        ({"structure": "{}"}, "DiffQ"),
        ({"kwargs": "{"}, "kwargs must be JSON"),
        ({"kwargs": "[]"}, "kwargs an object"),
        ({"args": "{}"}, "args must be a JSON array"),
        ({"args": "[1]"}, "at most once"),
        ({"kwargs": '{"sources": ["a"], "cac": false}'}, "cac must be True"),
        ({"kwargs": '{"sources": ["a"], "colour": 1}'}, "no option named colour"),
        ({"kwargs": '{"sources": ["a"], "segment": {"_type": "fraction", "numerator": 1}}'}, "two whole numbers"),
        ({"kwargs": '{"sources": ["a"], "segment": {"_type": "pickle"}}'}, "segment must be"),
        ({"kwargs": "[" * 100_000}, "kwargs must be JSON"),
        ({"kwargs": '{"sources": ["a"], "t_heads": 0}'}, "must make a model|must be"),
        ({"kwargs": '{"sources": ["a"], "segment": Infinity}'}, "must make a model|must be"),
    ],
)
def test_configurations_that_are_refused(tmp_path, metadata, reason):
    change(tmp_path, lambda s: None, **metadata)
    with pytest.raises(ValueError, match=reason) as error:
        convert(tmp_path, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_positional_arguments_are_understood():
    values = json.loads(htdemucs.metadata(tiny())["kwargs"])
    sources, channels = values.pop("sources"), values.pop("audio_channels")
    metadata = {"klass": htdemucs.KLASS, "args": json.dumps([sources, channels]), "kwargs": json.dumps(values)}
    assert htdemucs.config(metadata) == tiny()


def test_a_state_dict_alone_does_not_tell_the_configuration(tmp_path):
    state = random_state(tiny())
    save_file({f"models.0.{name}": x for name, x in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"do not tell the configuration \(the naming is demucs: names begin with enc"):
        convert(tmp_path, tmp_path / "out")


def test_detection():
    names = ["models.0.encoder.0.x", "models.0.decoder.0.x", "models.1.tencoder.0.x"]
    assert htdemucs.find_naming(names)[0] == "demucs"
    assert htdemucs.find_naming(["time_encoder.0.x", "freq_encoder.0.x", "cross_transformer.x"])[0] == "metalaudio"
    assert htdemucs.find_naming(["encoder.0.x", "decoder.0.x", "model.x"])[0] == "unknown"
    assert htdemucs.find_naming([])[0] == "unknown"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"weights": [[1.0, 1.0, 1.0]]}, "weights must be 3 rows"),
        ({"weights": [[1.0, 1.0]] * 3}, "weights must be 3 rows of 3"),
        ({"weights": [["a", 1.0, 1.0]] * 3}, "lists of numbers"),
        ({"weights": [[[1.0], 1.0, 1.0]] * 3}, "lists of numbers"),
        ({"weights": "ones"}, "lists of numbers"),
        ({"weights": [[0.0, 1.0, 1.0]] * 3}, "sum to 0"),
        ({"weights": [[float("nan"), 1.0, 1.0]] * 3}, "lists of numbers"),
        ({"segment": "1"}, "segment must be"),
        ({"segment": -1}, "segment must be"),
    ],
)
def test_bags_that_do_not_add_up(tmp_path, extra, reason):
    write_bag(tmp_path)
    text = yaml.dump({"models": ["sig0", "sig1", "sig2"], **extra}, Dumper=NoAliases)
    (tmp_path / "three.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"three\.yaml: .*{reason}"):
        convert(tmp_path, tmp_path / "out")


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def test_a_bag_cannot_read_outside_its_folder(tmp_path):
    (tmp_path / "bag").mkdir()
    write_original(tmp_path, "outside", tiny())
    (tmp_path / "bag" / "x.yaml").write_text("models: ['../outside']\n")
    with pytest.raises(ValueError, match="plain name"):
        convert(tmp_path / "bag", tmp_path / "out")
    (tmp_path / "bag" / "x.yaml").write_text("models: [inside]\n")
    (tmp_path / "bag" / "inside.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(ValueError, match="in the folder itself"):
        convert(tmp_path / "bag", tmp_path / "out")


def test_folders_that_are_not_one_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    for signature in ("a", "b"):
        write_original(tmp_path, signature, tiny())
    with pytest.raises(ValueError, match=r"got 2 \(a\.safetensors, b\.safetensors\)"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "b.safetensors").unlink()
    convert(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="this is a checkpoint already"):
        convert(tmp_path / "out", tmp_path / "again")
    with pytest.raises(FileNotFoundError, match=r"not a checkpoint, it has no config\.json"):
        convert(tmp_path, tmp_path / "again", to="pytorch")


def test_wrong_words(tmp_path):
    write_original(tmp_path, "sig", tiny())
    for arguments, reason in [
        ({"to": "onnx"}, 'to must be "mlx" or "pytorch"'),
        ({"family": "abacus"}, "family must be one of htdemucs"),
        ({"family": "htdemucs_bag"}, "family must be htdemucs_bag, got htdemucs"),
    ]:
        with pytest.raises(ValueError, match=reason):
            convert(tmp_path, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_originals_are_not_written_over(tmp_path):
    write_original(tmp_path, "sig", tiny())
    convert(tmp_path, tmp_path / "mlx")
    with pytest.raises(FileExistsError, match=r"must be new or empty, it holds"):
        convert(tmp_path / "mlx", tmp_path, to="pytorch")
    with pytest.raises(FileExistsError, match=r"must be new or empty, it holds"):
        convert(tmp_path / "mlx", tmp_path / "mlx", to="pytorch")


def test_a_signature_in_the_provenance_is_no_path(tmp_path):
    write_original(tmp_path, "sig", tiny())
    convert(tmp_path, tmp_path / "mlx")
    content = json.loads((tmp_path / "mlx" / "config.json").read_text())
    content["provenance"]["sources"][0]["signature"] = "../../escaped"
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="plain name"):
        convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    content["provenance"] = {"name": "../escaped"}
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="plain name"):
        convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    content["provenance"] = {}
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(content))
    files = convert(tmp_path / "mlx", tmp_path / "back", to="pytorch").files
    assert files[2] == "mlx.yaml" and len(files[0]) == len("01234567.safetensors")


@pytest.mark.real
def test_the_two_files_of_htdemucs_mini_give_the_same_checkpoint(tmp_path):
    folder = data_folder() / "htdemucs_mini"
    for name, file in {"a": "0cfe3614.safetensors", "b": "0cfe3614-97caca88.th", "c": "htdemucs_mini.yaml"}.items():
        report = convert(folder / file, tmp_path / name)
        assert report.parameters == 1_814_696 and sum(len(row.sources) for row in report.rows) == 465
    a, b, c = (read_checkpoint(tmp_path / name) for name in "abc")
    same_tensors(a.weights, b.weights)
    same_tensors(a.weights, c.weights)
    assert a.config == b.config == c.config and c.provenance["name"] == "htdemucs_mini"
    convert(tmp_path / "c", tmp_path / "back", to="pytorch")
    original, back = (read_source(f / "0cfe3614.safetensors") for f in (folder, tmp_path / "back"))
    same_tensors(original.tensors, back.tensors)
    assert json.loads(back.metadata["kwargs"]).items() >= json.loads(original.metadata["kwargs"]).items()


@pytest.mark.real
def test_foreign_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="the tensors alone do not tell the configuration"):
        convert(data_folder() / "story" / "model.safetensors", tmp_path / "out")
    assert not any(tmp_path.iterdir())
