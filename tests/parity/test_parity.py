"""parity.run: what it covers, that it passes here, and that it fails where it must and says where."""

import ast
import inspect
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.models import bag_checkpoint, checkpoint
from support.text import causal_lm_config as config
from support.text import write_folder

import mlx_xformer
from mlx_xformer import parity
from mlx_xformer.backend import activations, fused
from mlx_xformer.converters.conversion import convert
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig
from mlx_xformer.models.htdemucs import layers as htdemucs_layers
from mlx_xformer.nn import layers, masks, mel, positions, rotary, spectral
from mlx_xformer.nn.attention import core, scores, torch_layout
from mlx_xformer.nn.cache import KVCache, kv
from mlx_xformer.parity import judge, runner
from mlx_xformer.parity.families import FAMILIES
from mlx_xformer.parity.judge import Trial, compare
from mlx_xformer.parity.report import Place, Report, Row
from mlx_xformer.parity.samples import Case, Sample, function
from mlx_xformer.text import samplers

PACKAGE = Path(mlx_xformer.__file__).parent
MINI = PACKAGE / "data" / "htdemucs_mini"
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def report():
    """Some operations and layers in half precision, for one seed."""
    return parity.run(["attention", "causal_mask", "glu", "LayerNorm", "stft"], dtypes=["float16"], seeds=1)


EXACT = {"relu", "reflect_pad", "greedy", "make_sampler", "keep_top_k", "keep_top_p", "keep_min_p"}


def test_some_pass(report):
    assert not report.failed, report.table()


@pytest.mark.slow
def test_everything_passes():
    report = parity.run(seeds=1)
    assert not report.failed, report.table()
    checks = {(row.name, row.check) for row in report.rows}
    for name in parity.NAMES:
        case = runner.CASES[name]
        dtypes = DTYPES[:1] if case.float32_only else DTYPES
        derivatives = [f"{dtype} vjp" for dtype in dtypes] if case.vjp else []
        wanted = ["exact"] if case.constant else [*dtypes, *derivatives]
        assert all((name, check) in checks for check in wanted), name
    for row in report.rows:
        assert row.passed + row.skips == row.attempted >= 5 and row.skips <= 0.05 * row.attempted, row
        exact = row.name in EXACT or "mask" in row.name or row.check != "float32"
        assert 0 <= row.worst <= 1 and (row.worst > 0 or exact), row
    assert sum(row.attempted for row in report.rows) > 3000


EXEMPT = {
    "hann_window": "a factor of stft and istft",
    "mel_filters": "a factor of log_mel",
    "alibi_slopes": "a factor of alibi_bias",
    "suppress_tokens": "a sampler without some tokens, which are compared in test_samplers",
    "apply_dropout": "random: what becomes 0, and by how much the rest grows, is in test_stack",
}


def test_every_public_operation_has_a_case():
    """Functions and classes that these modules define, but for plans and what is named above."""
    for module in (core, masks, positions, rotary, layers, spectral, mel, torch_layout, samplers):
        for name, thing in vars(module).items():
            public = not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
            if public and (inspect.isfunction(thing) or inspect.isclass(thing)) and name not in ("plan", "Plan"):
                assert (name in parity.NAMES) != (name in EXEMPT), f"{module.__name__}.{name}"
    assert {*activations.ACTIVATIONS, "swiglu", "geglu_tanh"} <= set(parity.NAMES)
    assert {"Attention", "initialize", "Linear", "QuantizedLinear", "resample", "separate"} <= set(parity.NAMES)
    assert {f"{family}.model" for family in FAMILIES} - set(parity.NAMES) == {
        f"{family}.model" for family in ("htdemucs_bag", "scratch_encoder_decoder")
    }


def test_the_grid_is_adverse():
    """The samples of attention hold what the contracts are about."""
    samples = list(runner.CASES["attention"].samples(np.random.default_rng(0)))
    text = "\n".join(sample.what for sample in samples)
    for what in ("one position", "no queries", "no keys", "no batch", "more queries than keys", "views with gaps",
                 "tied", "1e4", "NaN", "infinity", "nothing to attend", "blind"):  # fmt: skip
        assert what in text, what
    few = [s for s in samples if s.what.startswith("B=2 H=6 G=3 L=5 S=7")]
    blind = [s for s in few if not np.broadcast_to(s.options.get("mask", True), (2, 6, 5, 7)).any(axis=-1).all()]
    assert len(blind) >= 3
    assert {s.arrays["v"].shape[-1] != s.arrays["q"].shape[-1] for s in samples} == {True, False}
    assert any(s.strided for s in samples) and all(s.what for s in samples)


def test_every_path_of_attention_is_taken(monkeypatch):
    plans, unmasked = [], []
    plan, plain = core.plan, fused.unmasked_attention

    def planned(q, k, value_dim, **given):
        plans.append((plan(q, k, value_dim, **given), q[2], given))
        return plans[-1][0]

    monkeypatch.setattr(core, "plan", planned)
    monkeypatch.setattr(fused, "unmasked_attention", lambda q, *x: unmasked.append(q.shape) or plain(q, *x))
    assert not parity.run(["attention"], seeds=1, dtypes=["float32"]).failed
    kinds = {(how.explicit, how.rows < L, given["window"] is not None) for how, L, given in plans}
    assert kinds >= {(False, False, False), (False, False, True), (True, False, False), (True, True, True)}
    assert any(how.rows < L and given["causal"] for how, L, given in plans)
    assert {shape[2] for shape in unmasked} >= {5, 197}


def test_the_same_seed_gives_the_same_report():
    reports = [json.loads(parity.run(["glu", "prefix_mask"], seeds=[3], dtypes=["float16"]).to_json()) for _ in "ab"]
    assert reports[0].pop("seconds") >= 0 <= reports[1].pop("seconds")
    assert reports[0] == reports[1]
    assert [(row["name"], row["check"]) for row in reports[0]["rows"]] == [
        ("glu", "float16"),
        ("glu", "float16 vjp"),
        ("prefix_mask", "exact"),
    ]
    assert reports[0]["seeds"] == [3] and reports[0]["rows"][0]["place"]["seed"] == 3


def test_table(report):
    table = report.table().splitlines()
    head, rows = table[0], table[1 : 1 + len(report.rows)]
    starts = [head.index(word) for word in ("name", "check")]
    ends = [head.index(word) + len(word) for word in ("attempted", "passed", "skipped", "error")]
    for line, row in zip(rows, report.rows, strict=True):
        assert [line[start:].split("  ")[0] for start in starts] == [row.name, row.check]
        counts = [line[:end].split()[-1] for end in ends]
        assert counts[:3] == [str(row.attempted), str(row.passed), str(row.skips)] and float(counts[3]) <= 1
        assert re.search(r"seed 0 sample \d+: \S", line)
    assert any(line.startswith("skipped  attention: ") and "NaN" in line for line in table)
    assert re.match(
        r"passed: \d+ of \d+ checks, \d+ skipped, largest error: 0\.\d\d of its tolerance; 1 seed, \d+ s \(", table[-1]
    )
    assert "FAILED" not in report.table()


def test_json(report):
    told = json.loads(report.to_json())
    assert told["failed"] is False and told["seeds"] == [0] and set(told["versions"]) == {"mlx-xformer", "mlx", "numpy"}
    row = next(row for row in told["rows"] if row["name"] == "attention" and row["check"] == "float16 vjp")
    assert sum(row["skipped"].values()) == row["attempted"] - row["passed"] == 2 and row["failures"] == []


# The judge


def drawn(count):
    def samples(rng):
        for index in range(count):
            yield Sample(f"sample {index}", {"x": rng.normal(size=(5, 7))})

    return samples


def proven(ours, samples=None, dtypes=("float32",)):
    """The rows of a case whose twin is tanh."""
    case = Case(samples or drawn(3), function(ours), function(lambda x: np.tanh(x)))
    return {row.check: row for row in runner._prove("case", case, dtypes, (0,))}


def tanh(x):
    return mx.tanh(x)


def budget(x):
    """float32's, of tanh."""
    x = np.array(x)
    truth = np.tanh(x.astype(np.float64))
    return 4 * np.abs(np.tanh(x) - truth).max() + 1e-6 * np.abs(truth).max(), truth


@pytest.mark.parametrize(("factor", "passes"), [(0.9, True), (1.1, False), (5, False)])
def test_errors_in_units_of_the_tolerance(factor, passes):
    def off(x):
        allowed, truth = budget(x)
        truth[2, 3] += factor * allowed
        return mx.array(truth.astype(np.float32))

    row = proven(lambda x: off(x), dtypes=("float32",))["float32"]
    assert row.passed == (3 if passes else 0) and row.failed != passes
    assert row.worst == pytest.approx(factor, rel=0.2)
    if not passes:
        assert re.fullmatch(r"error \S+ is \S+ times its tolerance", row.place.why)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("factor", "passes"), [(0.7, True), (1.6, False)])
def test_half_precision_is_held_to_its_rounding(dtype, factor, passes):
    eps = {"float16": 2**-10, "bfloat16": 2**-7}[dtype]

    def off(x):
        truth = np.tanh(np.array(x.astype(mx.float32)))
        truth[np.unravel_index(np.abs(truth).argmin(), truth.shape)] += factor * 3 * eps * np.abs(truth).max()
        return mx.array(truth).astype(x.dtype)

    assert proven(off, dtypes=(dtype,))[dtype].passed == (3 if passes else 0)


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        (lambda x: mx.tanh(x)[:4], r"shape \(4, 7\), expected \(5, 7\)"),
        (lambda x: mx.tanh(x).astype(mx.float16), "dtype mlx.core.float16, expected float32"),
        (lambda x: mx.where(x > 1, mx.nan, mx.tanh(x)), "values are NaN or infinite, expected 0"),
        (lambda x: (mx.tanh(x), x), "2 outputs, expected 1"),
        (lambda x: mx.tanh(x) + mx.zeros((4, 7)), "ValueError: .*broadcast"),
    ],
)
def test_what_fails_beside_large_errors(ours, why):
    row = proven(ours)["float32"]
    assert row.passed < 3 and row.worst == np.inf and re.search(why, row.place.why)


def test_compare():
    nan, inf = np.nan, np.inf
    expected = np.array([1.0, nan, inf, -inf])
    assert compare(expected + 0.9, expected, 1.0) == (pytest.approx(0.9), "")
    for actual in ([1, nan, inf, inf], [1, 0, inf, -inf], [nan, nan, inf, -inf], [1, inf, nan, -inf]):
        assert "NaN or infinite" in compare(np.array(actual, float), expected, 1.0).why
    zeros = np.zeros(3)
    assert compare(zeros, zeros, 0.0).passed and not compare(zeros + 1e-30, zeros, 0.0).passed
    flags = np.array([True, False])
    assert compare(flags, flags, 0.0).passed and compare(~flags, flags, 0.0).why == "2 of 2 values differ"
    assert "dtype" in compare(flags.astype(np.int32), flags, 0.0).why
    assert "dtype" in compare(flags.astype(float), flags.astype(np.int64), 0.0).why


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("wrong", [1.3, -1, 0, mx.nan])
def test_wrong_gradients(dtype, only, wrong):
    """Right values whose derivative is off, or not a number, in one dtype or in all of them."""
    bent = mx.custom_function(tanh)
    bent.vjp(lambda x, u, out: u * (1 - out * out) * (wrong if x.dtype == DTYPE[dtype] or not only else 1))
    rows = proven(lambda x: bent(x), dtypes=(dtype,))
    assert not rows[dtype].failed and rows[f"{dtype} vjp"].passed == 0
    why = (
        "the gradient by x is not finite" if wrong is mx.nan else r"gradient by x: error \S+ is \S+ times its tolerance"
    )
    if dtype != "float32" and not only and wrong is not mx.nan:
        why = f"in float32 at these inputs, {why}"
    assert re.fullmatch(why, rows[f"{dtype} vjp"].place.why)
    assert not proven(tanh, dtypes=(dtype,))[f"{dtype} vjp"].failed


def test_a_quotient_that_is_no_number_is_no_proof(monkeypatch):
    monkeypatch.setattr(judge, "_quotient", lambda *_: np.nan)
    assert proven(tanh)["float32 vjp"].passed == 0


DTYPE = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def test_views_have_gaps():
    """The arrays of a strided sample are views whose gaps hold NaN."""
    sample = Sample("views", {"x": np.arange(12.0).reshape(3, 4)}, strided=True)
    (x,) = Trial(Case(drawn(1), function(tanh), function(np.tanh)), sample, "float16").primals("float16")
    assert x.shape == (3, 4) and x.dtype == mx.float16 and (np.array(x) == np.arange(12).reshape(3, 4)).all()
    assert np.asarray(x).strides == (2, 12)  # of 2 bytes: neither dense nor in rows


def test_a_skip_is_not_a_pass():
    def samples(skipped):
        return lambda rng: (
            replace(sample, skip_half="no digits", skip_vjp="no quotient") if index < skipped else sample
            for index, sample in enumerate(drawn(20)(rng))
        )

    rows = proven(tanh, samples=samples(1), dtypes=DTYPES)
    assert [(row.attempted, row.passed, row.skipped, row.failed) for row in rows.values()] == [
        (20, 20, {}, False),
        *[(20, 19, {"no digits": 1}, False)] * 2,
        (20, 19, {"no quotient": 1}, False),
        *[(20, 19, {"no digits": 1}, False)] * 2,
    ]
    rows = proven(tanh, samples=samples(2), dtypes=DTYPES)
    assert [row.failed for row in rows.values()] == [False, *[True] * 5]
    told = Report(tuple(rows.values()), "cpu", {}, (0,), 0.0)
    assert told.failed and "case float16: over 5 % of its samples are skipped" in told.table()
    nothing = Report((Row("case", "float32"),), "cpu", {}, (0,), 0.0)
    assert nothing.failed and "case float32: nothing was proven" in nothing.table()
    assert "skipped  case: 8, no digits" in told.table()


def test_infinite_ratios_are_json():
    row = Row("case", "float32")
    row.add(np.inf, Place(0, 1, "what", "why"))
    told = json.loads(Report((row,), "cpu", {}, (0,), 0.0).to_json())
    assert told["rows"][0]["worst"] == "inf" and told["rows"][0]["failures"][0]["why"] == "why" and told["failed"]


# Planted bugs


def fails(names, **options):
    """The report of a run that fails, for float32 and a seed."""
    found = parity.run(names, dtypes=["float32"], seeds=[1], **options)
    assert found.failed and found.table().splitlines()[-1].startswith("FAILED: ")
    return found


@pytest.mark.mutants
def test_a_worst_case_is_found_again(monkeypatch):
    """A causal mask that shows one key too many: named by seed and sample, and only where it is causal."""
    band = scores.Hidden._band

    def late(self, rows, keys):
        return (
            band(replace(self, S=self.S + 1), rows, keys)
            if self.causal and self.window is None
            else band(self, rows, keys)
        )

    monkeypatch.setattr(scores.Hidden, "_band", late)
    found = fails(["attention"])
    row = found.rows[0]
    assert row.place.why and row.failures and all("causal" in place.what for place in row.failures)
    line = next(line for line in found.table().splitlines() if line.startswith("FAILED   attention float32:"))
    assert f"seed 1 sample {row.place.sample}, {row.place.what}: error" in line
    sample = list(runner.CASES["attention"].samples(runner.generator("attention", 1)))[row.place.sample]
    assert sample.what == row.place.what
    assert Trial(runner.CASES["attention"], sample, "float32").values().ratio == row.worst


@pytest.mark.mutants
def test_planted_polarity_scale_and_refusal(monkeypatch):
    part = scores.part_of
    monkeypatch.setattr(scores, "part_of", lambda x, *at: ~part(x, *at) if x.dtype == mx.bool_ else part(x, *at))
    assert all("mask" in place.what or "sequence" in place.what or "attend" in place.what or "random" in place.what
               or "NaN" in place.what for place in fails(["attention"]).rows[0].failures)  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(positions, "alibi_slopes", lambda count: 2.0 ** -np.arange(count))
    assert fails(["alibi_bias"]).rows[0].place.why.startswith("error")
    monkeypatch.setattr(spectral, "hann_window", lambda length: mx.ones((length + 1,)))
    assert "ValueError" in fails(["stft"]).rows[0].place.why


# Models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("parity") / "tiny")


@pytest.mark.slow
def test_the_bundled_model_is_proven():
    found = parity.run(folder=MINI, seeds=1)
    assert not found.failed, found.table()
    names = {row.name for row in found.rows}
    for part in ("encoder", "tencoder", "decoder", "tdecoder"):
        assert {f"{part}.{index}" for index in range(4)} <= names
    assert {f"crosstransformer.{branch}.{index}" for branch in ("layers", "layers_t") for index in range(3)} <= names
    assert {"channel_upsampler", "channel_downsampler_t", "crosstransformer", "model"} <= names
    assert {row.check for row in found.rows} == {"float32", "float32 vjp"} and found.seconds < 120


@pytest.mark.mutants
def test_a_model_that_computes_otherwise_is_named(tiny, monkeypatch):
    assert not parity.run(folder=tiny, seeds=1).failed
    gated = htdemucs_layers._gated
    monkeypatch.setattr(htdemucs_layers, "_gated", lambda *x: gated(*x) * (1 + 1e-4))
    failed = {row.name for row in parity.run(folder=tiny, seeds=1).rows if row.failed}
    assert {"encoder.0", "tdecoder.1", "model"} <= failed
    assert not {name for name in failed if name.startswith(("channel", "crosstransformer"))}


def test_a_bag_is_proven_member_by_member(tmp_path):
    folder = bag_checkpoint(tmp_path / "bag", [[1.0] * 3, [2.0] * 3], t_layers=1)
    found = parity.run(folder=folder, seeds=1)
    assert not found.failed
    assert {row.name.split(".")[1] for row in found.rows} == {"0", "1"}


@pytest.fixture(scope="module", params=["mistral", "gemma 3"])
def sliding(request, tmp_path_factory):
    """A decoder whose window is wider than the samples, and the names of its layers with one."""
    folder = tmp_path_factory.mktemp("parity")
    own = config(request.param, window=16)
    write_folder(folder / "hf", own)
    convert(folder / "hf", folder / "mlx")
    local = {f"model.layers.{index}" for index in range(own.num_layers) if own.layer_window(index)}
    return folder / "mlx", local


WHOLE = {"model", "model, cached"}


def named(folder):
    """The cases of a folder that fail."""
    return {row.name for row in parity.run(folder=folder, seeds=1).rows if row.failed}


def test_windows_and_caches_of_a_decoder(sliding):
    folder, local = sliding
    found = parity.run(folder=folder, seeds=1)
    assert not found.failed, found.table()
    told = {row.name: row.place.what for row in found.rows}
    noted = {name for name, what in told.items() if what.endswith(", window 5 instead of 16")}
    assert noted == local | WHOLE and "in chunks of 4, 1, 5, 1, 2" in told["model, cached"]
    assert {row.check for row in found.rows if row.name in WHOLE} == {"float32"}


@pytest.mark.mutants
@pytest.mark.parametrize("wrong", [None, 1, -1])
def test_planted_windows(sliding, monkeypatch, wrong):
    """Ignored, or off by one, where attention is computed, and where the layers are made."""
    folder, local = sliding
    module, layer_window = sys.modules["mlx_xformer.nn.attention.layer"], CausalLMConfig.layer_window
    plain = module.attention

    def other(window):
        return None if window is None or wrong is None else window + wrong

    def attend(*given, window, **options):
        return plain(*given, window=other(window), **options)

    monkeypatch.setattr(module, "attention", attend)
    assert named(folder) == local | WHOLE
    monkeypatch.undo()
    monkeypatch.setattr(CausalLMConfig, "layer_window", lambda self, index: other(layer_window(self, index)))
    assert local | WHOLE <= named(folder)


def test_a_window_in_all_layers(sliding, monkeypatch):
    folder, local = sliding
    monkeypatch.setattr(CausalLMConfig, "layer_window", lambda self, _: self.window)
    both = {"model.layers.0", "model.layers.1"}
    assert named(folder) == (both - local | WHOLE if both - local else set())


def few(view, lines, n, window):
    """The first key is not shown, if any is older than the queries."""
    if view.keys.shape[2] == n:
        return view
    return kv.View(view.keys[:, :, 1:], view.values[:, :, 1:], view.options)


@pytest.mark.mutants
def test_planted_caches(sliding, monkeypatch):
    """One key too few, or an error: named by the case with caches alone."""
    folder, _ = sliding
    view, make = KVCache._view, CausalLM.make_caches

    def refuse(*_, **__):
        raise ValueError("the cache is full")

    plants = [
        (KVCache, "_view", lambda self, *given: few(view(self, *given), *given)),
        (KVCache, "append", refuse),
        (CausalLM, "make_caches", lambda self: make(self, window=4)),
    ]
    for owner, name, planted in plants:
        monkeypatch.setattr(owner, name, planted)
        assert named(folder) == {"model, cached"}, name
        monkeypatch.undo()


# What is asked for


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"names": ["glu", "flash"]}, ValueError, r"names must be among attention, attention_weights, .* got 'flash'"),
        ({"dtypes": ["float64"]}, ValueError, "dtypes must be among float32, float16, bfloat16, got 'float64'"),
        ({"dtypes": []}, ValueError, r"dtypes must be at least one of float32, float16, bfloat16, got \(\)"),
        ({"seeds": 0}, ValueError, "seeds must be at least one number from 0, got 0"),
        ({"seeds": [2, -1]}, ValueError, "seeds must be at least one number from 0, got 2, -1"),
        ({"device": "tpu"}, ValueError, 'device must be "cpu" or "gpu", got \'tpu\''),
        ({"folder": "nowhere"}, FileNotFoundError, "nowhere: no such folder"),
        ({"folder": MINI, "names": ["glu"]}, ValueError, "names must be empty where a folder is proven, got glu"),
    ],
)  # fmt: skip
def test_refusals(given, error, message):
    with pytest.raises(error, match=message):
        parity.run(**given)


def test_device_and_progress():
    """The device is the caller's again afterwards, also after an error."""
    before, told = mx.default_device(), []
    found = parity.run(["relu", "glu"], dtypes=["float16"], seeds=[0], device="cpu", progress=lambda *x: told.append(x))
    assert told == [("relu", 0, 2), ("glu", 1, 2)] and found.device.startswith("cpu")
    assert mx.default_device() == before
    if not mx.is_available(mx.Device(mx.gpu)):
        with pytest.raises(ValueError, match="MLX has no GPU here"):
            parity.run(["relu"], device="gpu")
    assert mx.default_device() == before


def test_it_needs_nothing_but_numpy():
    allowed = {"mlx", "numpy"} | set(sys.stdlib_module_names)
    for path in (PACKAGE / "parity").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name
