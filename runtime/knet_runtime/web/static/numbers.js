// Numbers of the run, as the server's events bring them once a second.

export class Numbers {
  constructor(tiles, stages, counts) {
    this.tiles = tiles;
    this.stages = stages;
    this.counts = counts;
  }

  // Those of one feed of the run.
  show(run, feed) {
    const { viewers, machine } = run.numbers;
    const latency = feed.stages.latency;
    const rows = [
      ["frames/s", run.rate(feed.name)],
      ["latency p95", latency && milliseconds(latency.p95), "ms"],
      ["frames", feed.frames.toLocaleString("en")],
      ["dropped", feed.dropped.toLocaleString("en")],
      ["stale shown", feed.stale_frames.toLocaleString("en")],
      ["reconnects", feed.reconnects.toLocaleString("en")],
      ["viewers", viewers],
    ];
    const { temperatures, clock, clock_limit: limit } = machine;
    const warmest = Object.entries(temperatures).sort((a, b) => b[1] - a[1])[0];
    if (warmest) rows.push([`warmest: ${warmest[0]}`, warmest[1].toFixed(0), "°C"]);
    if (clock) rows.push(["clock", gigahertz(clock), limit ? `of ${gigahertz(limit)} GHz` : "GHz"]);
    this.tiles.replaceChildren(...rows.map(tile));
    this.stages.replaceChildren(...Object.entries(feed.stages).map(stage));
    this.counts.hidden = feed.totals === null;
    this.counts.tBodies[0].replaceChildren(...counted(feed.totals ?? { zones: {}, lines: {} }));
  }
}

function tile([name, value, unit]) {
  const box = document.createElement("div");
  const term = document.createElement("dt");
  term.textContent = name;
  const number = document.createElement("dd");
  number.textContent = value ?? "–";
  if (unit && value !== undefined) {
    const small = document.createElement("small");
    small.textContent = ` ${unit}`;
    number.append(small);
  }
  box.append(term, number);
  return box;
}

function counted({ zones, lines }) {
  const rows = [];
  // Where nothing was counted yet, that is said, too.
  const nothing = (classes) => Object.keys(classes).length === 0;
  for (const [name, classes] of Object.entries(zones)) {
    if (nothing(classes)) rows.push(row(name, ["–", 0, 0, 0]));
    for (const [label, { present, entered, left }] of Object.entries(classes)) {
      rows.push(row(name, [label, present, entered, left]));
    }
  }
  for (const [name, classes] of Object.entries(lines)) {
    if (nothing(classes)) rows.push(row(name, ["–", "", 0, 0]));
    for (const [label, { to_left: left, to_right: right }] of Object.entries(classes)) {
      rows.push(row(name, [label, "", left, right]));
    }
  }
  return rows;
}

function row(title, values) {
  const made = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = title;
  made.append(head);
  for (const value of values) made.insertCell().textContent = value;
  return made;
}

function stage([name, times]) {
  const made = row(name, [times.p50, times.p95, times.p99].map(milliseconds));
  if (name === "latency") made.className = "total";
  return made;
}

const milliseconds = (value) => value.toFixed(value < 100 ? 1 : 0);
const gigahertz = (hertz) => (hertz / 1e9).toFixed(1);
