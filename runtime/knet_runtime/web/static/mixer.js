// The frame beside its overlay. Mixed here, so that toggles and opacity are each viewer's own
// and take effect at once, also on a frame that stands still.

const packed = ([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;

export class Mixer {
  constructor(camera, overlay) {
    this.camera = camera;
    this.overlay = overlay;
    this.mask = document.createElement("canvas");
    this.colours = new Uint32Array(0); // by class; 0 is transparent
    this.opacity = 0.5;
    this.shown = null;
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

  show(shown) {
    this.shown?.bitmap.close();
    this.shown = shown;
    const { width, height } = shown.head;
    for (const canvas of [this.camera, this.overlay, this.mask]) {
      if (canvas.width !== width) canvas.width = width;
      if (canvas.height !== height) canvas.height = height;
    }
    this.camera.getContext("2d").drawImage(shown.bitmap, 0, 0);
    this.draw();
  }

  // Nothing is shown any more, least of all another feed's frame.
  clear() {
    this.shown?.bitmap.close();
    this.shown = null;
    for (const canvas of [this.camera, this.overlay]) {
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    }
  }

  draw() {
    if (this.shown === null) return;
    const { head, bitmap, ends, classes, segments } = this.shown;
    const image = new ImageData(head.width, head.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let run = 0, start = 0; run < ends.length; start = ends[run++]) {
      const colour = this.colours[classes[run]] ?? 0; // the ignore index has no colour
      const own = segments?.[run]?.colour; // an object has a shade of its own
      if (colour !== 0) pixels.fill(own ? packed(own) : colour, start, ends[run]);
    }
    this.mask.getContext("2d").putImageData(image, 0, 0);
    const context = this.overlay.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(bitmap, 0, 0);
    context.globalAlpha = this.opacity;
    context.drawImage(this.mask, 0, 0);
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
