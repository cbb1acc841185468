/** Figures and states in words that people use. */

const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** @param {number} bytes @returns {string} such as "9.4 MB" */
export function bytesText(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  if (bytes < 1e6) return `${Math.round(bytes / 1000)} kB`;
  return `${NUMBER.format(bytes / 1e6)} MB`;
}

/** @param {number} megapixels @returns {string} such as "4.9 MP" */
export function megapixelsText(megapixels) {
  return megapixels < 0.1 ? `${megapixels.toFixed(3)} MP` : `${NUMBER.format(megapixels)} MP`;
}

/** @param {number} seconds @returns {string} such as "2 min 5 s" */
export function durationText(seconds) {
  if (seconds < 1) return "less than 1 s";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  const minutes = Math.round(whole / 60);
  return `${Math.floor(minutes / 60)} h${minutes % 60 ? ` ${minutes % 60} min` : ""}`;
}

/** @param {number} price @param {string} currency ISO 4217 @returns {string} "" when it costs nothing */
export function priceText(price, currency) {
  if (!price) return "";
  return new Intl.NumberFormat("en", { style: "currency", currency, maximumFractionDigits: price < 0.1 ? 4 : 2 }).format(price);
}

/** @param {{width: number, height: number}} size @returns {string} */
export function sizeText(size) {
  return `${size.width} \u00d7 ${size.height} px`;
}

/** @param {number} count @param {string} noun @returns {string} such as "3 pictures" */
export function countText(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** @param {string} timestamp RFC 3339 @returns {string} in the reader's own time zone */
export function timeText(timestamp) {
  const time = new Date(timestamp);
  const isToday = time.toDateString() === new Date().toDateString();
  const clock = time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return isToday ? clock : `${time.toLocaleDateString([], { day: "numeric", month: "short" })}, ${clock}`;
}

/** @param {number | null} position jobs before it @returns {string} */
export function positionText(position) {
  if (position === null) return "Waiting";
  return position === 0 ? "Next in line" : `${countText(position, "picture")} before this one`;
}

const PHASES = /** @type {Record<string, string>} */ ({
  queued: "Waiting for its turn on the device",
  encode: "Looking at the picture",
  decode: "Writing the pixels",
  done: "Almost there",
});

/** @param {{phase: string, step: number, num_steps: number}} progress @returns {string} */
export function phaseText({ phase, step, num_steps: steps }) {
  return PHASES[phase] ?? (step === 0 ? "Starting to restore" : `Restoring, step ${step} of ${steps}`);
}

/** @param {import("./entry.js").Entry} entry @returns {string} one or two words */
export function stateText(entry) {
  const job = entry.job;
  switch (entry.state) {
    case "waiting": return "To be sent";
    case "sending": return `Sending ${Math.round(entry.upload.sent * 100)} %`;
    case "retrying": return "Trying again";
    case "refused": return "Not accepted";
    case "queued": return job?.queue_position ? `${job.queue_position} before it` : "Next in line";
    case "running": return job?.step ? `Restoring ${Math.round(job.progress * 100)} %` : "Starting";
    case "done": return job?.result ? `${job.result.width} \u00d7 ${job.result.height}` : "Done";
    case "failed": return "Failed";
    case "cancelled": return "Cancelled";
    default: return "Expired";
  }
}
