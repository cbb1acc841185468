/** Fingers, mouse and wheel on a window, told as moves and pinches. */

const WHEEL_STEP = 0.0015;
const DOUBLE_MS = 300;
const DOUBLE_PX = 24;

/** @typedef {{x: number, y: number}} Point in the window, CSS pixels */

/**
 * @param {HTMLElement} target
 * @param {{
 *   onMove: (point: Point, dx: number, dy: number) => void,
 *   onZoom: (factor: number, point: Point) => void,
 *   onDouble: (point: Point) => void,
 * }} told onMove while one pointer is held down
 */
export function listen(target, { onMove, onZoom, onDouble }) {
  /** @type {Map<number, Point>} */
  const held = new Map();
  let lastTap = { time: 0, x: 0, y: 0 };

  const pointOf = (/** @type {MouseEvent} */ event) => {
    const box = target.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };

  target.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    target.setPointerCapture(event.pointerId);
    const point = pointOf(event);
    held.set(event.pointerId, point);
    if (held.size > 1) return;
    const isDouble = event.timeStamp - lastTap.time < DOUBLE_MS && Math.hypot(point.x - lastTap.x, point.y - lastTap.y) < DOUBLE_PX;
    lastTap = { time: isDouble ? 0 : event.timeStamp, ...point };
    if (isDouble) onDouble(point);
  });

  target.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) return;
    const point = pointOf(event);
    const other = Array.from(held).find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const middle = (/** @type {Point} */ a) => ({ x: (a.x + other.x) / 2, y: (a.y + other.y) / 2 });
      onZoom(distance(point, other) / Math.max(1, distance(before, other)), middle(point));
    } else onMove(point, point.x - before.x, point.y - before.y);
    held.set(event.pointerId, point);
  });

  for (const ended of ["pointerup", "pointercancel", "lostpointercapture"]) {
    target.addEventListener(ended, (event) => held.delete(/** @type {PointerEvent} */ (event).pointerId));
  }

  target.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      // Lines instead of pixels with some mice; and touchpads send small steps with Ctrl when two fingers part.
      const pixels = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 30 : 1) * (event.ctrlKey ? 6 : 1);
      onZoom(Math.exp(-pixels * WHEEL_STEP), pointOf(event));
    },
    { passive: false },
  );
}

/** @param {Point} a @param {Point} b @returns {number} */
function distance(a, b) {
  return Math.hypot(a.x - b.x, a.y - b.y);
}
