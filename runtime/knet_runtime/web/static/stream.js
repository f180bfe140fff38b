// Frames as they come: the bytes that knet_runtime/web/streams.py page_frame describes.

const NO_CLASS = 65535;
const RETRY = [500, 1000, 2000, 4000]; // milliseconds

class ByteReader {
  constructor(stream) {
    this.source = stream.getReader();
    this.chunks = [];
    this.size = 0;
  }

  // A buffer of its own with the next `count` bytes; null at the end of the stream.
  async take(count) {
    while (this.size < count) {
      const { done, value } = await this.source.read();
      if (done) return null;
      this.chunks.push(value);
      this.size += value.length;
    }
    const bytes = new Uint8Array(count);
    let filled = 0;
    while (filled < count) {
      const chunk = this.chunks[0];
      const part = chunk.subarray(0, count - filled);
      bytes.set(part, filled);
      filled += part.length;
      if (part.length === chunk.length) this.chunks.shift();
      else this.chunks[0] = chunk.subarray(part.length);
    }
    this.size -= count;
    return bytes;
  }
}

// Keeps watching `path`, whatever happens to the connection, until `signal` says otherwise. Where
// nothing `isOver` it soon tries again.
export async function follow(path, show, signal, isOver) {
  for (let failures = 0; !signal.aborted; ) {
    try {
      await watch(path, (shown) => {
        failures = 0;
        show(shown);
      }, signal);
    } catch {
      // Told by the numbers that are missed, too.
    }
    const pause = isOver() ? RETRY.at(-1) : RETRY[failures++] ?? RETRY.at(-1);
    await new Promise((done) => setTimeout(done, pause));
  }
}

// Calls `show` with each frame {head, bitmap, ends, classes, segments} until the stream ends or
// breaks: for each run where it ends, its class, and its segment (none in a semantic result).
async function watch(path, show, signal) {
  const answer = await fetch(path, { signal });
  if (answer.status === 401) location.reload(); // to the form that asks for the token
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const reader = new ByteReader(answer.body);
  for (;;) {
    const size = await reader.take(4);
    if (size === null) return;
    const text = await reader.take(new DataView(size.buffer).getUint32(0, true));
    if (text === null) return;
    const head = JSON.parse(new TextDecoder().decode(text));
    const jpeg = await reader.take(head.jpeg);
    const ends = await reader.take(4 * head.runs);
    const bytes = await reader.take(2 * head.runs);
    if (bytes === null) return;
    const values = new Uint16Array(bytes.buffer);
    const byId = new Map((head.segments ?? []).map((one) => [one.id, one]));
    const segments = head.segments && Array.from(values, (id) => byId.get(id));
    const classes = segments ? segments.map((one) => one?.class ?? NO_CLASS) : values;
    const bitmap = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
    if (signal.aborted) return;
    show({ head, bitmap, ends: new Uint32Array(ends.buffer), classes, segments });
  }
}
