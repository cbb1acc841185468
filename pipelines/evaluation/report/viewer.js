"use strict";

// The viewer: two results of one picture under a divider, zoomed and moved together.

const viewer = {
  dialog: byId("viewer"), stage: byId("stage"), divider: byId("divider"),
  picture: null, order: [], left: "lq", right: OURS,
  split: 0.5, sideBySide: false,
  zoom: 1, x: 0, y: 0, isFit: true,
  pointers: new Map(),
};
const MAX_ZOOM = 32;
const SHARP_FROM_ZOOM = 3;

const fileOf = (method) => viewer.picture.files[method] || "";
const sizeOf = () => viewer.picture.size_px || [1, 1];

function openPicture(name, method = null) {
  const picture = report.pictures.find((candidate) => candidate.name === name);
  if (!picture || !Object.keys(picture.files).length) return;
  if (method && picture.files[method]) viewer.right = method;
  viewer.order = listedPictures();
  if (!viewer.dialog.open) viewer.dialog.showModal();
  showPicture(picture);
  viewer.divider.focus({ preventScroll: true });
}

function showPicture(picture) {
  viewer.picture = picture;
  viewer.isFit = true;
  const methods = Object.keys(picture.files);
  if (!picture.files[viewer.right]) viewer.right = methods.includes(OURS) ? OURS : methods[methods.length - 1];
  if (!picture.files[viewer.left]) viewer.left = methods.find((method) => method !== viewer.right) || viewer.right;
  options(byId("left"), methods.map((method) => [method, method]), viewer.left);
  options(byId("right"), methods.map((method) => [method, method]), viewer.right);
  byId("viewer-title").textContent = picture.name;
  byId("viewer-scores").replaceChildren(pictureScores(picture));
  history.replaceState(null, "", `#picture=${encodeURIComponent(picture.name)}`);
  placeImages();
}

function placeImages() {
  for (const [side, method] of [["left", viewer.left], ["right", viewer.right]]) {
    const image = byId(`pane-${side}`).firstElementChild;
    const file = fileOf(method);
    if (image.getAttribute("src") !== file) image.src = file;
    image.alt = `${viewer.picture.name}, ${method}`;
    const score = sortMetric() && (viewer.picture.scores[method] || {})[sortMetric().name];
    byId(`tag-${side}`).textContent = typeof score === "number" ? `${method} \u00b7 ${sortMetric().name} ${number(score)}` : method;
  }
  byId("left").value = viewer.left;
  byId("right").value = viewer.right;
  layout();
}

// The part of the stage that one picture has for itself.
function paneSize() {
  const { clientWidth, clientHeight } = viewer.stage;
  return [viewer.sideBySide ? clientWidth / 2 : clientWidth, clientHeight];
}

function layout() {
  if (!viewer.picture) return;
  const [width, height] = sizeOf();
  const [paneWidth, paneHeight] = paneSize();
  if (viewer.isFit) {
    viewer.zoom = Math.min(paneWidth / width, paneHeight / height);
    viewer.x = (paneWidth - width * viewer.zoom) / 2;
    viewer.y = (paneHeight - height * viewer.zoom) / 2;
  }
  keepInSight(width * viewer.zoom, height * viewer.zoom, paneWidth, paneHeight);
  viewer.stage.classList.toggle("side-by-side", viewer.sideBySide);
  byId("mode").setAttribute("aria-pressed", String(viewer.sideBySide));
  for (const side of ["left", "right"]) {
    const image = byId(`pane-${side}`).firstElementChild;
    image.style.width = `${width}px`;
    image.style.height = `${height}px`;
    image.style.transform = `translate(${viewer.x}px, ${viewer.y}px) scale(${viewer.zoom})`;
    image.classList.toggle("sharp", viewer.zoom >= SHARP_FROM_ZOOM);
  }
  const percent = Math.round(viewer.split * 100);
  viewer.stage.style.setProperty("--split", `${viewer.split * 100}%`);
  viewer.divider.setAttribute("aria-valuenow", percent);
  viewer.divider.setAttribute("aria-valuetext", `${viewer.left} ${percent}%, ${viewer.right} ${100 - percent}%`);
  byId("zoom").textContent = `${Math.round(viewer.zoom * 100)}%`;
}

// A picture smaller than its pane stays in the middle; a larger one never leaves a gap.
function keepInSight(width, height, paneWidth, paneHeight) {
  viewer.x = width <= paneWidth ? (paneWidth - width) / 2 : Math.min(0, Math.max(paneWidth - width, viewer.x));
  viewer.y = height <= paneHeight ? (paneHeight - height) / 2 : Math.min(0, Math.max(paneHeight - height, viewer.y));
}

function zoomTo(zoom, at = null) {
  const [paneWidth, paneHeight] = paneSize();
  const [x, y] = at || [paneWidth / 2, paneHeight / 2];
  const [width, height] = sizeOf();
  const smallest = Math.min(1, paneWidth / width, paneHeight / height);
  const next = Math.min(MAX_ZOOM, Math.max(smallest, zoom));
  viewer.x = x - ((x - viewer.x) * next) / viewer.zoom;
  viewer.y = y - ((y - viewer.y) * next) / viewer.zoom;
  viewer.zoom = next;
  viewer.isFit = false;
  layout();
}

function placeInPane(event) {
  const box = viewer.stage.getBoundingClientRect();
  const x = event.clientX - box.left;
  return [viewer.sideBySide ? x % (box.width / 2) : x, event.clientY - box.top];
}

function moveSplit(split) {
  viewer.split = Math.min(1, Math.max(0, split));
  layout();
}

function step(direction) {
  const place = viewer.order.findIndex((picture) => picture.name === viewer.picture.name);
  const next = viewer.order[(place + direction + viewer.order.length) % viewer.order.length];
  if (next && Object.keys(next.files).length) showPicture(next);
}

const VIEWER_ACTIONS = {
  previous: () => step(-1),
  next: () => step(1),
  close: () => viewer.dialog.close(),
  swap: () => { [viewer.left, viewer.right] = [viewer.right, viewer.left]; placeImages(); },
  mode: () => { viewer.sideBySide = !viewer.sideBySide; layout(); },
  in: () => zoomTo(viewer.zoom * 1.5),
  out: () => zoomTo(viewer.zoom / 1.5),
  fit: () => { viewer.isFit = true; layout(); },
  actual: () => zoomTo(1 / (window.devicePixelRatio || 1)),
};
const VIEWER_KEYS = { n: "next", p: "previous", x: "swap", s: "mode", "+": "in", "=": "in", "-": "out", 0: "fit", 1: "actual" };

function onViewerKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const moves = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 };
  if (event.key in moves && !viewer.sideBySide) {
    moveSplit(viewer.split + moves[event.key] * (event.shiftKey ? 5 : 1));
  } else if (event.key.toLowerCase() in VIEWER_KEYS) {
    VIEWER_ACTIONS[VIEWER_KEYS[event.key.toLowerCase()]]();
  } else {
    return;
  }
  event.preventDefault();
}

function onPointerDown(event) {
  if (event.button) return;
  viewer.stage.setPointerCapture(event.pointerId);
  const onDivider = viewer.divider.contains(event.target);
  viewer.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, onDivider });
  if (onDivider) viewer.divider.focus({ preventScroll: true });
  event.preventDefault();
}

function onPointerMove(event) {
  const last = viewer.pointers.get(event.pointerId);
  if (!last) return;
  const box = viewer.stage.getBoundingClientRect();
  const before = pinchSpread();
  const moved = [event.clientX - last.x, event.clientY - last.y];
  Object.assign(last, { x: event.clientX, y: event.clientY });
  if (last.onDivider) {
    moveSplit((event.clientX - box.left) / box.width);
  } else if (before) {
    zoomTo((viewer.zoom * pinchSpread()) / before, placeInPane(event));
  } else {
    viewer.x += moved[0];
    viewer.y += moved[1];
    if (viewer.zoom * sizeOf()[0] > paneSize()[0] || viewer.zoom * sizeOf()[1] > paneSize()[1]) viewer.isFit = false;
    layout();
  }
}

// Distance of two fingers, or null with any other number of them.
function pinchSpread() {
  const fingers = [...viewer.pointers.values()].filter((pointer) => !pointer.onDivider);
  return fingers.length === 2 ? Math.hypot(fingers[0].x - fingers[1].x, fingers[0].y - fingers[1].y) || 1 : null;
}

// Scores of one picture, by method.
function pictureScores(picture) {
  const heads = ["method", ...report.metrics.map(metricTitle)].map((title) => el("th", { scope: "col", textContent: title }));
  const rows = report.methods.map((method) => el("tr", {}, methodHeading(method), ...report.metrics.map((metric) => {
    const score = picture.scores[method][metric.name];
    return scoreBox(score, method, metric);
  })));
  return el("table", {}, el("caption", { textContent: `Scores of ${picture.name}` }),
    el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
}

function startViewer() {
  viewer.dialog.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (button) VIEWER_ACTIONS[button.dataset.do]();
  });
  viewer.dialog.addEventListener("keydown", onViewerKey);
  viewer.dialog.addEventListener("close", () => history.replaceState(null, "", "#pictures"));
  byId("left").addEventListener("change", (event) => { viewer.left = event.target.value; placeImages(); });
  byId("right").addEventListener("change", (event) => { viewer.right = event.target.value; placeImages(); });
  viewer.stage.addEventListener("pointerdown", onPointerDown);
  viewer.stage.addEventListener("pointermove", onPointerMove);
  for (const name of ["pointerup", "pointercancel"]) {
    viewer.stage.addEventListener(name, (event) => viewer.pointers.delete(event.pointerId));
  }
  viewer.stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomTo(viewer.zoom * Math.exp(-event.deltaY * 0.0015), placeInPane(event));
  }, { passive: false });
  viewer.stage.addEventListener("dblclick", (event) => {
    if (viewer.divider.contains(event.target)) moveSplit(0.5);
    else if (viewer.isFit) zoomTo(Math.max(1, viewer.zoom * 2), placeInPane(event));
    else VIEWER_ACTIONS.fit();
  });
  new ResizeObserver(layout).observe(viewer.stage);
}
