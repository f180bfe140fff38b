// What ties the page together: which feed is looked at, or all of them, and what there is to see.

import { FullScreen } from "./fullscreen.js";
import { Grid } from "./grid.js";
import { Hover } from "./hover.js";
import { Legend } from "./legend.js";
import { Mixer } from "./mixer.js";
import { Numbers } from "./numbers.js";
import { Run } from "./run.js";
import { follow } from "./stream.js";
import { setText, Trust } from "./trust.js";

const get = (id) => document.getElementById(id);
const run = new Run(setUp, told);
const mixer = new Mixer(get("camera"), get("overlay"));
const grid = new Grid(get("grid"), run);
const legend = new Legend(get("legend"), () => {
  for (const one of [mixer, grid]) one.setClasses(legend.classes, legend.shown);
});
const numbers = new Numbers(get("tiles"), get("stages"), get("counts"));
const hover = new Hover(mixer, () => legend.classes, document.querySelectorAll("#frames .screen"));
const full = new FullScreen(get("full"), () =>
  feed === null ? get("grid") : get("overlay").parentElement);

let feeds = [];
let feed = null; // the name of the one that is looked at; null: all of them
let trust = null; // in what is shown of it
let stream = null;

function setUp({ feeds: names, classes, shown, alpha, model, engine }) {
  const changed = names.join("\n") !== feeds.join("\n");
  if (changed) {
    feeds = names;
    grid.set(feeds);
    get("feeds").replaceChildren(
      get("feeds").querySelector("legend"), feedChoice(null), ...feeds.map(feedChoice));
    get("feeds").hidden = feeds.length < 2;
  }
  legend.set(classes, shown);
  grid.setClasses(legend.classes, legend.shown);
  get("model").textContent = [model, engine].filter(Boolean).join(" on ");
  const slider = get("opacity");
  if (!slider.dataset.touched) slider.value = Math.round(100 * alpha);
  showOpacity();
  if (changed) look();
}

function told() {
  if (run.feed(feed)) numbers.show(run, run.feed(feed));
  for (const label of get("feeds").querySelectorAll("[data-feed]")) {
    label.dataset.feedState = run.state(label.dataset.feed);
  }
  judge();
}

// A view is an address, so that it can be gone back to, and a reload keeps it.
const address = (name) => (name === null ? "#all" : `#feed=${encodeURIComponent(name)}`);

function addressed() {
  const named = feeds.find((name) => address(name) === location.hash);
  return named ?? (feeds.length > 1 ? null : feeds[0]);
}

function feedChoice(name) {
  const button = document.createElement("input");
  button.type = "radio";
  button.name = "feed";
  button.value = address(name);
  button.addEventListener("change", () => location.replace(button.value));
  const label = document.createElement("label");
  if (name !== null) label.dataset.feed = name;
  label.append(button, name ?? "All");
  return label;
}

// Show what the address names.
function look() {
  feed = addressed();
  trust = new Trust(run, feed);
  mixer.clear();
  grid.clear();
  hover.update();
  get("frame").textContent = "";
  for (const id of ["frames", "numbers"]) get(id).hidden = feed === null;
  get("grid").hidden = feed !== null;
  full.moved();
  document.body.classList.toggle("all", feed === null);
  for (const button of get("feeds").querySelectorAll("input")) {
    button.checked = button.value === address(feed);
  }
  for (const link of document.querySelectorAll("footer a")) {
    if (!/\.(jpg|mjpg)$/.test(link.pathname)) continue;
    link.hidden = feed === null;
    link.search = feed === null ? "" : `?feed=${encodeURIComponent(feed)}`;
  }
  if (run.feed(feed)) numbers.show(run, run.feed(feed));
  judge();
  watch();
}

function watch() {
  stream?.abort();
  stream = new AbortController();
  if (feed === null) {
    follow("grid", (shown) => grid.show(shown), stream.signal, () => run.over);
  } else {
    const path = `live?feed=${encodeURIComponent(feed)}`;
    follow(path, show, stream.signal, () => run.hasEnded(feed));
  }
}

function show(shown) {
  trust.saw(shown.head);
  mixer.show(shown);
  hover.update();
  const { frame, pts } = shown.head;
  get("frame").textContent = `frame ${frame}${pts === null ? "" : ` · ${pts.toFixed(2)} s`}`;
  judge();
}

function judge() {
  if (trust === null) return;
  const { state, text } = feed === null ? ofAll(grid.judge(legend.classes)) : trust.judge();
  const [first] = text.split("\n");
  document.body.dataset.state = state;
  document.title = `${first} – knet-deploy`;
  setText(get("state"), { stale: "STALE", disconnected: "STALE", lost: "NO CONNECTION" }[state] ?? first);
  if (feed === null) return;
  get("frames").dataset.state = state;
  for (const alarm of get("frames").querySelectorAll(".alarm")) setText(alarm, text);
}

// The gravest of the feeds' states, and what to say of them together.
function ofAll(states) {
  const state = ["lost", "failed", "disconnected", "stale", "waiting", "running", "ended"].find(
    (one) => states.includes(one));
  const live = states.filter((one) => one === "running").length;
  if (run.lost) return { state, text: "NO CONNECTION" };
  if (run.over) return { state, text: `The run has ended: ${run.totals()}` };
  return { state, text: live === states.length ? "Live" : `${live} of ${states.length} live` };
}

function showOpacity() {
  const slider = get("opacity");
  get("opacity-value").textContent = `${slider.value} %`;
  for (const one of [mixer, grid]) one.setOpacity(slider.value / 100);
}

get("opacity").addEventListener("input", ({ target }) => {
  target.dataset.touched = "yes";
  showOpacity();
});
get("all").addEventListener("click", () => legend.toggleAll(true));
get("none").addEventListener("click", () => legend.toggleAll(false));
window.addEventListener("hashchange", () => {
  if (feeds.length) look();
});

// A page that nobody sees asks for no frames; it goes on listening, or it would miss the end.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    stream?.abort();
    return;
  }
  run.wake();
  if (feeds.length) watch();
});

setInterval(() => {
  judge();
  legend.showShares(mixer.shares(), mixer.counts());
}, 500);
// A connection that died without a word (a phone that changed networks) never ends by itself.
setInterval(() => {
  if (document.hidden) return;
  const stuck = feed === null ? grid.stuck : trust?.stuck;
  if (run.silent) run.listen();
  if (feeds.length && (run.silent || stuck)) watch();
}, 5000);
run.listen();
