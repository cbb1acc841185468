/** What pictures will take and cost, asked before they are sent. Pictures of one size are asked about once. */

import { Problem } from "./problem.js";

const ASKED_AT_ONCE = 4;

/** @typedef {Awaited<ReturnType<import("./api.js").Api["estimate"]>>} Estimate */

export class Estimates {
  /** @param {import("./api.js").Api} api */
  constructor(api) {
    this._api = api;
    this._stop = new AbortController();
  }

  /**
   * Ends what an earlier call still asks.
   *
   * @param {import("./drafts.js").Draft[]} drafts each gets its `estimate`, or the `problem` that stands against it
   * @param {import("./entry.js").Settings} settings
   * @returns {Promise<void>} rejected when there was no answer at all, or another call came
   */
  async ask(drafts, settings) {
    this._stop.abort();
    this._stop = new AbortController();
    const groups = Array.from(bySize(drafts).values());
    const next = async () => {
      for (let group = groups.shift(); group; group = groups.shift()) await this._askOne(group, settings, this._stop.signal);
    };
    await Promise.all(Array.from({ length: ASKED_AT_ONCE }, next));
  }

  /**
   * @param {import("./drafts.js").Draft[]} group of one size
   * @param {import("./entry.js").Settings} settings
   * @param {AbortSignal} signal
   */
  async _askOne(group, settings, signal) {
    try {
      const estimate = await this._api.estimate(settings, group[0].size, group[0].file, signal);
      for (const draft of group) Object.assign(draft, { estimate, problem: null });
    } catch (error) {
      // A missing key says nothing about the picture.
      const isRefusal = error instanceof Problem && !error.isPassing && error.status !== 401;
      if (!isRefusal) throw error;
      for (const draft of group) Object.assign(draft, { estimate: null, problem: error });
    }
  }
}

/** @param {import("./drafts.js").Draft[]} drafts @returns {Map<unknown, import("./drafts.js").Draft[]>} */
function bySize(drafts) {
  const groups = new Map();
  for (const draft of drafts) {
    const key = draft.size ? `${draft.size.width} ${draft.size.height}` : draft;
    groups.set(key, [...(groups.get(key) ?? []), draft]);
  }
  return groups;
}
