/** Before and after in one window, with a line between them that can be moved; zoom, and moving around. */

import { find, setText } from "./element.js";
import { listen } from "./gestures.js";
import { Viewport } from "./viewport.js";

const ZOOM_STEP = 1.5;
const PAN_PX = 60;
const GRAB_PX = 22;

/** @typedef {"before" | "both" | "after"} Side */

export class CompareView {
  /** @param {HTMLElement} view */
  constructor(view) {
    this._view = view;
    this._window = find(".window", view);
    this._slider = find(".split", view);
    this._before = find(".before img", view);
    this._after = find(".after img", view);
    this._viewport = new Viewport();
    /** @type {Side} */
    this._side = "both";
    this._split = 50;
    this._isOnSplit = false;
    this._addPointers();
    this._addKeys();
    this._addToolbar();
    new ResizeObserver(() => this._resized()).observe(this._window);
  }

  /**
   * @param {{beforeUrl: string, afterUrl: string, size: import("./entry.js").Size, note: string}} pictures
   *   size: of the restored one; an URL is empty when there is no such picture here; note: why
   */
  show({ beforeUrl, afterUrl, size, note }) {
    for (const [image, url] of /** @type {[HTMLImageElement, string][]} */ ([[this._before, beforeUrl], [this._after, afterUrl]])) {
      if (url) image.src = url;
      else image.removeAttribute("src");
      // Both in the pixels of the result: the original is seen enlarged, at the same place.
      image.width = size.width;
      image.height = size.height;
    }
    setText(find(".compare-note", this._view), note);
    const isPair = Boolean(beforeUrl && afterUrl);
    find(".sides", this._view).hidden = !isPair;
    this._split = 50;
    this._viewport.show(size);
    this._resized();
    this._show(isPair ? "both" : afterUrl ? "after" : "before");
  }

  _addPointers() {
    this._window.addEventListener("pointerdown", (event) => {
      const x = event.clientX - this._window.getBoundingClientRect().left;
      const isNear = Math.abs(x - (this._split / 100) * this._window.clientWidth) < GRAB_PX;
      this._isOnSplit = this._side === "both" && (isNear || this._viewport.isFitted);
    });
    listen(this._window, {
      onMove: (point, dx, dy) => {
        if (this._isOnSplit) this._setSplit((point.x / this._window.clientWidth) * 100);
        else this._change(() => this._viewport.pan(dx, dy));
      },
      onZoom: (factor, { x, y }) => this._change(() => this._viewport.zoom(factor, x, y)),
      onDouble: ({ x, y }) => this._change(() => (this._viewport.isFitted ? this._viewport.zoom(this._toActual(), x, y) : this._viewport.fit())),
    });
  }

  _addKeys() {
    const moves = /** @type {Record<string, [number, number]>} */ ({ ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] });
    const zooms = /** @type {Record<string, () => void>} */ ({
      "+": () => this._viewport.zoom(ZOOM_STEP),
      "=": () => this._viewport.zoom(ZOOM_STEP),
      "-": () => this._viewport.zoom(1 / ZOOM_STEP),
      0: () => this._viewport.fit(),
      1: () => this._viewport.actual(),
    });
    this._window.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const move = event.target === this._window ? moves[event.key] : undefined;
      const change = zooms[event.key] ?? (move && (() => this._viewport.pan(move[0] * PAN_PX, move[1] * PAN_PX)));
      if (!change) return;
      event.preventDefault();
      this._change(change);
    });
    this._slider.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 10 : 1;
      const steps = /** @type {Record<string, number>} */ ({
        ArrowLeft: -far, ArrowDown: -far, ArrowRight: far, ArrowUp: far, PageDown: -10, PageUp: 10, Home: -100, End: 100,
      });
      if (!(event.key in steps)) return;
      event.preventDefault();
      this._setSplit(this._split + steps[event.key]);
    });
  }

  _addToolbar() {
    const on = (/** @type {string} */ selector, /** @type {() => void} */ change) =>
      find(selector, this._view).addEventListener("click", () => this._change(change));
    on(".zoom-in", () => this._viewport.zoom(ZOOM_STEP));
    on(".zoom-out", () => this._viewport.zoom(1 / ZOOM_STEP));
    on(".fit", () => this._viewport.fit());
    on(".actual", () => this._viewport.actual());
    for (const button of /** @type {NodeListOf<HTMLElement>} */ (this._view.querySelectorAll("[data-side]"))) {
      button.addEventListener("click", () => this._show(/** @type {Side} */ (button.dataset.side)));
    }
  }

  /** @returns {number} factor to one pixel on one pixel; pictures that fit at that size are doubled instead */
  _toActual() {
    const factor = 100 / this._viewport.percent;
    return factor > 1.05 ? factor : 2;
  }

  /** @param {Side} side */
  _show(side) {
    this._side = side;
    this._view.dataset.side = side;
    for (const button of this._view.querySelectorAll("[data-side]")) {
      button.setAttribute("aria-pressed", String(/** @type {HTMLElement} */ (button).dataset.side === side));
    }
    this._setSplit(this._split);
  }

  /** @param {number} percent of the window, from its left */
  _setSplit(percent) {
    this._split = Math.min(100, Math.max(0, percent));
    const whole = Math.round(this._split);
    this._slider.setAttribute("aria-valuenow", String(whole));
    this._slider.setAttribute("aria-valuetext", `${whole} % before, ${100 - whole} % after`);
    this._window.style.setProperty("--split", `${this._split}%`);
    this._window.classList.toggle("hides-before", this._split < 12);
    this._window.classList.toggle("hides-after", this._split > 88);
  }

  /** @param {() => void} change of the viewport */
  _change(change) {
    change();
    const { x, y, scale, percent, isFitted } = this._viewport;
    for (const image of [this._before, this._after]) image.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    find(".zoom-value", this._view).textContent = `${Math.round(percent)} %`;
    this._window.classList.toggle("is-zoomed", !isFitted);
    find(".fit", this._view).setAttribute("aria-pressed", String(isFitted));
    find(".actual", this._view).setAttribute("aria-pressed", String(Math.abs(percent - 100) < 0.5));
  }

  _resized() {
    const { clientWidth: width, clientHeight: height } = this._window;
    if (width && height) this._change(() => this._viewport.resize({ width, height }, devicePixelRatio));
  }
}
