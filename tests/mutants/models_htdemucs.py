"""HTDemucs. The checks compare with golden outputs of PyTorch, so that twin and module cannot err together.

Bugs that change nothing have no place here: a biased deviation of the whole track, say, is undone by the model's own.
"""

from mutants.runner import Bug, tests

TRANSFORMER = "models.htdemucs.transformer"
MODEL = "models.htdemucs.model"
LAYERS = "models.htdemucs.layers"
OUTPUTS = tests(
    "tests/models/test_htdemucs_golden.py::test_model[base]",
    "tests/models/test_htdemucs_golden.py::test_model[small0]",
    "tests/models/test_htdemucs_golden.py::test_model[merged]",
)

BUGS = [
    Bug("tanh GELU", TRANSFORMER, '"gelu" if config.t_gelu', '"gelu_tanh" if config.t_gelu', OUTPUTS),
    Bug(
        "swapped query and key norms",
        TRANSFORMER,
        (
            "self.norm2(other) if self.cross else None\n"
            "        x = x + self._scale_1(self._attend(self.norm1(x), source))"
        ),
        (
            "self.norm1(other) if self.cross else None\n"
            "        x = x + self._scale_1(self._attend((self.norm2 if self.cross else self.norm1)(x), source))"
        ),
        OUTPUTS,
    ),
    Bug("no norm_out", TRANSFORMER, "return self.norm_out(x) if self.normed_out else x", "return x", OUTPUTS),
    Bug(
        "sequential cross update",
        TRANSFORMER,
        "x, xt = layer(x, xt), layer_t(xt, x)",
        "x = layer(x, xt)\n                xt = layer_t(xt, x)",
        OUTPUTS,
    ),
    Bug("biased std of the model", MODEL, "var * (count / max(count - 1, 1))", "var", OUTPUTS),
    Bug(
        "swapped real and imaginary input",
        MODEL,
        "mx.stack([mx.real(z), mx.imag(z)], axis=2)",
        "mx.stack([mx.imag(z), mx.real(z)], axis=2)",
        OUTPUTS,
    ),
    Bug(
        "swapped real and imaginary output",
        MODEL,
        "parts[:, 0] + 1j * parts[:, 1]",
        "parts[:, 1] + 1j * parts[:, 0]",
        OUTPUTS,
    ),
    Bug(
        "frequency embedding after the skip",
        MODEL,
        "            skips.append(x)\n",
        "            skips.append(x - self.freq_emb.weight if not index and self.config.freq_emb else x)\n",
        OUTPUTS,
    ),
    Bug("epsilon inside the root of the spectrogram", MODEL, "/ (_EPS + std)", "/ mx.sqrt(_EPS + std * std)", OUTPUTS),
    Bug(
        "unnormalised STFT",
        MODEL,
        "stft(mix, n_fft=nfft, hop_length=hop, center=False)",
        "stft(mix, n_fft=nfft, hop_length=hop, center=False, normalized=False)",
        OUTPUTS,
    ),
    Bug(
        "DConv norm over all rows",
        LAYERS,
        "axes=(1,), eps=norm1.eps",
        "axes=tuple(range(1, x.ndim - 1)), eps=norm1.eps",
        OUTPUTS,
    ),
]
