"""Planted bugs: each is put into a copy of the package, and the suite's own comparisons must fail there.

A mutant replaces a piece of source that occurs exactly once. Beside the unchanged copy, which must pass, the tests run
are those of the golden outputs of PyTorch (tests/test_golden.py), so that twin and module cannot err together. Mutants
that change nothing have no place here: a biased deviation of the whole track, say, is undone by the model's own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL, LAYERS, TRANSFORMER = (f"models/htdemucs/{name}.py" for name in ("model", "layers", "transformer"))
LEVELS, TRACKS = "test_model[base] or test_model[small0] or test_model[merged]", "test_track"

# name: (file, source, planted, tests that must fail)
MUTANTS = {
    "tanh GELU": (TRANSFORMER, '"gelu" if config.t_gelu', '"gelu_tanh" if config.t_gelu', LEVELS),
    "tanh GELU in the convolutions": (
        "kernels.py",
        "return _fast_gelu(x) if vectorizes(x) else _plain_gelu(x)",
        "return gelu_tanh(x)",
        LEVELS,
    ),
    "biased std of the model": (MODEL, "var * (count / max(count - 1, 1))", "var", LEVELS),
    "swapped query and key norms": (
        TRANSFORMER,
        "self.norm2(other) if self.cross else None\n        x = x + self._scale_1(self._attend(self.norm1(x), source))",
        "self.norm1(other) if self.cross else None\n"
        "        x = x + self._scale_1(self._attend((self.norm2 if self.cross else self.norm1)(x), source))",
        LEVELS,
    ),
    "no norm_out": (TRANSFORMER, "return self.norm_out(x) if self.normed_out else x", "return x", LEVELS),
    "transposed 3x3 kernel": (
        "converters/families/htdemucs.py",
        "_OVER_BOTH = (Permute((0, 3, 2, 1)),)",
        "_OVER_BOTH = (Permute((0, 2, 3, 1)),)",
        LEVELS,
    ),
    "reversed dilated kernel": (
        "nn/layers.py",
        "for i, tap in enumerate(taps):",
        "for i, tap in enumerate(taps[::-1]):",
        LEVELS,
    ),
    "reversed transposed convolution": (
        "nn/layers.py",
        "columns.swapaxes(1, 2)",
        "columns[:, :, ::-1].swapaxes(1, 2)",
        LEVELS,
    ),
    "sequential cross update": (
        TRANSFORMER,
        "x, xt = layer(x, xt), layer_t(xt, x)",
        "x = layer(x, xt)\n                xt = layer_t(xt, x)",
        LEVELS,
    ),
    "zeros beside a short segment": (
        "separation/segments.py",
        "return track.levelled(start, start + target)",
        "piece = track.levelled(offset, offset + length)\n"
        "    left = (target - length) // 2\n"
        "    return mx.pad(piece, [(0, 0), (left, target - length - left)])",
        TRACKS,
    ),
    "swapped real and imaginary input": (
        MODEL,
        "mx.stack([mx.real(z), mx.imag(z)], axis=2)",
        "mx.stack([mx.imag(z), mx.real(z)], axis=2)",
        LEVELS,
    ),
    "swapped real and imaginary output": (
        MODEL,
        "parts[:, 0] + 1j * parts[:, 1]",
        "parts[:, 1] + 1j * parts[:, 0]",
        LEVELS,
    ),
    "LayerScale along time": (
        "nn/layers.py",
        "return x * self.scale\n",
        "many = mx.tile(self.scale, -(-x.shape[1] // self.scale.size))\n"
        "        return x * many[: x.shape[1]].reshape(1, -1, *[1] * (x.ndim - 2))\n",
        LEVELS,
    ),
    "swapped halves of the 2-D positions": (
        "nn/positions.py",
        "table[..., :half] = interleaved(width)[:, None]\n    table[..., half:] = interleaved(height)[None]",
        "table[..., half:] = interleaved(width)[:, None]\n    table[..., :half] = interleaved(height)[None]",
        LEVELS,
    ),
    "swapped halves of the 1-D positions": (
        "positions.py",
        "np.concatenate([np.cos(phase), np.sin(phase)]",
        "np.concatenate([np.sin(phase), np.cos(phase)]",
        LEVELS,
    ),
    "swapped halves of the GLU": (
        "backend/fused.py",
        "else _plain_conv_glu)(x, weight, bias)",
        "else _plain_conv_glu)(x, *(mx.roll(a, a.shape[0] // 2, 0) for a in (weight, bias)))",
        LEVELS,
    ),
    "swapped halves of the GLU of DConv": (
        "backend/fused.py",
        "return form(x, weight, bias, norm_weight, norm_bias, scale",
        "halves = (mx.roll(a, a.shape[0] // 2, 0) for a in (weight, bias, norm_weight, norm_bias))\n"
        "    return form(x, *halves, scale",
        LEVELS,
    ),
    "unscaled attention": ("nn/attention/layer.py", "self.config.widths[0] ** -0.5 if", "1.0 if", LEVELS),
    "DConv norm over all rows": (
        LAYERS,
        "axes=(1,), eps=norm1.eps",
        "axes=tuple(range(1, x.ndim - 1)), eps=norm1.eps",
        LEVELS,
    ),
    "frequency embedding after the skip": (
        MODEL,
        "            skips.append(x)\n",
        "            skips.append(x - self.freq_emb.weight if not index and self.config.freq_emb else x)\n",
        LEVELS,
    ),
    "epsilon inside the root of the spectrogram": (MODEL, "/ (_EPS + std)", "/ mx.sqrt(_EPS + std * std)", LEVELS),
    "unnormalised STFT": (
        MODEL,
        "stft(mix, n_fft=nfft, hop_length=hop, center=False)",
        "stft(mix, n_fft=nfft, hop_length=hop, center=False, normalized=False)",
        LEVELS,
    ),
    "flat segments": (
        "separation/segments.py",
        "return (triangle / triangle.max()) ** np.float32(power)",
        "return triangle * 0 + 1",
        TRACKS,
    ),
    "transition power ignored": ("separation/segments.py", "** np.float32(power)", "** np.float32(1)", TRACKS),
    "draws of the segments forgotten": (
        "separation/segments.py",
        "rng.randrange(config.t_sin_random_shift + 1) if draws else 0",
        "0",
        TRACKS,
    ),
    "weights of the bag ignored": (
        "separation/segments.py",
        "[weights[member][s] for s in wanted], np.float32)",
        "[1.0 for s in wanted], np.float32)",
        TRACKS,
    ),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package, converters included, that shadows the installed one."""
    folder = tmp_path_factory.mktemp("mutant")
    shutil.copytree(ROOT / "mlx_xformer", folder / "mlx_xformer")
    return folder


def run(package, tests):
    """pytest's exit code for the golden tests against the copy: 0 passed, 1 failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        ROOT / "tests" / "models" / "test_htdemucs_golden.py",
    ]
    answer = subprocess.run(
        [*command, "-k", tests, "-c", ROOT / "pyproject.toml"],
        env=os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        cwd=package,  # Python looks in the current folder first
    )
    assert answer.returncode in (0, 1), answer.stdout + answer.stderr
    assert "AssertionError" in answer.stdout or answer.returncode == 0, answer.stdout
    return answer.returncode


@pytest.mark.parametrize("tests", [LEVELS, TRACKS])
def test_the_unchanged_copy_passes(package, tests):
    where = subprocess.run(
        [
            sys.executable,
            "-c",
            "from mlx_xformer import layers, converters; print(layers.__file__, converters.__file__)",
        ],
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        cwd=package,
    )
    assert where.stdout.count(str(package)) == 2, where.stdout + where.stderr
    assert run(package, tests) == 0


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(package, name):
    file, source, planted, tests = MUTANTS[name]
    path = package / "mlx_xformer" / file
    text = path.read_text()
    assert text.count(source) == 1, f"{file} holds {text.count(source)} times: {source}"
    try:
        path.write_text(text.replace(source, planted))
        assert run(package, tests) == 1, f"the suite passes with {name}"
    finally:
        path.write_text(text)
