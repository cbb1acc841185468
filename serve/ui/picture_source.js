/** Where pictures come in: the file dialog, drops anywhere on the page, the clipboard. */

import { find } from "./element.js";
import { MEDIA_TYPES } from "./picture_file.js";

export class PictureSource {
  /**
   * @param {(files: File[]) => void} onPictures
   * @param {(names: string[]) => void} onOthers files that are no pictures of a kind the service reads
   */
  constructor(onPictures, onOthers) {
    this._onPictures = onPictures;
    this._onOthers = onOthers;
    this._input = find("#file-input");
    this._veil = find("#drop-veil");
    // Entering a child is told before leaving its parent.
    this._depth = 0;
    this._input.addEventListener("change", () => this._chosen());
    document.addEventListener("dragenter", (event) => this._dragged(event, 1));
    document.addEventListener("dragleave", (event) => this._dragged(event, -1));
    document.addEventListener("dragover", (event) => isFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => this._dropped(event));
    document.addEventListener("paste", (event) => this._pasted(event));
  }

  /** Opens the file dialog. */
  choose() {
    this._input.click();
  }

  _chosen() {
    this._take(Array.from(this._input.files ?? []));
    // The same file again must be a change again.
    this._input.value = "";
  }

  /** @param {DragEvent} event @param {number} step */
  _dragged(event, step) {
    if (!isFiles(event)) return;
    event.preventDefault();
    this._depth = Math.max(0, this._depth + step);
    this._veil.hidden = this._depth === 0;
  }

  /** @param {DragEvent} event */
  _dropped(event) {
    if (!isFiles(event)) return;
    event.preventDefault();
    this._depth = 0;
    this._veil.hidden = true;
    this._take(Array.from(event.dataTransfer?.files ?? []));
  }

  /** @param {ClipboardEvent} event */
  _pasted(event) {
    const files = Array.from(event.clipboardData?.files ?? []);
    if (!files.length) return;
    event.preventDefault();
    this._take(files);
  }

  /** @param {File[]} files */
  _take(files) {
    // Some systems give TIFF no type at all.
    const isPicture = (/** @type {File} */ file) => MEDIA_TYPES.includes(file.type) || (!file.type && /\.tiff?$/i.test(file.name));
    const pictures = files.filter(isPicture);
    if (pictures.length) this._onPictures(pictures);
    this._onOthers(files.filter((file) => !isPicture(file)).map((file) => file.name));
  }
}

/** @param {DragEvent} event @returns {boolean} */
function isFiles(event) {
  return event.dataTransfer?.types.includes("Files") ?? false;
}
