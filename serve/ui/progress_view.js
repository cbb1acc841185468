/** A picture on its way: sent, waiting, appearing step by step. */

import { find, setText } from "./element.js";
import { durationText, phaseText, positionText, sizeText } from "./words.js";

export class ProgressView {
  /**
   * @param {HTMLElement} view
   * @param {(entry: import("./entry.js").Entry) => void} onCancel
   */
  constructor(view, onCancel) {
    this._view = view;
    this._before = find(".before", view);
    this._preview = find(".preview", view);
    this._cancel = find(".cancel", view);
    /** @type {import("./entry.js").Entry | null} */
    this._entry = null;
    /** Where the clock stands for the estimate of what remains: this page's own, as others may differ. */
    this._since = { id: "", step: 0, time: 0 };
    this._cancel.addEventListener("click", () => this._entry && onCancel(this._entry));
  }

  /**
   * @param {import("./entry.js").Entry} entry
   * @param {string} originalUrl "" when it is not here
   * @param {{share: number, text: string} | null} [fetching] of the result, once it is done
   */
  show(entry, originalUrl, fetching = null) {
    this._entry = entry;
    this._view.dataset.state = entry.state;
    setPicture(this._before, originalUrl);
    setPicture(this._preview, entry.preview);
    find(".placeholder", this._view).toggleAttribute("hidden", Boolean(originalUrl || entry.preview));
    const share = fetching ? fetching.share : shareOf(entry);
    this._meter(share, fetching?.text ?? headOf(entry));
    setText(find(".phase", this._view), fetching?.text ?? headOf(entry));
    setText(find(".remaining", this._view), fetching ? "" : this._remaining(entry));
    setText(find(".detail", this._view), detailOf(entry));
    this._cancel.hidden = Boolean(fetching) || entry.state === "done";
  }

  /** @param {number | null} share null: nobody knows @param {string} text */
  _meter(share, text) {
    const meter = find(".meter", this._view);
    meter.classList.toggle("is-unknown", share === null);
    meter.style.setProperty("--share", String(share ?? 0));
    meter.setAttribute("aria-valuetext", text);
    if (share === null) meter.removeAttribute("aria-valuenow");
    else meter.setAttribute("aria-valuenow", String(Math.round(share * 100)));
  }

  /** @param {import("./entry.js").Entry} entry @returns {string} */
  _remaining(entry) {
    const job = entry.job;
    if (!job || job.state !== "running" || !job.step) return "";
    if (this._since.id !== job.id || job.step < this._since.step) {
      this._since = { id: job.id, step: job.step, time: performance.now() };
    }
    const steps = job.step - this._since.step;
    if (steps < 2) return "";
    const seconds = ((performance.now() - this._since.time) / 1000 / steps) * (job.num_steps - job.step);
    return seconds < 1 ? "" : `about ${durationText(seconds)} left`;
  }
}

/** @param {HTMLImageElement} image @param {string} url */
function setPicture(image, url) {
  image.hidden = !url;
  if (url && image.getAttribute("src") !== url) image.src = url;
}

/** @param {import("./entry.js").Entry} entry @returns {number | null} */
function shareOf(entry) {
  if (entry.state === "sending") return entry.upload.sent;
  if (entry.state === "running") return entry.job?.progress || null;
  return entry.state === "waiting" || entry.state === "retrying" ? 0 : null;
}

/** @param {import("./entry.js").Entry} entry @returns {string} */
function headOf(entry) {
  switch (entry.state) {
    case "waiting": return "Waiting to be sent";
    case "sending": return entry.upload.sent < 1 ? `Sending, ${Math.round(entry.upload.sent * 100)} %` : "Sent, being checked";
    case "retrying": return entry.upload.problem?.title ?? "The service does not answer";
    case "queued": return positionText(entry.job?.queue_position ?? null);
    case "done": return "Done";
    default: return phaseText(/** @type {import("./entry.js").Job} */ (entry.job));
  }
}

/** @param {import("./entry.js").Entry} entry @returns {string} */
function detailOf(entry) {
  if (entry.state === "retrying") return `${entry.upload.problem?.text ?? "Nothing is lost."} It is sent again by itself.`;
  const job = entry.job;
  if (!job) return entry.title;
  const scale = Number(job.request.scale);
  const size = sizeText({ width: job.input.width * scale, height: job.input.height * scale });
  return `${entry.title} \u2192 ${size}`;
}
