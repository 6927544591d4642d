// The page: what the viewer does goes out, what the server says comes in.

import { Camera, cameraAllowed } from "./camera.js";
import { Inspector } from "./inspector.js";
import { Player } from "./player.js";
import { Wire, bestCodec } from "./wire.js";

const EXAMPLES = {
  shapes: [
    "a red circle moving left on a white background",
    "a blue square bouncing on a black background",
    "a yellow triangle circling on a purple background",
    "a green disc rising on a white background",
    "an orange box drifting right on a blue background",
  ],
};
const BACK = 2; // chunks
const by = (id) => document.getElementById(id);

let wire = null;
let player = null;
let inspector = null;
let welcome = null;
let stream = 0; // the one that is shown
let onscreen = 0; // the chunk that is shown
let playing = "stopped";
let recording = false;
let hidden = false; // paused because nobody could see it
let farewell = null;
let source = "none"; // what the streams go by: "none", "camera" or "clip"
let camera = null;
let clip = null; // { file, sent }
let watching = false; // whether the steps can be seen
let restoring = false;
const news = new Map(); // of chunks that are not on the screen yet
const rate = { bytes: 0, at: performance.now() };

async function connect() {
  wire?.close();
  farewell = null;
  link("on", "connecting");
  const codec = await bestCodec();
  const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
  const mine = new Wire({
    token,
    codec,
    heard: (message) => mine === wire && hear[message.kind]?.(message, codec),
    frame: (frame) => mine === wire && frame.stream === stream % 256 && arrived(frame),
    gone: () => mine === wire && gone(),
  });
  wire = mine;
}

const hear = {
  welcome(message, codec) {
    welcome = message;
    const { model, bounds } = message;
    by("model").textContent = `${model.name} · ${model.width}×${model.height} · ${model.fps} fps · ${model.backend} on ${model.device}`;
    by("screen").style.setProperty("--shape", model.width / model.height);
    by("screen").classList.toggle("small", model.width < 200);
    by("record").disabled = bounds.record_s === 0;
    by("prompt").maxLength = bounds.prompt_characters;
    by("examples").replaceChildren(...(EXAMPLES[model.name] ?? []).map(example));
    player?.stop();
    player = new Player(by("canvas"), { ...model, shown, lost: () => wire.say("keyframe") });
    inspector = new Inspector(model);
    link("live", codec === "h264" ? "H.264" : "JPEG");
    by("keep").hidden = bounds.snapshots === 0;
    if (clip) clip.sent = false;
    if (watching) wire.say("watch", { on: true });
    start();
  },
  started(message) {
    stream = message.stream;
    inspector.strength = source === "none" ? null : strength();
    if (restoring) Object.assign(by("prompt"), { value: message.prompt }), (by("seed").value = message.seed);
    restoring = false;
    news.clear();
    player.clear();
    inspector.forget();
    by("receipts").replaceChildren();
    say("");
    now("playing");
  },
  wanted: (message) => camera?.wanted(message),
  kept: (message) => by("kept").prepend(moment(message)),
  queued: () => say("queued …"),
  chunk(message) {
    news.set(message.index, message);
  },
  state({ playing }) {
    now(playing);
    if (playing === "stopped" && source === "clip" && by("notice").hidden) notice("The clip has ended.", "Play it again", start);
  },
  rewound({ chunk }) {
    news.clear();
    player.clear();
    toast(`back to chunk ${chunk}`);
  },
  recording({ on, path, reason }) {
    recording = on;
    by("record").setAttribute("aria-pressed", on);
    by("tape").hidden = !on;
    if (path) receipt("recorded", reason ?? "", link_to(path));
    else if (reason) receipt("not recorded", reason);
  },
  error: ({ about, message }) => {
    restoring = false;
    say(about === "prompt" || about === "message" ? message : "");
    if (about === "stream") notice(message);
    else toast(message);
  },
  bye(message) {
    farewell = message;
  },
};

function gone() {
  player?.clear();
  now("stopped");
  link("off", "offline");
  if (farewell?.why === "token") return by("ask").showModal();
  notice(farewell?.message ?? "The server cannot be reached.", "Connect again", connect);
}

// What the viewer does

function arrived(frame) {
  if (frame.codec === "preview") inspector?.preview(frame);
  else player?.push(frame);
}

function seed() {
  return Number.parseInt(by("seed").value, 10) || 0;
}

function strength() {
  return Number(by("strength").value);
}

async function start(picture = null) {
  notice(null);
  const mine = wire;
  if (picture) await mine.picture(picture);
  if (source === "clip" && !clip.sent) {
    const { file } = clip;
    await mine.clip(file, (part) => say(`sending the clip … ${Math.round(100 * part)} %`));
    if (clip?.file !== file) return; // another one was chosen meanwhile
    clip.sent = true;
    say("");
  }
  const by_source = source === "none" ? {} : { source, strength: strength() };
  mine.say("start", { prompt: by("prompt").value, seed: seed(), picture: picture !== null, ...by_source });
}

/** Let the streams go by nothing, the camera or a clip from now on. */
function go_by(what) {
  if (what !== "camera") camera?.close(), (camera = null);
  if (what !== "clip") clip = null;
  source = what;
  by("words").setAttribute("aria-pressed", what === "none");
  by("camera").setAttribute("aria-pressed", what === "camera");
  by("clip-label").dataset.on = what === "clip";
  by("strength-label").hidden = what === "none";
  by("self").hidden = what !== "camera";
  by("back").disabled = by("keep").disabled = what !== "none"; // a source's frames cannot be had again
}

async function film() {
  const { model } = welcome;
  const send = (...shot) => wire.camera(...shot);
  const opened = new Camera(by("self"), { ...model, send, unsent: () => wire.unsent });
  try {
    await opened.open();
  } catch (error) {
    opened.close();
    return toast(`The camera cannot be used (${error.name}); choose a clip instead.`);
  }
  camera?.close();
  camera = opened;
  go_by("camera");
  start();
}

/** A file of the viewer's: a picture to begin from, or a clip to go by. */
function take(file) {
  if (!file) return;
  const is_clip = file.type.startsWith("video/");
  if (file.size > (is_clip ? welcome.bounds.clip_bytes : welcome.bounds.picture_bytes))
    return toast(`That ${is_clip ? "clip" : "picture"} is too large.`);
  clip = is_clip ? { file, sent: false } : null;
  go_by(is_clip ? "clip" : "none");
  start(is_clip ? null : file);
}

/** A button that goes back to a moment that was kept. */
function moment({ name, prompt, chunk, seconds }) {
  const button = Object.assign(document.createElement("button"), { type: "button", title: `Kept for ${Math.round(seconds / 60)} minutes` });
  button.append(Object.assign(document.createElement("b"), { textContent: `chunk ${chunk}` }), prompt);
  button.addEventListener("click", () => {
    go_by("none");
    restoring = true;
    wire.say("restore", { name });
  });
  return button;
}

function submit() {
  const prompt = by("prompt").value.trim();
  if (!prompt) return by("prompt").focus();
  if (playing === "stopped") return start();
  const how = by("how").value;
  wire.say("prompt", { prompt, how, over: how === "blend" ? 4 : 1 });
  say("sent …");
}

function toggle() {
  if (playing === "stopped") return wire?.socket.readyState === WebSocket.OPEN ? start() : connect();
  wire.say(playing === "playing" ? "pause" : "resume");
  if (playing === "playing") player.paused = true; // at once, not a round trip later
}

function back() {
  if (playing === "stopped" || by("back").disabled) return;
  wire.say("rewind", { chunk: Math.max(0, onscreen - BACK) });
  if (playing === "paused") wire.say("resume");
}

function dice() {
  by("seed").value = crypto.getRandomValues(new Uint16Array(1))[0];
  start();
}

const acts = {
  play: toggle,
  back,
  dice,
  again: () => start(),
  keep: () => playing !== "stopped" && !by("keep").disabled && wire.say("keep"),
  words: () => (go_by("none"), start()),
  camera: () => (source === "camera" ? (go_by("none"), start()) : film()),
  record: () => playing !== "stopped" && wire.say("record", { on: !recording }),
  theme() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  },
};

for (const [id, act] of Object.entries(acts)) by(id).addEventListener("click", act);
by("form").addEventListener("submit", (event) => (event.preventDefault(), submit()));
by("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) (event.preventDefault(), submit());
  if (event.key === "Escape") event.target.blur();
});
by("seed").addEventListener("change", () => start());
for (const id of ["picture", "clip", "film"])
  by(id).addEventListener("change", ({ target }) => {
    const [file] = target.files;
    target.value = "";
    take(file);
  });
by("strength").addEventListener("input", () => (by("strength-shown").value = strength().toFixed(2)));
by("strength").addEventListener("change", () => start());
by("ask").addEventListener("close", () => {
  location.hash = `token=${encodeURIComponent(by("token").value)}`;
  connect();
});

const keys = { " ": "play", ArrowLeft: "back", r: "record", k: "keep", n: "dice", d: "theme" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  if (event.key === "/") return event.preventDefault(), by("prompt").select();
  if (event.key === " " && event.target.closest("button")) return; // it presses that button
  const act = keys[event.key];
  if (act) (event.preventDefault(), acts[act]());
});

document.addEventListener("visibilitychange", () => {
  if (document.hidden && playing === "playing" && !recording) (hidden = true), wire.say("pause");
  else if (!document.hidden && hidden) (hidden = false), wire.say("resume");
});

// What is to be seen

function shown({ chunk, number }) {
  const message = news.get(chunk);
  onscreen = chunk;
  by("corner").textContent = `${chunk} · ${number}`;
  if (!message) return;
  for (const told of news.keys()) if (told <= chunk) news.delete(told);
  inspector.show(message);
  if (message.receipt) {
    const { prompt, how, over, ms } = message.receipt;
    receipt(`chunk ${chunk}`, `${how}${over > 1 ? ` over ${over}` : ""} · ${ms.toFixed(0)} ms`, prompt);
    say("");
  }
}

function now(state) {
  playing = state;
  document.body.dataset.playing = state;
  by("play").setAttribute("aria-label", state === "playing" ? "Pause" : "Play");
  if (player) player.paused = state === "paused";
  if (camera) camera.paused = state === "paused";
}

function receipt(title, detail, body = "") {
  const item = document.createElement("li");
  item.append(Object.assign(document.createElement("b"), { textContent: title }));
  item.append(Object.assign(document.createElement("span"), { textContent: detail }), body);
  by("receipts").prepend(item);
  while (by("receipts").children.length > 6) by("receipts").lastChild.remove();
}

function link_to(path) {
  return Object.assign(document.createElement("a"), { href: path, textContent: "save the mp4", download: "" });
}

function example(text) {
  const chip = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  chip.addEventListener("click", () => {
    by("prompt").value = text;
    submit();
  });
  return chip;
}

function say(text) {
  by("sent").textContent = text;
}

let toasting = 0;
function toast(text) {
  notice(text);
  clearTimeout(toasting);
  toasting = setTimeout(() => notice(null), 3500);
}

function notice(text, label = null, act = null) {
  clearTimeout(toasting);
  by("notice").hidden = text === null;
  by("notice").replaceChildren(text ?? "");
  if (!label) return;
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: label });
  button.addEventListener("click", () => (notice(null), act()));
  by("notice").append(button);
}

function link(state, text) {
  by("link").dataset.state = state;
  by("link").lastElementChild.textContent = text;
}

new IntersectionObserver(([seen]) => {
  watching = seen.isIntersecting;
  wire?.say("watch", { on: watching });
}).observe(by("steps-panel"));

setInterval(() => {
  if (!wire || !player) return;
  const now = performance.now();
  const kilobytes = (wire.bytes - rate.bytes) / (now - rate.at);
  Object.assign(rate, { bytes: wire.bytes, at: now });
  by("rate").textContent = `${Math.max(0, kilobytes).toFixed(kilobytes < 10 ? 1 : 0)} kB/s`;
  by("buffered").textContent = `${player.buffered.toFixed(1)} s`;
}, 1000);

by("camera").hidden = !cameraAllowed();
by("film-label").hidden = cameraAllowed();
const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
connect();
