// The legend: a checkbox, a colour and a share for each class, and how many objects it has.

export class Legend {
  constructor(list, changed) {
    this.list = list;
    this.changed = changed;
    this.classes = [];
    this.shown = new Set();
    this.shares = [];
  }

  // Toggles stay as they are while the classes do.
  set(classes, shown) {
    if (JSON.stringify(classes) === JSON.stringify(this.classes)) return;
    this.classes = classes;
    this.shown = new Set(shown);
    this.shares = [];
    this.list.replaceChildren(...classes.map((one, index) => this.row(one, index)));
    this.changed();
  }

  row({ name, colour }, index) {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = this.shown.has(index);
    box.addEventListener("change", () => {
      if (box.checked) this.shown.add(index);
      else this.shown.delete(index);
      this.changed();
    });
    const swatch = document.createElement("i");
    swatch.style.backgroundColor = `rgb(${colour.join(" ")})`;
    const text = document.createElement("b");
    text.textContent = name;
    const share = document.createElement("span");
    share.setAttribute("aria-hidden", "true");
    this.shares.push(share);
    const label = document.createElement("label");
    label.append(box, swatch, text, share);
    const item = document.createElement("li");
    item.append(label);
    return item;
  }

  toggleAll(shown) {
    this.shown = new Set(shown ? this.classes.keys() : []);
    for (const box of this.list.querySelectorAll("input")) box.checked = shown;
    this.changed();
  }

  showShares(shares, counts) {
    this.shares.forEach((span, index) => {
      const share = 100 * (shares[index] ?? 0);
      const covered = share === 0 ? "" : share < 0.1 ? "<0.1 %" : `${share.toFixed(1)} %`;
      const text = counts[index] ? `${counts[index]} · ${covered}` : covered;
      if (span.textContent !== text) span.textContent = text;
    });
  }
}
