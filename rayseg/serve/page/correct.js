// Clicks and strokes where the map of a run is wrong: the server keeps them, and the tiles in view follow.
import { ask, element, node, quoted, swatch } from "./ask.js";
import { base, shown } from "./run.js";

const FAR = 4; // screen pixels between two places of a stroke
const state = { label: null, clicks: [], stroke: null, marks: null, file: "" };

const active = () => element("correcting").checked && state.label !== null;
const say = (text) => { element("clicked").textContent = text; };
const colorOf = (label) => shown.run.classes.find((row) => row.name === label)?.color ?? "#ffffff";

// Degrees on Earth; columns and rows of an image without georeference.
const place = ({ lat, lng }) => (shown.image ? [lng / shown.image.scale, -lat / shown.image.scale] : [lng, lat]);
const back = ([x, y]) => (shown.image ? [-y * shown.image.scale, x * shown.image.scale] : [y, x]);

function chooseLabel(name) {
  state.label = name;
  for (const input of element("labels").querySelectorAll("input")) input.checked = input.value === name;
}

function listLabels() {
  const rows = shown.run.classes.map((row, at) => {
    const input = node("input", "", { type: "radio", name: "label", value: row.name });
    input.addEventListener("change", () => chooseLabel(row.name));
    const line = node("label", input, { class: "pick" });
    line.append(swatch(row.color), `${at < 9 ? `${at + 1} ` : ""}${row.name}`);
    return line;
  });
  element("labels").replaceChildren(element("labels").firstElementChild, ...rows);
  if (state.label === null && shown.run.classes.length) chooseLabel(shown.run.classes[0].name);
}

function mark() {
  state.marks?.remove();
  state.marks = L.layerGroup().addTo(shown.map);
  for (const { geometry, properties } of state.clicks) {
    if ((properties.image ?? null) !== (shown.image?.id ?? null)) continue;
    const points = geometry.type === "Point" ? [geometry.coordinates] : geometry.coordinates;
    const color = colorOf(properties.class);
    const shape = points.length === 1
      ? L.circleMarker(back(points[0]), { radius: 5, color: "#ffffff", weight: 2, fillColor: color, fillOpacity: 1 })
      : L.polyline(points.map(back), { color, weight: 5 });
    shape.bindTooltip(node("span", `${properties.class}${properties.name ? ` by ${properties.name}` : ""}`)).addTo(state.marks);
  }
}

async function refresh() {
  const found = await (await ask(`${base}/clicks`)).json();
  state.clicks = found.features;
  state.file = found.file;
  element("undo").disabled = !state.clicks.length;
  shown.follows = element("correcting").checked ? state.clicks.length : 0;
  mark();
  say(state.clicks.length
    ? `${state.clicks.length} clicks. For the whole map: rayseg correct ${quoted(shown.run.path ?? "RUN")} --clicks ${quoted(state.file)} --out NEW`
    : "");
  shown.layers.classes.redraw();
}

async function attempt(work) {
  try {
    await work();
    await refresh();
    element("error").textContent = "";
  } catch (error) {
    say(error.message);
  }
}

function add(places) {
  say("The map follows …");
  const click = { label: state.label, coordinates: places.map(place), name: element("who").value.trim() };
  if (shown.image) click.image = shown.image.id;
  const headers = { "Content-Type": "application/json" };
  return attempt(() => ask(`${base}/clicks`, { method: "POST", headers, body: JSON.stringify(click) }));
}

function undo() {
  const own = element("who").value.trim();
  // Of several people each takes back their own clicks.
  const last = state.clicks.filter((click) => (click.properties.name ?? "") === own).pop();
  if (last) attempt(() => ask(`${base}/clicks/${last.properties.id}`, { method: "DELETE" }));
}

function listen() {
  const { map } = shown;
  map.boxZoom.disable(); // Shift draws
  map.on("click", (event) => { if (active() && !event.originalEvent.shiftKey) add([event.latlng]); });
  map.on("mousedown", (event) => {
    if (!active() || !event.originalEvent.shiftKey) return;
    map.dragging.disable();
    state.stroke = { places: [event.latlng], line: L.polyline([event.latlng], { color: colorOf(state.label), weight: 5 }).addTo(map) };
  });
  map.on("mousemove", (event) => {
    const { stroke } = state;
    if (!stroke || stroke.places.length >= 500) return;
    const last = map.latLngToContainerPoint(stroke.places.at(-1));
    if (last.distanceTo(event.containerPoint) < FAR) return;
    stroke.places.push(event.latlng);
    stroke.line.addLatLng(event.latlng);
  });
  map.on("mouseup", () => {
    const { stroke } = state;
    state.stroke = null;
    map.dragging.enable();
    if (!stroke) return;
    stroke.line.remove();
    add(stroke.places);
  });
}

document.addEventListener("map", async () => {
  try {
    await ask(`${base}/clicks`);
  } catch {
    return; // no folder for clicks, or no model that could follow them
  }
  element("correct").hidden = false;
  listLabels();
  listen();
  if (element("correcting").checked) attempt(() => null);
});
element("correcting").addEventListener("change", (event) => {
  element("picking").hidden = !event.target.checked;
  element("map").classList.toggle("prompting", event.target.checked);
  attempt(() => null);
});
element("undo").addEventListener("click", undo);
document.addEventListener("keydown", (event) => {
  if (!element("correcting").checked || event.target.matches("input[type=text], input[type=password]")) return;
  const row = /^[1-9]$/.test(event.key) ? shown.run.classes[event.key - 1] : null;
  if (row) chooseLabel(row.name);
  if (event.key === "z" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); undo(); }
});
