"use strict";

// One chart per metric: every picture a dot, by method, with quartiles and the mean's interval.

const CHART = { width: 620, left: 132, right: 20, top: 8, row: 58, axis: 34 };

function quantile(sorted, share) {
  const place = (sorted.length - 1) * share;
  const low = Math.floor(place);
  const high = Math.ceil(place);
  return sorted[low] + (sorted[high] - sorted[low]) * (place - low);
}

// Round numbers that cover a range, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || Math.abs(low) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return found.map((value) => ({ value, text: value.toFixed(Math.min(digits, 8)) }));
}

function dotsOf(method, metric) {
  return report.pictures
    .map((picture) => ({ picture, score: picture.scores[method][metric.name] }))
    .filter((dot) => dot.score !== null);
}

function chart(metric) {
  const methods = report.methods.filter((method) => dotsOf(method, metric).length || !cannotBe(method, metric));
  const height = CHART.top + CHART.row * methods.length + CHART.axis;
  const all = methods.flatMap((method) => dotsOf(method, metric).map((dot) => dot.score));
  const [low, high] = all.reduce(([l, h], v) => [Math.min(l, v), Math.max(h, v)], [Infinity, -Infinity]);
  const margin = (high - low) * 0.04 || Math.abs(low) * 0.05 || 1;
  const span = high - low + 2 * margin;
  const x = (value) => CHART.left + ((value - low + margin) / span) * (CHART.width - CHART.left - CHART.right);
  const about = `${metric.name} of ${methods.join(", ")}; the means are in the table of scores`;
  const drawing = svg("svg", { viewBox: `0 0 ${CHART.width} ${height}`, role: "img", "aria-label": about });
  for (const tick of ticks(low - margin, high + margin, 6)) {
    const bottom = CHART.top + CHART.row * methods.length;
    drawing.append(
      svg("line", { class: "grid", x1: x(tick.value), x2: x(tick.value), y1: CHART.top, y2: bottom }),
      svg("text", { class: "tick", x: x(tick.value), y: bottom + 18 }, tick.text));
  }
  methods.forEach((method, index) => drawing.append(chartRow(method, metric, CHART.top + CHART.row * index, x)));
  const title = `${metricTitle(metric)}${metric.unit ? `, ${metric.unit}` : ""}`;
  return el("figure", {}, el("figcaption", { textContent: title }), drawing);
}

function chartRow(method, metric, top, x) {
  const group = svg("g", { class: method === OURS ? "ours" : "other" });
  const dots = dotsOf(method, metric);
  const label = method.length > 16 ? `${method.slice(0, 15)}\u2026` : method;
  const count = countText(dots.length, report.pictures.length - dots.length);
  group.append(
    svg("text", { class: "method", x: CHART.left - 12, y: top + 24 }, label, svg("title", {}, method)),
    svg("text", { class: "count", x: CHART.left - 12, y: top + 40 }, count));
  if (!dots.length) return group;
  const sorted = dots.map((dot) => dot.score).sort((a, b) => a - b);
  const [first, middle, third] = [0.25, 0.5, 0.75].map((share) => x(quantile(sorted, share)));
  group.append(
    svg("rect", { class: "box", x: first, y: top + 8, width: Math.max(third - first, 1), height: 24, rx: 2 }),
    svg("line", { class: "median", x1: middle, x2: middle, y1: top + 8, y2: top + 32 }));
  dots.forEach((dot, index) => group.append(dotMark(dot, method, metric, x(dot.score), top + 20 + 16 * ((index * 0.618034) % 1 - 0.5))));
  group.append(meanMark(report.means[method][metric.name], top + 43, x));
  return group;
}

function dotMark(dot, method, metric, cx, cy) {
  const text = `${dot.picture.name}\n${method}: ${metric.name} ${number(dot.score)}`;
  const mark = svg("circle", { class: "dot", cx, cy, r: 3.4 }, svg("title", {}, text));
  mark.addEventListener("click", () => openPicture(dot.picture.name, method));
  return mark;
}

function meanMark(mean, y, x) {
  const place = x(mean.mean);
  const mark = svg("g", { class: "mean" });
  if (mean.low !== null) mark.append(svg("line", { x1: x(mean.low), x2: x(mean.high), y1: y, y2: y }));
  mark.append(svg("path", { d: `M${place} ${y - 5} l5 5 l-5 5 l-5 -5 z` }, svg("title", {}, `mean ${number(mean.mean)}`)));
  return mark;
}

function startCharts() {
  if (!scoredMetrics.length) {
    byId("charts").append(el("p", { className: "empty", textContent: "No metric has a score." }));
    return;
  }
  byId("charts").append(...scoredMetrics.map(chart));
}
