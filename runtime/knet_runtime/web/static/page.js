// What ties the page together: one feed's frames, everybody's numbers, and whether to trust them.

import { Hover } from "./hover.js";
import { Legend } from "./legend.js";
import { Mixer } from "./mixer.js";
import { Numbers } from "./numbers.js";
import { watch } from "./stream.js";

const SILENCE = 3500; // milliseconds without numbers, which come once a second
const RETRY = [500, 1000, 2000, 4000];

const get = (id) => document.getElementById(id);
const mixer = new Mixer(get("camera"), get("overlay"));
const legend = new Legend(get("legend"), () => mixer.setClasses(legend.classes, legend.shown));
const numbers = new Numbers(get("tiles"), get("stages"), get("counts"));
const hover = new Hover(mixer, () => legend.classes, document.querySelectorAll(".screen"));

let feed = null; // the name of the one that is shown
let latest = null; // the latest numbers
let heardAt = performance.now();
let clockOffset = 0; // the server's clock less ours, in seconds
let events = null;
let stream = null;

let seenAt = 0; // when the frame that is shown came, and what the run had counted by then
let seenFrames = 0;

const numbersOf = (name) => latest?.feeds.find((one) => one.name === name);
const state = (name) => numbersOf(name)?.state ?? "waiting";
const silent = () => performance.now() - heardAt > SILENCE;
const isOver = ({ state }) => state === "ended" || state === "failed";
const runIsOver = () => latest !== null && latest.feeds.every(isOver); // no silence is a loss then
const stuck = () =>
  performance.now() - seenAt > SILENCE && (numbersOf(feed)?.frames ?? 0) > seenFrames + 1;

function listen() {
  events?.close();
  events = new EventSource("events");
  events.addEventListener("setup", ({ data }) => setUp(JSON.parse(data)));
  events.addEventListener("numbers", ({ data }) => {
    latest = JSON.parse(data);
    heardAt = performance.now();
    clockOffset = latest.time - Date.now() / 1000;
    if (numbersOf(feed)) numbers.show(latest, numbersOf(feed));
    for (const label of get("feeds").querySelectorAll("label")) {
      label.dataset.feedState = state(label.dataset.feed);
    }
    judge();
  });
}

function setUp({ feeds, classes, shown, alpha, model, engine }) {
  legend.set(classes, shown);
  get("model").textContent = [model, engine].filter(Boolean).join(" on ");
  const slider = get("opacity");
  if (!slider.dataset.touched) slider.value = Math.round(100 * alpha);
  showOpacity();
  const labels = [...get("feeds").querySelectorAll("label")];
  if (feeds.join("\n") === labels.map((label) => label.dataset.feed).join("\n")) return;
  for (const label of labels) label.remove();
  get("feeds").append(...feeds.map(feedChoice));
  get("feeds").hidden = feeds.length < 2;
  choose(feeds.includes(feed) ? feed : feeds[0]);
}

function feedChoice(name) {
  const button = document.createElement("input");
  button.type = "radio";
  button.name = "feed";
  button.value = name;
  button.addEventListener("change", () => choose(name));
  const label = document.createElement("label");
  label.dataset.feed = name;
  label.append(button, name);
  return label;
}

function choose(name) {
  feed = name;
  mixer.clear();
  hover.update();
  get("frame").textContent = "";
  for (const button of get("feeds").querySelectorAll("input")) button.checked = button.value === name;
  for (const link of document.querySelectorAll("footer a")) {
    if (/\.(jpg|mjpg)$/.test(link.pathname)) link.search = `?feed=${encodeURIComponent(name)}`;
  }
  follow();
}

// Keep watching `feed`, whatever happens to the connection, until another is chosen.
async function follow() {
  stream?.abort();
  const mine = (stream = new AbortController());
  for (let failures = 0; !mine.signal.aborted; ) {
    try {
      await watch(feed, (shown) => {
        failures = 0;
        seenAt = performance.now();
        seenFrames = numbersOf(feed)?.frames ?? 0;
        mixer.show(shown);
        hover.update();
        showFrame();
        judge();
      }, mine.signal);
    } catch {
      // Told by judge(), which misses the numbers too.
    }
    const over = numbersOf(feed) && isOver(numbersOf(feed));
    const pause = over ? RETRY.at(-1) : RETRY[failures++] ?? RETRY.at(-1);
    await new Promise((done) => setTimeout(done, pause));
  }
}

// One answer to whether these frames are now, on every part of the page that shows them.
function judge() {
  const shown = mixer.shown?.head;
  const age = shown ? Math.max(0, Date.now() / 1000 + clockOffset - shown.at) : null;
  let now = silent() && !runIsOver() ? "lost" : state(feed);
  if (now === "running" && !shown) now = "waiting";
  if (now === "running" && (shown.stale || stuck())) now = "stale";
  const old = age === null ? "" : `\nframe ${duration(age)} old`;
  const text = {
    lost: `NO CONNECTION to knet-deploy${old}`,
    stale: `STALE${old}`,
    disconnected: `STALE: source not connected${old}`,
    ended: runIsOver() ? `The run has ended\n${totals()}` : "This feed has ended",
    failed: `${latest?.feeds.length > 1 ? "This feed" : "The run"} has failed${
      runIsOver() ? `\n${totals()}` : ""}`,
    waiting: "Waiting for the first frame",
    running: "Live",
  }[now];
  document.body.dataset.state = now;
  const [first] = text.split("\n");
  document.title = `${first} – knet-deploy`;
  setText(get("state"), { stale: "STALE", disconnected: "STALE", lost: "NO CONNECTION" }[now] ?? first);
  for (const alarm of document.querySelectorAll(".alarm")) setText(alarm, text);
}

// What a run that is over has done.
function totals() {
  const frames = latest.feeds.reduce((sum, one) => sum + one.frames, 0);
  const feeds = latest.feeds.length > 1 ? ` of ${latest.feeds.length} feeds` : "";
  return `${frames.toLocaleString("en")} frames${feeds} in ${duration(latest.seconds)}`;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text; // else it would be read out again
}

function duration(seconds) {
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(0)} h`;
}

function showFrame() {
  const { frame, pts } = mixer.shown.head;
  get("frame").textContent = `frame ${frame}${pts === null ? "" : ` · ${pts.toFixed(2)} s`}`;
}

function showOpacity() {
  const slider = get("opacity");
  get("opacity-value").textContent = `${slider.value} %`;
  mixer.setOpacity(slider.value / 100);
}

get("opacity").addEventListener("input", ({ target }) => {
  target.dataset.touched = "yes";
  showOpacity();
});
get("all").addEventListener("click", () => legend.toggleAll(true));
get("none").addEventListener("click", () => legend.toggleAll(false));

// A page that nobody sees asks for no frames; it goes on listening, or it would miss the end.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    stream?.abort();
    return;
  }
  if (silent()) { // it was put to sleep
    heardAt = performance.now();
    listen();
  }
  if (feed !== null) follow();
});

setInterval(() => {
  judge();
  legend.showShares(mixer.shares(), mixer.counts());
}, 500);
// A connection that died without a word (a phone that changed networks) never ends by itself.
setInterval(() => {
  if (document.hidden) return;
  if (silent()) listen();
  if (feed !== null && (silent() || stuck())) follow();
}, 5000);
listen();
