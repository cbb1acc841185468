/** Whether the service answers, and whether a model is loaded: the word in the header, and the banner below it. */

import { find } from "./element.js";
import { Problem, Unreachable } from "./problem.js";
import { delaySeconds } from "./retry.js";
import { durationText } from "./words.js";

const READY_LOOK_MS = 30000;
const STARTING_LOOK_MS = 5000;

export class ServiceStatus {
  /**
   * @param {import("./api.js").Api} api
   * @param {() => void} onBack it answers again
   * @param {(hasCaptioner: boolean) => void} onAbilities it has said what it can do
   */
  constructor(api, onBack, onAbilities) {
    this._api = api;
    this._onBack = onBack;
    this._onAbilities = onAbilities;
    this._isAway = false;
    this._attempt = 0;
    this._timer = 0;
    this._clock = 0;
    this._endsAt = 0;
    this._banner = find("#connection");
    this._chip = find("#service-status");
    find("button", this._banner).addEventListener("click", () => this.look());
    api.addEventListener("unreached", () => this._away());
    api.addEventListener("reached", () => this._reached());
    addEventListener("online", () => this.look());
    addEventListener("offline", () => this._away());
    document.addEventListener("visibilitychange", () => !document.hidden && this.look());
  }

  /** Looks now, and again by itself. @returns {Promise<void>} */
  async look() {
    clearTimeout(this._timer);
    let next = READY_LOOK_MS;
    try {
      const { status, model_version: version, has_captioner: hasCaptioner } = await this._api.readiness();
      this._onAbilities(hasCaptioner);
      if (status === "ready") this._tell("ready", "Ready", `Model ${version}`);
      else this._tell("asleep", "Asleep", "The first picture starts a replica, and waits for it.");
    } catch (error) {
      if (error instanceof Unreachable) return;
      if (!(error instanceof Problem)) throw error;
      next = STARTING_LOOK_MS;
      if (error.status === 503) this._tell("starting", "Starting", "No model is loaded yet. Pictures can be sent; they wait for it.");
      else this._tell("problem", "Problem", error.text);
    }
    this._later(next);
  }

  _away() {
    const seconds = delaySeconds(this._attempt);
    // Several requests fail at once; each would start the wait anew.
    if (this._isAway && this._timer && this._endsAt > Date.now()) return;
    this._isAway = true;
    this._attempt += 1;
    this._endsAt = Date.now() + seconds * 1000;
    this._tell("away", navigator.onLine ? "No answer" : "Offline", "Nothing is lost: what was accepted goes on without this page.");
    this._banner.hidden = false;
    this._later(seconds * 1000);
    clearInterval(this._clock);
    this._clock = setInterval(() => this._count(), 1000);
    this._count();
  }

  _count() {
    const seconds = Math.max(1, Math.ceil((this._endsAt - Date.now()) / 1000));
    const what = navigator.onLine ? "The service does not answer." : "This device is offline.";
    find(".label", this._banner).textContent = `${what} Trying again in ${durationText(seconds)}; nothing is lost.`;
  }

  _reached() {
    if (!this._isAway) return;
    this._isAway = false;
    this._attempt = 0;
    clearInterval(this._clock);
    this._banner.hidden = true;
    this._onBack();
    this.look();
  }

  /** @param {number} milliseconds */
  _later(milliseconds) {
    clearTimeout(this._timer);
    this._timer = setTimeout(() => {
      this._timer = 0;
      this.look();
    }, milliseconds);
  }

  /** @param {string} state @param {string} label @param {string} title */
  _tell(state, label, title) {
    this._chip.dataset.state = state;
    this._chip.title = title;
    find(".label", this._chip).textContent = label;
  }
}
