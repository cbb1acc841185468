/** Sends pictures, a few at a time, until the service has accepted or refused each of them. */

import { Problem } from "./problem.js";
import { delaySeconds, isAbort, sleep } from "./retry.js";

const AT_ONCE = 2;

export class UploadQueue {
  /**
   * @param {import("./api.js").Api} api
   * @param {import("./job_book.js").JobBook} book
   * @param {import("./originals.js").Originals} originals
   */
  constructor(api, book, originals) {
    this._api = api;
    this._book = book;
    this._originals = originals;
    /** @type {import("./entry.js").Entry[]} */
    this._waiting = [];
    /** @type {Map<import("./entry.js").Entry, AbortController>} */
    this._sending = new Map();
    this._wake = new AbortController();
  }

  /** @param {import("./entry.js").Entry} entry */
  add(entry) {
    this._book.uploading(entry, { state: "waiting", sent: 0, problem: null });
    this._waiting.push(entry);
    this._next();
  }

  /** @param {import("./entry.js").Entry} entry not to be sent, or not to be sent any more */
  async drop(entry) {
    this._waiting = this._waiting.filter((other) => other !== entry);
    this._sending.get(entry)?.abort();
    this._book.remove(entry);
    await this._originals.remove(entry.id);
  }

  /** Who waits for its next attempt tries now: there is a network again, or another key. */
  tryNow() {
    this._wake.abort();
    this._wake = new AbortController();
  }

  _next() {
    while (this._sending.size < AT_ONCE && this._waiting.length) {
      const entry = /** @type {import("./entry.js").Entry} */ (this._waiting.shift());
      const stop = new AbortController();
      this._sending.set(entry, stop);
      this._send(entry, stop.signal).finally(() => {
        this._sending.delete(entry);
        this._next();
      });
    }
  }

  /** @param {import("./entry.js").Entry} entry @param {AbortSignal} signal */
  async _send(entry, signal) {
    for (let attempt = 0; !signal.aborted; attempt += 1) {
      try {
        this._book.uploading(entry, { state: "sending", sent: 0, problem: null });
        const job = await this._api.submit(entry, (sent) => this._book.uploading(entry, { sent }), signal);
        this._book.accepted(entry, job);
        await this._originals.accepted(entry.id, job);
        return;
      } catch (error) {
        if (isAbort(error)) return;
        if (!(await this._goesOn(entry, error, attempt, signal))) return;
      }
    }
  }

  /**
   * @param {import("./entry.js").Entry} entry
   * @param {any} error
   * @param {number} attempt
   * @param {AbortSignal} signal
   * @returns {Promise<boolean>} true after the wait for another attempt
   */
  async _goesOn(entry, error, attempt, signal) {
    const needsKey = error instanceof Problem && error.status === 401;
    if (!error.isPassing && !needsKey) {
      this._book.uploading(entry, { state: "refused", problem: error });
      if (!(error instanceof Problem)) throw error;
      return false;
    }
    this._book.uploading(entry, { state: "retrying", problem: error });
    // Only another key helps against a wrong one, and entering it wakes everybody.
    const seconds = needsKey ? 24 * 3600 : delaySeconds(attempt, error.retryAfterSeconds ?? null);
    await sleep(seconds, AbortSignal.any([signal, this._wake.signal])).catch((reason) => {
      if (!isAbort(reason)) throw reason;
    });
    return true;
  }
}
