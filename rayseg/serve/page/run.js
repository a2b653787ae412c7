// The page of a run: map over imagery, legend, ledger, failed tiles.
import { Problem, area, ask, element, legendRow, node, percent, token } from "./ask.js";

const name = decodeURIComponent(location.pathname.split("/").pop());
export const base = `/v1/runs/${encodeURIComponent(name)}`;
export const shown = { map: null, layers: null, run: null, image: null, follows: 0 };

const EMPTY_IMAGE = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7";

// A busy server answers 503 at once, and a map requests many tiles together.
export async function withRetry(path, signal, tries = 8) {
  try {
    return await ask(path, { signal });
  } catch (error) {
    if (error.status !== 503 || !tries) throw error;
    await new Promise((done) => { setTimeout(done, 1000 * (1 + Math.random())); });
    return withRetry(path, signal, tries - 1);
  }
}

// While somebody clicks, the map that follows the clicks comes first; where it does not follow, that of the run.
async function classesOf(layer, place, signal) {
  if (layer === "classes" && shown.follows) {
    const answer = await withRetry(`${base}/clicks/tiles/${place}`, signal);
    if (answer.status !== 204) return answer;
  }
  return withRetry(`${base}/tiles/${place}`, signal);
}

// Tiles are fetched, because an <img> cannot send the token.
export const Tiles = L.GridLayer.extend({
  createTile(coords, done) {
    const image = node("img", "", { alt: "", role: "presentation" });
    image.aborter = new AbortController();
    const { z, x, y } = coords;
    const query = new URLSearchParams({ layer: this.options.layer, ...(this.options.image && { image: this.options.image }) });
    classesOf(this.options.layer, `${z}/${x}/${y}.png?${query}`, image.aborter.signal)
      .then(async (answer) => {
        image.onload = () => { URL.revokeObjectURL(image.src); done(null, image); };
        image.src = answer.status === 204 ? EMPTY_IMAGE : URL.createObjectURL(await answer.blob());
      })
      .catch((error) => done(error, image));
    return image;
  },
});

async function load() {
  const run = await (await ask(base)).json();
  shown.run = run;
  element("token-row").hidden = true;
  element("details").hidden = false;
  element("title").textContent = document.title = `${run.name}: ${run.pipeline} of ${run.region}`;
  element("state").textContent = run.reason ? `${run.status}: ${run.reason}` : run.status;
  const rows = run.classes.map((row) => legendRow(row, [percent(row.share), row.area_m2 === null ? `${row.pixels.toLocaleString()} px` : area(row.area_m2)]));
  element("legend").replaceChildren(...(rows.length ? rows : [node("tr", node("td", "Nothing is mapped yet."))]));
  element("ledger").replaceChildren(...Object.entries(run.ledger).map(([step, one]) => {
    const counts = Object.entries(one.counts).filter(([, count]) => count).map(([status, count]) => `${count} ${status}`);
    const line = node("tr", node("th", step, { scope: "row" }));
    line.append(node("td", `${one.planned} planned = ${counts.join(" + ") || 0}`, { class: "wrap" }));
    return line;
  }));
  element("failed").hidden = !run.troubles.length;
  element("troubles").replaceChildren(...run.troubles.map((one) => {
    const line = node("tr", node("th", one.id, { scope: "row" }));
    line.append(node("td", one.reason, { class: "wrap" }));
    return line;
  }));
  const images = run.images.map((one) => node("option", one.id, { value: one.id }));
  element("image").replaceChildren(...images);
  element("image-row").hidden = !images.length;
  run.bounds ? onEarth(run) : onImage();
}

function createMap(options) {
  shown.map?.remove();
  shown.image = null;
  shown.failed = L.layerGroup();
  shown.map = L.map("map", { zoomControl: true, keyboard: true, attributionControl: false, ...options });
}

function addLayers(options, imageryZoom) {
  const imagery = new Tiles({ layer: "imagery", tileSize: 256, ...options, ...imageryZoom }).addTo(shown.map);
  const classes = new Tiles({ layer: "classes", tileSize: 256, ...options }).addTo(shown.map);
  // A tile that leaves the screen is cancelled, so that the server stops drawing it.
  for (const layer of [imagery, classes]) layer.on("tileunload", (event) => event.tile.aborter.abort());
  shown.layers = { imagery, classes };
  shown.options = options;
  applyOpacity();
  document.dispatchEvent(new Event("map"));
}

function onEarth(run) {
  const [west, south, east, north] = run.bounds;
  createMap({ maxZoom: 22 });
  L.control.scale({ imperial: false }).addTo(shown.map);
  shown.map.fitBounds([[south, west], [north, east]]);
  for (const one of run.troubles.filter((row) => row.bounds)) {
    const [w, s, e, n] = one.bounds;
    showFailed([[s, w], [n, e]], one);
  }
  addLayers({ maxZoom: 22, maxNativeZoom: 22, bounds: [[south, west], [north, east]] }, { minZoom: run.minzoom });
}

function onImage() {
  const one = shown.run.images.find((row) => row.id === element("image").value);
  if (!one) return;
  const scale = 256 / Math.max(one.width, one.height);
  const deepest = Math.ceil(Math.log2(Math.max(one.width, one.height) / 256));
  const corners = (left, top, right, bottom) => [[-bottom * scale, left * scale], [-top * scale, right * scale]];
  createMap({ crs: L.CRS.Simple, minZoom: -2, maxZoom: deepest + 3 });
  shown.image = { id: one.id, scale };
  shown.map.fitBounds(corners(0, 0, one.width, one.height));
  for (const row of shown.run.troubles.filter((row) => row.image === one.id && row.box)) showFailed(corners(...row.box), row);
  addLayers({ image: one.id, minZoom: -2, minNativeZoom: 0, maxZoom: deepest + 3, maxNativeZoom: Math.max(0, deepest), bounds: corners(0, 0, one.width, one.height) });
}

function showFailed(corners, one) {
  const box = L.rectangle(corners, { color: "#c0341d", weight: 2, dashArray: "6 4", fillOpacity: 0.12 });
  box.bindTooltip(node("span", `${one.id}: ${one.reason}`)).addTo(shown.failed.addTo(shown.map));
}

function applyOpacity() {
  const value = element("opacity").value;
  element("percent").textContent = `${value} %`;
  shown.layers?.classes.setOpacity(value / 100);
}

async function start() {
  element("error").textContent = "";
  try {
    await load();
  } catch (error) {
    element("error").textContent = error instanceof Problem ? error.message : `This page failed: ${error.message}; reload it.`;
    if (error.status === 401) element("token-row").hidden = false;
  }
}

element("opacity").addEventListener("input", applyOpacity);
element("image").addEventListener("change", onImage);
element("token").addEventListener("change", () => { token.set(element("token").value); start(); });
start();
