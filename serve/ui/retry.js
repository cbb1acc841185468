/** Waiting, and trying again. */

const FIRST_S = 1;
const LONGEST_S = 20;

/**
 * Seconds before the next attempt: what the service asks for, else twice as long each time, with a random part so
 * that the pages of many people do not come back at once.
 *
 * @param {number} attempt 0 for the first retry
 * @param {number | null} [asked] Retry-After
 * @returns {number}
 */
export function delaySeconds(attempt, asked = null) {
  if (asked !== null) return asked + Math.random();
  return Math.min(LONGEST_S, FIRST_S * 2 ** attempt) * (0.75 + Math.random() / 2);
}

/**
 * @param {number} seconds
 * @param {AbortSignal} [signal]
 * @returns {Promise<void>} rejected with the signal's reason when it is aborted
 */
export function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const timer = setTimeout(done, seconds * 1000);
    function done() {
      signal?.removeEventListener("abort", stop);
      resolve();
    }
    function stop() {
      clearTimeout(timer);
      reject(signal?.reason);
    }
    signal?.addEventListener("abort", stop, { once: true });
    return undefined;
  });
}

/** @param {unknown} error @returns {boolean} */
export function isAbort(error) {
  return error instanceof DOMException && error.name === "AbortError";
}
