"use strict";

// The list of pictures, worst first: as cards to look at or as a table to sort.

const listing = { view: "cards", metric: null, method: OURS, order: "worst", find: "", shown: 0 };
const PAGE_OF_CARDS = 48;
const MINUS = "\u0000minus\u0000";

const sortMetric = () => metricsByName.get(listing.metric) || null;

// What the list is sorted by: a method's score, or how much better ours is than a method.
function sortValue(picture) {
  const metric = sortMetric();
  if (!metric) return null;
  const other = listing.method.startsWith(MINUS) ? listing.method.slice(MINUS.length) : null;
  const score = picture.scores[other === null ? listing.method : OURS][metric.name];
  if (other === null) return score;
  const against = picture.scores[other][metric.name];
  return score === null || against === null ? null : score - against;
}

function listedPictures() {
  const wanted = listing.find.trim().toLowerCase();
  const found = report.pictures.filter((picture) => picture.name.toLowerCase().includes(wanted));
  const metric = sortMetric();
  if (listing.order === "name" || !metric) return found;
  const direction = (metric.higher_is_better ? 1 : -1) * (listing.order === "worst" ? 1 : -1);
  const valued = found.map((picture) => [sortValue(picture), picture]);
  const rank = ([x], [y]) => (x === null || y === null ? (x === null) - (y === null) : direction * (x - y));
  return valued.sort(rank).map(([, picture]) => picture);
}

function valueText(picture) {
  const value = sortValue(picture);
  if (value === null) return "no score";
  return listing.method.startsWith(MINUS) ? signed(value) : number(value);
}

function card(picture) {
  const thumbnail = (method, className) => picture.thumbnails[method]
    && el("img", { src: picture.thumbnails[method], alt: "", className, decoding: "async" });
  const images = [thumbnail("lq", "before"), thumbnail(OURS, "after")].filter(Boolean);
  const frame = el("span", { className: images.length === 2 ? "frame both" : "frame" }, ...images);
  if (!images.length) frame.textContent = "no picture";
  const isMissing = sortValue(picture) === null;
  const line = el("span", { className: "line" }, el("span", { className: "name", textContent: picture.name, title: picture.name }),
    el("b", { className: isMissing ? "gap" : "", textContent: valueText(picture) }));
  const button = el("button", { type: "button", className: "picture" }, frame, line);
  button.addEventListener("click", () => openPicture(picture.name));
  return button;
}

function scoresTable(pictures) {
  const method = listing.method.startsWith(MINUS) ? OURS : listing.method;
  const columns = [
    { title: "picture", value: (p) => p.name, lowFirst: true, cell: nameCell },
    ...report.metrics.map((metric) => ({
      title: metricTitle(metric),
      hint: metricHint(metric),
      lowFirst: metric.higher_is_better,
      value: (picture) => picture.scores[method][metric.name],
      cell: (picture) => scoreCell(picture, method, metric),
    })),
  ];
  const caption = `Scores of ${method} by picture`;
  return el("div", { className: "scroll tall" }, sortableTable({ caption, columns, rows: pictures }));
}

function nameCell(picture) {
  const button = el("button", { type: "button", className: "link", textContent: picture.name });
  button.addEventListener("click", () => openPicture(picture.name));
  return el("th", { scope: "row" }, button);
}

function scoreCell(picture, method, metric) {
  const score = picture.scores[method][metric.name];
  return scoreBox(score, method, metric);
}

function drawPictures(more = false) {
  const pictures = listedPictures();
  listing.shown = more ? listing.shown + PAGE_OF_CARDS : PAGE_OF_CARDS;
  const isTable = listing.view === "table";
  const shown = isTable ? pictures : pictures.slice(0, listing.shown);
  const unscored = pictures.filter((picture) => sortMetric() && sortValue(picture) === null).length;
  byId("picture-count").textContent = `${pictures.length} of ${report.pictures.length}`
    + (unscored ? `, ${unscored} without a score at the end` : "");
  byId("more").hidden = shown.length === pictures.length;
  byId("picture-list").className = isTable ? "" : "cards-of-pictures";
  if (!pictures.length) byId("picture-list").replaceChildren(el("p", { className: "empty", textContent: "No picture has such a name." }));
  else byId("picture-list").replaceChildren(...(isTable ? [scoresTable(shown)] : shown.map(card)));
}

function startPictures() {
  listing.metric = scoredMetrics.length ? scoredMetrics[0].name : null;
  if (!report.methods.includes(OURS)) listing.method = report.methods[0];
  options(byId("sort-metric"), scoredMetrics.map((metric) => [metric.name, metric.name]), listing.metric);
  const others = Object.keys(report.differences).map((method) => [MINUS + method, `ours minus ${method}`]);
  options(byId("sort-method"), [...report.methods.map((method) => [method, method]), ...others], listing.method);
  for (const [id, name] of [["sort-metric", "metric"], ["sort-method", "method"], ["sort-order", "order"]]) {
    byId(id).addEventListener("change", (event) => { listing[name] = event.target.value; drawPictures(); });
  }
  byId("find").addEventListener("input", (event) => { listing.find = event.target.value; drawPictures(); });
  byId("more").addEventListener("click", () => drawPictures(true));
  segments(byId("picture-view"), [["cards", "Cards"], ["table", "Table"]], "cards", (view) => {
    listing.view = view;
    drawPictures();
  });
  drawPictures();
}
