"""Attention, its masks and its positions."""

from mutants.runner import Bug, parity, tests

SCORES = "nn.attention.scores"
CORE = "nn.attention.core"
LAYER = "nn.attention.layer"
MASKS = "nn.masks"
POSITIONS = "nn.positions"
ROTARY = "nn.rotary"
OUTPUTS = tests(
    "tests/models/test_htdemucs_golden.py::test_model[base]",
    "tests/models/test_htdemucs_golden.py::test_model[small0]",
    "tests/models/test_htdemucs_golden.py::test_model[merged]",
)

BUGS = [
    Bug(
        "unscaled scores",
        SCORES,
        "1 / math.sqrt(q.shape[-1]) if scale is None else scale",
        "1.0 if scale is None else scale",
        parity("attention"),
    ),
    Bug(
        "scale ignored",
        SCORES,
        "1 / math.sqrt(q.shape[-1]) if scale is None else scale",
        "1 / math.sqrt(q.shape[-1])",
        parity("attention"),
    ),
    Bug(
        "inverted mask",
        SCORES,
        "part if allowed is None else part & allowed",
        "~part if allowed is None else ~part & allowed",
        parity("attention"),
    ),
    Bug(
        "mask or causal",
        SCORES,
        "part if allowed is None else part & allowed",
        "part if allowed is None else part | allowed",
        parity("attention"),
    ),
    Bug(
        "causal hides the query's own key",
        SCORES,
        "at >= 0 if self.causal else None",
        "at > 0 if self.causal else None",
        parity("attention"),
    ),
    Bug(
        "causal shows the next key",
        SCORES,
        "at >= 0 if self.causal else None",
        "at >= -1 if self.causal else None",
        parity("attention"),
    ),
    Bug(
        "causal is upper-left",
        SCORES,
        "        shift = self.S - self.L\n        ahead",
        "        shift = 0\n        ahead",
        parity("attention"),
    ),
    Bug(
        "causal unmasked where it hides one key",
        SCORES,
        "(self.causal and ahead > 0)",
        "(self.causal and ahead > 1)",
        parity("attention"),
    ),
    Bug(
        "window one wider",
        SCORES,
        "near = mx.abs(at) < self.window",
        "near = mx.abs(at) <= self.window",
        parity("attention"),
    ),
    Bug(
        "window to one side", SCORES, "near = mx.abs(at) < self.window", "near = at < self.window", parity("attention")
    ),
    Bug(
        "window unmasked where it hides one key",
        SCORES,
        "max(ahead, behind) >= self.window",
        "max(ahead, behind) > self.window",
        parity("attention"),
    ),
    Bug(
        "window alone ignored",
        SCORES,
        "and not self.causal and self.window is None",
        "and not self.causal",
        parity("attention"),
    ),
    Bug(
        "band begins late",
        SCORES,
        "max(0, first - self.window + 1)",
        "max(0, first - self.window + 2)",
        parity("attention"),
    ),
    Bug(
        "band ends early",
        SCORES,
        "min(self.S, last + self.window)",
        "min(self.S, last + self.window - 1)",
        parity("attention"),
    ),
    Bug(
        "causal block ends early",
        SCORES,
        "min(stop, last + 1) if self.causal",
        "min(stop, last) if self.causal",
        parity("attention"),
    ),
    Bug(
        "mask's rows of the first block",
        SCORES,
        "x[..., rows.start : rows.stop, :]",
        "x[..., : len(rows), :]",
        parity("attention"),
    ),
    Bug(
        "mask's keys of the first band",
        SCORES,
        "x[..., keys.start : keys.stop]",
        "x[..., : len(keys)]",
        parity("attention"),
    ),
    Bug(
        "blind rows of MLX's function leak",
        SCORES,
        "return out if some is None else mx.where(some, out, mx.array(0, out.dtype))",
        "return out",
        parity("attention"),
    ),
    Bug(
        "blind rows of the products are NaN",
        SCORES,
        "filled(top if sinks is None else mx.maximum(top, sinks), -mx.inf, block.safe, 0.0)",
        "top if sinks is None else mx.maximum(top, sinks)",
        parity("attention"),
    ),
    Bug(
        "every row said to see a key",
        SCORES,
        "safe = self.mask is None and self.bias is None",
        "safe = True",
        parity("attention"),
    ),
    Bug(
        "causal by name where a window hides too",
        SCORES,
        "near = self.window is None or behind < self.window",
        "near = True",
        parity("attention"),
    ),
    Bug(
        "causal by name beside a mask",
        SCORES,
        "safe and bias is None and self.causal and near",
        "bias is None and self.causal and near",
        parity("attention"),
    ),
    Bug(
        "a bias of -inf is one of 0",
        SCORES,
        "open_ if allowed is None else allowed & open_",
        "mx.ones_like(open_) if allowed is None else allowed",
        parity("attention"),
    ),
    Bug(
        "soft cap not scaled back",
        SCORES,
        "mx.tanh(scores / self.softcap) * self.softcap",
        "mx.tanh(scores / self.softcap)",
        parity("attention"),
    ),
    Bug(
        "soft cap over the bias",
        SCORES,
        (
            "        if self.softcap is not None:\n"
            "            scores = mx.tanh(scores / self.softcap) * self.softcap\n"
            "        if block.bias is not None:\n"
            "            scores = scores + block.bias\n"
        ),
        (
            "        if block.bias is not None:\n"
            "            scores = scores + block.bias\n"
            "        if self.softcap is not None:\n"
            "            scores = mx.tanh(scores / self.softcap) * self.softcap\n"
        ),
        parity("attention"),
    ),
    Bug(
        "sinks of MLX's function forgotten",
        SCORES,
        "mask=mask, sinks=self.sinks)",
        "mask=mask, sinks=None)",
        parity("attention"),
    ),
    Bug("sinks of the products are 0", SCORES, "mx.exp(sinks - top)", "mx.exp(-top)", parity("attention")),
    Bug(
        "groups reversed",
        SCORES,
        "@ k.astype(mx.float32).swapaxes(-1, -2)",
        "@ k[:, ::-1].astype(mx.float32).swapaxes(-1, -2)",
        parity("attention"),
    ),
    Bug("bias beside ALiBi forgotten", SCORES, "part if bias is None else bias + part", "part", parity("attention")),
    Bug("distances of other lengths", SCORES, "ahead + (self.L - 1)", "ahead + (self.S - 1)", parity("attention")),
    Bug("behind taken for ahead", SCORES, "ahead + (self.L - 1)", "self.S - 1 - ahead", parity("attention")),
    Bug(
        "scale ignored where there is nothing else",
        CORE,
        "fused.unmasked_attention(q, k, v, softmax.scale)",
        "fused.unmasked_attention(q, k, v, q.shape[-1] ** -0.5)",
        parity("attention"),
    ),
    Bug(
        "the first head for the average",
        CORE,
        "weights.mean(axis=1) if average",
        "weights[:, 0] if average",
        parity("attention_weights"),
    ),
    Bug(
        "rotary queries, plain keys",
        LAYER,
        "return k if config.rotary is None else config.rotary(k, offset=offset, positions=positions)",
        "return k",
        parity("Attention"),
    ),
    Bug(
        "norms of queries and keys swapped",
        LAYER,
        "q = q if config.qk_norm is None else self.q_norm(q)",
        "q = q if config.qk_norm is None else self.k_norm(q)",
        parity("Attention"),
    ),
    Bug(
        "ALiBi the wrong way",
        LAYER,
        "far.append(alibi_by_distance(config.num_heads, L, S)",
        "far.append(-alibi_by_distance(config.num_heads, L, S)",
        parity("Attention"),
    ),
    Bug(
        "buckets for the wrong direction",
        LAYER,
        "bidirectional=not causal",
        "bidirectional=causal",
        parity("Attention"),
    ),
    Bug(
        "interleaved heads",
        LAYER,
        "mx.unflatten(x, -1, (heads, x.shape[-1] // heads)).swapaxes(1, 2)",
        "mx.unflatten(x, -1, (x.shape[-1] // heads, heads)).transpose(0, 3, 1, 2)",
        parity("Attention"),
    ),
    Bug(
        "values from the keys' source",
        LAYER,
        "values = (x if source is None else source) if value_source is None else value_source",
        "values = x if source is None else source",
        parity("Attention"),
    ),
    Bug("unscaled attention", LAYER, "self.config.widths[0] ** -0.5 if", "1.0 if", OUTPUTS),
    Bug(
        "causal mask always lower-right",
        MASKS,
        'offset = S - L if alignment == "lower_right" else 0',
        "offset = S - L",
        parity("causal_mask"),
    ),
    Bug(
        "sliding mask one wider",
        MASKS,
        "mx.arange(S)[None]) < window",
        "mx.arange(S)[None]) <= window",
        parity("sliding_mask"),
    ),
    Bug(
        "a key of the padding",
        MASKS,
        "mx.arange(S)[None] < lengths",
        "mx.arange(S)[None] <= lengths",
        parity("padding_mask"),
    ),
    Bug(
        "causal prefix",
        MASKS,
        "causal_mask(L, S) | padding_mask(lengths, S)",
        "causal_mask(L, S) & padding_mask(lengths, S)",
        parity("prefix_mask"),
    ),
    Bug("segment 0 is padding", MASKS, "(queries >= 0)", "(queries > 0)", parity("segment_mask")),
    Bug(
        "rotary the wrong way",
        ROTARY,
        "a * cos - b * sin, a * sin + b * cos",
        "a * cos + b * sin, b * cos - a * sin",
        parity("Rotary"),
    ),
    Bug(
        "rotary table the wrong way",
        ROTARY,
        "np.concatenate([-sin, sin]",
        "np.concatenate([sin, -sin]",
        parity("Rotary"),
    ),
    Bug(
        "rotary pairs of the other layout",
        ROTARY,
        "traditional=self.interleaved",
        "traditional=not self.interleaved",
        parity("Rotary"),
    ),
    Bug(
        "slopes of the power above",
        POSITIONS,
        "more[: num_heads - power]",
        "more[power - num_heads :]",
        parity("alibi_bias"),
    ),
    Bug(
        "buckets ahead and behind swapped",
        POSITIONS,
        "np.where(ahead > 0, count, 0)",
        "np.where(ahead < 0, count, 0)",
        parity("relative_buckets"),
    ),
    Bug(
        "sinusoids with the exponent doubled",
        POSITIONS,
        "-(channel // 2 * 2)",
        "-(channel // 2 * 4)",
        parity("sinusoidal"),
    ),
    Bug(
        "swapped halves of the 2-D positions",
        POSITIONS,
        ("table[..., :half] = interleaved(width)[:, None]\n    table[..., half:] = interleaved(height)[None]"),
        ("table[..., half:] = interleaved(width)[:, None]\n    table[..., :half] = interleaved(height)[None]"),
        OUTPUTS,
    ),
    Bug(
        "swapped halves of the 1-D positions",
        POSITIONS,
        "np.concatenate([np.cos(phase), np.sin(phase)]",
        "np.concatenate([np.sin(phase), np.cos(phase)]",
        OUTPUTS,
    ),
]
