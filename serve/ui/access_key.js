/** The key of services that ask for one. It is kept until the tab closes, and longer only by choice. */

const NAME = "faithdiff.key";

export class AccessKey extends EventTarget {
  /** @returns {string} "" without one */
  get value() {
    return sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "";
  }

  /** @returns {boolean} */
  get isRemembered() {
    return localStorage.getItem(NAME) !== null;
  }

  /**
   * @param {string} value
   * @param {boolean} remember on this device, after the tab has been closed
   */
  set(value, remember) {
    localStorage.removeItem(NAME);
    sessionStorage.removeItem(NAME);
    if (value) (remember ? localStorage : sessionStorage).setItem(NAME, value);
    this.dispatchEvent(new Event("change"));
  }

  /** @returns {Record<string, string>} */
  get headers() {
    return this.value ? { Authorization: `Bearer ${this.value}` } : {};
  }
}
