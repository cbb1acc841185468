/** The pictures that were sent from this browser, kept in it: to compare after a reload, and to go on sending. */

const DATABASE = "faithdiff";
const STORE = "originals";
const LASTS_MS = 24 * 3600 * 1000;

/**
 * @typedef {Object} Original
 * @property {string} id the Idempotency-Key it was sent with
 * @property {string} jobId "" until it has been accepted
 * @property {string} name of the file
 * @property {Blob} blob
 * @property {Blob | null} thumbnail
 * @property {import("./entry.js").Settings} settings
 * @property {number} expiresAt milliseconds since the epoch; of the job once there is one
 */

/** Every method works without a database, too, as in private windows: then nothing is kept, and `isKept` is false. */
export class Originals {
  constructor() {
    this.isKept = true;
    this._database = this._open();
  }

  /** @returns {Promise<Original[]>} those that have not expired; the others are removed */
  async all() {
    const found = /** @type {Original[]} */ ((await this._do("readonly", (store) => store.getAll())) ?? []);
    const expired = found.filter((original) => original.expiresAt < Date.now());
    for (const { id } of expired) await this.remove(id);
    return found.filter((original) => !expired.includes(original));
  }

  /** @param {Omit<Original, "expiresAt" | "jobId">} original @returns {Promise<void>} */
  async add(original) {
    const record = { ...original, jobId: "", expiresAt: Date.now() + LASTS_MS };
    await this._do("readwrite", (store) => store.put(record));
  }

  /** @param {string} id @param {import("./entry.js").Job} job @returns {Promise<void>} */
  async accepted(id, job) {
    const known = await this._do("readonly", (store) => store.get(id));
    const record = { ...known, jobId: job.id, expiresAt: Date.parse(job.expires_at) };
    if (known) await this._do("readwrite", (store) => store.put(record));
  }

  /** @param {string} id @returns {Promise<void>} */
  async remove(id) {
    await this._do("readwrite", (store) => store.delete(id));
  }

  /**
   * @param {IDBTransactionMode} mode
   * @param {(store: IDBObjectStore) => IDBRequest} ask
   * @returns {Promise<any>} undefined when nothing can be kept
   */
  async _do(mode, ask) {
    const database = await this._database;
    if (!database) return undefined;
    try {
      const transaction = database.transaction(STORE, mode);
      const request = ask(transaction.objectStore(STORE));
      await new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error);
      });
      return request.result;
    } catch (error) {
      this._note(error);
      return undefined;
    }
  }

  /** @returns {Promise<IDBDatabase | null>} */
  _open() {
    return new Promise((resolve, reject) => {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    }).catch((error) => this._note(error));
  }

  /** @param {unknown} error @returns {null} */
  _note(error) {
    // A full disk or a private window takes nothing away from the work itself; the page says that nothing is kept.
    if (!(error instanceof DOMException)) throw error;
    this.isKept = false;
    return null;
  }
}
