"use strict";
(() => {
  const $ = (selector) => document.querySelector(selector);
  const data = JSON.parse($("#data").textContent);
  const { rate, seconds, stretch, margin } = data;
  const last = Math.ceil(seconds / stretch) - 1;
  const LOWEST = -48, AHEAD = 12, SHORTEST = 0.1; // dB; seconds that are planned; seconds of a loop
  const rows = [...document.querySelectorAll(".track")];
  const tracks = rows.map((row, i) => ({
    row, solo: false, mute: i === 0 || i === rows.length - 1, // the stems sound at first: their sum, beside the mix
    at_first: i === 0 || i === rows.length - 1, gain: null, volume: 0, // in dB; LOWEST is silence
    buttons: Object.fromEntries([...row.querySelectorAll("button")].map((b) => [b.dataset.act, b])),
    fader: row.querySelector(".fader input"), shown: row.querySelector(".fader output"),
  }));

  const [whole, ...parts] = tracks; // the mix, which sounds as all others together; the stems and the residual

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
  const precise = (t) => `${clock(t)}.${Math.floor((t % 1) * 10 + 1e-6) % 10}`;

  // Sound. Every track is cut into the same stretches, decoded when needed and started on one clock, so that tracks
  // cannot drift: solo, mute and volume only move gains. A stretch holds a margin at both ends, where codecs are not
  // exact. What sounds when is planned in pieces: the track from `from` to `end` sounds from the context's time `at`.
  let context = null, master = null;
  let playing = false, starting = false, wanted = 0; // wanted: a number that changes whenever what was asked for is outdated
  let position = 0, pieces = [], next = null; // next: { at, from } of the piece after the last, null at the track's end
  let sources = [], loop = { a: null, b: null };
  const decoded = new Map();
  const looping = () => loop.a !== null && loop.b !== null;

  const now = () => {
    if (!playing) return position;
    const heard = context.currentTime - (context.outputLatency || 0);
    const piece = pieces.findLast((p) => p.at <= heard) || pieces[0];
    return Math.min(piece.end, piece.from + Math.max(0, heard - piece.at));
  };

  // Opus knows 48 kHz only: the samples of any rate were stored as if they had that one, and get their own back here.
  const decode = async (track, number) => {
    const stored = await new OfflineAudioContext(1, 1, 48000).decodeAudioData(bytes($(`#a${track}-${number}`).textContent).buffer);
    const buffer = new AudioBuffer({ length: stored.length, numberOfChannels: stored.numberOfChannels, sampleRate: rate });
    for (let c = 0; c < stored.numberOfChannels; c++) buffer.copyToChannel(stored.getChannelData(c), c);
    return buffer;
  };

  const fetchStretch = (number) => {
    const found = decoded.get(number) || Promise.all(parts.map((_, i) => decode(i + 1, number)));
    decoded.delete(number);
    decoded.set(number, found); // the last used ones are kept, and those that are planned
    for (const other of decoded.keys()) {
      if (decoded.size > 4 && pieces.every((p) => p.number !== other)) decoded.delete(other);
    }
    return found;
  };

  // The piece that begins at a time of the track; `then` is where the next one begins, null at the track's end.
  const cut = (from) => {
    const number = Math.min(last, Math.floor(from / stretch + 1e-9)), turn = looping() && from < loop.b ? loop.b : Infinity;
    const end = Math.min((number + 1) * stretch, seconds, turn);
    return { from, end, number, then: end === turn ? loop.a : end < seconds ? end : null };
  };

  const fetchFirst = (from) => { // what sounds in the first second
    const found = [];
    for (let t = 0; from !== null && t < 1;) {
      const piece = cut(from);
      if (!found.includes(piece.number)) found.push(piece.number);
      t += piece.end - from;
      from = piece.then;
    }
    return Promise.all(found.map(fetchStretch));
  };

  const schedule = ({ at, from, end, number }, buffers) => {
    const late = Math.max(0, context.currentTime + 0.02 - at);
    if (from + late >= end) return;
    buffers.forEach((buffer, i) => {
      const source = new AudioBufferSourceNode(context, { buffer });
      source.connect(parts[i].gain);
      source.start(at + late, margin + from + late - number * stretch, end - from - late);
      sources.push(source);
      source.onended = () => { sources = sources.filter((other) => other !== source); };
    });
  };

  const pump = () => {
    const asked = wanted;
    pieces = pieces.filter((p, i) => i === pieces.length - 1 || p.at + p.end - p.from > context.currentTime - 1);
    while (next && next.at < context.currentTime + AHEAD && pieces.length < 32) { // 32: of a short loop
      const piece = { ...cut(next.from), at: next.at };
      pieces.push(piece);
      next = piece.then === null ? null : { at: piece.at + piece.end - piece.from, from: piece.then };
      fetchStretch(piece.number).then((buffers) => { if (playing && asked === wanted) schedule(piece, buffers); }, fail);
    }
  };

  const open = () => {
    if (navigator.audioSession) navigator.audioSession.type = "playback"; // iOS: also with the ringer switched off
    try { context = new AudioContext({ sampleRate: rate }); } catch { context = new AudioContext(); }
    master = new GainNode(context);
    master.connect(context.destination);
    for (const track of parts) {
      track.gain = new GainNode(context, { gain: factor(track) + factor(whole) });
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
    pieces = [];
    next = null;
  };

  const play = async () => {
    const asked = ++wanted;
    if (position >= seconds - 0.01) position = 0;
    starting = true;
    try {
      if (!context) open();
      const resumed = context.resume();
      say("Decoding…", 300);
      await Promise.all([fetchFirst(position), resumed]);
    } catch (error) { return fail(error); }
    if (asked !== wanted) return;
    say("");
    const grid = (t) => Math.round(t * context.sampleRate) / context.sampleRate;
    next = { at: grid(context.currentTime + 0.06), from: grid(position) };
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
    if (!next && now() >= seconds) { halt(); position = 0; }
    show();
    if (playing) requestAnimationFrame(tick);
  };
  setInterval(() => { if (playing) { pump(); if (document.hidden) tick(); } }, 500);

  // A loop from A to B, once both are set. It changes what is planned, so playing begins anew where it is, or at A.
  const setLoop = (a, b) => {
    const before = looping(), grid = (t) => t === null ? null : Math.round(t * rate) / rate;
    loop = { a: grid(a), b: grid(b) };
    showLoop();
    if ((playing || starting) && (before || looping())) seek(looping() && now() >= loop.b - SHORTEST / 2 ? loop.a : now());
  };
  const setA = () => { const t = now(); setLoop(t, loop.b - t < SHORTEST ? null : loop.b); };
  const setB = () => { const t = now(); setLoop(loop.a === null || t - loop.a < SHORTEST ? null : loop.a, t); };
  const clearLoop = () => setLoop(null, null);

  // Mixing: what is soloed, or else what is not muted, each with its volume.
  const audible = (track) => (tracks.some((t) => t.solo) ? track.solo : !track.mute);
  const factor = (track) => (audible(track) && track.volume > LOWEST ? 10 ** (track.volume / 20) : 0);
  const mix = () => {
    for (const track of tracks) {
      for (const act of ["solo", "mute"]) track.buttons[act].setAttribute("aria-pressed", track[act]);
      track.row.classList.toggle("silent", !factor(track));
      const text = track.volume > LOWEST ? `${track.volume > 0 ? "+" : ""}${track.volume} dB`.replace("-", "−") : "off";
      track.fader.value = track.volume;
      track.fader.setAttribute("aria-valuetext", text);
      track.shown.textContent = text;
      if (track.gain) fade(track.gain.gain, factor(track) + factor(whole));
    }
    $("#reset").disabled = tracks.every((t) => !t.solo && t.mute === t.at_first && !t.volume);
  };
  let aside = null; // what M or Shift+M replaced: { name, states }
  const change = (track, state) => { aside = null; Object.assign(track, state); mix(); };
  const solo = (track) => change(track, { solo: !track.solo });
  const mute = (track) => change(track, { mute: !track.mute, solo: false });
  const turn = (track, volume) => { track.volume = volume; mix(); };
  const replace = (name, state) => { // for all tracks at once; the same again brings back what was
    const again = aside?.name === name, states = aside?.states || tracks.map(({ solo, mute }) => ({ solo, mute }));
    tracks.forEach((track, i) => Object.assign(track, states[i], again ? {} : state(i)));
    aside = again ? null : { name, states };
    mix();
  };
  for (const track of tracks) {
    track.buttons.solo.addEventListener("click", () => solo(track));
    track.buttons.mute.addEventListener("click", () => mute(track));
    track.fader.addEventListener("input", () => turn(track, Number(track.fader.value)));
    track.fader.addEventListener("dblclick", () => turn(track, 0));
  }
  $("#reset").addEventListener("click", () => {
    for (const track of tracks) change(track, { solo: false, mute: track.at_first, volume: 0 });
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
  const showLoop = () => {
    const { a, b } = loop, from = a ?? b ?? 0, to = b ?? a ?? 0;
    $("#loop-a").setAttribute("aria-pressed", a !== null);
    $("#loop-b").setAttribute("aria-pressed", b !== null);
    $("#loop-clear").disabled = a === null && b === null;
    const words = [a === null ? "" : `from ${precise(a)}`, b === null ? "" : `to ${precise(b)}`];
    $("#range").textContent = words.filter(Boolean).join(" ");
    for (const { looped } of tracks) {
      looped.classList.toggle("a", a !== null);
      looped.classList.toggle("b", b !== null);
      Object.assign(looped.style, { left: `${(from / seconds) * 100}%`, width: `${((to - from) / seconds) * 100}%` });
    }
  };
  for (const [i, track] of tracks.entries()) {
    track.envelope = new Int8Array(bytes(data.tracks[i].envelope).buffer);
    track.spectrum = bytes(data.tracks[i].spectrum);
    const view = track.row.querySelector(".view"), spectral = track.row.querySelector(".spectral");
    track.looped = span(view, "looped", "");
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
  $("#loop-a").addEventListener("click", setA);
  $("#loop-b").addEventListener("click", setB);
  $("#loop-clear").addEventListener("click", clearLoop);
  document.addEventListener("click", (event) => { // so that later keys play and move, and not what was clicked before
    if (event.detail) event.target.closest("button, input")?.blur();
  });
  const press = (event) => { // true if the key means something
    const step = (event.shiftKey ? 0.2 : 1) * (seconds < 60 ? 1 : 5), inFader = event.target.closest(".fader");
    const digit = /^(?:Digit|Numpad)([1-6])$/.exec(event.code)?.[1], letter = event.key.toLowerCase();
    const once = (act) => { if (!event.repeat) act(); return true; };
    if (event.key === " ") return !event.target.closest("button") && once(toggle);
    if (event.key === "ArrowRight") return !inFader && (seek(now() + step), true);
    if (event.key === "ArrowLeft") return !inFader && (seek(now() - step), true);
    if (digit) return digit <= tracks.length - 2 && once(() => (event.shiftKey ? mute : solo)(tracks[digit]));
    if (letter === "m" && event.shiftKey) return once(() => replace("nothing", () => ({ solo: false, mute: true })));
    if (letter === "m") return once(() => replace("mix", (i) => ({ solo: i === 0 })));
    const act = { a: setA, b: setB, c: clearLoop }[letter];
    return Boolean(act) && once(act);
  };
  document.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey && press(event)) event.preventDefault();
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
