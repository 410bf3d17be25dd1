"""The page of a separated track in Chromium, offline: that it plays in step, and what is heard, seen and clicked."""

import hashlib
import struct

import numpy as np
import pytest
from support.audio import RATE, embedding, tones
from support.audio import make_report as made
from support.processes import chromium

from mlx_xformer.separation.report.measure import MARGIN, SECTION

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
    first = starts[:4]
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

    def settles(*gains):
        browser.wait(f"return (() => {{ {GAINS} }})().join() === '{','.join(map(str, gains))}'")

    settles(0, 1, 1, 0)  # mix, bass, vocals, residual: at first the stems
    browser.click(button("mute", 1))
    settles(0, 0, 1, 0)
    browser.click(button("solo", 0))
    settles(1, 0, 0, 0)
    browser.click(button("solo", 2))
    settles(1, 0, 1, 0)
    pressed = "return [...document.querySelectorAll('button[aria-pressed=true]')].map((b) => b.ariaLabel).join()"
    assert browser.run(pressed) == "Solo mix,Mute mix,Mute bass,Solo vocals,Mute residual"
    browser.click("#reset")
    settles(0, 1, 1, 0)
    browser.click(button("mute", 1))
    browser.click(button("mute", 2))
    settles(0, 0, 0, 0)
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
    here, then = starts[0], starts[4]
    assert len({tuple(s) for s in starts[:4]}) == len({tuple(s) for s in starts[4:8]}) == 1
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


@pytest.mark.browser
@pytest.mark.parametrize("values", [(2, 44100, 128), (1, 44100, 48), (1, 22050, 32)])
def test_what_sounds_is_where_the_picture_shows_it(browser, tmp_path, monkeypatch, values):
    click = np.zeros((2, 2 * RATE), np.float32)
    click[:, RATE : RATE + 40] = np.hanning(40) * 0.9
    with embedding(monkeypatch, *values):
        opened(browser, made(tmp_path, click, {"click": click}))
    browser.click("#play")
    browser.wait("return notes.started.length")
    at = browser.run(
        "const { buffer, offset } = notes.started[1], x = buffer.getChannelData(0); let top = 0;"
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
