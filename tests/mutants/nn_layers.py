"""Layers, the transformer's block and stack, checks of inputs, log-mel spectrograms."""

from mutants.runner import Bug, parity, tests

LAYERS = "nn.layers"
TRANSFORMER = "nn.transformer"
CHECKS = "nn.checks"
MEL = "nn.mel"
BY_BERT = tests(
    "tests/models/test_bert.py::test_forward_and_gradient",
    "tests/models/test_bert.py::test_padding_changes_nothing",
    "tests/models/test_bert.py::test_sides_segments_and_places_count",
    "tests/models/test_bert.py::test_pooling",
    "tests/models/test_bert.py::test_inputs_that_are_refused",
    "tests/models/test_bert.py::test_each_tensor_has_its_place",
    "tests/models/test_bert.py::test_sentences",
    "tests/models/test_bert.py::test_vectors_that_are_not_normed",
)
BY_WHISPER = tests("tests/nn/test_mel.py", "tests/models/test_whisper.py")
OUTPUTS = tests(
    "tests/models/test_htdemucs_golden.py::test_model[base]",
    "tests/models/test_htdemucs_golden.py::test_model[small0]",
    "tests/models/test_htdemucs_golden.py::test_model[merged]",
)

BUGS = [
    Bug(
        "heads normed as a whole in another order",
        LAYERS,
        "mx.flatten(x.swapaxes(1, 2), 2, 3)",
        "mx.flatten(x.transpose(0, 2, 3, 1), 2, 3)",
        parity("Attention"),
    ),
    Bug(
        "heads normed one by one",
        LAYERS,
        "        y = super().__call__(mx.flatten(x.swapaxes(1, 2), 2, 3))",
        (
            "        y = mx.fast.rms_norm(x.swapaxes(1, 2), None, self.eps)\n"
            "        y = mx.flatten(y, 2, 3) * self.weight"
        ),
        parity("Attention"),
    ),
    Bug(
        "reversed dilated kernel",
        LAYERS,
        "for i, tap in enumerate(taps):",
        "for i, tap in enumerate(taps[::-1]):",
        OUTPUTS,
    ),
    Bug(
        "reversed transposed convolution",
        LAYERS,
        "columns.swapaxes(1, 2)",
        "columns[:, :, ::-1].swapaxes(1, 2)",
        OUTPUTS,
    ),
    Bug(
        "LayerScale along time",
        LAYERS,
        "return x * self.scale\n",
        (
            "many = mx.tile(self.scale, -(-x.shape[1] // self.scale.size))\n"
            "        return x * many[: x.shape[1]].reshape(1, -1, *[1] * (x.ndim - 2))\n"
        ),
        OUTPUTS,
    ),
    Bug(
        "every step on a norm",
        TRANSFORMER,
        "form(norm(x) if self.config.norm_first else x)",
        "form(norm(x))",
        parity("Layer"),
    ),
    Bug(
        "no norm of the sum",
        TRANSFORMER,
        "return y if self.config.norm_first else norm(y)",
        "return y",
        parity("Layer"),
    ),
    Bug("what came in is forgotten", TRANSFORMER, "y = x + apply_dropout(", "y = apply_dropout(", parity("Layer")),
    Bug("causality forgotten", TRANSFORMER, "causal=config.causal, window", "causal=False, window", parity("Layer")),
    Bug("window forgotten", TRANSFORMER, "window=config.window, **shared", "window=None, **shared", parity("Layer")),
    Bug(
        "mask forgotten",
        TRANSFORMER,
        'self["self_attn"](y, mask=mask,',
        'self["self_attn"](y, mask=None,',
        parity("Layer"),
    ),
    Bug(
        "bias forgotten",
        TRANSFORMER,
        "bias=bias, cache=cache, key=keys[0]",
        "cache=cache, key=keys[0]",
        parity("Layer"),
    ),
    Bug(
        "mask of the memory forgotten",
        TRANSFORMER,
        "mask=memory_mask, cache=cross_cache",
        "cache=cross_cache",
        parity("Layer"),
    ),
    Bug("scale forgotten", TRANSFORMER, '"scale": config.scale', '"scale": None', parity("Layer")),
    Bug("eps of norms forgotten", TRANSFORMER, "(self.embed_dim, self.norm_eps)", "(self.embed_dim)", parity("Layer")),
    Bug(
        "activation forgotten",
        TRANSFORMER,
        "return FeedForward(self.embed_dim, self.hidden_dim, self.activation,",
        'return FeedForward(self.embed_dim, self.hidden_dim, "relu",',
        parity("Layer"),
    ),
    Bug("layers from the last", TRANSFORMER, "enumerate(layers):", "enumerate(layers[::-1]):", parity("Stack")),
    Bug(
        "no norm at the end",
        TRANSFORMER,
        'return self["norm"](x) if "norm" in self else x',
        "return x",
        parity("Stack"),
    ),
    Bug(
        "one cache for all layers",
        TRANSFORMER,
        "name: of_layers[index]",
        'name: of_layers[0 if name == "cache" else index]',
        parity("Stack.cached"),
    ),
    Bug(
        "one memory for all layers",
        TRANSFORMER,
        "name: of_layers[index]",
        'name: of_layers[0 if name == "cross_cache" else index]',
        parity("Stack.cached"),
    ),
    Bug(
        "mask upside down",
        CHECKS,
        "return mask[:, None, None]",
        "return ~mask[:, None, None]",
        parity("EncoderDecoder"),
    ),
    Bug(
        "tokens are not checked",
        CHECKS,
        "wrong = [number for number in numbers if not 0 <= number < size and number != other]",
        "wrong = []",
        BY_BERT,
    ),
    Bug("one token too many", CHECKS, "0 <= number < size", "0 <= number <= size", BY_BERT),
    Bug("powers without their root", MEL, "mx.square(mx.imag(spectrum))", "mx.abs(mx.imag(spectrum))", BY_WHISPER),
    Bug("natural logarithms", MEL, "mx.log10(", "mx.log(", BY_WHISPER),
    Bug("the loudest of all recordings", MEL, "axis=(-2, -1), keepdims=True", "keepdims=True", BY_WHISPER),
    Bug("70 dB", MEL, "_FLOOR, _RANGE = 1e-10, 8.0", "_FLOOR, _RANGE = 1e-10, 7.0", BY_WHISPER),
    Bug("the last frame is kept", MEL, "[..., :-1, :]", "[..., :, :]", BY_WHISPER),
    Bug("the first frame is dropped", MEL, "[..., :-1, :]", "[..., 1:, :]", BY_WHISPER),
    Bug("another mel scale", MEL, "_KNEE, _STEP = 1000.0, 200 / 3", "_KNEE, _STEP = 1000.0, 66.0", BY_WHISPER),
    Bug("triangles of one height", MEL, " * 2 / (right - left)", "", BY_WHISPER),
    Bug("zeros in front", MEL, "+ [(0, fill)]", "+ [(fill, 0)]", BY_WHISPER),
]
