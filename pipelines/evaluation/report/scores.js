"use strict";

// The table of means, ours minus others, and what is missing.

const scoredMetrics = report.metrics.filter((metric) =>
  report.methods.some((method) => report.means[method][metric.name].mean !== null));

const arrow = (metric) => (metric.higher_is_better ? "\u2191" : "\u2193");
const metricTitle = (metric) => `${metric.name} ${arrow(metric)}`;
const metricHint = (metric) =>
  `${metric.higher_is_better ? "higher" : "lower"} is better${metric.unit ? `, in ${metric.unit}` : ""}; click to sort`;

function reasonOf(method, metric) {
  const found = report.missing.filter((gap) => gap.method === method && gap.metric === metric.name);
  return found.map((gap) => `${gap.pictures} of ${report.pictures.length}: ${gap.reason}`).join("\n");
}

// A score that cannot be: the reference against itself, seams of a method that knows no tiles.
function cannotBe(method, metric) {
  const found = report.missing.filter((gap) => gap.method === method && gap.metric === metric.name);
  return found.length > 0 && found.every((gap) => !gap.applies);
}

// One picture's score as a cell.
function scoreBox(score, method, metric) {
  if (score !== null) return el("td", { className: "number", textContent: number(score) });
  const isImpossible = cannotBe(method, metric);
  return el("td", { className: isImpossible ? "number faint" : "number gap", textContent: isImpossible ? "\u2013" : "missing" });
}

// Input and reference are shown, but do not compete.
const CONTESTANTS = report.methods.filter((method) => method !== "lq" && method !== "hq");

function bestMean(metric) {
  const means = CONTESTANTS.map((m) => report.means[m][metric.name].mean).filter((mean) => mean !== null);
  return means.length < 2 ? null : means.reduce((a, b) => (advantage(metric, a, b) >= 0 ? a : b));
}

function countText(count, missing) {
  return missing ? `n=${count}, ${missing} missing` : `n=${count}`;
}

function meanCell(method, metric) {
  const mean = report.means[method][metric.name];
  const cell = el("td", { className: "number", title: reasonOf(method, metric) });
  if (mean.mean === null) {
    cell.append(cannotBe(method, metric)
      ? el("span", { className: "faint", textContent: "\u2013" })
      : el("span", { className: "gap", textContent: "missing" }));
    return cell;
  }
  if (CONTESTANTS.includes(method) && mean.mean === bestMean(metric)) cell.classList.add("best");
  const interval = mean.low === null ? "one picture: no interval" : `${number(mean.low)} \u2013 ${number(mean.high)}`;
  const count = el("small", { textContent: countText(mean.num_scored, mean.num_missing) });
  if (mean.num_missing) count.className = "gap";
  cell.append(el("b", { textContent: number(mean.mean) }), el("small", { textContent: interval }), count);
  return cell;
}

function differenceCell(method, metric) {
  const difference = report.differences[method][metric.name];
  const cell = el("td", { className: "number" });
  if (difference.mean === null) {
    cell.append(cannotBe(method, metric)
      ? el("span", { className: "faint", textContent: "\u2013" })
      : el("span", { className: "gap", textContent: "no pairs" }));
    return cell;
  }
  const gain = metric.higher_is_better ? difference.mean : -difference.mean;
  const isSure = difference.low !== null && difference.low * difference.high > 0;
  cell.classList.add(isSure ? (gain > 0 ? "better" : "worse") : "unsure");
  const interval = difference.low === null ? "one pair" : `${signed(difference.low)} \u2013 ${signed(difference.high)}`;
  const pairs = `better on ${(100 * difference.win_rate).toFixed(0)}% of ${difference.num_pairs}`;
  const unpaired = difference.num_unpaired ? `, ${difference.num_unpaired} unpaired` : "";
  cell.append(el("b", { textContent: signed(difference.mean) }), el("small", { textContent: interval }),
    el("small", { textContent: pairs + unpaired }));
  return cell;
}

const NOTES = {
  means: "Mean, its 95% interval (bootstrap over pictures) and the number of pictures it is of. Bold: best mean of the column. "
    + "Means over different pictures cannot be compared; the differences are paired.",
  differences: "Ours minus the method, over the pictures that both have, with the 95% interval of the paired difference. "
    + "Coloured where the interval leaves out zero; a tie counts half.",
};

function drawScores(mode) {
  const isMeans = mode === "means";
  const methods = isMeans ? report.methods : report.methods.filter((method) => method in report.differences);
  const source = isMeans ? report.means : report.differences;
  const columns = [
    { title: "method", value: (m) => m, lowFirst: true, cell: (m) => methodHeading(m) },
    ...report.metrics.map((metric) => ({
      title: metricTitle(metric),
      hint: metricHint(metric),
      lowFirst: !metric.higher_is_better,
      value: (method) => source[method][metric.name].mean,
      cell: (method) => (isMeans ? meanCell : differenceCell)(method, metric),
    })),
  ];
  const caption = isMeans ? "Mean of every metric by method" : "Ours minus every other method";
  byId("score-table").replaceChildren(sortableTable({ caption, columns, rows: methods }));
  byId("score-note").textContent = NOTES[mode];
}

function methodHeading(method) {
  return el("th", { scope: "row", className: method === OURS ? "ours" : "", textContent: method });
}

// Gaps of one reason in one line: its metrics, and the methods with how many pictures lack a score.
function gapsByReason() {
  const byMetric = Map.groupBy(report.missing, (gap) => JSON.stringify([gap.reason, gap.metric]));
  const lines = [...byMetric.values()].map((gaps) => ({
    reason: gaps[0].reason,
    metric: gaps[0].metric,
    applies: gaps[0].applies,
    methods: gaps.map((gap) => `${gap.method} (${gap.pictures} of ${report.pictures.length})`).join(", "),
  }));
  return [...Map.groupBy(lines, (line) => JSON.stringify([line.reason, line.methods])).values()]
    .map((same) => ({ ...same[0], metrics: same.map((line) => line.metric).join(", ") }));
}

function drawMissing() {
  const listed = (gaps) => el("ul", {}, ...gaps.map((gap) => el("li", {},
    el("b", { textContent: gap.metrics }), ` \u2013 ${gap.methods}: ${gap.reason}`)));
  const [missing, impossible] = [true, false].map((applies) => gapsByReason().filter((gap) => gap.applies === applies));
  if (missing.length) {
    byId("missing").append(el("details", { open: missing.length <= 6, className: "callout" },
      el("summary", { textContent: "Missing scores" }), listed(missing)));
  }
  if (impossible.length) {
    byId("missing").append(el("details", { className: "note" },
      el("summary", { textContent: "Scores that do not apply" }), listed(impossible)));
  }
}

function drawSummary() {
  const protocol = report.header.protocol || {};
  const named = [protocol.table ? `Table ${protocol.table}` : "", typeof protocol.dataset === "string" ? protocol.dataset : "",
    protocol.level ? `level ${protocol.level}` : ""].filter(Boolean).join(" \u00b7 ");
  const cards = scoredMetrics.filter((metric) => report.means[OURS] && report.means[OURS][metric.name].mean !== null)
    .map((metric) => summaryCard(metric));
  const about = [named, `${report.pictures.length} pictures`, `${report.methods.length} methods`].filter(Boolean).join(" \u00b7 ");
  byId("summary").append(
    el("h1", { textContent: protocol.name || "Evaluation" }),
    el("p", { className: "about", textContent: about }),
    digestLine("Protocol", report.header.protocol_digest),
    el("div", { className: "cards" }, ...cards));
}

function summaryCard(metric) {
  const mean = report.means[OURS][metric.name];
  const range = mean.low === null ? "" : `${number(mean.low)} \u2013 ${number(mean.high)}`;
  return el("div", { className: "card" },
    el("span", { className: "label", textContent: `${metricTitle(metric)}${metric.unit ? `, ${metric.unit}` : ""}` }),
    el("b", { textContent: number(mean.mean) }),
    el("small", { textContent: range }),
    el("small", { className: mean.num_missing ? "gap" : "", textContent: countText(mean.num_scored, mean.num_missing) }));
}

function digestLine(label, digest) {
  if (!digest) return null;
  return el("p", { className: "digest" }, `${label} `, el("code", { textContent: digest }));
}

function startScores() {
  drawSummary();
  const canCompare = Object.keys(report.differences).length > 0;
  const modes = [["means", "Means"], ...(canCompare ? [["differences", "Ours minus others"]] : [])];
  segments(byId("score-mode"), modes, "means", drawScores);
  drawScores("means");
  drawMissing();
}
