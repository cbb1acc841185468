/**
 * Keeps the book true: the job that is looked at by its event stream, all others by looking at the list.
 *
 * One stream only: browsers open six connections to a host, and twenty pictures must not use them all up.
 */

import { followJob } from "./job_stream.js";
import { Problem, Unreachable } from "./problem.js";

const LOOK_MS = 2000;
const LOOK_HIDDEN_MS = 15000;

export class JobFollower {
  /**
   * @param {import("./api.js").Api} api
   * @param {import("./job_book.js").JobBook} book
   */
  constructor(api, book) {
    this._api = api;
    this._book = book;
    this._streamed = "";
    this._stop = new AbortController();
    this._timer = 0;
    book.addEventListener("change", () => this._plan());
  }

  /** @param {import("./entry.js").Entry | null} entry that is looked at */
  watch(entry) {
    const jobId = entry?.isLive ? entry.address : "";
    if (jobId === this._streamed) return;
    this._stop.abort();
    this._streamed = jobId;
    this._stop = new AbortController();
    if (jobId) this._follow(jobId, this._stop.signal);
    this._plan();
  }

  /** @param {string} jobId @param {AbortSignal} signal */
  async _follow(jobId, signal) {
    try {
      await followJob(this._api, jobId, (_name, data) => this._book.update(jobId, data), signal);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.status === 404) this._book.update(jobId, { state: "expired" });
    }
    // Its next change, if there is any, comes from the list.
    if (this._streamed === jobId) this._streamed = "";
  }

  _plan() {
    const others = this._book.live.filter((entry) => entry.address !== this._streamed);
    if (!others.length || this._timer) return;
    this._timer = setTimeout(() => this._look(), document.hidden ? LOOK_HIDDEN_MS : LOOK_MS);
  }

  async _look() {
    try {
      await this._book.refresh();
    } catch (error) {
      // The page tells that the service does not answer; this one looks again either way.
      if (!(error instanceof Problem) && !(error instanceof Unreachable)) throw error;
    } finally {
      this._timer = 0;
      this._plan();
    }
  }
}
