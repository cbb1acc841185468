"use strict";

// The paper's numbers beside ours. A number without a source is said to be not found.

function paperCell(comparison, cell) {
  const metric = report.metrics.find((m) => m.name === cell.our_metric);
  const td = el("td", { className: "number" });
  const source = cell.paper === null ? null : comparison.sources[cell.source];
  const printed = cell.paper === null ? "not found" : `${number(cell.paper)}${source.is_primary ? "" : "*"}`;
  td.append(el("span", { className: cell.paper === null ? "faint" : "", textContent: printed, title: source ? source.where : "" }));
  if (cell.ours === null) {
    const why = cell.num_missing ? `ours missing on ${cell.num_missing}` : "";
    td.append(el("small", { className: "gap", textContent: why }));
    return td;
  }
  td.append(el("b", { textContent: number(cell.ours) }), el("small", { textContent: countText(cell.num_scored, cell.num_missing) }));
  if (cell.difference !== null) {
    const gain = !metric || metric.higher_is_better ? cell.difference : -cell.difference;
    td.append(el("em", { className: gain > 0 ? "better" : gain < 0 ? "worse" : "", textContent: signed(cell.difference) }));
  }
  return td;
}

function paperTable(comparison) {
  const rows = [...new Set(comparison.cells.map((cell) => cell.row))];
  const cells = (row) => comparison.cells.filter((cell) => cell.row === row).map((cell) => paperCell(comparison, cell));
  const isOurs = (row) => comparison.cells.some((cell) => cell.row === row && cell.method === OURS);
  const heading = (row) => el("th", { scope: "row", className: isOurs(row) ? "ours" : "" }, row,
    el("small", { textContent: comparison.cells.find((cell) => cell.row === row).method || "not scored here" }));
  const lines = rows.map((row) => el("tr", {}, heading(row), ...cells(row)));
  const titles = ["row", ...comparison.columns].map((title) => el("th", { scope: "col", textContent: title }));
  const notes = comparison.notes.map((note) => el("li", { textContent: note }));
  if (Object.values(comparison.sources).some((source) => !source.is_primary)) {
    notes.unshift(el("li", { textContent: "* not read in the paper itself" }));
  }
  return el("div", { className: "paper-block" },
    el("h3", { textContent: comparison.title }),
    el("div", { className: "scroll" }, el("table", { className: "paper" },
      el("caption", { textContent: comparison.title }),
      el("thead", {}, el("tr", {}, ...titles)), el("tbody", {}, ...lines))),
    el("ul", { className: "note" }, ...notes));
}

function startPaper() {
  if (!report.paper.length) {
    byId("paper").hidden = true;
    byId("paper-link").hidden = true;
    return;
  }
  byId("paper-tables").append(...report.paper.map(paperTable));
}
