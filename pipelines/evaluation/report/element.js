"use strict";

// Small parts that everything else is made of. Text enters the page as text, never as markup.

const report = JSON.parse(document.getElementById("report-data").textContent);
const metricsByName = new Map(report.metrics.map((metric) => [metric.name, metric]));
const OURS = "ours";

const byId = (id) => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role" || name === "colspan") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Enough digits to tell two methods apart, in few enough to read: 26.03, 0.7737, 1234.
function number(value) {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  if (size >= 1000) return value.toFixed(0);
  if (size >= 100) return value.toFixed(1);
  return size >= 10 ? value.toFixed(2) : value.toFixed(4);
}

const signed = (value) => (value > 0 ? "+" : "") + number(value).replace("-", "\u2212");

// How much better `a` is than `b` under a metric: positive is better.
const advantage = (metric, a, b) => (metric.higher_is_better ? a - b : b - a);

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => el("option", { value, textContent: text })));
  select.value = chosen;
}

// Buttons of which one is pressed; `choose` is called with its value.
function segments(container, entries, chosen, choose) {
  const buttons = entries.map(([value, text]) => el("button", { type: "button", value, textContent: text }));
  const press = (value) => buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.value === value)));
  buttons.forEach((button) => button.addEventListener("click", () => { press(button.value); choose(button.value); }));
  press(chosen);
  container.replaceChildren(...buttons);
}

// A table that its headings sort. `columns`: {title, hint, value(row), cell(row), lowFirst}; a value of null is last.
function sortableTable({ caption, columns, rows, sortedBy = null, descending = false, onRow = null }) {
  const body = el("tbody");
  const headings = columns.map((column, index) => {
    const button = el("button", { type: "button", title: column.hint || "" }, column.title, el("i", { "aria-hidden": "true" }));
    button.addEventListener("click", () => sortBy(index));
    return el("th", { scope: "col" }, button);
  });
  let state = { index: sortedBy, descending };

  function sortBy(index) {
    const again = state.index === index;
    state = { index, descending: again ? !state.descending : !columns[index].lowFirst };
    draw();
  }

  function ordered() {
    if (state.index === null) return rows;
    const value = columns[state.index].value;
    const direction = state.descending ? -1 : 1;
    return rows.toSorted((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return direction * (typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
    });
  }

  function draw() {
    headings.forEach((heading, index) => {
      if (index === state.index) heading.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      else heading.removeAttribute("aria-sort");
    });
    body.replaceChildren(...ordered().map((row) => {
      const line = el("tr", {}, ...columns.map((column) => column.cell(row)));
      if (onRow) onRow(line, row);
      return line;
    }));
  }

  draw();
  return el("table", {}, el("caption", { textContent: caption }), el("thead", {}, el("tr", {}, ...headings)), body);
}
