/** The history: a strip of small pictures, the newest first. */

import { element, find, icon, setText } from "./element.js";
import { stateText } from "./words.js";

export class FilmStrip {
  /**
   * @param {import("./job_book.js").JobBook} book
   * @param {{onSelect: (entry: import("./entry.js").Entry) => void, onMore: () => void}} told
   */
  constructor(book, { onSelect, onMore }) {
    this._book = book;
    this._onSelect = onSelect;
    this._list = find("#history-list");
    this._note = find(".history-note");
    /** @type {Map<import("./entry.js").Entry, HTMLElement>} */
    this._cards = new Map();
    const button = element("button", { type: "button", className: "button" }, "Show older");
    button.addEventListener("click", onMore);
    this._more = element("li", { className: "more" }, button);
    /** @type {import("./entry.js").Entry | null} */
    this._selected = null;
    book.addEventListener("change", (event) => this._changed(/** @type {CustomEvent} */ (event).detail));
  }

  /** @param {import("./entry.js").Entry | null} entry */
  select(entry) {
    const before = this._selected;
    this._selected = entry;
    for (const each of [before, entry]) if (each) this._changed(each);
    const card = entry && entry !== before ? this._cards.get(entry) : undefined;
    if (card) this._reveal(card);
  }

  /** Moves the strip alone: scrollIntoView would move the page as well, away from the picture. @param {HTMLElement} card */
  _reveal(card) {
    const [inner, outer] = [card.getBoundingClientRect(), this._list.getBoundingClientRect()];
    if (inner.left < outer.left) this._list.scrollLeft += inner.left - outer.left;
    else if (inner.right > outer.right) this._list.scrollLeft += inner.right - outer.right;
  }

  /** @param {string} text in place of the list's own note */
  tell(text) {
    setText(this._note, text);
  }

  /** @param {import("./entry.js").Entry | null} entry null: the list itself */
  _changed(entry) {
    if (!entry) this._showAll();
    else if (this._cards.has(entry)) this._update(entry, /** @type {HTMLElement} */ (this._cards.get(entry)));
  }

  _showAll() {
    const entries = this._book.entries;
    for (const entry of this._cards.keys()) if (!entries.includes(entry)) this._cards.delete(entry);
    for (const entry of entries) if (!this._cards.has(entry)) this._cards.set(entry, this._card(entry));
    const cards = entries.map((entry) => /** @type {HTMLElement} */ (this._cards.get(entry)));
    const focused = document.activeElement;
    this._list.replaceChildren(...cards, ...(this._book.hasMore ? [this._more] : []));
    if (focused instanceof HTMLElement && this._list.contains(focused)) focused.focus();
    if (this._book.isLoaded) setText(this._note, entries.length ? "" : "What you restore appears here, and stays until it expires.");
  }

  /** @param {import("./entry.js").Entry} entry @returns {HTMLElement} */
  _card(entry) {
    const button = element(
      "button",
      { type: "button", className: "frame" },
      element("span", { className: "frame-picture" }, icon("image"), element("img", { alt: "", hidden: true, draggable: false }), element("span", { className: "frame-meter" })),
      element("span", { className: "frame-name" }),
      element("span", { className: "frame-state" }),
    );
    button.addEventListener("click", () => this._onSelect(entry));
    const card = element("li", {}, button);
    this._update(entry, card);
    return card;
  }

  /** @param {import("./entry.js").Entry} entry @param {HTMLElement} card */
  _update(entry, card) {
    const button = find("button", card);
    const image = find("img", card);
    const url = entry.thumbnailUrl || entry.preview;
    image.hidden = !url;
    if (url && image.getAttribute("src") !== url) image.src = url;
    button.dataset.state = entry.state;
    button.setAttribute("aria-current", String(entry === this._selected));
    setText(find(".frame-name", card), entry.title);
    setText(find(".frame-state", card), stateText(entry));
    const share = entry.job ? entry.job.progress : entry.upload.sent;
    find(".frame-meter", card).style.setProperty("--share", String(share));
  }
}
