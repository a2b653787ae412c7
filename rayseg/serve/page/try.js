// The page at /: an image, a model, the mask over the image.
import { Problem, area, ask, bytes, element, legendRow, node, percent, token } from "./ask.js";

const UNSUPERVISED = { name: "unsupervised", kind: "free", task: "unsupervised", classes: [] };
const state = { file: null, models: [], classes: [], pixels: null, points: [], cursor: null, things: null, turn: 0, parts: null, aborter: null, hidden: new Set(), zoom: { scale: 1, x: 0, y: 0 } };

async function start() {
  addListeners();
  await reportErrors(load);
}

async function load() {
  const found = await (await ask("/v1/models")).json();
  element("token-row").hidden = true;
  const sam = found.models.filter((one) => one.kind === "sam").slice(0, 1);
  const maps = found.models.filter((one) => one.task === "segmentation");
  const classifiers = found.models.filter((one) => one.task === "classification").map((one) => ({ ...one, kind: "classify" }));
  state.models = [...maps, ...classifiers, ...sam.flatMap((one) => [{ ...one, kind: "prompt" }, { ...one, kind: "auto" }]), UNSUPERVISED];
  element("model").replaceChildren(...state.models.map((one, at) => node("option", optionTitle(one), { value: at })));
  choose();
  const { runs } = await (await ask("/v1/runs")).json();
  const links = runs.slice(0, 6).map((run) => node("a", run.name, { href: `/runs/${encodeURIComponent(run.name)}` }));
  element("runs").replaceChildren(...(links.length ? ["Runs: ", ...links.flatMap((link) => [link, " "])] : []));
}

const optionTitle = (one) =>
  ({ prompt: `${one.name}: segment at points`, auto: `${one.name}: segment everything`, free: "no model: unsupervised labels", classify: `${one.name}: class of the whole image` })[one.kind] ??
  `${one.name} (${one.classes.map((row) => row.name).join(", ")})`;

const model = () => state.models[element("model").value];

function choose() {
  const one = model();
  if (!one) return;
  element("prompting").hidden = one.kind !== "prompt";
  element("view").classList.toggle("prompting", one.kind === "prompt");
  const scores = Object.entries(one.metrics ?? {}).map(([name, value]) => `${name} ${value.toFixed(3)}`);
  element("about").textContent = [one.bands && `Takes ${one.bands.join(", ")} as ${one.dtype}, in patches of ${one.patch} px.`, scores.length && `Training metrics: ${scores.join(", ")}.`].filter(Boolean).join(" ");
  reset();
  ready();
}

function ready() {
  const one = model();
  const count = state.points.length;
  element("points").textContent = count ? `${count} point${count === 1 ? "" : "s"}` : "No points yet";
  element("undo").disabled = element("clear").disabled = !count;
  element("go").disabled = !state.file || !one || (one.kind === "prompt" && !state.points.length);
}

function reset() {
  state.aborter?.abort();
  Object.assign(state, { points: [], pixels: null, classes: [], things: null, parts: null, hidden: new Set(), turn: state.turn + 1 });
  element("result").hidden = element("downloads").hidden = true;
  element("readout").textContent = element("facts").textContent = "";
  for (const id of ["mask", "marks"]) element(id).getContext("2d").clearRect(0, 0, element(id).width, element(id).height);
}

async function loadFile(file) {
  if (!file) return;
  state.file = file;
  element("chosen").textContent = `${file.name} (${bytes(file.size)})`;
  const good = await reportErrors(async () => {
    const shows = /image\/(png|jpeg)/.test(file.type);
    const picture = shows ? file : await (await ask("/v1/preview", { method: "POST", body: form() })).blob();
    const image = element("image");
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(picture);
    try {
      await image.decode();
    } catch {
      throw new Problem(0, "The browser cannot show this file; choose a PNG, JPEG or GeoTIFF.");
    }
    element("shown").hidden = false;
    const { naturalWidth: width, naturalHeight: height } = image;
    for (const id of ["mask", "marks"]) Object.assign(element(id), { width, height });
    state.cursor = [width / 2, height / 2];
  });
  if (!good) {
    state.file = null;
    element("chosen").textContent = "Drop an image here or choose a file";
    element("file").value = "";
  }
  zoomTo(1);
  element("none").hidden = good;
  element("shown").hidden = !good;
  reset();
  ready();
}

function form() {
  const data = new FormData();
  data.set("image", state.file);
  if (model()?.kind === "prompt") {
    data.set("points", JSON.stringify(state.points.map(([x, y]) => [x, y])));
    data.set("labels", JSON.stringify(state.points.map(([, , on]) => on)));
  }
  return data;
}

const address = (one) =>
  ({ prompt: "/v1/sam/prompt", auto: "/v1/sam/auto", free: "/v1/unsupervised" })[one.kind] ??
  `/v1/models/${encodeURIComponent(one.name)}/predict`;

const request = (media, signal) => ask(address(model()), { method: "POST", body: form(), headers: { Accept: media }, signal });

// One prediction gives all that is shown and downloaded; of several in flight, only the last one's result is shown.
async function map() {
  state.aborter?.abort();
  const turn = ++state.turn;
  const began = Date.now();
  const tell = () => { element("readout").textContent = `Predicting… ${((Date.now() - began) / 1000).toFixed(0)} s`; };
  const timer = setInterval(tell, 1000);
  state.aborter = new AbortController();
  element("go").disabled = true;
  element("cancel").hidden = false;
  tell();
  const good = await reportErrors(async () => {
    const media = model().kind === "classify" ? "application/json" : "multipart/form-data";
    const answer = await request(media, state.aborter.signal);
    const parts = model().kind === "classify" ? null : await answer.formData();
    const found = parts ? JSON.parse(await parts.get("application/json").text()) : await answer.json();
    const picture = parts && (await createImageBitmap(parts.get("image/png")));
    if (turn !== state.turn) return;
    state.parts = parts;
    if (picture) {
      const pen = element("mask").getContext("2d", { willReadFrequently: true });
      pen.clearRect(0, 0, picture.width, picture.height);
      pen.drawImage(picture, 0, 0);
      state.pixels = pen.getImageData(0, 0, picture.width, picture.height);
    }
    showResult(found);
    paint();
    if (found.warning) element("error").textContent = `${found.warning[0].toUpperCase()}${found.warning.slice(1)}.`;
  });
  clearInterval(timer);
  if (turn !== state.turn) return;
  element("cancel").hidden = true;
  if (!good || element("readout").textContent.startsWith("Predicting")) element("readout").textContent = "";
  ready();
}

function cancel() {
  state.aborter?.abort();
  state.turn += 1;
  element("cancel").hidden = true;
  element("readout").textContent = "Cancelled.";
  ready();
}

function showResult(found) {
  state.things = found.things ?? null;
  state.classes = found.classes ?? [];
  const rows = state.things
    ? [{ name: `${state.things.length} object${state.things.length === 1 ? "" : "s"}`, color: null, painted: false }]
    : found.probabilities ? likely(found) : state.classes;
  const cells = (row) => (state.things ? things(found) : found.probabilities ? ["", "", row.score.toFixed(2)] : classCells(row));
  element("legend").replaceChildren(...rows.map((row) => toggled(legendRow(row, cells(row)), row)));
  element("score").textContent = state.things ? "predicted IoU" : found.probabilities ? "probability" : "mean score";
  element("result").hidden = false;
  element("downloads").hidden = !state.parts;
  for (const button of document.querySelectorAll("[data-media]")) button.hidden = !state.parts?.has(button.dataset.media);
  const place = found.crs ? `on the grid of ${found.crs}` : "without georeference";
  element("facts").textContent = found.width && state.classes.length ? `${found.width} × ${found.height} px, ${place}.` : "";
  element("readout").textContent = found.seconds ? `Done in ${found.seconds.toFixed(1)} s. Move the pointer over the image to read its classes.` : "Done.";
}

const likely = (found) => Object.entries(found.probabilities).sort((a, b) => b[1] - a[1])
  .map(([name, score]) => ({ name, score, color: null, painted: false }));

// A class that is painted can be hidden.
function toggled(line, row) {
  if (!row.painted) return line;
  const box = node("input", "", { type: "checkbox", "aria-label": `show ${row.name}` });
  box.checked = true;
  box.addEventListener("change", () => {
    box.checked ? state.hidden.delete(row.color) : state.hidden.add(row.color);
    paint();
  });
  line.firstElementChild.prepend(box, " ");
  return line;
}

const hex = (data, at) => `#${[data[at], data[at + 1], data[at + 2]].map((part) => part.toString(16).padStart(2, "0")).join("")}`.toUpperCase();

// The mask without hidden classes, filled or as outlines two pixels wide.
function paint() {
  if (!state.pixels) return;
  const { width, height, data } = state.pixels;
  const mode = document.querySelector('input[name="mode"]:checked').value;
  const shown = new ImageData(new Uint8ClampedArray(data), width, height);
  const source = new Uint32Array(data.buffer);
  const target = new Uint32Array(shown.data.buffer);
  const kept = new Map();
  for (let at = 0; at < source.length; at += 1) {
    const value = source[at];
    if (!kept.has(value)) kept.set(value, !state.hidden.has(hex(data, 4 * at)));
    const col = at % width;
    const inside = mode === "outline" && col > 0 && col < width - 1 && source[at - 1] === value && source[at + 1] === value
      && source[at - width] === value && source[at + width] === value;
    if (inside || !kept.get(value)) target[at] = 0;
  }
  element("mask").getContext("2d").putImageData(shown, 0, 0);
  element("swipe").hidden = mode !== "swipe";
  element("mask").style.clipPath = mode === "swipe" ? `inset(0 ${100 - element("swipe").value}% 0 0)` : "";
}

const classCells = (row) => [
  percent(row.share),
  row.area_m2 === null ? `${row.pixels.toLocaleString()} px` : area(row.area_m2),
  row.score_mean === null ? "–" : row.score_mean.toFixed(2),
];

function things(found) {
  const pixels = found.things.reduce((sum, one) => sum + one.pixels, 0);
  const mean = found.things.reduce((sum, one) => sum + one.predicted_iou, 0) / Math.max(found.things.length, 1);
  const metres = found.things.every((one) => one.area_m2 !== null) ? found.things.reduce((sum, one) => sum + one.area_m2, 0) : null;
  return [percent(pixels / (found.width * found.height)), metres === null ? `${pixels.toLocaleString()} px` : area(metres), mean.toFixed(2)];
}

// -- the image ---------------------------------------------------------------------------------------------------------

function place(event) {
  const box = element("image").getBoundingClientRect();
  const { width, height } = element("marks");
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

function read([x, y]) {
  if (!state.pixels) return;
  const [col, row] = [Math.floor(x), Math.floor(y)];
  if (col < 0 || row < 0 || col >= state.pixels.width || row >= state.pixels.height) return;
  const at = 4 * (row * state.pixels.width + col);
  const [color, a] = [hex(state.pixels.data, at), state.pixels.data[at + 3]];
  const found = state.classes.find((one) => (a ? one.painted && one.color === color : !one.painted));
  const name = found?.name ?? (a && state.things ? "object" : "no class");
  element("readout").textContent = `${name} at column ${col}, row ${row}`;
}

const pointLabel = (event) => (document.querySelector('input[name="on"][value="0"]').checked !== event.shiftKey ? 0 : 1);

function addPoint([x, y], on) {
  if (!state.file) return;
  state.points.push([Math.round(x), Math.round(y), on]);
  draw();
  ready();
  map();
}

function undo() {
  state.points.pop();
  if (!state.points.length) reset();
  draw();
  ready();
  if (state.points.length) map();
}

function draw(showCursor = false) {
  const marks = element("marks");
  const pen = marks.getContext("2d");
  const size = Math.max(4, marks.width / 110);
  pen.clearRect(0, 0, marks.width, marks.height);
  pen.lineWidth = size / 3;
  for (const [x, y, on] of state.points) {
    pen.beginPath();
    pen.arc(x, y, size, 0, 7);
    pen.fillStyle = on ? "#0b6e5b" : "#a8321d";
    pen.strokeStyle = "#ffffff";
    pen.fill();
    pen.stroke();
  }
  if (!showCursor) return;
  const [x, y] = state.cursor;
  for (const [color, width] of [["#000000", size / 1.5], ["#ffffff", size / 4]]) {
    pen.strokeStyle = color;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(x - 3 * size, y);
    pen.lineTo(x + 3 * size, y);
    pen.moveTo(x, y - 3 * size);
    pen.lineTo(x, y + 3 * size);
    pen.stroke();
  }
}

function onKey(event) {
  const { width, height } = element("marks");
  const step = Math.max(1, Math.round(width / (event.shiftKey ? 20 : 160)));
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  const prompts = model()?.kind === "prompt";
  if (event.key in moves) {
    const limits = [width - 1, height - 1];
    state.cursor = state.cursor.map((part, at) => Math.min(limits[at], Math.max(0, part + moves[event.key][at])));
    draw(true);
    read(state.cursor);
  } else if (event.key === "Enter" && prompts) {
    addPoint(state.cursor, pointLabel(event));
    draw(true);
  } else if (event.key === "Backspace" && prompts) {
    undo();
    draw(true);
  } else if (event.key === "+" || event.key === "-") {
    zoomTo(state.zoom.scale * (event.key === "+" ? 1.5 : 1 / 1.5));
  } else if (event.key === "0") {
    zoomTo(1);
  } else return;
  event.preventDefault();
}

function download(button) {
  const link = node("a", "", { download: `${state.file.name.replace(/\.[^.]*$/, "")}-${model().name}.${button.dataset.ending}` });
  link.href = URL.createObjectURL(state.parts.get(button.dataset.media));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// -- zoom --------------------------------------------------------------------------------------------------------------

// Keeps a place of the view, by default its middle, where it is.
function zoomTo(scale, at) {
  const view = element("view");
  const { clientWidth: width, clientHeight: height } = view;
  const [x, y] = at ?? [width / 2, height / 2];
  const old = state.zoom;
  const next = Math.min(32, Math.max(1, scale));
  moveTo(next, x - ((x - old.x) * next) / old.scale, y - ((y - old.y) * next) / old.scale);
}

function moveTo(scale, x, y) {
  const { clientWidth: width, clientHeight: height } = element("view");
  const within = (value, size) => Math.min(0, Math.max(size * (1 - scale), value));
  state.zoom = { scale, x: within(x, width), y: within(y, height) };
  element("stage").style.transform = scale === 1 ? "" : `translate(${state.zoom.x}px, ${state.zoom.y}px) scale(${scale})`;
  element("view").classList.toggle("zoomed", scale > 1);
}

function onWheel(event) {
  event.preventDefault();
  const box = element("view").getBoundingClientRect();
  zoomTo(state.zoom.scale * 2 ** (-event.deltaY / 300), [event.clientX - box.left, event.clientY - box.top]);
}

// A drag moves a zoomed image; a click that hardly moves stays a click.
function onDrag(event) {
  if (state.zoom.scale === 1 || event.button) return;
  const { scale, x, y } = state.zoom;
  const view = element("view");
  let moved = false;
  const move = (next) => {
    const [dx, dy] = [next.clientX - event.clientX, next.clientY - event.clientY];
    moved ||= Math.hypot(dx, dy) > 4;
    if (moved) moveTo(scale, x + dx, y + dy);
  };
  const end = () => {
    view.removeEventListener("pointermove", move);
    window.removeEventListener("pointerup", end);
    if (moved) view.addEventListener("click", (click) => click.stopImmediatePropagation(), { capture: true, once: true });
  };
  view.addEventListener("pointermove", move);
  window.addEventListener("pointerup", end);
}

// -- events ------------------------------------------------------------------------------------------------------------

async function reportErrors(work) {
  element("error").textContent = "";
  try {
    await work();
    return true;
  } catch (error) {
    if (error.name === "AbortError") return false;
    element("error").textContent = error instanceof Problem ? error.message : `This page failed: ${error.message}; reload it.`;
    if (error.status === 401) {
      element("token-row").hidden = false;
      element("token").focus();
    }
    return false;
  }
}

function addListeners() {
  const drop = element("drop");
  element("file").addEventListener("change", (event) => loadFile(event.target.files[0]));
  // Anywhere on the page.
  for (const kind of ["dragover", "dragenter"]) {
    document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); loadFile(event.dataTransfer.files[0]); });
  element("model").addEventListener("change", choose);
  element("form").addEventListener("submit", (event) => { event.preventDefault(); map(); });
  element("token").addEventListener("change", () => { token.set(element("token").value); reportErrors(load); });
  element("opacity").addEventListener("input", applyOpacity);
  element("clear").addEventListener("click", () => { reset(); ready(); });
  element("undo").addEventListener("click", undo);
  const view = element("view");
  view.addEventListener("pointermove", (event) => read(place(event)));
  view.addEventListener("click", (event) => (model()?.kind === "prompt" ? addPoint(place(event), pointLabel(event)) : read(place(event))));
  view.addEventListener("keydown", onKey);
  view.addEventListener("blur", () => draw());
  for (const button of document.querySelectorAll("[data-media]")) button.addEventListener("click", () => download(button));
  element("cancel").addEventListener("click", cancel);
  element("in").addEventListener("click", () => zoomTo(state.zoom.scale * 1.5));
  element("out").addEventListener("click", () => zoomTo(state.zoom.scale / 1.5));
  element("fit").addEventListener("click", () => zoomTo(1));
  view.addEventListener("wheel", onWheel, { passive: false });
  view.addEventListener("pointerdown", onDrag);
  element("image").addEventListener("dragstart", (event) => event.preventDefault());
  for (const input of document.querySelectorAll('input[name="mode"]')) input.addEventListener("change", paint);
  element("swipe").addEventListener("input", paint);
  applyOpacity();
}

function applyOpacity() {
  const value = element("opacity").value;
  element("percent").textContent = `${value} %`;
  element("mask").style.opacity = value / 100;
}

start();
