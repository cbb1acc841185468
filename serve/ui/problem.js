/** What the service answers when it cannot do what was asked (RFC 9457), and what people are told of it. */

const TITLES = /** @type {Record<string, string>} */ ({
  "unsupported-picture": "This is not a picture it can read",
  "unreadable-picture": "The file is damaged",
  "upload-too-large": "The file is too large",
  "picture-too-large": "The picture is too large",
  "result-too-large": "The result would be too large",
  "invalid-fields": "A setting is not right",
  "limit-reached": "The limit of your key is reached",
  "key-queue-full": "Enough of your pictures wait already",
  "queue-full": "The service is busy",
  "not-ready": "The service is starting",
  "no-replica-free": "The service is busy",
  "unauthorized": "A key is needed",
  "local-only": "Only for its own machine",
  "internal-error": "The service failed",
  "no-such-job": "This picture is gone",
  "no-result": "The result is gone",
  "refused-by-model": "The picture was refused",
});

export class Problem extends Error {
  /**
   * @param {number} status
   * @param {{type?: string, title?: string, detail?: string, errors?: {field: string, detail: string}[]}} body
   * @param {number | null} [retryAfterSeconds]
   */
  constructor(status, body, retryAfterSeconds = null) {
    super(body.detail || body.title || `The service answered ${status}`);
    this.status = status;
    this.kind = (body.type ?? "").replace(/^.*:/, "");
    this.fields = body.errors ?? [];
    this.retryAfterSeconds = retryAfterSeconds;
  }

  /** @returns {string} a headline */
  get title() {
    return TITLES[this.kind] ?? (this.kind ? sentence(this.kind.replaceAll("-", " ")) : "The service could not do this");
  }

  /** @returns {string} what came, what is allowed, what to change; without the machine's name of the place */
  get text() {
    return sentence(this.message.replace(/^(picture|request|job|key|queue|service|result|restorer): /, ""));
  }

  /** @returns {boolean} whether the same request may succeed a little later */
  get isPassing() {
    return this.status === 429 || this.status === 502 || this.status === 503 || this.status === 504;
  }
}

/** No answer came: the network or the whole service is away. */
export class Unreachable extends Error {
  constructor() {
    super("The service does not answer");
  }

  get isPassing() {
    return true;
  }
}

/**
 * @param {number} status
 * @param {string} body as it came; what is between here and the service may answer without JSON
 * @param {string | null} retryAfter the header
 * @returns {Problem}
 */
export function problemOf(status, body, retryAfter) {
  let parsed = {};
  try {
    parsed = JSON.parse(body);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
  }
  const seconds = Number(retryAfter);
  return new Problem(status, parsed ?? {}, retryAfter && Number.isFinite(seconds) ? seconds : null);
}

/**
 * @param {{type?: string, detail?: string} | null | undefined} json as a failed job carries it
 * @returns {Problem}
 */
export function problemOfJob(json) {
  return new Problem(422, json ?? { detail: "The service does not say why" });
}

/** @param {string} text @returns {string} */
function sentence(text) {
  return text ? text[0].toUpperCase() + text.slice(1) : text;
}
