// The frame, or all feeds, over the whole screen: by a button, or by the key f. Escape leaves it.

export class FullScreen {
  // `part` gives the element that is to fill the screen just now.
  constructor(button, part) {
    this.part = part;
    button.hidden = !document.fullscreenEnabled; // as in Safari on telephones
    if (button.hidden) return;
    button.addEventListener("click", () => this.toggle());
    document.addEventListener("keydown", ({ key, repeat, ctrlKey, altKey, metaKey }) => {
      if (key.toLowerCase() === "f" && !(repeat || ctrlKey || altKey || metaKey)) this.toggle();
    });
  }

  async toggle() {
    if (!document.fullscreenElement) return this.enter();
    // One part may lie upon another that had the screen before.
    while (document.fullscreenElement) await document.exitFullscreen();
  }

  // Another part is to be seen now: it takes the screen over.
  moved() {
    if (document.fullscreenElement) this.enter();
  }

  async enter() {
    await this.part().requestFullscreen().catch(() => {}); // a browser may refuse, and shows that itself
  }
}
