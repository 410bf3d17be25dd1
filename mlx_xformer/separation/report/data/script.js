"use strict";
(() => {
  const $ = (selector) => document.querySelector(selector);
  const data = JSON.parse($("#data").textContent);
  const { rate, seconds, stretch, margin } = data;
  const last = Math.ceil(seconds / stretch) - 1;
  const rows = [...document.querySelectorAll(".track")];
  const tracks = rows.map((row, i) => ({
    row, solo: false, mute: i === 0 || i === rows.length - 1, // the stems sound at first: their sum, beside the mix
    at_first: i === 0 || i === rows.length - 1, gain: null,
    buttons: Object.fromEntries([...row.querySelectorAll("button")].map((b) => [b.dataset.act, b])),
  }));

  const bytes = (text) => {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  };
  const clock = (t) => {
    const whole = Math.floor(t + 1e-6), two = (n) => String(n).padStart(2, "0");
    const h = Math.floor(whole / 3600), m = Math.floor(whole / 60) % 60;
    return h ? `${h}:${two(m)}:${two(whole % 60)}` : `${m}:${two(whole % 60)}`;
  };

  // Sound. Every track is cut into the same stretches, decoded when needed and started on one clock, so that tracks
  // cannot drift: solo and mute only move gains. A stretch holds a margin at both ends, where codecs are not exact.
  let context = null, master = null;
  let playing = false, starting = false, wanted = 0; // wanted: a number that changes whenever what was asked for is outdated
  let anchor = { at: 0, from: 0 }, position = 0; // the track's time `from` sounds at the context's time `at`
  let sources = [], scheduled = new Set();
  const decoded = new Map();

  const now = () => {
    if (!playing) return position;
    const heard = context.currentTime - (context.outputLatency || 0) - anchor.at;
    return Math.min(seconds, anchor.from + Math.max(0, heard));
  };

  const decode = async (track, number) => {
    const decoder = context || new OfflineAudioContext(1, 1, rate);
    const buffer = await decoder.decodeAudioData(bytes($(`#a${track}-${number}`).textContent).buffer);
    // Encoder and decoder delay an MP3 by 1105 samples, the same in every track; most browsers take them off again.
    const expected = Math.min(stretch, seconds - number * stretch) + 2 * margin;
    return { buffer, lead: margin + (buffer.duration - expected > 600 / rate ? 1105 / rate : 0) };
  };

  const fetchStretch = (number) => {
    for (const other of decoded.keys()) if (Math.abs(other - number) > 2) decoded.delete(other);
    if (!decoded.has(number)) decoded.set(number, Promise.all(tracks.map((_, track) => decode(track, number))));
    return decoded.get(number);
  };

  const schedule = (number, stretchTracks) => {
    const begin = number * stretch, end = Math.min(begin + stretch, seconds);
    const from = Math.max(begin, anchor.from, anchor.from + context.currentTime + 0.02 - anchor.at);
    if (from >= end) return;
    stretchTracks.forEach(({ buffer, lead }, i) => {
      const source = new AudioBufferSourceNode(context, { buffer });
      source.connect(tracks[i].gain);
      source.start(anchor.at + from - anchor.from, lead + from - begin, end - from);
      sources.push(source);
      source.onended = () => { sources = sources.filter((other) => other !== source); };
    });
  };

  const pump = () => {
    const asked = wanted, here = Math.min(last, Math.floor(now() / stretch));
    for (const number of [here, here + 1]) {
      if (number > last || scheduled.has(number)) continue;
      scheduled.add(number);
      fetchStretch(number).then((stretchTracks) => { if (playing && asked === wanted) schedule(number, stretchTracks); }, fail);
    }
  };

  const open = () => {
    if (navigator.audioSession) navigator.audioSession.type = "playback"; // iOS: also with the ringer switched off
    try { context = new AudioContext({ sampleRate: rate }); } catch { context = new AudioContext(); }
    master = new GainNode(context);
    master.connect(context.destination);
    for (const track of tracks) {
      track.gain = new GainNode(context, { gain: audible(track) ? 1 : 0 });
      track.gain.connect(master);
    }
  };

  const fade = (gain, value) => {
    gain.cancelScheduledValues(context.currentTime);
    gain.setTargetAtTime(value, context.currentTime, 0.005);
  };

  const halt = () => {
    position = now();
    playing = starting = false;
    wanted++;
    if (!context) return;
    fade(master.gain, 0);
    for (const source of sources) source.stop(context.currentTime + 0.03);
    sources = [];
    scheduled = new Set();
  };

  const play = async () => {
    const asked = ++wanted;
    if (position >= seconds - 0.01) position = 0;
    starting = true;
    try {
      if (!context) open();
      const resumed = context.resume();
      say("Decoding…", 300);
      await Promise.all([fetchStretch(Math.min(last, Math.floor(position / stretch))), resumed]);
    } catch (error) { return fail(error); }
    if (asked !== wanted) return;
    say("");
    const grid = (t) => Math.round(t * context.sampleRate) / context.sampleRate;
    anchor = { at: grid(context.currentTime + 0.06), from: grid(position) };
    fade(master.gain, 1);
    playing = true;
    starting = false;
    pump();
    show();
    requestAnimationFrame(tick);
  };

  const pause = () => { halt(); show(); };
  const toggle = () => { if ($("#play").disabled) return; if (playing || starting) pause(); else play(); };
  const seek = (t) => {
    const resume = playing || starting;
    if (resume) halt();
    position = Math.min(seconds, Math.max(0, t));
    show();
    if (resume) play();
  };

  const tick = () => {
    if (!playing) return;
    if (now() >= seconds) { halt(); position = 0; }
    show();
    if (playing) requestAnimationFrame(tick);
  };
  setInterval(() => { if (playing) { pump(); if (document.hidden) tick(); } }, 500);

  // Mixing: what is soloed, or else what is not muted.
  const audible = (track) => (tracks.some((t) => t.solo) ? track.solo : !track.mute);
  const mix = () => {
    for (const track of tracks) {
      for (const act of ["solo", "mute"]) track.buttons[act].setAttribute("aria-pressed", track[act]);
      track.row.classList.toggle("silent", !audible(track));
      if (track.gain) fade(track.gain.gain, audible(track) ? 1 : 0);
    }
    $("#reset").disabled = tracks.every((t) => !t.solo && t.mute === t.at_first);
  };
  for (const track of tracks) {
    track.buttons.solo.addEventListener("click", () => { track.solo = !track.solo; mix(); });
    track.buttons.mute.addEventListener("click", () => { track.mute = !track.mute; track.solo = false; mix(); });
  }
  $("#reset").addEventListener("click", () => {
    for (const track of tracks) Object.assign(track, { solo: false, mute: track.at_first });
    mix();
  });

  // Pictures.
  const colour = (element, name) => {
    const hex = getComputedStyle(element).getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  const drawWave = (track) => {
    const canvas = track.row.querySelector(".wave"), box = canvas.getBoundingClientRect();
    const width = (canvas.width = Math.round(box.width * devicePixelRatio));
    const height = (canvas.height = Math.round(box.height * devicePixelRatio));
    const draw = canvas.getContext("2d"), [r, g, b] = colour(track.row, "--accent"), half = height / 2;
    const tall = (value) => Math.sign(value) * Math.abs(value / 127) ** 0.65; // quiet stems can be seen beside the mix
    const columns = track.envelope.length / 3, line = Math.max(1, Math.round(devicePixelRatio));
    for (let x = 0; x < width; x++) {
      const first = Math.floor((x * columns) / width);
      const end = Math.max(first + 1, Math.floor(((x + 1) * columns) / width));
      let low = 127, high = -127, rms = 0;
      for (let i = first; i < end; i++) {
        low = Math.min(low, track.envelope[i]);
        high = Math.max(high, track.envelope[columns + i]);
        rms = Math.max(rms, track.envelope[2 * columns + i]);
      }
      const bar = (from, to, alpha) => {
        draw.fillStyle = `rgb(${r} ${g} ${b} / ${alpha})`;
        const top = Math.min(half - line / 2, half - tall(to) * half), bottom = Math.max(half + line / 2, half - tall(from) * half);
        draw.fillRect(x, top, 1, bottom - top);
      };
      bar(low, high, 0.5);
      bar(-rms, rms, 1);
    }
  };
  const drawSpectrum = (track) => {
    const canvas = track.row.querySelector(".spectrum"), levels = track.spectrum;
    canvas.height = data.bands;
    canvas.width = levels.length / data.bands;
    const stops = [colour(track.row, "--surface"), colour(track.row, "--accent"), colour(track.row, "--bright")];
    const table = Array.from({ length: 256 }, (_, i) => {
      const at = i / 255 < 0.7 ? i / 255 / 0.7 : 1 + (i / 255 - 0.7) / 0.3, k = Math.min(1, Math.floor(at));
      return stops[k].map((c, j) => c + (stops[k + 1][j] - c) * (at - k));
    });
    const draw = canvas.getContext("2d"), image = draw.createImageData(canvas.width, canvas.height);
    for (let i = 0; i < levels.length; i++) {
      const [r, g, b] = table[levels[i]];
      image.data.set([r, g, b, 255], 4 * i);
    }
    draw.putImageData(image, 0, 0);
  };
  const drawWaves = () => tracks.forEach(drawWave);
  const drawAll = () => { drawWaves(); tracks.forEach(drawSpectrum); };

  const span = (parent, name, text) => {
    const element = parent.appendChild(document.createElement("span"));
    Object.assign(element, { className: name, textContent: text });
    return element;
  };
  const axis = () => {
    const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600];
    const most = Math.max(2, $(".axis").clientWidth / 70), step = steps.find((s) => seconds / s <= most) || 7200;
    $(".axis").replaceChildren();
    for (let t = 0; t < seconds - step * 0.25; t += step) span($(".axis"), "", clock(t)).style.left = `${(t / seconds) * 100}%`;
  };

  // The page.
  let saying = 0;
  const say = (text, delay = 0) => {
    clearTimeout(saying);
    saying = setTimeout(() => { $("#status").textContent = text; }, delay);
  };
  const fail = (error) => {
    halt();
    show();
    say(`This browser could not decode the audio (${error.message || error}).`);
  };
  const show = () => {
    const t = now();
    document.body.classList.toggle("playing", playing);
    $("#play").setAttribute("aria-label", playing ? "Pause" : "Play");
    if ($("#now").textContent !== clock(t)) {
      $("#now").textContent = clock(t);
      $("#seek").setAttribute("aria-valuetext", `${clock(t)} of ${clock(seconds)}`);
    }
    $("#seek").value = t;
    for (const track of tracks) track.cursor.style.left = `${(t / seconds) * 100}%`;
  };
  for (const [i, track] of tracks.entries()) {
    track.envelope = new Int8Array(bytes(data.tracks[i].envelope).buffer);
    track.spectrum = bytes(data.tracks[i].spectrum);
    const view = track.row.querySelector(".view"), spectral = track.row.querySelector(".spectral");
    track.cursor = span(view, "cursor", "");
    const [low, high] = data.frequencies.map(Math.log);
    for (const [hertz, name] of [[100, "100"], [1000, "1k"], [10000, "10k"]]) {
      const at = (high - Math.log(hertz)) / (high - low);
      if (at > 0 && at < 1) span(spectral, "frequency", name).style.top = `${100 * at}%`;
    }
    const to = (event) => {
      const box = view.getBoundingClientRect();
      seek(((event.clientX - box.left) / box.width) * seconds);
    };
    let dragged = false;
    view.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType !== "mouse") return; // a finger may be scrolling: its click decides
      dragged = true;
      view.setPointerCapture(event.pointerId);
      to(event);
    });
    view.addEventListener("pointermove", (event) => { if (dragged) to(event); });
    view.addEventListener("pointerup", () => { dragged = false; });
    view.addEventListener("pointercancel", () => { dragged = false; });
    view.addEventListener("click", (event) => { if (event.pointerType !== "mouse") to(event); });
  }
  $("#play").addEventListener("click", toggle);
  $("#seek").max = seconds;
  $("#seek").addEventListener("input", (event) => seek(Number(event.target.value)));
  document.addEventListener("click", (event) => { // so that a later space plays and does not press the button again
    if (event.detail) event.target.closest("button")?.blur();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = (event.shiftKey ? 0.2 : 1) * (seconds < 60 ? 1 : 5);
    if (event.key === " " && !event.target.closest("button")) toggle();
    else if (event.key === "ArrowRight") seek(now() + step);
    else if (event.key === "ArrowLeft") seek(now() - step);
    else return;
    event.preventDefault();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  new ResizeObserver(() => { drawWaves(); axis(); }).observe($(".tracks"));
  $("#length").textContent = clock(seconds);
  drawAll();
  axis();
  mix();
  show();
  fetchStretch(0).then(() => { $("#play").disabled = false; say(""); }, fail);
})();
