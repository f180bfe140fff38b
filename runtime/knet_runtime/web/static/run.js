// What the run tells of itself: what there is, once, and its numbers each second.

const SILENCE = 3500; // milliseconds without numbers
const KEPT_SECONDS = 5;

const isOver = ({ state }) => state === "ended" || state === "failed";

export class Run {
  // Calls `setUp` and `told` with what comes.
  constructor(setUp, told) {
    this.setUp = setUp;
    this.told = told;
    this.numbers = null; // the latest
    this.history = [];
    this.heardAt = performance.now();
    this.clockOffset = 0; // the server's clock less ours, in seconds
    this.events = null;
  }

  listen() {
    this.events?.close();
    this.events = new EventSource("events");
    this.events.addEventListener("setup", ({ data }) => this.setUp(JSON.parse(data)));
    this.events.addEventListener("numbers", ({ data }) => {
      this.numbers = JSON.parse(data);
      this.heardAt = performance.now();
      this.clockOffset = this.numbers.time - Date.now() / 1000;
      this.remember();
      this.told();
    });
  }

  // A page that was put to sleep has heard nothing for long, and that is no loss.
  wake() {
    if (!this.silent) return;
    this.heardAt = performance.now();
    this.listen();
  }

  get silent() {
    return performance.now() - this.heardAt > SILENCE;
  }

  // Whether all feeds have come to their end; then nobody answers any more.
  get over() {
    return this.numbers !== null && this.numbers.feeds.every(isOver);
  }

  get lost() {
    return this.silent && !this.over;
  }

  feed(name) {
    return this.numbers?.feeds.find((one) => one.name === name);
  }

  state(name) {
    return this.feed(name)?.state ?? "waiting";
  }

  hasEnded(name) {
    return isOver({ state: this.state(name) });
  }

  // Seconds since a moment of the server's clock.
  age(at) {
    return Math.max(0, Date.now() / 1000 + this.clockOffset - at);
  }

  // Frames a second over the last few, as text.
  rate(name) {
    const [first, last] = [this.history[0], this.history.at(-1)];
    if (!last || last.time - first.time < 0.5) return "–";
    return ((last.frames[name] - first.frames[name]) / (last.time - first.time)).toFixed(1);
  }

  remember() {
    const { time, feeds } = this.numbers;
    const frames = Object.fromEntries(feeds.map((one) => [one.name, one.frames]));
    this.history = this.history.filter((old) =>
      time - old.time <= KEPT_SECONDS && feeds.every(({ name }) => old.frames[name] <= frames[name]));
    this.history.push({ time, frames });
  }

  // What it has done, as text.
  totals() {
    const { feeds, seconds } = this.numbers;
    const frames = feeds.reduce((sum, one) => sum + one.frames, 0);
    const of = feeds.length > 1 ? ` of ${feeds.length} feeds` : "";
    return `${frames.toLocaleString("en")} frames${of} in ${duration(seconds)}`;
  }
}

export function duration(seconds) {
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(0)} h`;
}
