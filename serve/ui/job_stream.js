/** A job's server-sent events, read with fetch: EventSource can send no Authorization header. */

import { Unreachable } from "./problem.js";
import { delaySeconds, isAbort, sleep } from "./retry.js";

// The service sends a comment every 15 s; a connection that is silent for longer is dead, whatever the system says.
const SILENCE_S = 45;

/** @typedef {{event: string, id: string, data: string}} ServerEvent */

/** Text of an event stream in pieces of any length, to events. HTML Living Standard, 9.2.6. */
export class EventParser {
  constructor() {
    this._rest = "";
    this._event = { event: "message", id: "", data: "" };
    this._hasData = false;
  }

  /** @param {string} text @returns {ServerEvent[]} those that are complete */
  push(text) {
    const events = [];
    const lines = (this._rest + text).split(/\r\n|\n|\r(?!$)/);
    this._rest = /** @type {string} */ (lines.pop());
    for (const line of lines) {
      if (line) this._take(line);
      else if (this._hasData) events.push(this._complete());
    }
    return events;
  }

  /** @param {string} line */
  _take(line) {
    const colon = line.indexOf(":");
    if (colon === 0) return;
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") {
      this._event.data += (this._hasData ? "\n" : "") + value;
      this._hasData = true;
    } else if (field === "event" || field === "id") this._event[field] = value;
  }

  /** @returns {ServerEvent} */
  _complete() {
    const event = this._event;
    this._event = { event: "message", id: event.id, data: "" };
    this._hasData = false;
    return event;
  }
}

/**
 * Follows a job to its end, over broken connections and restarts of the service.
 *
 * @param {import("./api.js").Api} api
 * @param {string} jobId
 * @param {(name: string, data: any) => void} onEvent "progress", then one of "done", "failed", "cancelled", "expired"
 * @param {AbortSignal} signal
 * @returns {Promise<void>} when the job has ended or is gone
 */
export async function followJob(api, jobId, onEvent, signal) {
  let lastEventId = "";
  for (let attempt = 0; !signal.aborted; attempt += 1) {
    try {
      const response = await api.events(jobId, lastEventId, signal);
      if (response.status === 204) return;
      for await (const event of eventsOf(response)) {
        attempt = 0;
        lastEventId = event.id;
        onEvent(event.event, JSON.parse(event.data));
        if (event.event !== "progress") return;
      }
    } catch (error) {
      if (isAbort(error)) return;
      if (!(/** @type {any} */ (error).isPassing)) throw error;
    }
    // Without an answer and after a stream that ended early alike.
    await sleep(delaySeconds(attempt), signal).catch((reason) => { if (!isAbort(reason)) throw reason; });
  }
}

/** @param {Response} response @returns {AsyncGenerator<ServerEvent>} */
async function* eventsOf(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await Promise.race([reader.read().catch(lost), sleep(SILENCE_S).then(lost)]);
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

/** @param {unknown} [error] @returns {never} */
function lost(error) {
  throw isAbort(error) ? error : new Unreachable();
}
