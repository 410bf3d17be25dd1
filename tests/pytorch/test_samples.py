"""PyTorch's own sample inputs through our functions: values and gradients against PyTorch in double precision.

The tolerance is that of parity.judge, with PyTorch in both precisions in the place of the twin. An adapter says how
our function does what an operation of PyTorch asks. Dropout samples are compared with nothing dropped, and by moments.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support import oracle
from support.oracle import Oracle, multi_head_attention_forward, sdpa

from mlx_xformer.parity import judge

pytestmark = pytest.mark.torch
SEEDS = range(8)
DRAWS = 400  # of a dropout, for its moments


# name in op_db: (adapter, samples for a seed)
OPERATIONS = {
    "nn.functional.scaled_dot_product_attention": (sdpa, 25),
    "nn.functional.multi_head_attention_forward": (multi_head_attention_forward, 192),
    "nn.functional.gelu": (oracle.gelu, 8),
    "nn.functional.layer_norm": (oracle.layer_norm, 6),
    "nn.functional.group_norm": (oracle.group_norm, 21),
    "softmax": (oracle.softmax, 7),
    "nn.functional.glu": (oracle.glu, 46),
    "nn.functional.conv1d": (oracle.conv1d, 10),
    "nn.functional.conv_transpose1d": (oracle.conv_transpose1d, 10),
}
SKIPPED: dict[str, str] = {}  # description of a sample -> why it is not compared; at most 5 % of an operation's


@dataclass
class Call:
    """A sample: its arguments, and PyTorch's answers in double and single precision."""

    args: list
    kwargs: dict[str, Any]
    tensors: dict[str, np.ndarray]
    outputs: list[np.ndarray]
    single: list[np.ndarray]
    gradients: dict[str, np.ndarray]
    single_gradients: dict[str, np.ndarray]
    cotangents: list[np.ndarray]

    def ask(self, adapter, arrays: dict[str, mx.array], **more: Any) -> Any:
        fill = lambda x: arrays[x["tensor"]] if isinstance(x, dict) else x  # noqa: E731
        return adapter(*map(fill, self.args), **{name: fill(x) for name, x in self.kwargs.items()}, **more)

    @property
    def arrays(self) -> dict[str, mx.array]:
        return {key: mx.array(x) for key, x in self.tensors.items()}

    def __str__(self) -> str:
        shown = lambda x: self.tensors[x["tensor"]].shape if isinstance(x, dict) else x  # noqa: E731
        return f"{list(map(shown, self.args))} { ({name: shown(x) for name, x in self.kwargs.items()}) }"


def calls(oracle, name, seed=0, own=None, arrays=None):
    """The samples of an operation, or those of ours."""
    answer = oracle.call("op_samples", arrays, name=name, variant="", seed=seed, own=own)
    data = answer["data"]

    def unpacked(place):
        if isinstance(place, dict):
            return {key: unpacked(value) for key, value in place.items()}
        start, shape, dtype = place
        return data[start : start + math.prod(shape)].reshape(shape).astype(dtype)

    for sample in answer.values["samples"]:
        args, kwargs = sample.pop("args"), sample.pop("kwargs")
        values = {
            name: unpacked(found) if isinstance(found, dict) else [*map(unpacked, found)]
            for name, found in sample.items()
        }
        yield Call(args, kwargs, **values)


def difference(actual, truth, single, scale=0.0, nan_is_0=False) -> str:
    """In words what is wrong, if anything is."""
    actual = np.array(actual, np.float64)
    if actual.shape != truth.shape:
        return f"shape {actual.shape}, PyTorch's {truth.shape}"
    expected = np.isnan(truth)
    if nan_is_0:
        truth, single = np.where(expected, 0, truth), np.where(expected, 0, single)
        if (actual[expected] != 0).any():
            return "rows that see nothing are not 0"
        expected = np.isnan(truth)
    if (np.isnan(actual) != expected).any() or not np.isfinite(actual[~expected]).all():
        return f"NaN in {np.isnan(actual).sum()} places, PyTorch's in {expected.sum()}"
    actual, truth, single = (x[~expected].astype(np.float64) for x in (actual, truth, single))
    scale = max(np.abs(truth).max(initial=0), scale)
    return judge.compare(actual, truth, judge.value_tolerance(truth, single, scale)).why


def compared(call: Call, adapter, scale=0.0, nan_is_0=False) -> tuple[str, bool]:
    """What is wrong with values or gradients, and whether gradients were compared: not where PyTorch's values are
    NaN."""
    names = list(call.gradients)
    arrays = call.arrays

    def ours(*values):
        out = call.ask(adapter, arrays | dict(zip(names, values, strict=True)))
        return list(out) if isinstance(out, tuple) else [out]

    primals, cotangents = [arrays[name] for name in names], [mx.array(u) for u in call.cotangents]
    outputs, gradients = mx.vjp(ours, primals, cotangents) if names else (ours(), [])
    if len(outputs) != len(call.outputs):
        return f"{len(outputs)} outputs, PyTorch's {len(call.outputs)}", False
    for out, truth, single in zip(outputs, call.outputs, call.single, strict=True):
        wrong = difference(out, truth, single, scale, nan_is_0)
        if wrong:
            return wrong, False
    if any(np.isnan(x).any() for x in call.outputs):
        return "", False
    largest = max((np.abs(g).max(initial=0) for g in call.gradients.values()), default=0.0)
    for name, g in zip(names, gradients, strict=True):
        wrong = difference(g, call.gradients[name], call.single_gradients[name], largest)
        if wrong:
            return f"gradient by {name}: {wrong}", True
    return "", True


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as child:
        yield child


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_samples_of_pytorch(oracle, name):
    adapter, count = OPERATIONS[name]
    tally, wrong = Counter(), []
    for seed in SEEDS:
        found = list(calls(oracle, name, seed))
        assert len(found) == count
        for index, call in enumerate(found):
            tally["attempted"] += 1
            if str(call) in SKIPPED:
                tally["skipped"] += 1
                continue
            # The tail of GELU is a small difference of numbers as large as the input.
            scale = np.abs(call.tensors["0"]).max() if name == "nn.functional.gelu" else 0.0
            reason, differentiated = compared(call, adapter, scale)
            tally["gradients"] += differentiated and not reason
            tally["passed"] += not reason
            wrong += [f"seed {seed} sample {index}, {call}: {reason}"] if reason else []
    print(name, dict(tally))
    assert not wrong, f"{len(wrong)} of {tally['attempted']}:\n" + "\n".join(wrong[:5])
    assert tally["passed"] + tally["skipped"] == tally["attempted"] == count * len(SEEDS)
    assert tally["gradients"] == tally["passed"]
    assert tally["skipped"] <= 0.05 * tally["attempted"]


# Dropout, by its moments


def repeated(call: Call, names: dict[str, int]) -> dict[str, mx.array]:
    """The tensors, those of these names DRAWS times along their batch axis."""
    return {key: mx.concatenate([x] * DRAWS, axis=names[key]) if key in names else x for key, x in call.arrays.items()}


def moments(draws: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> float:
    """The variance of draws (DRAWS, ...) over the predicted one; the mean must be right within 6 of its errors."""
    draws = np.array(draws, np.float64)
    assert np.abs(draws.mean(axis=0) - mean).max() <= 6 * np.sqrt(variance.max() / DRAWS) + 1e-6
    return draws.var(axis=0).sum() / variance.sum()


def test_dropout_of_scaled_dot_product_attention(oracle):
    """Mean: the output without. Variance: p / (1 - p) sum of (w v)^2, from weights w and values v."""
    ratios = []
    for seed in SEEDS:
        for index, call in enumerate(calls(oracle, "nn.functional.scaled_dot_product_attention", seed)):
            p = call.kwargs["dropout_p"]
            if not p:
                continue
            q, k, v = (call.tensors[key].astype(np.float64) for key in ("0", "1", "2"))
            scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
            if call.kwargs["is_causal"]:
                scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            arrays = {
                key: mx.broadcast_to(x, (4, *x.shape)) if x.ndim < k.ndim else x for key, x in call.arrays.items()
            }
            arrays = {key: mx.concatenate([x] * DRAWS) for key, x in arrays.items()}
            out = call.ask(sdpa, arrays, dropout_key=mx.random.key(1000 * seed + index))
            draws = np.array(out).reshape(DRAWS, 4, *out.shape[1:])
            ratios.append(moments(draws, call.outputs[0], p / (1 - p) * weights**2 @ v**2))
    assert len(ratios) == 12 * len(SEEDS)
    assert min(ratios) > 0.8 and max(ratios) < 1.2 and abs(np.mean(ratios) - 1) < 0.02


def test_dropout_of_multi_head_attention(oracle):
    """The same through the output projection: each weight adds its own vector, (w v_h Wo_h)^2."""
    ratios = []
    for seed in SEEDS[:2]:
        for index, call in enumerate(calls(oracle, "nn.functional.multi_head_attention_forward", seed)):
            p, H, E = call.args[10], call.args[4], call.args[3]
            if not p or call.tensors["0"].ndim == 2:
                continue
            weights = np.array(
                call.ask(multi_head_attention_forward, call.arrays, average_attn_weights=False)[1], np.float64
            )  # (N, H, L, S)
            given = {key: x.astype(np.float64) for key, x in call.tensors.items()}
            projection = given["v_proj_weight"] if "v_proj_weight" in given else given["5"][2 * E :]
            v = given["2"].swapaxes(0, 1) @ projection.T + given["6"][2 * E :]  # (N, S, E)
            v = np.concatenate([v, np.broadcast_to(given["8"], (len(v), 1, E))], axis=1)
            steps = v.reshape(*v.shape[:2], H, -1, 1) * given["11"].T.reshape(H, E // H, E)  # (N, S, H, D, E)
            variance = p / (1 - p) * np.einsum("nhls,nshe->lne", weights**2, steps.sum(axis=3) ** 2)
            along = {"0": 1, "1": 1, "2": 1} | ({"attn_mask": 0} if given.get("attn_mask", v[0]).ndim == 3 else {})
            arrays = repeated(call, along)
            key = mx.random.key(1000 * seed + index)
            out = call.ask(multi_head_attention_forward, arrays, need_weights=False, dropout_key=key)
            draws = np.array(out).reshape(out.shape[0], DRAWS, -1, E).swapaxes(0, 1)
            ratios.append(moments(draws, call.outputs[0], variance))
    assert len(ratios) == 48 * 2
    assert min(ratios) > 0.75 and max(ratios) < 1.25 and abs(np.mean(ratios) - 1) < 0.02


# What op_db has no samples of: masks, their rows that see nothing, static keys, other widths


def own_samples(seed):
    """Arguments of multi_head_attention_forward as positions and keywords, and their tensors."""
    rng = np.random.default_rng(seed)
    E, H, L, S, N, kdim, vdim = 6, 3, 5, 7, 2, 4, 8
    drawn = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    arrays = {
        "query": drawn(L, N, E),
        "key": drawn(S, N, kdim),
        "value": drawn(S, N, vdim),
        "in_proj_bias": drawn(3 * E),
        "q_proj_weight": drawn(E, E),
        "k_proj_weight": drawn(E, kdim),
        "v_proj_weight": drawn(E, vdim),
        "bias_k": drawn(1, 1, E),
        "bias_v": drawn(1, 1, E),
        "out": drawn(E, E),
        "out_bias": drawn(E),
        "padding": np.arange(S) >= np.array([4, S])[:, None],
        "all_padding": np.arange(S) >= np.array([0, 5])[:, None],
        "hidden": rng.random((L, S)) > 0.6,
        "hidden_heads": rng.random((N * H, L, S)) > 0.6,
        "added": drawn(L, S),
        "causal": np.triu(np.ones((L, S), bool), 1),
        "static_k": drawn(N * H, S, E // H),
        "static_v": drawn(N * H, S, E // H),
    }
    arrays["hidden"][2] = arrays["hidden_heads"][H:, 3] = True  # in every head of an item
    t = lambda name: {"tensor": name}  # noqa: E731
    variants: list[dict] = [
        {"key_padding_mask": t("padding")},
        {"key_padding_mask": t("all_padding")},
        {"attn_mask": t("hidden")},
        {"attn_mask": t("hidden_heads"), "key_padding_mask": t("all_padding")},
        {"attn_mask": t("hidden"), "average_attn_weights": False},
        {"attn_mask": t("added"), "need_weights": False},
        {"attn_mask": t("causal"), "is_causal": True, "need_weights": False},
        {"static_k": t("static_k"), "static_v": t("static_v"), "attn_mask": t("hidden_heads")},
    ]
    for learned in (False, True):
        for zero in (False, True):
            for variant in variants:
                if learned and "static_k" in variant:
                    continue  # PyTorch refuses both
                if (learned or zero) and "is_causal" in variant:
                    continue  # without weights PyTorch hides the added keys, with weights it does not
                biases = [t("bias_k"), t("bias_v")] if learned else [None, None]
                args = [t("query"), t("key"), t("value"), E, H, None, t("in_proj_bias"), *biases, zero, 0.0, t("out")]
                weights = {name: t(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")}
                yield {"args": [*args, t("out_bias")], "kwargs": {"use_separate_proj_weight": True, "training": False,
                                                                  **weights, **variant}}, arrays  # fmt: skip


def test_masks_and_widths_of_multi_head_attention(oracle):
    """Where every key is hidden PyTorch gives NaN, and we what a row without keys gives: 0, projected."""
    samples, arrays = zip(*own_samples(0), strict=True)
    found = list(calls(oracle, "nn.functional.multi_head_attention_forward", own=list(samples), arrays=arrays[0]))
    assert len(found) == 27
    blind = 0
    for call in found:
        hidden = any(np.isnan(x).any() for x in call.outputs)
        blind += hidden
        bias = call.tensors["12"].astype(np.float64)
        for values in (call.outputs, call.single):
            values[0] = np.where(np.isnan(values[0]), bias, values[0])
        reason, _ = compared(call, multi_head_attention_forward, nan_is_0=True)
        assert not reason, f"{call}: {reason}"
    assert 4 <= blind < 20
