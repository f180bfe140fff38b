// Whether what is shown of a feed is now: one answer for every part of the page that shows it.

import { duration } from "./run.js";

const SILENCE = 3500; // milliseconds without a frame of a feed that goes on

export class Trust {
  constructor(run, name) {
    this.run = run;
    this.name = name;
    this.head = null; // of the frame that is shown
    this.seenAt = performance.now(); // when it came, and what the run had counted by then
    this.seenFrames = 0;
  }

  saw(head) {
    this.head = head;
    this.seenAt = performance.now();
    this.seenFrames = this.run.feed(this.name)?.frames ?? 0;
  }

  // Whether the run goes on, and no frame of it comes.
  get stuck() {
    const { state, frames } = this.run.feed(this.name) ?? {};
    const goesOn = state === "running" && frames > this.seenFrames + 1;
    return goesOn && performance.now() - this.seenAt > SILENCE;
  }

  // The state in one word, and what is to be said across the frame.
  judge() {
    const { run, head } = this;
    let state = run.lost ? "lost" : run.state(this.name);
    if (state === "running" && head === null) state = "waiting";
    if (state === "running" && (head.stale || this.stuck)) state = "stale";
    const old = head === null ? "" : `\nframe ${duration(run.age(head.at))} old`;
    const alone = run.numbers?.feeds.length === 1;
    const text = {
      lost: `NO CONNECTION to knet-deploy${old}`,
      stale: `STALE${old}`,
      disconnected: `STALE: source not connected${old}`,
      ended: alone || run.over ? "The run has ended" : "This feed has ended",
      failed: alone ? "The run has failed" : "This feed has failed",
      waiting: "Waiting for the first frame",
      running: "Live",
    }[state];
    return { state, text: run.over ? `${text}\n${run.totals()}` : text };
  }
}

// Changes nothing where it says so already: else it would be read out again.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
