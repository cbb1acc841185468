/** All pictures the page knows: those the service lists for this key, and those on their way to it. */

import { Entry } from "./entry.js";

const PAGE = 20;

export class JobBook extends EventTarget {
  /**
   * Events: "change" with the entry that changed, null when the list itself did.
   *
   * @param {import("./api.js").Api} api
   * @param {import("./originals.js").Originals} originals
   */
  constructor(api, originals) {
    super();
    this._api = api;
    this._originals = originals;
    /** @type {Entry[]} the newest first */
    this.entries = [];
    this.hasMore = false;
    this.isLoaded = false;
    /** @type {string | null} */
    this._cursor = null;
    /** @type {Map<string, import("./originals.js").Original>} by job */
    this._kept = new Map();
  }

  /** @returns {Promise<Entry[]>} pictures that were still to be sent when the page was closed */
  async open() {
    const unsent = [];
    for (const original of await this._originals.all()) {
      if (original.jobId) this._kept.set(original.jobId, original);
      // The browser's database may be slower than a person who sends the first picture.
      else if (!this.find(original.id)) unsent.push(new Entry(original.id, { ...original, original: original.blob }));
    }
    this.entries.push(...unsent);
    this._changed(null);
    return unsent;
  }

  /** The newest jobs. @returns {Promise<void>} */
  async load() {
    const page = await this._api.page({ limit: PAGE });
    if (!this.isLoaded) this._next(page.next_cursor);
    this.isLoaded = true;
    this._merge(page.jobs);
    this._changed(null);
  }

  /** The next older jobs. @returns {Promise<void>} */
  async loadMore() {
    const page = await this._api.page({ limit: PAGE, cursor: this._cursor });
    this._next(page.next_cursor);
    this._merge(page.jobs);
  }

  /** Looks at what is in work, page by page until all of it has been seen. @returns {Promise<void>} */
  async refresh() {
    const wanted = new Set(this.live.map((entry) => entry.address));
    for (let cursor = null; wanted.size;) {
      const page = await this._api.page({ limit: Math.min(100, Math.max(PAGE, wanted.size)), cursor });
      page.jobs.forEach((job) => wanted.delete(job.id));
      this._merge(page.jobs);
      cursor = page.next_cursor;
      if (!cursor) break;
    }
    // What the service does not list any more has expired.
    for (const id of wanted) this._expire(id);
  }

  /** @returns {Entry[]} jobs that wait or are in work */
  get live() {
    return this.entries.filter((entry) => entry.isLive);
  }

  /** @param {string} id of an entry or a job @returns {Entry | undefined} */
  find(id) {
    return this.entries.find((entry) => entry.id === id || entry.job?.id === id);
  }

  /** @param {string} id of a job that may be too old for the list @returns {Promise<Entry>} */
  async fetch(id) {
    this._merge([await this._api.job(id)]);
    return /** @type {Entry} */ (this.find(id));
  }

  /** @param {Entry} entry to be sent */
  add(entry) {
    this.entries.unshift(entry);
    this._changed(null);
  }

  /** @param {Entry} entry that was never accepted */
  remove(entry) {
    this.entries = this.entries.filter((other) => other !== entry);
    this._changed(null);
  }

  /** @param {Entry} entry @param {Partial<import("./entry.js").Upload>} upload */
  uploading(entry, upload) {
    Object.assign(entry.upload, upload);
    this._changed(entry);
  }

  /** @param {Entry} entry @param {import("./entry.js").Job} job its own, now that it was accepted */
  accepted(entry, job) {
    // A poll may have listed the job before its own answer came.
    this.entries = this.entries.filter((other) => other === entry || other.job?.id !== job.id);
    entry.job = job;
    this.entries.sort(newestFirst);
    this._changed(null);
    this._changed(entry);
  }

  /** @param {string} jobId @param {Partial<import("./entry.js").Job> & {preview?: string}} change from its events */
  update(jobId, { preview, ...change }) {
    const entry = this.find(jobId);
    if (!entry?.job) return;
    if (preview) entry.preview = preview;
    entry.job = { ...entry.job, ...change };
    this._changed(entry);
  }

  /** Another key sees other jobs. */
  forget() {
    this.entries = this.entries.filter((entry) => !entry.job);
    this.isLoaded = false;
    this._next(null);
    this._changed(null);
  }

  /** @param {import("./entry.js").Job[]} jobs */
  _merge(jobs) {
    const fresh = jobs.filter((job) => !this.find(job.id));
    for (const job of jobs) if (!fresh.includes(job)) this.update(job.id, job);
    if (!fresh.length) return;
    this.entries.push(...fresh.map((job) => this._entryOf(job)));
    this.entries.sort(newestFirst);
    this._changed(null);
  }

  /** @param {import("./entry.js").Job} job */
  _entryOf(job) {
    const kept = this._kept.get(job.id);
    const known = { name: kept?.name, original: kept?.blob, thumbnail: kept?.thumbnail, settings: job.request, job };
    return new Entry(kept?.id ?? job.id, known);
  }

  /** @param {string} id */
  _expire(id) {
    const entry = this.find(id);
    if (!entry?.job) return;
    entry.job = { ...entry.job, state: "expired" };
    this._changed(entry);
  }

  /** @param {string | null} cursor */
  _next(cursor) {
    this._cursor = cursor;
    this.hasMore = cursor !== null;
  }

  /** @param {Entry | null} entry */
  _changed(entry) {
    this.dispatchEvent(new CustomEvent("change", { detail: entry }));
  }
}

/** @param {Entry} a @param {Entry} b */
function newestFirst(a, b) {
  if (!a.job || !b.job) return Number(Boolean(a.job)) - Number(Boolean(b.job));
  return Date.parse(b.job.submitted_at) - Date.parse(a.job.submitted_at);
}
