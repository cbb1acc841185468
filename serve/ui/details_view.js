/** What is known of one picture: its state, its settings, what it took; download, and once more with changes. */

import { element, find, setText } from "./element.js";
import { bytesText, durationText, priceText, sizeText, stateText, timeText } from "./words.js";

const COLOURS = /** @type {Record<string, string>} */ ({ adain: "As the original", wavelet: "As the original, locally", none: "As restored" });

export class DetailsView {
  /**
   * @param {HTMLElement} view
   * @param {(entry: import("./entry.js").Entry) => void} onAgain
   */
  constructor(view, onAgain) {
    this._view = view;
    this._download = find(".download", view);
    this._again = find(".again", view);
    /** @type {import("./entry.js").Entry | null} */
    this._entry = null;
    this._again.addEventListener("click", () => this._entry && onAgain(this._entry));
  }

  /** @param {import("./entry.js").Entry} entry @param {string} resultUrl "" until it is here */
  show(entry, resultUrl) {
    this._entry = entry;
    setText(find(".file-name", this._view), entry.title);
    setText(find(".state", this._view), entry.state === "done" ? "Done" : stateText(entry));
    find(".state", this._view).dataset.state = entry.state;
    this._showDownload(entry, resultUrl);
    this._again.hidden = !entry.original || ["waiting", "sending", "retrying"].includes(entry.state);
    const facts = factsOf(entry).filter(([, value]) => value !== "");
    find(".facts", this._view).replaceChildren(...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  /** @param {import("./entry.js").Entry} entry @param {string} url */
  _showDownload(entry, url) {
    const link = /** @type {any} */ (this._download);
    link.hidden = entry.state !== "done";
    link.setAttribute("aria-disabled", String(!url));
    if (url) {
      link.href = url;
      link.download = entry.downloadName;
    } else link.removeAttribute("href");
    const result = entry.job?.result;
    find("span", link).textContent = result ? `Download ${formatOf(entry)} \u00b7 ${bytesText(result.bytes)}` : "Download";
  }
}

/** @param {import("./entry.js").Entry} entry @returns {[string, string][]} */
function factsOf(entry) {
  const job = entry.job;
  const settings = job?.request ?? entry.settings;
  const lossy = ["jpeg", "webp"].includes(String(settings.output_format));
  return [
    ["Original", job ? sizeText(job.input) : ""],
    ["Restored", job?.result ? sizeText(job.result) : ""],
    ["Scale", `${settings.scale}\u00d7`],
    ["Steps", String(settings.num_inference_steps)],
    ["In the picture", String(settings.prompt ?? "")],
    ["Not wanted", String(settings.negative_prompt ?? "")],
    ["Guidance", String(settings.guidance_scale)],
    ["Seed", String(settings.seed)],
    ["Colours", COLOURS[String(settings.color_fix)] ?? ""],
    ["Start", settings.start_from === "noise" ? "From noise" : ""],
    ["Format", formatOf(entry) + (lossy ? `, quality ${settings.output_quality}` : "")],
    ["Took", job?.cost ? durationText(job.cost.device_seconds) : ""],
    ["Price", job?.cost ? priceText(job.cost.price, job.cost.currency) : ""],
    ["Sent", job ? timeText(job.submitted_at) : ""],
    ["Kept until", job ? timeText(job.expires_at) : ""],
    ["Model", job?.model_version ?? ""],
    ["Job", job?.id ?? ""],
  ];
}

/** @param {import("./entry.js").Entry} entry @returns {string} */
function formatOf(entry) {
  const format = String((entry.job?.request ?? entry.settings).output_format ?? "png");
  return format === "webp" ? "WebP" : format.toUpperCase();
}
