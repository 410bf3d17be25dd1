"""Planted bugs in Whisper and its spectrograms: test_mel.py and test_whisper.py must fail with each of them."""

import pytest
from support.planted import outcomes, source_of, task

WHISPER, MEL = "models.whisper", "nn.mel"
MUTANTS = {
    "tanh GELU in the convolutions": (
        WHISPER,
        "from ..kernels import gelu\n",
        "from ..kernels import gelu_tanh as gelu\n",
    ),
    "tanh GELU in the layers": (WHISPER, 'activation="gelu"', 'activation="gelu_tanh"'),
    "no GELU after the first convolution": (
        WHISPER,
        "self.conv2(gelu(self.conv1(mel)))",
        "self.conv2(self.conv1(mel))",
    ),
    "post-norm": (WHISPER, "norm_first=True", "norm_first=False"),
    "keys with a bias": (WHISPER, 'bias=("q", "v", "out")', "bias=True"),
    "a decoder that sees what follows": (WHISPER, "causal=decoder", "causal=False"),
    "no norm after the encoder": (
        WHISPER,
        "config.encoder_layers, final_norm=True",
        "config.encoder_layers, final_norm=False",
    ),
    "cosines first": (WHISPER, "[sines, cosines]", "[cosines, sines]"),
    "positions that are trained": (WHISPER, "self.embed_positions.freeze()", "self.embed_positions.unfreeze()"),
    "positions from 0 with a cache": (WHISPER, "caches[0].offset if caches else 0", "0"),
    "the last positions from the front": ("nn.transformer", "x[:, x.shape[1] - last :]", "x[:, :last]"),
    "no room for the last position": (WHISPER, "before + tokens.shape[1] > most", "before + tokens.shape[1] >= most"),
    "caches without an end": (WHISPER, "replace(options, capacity=self.config", "replace(options, slack=self.config"),
    "the memory projected at every step": (WHISPER, "cross_caches=cross_caches)", "cross_caches=None)"),
    "a row takes the offset of the first": (WHISPER, "offset[:, None]", "offset[0]"),
    "powers without their root": (MEL, "mx.square(mx.imag(spectrum))", "mx.abs(mx.imag(spectrum))"),
    "natural logarithms": (MEL, "mx.log10(", "mx.log("),
    "the loudest of all recordings": (MEL, "axis=(-2, -1), keepdims=True", "keepdims=True"),
    "70 dB": (MEL, "_FLOOR, _RANGE = 1e-10, 8.0", "_FLOOR, _RANGE = 1e-10, 7.0"),
    "the last frame is kept": (MEL, "[..., :-1, :]", "[..., :, :]"),
    "the first frame is dropped": (MEL, "[..., :-1, :]", "[..., 1:, :]"),
    "another mel scale": (MEL, "_KNEE, _STEP = 1000.0, 200 / 3", "_KNEE, _STEP = 1000.0, 66.0"),
    "triangles of one height": (MEL, " * 2 / (right - left)", ""),
    "zeros in front": (MEL, "+ [(0, fill)]", "+ [(fill, 0)]"),
}

CHECK = """
import contextlib, io, sys
import pytest

class First:
    failed = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid}: {report.longrepr}"[:300]

def found():
    for loaded in [name for name in sys.modules if name == "whispers" or name.split(".")[0] == "tests"]:
        del sys.modules[loaded]  # they hold what was planted before
    first, files = First(), [f"{sys.argv[1]}/test_{name}.py" for name in ("mel", "whisper")]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*files, "-x", "-p", "no:cacheprovider"], plugins=[first])
    return first.failed
"""


@pytest.fixture(scope="module")
def caught():
    """What became of each mutant, and of the unchanged source."""
    mutants = [task(name, *mutant) for name, mutant in MUTANTS.items()]
    return outcomes([("nothing", MEL, source_of(MEL)), *mutants], CHECK)


def test_the_unchanged_source_passes(caught):
    assert caught["nothing"] is None
    assert caught.keys() == {"nothing", *MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(caught, name):
    assert caught[name], f"every test passes with {name}"
