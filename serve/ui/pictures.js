/** Originals and results as the page shows them; the last few results stay in memory. */

const KEPT = 4;

export class Pictures {
  /** @param {import("./api.js").Api} api */
  constructor(api) {
    this._api = api;
    /** @type {WeakMap<Blob, string>} */
    this._originals = new WeakMap();
    /** @type {Map<string, string>} URL by job, the oldest first */
    this._results = new Map();
  }

  /** @param {import("./entry.js").Entry} entry @returns {string} "" when it is not here, or no browser shows it */
  original(entry) {
    if (!entry.original || !entry.thumbnailUrl) return "";
    const known = this._originals.get(entry.original);
    if (known) return known;
    const url = URL.createObjectURL(entry.original);
    this._originals.set(entry.original, url);
    return url;
  }

  /** @param {import("./entry.js").Entry} entry @returns {string} "" before `load` */
  result(entry) {
    return this._results.get(entry.address) ?? "";
  }

  /**
   * @param {import("./entry.js").Entry} entry that is done
   * @param {(share: number) => void} onProgress 0 to 1
   * @param {AbortSignal} signal
   * @returns {Promise<void>}
   */
  async load(entry, onProgress, signal) {
    if (this.result(entry)) return;
    const blob = await this._api.result(entry.address, onProgress, signal);
    this._results.set(entry.address, URL.createObjectURL(blob));
    for (const [id, url] of this._results) {
      if (this._results.size <= KEPT) break;
      URL.revokeObjectURL(url);
      this._results.delete(id);
    }
  }
}

/** @param {import("./entry.js").Entry} entry @returns {boolean} whether browsers show its result */
export function isShowable(entry) {
  return entry.job?.result?.media_type !== "image/tiff";
}
