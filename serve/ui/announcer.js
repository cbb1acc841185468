/** Tells screen readers what happens, seldom enough to be listened to. */

import { find } from "./element.js";
import { positionText } from "./words.js";

const ENDS = /** @type {Record<string, string>} */ ({ done: "is restored", failed: "failed", cancelled: "was cancelled", refused: "was not accepted" });
const QUARTERS = 4;

export class Announcer {
  constructor() {
    this._place = find("#announcer");
    /** @type {WeakMap<import("./entry.js").Entry, string>} */
    this._told = new WeakMap();
  }

  /** @param {string} text */
  say(text) {
    this._place.textContent = text;
  }

  /**
   * Every end, once; of the picture that is looked at also its place in the line, and every quarter of the work.
   *
   * @param {import("./entry.js").Entry} entry
   * @param {boolean} isSelected
   */
  follow(entry, isSelected) {
    const before = this._told.get(entry);
    const text = textOf(entry);
    this._told.set(entry, text);
    // The first sight of old pictures is no news.
    const isNews = before !== undefined && before !== text;
    if (isNews && text && (isSelected || entry.state in ENDS)) this.say(text);
  }
}

/** @param {import("./entry.js").Entry} entry @returns {string} */
function textOf(entry) {
  const job = entry.job;
  if (entry.state in ENDS) return `${entry.title} ${ENDS[entry.state]}`;
  if (entry.state === "queued") return `${entry.title}: ${positionText(job?.queue_position ?? null)}`;
  if (entry.state !== "running" || !job) return entry.state === "retrying" ? `${entry.title} is sent again` : `Sending ${entry.title}`;
  return `${entry.title}: ${(Math.floor(job.progress * QUARTERS) * 100) / QUARTERS} % done`;
}
