// The frame beside its overlay. Mixed here, so that toggles and opacity are each viewer's own
// and take effect at once, also on a frame that stands still.

const packed = ([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;

const POINTED = packed([255, 255, 255]);

// Zones and lines, with what was counted there.
function drawMarks(context, { marks, width, height }) {
  const unit = Math.max(1, Math.min(width, height) / 400);
  context.lineJoin = "round";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.font = `${Math.max(11, Math.min(width, height) / 30)}px system-ui, sans-serif`;
  for (const { points, closed, texts } of marks) {
    context.beginPath();
    points.forEach(([x, y]) => context.lineTo(x, y));
    if (closed) context.closePath();
    for (const [style, line] of [["#000", 3 * unit], ["#fff", unit]]) {
      context.strokeStyle = style;
      context.lineWidth = line;
      context.stroke();
    }
    for (const [[x, y], text] of texts) {
      const half = context.measureText(text).width / 2 + 3;
      const middle = Math.min(Math.max(x, half), Math.max(half, width - half));
      context.lineWidth = 3 * unit;
      context.strokeStyle = "#000";
      context.strokeText(text, middle, y);
      context.fillStyle = "#fff";
      context.fillText(text, middle, y);
    }
  }
}

export class Mixer {
  // Without a `camera` (null) there is the overlay alone.
  constructor(camera, overlay) {
    this.camera = camera;
    this.overlay = overlay;
    this.mask = document.createElement("canvas");
    this.colours = new Uint32Array(0); // by class; 0 is transparent
    this.opacity = 0.5;
    this.shown = null;
    this.pointed = null; // the pixel under the pointer, as an index
  }

  // `classes` [{name, colour: [r, g, b]}], `shown` a set of the indices to be coloured.
  setClasses(classes, shown) {
    this.colours = Uint32Array.from(classes, ({ colour }, index) =>
      shown.has(index) ? packed(colour) : 0);
    this.draw();
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.draw();
  }

  screens() {
    return this.camera === null ? [this.overlay] : [this.camera, this.overlay];
  }

  show(shown) {
    this.shown?.bitmap.close();
    this.shown = shown;
    const { width, height } = shown.head;
    for (const canvas of [...this.screens(), this.mask]) {
      if (canvas.width !== width) canvas.width = width;
      if (canvas.height !== height) canvas.height = height;
    }
    this.camera?.getContext("2d").drawImage(shown.bitmap, 0, 0);
    this.draw();
  }

  // Nothing is shown any more, least of all another feed's frame.
  clear() {
    this.shown?.bitmap.close();
    this.shown = null;
    for (const canvas of this.screens()) {
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    }
  }

  draw() {
    if (this.shown === null) return;
    const { head, bitmap, ends, classes, segments } = this.shown;
    const image = new ImageData(head.width, head.height);
    const pixels = new Uint32Array(image.data.buffer);
    const pointed = this.segmentAt(this.pointed)?.id;
    for (let run = 0, start = 0; run < ends.length; start = ends[run++]) {
      const colour = this.colours[classes[run]] ?? 0; // the ignore index has no colour
      const own = segments?.[run]?.colour; // an object has a shade of its own
      if (colour !== 0) pixels.fill(own ? packed(own) : colour, start, ends[run]);
      if (pointed && segments?.[run]?.id === pointed) pixels.fill(POINTED, start, ends[run]);
    }
    this.mask.getContext("2d").putImageData(image, 0, 0);
    const context = this.overlay.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(bitmap, 0, 0);
    context.globalAlpha = this.opacity;
    context.drawImage(this.mask, 0, 0);
    context.globalAlpha = 1;
    drawMarks(context, head);
  }

  // What is at a place of a canvas, given as fractions of its width and height: the segment, or
  // in a semantic result the class alone; null where there is neither.
  point(x, y) {
    const { width, height } = this.shown?.head ?? {};
    const before = this.segmentAt(this.pointed)?.id;
    const inside = x >= 0 && x < 1 && y >= 0 && y < 1 && width;
    this.pointed = inside ? Math.floor(y * height) * width + Math.floor(x * width) : null;
    const found = this.segmentAt(this.pointed);
    if (found?.id !== before) this.draw();
    return found;
  }

  segmentAt(pixel) {
    if (pixel === null || this.shown === null) return null;
    const { ends, classes, segments } = this.shown;
    let [low, high] = [0, ends.length - 1]; // runs are in order: the first that ends behind it
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > pixel) high = middle;
      else low = middle + 1;
    }
    if (classes[low] >= this.colours.length) return null;
    return segments?.[low] ?? { class: classes[low] };
  }

  // The fraction of the frame that each class covers.
  shares() {
    const shares = new Float64Array(this.colours.length);
    if (this.shown === null) return shares;
    const { head, ends, classes } = this.shown;
    for (let run = 0, start = 0; run < ends.length; start = ends[run++]) {
      if (classes[run] < shares.length) shares[classes[run]] += ends[run] - start;
    }
    return shares.map((count) => count / (head.width * head.height));
  }

  // How many objects of each class there are; nothing for stuff.
  counts() {
    const counts = [];
    for (const one of this.shown?.head.segments ?? []) {
      if (one.thing) counts[one.class] = (counts[one.class] ?? 0) + 1;
    }
    return counts;
  }
}
