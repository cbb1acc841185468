"use strict";

// Protocol and versions, the theme, printing; then everything starts.

// A nested object as [dotted name, text] pairs.
function flattened(value, name = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    const entries = Object.entries(value).flatMap(([key, inner]) => flattened(inner, name ? `${name}.${key}` : key));
    return entries.length ? entries : [[name, "none"]];
  }
  return [[name, typeof value === "string" ? value || "\u2013" : JSON.stringify(value)]];
}

function facts(title, value) {
  const pairs = flattened(value, typeof value === "object" && value !== null && !Array.isArray(value) ? "" : title);
  const rows = pairs.flatMap(([name, text]) => [el("dt", { textContent: name }), el("dd", { textContent: text })]);
  // A line for each of hundreds of pictures is there to be looked up, not to be read.
  const isList = Array.isArray(value) && typeof value[0] === "object";
  if (isList) rows.splice(0, rows.length, ...value.flatMap((item, index) => [
    el("dt", { textContent: item.name || index + 1 }), el("dd", { textContent: flattened(item).map((pair) => pair.join(" ")).join(", ") })]));
  return el("details", { open: !isList, className: isList ? "fact list" : "fact" }, el("summary", { textContent: title }), el("dl", {}, ...rows));
}

function startFacts() {
  const { protocol, protocol_digest: digest, metrics, methods, ...rest } = report.header;
  const blocks = [facts("protocol", { ...(protocol || {}), ...(digest ? { digest } : {}) })];
  for (const [name, value] of Object.entries({ ...rest, methods })) {
    if (value !== undefined && value !== null) blocks.push(facts(name.replaceAll("_", " "), value));
  }
  byId("facts").append(...blocks);
}

const THEMES = ["auto", "light", "dark"];

// Some browsers forbid storage to pages opened from a file: the choice then lasts as long as the page.
function stored(theme = null) {
  try {
    if (theme !== null) localStorage.setItem("faithdiff-report-theme", theme);
    return localStorage.getItem("faithdiff-report-theme");
  } catch {
    return theme;
  }
}

function startTheme() {
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
  };
  show(THEMES.includes(stored()) ? stored() : "auto");
  byId("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    stored(next);
    show(next);
  });
}

function startPrinting() {
  byId("print").addEventListener("click", () => window.print());
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not(.list)").forEach((block) => { block.open = true; });
  });
}

function openNamedPicture() {
  const named = location.hash.match(/^#picture=(.*)$/);
  if (named) openPicture(decodeURIComponent(named[1]));
}

startTheme();
startScores();
startPaper();
startCharts();
startViewer();
startPictures();
startFacts();
startPrinting();
openNamedPicture();
