/** The service over HTTP, as docs describe it. Nothing here knows about the page. */

import { Problem, Unreachable, problemOf } from "./problem.js";

export class Api extends EventTarget {
  /**
   * Events: "reached" and "unreached" as answers come or do not, "unauthorized" when a key is needed.
   *
   * @param {import("./access_key.js").AccessKey} key
   * @param {string} [base] the page's own address: a proxy may serve it below a path
   */
  constructor(key, base = document.baseURI) {
    super();
    this._key = key;
    this._base = base;
  }

  /**
   * @param {{limit?: number, cursor?: string | null}} [query]
   * @returns {Promise<{jobs: import("./entry.js").Job[], next_cursor: string | null}>} the newest first
   */
  async page({ limit = 20, cursor = null } = {}) {
    const query = new URLSearchParams({ limit: String(limit), ...(cursor ? { cursor } : {}) });
    return (await this._request(`v1/jobs?${query}`)).json();
  }

  /** @param {string} id @returns {Promise<import("./entry.js").Job>} */
  async job(id) {
    return (await this._request(`v1/jobs/${id}`)).json();
  }

  /** @param {string} id @returns {Promise<import("./entry.js").Job>} as it is after that */
  async cancel(id) {
    return (await this._request(`v1/jobs/${id}`, { method: "DELETE" })).json();
  }

  /**
   * @param {import("./entry.js").Settings} settings
   * @param {import("./entry.js").Size | null} size in pixels; null when only the service can tell
   * @param {File} file sent only without a size
   * @param {AbortSignal} signal
   * @returns {Promise<{megapixels: number, device_seconds: number, wait_seconds: number, price: number,
   *   currency: string, input: import("./entry.js").Size, output: import("./entry.js").Size}>}
   */
  async estimate(settings, size, file, signal) {
    const body = size ? JSON.stringify({ ...settings, ...size }) : formOf(file, file.name, settings);
    const headers = size ? { "Content-Type": "application/json" } : {};
    return (await this._request("v1/estimate", { method: "POST", body, headers, signal })).json();
  }

  /** @returns {Promise<{key: string, today: any, limits: any}>} */
  async usage() {
    return (await this._request("v1/usage")).json();
  }

  /** @returns {Promise<{status: "ready" | "asleep", model_version: string | null, has_captioner: boolean}>} Raises Problem 503 while starting. */
  async readiness() {
    return (await this._request("readyz")).json();
  }

  /**
   * @param {string} id
   * @param {(share: number) => void} onProgress 0 to 1
   * @param {AbortSignal} signal
   * @returns {Promise<Blob>}
   */
  async result(id, onProgress, signal) {
    const response = await this._request(`v1/jobs/${id}/result`, { signal });
    const total = Number(response.headers.get("Content-Length"));
    const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
    const parts = [];
    for (let received = 0; ;) {
      const { done, value } = await reader.read().catch((error) => { throw this._unreached(error); });
      if (done) return new Blob(parts, { type: response.headers.get("Content-Type") ?? "" });
      parts.push(value);
      received += value.length;
      if (total) onProgress(received / total);
    }
  }

  /**
   * @param {string} id
   * @param {string} lastEventId
   * @param {AbortSignal} signal
   * @returns {Promise<Response>} of text/event-stream; 204 when the last event has been sent before
   */
  events(id, lastEventId, signal) {
    const headers = { Accept: "text/event-stream", ...(lastEventId ? { "Last-Event-ID": lastEventId } : {}) };
    return this._request(`v1/jobs/${id}/events`, { headers, signal });
  }

  /**
   * Sends a picture. The same `idempotencyKey` makes one job however often it is sent.
   *
   * @param {import("./entry.js").Entry} entry
   * @param {(share: number) => void} onProgress 0 to 1
   * @param {AbortSignal} signal
   * @returns {Promise<import("./entry.js").Job>}
   */
  submit(entry, onProgress, signal) {
    // fetch does not tell how much of a body is sent.
    const request = new XMLHttpRequest();
    request.open("POST", this._url("v1/jobs"));
    request.setRequestHeader("Idempotency-Key", entry.id);
    for (const [name, value] of Object.entries(this._key.headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    const stop = () => request.abort();
    signal.addEventListener("abort", stop, { once: true });
    const answer = new Promise((resolve, reject) => {
      request.onload = () => {
        if (request.status === 202) resolve(JSON.parse(request.responseText));
        else reject(problemOf(request.status, request.responseText, request.getResponseHeader("Retry-After")));
      };
      request.onerror = () => reject(new Unreachable());
      request.onabort = () => reject(signal.reason);
    });
    request.send(formOf(/** @type {Blob} */ (entry.original), entry.name, entry.settings));
    return answer.then((job) => this._reached(job), (error) => this._failed(error)).finally(() => signal.removeEventListener("abort", stop));
  }

  /**
   * @param {string} path
   * @param {RequestInit} [init]
   * @returns {Promise<Response>}
   */
  async _request(path, init = {}) {
    let response;
    try {
      response = await fetch(this._url(path), { ...init, headers: { ...this._key.headers, ...init.headers } });
    } catch (error) {
      throw this._unreached(error);
    }
    if (!response.ok) {
      const body = await response.text().catch(() => "");
      return this._failed(problemOf(response.status, body, response.headers.get("Retry-After")));
    }
    return this._reached(response);
  }

  /** @param {string} path */
  _url(path) {
    return new URL(path, this._base).href;
  }

  /** @template T @param {T} answer @returns {T} */
  _reached(answer) {
    this.dispatchEvent(new Event("reached"));
    return answer;
  }

  /** @param {unknown} error @returns {never} */
  _failed(error) {
    if (error instanceof Unreachable) throw this._unreached(error);
    if (error instanceof Problem) {
      // What stands before the service answers 502 and 504 while it is away.
      this.dispatchEvent(new Event(error.status === 502 || error.status === 504 ? "unreached" : "reached"));
      if (error.status === 401) this.dispatchEvent(new CustomEvent("unauthorized", { detail: error }));
    }
    throw error;
  }

  /** @param {unknown} error @returns {unknown} what to throw: that no answer came, or that none was wanted any more */
  _unreached(error) {
    if (error instanceof DOMException && error.name === "AbortError") return error;
    this.dispatchEvent(new Event("unreached"));
    return error instanceof Unreachable ? error : new Unreachable();
  }
}

/**
 * @param {Blob} file
 * @param {string} name
 * @param {import("./entry.js").Settings} settings
 * @returns {FormData}
 */
function formOf(file, name, settings) {
  const form = new FormData();
  for (const [field, value] of Object.entries(settings)) form.append(field, String(value));
  form.append("picture", file, name || "picture");
  return form;
}
