"""The page of a separated track: its numbers, its safety, its memory. A browser plays it in test_report_browser.py."""

import base64
import dataclasses
import hashlib
import os
import re
import tracemalloc
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import soundfile
from support import ffmpeg
from support.audio import RATE, Page, embedding, tones
from support.audio import make_report as made
from support.audio import save_separation as save

from mlx_xformer.audio.recording import Recording
from mlx_xformer.separation.report import page as report
from mlx_xformer.separation.report.index import Levels, Song
from mlx_xformer.separation.report.markup import choose_hues
from mlx_xformer.separation.report.measure import BANDS, MARGIN, SECTION, Measure, Tracks
from mlx_xformer.separation.report.page import Embedding, write_report


def db(ratio):
    return 20 * np.log10(ratio)


def test_levels_and_residual_are_those_of_numpy(tmp_path):
    mix, stems = tones(1.7)
    page = Page(made(tmp_path, mix, stems))
    tracks = [x.astype(np.float64) for x in (mix, *stems.values(), mix - sum(stems.values()))]
    residual = db(np.sqrt(np.sum(tracks[-1] ** 2) / np.sum(tracks[0] ** 2)))
    levels = [f(x) for x in tracks for f in (lambda x: db(np.abs(x).max()), lambda x: db(np.sqrt(np.mean(x**2))))]
    np.testing.assert_allclose(page.values, [residual, *levels], atol=1e-3)
    assert -45 < residual < -35
    assert f"{residual:.1f} dB".replace("-", "−") in page.texts["text"]
    assert re.findall("aria-label=.Solo ([a-z]+)", page.source) == ["mix", "bass", "vocals", "residual"]


def test_silence_and_an_exact_sum_have_levels(tmp_path):
    mix, stems = tones(0.5)
    silent = np.zeros_like(mix)
    page = Page(made(tmp_path, stems["bass"], {"bass": stems["bass"], "vocals": silent}))
    assert page.values[0] == -np.inf and page.values[5:] == [-np.inf] * 4
    assert "−∞ dBFS" in page.texts["text"]
    assert np.isnan(Page(made(tmp_path, silent, stems)).values[0])


def test_the_page_needs_nothing_else(tmp_path):
    page = Page(made(tmp_path, *tones(0.3)))
    assert page.source.startswith("<!doctype html>")
    assert "://" not in page.source and "@import" not in page.source and "url(" not in page.source
    for tag, attributes in page.tags:
        assert "src" not in attributes and "style" not in attributes, tag
        assert tag == "a" or attributes.get("href", "data:,") == "data:,", tag
        assert not [name for name in attributes if name.startswith("on")], tag
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    for part, name in ((("script", None), "script"), (("style", None), "style")):
        digest = base64.b64encode(hashlib.sha256(page.texts[part].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert [a["href"] for t, a in page.tags if t == "a"] == ["0.wav", "1.wav"]  # the stems, to be opened by a click


def test_links_lead_to_the_files_of_the_stems(tmp_path):
    """From wherever the page lies, whatever the files are called; what is no file has no link."""
    mix, stems = tones(0.2)
    mix_path, paths = save(tmp_path, mix, stems)
    names = ["a b#c?d%20.wav", "x:y.wav", "ä é.wav", '"<&>.wav']
    files = {name: tmp_path / "out" / f"{i}" / name for i, name in enumerate(names)}
    for file in files.values():
        file.parent.mkdir(parents=True)
        file.write_bytes(paths["bass"].read_bytes())
    page = tmp_path / "out" / "pages" / "deep" / "report.html"
    array = Recording.from_array(stems["bass"], RATE)
    write_report(page, mix_path, files | {"array": array}, title="a\udcff", facts={}, index=tmp_path / "out/index.html")
    links = [a["href"] for t, a in Page(page).tags if t == "a"]
    assert links[0] == "../../index.html" and len(links) == 1 + len(files)
    for href, file in zip(links[1:], files.values(), strict=True):
        assert re.fullmatch(r"[\w./%~-]+", href, re.ASCII) and not href.startswith("/")
        found = Path(os.fsdecode(unquote_to_bytes(href)))
        assert (page.parent / found).samefile(file)


def test_a_report_says_what_the_index_needs(tmp_path):
    mix, stems = tones(0.5)
    files = save(tmp_path, mix, stems)
    song = write_report(tmp_path / "report.html", *files, title="a song", facts={})
    residual, *levels = Page(tmp_path / "report.html").values
    assert song == Song(tmp_path / "report.html", "a song", 0.5, RATE, 2, song.residual_db, song.tracks)
    assert song.residual_db == pytest.approx(residual, abs=1e-3)
    assert [(t.name, t.file) for t in song.tracks] == [("mix", None), *files[1].items()]
    found = [level for t in song.tracks for level in (t.peak_db, t.rms_db)]
    np.testing.assert_allclose(found, levels[:-2], atol=1e-3)
    assert isinstance(song.tracks[0], Levels)


def test_stems_may_have_lengths_that_only_reading_tells(tmp_path):
    mix, stems = tones(0.5)
    known = made(tmp_path, mix, stems)
    values = Page(known).values
    unknown = {
        name: dataclasses.replace(Recording.from_array(stem, RATE), samples=None) for name, stem in stems.items()
    }
    write_report(known, Recording.from_array(mix, RATE), unknown, title="", facts={})
    assert Page(known).values == values


def test_everything_is_read_once_and_progress_is_told(tmp_path):
    reads, told = [], []

    def recording(name):
        def blocks(warn):
            reads.append(name)
            for _ in range(25):
                yield np.full((1, 8000), 0.25, np.float32)

        return Recording(8000, 1, 200000, blocks)

    def progress(done, total):
        told.append((done, total))

    page = tmp_path / "r.html"
    write_report(page, recording("mix"), {"a": recording("a")}, title="", facts={}, progress=progress)
    assert sorted(reads) == ["a", "mix"] and told == [(1, 3), (2, 3), (3, 3)]


def test_names_are_text(tmp_path):
    mix, stems = tones(0.3)
    nasty = "<script>alert(1)</script> \"'&amp; {{data}} <!--audio--> \\1"
    stems = {nasty: stems["bass"], "b": stems["vocals"]}
    page = Page(made(tmp_path, mix, stems, title=nasty, facts={nasty: nasty, "shifts": 2}))
    assert page.texts["text"].count(nasty) == 5  # <title>, <h1>, the stem, a fact and its value
    assert {"Solo " + nasty, "Mute " + nasty} <= {a.get("aria-label") for _, a in page.tags}
    scripts = [a.get("id") or a.get("type") for t, a in page.tags if t == "script"]
    assert scripts == ["a1-0", "a2-0", "a3-0", "data", None]  # the mix sounds as all of these together


def test_a_stem_keeps_its_colour():
    assert choose_hues(["drums", "bass", "other", "vocals", "guitar", "piano"]) == list("012345")
    assert choose_hues(["vocals", "no_vocals"]) == ["3", "0"]
    assert choose_hues(["a", "drums", "b", "piano"]) == ["1", "0", "2", "5"]


def test_pictures_are_those_of_numpy():
    mix, _ = tones(1.7)
    measured = Measure(RATE, 2, mix.shape[1])
    for start in range(0, mix.shape[1], 12347):
        measured.add(mix[:, start : start + 12347])
    pictures = measured.pictures(0.5)
    envelope = np.frombuffer(base64.b64decode(pictures["envelope"]), np.int8).reshape(3, -1)
    owner = np.arange(mix.shape[1]) * 1200 // mix.shape[1]
    for w in (0, 1, 611, 1199):
        here = mix[:, owner == w]
        want = [here.min(), here.max(), np.sqrt(np.mean(here.astype(np.float64) ** 2))]
        np.testing.assert_array_equal(envelope[:, w], np.round(np.array(want) / 0.5 * 127).astype(int))
    image = np.frombuffer(base64.b64decode(pictures["spectrum"]), np.uint8).reshape(BANDS, -1)
    row = {hertz: BANDS - 1 - int(np.log(hertz / 40) / np.log(20000 / 40) * BANDS) for hertz in (110, 997)}
    quarter = image.shape[1] // 4
    assert abs(np.flatnonzero(image[:, quarter] == image[:, quarter].max()).mean() - row[110]) <= 1
    assert image[row[997], 3 * quarter] > image[row[997], quarter] + 60
    full = Measure(RATE, 1, RATE)
    full.add(np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE, dtype=np.float64)[None].astype(np.float32))
    assert full.rms_db == pytest.approx(-3.01, abs=0.01) and full.peak_db == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("samples", [1, 2, 100, 255, 4097])
def test_a_few_samples_are_enough(tmp_path, samples):
    mix, stems = tones(0.2)
    path = made(tmp_path, mix[:, :samples], {name: stem[:, :samples] for name, stem in stems.items()})
    assert len(Page(path).facts()["tracks"]) == 4


def test_stretches_do_not_change_a_measure():
    mix, _ = tones(2.3)
    whole, parts = Measure(RATE, 2, mix.shape[1]), Measure(RATE, 2, mix.shape[1])
    whole.add(mix)
    for part in np.array_split(mix, 17, axis=1):
        parts.add(part)
    assert parts.energy == pytest.approx(whole.energy, rel=1e-12)
    a, b = (np.frombuffer(base64.b64decode(m.pictures(1)["spectrum"]), np.uint8).astype(int) for m in (whole, parts))
    assert np.abs(a - b).max() <= 1


def test_the_mix_may_have_another_rate_and_one_channel(tmp_path):
    t = np.arange(48000 * 2) / 48000
    mix = 0.3 * np.sin(2 * np.pi * 440 * t, dtype=np.float64)[None].astype(np.float32)
    t = np.arange(RATE * 2) / RATE
    stem = np.repeat(0.3 * np.sin(2 * np.pi * 440 * t)[None], 2, axis=0).astype(np.float32)
    page = Page(made(tmp_path, mix, {"other": stem}, mix_rate=48000))
    assert page.values[0] < -45  # only the ends of the resampled tone differ
    assert page.values[2] == pytest.approx(db(0.3 / np.sqrt(2)), abs=0.01)


def test_windows_are_the_track_with_margins(tmp_path):
    seconds, margin = 2 * SECTION + 0.05, round(MARGIN * 8000)
    mix, stems = tones(seconds, rate=8000)
    paths = save(tmp_path, mix, stems, rate=8000, mix_rate=8000)
    tracks = Tracks(Recording.open(paths[0]), {name: Recording.open(path) for name, path in paths[1].items()})
    padded = np.pad(mix, ((0, 0), (margin, 2 * margin)))
    windows = list(tracks.read_with_margins())
    assert [w.shape[2] for w in windows] == [80000 + 2 * margin] * 2 + [400 + 2 * margin]
    for number, window in enumerate(windows):
        np.testing.assert_array_equal(window[0], padded[:, number * 80000 :][:, : window.shape[2]])


@pytest.mark.parametrize(
    ("values", "stems_rate"), [((2, 44100, 96), 44100), ((1, 32000, 32), 32000), ((1, 44100, 20), 8000)]
)
def test_what_is_embedded_is_the_track(tmp_path, monkeypatch, values, stems_rate):
    """Sample by sample, as FFmpeg's program decodes it; Opus is always stored as 48 kHz."""
    mix, stems = tones(SECTION + 1.5, rate=stems_rate)
    with embedding(monkeypatch, *values):
        page = Page(made(tmp_path, mix, stems, rate=stems_rate, mix_rate=stems_rate))
    channels, rate, kbps = values
    (tmp_path / "a.webm").write_bytes(base64.b64decode(page.texts["script", "a1-1"]))
    audio, got = ffmpeg.decode(tmp_path / "a.webm")
    assert got == 48000 and audio.shape == (channels, round(1.7 * rate))
    bits = 8 * (tmp_path / "a.webm").stat().st_size
    assert bits < 1.1 * kbps * 1000 * audio.shape[1] / 48000 + 8000  # the last figure: of the container
    t = SECTION - MARGIN + np.arange(audio.shape[1]) / rate
    want = 0.4 * np.sin(2 * np.pi * 110 * t) * (1 if channels == 2 else 0.85)
    inner = slice(round(MARGIN * rate), -round(2 * MARGIN * rate))
    assert np.abs(audio[0] - want)[inner].max() < 0.03


def test_silence_takes_little_room(tmp_path):
    mix, _ = tones(5)
    page = Page(made(tmp_path, mix, {"bass": mix, "vocals": np.zeros_like(mix)}))
    loud, silent = (len(page.texts["script", f"a{track}-0"]) for track in (1, 2))
    assert silent < loud / 5


def test_long_tracks_are_reduced_and_say_so(tmp_path, monkeypatch):
    assert Embedding.choose(2, 44100, 15 * 60) == Embedding(2, 44100, 96)
    assert Embedding.choose(2, 48000, 60) == Embedding(2, 48000, 96)
    assert Embedding.choose(6, 96000, 60) == Embedding(2, 44100, 96)
    assert Embedding.choose(1, 32000, 60) == Embedding(1, 32000, 64)
    assert Embedding.choose(2, 44100, 3600) == Embedding(1, 44100, 32)
    assert Embedding.choose(2, 44100, 3601) == Embedding(1, 44100, 20)
    assert "longer than" not in Page(made(tmp_path, *tones(0.3))).texts["text"]
    monkeypatch.setattr(report, "_LONG", 0.2)
    assert "longer than" in Page(made(tmp_path, *tones(0.3))).texts["text"]


def test_memory_does_not_grow_with_the_track(tmp_path, monkeypatch):
    monkeypatch.setattr(Embedding, "encode", lambda self, audio, rate: b"x" * 100)

    def peak(seconds):
        def recording(level):
            def decode(warn):
                for _ in range(seconds):
                    yield np.full((1, 8000), level, np.float32)

            return Recording(8000, 1, 8000 * seconds, decode)

        tracemalloc.start()
        write_report(tmp_path / "r.html", recording(0.5), {"a": recording(0.25)}, title="long", facts={})
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(30)
    assert peak(1200) < 1.1 * peak(60)
    assert len([t for t, _ in Page(tmp_path / "r.html").tags if t == "script"]) == 2 + 2 * 6


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    mix, stems = tones(SECTION + 0.2)
    paths = save(tmp_path, mix, stems)
    out = tmp_path / "new" / "report.html"
    monkeypatch.setattr(Embedding, "encode", lambda self, audio, rate: b"x")
    write_report(out, *paths, title="first", facts={})
    before, calls = out.read_bytes(), []

    def encode(self, audio, rate):
        calls.append(1)
        if len(calls) > 4:
            raise OSError("disk full")
        return b""

    monkeypatch.setattr(Embedding, "encode", encode)
    with pytest.raises(OSError, match="disk full"):
        write_report(out, *paths, title="second", facts={})
    assert [p.name for p in out.parent.iterdir()] == ["report.html"] and out.read_bytes() == before
    assert out.stat().st_mode & 0o444 == 0o444


def test_what_cannot_be_reported(tmp_path):
    mix, stems = tones(0.2)
    mix_path, paths = save(tmp_path, mix, stems)

    def report_of(mix=mix_path, stems=paths):
        write_report(tmp_path / "report.html", mix, stems, title="", facts={})

    with pytest.raises(ValueError, match="at least one track, got none"):
        report_of(stems={})
    with pytest.raises(FileNotFoundError, match=re.escape("gone.wav does not exist")):
        report_of(mix=tmp_path / "gone.wav")
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(ValueError, match=re.escape("text.wav cannot be read as audio")):
        report_of(mix=tmp_path / "text.wav")
    soundfile.write(tmp_path / "short.wav", mix.T[:100], RATE)
    with pytest.raises(ValueError, match=r"short has \(44100, 2, 100\), others \(44100, 2, 8820\)"):
        report_of(stems={**paths, "short": tmp_path / "short.wav"})
    soundfile.write(tmp_path / "nan.wav", np.full((8820, 2), np.nan), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan\.wav holds NaN or infinite"):
        report_of(mix=tmp_path / "nan.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), RATE)
    with pytest.raises(ValueError, match=r"empty\.wav holds no samples"):
        report_of(stems={"a": tmp_path / "empty.wav"})
    unchecked = Recording(RATE, 2, 8820, lambda warn: iter([np.full((2, 8820), np.nan, np.float32)]))
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        report_of(mix=unchecked)
    assert not list(tmp_path.glob("*report*"))
