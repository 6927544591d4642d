// A camera's pictures on their way to the model: cut to its size, at its rate, the newest ones, and no more than wanted.

const UNSENT = 32 * 1024; // bytes that may wait in the socket: a slow network makes fewer pictures, not later ones
const QUALITY = 0.85;

/** Browsers keep cameras to pages that come from this machine or over https. */
export const cameraAllowed = () => Boolean(navigator.mediaDevices?.getUserMedia);

export class Camera {
  /** `canvas` shows what is sent; `send(jpeg, stream, number)` sends it; `unsent()` is how many bytes still wait. */
  constructor(canvas, { width, height, fps, send, unsent }) {
    Object.assign(canvas, { width, height });
    Object.assign(this, { canvas, width, height, fps, send, unsent });
    this.context = canvas.getContext("2d", { alpha: false });
    this.video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
    this.wants = { stream: 0, until: 0 };
    this.number = 0;
    this.busy = this.paused = false;
  }

  /** Ask for the camera. Rejects where there is none, or the viewer does not want it. */
  async open() {
    const { width, height, fps } = this;
    const wish = { width: { ideal: Math.max(width, 320) }, height: { ideal: Math.max(height, 240) }, frameRate: { ideal: fps } };
    this.video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wish, audio: false });
    await this.video.play();
    this.timer = setInterval(() => this.#shoot(), 1000 / fps);
  }

  /** The server asks for a stream's pictures, numbered up to `until`. */
  wanted({ stream, until }) {
    if (stream !== this.wants.stream) this.number = 0;
    this.wants = { stream, until };
  }

  close() {
    clearInterval(this.timer);
    for (const track of this.video.srcObject?.getTracks() ?? []) track.stop();
    this.video.srcObject = null;
  }

  #shoot() {
    this.#draw();
    const { stream, until } = this.wants;
    if (this.paused || this.busy || this.number >= until || this.unsent() > UNSENT) return;
    this.busy = true;
    this.canvas.toBlob(
      async (jpeg) => {
        const data = await jpeg?.arrayBuffer();
        this.busy = false;
        if (data && stream === this.wants.stream) this.send(data, stream, this.number++);
      },
      "image/jpeg",
      QUALITY,
    );
  }

  /** The middle of the picture, as much of it as has the model's shape. */
  #draw() {
    const { width, height, video } = this;
    const scale = Math.max(width / video.videoWidth, height / video.videoHeight);
    if (!Number.isFinite(scale)) return;
    const [w, h] = [width / scale, height / scale];
    const [x, y] = [(video.videoWidth - w) / 2, (video.videoHeight - h) / 2];
    this.context.drawImage(video, x, y, w, h, 0, 0, width, height);
  }
}
