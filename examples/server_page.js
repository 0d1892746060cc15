"use strict";
const RATE = 24000;
const PEAK = 240;        // samples behind one line of the waveform: 10 ms
const TOGETHER = 15;     // ms: pieces that the network delivers closer than this are one chunk
const LEAD = 0.08;       // seconds between an audio chunk's arrival and its sound, where nothing plays yet
const at = id => document.getElementById(id);

let run = null;          // the request that is shown

function show(id, text) { at(id).textContent = text; }

function complain(message) {
  if (at("error").textContent === message) return;  // or it would be read out again
  at("error").textContent = message;
  at("error").hidden = !message;
}

// Buttons that cannot be used keep the focus: a disabled one would lose it to the body.
function able(speak, stop) {
  at("speak").setAttribute("aria-disabled", String(!speak));
  at("stop").setAttribute("aria-disabled", String(!stop));
}

function isAble(id) { return at(id).getAttribute("aria-disabled") !== "true"; }

// ------------------------------------------------------------------ waveform

// The loudest sample in each of at most MOST stretches of equal length, whatever the length of the audio: when they are
// used up, neighbours become one. So a picture of twenty minutes costs what one of twenty seconds does.
class Wave {
  constructor() {
    this.most = 1024;
    this.per = PEAK;     // samples in a stretch
    this.values = [];
    this.chunks = [];    // whose it is
    this.held = 0;       // samples in the last stretch
    this.loudest = 0.25;
  }

  push(sound, chunk) {
    for (let i = 0; i < sound.length;) {
      if (!this.values.length || this.held === this.per) this.open(chunk);
      const last = this.values.length - 1, end = Math.min(sound.length, i + this.per - this.held);
      let value = this.values[last];
      this.held += end - i;
      for (; i < end; i++) value = Math.max(value, Math.abs(sound[i]));
      this.values[last] = value;
      this.loudest = Math.max(this.loudest, value);
    }
  }

  open(chunk) {
    if (this.values.length === this.most) {
      const half = this.most / 2, kept = Array.from({length: half}, (_, i) => 2 * i);
      this.values = kept.map(i => Math.max(this.values[i], this.values[i + 1]));
      this.chunks = kept.map(i => this.chunks[i]);
      this.per *= 2;
    }
    this.values.push(0);
    this.chunks.push(chunk);
    this.held = 0;
  }
}

let tints = null;        // what the browser makes of our colours; asked once for each theme

function colours() {
  if (tints) return tints;
  const probe = document.body.appendChild(document.createElement("span"));
  const colour = name => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
  tints = {line: colour("--line"), ink: colour("--ink"), waves: [colour("--wave-a"), colour("--wave-b")]};
  probe.remove();
  return tints;
}

function draw() {
  const canvas = at("wave"), scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight, middle = height / 2;
  const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const pen = canvas.getContext("2d"), {line, ink, waves} = colours();
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = line;
  pen.fillRect(0, middle - 0.5, width, 1);
  if (!run || !run.wave.values.length) return;
  const {values, chunks, per, loudest} = run.wave;
  const shown = Math.max(values.length, 3 * RATE / per);  // at least three seconds wide
  const step = width / shown;
  values.forEach((value, i) => {
    const tall = Math.max(1, value / loudest * (height - 24));
    pen.fillStyle = waves[chunks[i] % 2];
    pen.fillRect(i * step, middle - tall / 2, step + 0.5, tall);
  });
  const played = run.played();
  if (played !== null) {
    pen.fillStyle = ink;
    pen.fillRect(Math.min(width - 2, played * RATE / per * step), 4, 2, height - 8);
  }
}

// At most one picture for each that the screen shows, however many chunks come.
let asked = false;

function drawSoon() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    if (run && run.listed < run.chunks) {
      run.listed = run.chunks;
      at("list").scrollTop = at("list").scrollHeight;
    }
    draw();
    if (run && run.sounding()) drawSoon();
  });
}

new ResizeObserver(drawSoon).observe(at("wave"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { tints = null; drawSoon(); });

// ------------------------------------------------------------------ a request

class Run {
  constructor() {
    this.begin = performance.now();
    this.abort = new AbortController();
    this.wave = new Wave();
    this.samples = 0;
    this.chunks = 0;
    this.listed = 0;     // of them in the list, which shows its end
    this.gaps = 0;
    this.context = null;
    this.sources = [];   // [when, seconds into the text, how long] of what is to be heard
    this.sounds = 0;     // which of them is heard now
    if (at("sound").checked) {
      try {
        this.context = new AudioContext({sampleRate: RATE});
        this.context.onstatechange = drawSoon;
      } catch { this.context = null; }  // no sound here: all else works
    }
  }

  played() {
    if (!this.context || !this.sources.length) return null;
    const now = this.context.currentTime, begun = i => i < this.sources.length && this.sources[i][0] <= now;
    while (begun(this.sounds + 1)) this.sounds += 1;
    const [when, from, long] = this.sources[this.sounds];
    return begun(this.sounds) ? from + Math.min(now - when, long) : 0;
  }

  sounding() {
    const last = this.sources[this.sources.length - 1];
    return Boolean(this.context && this.context.state === "running" && last && this.context.currentTime < last[0] + last[2]);
  }

  play(sound) {
    const last = this.sources[this.sources.length - 1], now = this.context.currentTime;
    let when = last ? last[0] + last[2] : now + LEAD;
    if (when < now) {
      this.gaps += 1;
      when = now + LEAD;
    }
    const buffer = this.context.createBuffer(1, sound.length, RATE);
    buffer.copyToChannel(sound, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    source.start(when);
    this.sources.push([when, this.samples / RATE, sound.length / RATE]);
  }

  chunk(bytes, arrived) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const sound = new Float32Array(bytes.byteLength >> 1);
    for (let i = 0; i < sound.length; i++) sound[i] = view.getInt16(2 * i, true) / 32768;
    if (!sound.length) return;
    this.wave.push(sound, this.chunks);
    this.chunks += 1;
    if (this.context) this.play(sound);
    this.samples += sound.length;

    const since = arrived - this.begin, seconds = this.samples / RATE;
    if (this.chunks === 1) show("ttfa", `${since.toFixed(0)} ms`);
    show("length", `${seconds.toFixed(2)} s`);
    show("rtf", (since / 1000 / seconds).toFixed(2));
    show("gaps", this.context ? this.gaps : "–");
    const row = at("chunks").insertRow();
    for (const cell of [this.chunks, (sound.length / RATE).toFixed(2), since.toFixed(0)]) row.insertCell().textContent = cell;
    at("empty").hidden = true;
    at("list").hidden = false;
    drawSoon();
  }

  async stream(body) {
    const reader = body.getReader();
    let held = [], arrived = 0, rest = new Uint8Array(0);
    const flush = () => {
      const bytes = new Uint8Array([rest, ...held].reduce((sum, piece) => sum + piece.length, 0));
      let to = 0;
      for (const piece of [rest, ...held]) { bytes.set(piece, to); to += piece.length; }
      const whole = bytes.length & ~1;  // the network may cut a sample in two
      rest = bytes.slice(whole);
      held = [];
      this.chunk(bytes.subarray(0, whole), arrived);
    };
    let next = reader.read();
    for (;;) {
      const pause = new Promise(resolve => setTimeout(resolve, TOGETHER));
      const got = held.length ? await Promise.race([next, pause]) : await next;
      if (got === undefined) { flush(); continue; }
      if (got.done) break;
      if (!held.length) arrived = performance.now();
      held.push(got.value);
      next = reader.read();
    }
    if (held.length) flush();
  }

  end() {
    this.abort.abort();
    if (this.context) this.context.close().catch(() => {});
  }
}

async function refusal(response) {
  let said = response.statusText;
  try { said = (await response.json()).error.message; } catch { /* not ours: the status has to do */ }
  const wait = response.headers.get("Retry-After");
  return `${response.status}: ${said}${wait ? ` – try again in ${wait} s` : ""}`;
}

// What is wrong with what is asked for; empty if nothing is.
function wrong() {
  const count = [...at("text").value].length, longest = Number(at("text").dataset.longest);
  at("room").textContent = `${count.toLocaleString("en")} of ${longest.toLocaleString("en")} characters`;
  at("room").classList.toggle("over", count > longest);
  if (count <= longest) return "";
  return `The text is longer than ${longest.toLocaleString("en")} characters. Speak it in parts.`;
}

// A seed goes out digit by digit: a number of JavaScript's is exact up to 2^53 only.
function question() {
  const said = {model: "chatterbox", input: at("text").value, voice: at("voice").value, response_format: "pcm"};
  if (at("language").value) said.language = at("language").value;
  const digits = at("seed").value.trim();
  return JSON.stringify(said).slice(0, -1) + (digits ? `,"seed":${BigInt(digits)}}` : "}");
}

async function speak() {
  const reason = wrong();
  complain(reason);
  if (reason) return;
  const body = question();
  if (run) run.end();
  const mine = run = new Run();
  for (const id of ["ttfa", "length", "rtf", "used-seed", "gaps"]) show(id, "–");
  at("chunks").replaceChildren();
  at("list").hidden = true;
  at("empty").hidden = false;
  able(false, true);
  show("status", "waiting");
  draw();
  let outcome = "done";
  try {
    const response = await fetch("/v1/audio/speech", {
      method: "POST", headers: {"Content-Type": "application/json"}, body, signal: mine.abort.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    show("status", "speaking");
    show("used-seed", response.headers.get("X-Seed"));
    await mine.stream(response.body);
  } catch (error) {
    outcome = error.name === "AbortError" ? "stopped" : "failed";
    if (outcome === "failed" && run === mine) {
      complain(error instanceof TypeError ? `The server does not answer, or broke off (${error.message}).` : error.message);
    }
  }
  if (run !== mine) return;
  show("status", outcome);
  able(true, mine.sounding());
  if (!mine.sounding()) return;
  const last = mine.sources[mine.sources.length - 1];
  setTimeout(() => { if (run === mine) able(true, false); }, 1000 * (last[0] + last[2] - mine.context.currentTime));
}

at("form").addEventListener("submit", event => {
  event.preventDefault();
  if (isAble("speak")) speak();
});
at("stop").addEventListener("click", () => {
  if (!run || !isAble("stop")) return;
  run.end();
  run.sources = [];
  able(true, false);
  draw();
});
at("text").addEventListener("input", () => complain(wrong()));

async function start() {
  try {
    const [voices, about] = await Promise.all(["/v1/voices", "/health"].map(path => fetch(path).then(answer => answer.json())));
    show("model", about.model);
    show("note", about.note);
    at("note").hidden = !about.note;
    at("voice").replaceChildren(...voices.data.map(voice => new Option(voice.id)));
    at("language").replaceChildren(...about.languages.map(language => new Option(language, language, language === "en", language === "en")));
    at("language-label").hidden = !about.languages.length;
  } catch (error) {
    complain(`The server does not answer (${error.message}). Reload when it runs.`);
  }
}
draw();
wrong();
start();
