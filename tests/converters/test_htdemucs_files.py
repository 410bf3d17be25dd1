"""Checkpoints of HTDemucs as people have them: wrapped, prefixed, of training runs, with a configuration or without."""

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import hashlib
import json
import pathlib
import pickle
import types
import zipfile
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.harness import same_tensors
from support.models import OPTIONS, options
from support.oracle import (
    Opcodes,
    opcodes,
    pickle_call,
    pickle_global,
    pickle_program,
    pickle_state,
    save_torch,
    save_torch_legacy,
    write_torch_zip,
)

from mlx_xformer import cli
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import htdemucs
from mlx_xformer.converters.families.htdemucs_options import count_sources, infer_options, list_hidden
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.converters.formats.training_config import read_training_config
from mlx_xformer.converters.recognition import list_files
from mlx_xformer.converters.rules import inverse_shapes
from mlx_xformer.models.families import parameter_shapes
from mlx_xformer.models.htdemucs import HTDemucsConfig
from mlx_xformer.storage.checkpoint import read_checkpoint

TINY = options("base") | {"channels": 2, "bottom_channels": 12, "t_layers": 2, "t_heads": 3}
CONFIG = HTDemucsConfig.from_dict(TINY)
KLASS = pickle_global("demucs.htdemucs", "HTDemucs")
KWARGS = {**TINY, "segment": CONFIG.segment}
OWN = {"sources": TINY["sources"], "samplerate": TINY["samplerate"], "segment": TINY["segment"]}  # not of `htdemucs:`

# As the configurations of Music-Source-Separation-Training are written: PyYAML alone takes 1e-3 for a text.
YAML = """
audio:
  chunk_size: 9896
training:
  batch_size: 8
  segment: {segment}
  samplerate: {samplerate}
  channels: 2
  instruments: {sources}
  target_instrument: null
  lr: 9.0e-05
augmentations:
  mixup_probs: !!python/tuple # of 2 and 3 stems
    - 0.2
    - 0.02
model: htdemucs
htdemucs:  # see demucs/htdemucs.py
  channels_time:
  num_subbands: 1
  multi_freqs: []
  dconv_init: 1e-3
  t_norm_in_group: False
  t_lr:
"""


def random_state(config=CONFIG, dtype=np.float16):
    shapes = inverse_shapes(htdemucs.rules(config), parameter_shapes("htdemucs", config.to_dict()))
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


STATE = random_state()


def write_yaml(path, **changes):
    given = {name: x for name, x in TINY.items() if name not in (*OWN, "audio_channels")} | changes
    head = YAML.format(**{**OWN, "segment": float(CONFIG.segment)})
    path.write_text(head + "".join(f"  {name}: {json.dumps(x)}\n" for name, x in given.items()))
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The checkpoint that every file below must become: from a package with plain keyword arguments."""
    folder = tmp_path_factory.mktemp("expected")
    save_torch(folder / "a.th", STATE, {"klass": KLASS, "args": (), "kwargs": KWARGS})
    convert(folder / "a.th", folder / "mlx")
    return read_checkpoint(folder / "mlx")


def check(expected, source, out, **given):
    """A source becomes the same weights and configuration; the report."""
    report = convert(source, out, **given)
    made = read_checkpoint(out)
    same_tensors(made.weights, expected.weights)
    differing = {name for name in made.config if made.config[name] != expected.config[name]}
    assert differing <= {"segment", "multi_freqs"} and HTDemucsConfig.from_dict(made.config).segment == pytest.approx(
        CONFIG.segment
    )
    return report


WRAPPED = {
    "state.th": lambda state: state,
    "state_dict.ckpt": lambda state: {"epoch": 3, "state_dict": state, "callbacks": {"a": [1, None]}},
    "model_state_dict.pt": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3},
    "state.pth": lambda state: {"state": state, "best_loss": 0.5},
    "model.pt": lambda state: {"model": state, "args": opaque("argparse", "Namespace")},
    "nested.ckpt": lambda state: {"model": {"state_dict": state}},
    "ddp.pth": lambda state: prefixed(state, "module."),
    "compiled.pth": lambda state: {"state_dict": prefixed(state, "_orig_mod.module.")},
    "lightning.ckpt": lambda state: {"state_dict": prefixed(state, "model.")},
    "bag_of_one.th": lambda state: prefixed(state, "models.0."),
    "no_best_yet.th": lambda state: {"state": state, "best_state": None, "history": []},
}


def prefixed(state, prefix):
    return {prefix + name: x for name, x in state.items()}


def opaque(module, name, state=None):
    """An object of a class that is not known here, with a state."""
    return Opcodes(pickle_global(module, name) + b")\x81" + (b"" if state is None else opcodes(state) + b"b"))


@pytest.mark.parametrize("name", WRAPPED)
def test_state_dicts_and_their_wrappers(tmp_path, expected, name):
    state, storages = pickle_state(STATE)
    write_torch_zip(tmp_path / name, pickle_program(WRAPPED[name](state)), storages)
    write_yaml((tmp_path / name).with_suffix(".yaml"))
    report = check(expected, tmp_path / name, tmp_path / "out")
    assert "num_subbands=1" in str(report) and f"options from {name.partition('.')[0]}.yaml" in report.reason


def test_the_best_state_of_a_training_run(tmp_path, expected):
    best, storages = pickle_state(STATE)
    last = dict(zip(best, reversed(best.values()), strict=True))
    run = {
        "state": last,
        "optimizer": {"state": {0: {}}},
        "history": [{}],
        "best_state": best,
        "args": opaque("a", "B"),
    }
    write_torch_zip(tmp_path / "checkpoint.th", pickle_program(run), storages)
    write_yaml(tmp_path / "config.yaml")
    assert check(expected, tmp_path / "checkpoint.th", tmp_path / "out").reason.startswith("from its best_state, ")


def conf(value):
    """A value as OmegaConf holds it."""
    if isinstance(value, dict):
        return omega("dictconfig", "DictConfig", _content={key: conf(x) for key, x in value.items()})
    if isinstance(value, list):
        return omega("listconfig", "ListConfig", _content=[conf(x) for x in value])
    return omega("nodes", "AnyNode", _val=value)


def test_the_arguments_of_a_training_run(tmp_path, expected):
    """demucs/train.py makes the model of its arguments: of dset, of model_segment, and of the section htdemucs."""
    state, storages = pickle_state(STATE)
    own = {name: x for name, x in TINY.items() if name not in (*OWN, "audio_channels")}
    dataset = {"sources": TINY["sources"], "channels": 2, "samplerate": TINY["samplerate"], "segment": 9}
    segment = float(CONFIG.segment)
    args = {"model": "htdemucs", "dset": dataset, "model_segment": segment, "htdemucs": own, "optim": {"lr": 0.1}}

    def write(**changes):
        run = {"state": state, "best_state": state, "args": conf(args | changes)}
        write_torch_zip(tmp_path / "checkpoint.th", pickle_program(run), storages)

    write()
    report = check(expected, tmp_path / "checkpoint.th", tmp_path / "out")
    assert report.reason == "from its best_state, options from its args" and not report.warnings
    write(model_segment=None, dset=dataset | {"segment": segment / 4})
    check(expected, tmp_path / "checkpoint.th", tmp_path / "out")
    write(model="hdemucs")
    with pytest.raises(ValueError, match="training run is one of Hybrid Demucs, which is not supported"):
        convert(tmp_path / "checkpoint.th", tmp_path / "again")
    write(htdemucs=None)  # another fork's arguments: they tell nothing
    with pytest.raises(ValueError, match="must be given sources"):
        convert(tmp_path / "checkpoint.th", tmp_path / "again")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda state: {"state_dict": state, "model": state}, "one model, got state_dict and model"),
        (lambda state: prefixed(state, "models.0.") | prefixed(state, "models.1."), "a bag of 2 models in one file"),
        (lambda state: {"model": opaque("a", "B"), "epoch": 3}, "every value must be a tensor, got epoch, model"),
        (lambda state: {"weights": state}, "every value must be a tensor, got weights: a dict"),
        (lambda state: state | {"epoch": opaque("os", "system")}, "epoch: os.system, which weights do not need"),
    ],
)
def test_files_that_are_not_one_state_dict(tmp_path, value, reason):
    state, storages = pickle_state(STATE)
    write_torch_zip(tmp_path / "a.pth", pickle_program(value(state)), storages)
    write_yaml(tmp_path / "a.yaml")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "a.pth", tmp_path / "out")
    assert reason in str(error.value) and str(error.value).startswith(f"{tmp_path / 'a.pth'}: ")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# Whole models and packages with what people put into them


def module(name, parameters=None, **children):
    """A module as torch.save(model) pickles it."""
    absent = {"none": None}
    state = {"training": False, "_parameters": absent | (parameters or {}), "_buffers": {}, "_modules": children}
    return opaque("torch.nn", name, state | {"_non_persistent_buffers_set": Opcodes(b"\x8f")})


def nest(state):
    """A module's tree from the names of a state dict."""
    tree = {}
    for name, x in state.items():
        *path, leaf = name.split(".")
        functools.reduce(lambda at, part: at.setdefault(part, {}), path, tree)[leaf] = x
    return tree


def as_module(tree, name="Module", **more):
    leaves = {key: x for key, x in tree.items() if isinstance(x, bytes)}
    children = {key: as_module(x) for key, x in tree.items() if not isinstance(x, bytes)}
    return module(name, leaves, **children)


@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "in DataParallel"])
def test_a_whole_model(tmp_path, expected, wrapped):
    state, storages = pickle_state(STATE)
    tree = nest(state)
    content = {
        "_parameters": {},
        "_buffers": {},
        "_modules": {key: as_module(x) for key, x in tree.items()},
        "_init_args_kwargs": ((TINY["sources"],), {key: x for key, x in KWARGS.items() if key != "sources"}),
        "hook": opaque("os", "system"),
    }
    whole = opaque("demucs.htdemucs", "HTDemucs", content)
    value = module("DataParallel", module=whole) if wrapped else {"model": whole}
    write_torch_zip(tmp_path / "a.pth", pickle_program(value), storages)
    check(expected, tmp_path / "a.pth", tmp_path / "out")


def test_whole_models_that_make_no_sense(tmp_path):
    loop = Opcodes(b"cx\nX\n)\x81q\x00" + opcodes({"_parameters": {}, "_buffers": {}}) + b"X\x08\0\0\0_modules}q\x01")
    loop = Opcodes(loop + b"X\x01\0\0\0ah\x00ssb")  # a module that is its own child
    for value, reason in [
        (loop, "nested too deep"),
        (opaque("x", "X", {"_modules": {}}), "must have _parameters"),
        (module("X", a=3), "module a must be a module, got a int"),
        (module("X", {"w": 3}), "every value must be a tensor, got w"),
    ]:
        write_torch_zip(tmp_path / "a.pth", pickle_program(value), {})
        with pytest.raises(ValueError, match=reason):
            read_source(tmp_path / "a.pth")


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Arguments:
    lr: float = 0.1


ANYTHING = [
    datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
    pathlib.PurePosixPath("/data"),
    {1, 2},
    frozenset("ab"),
    decimal.Decimal("1.5"),
    Color.RED,
    Arguments(),
    types.SimpleNamespace(a=[1]),
    1 + 2j,
    b"bytes",
    bytearray(b"bytes"),
    np.float64(3e-4),
    np.arange(3),
    collections.defaultdict(list, a=[1]),
    collections.Counter("aab"),
    collections.deque([1, 2]),
    functools.partial(print, 1),
    range(3),
    {(1, 2): 3},
    2**4000,
    "text" * 100,
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arguments_of_the_training_do_not_matter(tmp_path, expected, protocol):
    loop = []
    loop.append((loop,))
    content = pickle.dumps({"everything": ANYTHING, "loop": loop}, protocol)
    package = {"klass": KLASS, "args": (), "kwargs": KWARGS, "training_args": Opcodes(content[2:-1])}
    save_torch(tmp_path / "a.th", STATE, package | {"date": opaque("datetime", "date")})
    check(expected, tmp_path / "a.th", tmp_path / "out")


def embed(value, protocol=2):
    return Opcodes(pickle.dumps(value, protocol)[2:-1])


def omega(module, name, **state):
    return opaque(f"omegaconf.{module}", name, {"_metadata": opaque("omegaconf.base", "Metadata"), **state})


@pytest.mark.parametrize("protocol", [2, 5])
def test_arguments_of_the_model_in_other_forms(tmp_path, expected, protocol):
    sources = omega("listconfig", "ListConfig", _content=[omega("nodes", "AnyNode", _val=s) for s in TINY["sources"]])
    numbers = {name: embed(np.int64(x), protocol) for name, x in TINY.items() if type(x) is int}
    numbers |= {name: embed(np.bool_(x), protocol) for name, x in TINY.items() if type(x) is bool}
    rest = {name: x for name, x in KWARGS.items() if name != "sources"}
    for args, kwargs in [
        ((TINY["sources"],), rest),
        ([TINY["sources"]], rest),
        ((), {**rest, "sources": sources}),
        ((), {**KWARGS, **numbers, "segment": embed(np.float32(CONFIG.segment), protocol)}),
    ]:
        save_torch(tmp_path / "a.th", STATE, {"klass": KLASS, "args": args, "kwargs": kwargs})
        check(expected, tmp_path / "a.th", tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (embed(pathlib.PurePosixPath("x")), "PurePosixPath, which weights do not need"),
        (embed(np.arange(3)), r"numpy\.\w+\.multiarray\._reconstruct, which"),
        (pickle_call(pickle_global("os", "system"), "true"), "os.system, which"),
        (embed({(1, 2): 3}), "a dict, not plain values"),
        (omega("listconfig", "ListConfig"), "omegaconf.listconfig.ListConfig, which"),
    ],
)
def test_arguments_of_the_model_that_are_no_values(tmp_path, value, reason):
    save_torch(tmp_path / "a.th", STATE, {"klass": KLASS, "args": (), "kwargs": {**KWARGS, "t_lr": value}})
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "a.th", tmp_path / "out")


def test_the_older_format(tmp_path, expected):
    klass = Opcodes(opcodes(("module", KLASS, "htdemucs.py", "import os")) + b"Q")  # with its source code
    package = {"klass": klass, "args": (), "kwargs": KWARGS}
    save_torch_legacy(tmp_path / "a.th", STATE, lambda state: {**package, "state": state})
    check(expected, tmp_path / "a.th", tmp_path / "out")
    for given, reason in [
        ({"cut": 1}, "truncated: it must have"),
        ({"cut": 8 + 2 * list(STATE.values())[-1].size}, "truncated or damaged: storage"),
        ({"version": 1000}, "must have version 1001"),
    ]:
        save_torch_legacy(tmp_path / "b.th", STATE, **given)
        with pytest.raises(ValueError, match=reason):
            read_source(tmp_path / "b.th")


def test_options_that_htdemucs_does_not_have(tmp_path, expected):
    package = {"klass": KLASS, "args": (), "kwargs": {**KWARGS, "num_subbands": 1, "new_option": None}}
    save_torch(tmp_path / "a.th", STATE, package)
    report = check(expected, tmp_path / "a.th", tmp_path / "out")
    line = "options that HTDemucs does not have and that do nothing with these values: num_subbands=1, new_option=null"
    assert report.warnings == (line,) and f"warning     {line}" in str(report)
    for other, reason in [
        ({"num_subbands": 2}, "num_subbands must be 1, got 2: it is not implemented"),
        ({"new_option": 0}, "no option named new_option"),
    ]:
        save_torch(tmp_path / "a.th", STATE, package | {"kwargs": package["kwargs"] | other})
        with pytest.raises(ValueError, match=reason):
            convert(tmp_path / "a.th", tmp_path / "again")
    metadata = {"klass": htdemucs.KLASS, "args": "[]", "kwargs": json.dumps({**TINY, "new_option": None})}
    save_file(STATE, tmp_path / "sig.safetensors", metadata)
    (tmp_path / "bag.yaml").write_text("models: [sig, sig]\n")
    assert convert(tmp_path / "bag.yaml", tmp_path / "bag").warnings[0].startswith("sig.safetensors: options that HTD")


def test_float64_is_rounded_and_said(tmp_path):
    double = {name: x + 1e-9 for name, x in random_state(dtype=np.float64).items()}
    save_torch(tmp_path / "double.th", double, {"klass": KLASS, "args": (), "kwargs": KWARGS})
    single = {name: x.astype(np.float32) for name, x in double.items()}
    save_torch(tmp_path / "single.th", single, {"klass": KLASS, "args": (), "kwargs": KWARGS})
    report = convert(tmp_path / "double.th", tmp_path / "a")
    assert report.warnings == (f"{len(double)} tensors of float64 are rounded to float32, which MLX can store",)
    assert f"{len(double)} F64), all accounted for, become" in str(report)
    assert not convert(tmp_path / "single.th", tmp_path / "b").warnings
    same_tensors(read_checkpoint(tmp_path / "a").weights, read_checkpoint(tmp_path / "b").weights)


# Configurations


def test_where_the_configuration_is_found(tmp_path, expected):
    save_torch(tmp_path / "a.ckpt", STATE)
    write_yaml(tmp_path / "config_vocals.yml")
    (tmp_path / "config_other.yaml").write_text("training: {}\nmodel: {dim: 384}\n")
    (tmp_path / "bag.yaml").write_text("models: ['a']\n")
    assert "options from config_vocals.yml" in check(expected, tmp_path / "a.ckpt", tmp_path / "out").reason
    assert list_files(tmp_path / "a.ckpt") == [tmp_path / "config_vocals.yml", tmp_path / "a.ckpt"]
    write_yaml(tmp_path / "config_two.yaml")
    assert [path.name for path in list_files(tmp_path / "a.ckpt")] == ["config_two.yaml", "config_vocals.yml", "a.ckpt"]
    with pytest.raises(ValueError, match=r"got config_two\.yaml, config_vocals\.yml: name it by --set config=FILE"):
        convert(tmp_path / "a.ckpt", tmp_path / "out")
    named = write_yaml(tmp_path / "named.yaml")
    assert cli.main(["convert", f"{tmp_path / 'a.ckpt'}", f"{tmp_path / 'o'}", "--set", f"config={named}"]) == 0
    same_tensors(read_checkpoint(tmp_path / "o").weights, expected.weights)
    write_yaml(tmp_path / "a.yaml")  # of the same name: it wins
    assert "options from a.yaml" in check(expected, tmp_path / "a.ckpt", tmp_path / "out").reason
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such file"):
        convert(tmp_path / "a.ckpt", tmp_path / "out", settings={"config": f"{tmp_path / 'nowhere.yaml'}"})


def test_a_folder_of_a_training_run(tmp_path, expected):
    (tmp_path / "run").mkdir()
    save_torch(tmp_path / "run" / "a.ckpt", STATE)
    write_yaml(tmp_path / "run" / "config.yaml")
    check(expected, tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match=r"config\.yaml: the configuration of a training run: name the checkpoint"):
        convert(tmp_path / "run" / "config.yaml", tmp_path / "out")


def test_settings_come_before_the_configuration(tmp_path):
    save_torch(tmp_path / "a.ckpt", STATE)
    write_yaml(tmp_path / "a.yaml")
    convert(tmp_path / "a.ckpt", tmp_path / "out", settings={"use_train_segment": False, "segment": "3/2"})
    config = HTDemucsConfig.from_dict(read_checkpoint(tmp_path / "out").config)
    assert config == dataclasses.replace(CONFIG, multi_freqs=(), use_train_segment=False, segment=Fraction(3, 2))
    with pytest.raises(ValueError, match=r"a\.ckpt: makes no model \(TypeError"):
        convert(tmp_path / "a.ckpt", tmp_path / "again", settings={"t_lr": {1}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("training: {}\nhdemucs: {channels: 8}\n", "must have a section htdemucs, .*: Hybrid Demucs is not supported"),
        ("training: {}\nmodel: {dim: 384}\n", "must have a section htdemucs"),
        ("htdemucs: {segment: 1}\ntraining: {segment: 2}\n", "segment must stand in one of training and htdemucs"),
        ("htdemucs: {a: !!python/name:os.system }\ntraining: {}\n", "not plain YAML"),
        ("htdemucs: {a: !!python/tuple [!!python/name:os.system ]}\ntraining: {}\n", "not plain YAML"),
    ],
)
def test_configurations_that_are_refused(tmp_path, text, reason):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml: .*{reason}"):
        read_training_config(tmp_path / "a.yaml")


def test_what_is_missing_is_named(tmp_path, expected, capsys):
    save_torch(tmp_path / "a.ckpt", STATE)
    command = ["convert", f"{tmp_path / 'a.ckpt'}", f"{tmp_path / 'out'}"]
    assert cli.main(command) == 1
    line = capsys.readouterr().err.strip()
    assert (
        "\n" not in line
        and "must be given sources (3 names), samplerate, segment, t_heads: set them by convert --set" in line
    )
    sources = ",".join(TINY["sources"])
    for setting in (f"sources={sources}", "samplerate=8000", "t_heads=3"):
        command += ["--set", setting]
    assert cli.main(command) == 1 and "must be given segment: set" in capsys.readouterr().err
    done = cli.main([*command, "--set", f"segment={TINY['segment']}"])
    shown = capsys.readouterr()
    assert done == 0, shown.err
    shown = shown.out
    assert 'not shown by the tensors, taken by default: freq_emb=0.2, emb_scale=10, dconv_depth=2, t_emb="sin"' in shown
    made = read_checkpoint(tmp_path / "out")
    same_tensors(made.weights, expected.weights)
    assert made.config == expected.config
    with pytest.raises(
        ValueError, match="settings are for state dicts of HTDemucs without a configuration, got segment"
    ):
        save_torch(tmp_path / "b.th", STATE, {"klass": KLASS, "args": (), "kwargs": KWARGS})
        convert(tmp_path / "b.th", tmp_path / "out", settings={"segment": 3})
    with pytest.raises(ValueError, match=r"whole HTDemucs: 'encoder\.0\.conv\.weight' is missing"):
        save_torch(tmp_path / "c.th", {name: x for name, x in STATE.items() if name != "encoder.0.conv.weight"})
        convert(tmp_path / "c.th", tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"nosuch": 1}, "no option named nosuch"),
        ({"sources": 3}, "sources must be of type"),
        ({"sources": "one,two"}, "do not fit the model"),
        ({"segment": "long"}, "segment must be a number of seconds"),
        ({"t_heads": 0}, "t_heads must be above 0"),
        ({"growth": 1e300}, "growth must be at most 1000"),
        ({"t_lr": {1}}, "t_lr must be of type float"),
        ({"config": 3}, "config must be the name of a .yaml file, got 3"),
    ],
    ids=str,
)
def test_settings_that_are_refused(tmp_path, setting, reason):
    save_torch(tmp_path / "a.ckpt", STATE)
    with pytest.raises(ValueError, match=reason) as error:
        convert(tmp_path / "a.ckpt", tmp_path / "out", settings={**OWN, "t_heads": 3} | setting)
    assert str(error.value).startswith(f"{tmp_path / 'a.ckpt'}: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_options_from_shapes(name):
    """What the tensors show is what the configuration says; the rest is listed, and makes no tensor."""
    config = HTDemucsConfig.from_dict(options(name))
    tensors = {name: mx.zeros(shape) for name, shape in state_shapes(config).items()}
    shown = infer_options(tensors)
    assert count_sources(tensors) == len(config.sources)
    # Other values of these mean the same tensors: without norms, with the norms after, in a range of ratios.
    silent = {"norm_starts", "t_norm_out", "t_cross_first", "t_norm_in", "dconv_comp", "t_max_positions"}
    for option in shown.keys() - silent:
        expected = getattr(config, option)
        assert shown[option] == (abs(expected) if option == "dconv_depth" else expected), option
    rest = {option: getattr(config, option) for option in (*OWN, "t_heads", "nfft", *list_hidden(shown))}
    again = HTDemucsConfig.from_dict({**rest, **shown, "use_train_segment": False})
    assert state_shapes(again) == state_shapes(config)


def state_shapes(config):
    return inverse_shapes(htdemucs.rules(config), parameter_shapes("htdemucs", config.to_dict()))


# The way back


class Reader(pickle.Unpickler):
    """Python's own unpickler, with stand-ins for PyTorch's names."""

    def __init__(self, archive):
        self.archive = archive
        super().__init__(archive.open("archive/data.pkl"))

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda data, offset, size, stride, grad, hooks: np.lib.stride_tricks.as_strided(
                data[offset:], size, [data.itemsize * n for n in stride]
            )
        if (module, name) in [("fractions", "Fraction"), ("collections", "OrderedDict")]:
            return super().find_class(module, name)
        return f"{module}.{name}"

    def persistent_load(self, key):
        kind, storage, name, place, count = key
        dtype = {"torch.HalfStorage": np.float16, "torch.FloatStorage": np.float32}[storage]
        data = np.frombuffer(self.archive.read(f"archive/data/{name}"), dtype)
        assert (kind, place, count) == ("storage", "cpu", data.size)
        return data


def test_a_package_for_demucs(tmp_path):
    """`demucs --repo` finds SIGNATURE-DIGITS.th, whose SHA-256 begins with the digits."""
    state = {name: x.astype(np.float32) if "norm" in name else x for name, x in STATE.items()}
    save_torch(tmp_path / "my model.th", state, {"klass": KLASS, "args": (), "kwargs": KWARGS})
    convert(tmp_path / "my model.th", tmp_path / "mlx")
    report = convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    (file,) = (tmp_path / "back").glob("*.th")
    assert report.files == ("my_model.safetensors", file.name, "mlx.yaml")
    assert file.name == f"my_model-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.th"
    with zipfile.ZipFile(file) as archive:
        package = Reader(archive).load()
    assert package["klass"] == "demucs.htdemucs.HTDemucs" and package["args"] == () and package["training_args"] == {}
    assert HTDemucsConfig.from_dict(package["kwargs"]) == CONFIG and type(package["kwargs"]["segment"]) is Fraction
    assert package["state"].keys() == state.keys()
    assert all(x.dtype == state[name].dtype and np.array_equal(x, state[name]) for name, x in package["state"].items())
    convert(tmp_path / "mlx", tmp_path / "again", to="pytorch")
    assert [p.read_bytes() for p in (tmp_path / "again").glob("*.th")] == [file.read_bytes()]
    for source in (file, tmp_path / "back"):
        convert(source, tmp_path / "forth")
        same_tensors(read_checkpoint(tmp_path / "forth").weights, read_checkpoint(tmp_path / "mlx").weights)
