// Layers of a run besides imagery and classes: scores, outlines, a basemap; the value under the pointer, files, loading.
import { area, ask, element, node, token } from "./ask.js";
import { Tiles, base, shown } from "./run.js";

const state = { more: null, outlines: null, basemap: null, scores: null, loading: 0, timer: 0, asked: 0 };

// Degrees on Earth; columns and rows of an image without georeference.
const place = ({ lat, lng }) => (shown.image ? [lng / shown.image.scale, -lat / shown.image.scale] : [lng, lat]);
const back = ([x, y]) => (shown.image ? L.latLng(-y * shown.image.scale, x * shown.image.scale) : L.latLng(y, x));
const ofImage = () => (shown.image ? { image: shown.image.id } : {});

function watch(layer) {
  const count = (more) => { state.loading += more; element("loading").hidden = state.loading <= 0; };
  let busy = false;
  layer.on("loading", () => { if (!busy) { busy = true; count(1); } });
  layer.on("load remove", () => { if (busy) { busy = false; count(-1); } });
}

function toggle(name, layer) {
  const box = element(`show-${name}`);
  const apply = () => (box.checked ? layer.addTo(shown.map) : layer.remove());
  box.onchange = apply;
  apply();
}

function describe({ properties: row }) {
  const table = node("table");
  const facts = {
    id: row.id ?? row.number, class: row.name ?? row.class, area: row.area_m2 === undefined ? undefined : area(row.area_m2),
    pixels: row.area_px ?? row.pixels, score: (row.score ?? row.score_mean)?.toFixed?.(3), image: row.image,
  };
  for (const [name, value] of Object.entries(facts)) {
    if (value === undefined || value === null) continue;
    const line = node("tr", node("th", name, { scope: "row" }));
    line.append(node("td", String(value)));
    table.append(line);
  }
  return table;
}

async function outline() {
  if (!element("show-outlines").checked || !state.more?.outlines) return;
  const box = shown.map.getBounds(), asked = ++state.asked;
  const [[west, south], [east, north]] = [place(box.getSouthWest()), place(box.getNorthEast())];
  const query = new URLSearchParams({ west, south: Math.min(south, north), east, north: Math.max(south, north), ...ofImage() });
  const found = await (await ask(`${base}/shapes?${query}`)).json();
  if (asked !== state.asked) return; // the map has moved since
  state.outlines.clearLayers().addData(found);
  element("show-outlines").parentElement.title = found.more ? `The largest in view; ${found.more} are left out: zoom in` : "";
}

function readout(event) {
  clearTimeout(state.timer);
  state.timer = setTimeout(async () => {
    const [x, y] = place(event.latlng);
    try {
      const found = await (await ask(`${base}/value?${new URLSearchParams({ x, y, ...ofImage() })}`)).json();
      const scores = Object.entries(found.scores).map(([name, score]) => `${name} ${score.toFixed(2)}`);
      const where = shown.image ? `${Math.floor(x)}, ${Math.floor(y)}` : `${y.toFixed(5)}, ${x.toFixed(5)}`;
      element("value").textContent = [found.class ?? "not mapped", scores.slice(0, 4).join(", "), where].filter(Boolean).join(" | ");
    } catch (error) { element("value").textContent = error.message; }
    element("value").hidden = false;
  }, 120);
}

async function open(event) {
  if (!token.get()) return; // the browser follows the link
  event.preventDefault();
  const content = await (await ask(event.currentTarget.getAttribute("href"))).blob();
  window.open(URL.createObjectURL(content));
}

function list(files) {
  element("files").hidden = !files.length;
  element("links").replaceChildren(...files.map(([what, path]) => {
    const link = node("a", what, { href: `${base}/files/${path}`, target: "_blank" });
    link.addEventListener("click", open);
    return node("li", link);
  }));
}

document.addEventListener("map", async () => {
  const { map, layers, options } = shown;
  state.loading = 0;
  for (const layer of Object.values(layers)) watch(layer);
  toggle("imagery", layers.imagery);
  toggle("classes", layers.classes);
  toggle("failed", shown.failed);
  element("show-failed").parentElement.hidden = !shown.failed.getLayers().length;
  map.on("mousemove", readout).on("mouseout", () => { clearTimeout(state.timer); element("value").hidden = true; });
  state.more = await (await ask(`${base}/layers`)).json();
  if (shown.map !== map) return; // another image was chosen
  if (state.more.basemap && !shown.image) L.tileLayer(state.more.basemap, { maxZoom: 22, maxNativeZoom: 19 }).addTo(map).setZIndex(0);
  state.scores = new Tiles({ layer: "scores", tileSize: 256, ...options, ...(shown.image ? {} : { minZoom: shown.run.minzoom }) });
  watch(state.scores);
  state.scores.on("tileunload", (event) => event.tile.aborter.abort());
  element("show-scores").parentElement.hidden = !state.more.scores;
  toggle("scores", state.scores);
  const color = getComputedStyle(document.documentElement).getPropertyValue("--outline");
  state.outlines = L.geoJSON(null, {
    coordsToLatLng: back,
    style: { color, weight: 1.5, fill: true, fillOpacity: 0 },
    onEachFeature: (feature, layer) => layer.on("click", (event) => {
      if (!element("correcting").checked) L.popup().setLatLng(event.latlng).setContent(describe(feature)).openOn(map);
    }),
  });
  element("show-outlines").parentElement.hidden = !state.more.outlines;
  element("show-outlines").checked ||= shown.run.pipeline === "agri";
  toggle("outlines", state.outlines);
  element("show-outlines").addEventListener("change", outline);
  map.on("moveend", outline);
  outline();
  list(state.more.files);
});
