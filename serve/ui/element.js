/** Elements of the page, made and found. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} selector
 * @param {ParentNode} [within]
 * @returns {HTMLElement & HTMLInputElement & HTMLImageElement} of the page's own markup, so that it is there
 */
export function find(selector, within = document) {
  const found = within.querySelector(selector);
  if (!found) throw new Error(`page: there is no ${selector}`);
  return /** @type {any} */ (found);
}

/**
 * @param {string} name
 * @param {Record<string, unknown>} [properties] of the element; those with a dash are attributes
 * @param {...(Node | string)} children text stays text
 * @returns {any}
 */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [property, value] of Object.entries(properties)) {
    if (property.includes("-")) made.setAttribute(property, String(value));
    else /** @type {any} */ (made)[property] = value;
  }
  made.append(...children);
  return made;
}

/**
 * @param {string} name a symbol of icons.svg
 * @returns {SVGElement}
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `ui/icons.svg#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/**
 * @param {HTMLElement} target
 * @param {string} text empty: the element is not shown at all
 */
export function setText(target, text) {
  // Writing the same text again makes screen readers say it again.
  if (target.textContent !== text) target.textContent = text;
  target.hidden = !text;
}
