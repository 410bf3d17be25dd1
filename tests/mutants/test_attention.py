"""Planted bugs in the attention code: parity.run, as a user runs it, must name each of them.

A run stops at the first sample that fails. What changes nothing has no place here: an offset of rotary positions, say,
turns queries and keys alike.
"""

import pytest
from support.planted import outcomes, source_of, task
from support.planted_parity import CHECK

SDPA, SCORES, LAYER, MASKS, POSITIONS = (
    "nn.attention.core",
    "nn.attention.scores",
    "nn.attention.layer",
    "nn.masks",
    "nn.positions",
)


# name: (module, source, planted, the operation that must fail)
MUTANTS = {
    "unscaled scores": (
        SCORES,
        "1 / math.sqrt(q.shape[-1]) if scale is None else scale",
        "1.0 if scale is None else scale",
        "attention",
    ),
    "scale ignored": (
        SCORES,
        "1 / math.sqrt(q.shape[-1]) if scale is None else scale",
        "1 / math.sqrt(q.shape[-1])",
        "attention",
    ),
    "scale ignored where there is nothing else": (
        SDPA,
        "kernels.unmasked_attention(q, k, v, softmax.scale)",
        "kernels.unmasked_attention(q, k, v, q.shape[-1] ** -0.5)",
        "attention",
    ),
    "inverted mask": (
        SCORES,
        "part if allowed is None else part & allowed",
        "~part if allowed is None else ~part & allowed",
        "attention",
    ),
    "mask or causal": (
        SCORES,
        "part if allowed is None else part & allowed",
        "part if allowed is None else part | allowed",
        "attention",
    ),
    "causal hides the query's own key": (
        SCORES,
        "at >= 0 if self.causal else None",
        "at > 0 if self.causal else None",
        "attention",
    ),
    "causal shows the next key": (
        SCORES,
        "at >= 0 if self.causal else None",
        "at >= -1 if self.causal else None",
        "attention",
    ),
    "causal is upper-left": (
        SCORES,
        "        shift = self.S - self.L\n        ahead",
        "        shift = 0\n        ahead",
        "attention",
    ),
    "causal unmasked where it hides one key": (
        SCORES,
        "(self.causal and ahead > 0)",
        "(self.causal and ahead > 1)",
        "attention",
    ),
    "window one wider": (SCORES, "near = mx.abs(at) < self.window", "near = mx.abs(at) <= self.window", "attention"),
    "window to one side": (SCORES, "near = mx.abs(at) < self.window", "near = at < self.window", "attention"),
    "window unmasked where it hides one key": (
        SCORES,
        "max(ahead, behind) >= self.window",
        "max(ahead, behind) > self.window",
        "attention",
    ),
    "window alone ignored": (SCORES, "and not self.causal and self.window is None", "and not self.causal", "attention"),
    "band begins late": (
        SCORES,
        "max(0, first - self.window + 1)",
        "max(0, first - self.window + 2)",
        "attention",
    ),
    "band ends early": (
        SCORES,
        "min(self.S, last + self.window)",
        "min(self.S, last + self.window - 1)",
        "attention",
    ),
    "causal block ends early": (
        SCORES,
        "min(stop, last + 1) if self.causal",
        "min(stop, last) if self.causal",
        "attention",
    ),
    "mask's rows of the first block": (
        SCORES,
        "x[..., rows.start : rows.stop, :]",
        "x[..., : len(rows), :]",
        "attention",
    ),
    "mask's keys of the first band": (SCORES, "x[..., keys.start : keys.stop]", "x[..., : len(keys)]", "attention"),
    "blind rows of MLX's function leak": (
        SCORES,
        "return out if some is None else mx.where(some, out, mx.array(0, out.dtype))",
        "return out",
        "attention",
    ),
    "blind rows of the products are NaN": (
        SCORES,
        "filled(top if sinks is None else mx.maximum(top, sinks), -mx.inf, block.safe, 0.0)",
        "top if sinks is None else mx.maximum(top, sinks)",
        "attention",
    ),
    "every row said to see a key": (
        SCORES,
        "safe = self.mask is None and self.bias is None",
        "safe = True",
        "attention",
    ),
    "causal by name where a window hides too": (
        SCORES,
        "near = self.window is None or behind < self.window",
        "near = True",
        "attention",
    ),
    "causal by name beside a mask": (
        SCORES,
        "safe and bias is None and self.causal and near",
        "bias is None and self.causal and near",
        "attention",
    ),
    "a bias of -inf is one of 0": (
        SCORES,
        "open_ if allowed is None else allowed & open_",
        "mx.ones_like(open_) if allowed is None else allowed",
        "attention",
    ),
    "soft cap not scaled back": (
        SCORES,
        "mx.tanh(scores / self.softcap) * self.softcap",
        "mx.tanh(scores / self.softcap)",
        "attention",
    ),
    "soft cap over the bias": (
        SCORES,
        "        if self.softcap is not None:\n"
        "            scores = mx.tanh(scores / self.softcap) * self.softcap\n"
        "        if block.bias is not None:\n"
        "            scores = scores + block.bias\n",
        "        if block.bias is not None:\n"
        "            scores = scores + block.bias\n"
        "        if self.softcap is not None:\n"
        "            scores = mx.tanh(scores / self.softcap) * self.softcap\n",
        "attention",
    ),
    "sinks of MLX's function forgotten": (
        SCORES,
        "mask=mask, sinks=sinks)",
        "mask=mask, sinks=None)",
        "attention",
    ),
    "sinks of the products are 0": (SCORES, "mx.exp(sinks - top)", "mx.exp(-top)", "attention"),
    "groups reversed": (
        SCORES,
        "@ k.astype(mx.float32).swapaxes(-1, -2)",
        "@ k[:, ::-1].astype(mx.float32).swapaxes(-1, -2)",
        "attention",
    ),
    "the first head for the average": (
        SDPA,
        "weights.mean(axis=1) if average",
        "weights[:, 0] if average",
        "attention_weights",
    ),
    "rotary queries, plain keys": (
        LAYER,
        "return k if config.rotary is None else config.rotary(k, offset=offset, positions=positions)",
        "return k",
        "Attention",
    ),
    "norms of queries and keys swapped": (
        LAYER,
        "q = q if config.qk_norm is None else self.q_norm(q)",
        "q = q if config.qk_norm is None else self.k_norm(q)",
        "Attention",
    ),
    "heads normed as a whole in another order": (
        "layers",
        "mx.flatten(x.swapaxes(1, 2), 2, 3)",
        "mx.flatten(x.transpose(0, 2, 3, 1), 2, 3)",
        "Attention",
    ),
    "heads normed one by one": (
        "layers",
        "        y = super().__call__(mx.flatten(x.swapaxes(1, 2), 2, 3))",
        "        y = mx.fast.rms_norm(x.swapaxes(1, 2), None, self.eps)\n        y = mx.flatten(y, 2, 3) * self.weight",
        "Attention",
    ),
    "ALiBi the wrong way": (
        LAYER,
        "far.append(alibi_by_distance(config.num_heads, L, S)",
        "far.append(-alibi_by_distance(config.num_heads, L, S)",
        "Attention",
    ),
    "buckets for the wrong direction": (LAYER, "bidirectional=not causal", "bidirectional=causal", "Attention"),
    "interleaved heads": (
        LAYER,
        "mx.unflatten(x, -1, (heads, x.shape[-1] // heads)).swapaxes(1, 2)",
        "mx.unflatten(x, -1, (x.shape[-1] // heads, heads)).transpose(0, 3, 1, 2)",
        "Attention",
    ),
    "values from the keys' source": (
        LAYER,
        "values = (x if source is None else source) if value_source is None else value_source",
        "values = x if source is None else source",
        "Attention",
    ),
    "bias beside ALiBi forgotten": (SCORES, "part if bias is None else bias + part", "part", "attention"),
    "distances of other lengths": (SCORES, "ahead + (self.L - 1)", "ahead + (self.S - 1)", "attention"),
    "behind taken for ahead": (SCORES, "ahead + (self.L - 1)", "self.S - 1 - ahead", "attention"),
    "causal mask always lower-right": (
        MASKS,
        'offset = S - L if alignment == "lower_right" else 0',
        "offset = S - L",
        "causal_mask",
    ),
    "sliding mask one wider": (MASKS, "mx.arange(S)[None]) < window", "mx.arange(S)[None]) <= window", "sliding_mask"),
    "a key of the padding": (
        MASKS,
        "mx.arange(S)[None] < lengths",
        "mx.arange(S)[None] <= lengths",
        "padding_mask",
    ),
    "causal prefix": (
        MASKS,
        "causal_mask(L, S) | padding_mask(lengths, S)",
        "causal_mask(L, S) & padding_mask(lengths, S)",
        "prefix_mask",
    ),
    "segment 0 is padding": (MASKS, "(queries >= 0)", "(queries > 0)", "segment_mask"),
    "rotary the wrong way": (
        POSITIONS,
        "a * cos - b * sin, a * sin + b * cos",
        "a * cos + b * sin, b * cos - a * sin",
        "Rotary",
    ),
    "rotary table the wrong way": (POSITIONS, "np.concatenate([-sin, sin]", "np.concatenate([sin, -sin]", "Rotary"),
    "rotary pairs of the other layout": (
        POSITIONS,
        "traditional=self.interleaved",
        "traditional=not self.interleaved",
        "Rotary",
    ),
    "slopes of the power above": (POSITIONS, "more[: num_heads - power]", "more[power - num_heads :]", "alibi_bias"),
    "buckets ahead and behind swapped": (
        POSITIONS,
        "np.where(ahead > 0, count, 0)",
        "np.where(ahead < 0, count, 0)",
        "relative_buckets",
    ),
    "sinusoids with the exponent doubled": (POSITIONS, "-(channel // 2 * 2)", "-(channel // 2 * 4)", "sinusoidal"),
}


@pytest.fixture(scope="module")
def caught():
    """What parity said of each mutant, and of the unchanged source."""
    tasks = [("nothing", SDPA, source_of(SDPA), "causal_mask")]
    return outcomes([*tasks, *(task(name, *mutant) for name, mutant in MUTANTS.items())], CHECK)


def test_the_unchanged_source_passes(caught):
    assert caught["nothing"] is None
    assert caught.keys() == {"nothing", *MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(caught, name):
    assert caught[name], f"parity passes with {name}"
    assert caught[name].startswith(MUTANTS[name][3])
