/** A picture as the page knows it, from the moment it is sent to its expiry. */

/**
 * @typedef {{width: number, height: number}} Size
 * @typedef {Record<string, string | number | boolean>} Settings  by the names of the service's form
 * @typedef {{state: "waiting" | "sending" | "retrying" | "refused", sent: number, problem: any}} Upload
 *   sent: 0 to 1; problem: why it is tried again or was refused
 * @typedef {Object} Job  as the service describes it
 * @property {string} id
 * @property {"queued" | "running" | "done" | "failed" | "cancelled" | "expired"} state
 * @property {string} phase
 * @property {number | null} queue_position
 * @property {number} step
 * @property {number} num_steps
 * @property {number} progress
 * @property {string} submitted_at
 * @property {string | null} started_at
 * @property {string | null} ended_at
 * @property {string} expires_at
 * @property {Size} input
 * @property {(Size & {media_type: string, bytes: number, sha256: string}) | null} result
 * @property {{type?: string, detail?: string} | null} problem
 * @property {{megapixels: number, device_seconds: number, price: number, currency: string}} estimate
 * @property {{device_seconds: number, price: number, currency: string} | null} cost
 * @property {string | null} model_version
 * @property {Settings} request
 */

const LIVE = new Set(["queued", "running"]);

export class Entry {
  /**
   * @param {string} id the Idempotency-Key of a picture that was sent from here, else the job's id
   * @param {{name?: string, original?: Blob | null, thumbnail?: Blob | null, settings?: Settings, job?: Job | null}} [known]
   */
  constructor(id, { name = "", original = null, thumbnail = null, settings = {}, job = null } = {}) {
    this.id = id;
    this.name = name;
    this.original = original;
    this.thumbnail = thumbnail;
    this.settings = settings;
    this.job = job;
    this.upload = /** @type {Upload} */ ({ state: "waiting", sent: 0, problem: null });
    this.preview = "";
    this.thumbnailUrl = thumbnail ? URL.createObjectURL(thumbnail) : "";
  }

  /** @returns {string} of the job once there is one, of the upload before */
  get state() {
    return this.job ? this.job.state : this.upload.state;
  }

  /** @returns {boolean} whether the service still works on it, or will */
  get isLive() {
    return this.job !== null && LIVE.has(this.job.state);
  }

  /** @returns {string} in the address of the page; a job's id is the same on every device */
  get address() {
    return this.job?.id ?? this.id;
  }

  /** @returns {string} */
  get title() {
    if (this.name) return this.name;
    return this.job ? `Picture ${this.job.input.width} \u00d7 ${this.job.input.height}` : "Picture";
  }

  /** @returns {string} such as lighthouse-4x.png */
  get downloadName() {
    const job = this.job;
    const suffixes = /** @type {Record<string, string>} */ ({ jpeg: "jpg", tiff: "tif" });
    const format = String(job?.request.output_format ?? "png");
    const stem = this.name.replace(/\.[^.]*$/, "").replace(/[\\/:*?"<>|\u0000-\u001f]/g, "_") || `faithdiff-${this.address.slice(0, 8)}`;
    return `${stem}-${job?.request.scale ?? 1}x.${suffixes[format] ?? format}`;
  }
}
