"""The page of a separated track in Chromium, offline: that it plays in step, and what is heard, seen and clicked."""

import hashlib
import itertools
import struct
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from support.audio import RATE, embedding, save_separation, tones
from support.audio import make_report as made
from support.processes import chromium

from mlx_xformer.separation.report.index import add_song
from mlx_xformer.separation.report.measure import MARGIN, SECTION
from mlx_xformer.separation.report.page import write_report

# In the browser: what the page does with the sound is noted by wrapping Web Audio before the page runs.
NOTES = """
  window.notes = { started: [], gains: [], contexts: [], requests: 0 };
  const start = AudioBufferSourceNode.prototype.start;
  AudioBufferSourceNode.prototype.start = function (when, offset, length) {
    notes.started.push({ when, offset, length, buffer: this.buffer });
    start.call(this, when, offset, length);
  };
  window.GainNode = class extends GainNode { constructor(...a) { super(...a); notes.gains.push(this); } };
  window.AudioContext = class extends AudioContext { constructor(...a) { super(...a); notes.contexts.push(this); } };
  const connect = AudioNode.prototype.connect;
  AudioNode.prototype.connect = function (to, ...rest) {
    if (to === this.context.destination) {
      notes.listener = new AnalyserNode(this.context, { fftSize: 8192 });
      connect.call(this, notes.listener);
    }
    return connect.call(this, to, ...rest);
  };
  window.loudness = () => {
    const heard = new Float32Array(8192);
    notes.listener.getFloatTimeDomainData(heard);
    return Math.sqrt(heard.reduce((sum, x) => sum + x * x, 0) / heard.length);
  };
"""
STARTED = (
    "return notes.started.map((s) => [s.when, s.offset, s.length, s.buffer.sampleRate, s.buffer.numberOfChannels])"
)
GAINS = "return notes.gains.slice(1).map((g) => Math.round(g.gain.value * 1000) / 1000)"
NOW = "return Number(document.querySelector('#seek').value)"
CLOCK = "return notes.contexts[0].currentTime"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of three stretches, the last of one second."""
    folder = tmp_path_factory.mktemp("page")
    return made(folder, *tones(2 * SECTION + 1), title="<song> & more")


@pytest.fixture(scope="module")
def browser():
    with chromium() as session:
        session.devtools("Page.addScriptToEvaluateOnNewDocument", source=NOTES)
        yield session


def opened(browser, path):
    """Opens a page from disk and waits until it can play; nothing was said on its console."""
    browser.send("POST", "/url", url=path.resolve().as_uri())
    browser.wait("return !document.querySelector('#play').disabled")
    assert browser.run("return navigator.onLine") is False
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def button(act, track):
    return f".track:nth-of-type({track + 1}) [data-act={act}]"


@pytest.mark.browser
def test_a_browser_plays_the_page_offline(browser, page):
    opened(browser, page)
    assert browser.run("return document.querySelector('h1').textContent") == "<song> & more"
    browser.click("#play")
    browser.wait(f"{NOW} > 0.3")
    starts = browser.run(STARTED)
    first = starts[:3]
    assert len({tuple(s) for s in first}) == 1, first  # every track: one time on one clock, one offset, one length
    assert first[0][1:] == [pytest.approx(MARGIN), SECTION, RATE, 2]
    before, clock = browser.run(NOW), browser.run(CLOCK)
    browser.wait(f"{NOW} > {before + 0.5}")
    assert browser.run(NOW) - before == pytest.approx(browser.run(CLOCK) - clock, abs=0.15)
    assert browser.run("return loudness()") == pytest.approx(0.24, abs=0.03)  # the stems, without the mix
    browser.click("#play")
    held = browser.run(NOW)
    browser.wait("return loudness() === 0")
    assert browser.run(NOW) == held > 0.8
    assert browser.send("POST", "/se/log", type="browser") == []


@pytest.mark.browser
def test_solo_and_mute_are_gains(browser, page):
    opened(browser, page)
    browser.click("#play")
    browser.wait(f"{NOW} > 0.1")
    settles(browser, 0, 1, 1, 0)  # mix, bass, vocals, residual: at first the stems
    browser.click(button("mute", 1))
    settles(browser, 0, 0, 1, 0)
    browser.click(button("solo", 0))
    settles(browser, 1, 0, 0, 0)
    browser.click(button("solo", 2))
    settles(browser, 1, 0, 1, 0)
    pressed = "return [...document.querySelectorAll('button[aria-pressed=true]')].map((b) => b.ariaLabel).join()"
    assert browser.run(pressed) == "Solo mix,Mute mix,Mute bass,Solo vocals,Mute residual"
    browser.click("#reset")
    settles(browser, 0, 1, 1, 0)
    browser.click(button("mute", 1))
    browser.click(button("mute", 2))
    settles(browser, 0, 0, 0, 0)
    browser.wait("return loudness() < 1e-6")
    assert len({s[0] for s in browser.run(STARTED)}) <= 2  # nothing anew but the next stretch


@pytest.mark.browser
def test_seeking_keys_and_the_joins_between_stretches(browser, page):
    opened(browser, page)
    total = 2 * SECTION + 1
    box = browser.run("const b = document.querySelector('.view').getBoundingClientRect(); return [b.x, b.y, b.width]")
    x = round(box[0] + box[2] * 9 / total)
    pointer = [{"type": "pointerMove", "x": x, "y": round(box[1] + 30)}]
    pointer += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
    browser.send("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": pointer}])
    assert browser.run(NOW) == pytest.approx(9, abs=0.05)
    browser.press("\ue014")  # right
    assert browser.run(NOW) == pytest.approx(10, abs=0.05)
    browser.press("\ue012")  # left
    browser.press(" ")
    browser.wait(f"{NOW} > {SECTION + 0.3}")
    starts = browser.run(STARTED)
    here, then = starts[0], starts[3]
    assert len({tuple(s) for s in starts[:3]}) == len({tuple(s) for s in starts[3:6]}) == 1
    assert here[0] + here[2] == pytest.approx(then[0], abs=1e-9)  # the next stretch begins where this one ends
    assert then[1] == pytest.approx(MARGIN) and here[1] + here[2] == pytest.approx(SECTION + MARGIN)
    browser.press("\ue014")
    browser.wait(f"{NOW} > {SECTION + 1.4}")
    browser.press(" ")
    assert browser.run("return document.body.classList.contains('playing')") is False
    browser.run("const s = document.querySelector('#seek'); s.value = 20.5; s.dispatchEvent(new Event('input'))")
    assert browser.run(NOW) == 20.5
    browser.press(" ")
    browser.wait("return document.body.classList.contains('playing')")
    browser.wait("return !document.body.classList.contains('playing')")
    assert browser.run(NOW) == 0


def settles(browser, *gains):
    """Waits until the mix, bass, vocals and residual have these gains. The mix sounds as all others together."""
    mix, *others = gains
    browser.wait(f"return (() => {{ {GAINS} }})().join() === '{','.join(str(mix + gain) for gain in others)}'")


@pytest.mark.browser
def test_faders_set_the_volume_of_a_track(browser, page):
    opened(browser, page)
    browser.click("#play")
    browser.wait(f"{NOW} > 0.1")
    fader = ".track:nth-of-type(2) .fader input"
    told = f"const f = document.querySelector('{fader}'); return [f.ariaValueText, f.nextSibling.textContent]"

    def turn(decibels):
        browser.run(
            f"const f = document.querySelector('{fader}'); f.value = {decibels};"
            "f.dispatchEvent(new Event('input', { bubbles: true }))"
        )

    turn(-6)
    settles(browser, 0, 0.501, 1, 0)
    assert browser.run(told) == ["−6 dB"] * 2
    turn(6)
    settles(browser, 0, 1.995, 1, 0)
    assert browser.run(told) == ["+6 dB"] * 2
    turn(-48)
    settles(browser, 0, 0, 1, 0)
    assert browser.run(told) == ["off"] * 2
    assert browser.run("return document.querySelectorAll('.track.silent').length") == 3
    browser.click("#reset")
    settles(browser, 0, 1, 1, 0)
    assert browser.run(told) == ["0 dB"] * 2 and browser.run("return document.querySelector('#reset').disabled")
    browser.click("#play")
    held = browser.run(NOW)
    browser.run(f"document.querySelector('{fader}').focus()")
    browser.press("\ue012")  # left
    settles(browser, 0, 0.891, 1, 0)
    assert browser.run(NOW) == held  # the arrow keys belong to the fader that has the focus
    browser.press("2")
    settles(browser, 0, 0, 1, 0)  # other keys do not


@pytest.mark.browser
def test_keys_solo_and_mute(browser, page):
    opened(browser, page)
    browser.press(" ")
    browser.wait(f"{NOW} > 0.1")
    browser.press("2")
    settles(browser, 0, 0, 1, 0)
    browser.press("1")
    settles(browser, 0, 1, 1, 0)
    browser.press("m")
    settles(browser, 1, 0, 0, 0)
    browser.press("M", shift=True)
    settles(browser, 0, 0, 0, 0)
    browser.press("m")
    settles(browser, 1, 0, 0, 0)
    browser.press("m")
    settles(browser, 0, 1, 1, 0)
    assert browser.run("return document.querySelectorAll('[data-act=solo][aria-pressed=true]').length") == 2
    browser.press("2")
    browser.press("1")
    browser.press("1", shift=True)
    settles(browser, 0, 0, 1, 0)
    browser.press("3")  # there is no third stem
    browser.press("1", shift=True)
    settles(browser, 0, 1, 1, 0)
    browser.press(" ")
    browser.run("document.querySelector('.file').focus()")
    browser.press("1")
    settles(browser, 0, 1, 0, 0)


@pytest.mark.browser
@pytest.mark.parametrize(("start", "end"), [(3.0, 3.4), (SECTION - 0.2, SECTION + 0.3)], ids=["within", "across"])
def test_a_loop_is_seamless(browser, page, start, end):
    opened(browser, page)
    seek = "const s = document.querySelector('#seek'); s.value = {}; s.dispatchEvent(new Event('input'))"
    for key, at in (("a", start), ("b", end)):
        browser.run(seek.format(at))
        browser.press(key)
    assert browser.run("return document.querySelector('#range').textContent") == f"from 0:0{start:.1f} to " + (
        f"0:0{end:.1f}" if end < 10 else f"0:{end:.1f}"
    )
    browser.run(seek.format(start + 0.1))
    browser.press(" ")
    browser.wait("return notes.started.length >= 3 * 6")
    starts = sorted(tuple(s) for s in browser.run(STARTED))
    assert all(len(set(starts[i : i + 3])) == 1 for i in range(0, 18, 3))
    pieces = starts[:18:3]
    for (when, _, length, *_), (after, *_) in itertools.pairwise(pieces):
        assert when + length == pytest.approx(after, abs=1e-9)  # no gap and no overlap
    number = int(start // SECTION)
    assert pieces[0][1] - MARGIN + number * SECTION == pytest.approx(start + 0.1)
    begins = [piece[1] - MARGIN for piece in pieces]
    assert sum(b == pytest.approx(start - number * SECTION, abs=1e-4) for b in begins) >= 2  # A comes again
    total = sum(piece[2] for piece in pieces[1:3]) if end > SECTION else pieces[1][2]
    assert total == pytest.approx(end - start, abs=1e-4)
    highest = 0
    for _ in range(8):
        highest = max(highest, browser.run(NOW))
        assert start - 0.01 <= browser.run(NOW) <= end + 0.01
        time.sleep(0.1)
    assert highest > start + 0.1
    browser.press("c")
    browser.wait(f"{NOW} > {end + 0.2}")
    assert browser.run("return document.querySelector('#range').textContent") == ""
    browser.press(" ")


@pytest.mark.browser
def test_setting_b_while_playing_goes_back_to_a(browser, page):
    opened(browser, page)
    browser.press(" ")
    browser.wait(f"{NOW} > 0.3")
    browser.click("#loop-a")
    first = browser.run(NOW)
    browser.wait(f"{NOW} > {first + 0.8}")
    browser.click("#loop-b")
    assert browser.run(NOW) < first + 0.3
    pressed = "return [...document.querySelectorAll('.loop [aria-pressed=true]')].map((b) => b.textContent).join('')"
    assert browser.run(pressed) == "AB"
    browser.wait(f"{NOW} > {first + 0.4}")
    browser.press("a")  # nearer to B, still playing
    assert browser.run(pressed) == "AB"
    browser.click("#loop-clear")
    assert browser.run(pressed) == "" and browser.run("return document.querySelector('#loop-clear').disabled")
    browser.press(" ")
    browser.run("const s = document.querySelector('#seek'); s.value = 5; s.dispatchEvent(new Event('input'))")
    browser.press("b")
    browser.run("const s = document.querySelector('#seek'); s.value = 7; s.dispatchEvent(new Event('input'))")
    browser.press("a")  # after B, which goes
    assert browser.run(pressed) == "A"


@pytest.mark.browser
def test_a_link_opens_the_file_beside_the_page(browser, page):
    opened(browser, page)
    before = browser.send("GET", "/window/handles")
    browser.click(".file")
    new = browser.wait_for(lambda: set(browser.send("GET", "/window/handles")) - set(before))
    assert browser.send("GET", "/url") == page.resolve().as_uri()
    browser.send("POST", "/window", handle=new.pop())
    assert browser.wait("return location.href") == (page.parent / "0.wav").resolve().as_uri()
    browser.send("DELETE", "/window")
    browser.send("POST", "/window", handle=before[0])


@pytest.mark.browser
@pytest.mark.parametrize("values", [(2, 44100, 96), (1, 44100, 32), (1, 32000, 20)])
def test_what_sounds_is_where_the_picture_shows_it(browser, tmp_path, monkeypatch, values):
    click = np.zeros((2, 2 * RATE), np.float32)
    click[:, RATE : RATE + 40] = np.hanning(40) * 0.9
    with embedding(monkeypatch, *values):
        opened(browser, made(tmp_path, click, {"click": click}))
    browser.click("#play")
    browser.wait("return notes.started.length")
    at = browser.run(
        "const { buffer, offset } = notes.started[0], x = buffer.getChannelData(0); let top = 0;"
        "for (let i = 0; i < x.length; i++) if (Math.abs(x[i]) > Math.abs(x[top])) top = i;"
        "return top / buffer.sampleRate - offset"
    )
    assert at == pytest.approx((RATE + 20) / RATE, abs=3e-4)


@pytest.mark.browser
def test_it_fits_and_is_drawn(browser, tmp_path):
    opened(
        browser,
        made(tmp_path, *tones(3), title="A title-of-several-words_and_one_very_very_long_word_without_any_break.flac"),
    )
    seen = set()
    for width in (1280, 390, 320):
        for dark in (False, True):
            picture = browser.look(width, 844, dark=dark)
            assert struct.unpack(">II", picture[16:24]) == (2 * width, 2 * 844)
            assert browser.run("return document.documentElement.scrollWidth") <= width
            seen.add(hashlib.sha256(picture).digest())
            drawn = browser.run(
                "return [...document.querySelectorAll('canvas')].map((c) => new Set(new Uint32Array(c.getContext('2d')"
                ".getImageData(0, 0, c.width, c.height).data.buffer)).size)"
            )
            assert len(drawn) == 8 and min(drawn) >= 2 and min(drawn[1:6:2]) > 50, drawn
    assert len(seen) == 6
    named = "return [...document.querySelectorAll('button, input, section, [role]')]"
    assert browser.run(f"{named}.every((e) => e.ariaLabel || e.textContent.trim() || e.id === 'status')")


@pytest.mark.browser
def test_the_index_opens_pages_and_files(browser, tmp_path):
    """From disk, in both colour schemes and on a phone; a song's page leads back."""
    out = tmp_path / "out"
    for number, name in enumerate(
        ("a #1 song", "a-title-of-several-words_and_one_very_very_long_word_without_any_break")
    ):
        folder = out / "model" / name
        folder.mkdir(parents=True)
        files = save_separation(folder, *tones(0.4 + number))
        named = {"title": f"{name}.flac", "facts": {}, "index": out / "index.html"}
        add_song(out, write_report(folder / "report.html", *files, **named), "model")
    index = (out / "index.html").resolve().as_uri()
    browser.send("POST", "/se/log", type="browser")  # what others left there
    browser.send("POST", "/url", url=index)
    seen = set()
    for width in (1280, 390, 320):
        for dark in (False, True):
            seen.add(hashlib.sha256(browser.look(width, 844, dark=dark)).digest())
            assert browser.run("return document.documentElement.scrollWidth") <= width
    assert len(seen) == 6
    for link in browser.run("return [...document.querySelectorAll('.stems a')].map((a) => a.href)"):
        assert Path(unquote(urlsplit(link).path)).exists()
    browser.click(".song a")
    browser.wait("return document.querySelector('#play') && !document.querySelector('#play').disabled")
    assert browser.run("return document.querySelector('h1').textContent") == "a #1 song.flac"
    browser.click(".home a")
    browser.wait("return document.querySelector('.songs')")
    assert browser.send("GET", "/url") == index
    assert browser.send("POST", "/se/log", type="browser") == []
