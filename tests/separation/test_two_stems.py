"""Two stems: of models with one source, and at the song's own sample rate."""

import numpy as np
import pytest
import soundfile
from support.audio import write_noise
from support.models import FAST, checkpoint
from support.processes import run_command


@pytest.mark.parametrize("method", ["add", "minus", "none"])
def test_two_stems_of_a_model_with_one_source(tmp_path, method):
    """The rest is the mix minus the stem, under demucs' name."""
    song = write_noise(tmp_path / "song.wav", 3001)
    one = checkpoint(tmp_path / "one", segment="1/1", sources=["vocals"], **FAST)
    given = ["--two-stems", "vocals", "--other-method", method, "--bits", 32, "--clip", "none", "--shifts", 0]
    code, _, err = run_command("separate", song, "-n", one, "-o", tmp_path / "out", *given)
    assert (code, err) == (0, "")
    found = {p.stem: soundfile.read(p, dtype="float32")[0] for p in (tmp_path / "out" / "one" / "song").iterdir()}
    rest = {"add": {"no_vocals"}, "minus": {"minus_vocals"}, "none": set()}[method]
    assert found.keys() == {"vocals"} | rest and np.abs(found["vocals"]).max() > 0.01
    for name in rest:
        mix = soundfile.read(song, dtype="float32")[0]
        assert np.abs(found[name] + found["vocals"] - mix).max() < 2**-23


@pytest.mark.parametrize("sources", [["vocals", "other"], ["vocals"]], ids=len)
def test_the_rest_at_the_songs_own_rate_adds_up_to_the_song(tmp_path, sources):
    """Within the rounding of float32, with what lies above the model's rate."""
    model = checkpoint(tmp_path / "tiny", segment="1/1", sources=sources, **FAST)
    rate, n = 24000, 20011
    t = np.arange(n) / rate
    rng = np.random.default_rng(0)
    mix = rng.uniform(-0.2, 0.2, (n, 2)) + 0.1 * np.sin(2 * np.pi * 9001 * t)[:, None]  # the model's rate is 8000
    soundfile.write(tmp_path / "song.wav", mix, rate, subtype="FLOAT")
    mix = soundfile.read(tmp_path / "song.wav", dtype="float32")[0]
    method = "minus" if len(sources) > 1 else "add"
    given = ["--two-stems", "vocals", "--other-method", method, "--rate", "keep", "--bits", 32, "--clip", "none"]
    code, _, err = run_command("separate", tmp_path / "song.wav", "-n", model, "-o", tmp_path / "out", *given)
    assert (code, err) == (0, "")
    found = {p.stem: soundfile.read(p, dtype="float32") for p in (tmp_path / "out" / "tiny" / "song").iterdir()}
    assert len(found) == 2 and all(rate_ == rate and x.shape == mix.shape for x, rate_ in found.values())
    total = sum(x.astype(np.float64) for x, _ in found.values())
    assert np.abs(total - mix).max() <= 2**-24 * max(np.abs(x).max() for x, _ in found.values())
    rest = next(x for name, (x, _) in found.items() if name != "vocals")
    tone = np.abs(np.fft.rfft(rest[:, 0] * np.hanning(n)))[round(9001 * n / rate)] * 4 / n
    assert abs(tone - 0.1) < 0.01
