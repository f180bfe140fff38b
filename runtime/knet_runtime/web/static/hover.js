// What is under the pointer, or was tapped: the segment's class, track, score and area.

export class Hover {
  constructor(mixer, classes, screens) {
    this.mixer = mixer;
    this.classes = classes;
    this.at = null; // where the pointer is: the screen, and fractions of its width and height
    for (const screen of screens) {
      screen.addEventListener("pointermove", (event) => this.move(screen, event));
      screen.addEventListener("pointerdown", (event) => this.move(screen, event));
      screen.addEventListener("pointerleave", ({ pointerType }) => {
        if (pointerType === "mouse") this.move(null);
      });
    }
    // A tap stays until another one.
    document.addEventListener("pointerdown", ({ target }) => {
      if (!target.closest?.(".screen")) this.move(null);
    });
  }

  move(screen, event) {
    this.at = screen && { screen, ...place(screen.querySelector("canvas"), event) };
    this.update();
  }

  // Also called for each new frame: what is under the pointer may be something else now.
  update() {
    const found = this.mixer.point(this.at?.x ?? -1, this.at?.y ?? -1);
    for (const box of document.querySelectorAll(".hover")) {
      const here = found !== null && box.parentElement === this.at.screen;
      box.hidden = !here;
      if (!here) continue;
      const text = describe(found, this.classes());
      if (box.textContent !== text) box.textContent = text;
      const { offsetX: x, offsetY: y, screen } = this.at;
      const left = Math.min(x + 14, screen.clientWidth - box.offsetWidth - 4);
      const above = y + 18 + box.offsetHeight > screen.clientHeight;
      box.style.left = `${Math.max(4, left)}px`;
      box.style.top = `${Math.max(4, above ? y - box.offsetHeight - 10 : y + 18)}px`;
    }
  }
}

// The frame is fitted into its canvas (object-fit: contain), which may have bars beside it.
function place(canvas, { clientX, clientY }) {
  const box = canvas.getBoundingClientRect();
  const [offsetX, offsetY] = [clientX - box.left, clientY - box.top];
  const scale = Math.min(box.width / canvas.width, box.height / canvas.height);
  const [width, height] = [canvas.width * scale, canvas.height * scale];
  const x = (offsetX - (box.width - width) / 2) / width;
  const y = (offsetY - (box.height - height) / 2) / height;
  return { offsetX, offsetY, x, y };
}

function describe(found, classes) {
  const name = classes[found.class]?.name ?? "";
  const parts = [found.thing && found.track == null ? `${name} ${found.id}` : name];
  if (found.track != null) parts.push(`track ${found.track}`);
  if (found.score != null) parts.push(`score ${found.score.toFixed(2)}`);
  if (found.area) parts.push(`${found.area.toLocaleString("en")} px`);
  return parts.join(" · ");
}
