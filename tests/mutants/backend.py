"""What computes."""

from mutants.runner import Bug, tests

ACTIVATIONS = "backend.activations"
FUSED = "backend.fused"
OUTPUTS = tests(
    "tests/models/test_htdemucs_golden.py::test_model[base]",
    "tests/models/test_htdemucs_golden.py::test_model[small0]",
    "tests/models/test_htdemucs_golden.py::test_model[merged]",
)

BUGS = [
    Bug(
        "tanh GELU in the convolutions",
        ACTIVATIONS,
        "return _fast_gelu(x) if dispatch.vectorizes(x) else plain_gelu(x)",
        "return gelu_tanh(x)",
        OUTPUTS,
    ),
    Bug(
        "swapped halves of the GLU",
        FUSED,
        "else _plain_conv_glu)(x, weight, bias)",
        "else _plain_conv_glu)(x, *(mx.roll(a, a.shape[0] // 2, 0) for a in (weight, bias)))",
        OUTPUTS,
    ),
    Bug(
        "swapped halves of the GLU of DConv",
        FUSED,
        "return form(x, weight, bias, norm_weight, norm_bias, scale",
        (
            "halves = (mx.roll(a, a.shape[0] // 2, 0) for a in (weight, bias, norm_weight, norm_bias))\n"
            "    return form(x, *halves, scale"
        ),
        OUTPUTS,
    ),
]
