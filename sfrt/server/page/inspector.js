// What the runtime is doing, drawn from its own numbers: one `chunk` message after the other.

const SVG = "http://www.w3.org/2000/svg";
const PARTS = ["refresh", "switch", "encode", "denoise", "decode"];
const KEPT = 40; // chunks in the latency chart

function draw(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

/** A stroke along a circle; turns are counted from the top, clockwise. */
function arc(radius, from, to) {
  const point = (turn) => {
    const angle = (turn - 0.25) * 2 * Math.PI;
    return `${(radius * Math.cos(angle)).toFixed(2)} ${(radius * Math.sin(angle)).toFixed(2)}`;
  };
  return `M${point(from)}A${radius} ${radius} 0 ${to - from > 0.5 ? 1 : 0} 1 ${point(to)}`;
}

const bytes = (count) => (count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(2)} GiB` : `${Math.round(count / 2 ** 20)} MiB`);
const by = (id) => document.getElementById(id);

export class Inspector {
  constructor(model) {
    this.model = model;
    this.past = [];
    this.previews = new Map(); // JPEGs by chunk
    this.strength = null; // of video to video
    by("parts").replaceChildren(
      ...PARTS.map((part) => Object.assign(document.createElement("li"), { className: part, textContent: part })),
    );
    by("ring-note").textContent = `window ${model.window} · sink ${model.sink}`;
    this.#ring(Array.from({ length: model.window }, (_, i) => ({ frame: null, sink: i < model.sink, written: false })));
    this.#steps(model.sigmas, null);
    this.#latency();
  }

  /** A chunk whose first frame is on the screen. */
  show(news) {
    this.past = [...this.past, news].slice(-KEPT);
    this.#ring(news.slots, news.index);
    this.#steps(this.#levels(news.index === 0 ? this.model.first_sigmas : this.model.sigmas), news.times.denoise);
    this.#show_previews(news.index);
    this.#latency();
    by("attained").textContent = `${(100 * news.attained).toFixed(news.attained < 1 ? 1 : 0)} %`;
    by("headroom").textContent = `${(news.deadline_ms / news.chunk_ms).toFixed(1)} ×`;
    by("queue").textContent = `${news.waiting} / ${news.room}`;
    by("memory").textContent = [news.device_bytes, news.process_bytes].filter((n) => n !== null).map(bytes).join(" · ") || "–";
  }

  forget() {
    this.past = [];
    this.previews.clear();
    by("previews").replaceChildren();
  }

  /** What a step made, of a chunk that is not on the screen yet. */
  preview({ chunk, number, data }) {
    const steps = this.previews.get(chunk) ?? [];
    steps[number] = data;
    this.previews.set(chunk, steps);
  }

  async #show_previews(index) {
    const steps = this.previews.get(index) ?? [];
    for (const chunk of this.previews.keys()) if (chunk <= index) this.previews.delete(chunk);
    const images = await Promise.all(steps.map((data) => createImageBitmap(new Blob([data], { type: "image/jpeg" }))));
    by("previews").replaceChildren(
      ...images.map((image, step) => {
        const { width, height } = image;
        const canvas = Object.assign(document.createElement("canvas"), { width, height, title: `after step ${step + 1}` });
        canvas.getContext("2d").drawImage(image, 0, 0);
        image.close();
        return canvas;
      }),
    );
  }

  #ring(slots, index) {
    const svg = by("ring");
    svg.replaceChildren();
    const gap = Math.min(0.012, 0.2 / slots.length);
    slots.forEach(({ frame, sink, written }, slot) => {
      const [from, to] = [slot / slots.length + gap / 2, (slot + 1) / slots.length - gap / 2];
      const state = frame === null ? "empty" : written ? "written" : "seen";
      draw(svg, "path", { d: arc(84, from, to), class: `slot ${state}` });
      if (sink) draw(svg, "path", { d: arc(100, from, to), class: "sink" });
      if (slots.length <= 30) {
        const angle = ((from + to) / 2 - 0.25) * 2 * Math.PI;
        const at = { x: (84 * Math.cos(angle)).toFixed(1), y: (84 * Math.sin(angle)).toFixed(1) };
        draw(svg, "text", { ...at, class: `number ${state}` }, frame ?? "");
      }
    });
    const seen = slots.filter(({ frame }) => frame !== null);
    draw(svg, "text", { y: -8, class: "big" }, index ?? "–");
    draw(svg, "text", { y: 16, class: "small" }, "chunk");
    draw(svg, "text", { y: 34, class: "small faint" }, `${seen.length} of ${slots.length} in view`);
    const writing = slots.flatMap(({ written }, slot) => (written ? [slot] : []));
    svg.setAttribute("aria-label", `Ring: ${seen.length} of ${slots.length} slots hold frames; written: slots ${writing.join(", ")}`);
  }

  /** A source starts at its strength, and the steps above that are not run. */
  #levels(sigmas) {
    return this.strength === null ? sigmas : [this.strength, ...sigmas.filter((sigma) => sigma < this.strength - 1e-6)];
  }

  #steps(sigmas, ms) {
    const svg = by("steps");
    svg.replaceChildren();
    const width = 320 / sigmas.length;
    sigmas.forEach((sigma, step) => {
      const height = Math.max(2, 80 * sigma);
      const next = sigmas[step + 1] ?? 0;
      draw(svg, "rect", { x: step * width + 1.5, y: 82 - height, width: width - 3, height, class: "noise" });
      draw(svg, "rect", { x: step * width + 1.5, y: 82 - height, width: width - 3, height: Math.max(1.5, 80 * (sigma - next)), class: "removed" });
    });
    by("sigmas").replaceChildren(
      ...sigmas.map((sigma) => Object.assign(document.createElement("li"), { textContent: `σ ${sigma.toFixed(2)}` })),
    );
    const each = ms === null ? "" : ` · ${(ms / sigmas.length).toFixed(1)} ms each`;
    by("steps-note").textContent = `${sigmas.length} passes${each}`;
  }

  #latency() {
    const svg = by("latency");
    svg.replaceChildren();
    const last = this.past.at(-1);
    const deadline = last?.deadline_ms ?? (1000 * this.model.chunk_frames) / this.model.fps;
    const highest = Math.max(...this.past.map((news) => news.chunk_ms), 1);
    // The deadline is drawn to scale while the bars can be seen beside it, else it is said to be far above.
    const far = highest < deadline / 3;
    const top = far ? highest * 1.35 : Math.max(highest, deadline) * 1.12;
    const width = 320 / KEPT;
    this.past.forEach((news, place) => {
      let y = 94;
      for (const part of PARTS) {
        const height = (90 * news.times[part]) / top;
        y -= height;
        if (height > 0.2) draw(svg, "rect", { x: place * width + 0.7, y, width: width - 1.4, height, class: part });
      }
      if (news.receipt) draw(svg, "circle", { cx: (place + 0.5) * width, cy: Math.max(4, y - 6), r: 2.6, class: "switched" });
    });
    const y = far ? 3 : 94 - (90 * deadline) / top;
    draw(svg, "line", { x1: 0, x2: 320, y1: y, y2: y, class: far ? "deadline far" : "deadline" });
    by("latency-note").textContent = last
      ? `${last.chunk_ms.toFixed(0)} ms · deadline ${deadline.toFixed(0)} ms${far ? " ↑" : ""}`
      : `deadline ${deadline.toFixed(0)} ms`;
  }
}
