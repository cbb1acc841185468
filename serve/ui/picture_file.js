/** What the browser itself can tell about a picture: its size, and a small copy for lists. */

const THUMBNAIL_PX = 240;
export const MEDIA_TYPES = ["image/jpeg", "image/png", "image/webp", "image/tiff"];

/**
 * @param {Blob} blob
 * @returns {Promise<{size: import("./entry.js").Size | null, thumbnail: Blob | null}>} upright; null for what this
 *   browser does not read, such as TIFF
 */
export async function look(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    return { size: null, thumbnail: null };
  }
  const size = { width: bitmap.width, height: bitmap.height };
  const thumbnail = await smaller(bitmap);
  bitmap.close();
  return { size, thumbnail };
}

/** @param {ImageBitmap} bitmap @returns {Promise<Blob | null>} */
function smaller(bitmap) {
  const factor = Math.min(1, THUMBNAIL_PX / Math.min(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * factor));
  canvas.height = Math.max(1, Math.round(bitmap.height * factor));
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.8));
}

/** @returns {string} unguessable; crypto.randomUUID is not there on plain http */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
