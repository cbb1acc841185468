/** Where a picture lies in its window: zoom and position. Numbers only. */

const LARGEST = 16;

export class Viewport {
  constructor() {
    this.scale = 1;
    this.x = 0;
    this.y = 0;
    this._content = { width: 1, height: 1 };
    this._window = { width: 1, height: 1 };
    this._density = 1;
    this._isFitted = true;
  }

  /** @param {import("./entry.js").Size} size of the picture in its own pixels */
  show(size) {
    this._content = size;
    this.fit();
  }

  /**
   * @param {import("./entry.js").Size} size of the window in CSS pixels; the picture's centre stays where it is
   * @param {number} density device pixels / CSS pixels
   */
  resize(size, density) {
    const dx = (size.width - this._window.width) / 2;
    const dy = (size.height - this._window.height) / 2;
    this._window = size;
    this._density = density;
    if (this._isFitted) this.fit();
    else this.pan(dx, dy);
  }

  /** @returns {number} zoom at which all of it is seen */
  get fitScale() {
    const { width, height } = this._content;
    return Math.min(this._window.width / width, this._window.height / height);
  }

  /** @returns {boolean} whether there is nothing to move */
  get isFitted() {
    return this._isFitted;
  }

  /** @returns {number} 100: one pixel of the picture on one pixel of the screen */
  get percent() {
    return this.scale * this._density * 100;
  }

  fit() {
    this.scale = this.fitScale;
    this._isFitted = true;
    this._settle();
  }

  /** One pixel of the picture on one of the screen, around the window's centre. */
  actual() {
    this.zoom(1 / this._density / this.scale);
  }

  /**
   * @param {number} factor
   * @param {number} [x] what lies here in the window stays here
   * @param {number} [y]
   */
  zoom(factor, x = this._window.width / 2, y = this._window.height / 2) {
    const smallest = Math.min(this.fitScale, 1 / this._density);
    const largest = Math.max(this.fitScale, 1 / this._density) * LARGEST;
    const scale = Math.min(largest, Math.max(smallest, this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this._isFitted = Math.abs(scale / this.fitScale - 1) < 1e-3;
    this._settle();
  }

  /** @param {number} dx @param {number} dy in CSS pixels */
  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this._settle();
  }

  /** A picture smaller than the window is in its middle; a larger one leaves no gap. */
  _settle() {
    this.x = settled(this.x, this._content.width * this.scale, this._window.width);
    this.y = settled(this.y, this._content.height * this.scale, this._window.height);
  }
}

/** @param {number} start @param {number} length @param {number} room @returns {number} */
function settled(start, length, room) {
  if (length <= room) return (room - length) / 2;
  return Math.min(0, Math.max(room - length, start));
}
