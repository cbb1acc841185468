/** Where a key is entered, looked at and forgotten. */

import { find, setText } from "./element.js";
import { Problem, Unreachable } from "./problem.js";
import { megapixelsText } from "./words.js";

export class KeyDialog {
  /**
   * @param {import("./api.js").Api} api
   * @param {import("./access_key.js").AccessKey} key
   * @param {() => void} onAccepted
   */
  constructor(api, key, onAccepted) {
    this._api = api;
    this._key = key;
    this._onAccepted = onAccepted;
    this._dialog = /** @type {HTMLDialogElement} */ (/** @type {unknown} */ (find("#key-dialog")));
    this._button = find("#key-button");
    this._value = find("#key-value");
    this._remember = find("#key-remember");
    this._button.addEventListener("click", () => this.open());
    find("#key-close").addEventListener("click", () => this._dialog.close());
    find("#key-forget").addEventListener("click", () => this._forget());
    find("form", this._dialog).addEventListener("submit", (event) => this._submit(event));
    this._showButton(Boolean(key.value), false);
  }

  /** @param {string} [problem] with the key that was sent last */
  open(problem = "") {
    this._showButton(true, !this._key.value || Boolean(problem));
    if (this._dialog.open) return;
    this._value.value = this._key.value;
    this._remember.checked = this._key.isRemembered;
    this._tell(problem);
    setText(find("#key-usage"), "");
    find("#key-forget").hidden = !this._key.value;
    this._dialog.showModal();
    if (this._key.value && !problem) this._showUsage();
  }

  /** @param {Event} event */
  async _submit(event) {
    event.preventDefault();
    const value = this._value.value.trim();
    if (!value) return this._tell("Enter the key that the operator gave you");
    this._key.set(value, this._remember.checked);
    try {
      await this._api.usage();
    } catch (error) {
      if (error instanceof Problem) return this._tell(error.text);
      if (error instanceof Unreachable) return this._tell("The service does not answer; try again in a moment");
      throw error;
    }
    this._showButton(true, false);
    this._dialog.close();
    return this._onAccepted();
  }

  _forget() {
    this._key.set("", false);
    this._value.value = "";
    this._dialog.close();
    this._showButton(true, true);
    this._onAccepted();
  }

  async _showUsage() {
    try {
      const { key, today, limits } = await this._api.usage();
      const share = limits.megapixels_per_day ? ` of ${megapixelsText(limits.megapixels_per_day)}` : "";
      setText(find("#key-usage"), `${key}: ${today.requests} requests and ${megapixelsText(today.megapixels)}${share} today.`);
    } catch (error) {
      if (!(error instanceof Problem) && !(error instanceof Unreachable)) throw error;
      this._tell(error.message);
    }
  }

  /** @param {string} text */
  _tell(text) {
    setText(find("#key-problem"), text);
    this._value.setAttribute("aria-invalid", String(Boolean(text)));
  }

  /** @param {boolean} isShown @param {boolean} isWanted */
  _showButton(isShown, isWanted) {
    this._button.hidden = !isShown;
    this._button.classList.toggle("is-wanted", isWanted);
    find(".label", this._button).textContent = isWanted ? "Enter key" : "Key";
  }
}
