// The page at /: an image, a model, the mask over the image.
import { Problem, area, ask, bytes, element, legendRow, node, percent, token } from "./ask.js";

const UNSUPERVISED = { name: "unsupervised", kind: "free", task: "unsupervised", classes: [] };
const state = { file: null, models: [], classes: [], pixels: null, points: [], cursor: null, things: null, turn: 0 };

async function start() {
  addListeners();
  await reportErrors(load);
}

async function load() {
  const found = await (await ask("/v1/models")).json();
  element("token-row").hidden = true;
  const sam = found.models.filter((one) => one.kind === "sam").slice(0, 1);
  const maps = found.models.filter((one) => one.task === "segmentation");
  state.models = [...maps, ...sam.flatMap((one) => [{ ...one, kind: "prompt" }, { ...one, kind: "auto" }]), UNSUPERVISED];
  element("model").replaceChildren(...state.models.map((one, at) => node("option", optionTitle(one), { value: at })));
  choose();
  const { runs } = await (await ask("/v1/runs")).json();
  const links = runs.slice(0, 6).map((run) => node("a", run.name, { href: `/runs/${encodeURIComponent(run.name)}` }));
  element("runs").replaceChildren(...(links.length ? ["Runs: ", ...links.flatMap((link) => [link, " "])] : []));
}

const optionTitle = (one) =>
  ({ prompt: `${one.name}: segment at points`, auto: `${one.name}: segment everything`, free: "no model: unsupervised labels" })[one.kind] ??
  `${one.name} (${one.classes.map((row) => row.name).join(", ")})`;

const model = () => state.models[element("model").value];

function choose() {
  const one = model();
  if (!one) return;
  element("prompting").hidden = one.kind !== "prompt";
  element("view").classList.toggle("prompting", one.kind === "prompt");
  const scores = Object.entries(one.metrics ?? {}).map(([name, value]) => `${name} ${value.toFixed(3)}`);
  element("about").textContent = [one.bands && `Bands: ${one.bands.join(", ")} (${one.dtype}).`, scores.length && `Training metrics: ${scores.join(", ")}.`].filter(Boolean).join(" ");
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
  Object.assign(state, { points: [], pixels: null, classes: [], things: null, turn: state.turn + 1 });
  element("result").hidden = true;
  element("readout").textContent = "";
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
  if (!good) state.file = null;
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

const request = (media) => ask(address(model()), { method: "POST", body: form(), headers: { Accept: media } });

// Of several requests in flight, only the last one's result is shown.
async function map() {
  const turn = ++state.turn;
  element("go").disabled = true;
  element("readout").textContent = "Predicting…";
  await reportErrors(async () => {
    const [said, mask] = await Promise.all([request("application/json"), request("image/png")]);
    const [found, picture] = [await said.json(), await createImageBitmap(await mask.blob())];
    if (turn !== state.turn) return;
    const pen = element("mask").getContext("2d", { willReadFrequently: true });
    pen.clearRect(0, 0, picture.width, picture.height);
    pen.drawImage(picture, 0, 0);
    state.pixels = pen.getImageData(0, 0, picture.width, picture.height);
    showResult(found);
  });
  if (turn !== state.turn) return;
  if (element("readout").textContent === "Predicting…") element("readout").textContent = "";
  ready();
}

function showResult(found) {
  state.things = found.things ?? null;
  state.classes = found.classes ?? [];
  const rows = state.things
    ? [{ name: `${state.things.length} object${state.things.length === 1 ? "" : "s"}`, color: null, painted: false }]
    : state.classes;
  element("legend").replaceChildren(...rows.map((row) => legendRow(row, state.things ? things(found) : classCells(row))));
  element("score").textContent = state.things ? "predicted IoU" : "mean score";
  element("result").hidden = false;
  document.querySelector('[data-media="image/tiff"]').hidden = Boolean(state.things);
  element("readout").textContent = found.seconds ? `Done in ${found.seconds.toFixed(1)} s. Move the pointer over the image to read its classes.` : "Done.";
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
  const [r, g, b, a] = state.pixels.data.slice(4 * (row * state.pixels.width + col), 4 * (row * state.pixels.width + col) + 4);
  const color = `#${[r, g, b].map((part) => part.toString(16).padStart(2, "0")).join("")}`.toUpperCase();
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
  } else return;
  event.preventDefault();
}

async function download(button) {
  await reportErrors(async () => {
    const link = node("a", "", { download: `${state.file.name.replace(/\.[^.]*$/, "")}-${model().name}.${button.dataset.ending}` });
    link.href = URL.createObjectURL(await (await request(button.dataset.media)).blob());
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

// -- events ------------------------------------------------------------------------------------------------------------

async function reportErrors(work) {
  element("error").textContent = "";
  try {
    await work();
    return true;
  } catch (error) {
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
  for (const kind of ["dragover", "dragenter"]) {
    drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); loadFile(event.dataTransfer.files[0]); });
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
  applyOpacity();
}

function applyOpacity() {
  const value = element("opacity").value;
  element("percent").textContent = `${value} %`;
  element("mask").style.opacity = value / 100;
}

start();
