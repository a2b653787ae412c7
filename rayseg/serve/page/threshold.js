// The threshold of a map of one class. The page applies it to tiles of scores, so that the map follows without a request.
import { area, ask, element, node, percent, quoted } from "./ask.js";
import { base, shown, withRetry } from "./run.js";

// The limit is a text: that of the map exactly, until the slider moves.
const state = { said: null, layer: null, limit: "0.5" };
const chosen = () => Number(state.limit);

function paint(canvas) {
  const image = new ImageData(256, 256), limit = chosen() * 254;
  const [red, green, blue] = state.color;
  for (let at = 0; at < image.data.length; at += 4) {
    // No score is transparent; the rule is that of the run: a score above the threshold.
    if (canvas.scores[at + 3] && canvas.scores[at] > limit) image.data.set([red, green, blue, 255], at);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

const Scores = L.GridLayer.extend({
  createTile({ z, x, y }, done) {
    const canvas = node("canvas", "", { width: 256, height: 256, role: "presentation" });
    canvas.aborter = new AbortController();
    const query = new URLSearchParams({ layer: "probabilities", ...(this.options.image && { image: this.options.image }) });
    withRetry(`${base}/tiles/${z}/${x}/${y}.png?${query}`, canvas.aborter.signal)
      .then(async (answer) => {
        if (answer.status !== 204) {
          const image = await createImageBitmap(await answer.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
          const context = canvas.getContext("2d", { willReadFrequently: true });
          context.drawImage(image, 0, 0);
          canvas.scores = context.getImageData(0, 0, 256, 256).data;
          paint(canvas);
        }
        done(null, canvas);
      })
      .catch((error) => done(error, canvas));
    return canvas;
  },
});

function showShare() {
  const limit = chosen() * 254;
  const share = state.said.shares.reduce((sum, part, score) => (score > limit ? sum + part : sum), 0);
  const ground = state.said.area_m2 === null ? "" : ` (${area(share * state.said.area_m2)})`;
  const counted = state.said.tiles < state.said.of ? `, estimated from ${state.said.tiles} of ${state.said.of} tiles` : "";
  element("chosen").textContent = state.limit;
  element("share").textContent = `${percent(share)} ${state.said.class}${ground}${counted}; before units below the minimum area are removed.`;
  element("command").textContent = `rayseg remap ${quoted(shown.run.path ?? "RUN")} --set threshold=${state.limit} --out NEW`;
}

function toOwn() {
  state.limit = String(state.said.own ?? 0.5);
  element("threshold").value = Math.round(chosen() * 100);
  showShare();
}

function follow() {
  state.limit = (Number(element("threshold").value) / 100).toFixed(2);
  showShare();
  if (!state.layer) {
    const zoom = shown.image ? {} : { minZoom: shown.run.minzoom };
    state.layer = new Scores({ tileSize: 256, ...shown.options, ...zoom, opacity: element("opacity").value / 100 });
    state.layer.on("tileunload", (event) => event.tile.aborter.abort());
    state.layer.addTo(shown.map);
    element("show-classes").checked = false;
    element("show-classes").onchange?.();
  }
  for (const { el } of Object.values(state.layer._tiles)) if (el.scores) paint(el);
}

function reset() {
  state.layer?.remove();
  state.layer = null;
  toOwn();
  element("show-classes").checked = true;
  element("show-classes").onchange?.();
}

document.addEventListener("map", async () => {
  const { map } = shown;
  state.layer = null;
  element("deciding").hidden = true;
  const answer = await ask(`${base}/scores`).catch((error) => { if (error.status === 404 || error.status === 422) return null; throw error; });
  if (!answer || shown.map !== map) return;
  state.said = await answer.json();
  const hex = shown.run.classes.find((row) => row.name === state.said.class)?.color ?? "#009e73";
  state.color = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  toOwn();
  element("own").textContent = state.said.own === null ? "Back to the map" : `Back to the map's own, ${Number(state.said.own.toFixed(3))}`;
  element("deciding").hidden = false;
});
element("threshold").addEventListener("input", follow);
element("own").addEventListener("click", reset);
element("copy").addEventListener("click", () => navigator.clipboard?.writeText(element("command").textContent));
element("opacity").addEventListener("input", () => state.layer?.setOpacity(element("opacity").value / 100));
