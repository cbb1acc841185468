/** Pictures that were chosen and not sent yet: the tray, and what sending them would take. */

import { element, find, icon, setText } from "./element.js";
import { look } from "./picture_file.js";
import { Problem, Unreachable } from "./problem.js";
import { isAbort } from "./retry.js";
import { bytesText, countText, durationText, megapixelsText, priceText, sizeText } from "./words.js";

const SETTLED_MS = 250;

/**
 * @typedef {Object} Draft
 * @property {File} file
 * @property {boolean} isSeen whether the browser has looked at it
 * @property {import("./entry.js").Size | null} size null when only the service can tell
 * @property {Blob | null} thumbnail
 * @property {string} url of the picture, to show it
 * @property {import("./estimates.js").Estimate | null} estimate
 * @property {import("./problem.js").Problem | null} problem why the service would refuse it
 */

export class Drafts {
  /**
   * @param {import("./estimates.js").Estimates} estimates
   * @param {import("./settings_form.js").SettingsForm} settings
   * @param {(text: string) => void} announce
   */
  constructor(estimates, settings, announce) {
    this._estimates = estimates;
    this._settings = settings;
    this._announce = announce;
    /** @type {Draft[]} */
    this._drafts = [];
    /** @type {WeakMap<Draft, HTMLElement>} made once each: a new card would take the focus off its button */
    this._cards = new WeakMap();
    this._timer = 0;
    this._isAsking = false;
    this._view = find("#drafts-view");
    this._list = find(".drafts", this._view);
    this._start = find("#start");
    this._line = find("#estimate");
    find(".clear", this._view).addEventListener("click", () => this.take());
    settings.addEventListener("change", () => this.ask());
    this._show();
  }

  /** @param {File[]} files @returns {Promise<void>} */
  async add(files) {
    const isKnown = (/** @type {File} */ file) => this._drafts.some((draft) => isSame(draft.file, file));
    const fresh = files.filter((file) => !isKnown(file));
    const drafts = fresh.map((file) => ({ file, isSeen: false, size: null, thumbnail: null, url: URL.createObjectURL(file), estimate: null, problem: null }));
    this._drafts.push(...drafts);
    this._show();
    await Promise.all(drafts.map(async (draft) => Object.assign(draft, await look(draft.file), { isSeen: true })));
    this._announce(`${countText(this._drafts.length, "picture")} chosen`);
    this.ask();
  }

  /** @returns {Draft[]} those the service would not refuse; the tray is empty after that */
  take() {
    const taken = this._sendable;
    for (const { url } of this._drafts) URL.revokeObjectURL(url);
    this._drafts = [];
    this._show();
    return taken;
  }

  /** @returns {Draft[]} */
  get _sendable() {
    return this._drafts.filter((draft) => draft.isSeen && !draft.problem);
  }

  /** @param {Draft} draft */
  _remove(draft) {
    URL.revokeObjectURL(draft.url);
    this._drafts = this._drafts.filter((other) => other !== draft);
    this._announce(`${draft.file.name} removed`);
    this._show();
    (/** @type {HTMLElement | null} */ (this._list.querySelector("button")) ?? find("#choose")).focus();
    this.ask();
  }

  /** Asks once the person has stopped turning the settings. */
  ask() {
    this._isAsking = this._drafts.length > 0;
    this._show();
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this._asked(), SETTLED_MS);
  }

  async _asked() {
    if (!this._drafts.length || !this._settings.isValid) return;
    try {
      await this._estimates.ask(this._drafts.filter((draft) => draft.isSeen), this._settings.values);
    } catch (error) {
      // Pictures can be sent without an estimate.
      if (isAbort(error)) return;
      if (!(error instanceof Problem) && !(error instanceof Unreachable)) throw error;
      for (const draft of this._drafts) draft.estimate = null;
    }
    this._isAsking = false;
    this._show();
    this._settings.showProblems(this._drafts.flatMap((draft) => draft.problem?.fields ?? []));
  }

  _show() {
    const count = this._drafts.length;
    find(".welcome", this._view).hidden = count > 0;
    find(".tray", this._view).hidden = count === 0;
    find(".tray-title", this._view).textContent = countText(count, "picture");
    this._list.classList.toggle("is-single", count === 1);
    this._showCards();
    const sendable = this._sendable.length;
    this._start.disabled = sendable === 0;
    find("span", this._start).textContent = sendable > 1 ? `Restore ${sendable} pictures` : "Restore";
    setText(this._line, this._sum());
  }

  _showCards() {
    const cards = this._drafts.map((draft) => this._cards.get(draft) ?? this._card(draft));
    this._drafts.forEach((draft, index) => this._update(draft, cards[index]));
    for (const card of Array.from(this._list.children)) if (!cards.includes(/** @type {HTMLElement} */ (card))) card.remove();
    this._list.append(...cards.filter((card) => !card.isConnected));
  }

  /** @returns {string} */
  _sum() {
    if (!this._drafts.length) return "Choose a picture to see what it takes.";
    const known = this._sendable.map((draft) => draft.estimate).filter((estimate) => estimate !== null);
    if (this._drafts.every((draft) => draft.problem)) return "It cannot be restored as it is.";
    if (!known.length) return this._isAsking ? "Working out what it takes" : "There is no estimate now.";
    const sum = (/** @type {(estimate: import("./estimates.js").Estimate) => number} */ of) => known.reduce((total, estimate) => total + of(estimate), 0);
    const wait = Math.max(...known.map((estimate) => estimate.wait_seconds));
    const parts = [
      megapixelsText(sum((estimate) => estimate.megapixels)),
      roughly(sum((estimate) => estimate.device_seconds)),
      priceText(sum((estimate) => estimate.price), known[0].currency),
      wait >= 1 ? `after a wait of ${durationText(wait)}` : "",
    ];
    return parts.filter(Boolean).join(" \u00b7 ");
  }

  /** @param {Draft} draft @returns {HTMLElement} */
  _card(draft) {
    const { file, url } = draft;
    const picture = element("img", { src: url, alt: "", draggable: false, hidden: true });
    const remove = element("button", { type: "button", className: "button icon remove", "aria-label": `Remove ${file.name}` }, icon("close"));
    remove.addEventListener("click", () => this._remove(draft));
    const card = element(
      "li",
      { className: "draft" },
      element("div", { className: "draft-picture" }, icon("image"), picture, remove),
      element("p", { className: "draft-name", title: file.name }, file.name),
      element("p", { className: "draft-facts" }, element("span", { className: "now" }), element("span", { className: "then" })),
      element("p", { className: "field-problem", role: "alert", hidden: true }),
    );
    this._cards.set(draft, card);
    return card;
  }

  /** @param {Draft} draft @param {HTMLElement} card */
  _update({ file, size, estimate, problem }, card) {
    find("img", card).hidden = !size;
    card.classList.toggle("is-refused", problem !== null);
    setText(find(".now", card), [size ? sizeText(size) : "", bytesText(file.size)].filter(Boolean).join(" \u00b7 "));
    setText(find(".then", card), estimate ? `becomes ${sizeText(estimate.output)}` : "");
    setText(find(".field-problem", card), problem ? `${problem.title}. ${problem.text}` : "");
  }
}

/** @param {number} seconds @returns {string} */
function roughly(seconds) {
  return seconds < 1 ? durationText(seconds) : `about ${durationText(seconds)}`;
}

/** @param {File} a @param {File} b @returns {boolean} */
function isSame(a, b) {
  return a.name === b.name && a.size === b.size && a.lastModified === b.lastModified;
}
