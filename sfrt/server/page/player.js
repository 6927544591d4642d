// Frames in, at whatever moment they come; pictures on a canvas, at the stream's own rate.

import { codecOf } from "./wire.js";

const DECODED = 4; // a decoder's pictures are few, so the others wait encoded
const LONGEST_S = 15; // of frames that nobody looks at

export class Player {
  /** `shown(frame)` is told of each frame on the canvas; `lost()` asks for a key frame. */
  constructor(canvas, { width, height, fps, shown, lost }) {
    canvas.width = width;
    canvas.height = height;
    Object.assign(this, { canvas, width, height, fps, shown, lost });
    this.context = canvas.getContext("2d", { alpha: false });
    this.waiting = []; // encoded frames
    this.ready = []; // decoded ones: { frame, image }
    this.coming = new Map(); // frames inside the decoder, by timestamp
    this.paused = false;
    this.decoder = null;
    this.round = 0; // pictures decoded before a clear are not shown after it
    this.base = null;
    this.running = true;
    const tick = (now) => {
      if (!this.running) return;
      this.#draw(now);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  get buffered() {
    return (this.waiting.length + this.coming.size + this.ready.length) / this.fps;
  }

  push(frame) {
    if (this.waiting.length > LONGEST_S * this.fps) {
      this.clear();
      this.lost();
    }
    this.waiting.push(frame);
    this.#feed();
  }

  /** Forget what was not shown yet; the next frame must be a key frame. */
  clear() {
    this.round++;
    this.waiting = [];
    this.coming.clear();
    for (const { image } of this.ready.splice(0)) image.close();
    if (this.decoder) this.decoder.close();
    this.decoder = null;
    this.base = null;
  }

  stop() {
    this.running = false;
    this.clear();
  }

  #feed() {
    while (this.waiting.length && this.coming.size + this.ready.length < DECODED) {
      const frame = this.waiting.shift();
      if (frame.codec === "jpeg") this.#picture(frame);
      else this.#decode(frame);
    }
  }

  async #picture(frame) {
    const round = this.round;
    this.coming.set(frame.number, frame);
    const image = await createImageBitmap(new Blob([frame.data], { type: "image/jpeg" })).catch(() => null);
    if (round !== this.round) return image?.close();
    this.coming.delete(frame.number);
    if (image) {
      this.ready.push({ frame, image });
      this.ready.sort((a, b) => a.frame.number - b.frame.number);
    }
    this.#feed();
  }

  #decode(frame) {
    if (!this.decoder) {
      const codec = frame.key && codecOf(frame.data);
      if (!codec) return; // it cannot be shown without those before it
      this.decoder = this.#opened(codec);
    }
    const timestamp = Math.round((frame.number * 1e6) / this.fps);
    this.coming.set(timestamp, frame);
    this.decoder.decode(new EncodedVideoChunk({ type: frame.key ? "key" : "delta", timestamp, data: frame.data }));
  }

  #opened(codec) {
    const round = this.round;
    const decoder = new VideoDecoder({
      output: (image) => {
        const frame = this.coming.get(image.timestamp);
        if (round !== this.round || !frame) return image.close();
        this.coming.delete(image.timestamp);
        this.ready.push({ frame, image });
        this.#feed();
      },
      error: () => {
        if (round !== this.round) return;
        this.decoder = null; // it has closed itself
        this.clear();
        this.lost();
      },
    });
    decoder.configure({ codec, codedWidth: this.width, codedHeight: this.height, optimizeForLatency: true });
    return decoder;
  }

  #draw(now) {
    if (this.paused) this.base = null;
    if (this.paused || !this.ready.length) return;
    const interval = 1000 / this.fps;
    // After a gap the clock starts anew; a tick that came late is made up for by the next ones.
    if (this.base === null || now - this.base > 4 * interval) this.base = now - interval;
    if (now - this.base < interval - 1) return;
    this.base += interval;
    const { frame, image } = this.ready.shift();
    this.context.drawImage(image, 0, 0, this.width, this.height);
    image.close();
    this.#feed();
    this.shown(frame);
  }
}
