// All feeds at once: a tile for each, which leads to the feed's own view.

import { Mixer } from "./mixer.js";
import { setText, Trust } from "./trust.js";

const NAMED = 3; // classes of which a tile says how many objects there are

export class Grid {
  constructor(list, run) {
    this.list = list;
    this.run = run;
    this.tiles = new Map();
  }

  set(feeds) {
    for (const tile of this.tiles.values()) tile.mixer.clear();
    this.tiles = new Map(feeds.map((name) => [name, new Tile(name, this.run)]));
    const columns = Math.ceil(Math.sqrt(feeds.length));
    this.list.style.setProperty("--columns", columns);
    this.list.style.setProperty("--rows", Math.ceil(feeds.length / columns));
    this.list.replaceChildren(...[...this.tiles.values()].map(({ item }) => item));
  }

  show(shown) {
    this.tiles.get(shown.head.feed)?.show(shown);
  }

  // Nothing is shown any more: what comes next may be much later.
  clear() {
    for (const tile of this.tiles.values()) tile.clear();
  }

  setClasses(classes, shown) {
    for (const { mixer } of this.tiles.values()) mixer.setClasses(classes, shown);
  }

  setOpacity(opacity) {
    for (const { mixer } of this.tiles.values()) mixer.setOpacity(opacity);
  }

  // The states of all tiles, which are marked by them. `classes` names what is counted.
  judge(classes) {
    return [...this.tiles.values()].map((tile) => tile.judge(classes));
  }

  // Whether a feed goes on of which no frame comes.
  get stuck() {
    return [...this.tiles.values()].some(({ trust }) => trust.stuck);
  }
}

class Tile {
  constructor(name, run) {
    this.name = name;
    this.run = run;
    this.trust = new Trust(run, name);
    this.link = document.createElement("a");
    this.link.className = "tile feed";
    this.link.href = `#feed=${encodeURIComponent(name)}`;
    this.item = document.createElement("li");
    this.item.append(this.link);
    const screen = add(this.link, "div", "screen");
    const canvas = add(screen, "canvas");
    [canvas.width, canvas.height] = [320, 180];
    this.alarm = add(screen, "p", "alarm");
    this.alarm.setAttribute("aria-hidden", "true"); // the state is in words below
    const caption = add(this.link, "p", "row");
    add(caption, "b").textContent = name;
    this.state = add(caption, "span", "state");
    this.rate = add(caption, "span", "soft");
    this.counts = add(this.link, "p", "soft");
    this.mixer = new Mixer(null, canvas);
  }

  show(shown) {
    this.trust.saw(shown.head);
    this.mixer.show(shown);
  }

  clear() {
    this.trust = new Trust(this.run, this.name);
    this.mixer.clear();
  }

  judge(classes) {
    const { state, text } = this.trust.judge();
    this.link.dataset.state = state;
    const ended = this.run.hasEnded(this.name);
    setText(this.alarm, ended ? text.split("\n")[0] : text); // the totals are said once
    setText(this.state, state === "lost" ? "no connection" : state);
    const frames = this.run.feed(this.name)?.frames.toLocaleString("en");
    setText(this.rate, ended ? `${frames} frames` : `${this.run.rate(this.name)} frames/s`);
    const counts = Object.entries(this.mixer.counts()).sort((a, b) => b[1] - a[1]);
    const most = counts.slice(0, NAMED).map(([index, count]) => `${count} ${classes[index]?.name}`);
    setText(this.counts, most.join(" · "));
    return state;
  }
}

function add(parent, kind, name = "") {
  const made = document.createElement(kind);
  made.className = name;
  parent.append(made);
  return made;
}
