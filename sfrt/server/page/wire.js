// The WebSocket protocol, version 1: see sfrt/server/protocol.py.

export const VERSION = 1;
const HEADER = 12;
const H264 = 1, JPEG = 2, PICTURE = 3, CLIP = 4, CAMERA = 5, PREVIEW = 6;
const CODECS = { [H264]: "h264", [JPEG]: "jpeg", [PREVIEW]: "preview" };
const CLIP_PART = 262144;

/** One connection. `heard(message)` gets every JSON message, `frame(frame)` every picture, `gone()` the end. */
export class Wire {
  constructor({ token, codec, heard, frame, gone }) {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.bytes = 0;
    this.socket = new WebSocket(`${scheme}://${location.host}/stream`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.say("hello", { version: VERSION, token, codec });
    this.socket.onclose = () => gone();
    this.socket.onmessage = ({ data }) => {
      if (typeof data === "string") return heard(JSON.parse(data));
      this.bytes += data.byteLength;
      const head = new DataView(data);
      frame({
        codec: CODECS[head.getUint8(1)],
        key: head.getUint8(2) === 1,
        stream: head.getUint8(3),
        chunk: head.getUint32(4),
        number: head.getUint32(8),
        data: new Uint8Array(data, HEADER),
      });
    };
  }

  say(kind, fields = {}) {
    if (this.open) this.socket.send(JSON.stringify({ kind, ...fields }));
  }

  /** The picture that the next `start` begins from. */
  async picture(file) {
    this.#send(PICTURE, await file.arrayBuffer());
  }

  /** The clip that the next `start` goes by; `told(part)` hears how much of it has been sent, from 0 to 1. */
  async clip(file, told) {
    const parts = Math.max(1, Math.ceil(file.size / CLIP_PART));
    for (let number = 0; number < parts && this.open; number++) {
      const part = file.slice(number * CLIP_PART, (number + 1) * CLIP_PART);
      this.#send(CLIP, await part.arrayBuffer(), { key: number === parts - 1, number });
      while (this.open && this.unsent > CLIP_PART) await new Promise((done) => setTimeout(done, 20));
      told((number + 1) / parts);
    }
  }

  /** One of the camera's pictures. */
  camera(jpeg, stream, number) {
    if (this.open) this.#send(CAMERA, jpeg, { stream, number });
  }

  get open() {
    return this.socket.readyState === WebSocket.OPEN;
  }

  /** Bytes that wait to be sent. */
  get unsent() {
    return this.socket.bufferedAmount;
  }

  #send(kind, data, { key = true, stream = 0, number = 0 } = {}) {
    const message = new Uint8Array(HEADER + data.byteLength);
    message.set([VERSION, kind, key ? 1 : 0, stream % 256]);
    new DataView(message.buffer).setUint32(8, number);
    message.set(new Uint8Array(data), HEADER);
    this.socket.send(message);
  }

  close() {
    this.socket.close();
  }
}

/** What this browser can show: WebCodecs is kept from pages that came over plain http from elsewhere. */
export async function bestCodec(width = 832, height = 480) {
  if (new URLSearchParams(location.search).get("codec") === "jpeg") return "jpeg";
  if (!("VideoDecoder" in window)) return "jpeg";
  const wanted = { codec: "avc1.4d401e", codedWidth: width, codedHeight: height };
  const { supported } = await VideoDecoder.isConfigSupported(wanted).catch(() => ({ supported: false }));
  return supported ? "h264" : "jpeg";
}

/** "avc1.PPCCLL" of an Annex B key frame, from its sequence parameter set; null where it has none. */
export function codecOf(data) {
  for (let i = 0; i + 6 < data.length; i++) {
    if (data[i] === 0 && data[i + 1] === 0 && data[i + 2] === 1 && (data[i + 3] & 31) === 7) {
      const hex = (value) => value.toString(16).padStart(2, "0");
      return `avc1.${hex(data[i + 4])}${hex(data[i + 5])}${hex(data[i + 6])}`;
    }
  }
  return null;
}
