/** The large part of the page: chosen pictures, or one picture in whatever state it is. */

import { CompareView } from "./compare_view.js";
import { element, find } from "./element.js";
import { isShowable } from "./pictures.js";
import { Problem, Unreachable, problemOfJob } from "./problem.js";
import { ProgressView } from "./progress_view.js";
import { isAbort } from "./retry.js";

const VIEWS = ["drafts-view", "progress-view", "compare-view", "message-view"];
const WORKING = new Set(["waiting", "sending", "retrying", "queued", "running"]);

/**
 * @typedef {Object} Actions
 * @property {(entry: import("./entry.js").Entry) => void} onCancel
 * @property {(entry: import("./entry.js").Entry) => void} onAgain chosen once more, with its settings
 * @property {(entry: import("./entry.js").Entry) => void} onLoaded its result is here
 * @property {() => void} onNew
 */

export class Stage {
  /** @param {import("./pictures.js").Pictures} pictures @param {Actions} actions */
  constructor(pictures, actions) {
    this._pictures = pictures;
    this._actions = actions;
    this._progress = new ProgressView(find("#progress-view"), actions.onCancel);
    this._compare = new CompareView(find("#compare-view"));
    /** @type {import("./entry.js").Entry | null} */
    this._entry = null;
    this._compared = "";
    this._stop = new AbortController();
    this._isLoading = false;
  }

  /** @param {import("./entry.js").Entry | null} entry null: the chosen pictures */
  show(entry) {
    if (entry !== this._entry) {
      this._stop.abort();
      this._stop = new AbortController();
      this._isLoading = false;
      this._compared = "";
    }
    this._entry = entry;
    document.body.dataset.mode = entry ? "picture" : "drafts";
    if (!entry) this._turnTo("drafts-view");
    else if (WORKING.has(entry.state)) this._showProgress(entry);
    else if (entry.state === "done") this._showDone(entry);
    else this._showEnd(entry);
  }

  /** @param {import("./entry.js").Entry} entry @param {{share: number, text: string} | null} [fetching] */
  _showProgress(entry, fetching = null) {
    this._progress.show(entry, this._pictures.original(entry), fetching);
    this._turnTo("progress-view");
  }

  /** @param {import("./entry.js").Entry} entry */
  _showDone(entry) {
    if (this._pictures.result(entry)) this._showResult(entry);
    else if (!this._isLoading) this._load(entry, this._stop.signal);
  }

  /** @param {import("./entry.js").Entry} entry @param {AbortSignal} signal */
  async _load(entry, signal) {
    this._isLoading = true;
    const tell = (/** @type {number} */ share) => this._entry === entry && this._showProgress(entry, { share, text: "Fetching the result" });
    try {
      tell(0);
      await this._pictures.load(entry, tell, signal);
    } catch (error) {
      if (isAbort(error)) return;
      if (!(error instanceof Problem) && !(error instanceof Unreachable)) throw error;
      this._showUnfetched(entry, error);
      return;
    } finally {
      if (this._entry === entry) this._isLoading = false;
    }
    if (this._entry === entry) this._showResult(entry);
    this._actions.onLoaded(entry);
  }

  /** @param {import("./entry.js").Entry} entry */
  _showResult(entry) {
    const result = entry.job?.result;
    if (!result || this._compared === entry.address) return this._turnTo("compare-view");
    this._compared = entry.address;
    const beforeUrl = this._pictures.original(entry);
    const afterUrl = isShowable(entry) ? this._pictures.result(entry) : "";
    this._turnTo("compare-view");
    return this._compare.show({ beforeUrl, afterUrl, size: result, note: noteOf(entry, beforeUrl, afterUrl) });
  }

  /** @param {import("./entry.js").Entry} entry @param {Problem | Unreachable} problem */
  _showUnfetched(entry, problem) {
    const again = action("Fetch it again", "button primary", () => this._load(entry, this._stop.signal));
    if (problem instanceof Problem) this._message(problem.title, problem.text, [again]);
    else this._message("The result did not arrive", "It is finished and kept. It is fetched when the service answers.", [again]);
  }

  /** @param {import("./entry.js").Entry} entry refused, failed, cancelled or expired */
  _showEnd(entry) {
    const problem = entry.state === "refused" ? entry.upload.problem : problemOfJob(entry.job?.problem);
    const again = action("Change and send again", "button primary", () => this._actions.onAgain(entry));
    const other = action("New picture", entry.original ? "button" : "button primary", this._actions.onNew);
    const actions = entry.original ? [again, other] : [other];
    if (entry.state === "cancelled") this._message("Cancelled", `${entry.title} was not restored.`, actions);
    else if (entry.state === "expired") this._message("No longer kept", `${entry.title} and its result were removed when their time was over.`, actions);
    else this._message(problem.title ?? "It did not work", problem.text ?? problem.message, actions);
  }

  /** @param {string} title @param {string} text @param {HTMLElement[]} actions */
  _message(title, text, actions) {
    const view = find("#message-view");
    const isSame = find(".message-title", view).textContent === title && find(".message-text", view).textContent === text;
    if (!isSame || view.hidden) find(".message-actions", view).replaceChildren(...actions);
    find(".message-title", view).textContent = title;
    find(".message-text", view).textContent = text;
    this._turnTo("message-view");
  }

  /** @param {string} name */
  _turnTo(name) {
    for (const view of VIEWS) find(`#${view}`).hidden = view !== name;
  }
}

/** @param {import("./entry.js").Entry} entry @param {string} beforeUrl @param {string} afterUrl @returns {string} */
function noteOf(entry, beforeUrl, afterUrl) {
  if (!afterUrl) return "Browsers do not show TIFF: download the result to look at it.";
  if (beforeUrl) return "";
  return entry.original ? "Browsers do not show the original, a TIFF." : "The original is not on this device, so there is nothing to compare with.";
}

/** @param {string} text @param {string} className @param {() => void} onClick @returns {HTMLButtonElement} */
function action(text, className, onClick) {
  const button = element("button", { type: "button", className }, text);
  button.addEventListener("click", onClick);
  return button;
}
