/** The settings: the fields of the service's own form, by the same names and within the same limits. */

import { element, find } from "./element.js";

const STORED = "faithdiff.settings";
// What a person says of one picture is not right for the next.
const NOT_KEPT = new Set(["prompt", "negative_prompt", "seed", "auto_prompt"]);
const LOSSLESS = new Set(["png", "tiff"]);

export class SettingsForm extends EventTarget {
  /**
   * Events: "change" when a value has changed, "start" when the person wants to begin and all values are in order.
   *
   * @param {HTMLFormElement} form
   */
  constructor(form) {
    super();
    this._form = form;
    this._range = find("#steps-range", form);
    this._steps = find("#steps", form);
    this._addProblemLines();
    this._form.addEventListener("input", (event) => this._onInput(/** @type {any} */ (event.target)));
    this._form.addEventListener("submit", (event) => this._onSubmit(event));
    find("#random-seed", form).addEventListener("click", () => this._drawSeed());
    find("#reset-settings", form).addEventListener("click", () => this._reset());
    this.values = JSON.parse(localStorage.getItem(STORED) ?? "{}");
  }

  /** @returns {import("./entry.js").Settings} */
  get values() {
    const values = /** @type {import("./entry.js").Settings} */ ({});
    for (const control of this._controls()) {
      if (control.type === "radio" && !control.checked) continue;
      values[control.name] = valueOf(control);
    }
    return values;
  }

  /** @param {import("./entry.js").Settings} values some or all; others stay as they are */
  set values(values) {
    for (const control of this._controls()) {
      const value = values[control.name];
      if (value === undefined) continue;
      if (control.type === "radio") control.checked = control.value === String(value);
      else if (control.type === "checkbox") control.checked = Boolean(value);
      else control.value = String(value);
    }
    this._show();
  }

  /** @param {boolean} can whether the service describes pictures itself */
  offerDescriptions(can) {
    find("[data-field=auto_prompt]", this._form).hidden = !can;
    if (!can) find("[name=auto_prompt]", this._form).checked = false;
  }

  /** @returns {boolean} whether all values are within their limits */
  get isValid() {
    return this._controls().every((control) => control.validity.valid);
  }

  /** @param {{field: string, detail: string}[]} problems as the service names them @returns {boolean} whether one is shown */
  showProblems(problems) {
    const shown = problems.filter(({ field, detail }) => this._tell(field, detail));
    const first = shown[0] && this._controls().find((control) => control.name === shown[0].field);
    first?.closest("details")?.setAttribute("open", "");
    return shown.length > 0;
  }

  /** @returns {(HTMLInputElement & HTMLSelectElement)[]} */
  _controls() {
    return /** @type {any[]} */ (Array.from(this._form.elements)).filter((control) => control.name);
  }

  _addProblemLines() {
    for (const field of /** @type {NodeListOf<HTMLElement>} */ (this._form.querySelectorAll("[data-field]"))) {
      const id = `${field.dataset.field}-problem`;
      field.append(element("p", { id, className: "field-problem", hidden: true }));
      field.querySelectorAll("[name]").forEach((control) => control.setAttribute("aria-describedby", id));
    }
  }

  /** @param {HTMLInputElement} control */
  _onInput(control) {
    if (control === this._range) this._steps.value = this._range.value;
    this._show();
    localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(Object.entries(this.values).filter(([name]) => !NOT_KEPT.has(name)))));
    this.dispatchEvent(new Event("change"));
  }

  /** @param {Event} event */
  _onSubmit(event) {
    event.preventDefault();
    const wrong = this._controls().find((control) => !control.validity.valid);
    if (!wrong) {
      this.dispatchEvent(new Event("start"));
      return;
    }
    wrong.closest("details")?.setAttribute("open", "");
    wrong.focus();
  }

  _show() {
    this._range.value = this._steps.value;
    this._range.style.setProperty("--share", String((Number(this._range.value) - 1) / (Number(this._range.max) - 1)));
    for (const control of this._controls()) this._tell(control.name, control.validity.valid ? "" : limitOf(control));
    const described = find("[name=auto_prompt]", this._form);
    described.disabled = Boolean(this.values.prompt);
    described.checked &&= !described.disabled;
    const quality = find("#quality", this._form);
    quality.disabled = LOSSLESS.has(String(this.values.output_format));
    find("[data-field=output_quality]", this._form).classList.toggle("is-off", quality.disabled);
  }

  /** @param {string} field @param {string} text @returns {boolean} whether there is such a field */
  _tell(field, text) {
    const line = document.getElementById(`${field}-problem`);
    if (!line) return false;
    line.textContent = text;
    line.hidden = !text;
    for (const control of this._controls()) if (control.name === field) control.setAttribute("aria-invalid", String(Boolean(text)));
    return true;
  }

  _drawSeed() {
    const seed = find("#seed", this._form);
    seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    this._onInput(seed);
  }

  _reset() {
    this._form.reset();
    this._onInput(this._steps);
  }
}

/** @param {HTMLInputElement} control @returns {string | number | boolean} */
function valueOf(control) {
  if (control.type === "checkbox") return control.checked;
  return control.type === "number" || control.type === "radio" ? Number(control.value) : control.value;
}

/** @param {HTMLInputElement} control @returns {string} */
function limitOf(control) {
  if (control.type !== "number") return control.validationMessage;
  const whole = control.step === "1" ? "a whole number" : "a number";
  return control.name === "seed" ? "Enter a whole number, 0 or more" : `Enter ${whole} from ${control.min} to ${control.max}`;
}
