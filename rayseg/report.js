// Each pair of pictures, imagery and map, becomes one map that can be moved, enlarged and swiped. Without a script the
// page shows the pair.
const MOST = 24;

function button(text, label, act) {
  const one = document.createElement("button");
  one.type = "button";
  one.textContent = text;
  one.title = label;
  one.setAttribute("aria-label", label);
  one.addEventListener("click", act);
  return one;
}

function div(name, ...inside) {
  const one = document.createElement("div");
  one.className = name;
  one.append(...inside);
  return one;
}

function viewer(pair) {
  const [imagery, map] = pair.querySelectorAll("img");
  const { width, height } = { width: Number(map.getAttribute("width")), height: Number(map.getAttribute("height")) };
  const metres = Number(pair.dataset.metres);
  const caption = document.createElement("p");
  caption.className = "soft";
  caption.textContent = [...pair.querySelectorAll("figcaption")].map((one) => one.textContent).join(" | ");
  const layers = div("layers", imagery, map), divider = div("divider"), bar = div("scalebar");
  const stage = div("stage", layers, divider, bar);
  stage.tabIndex = 0;
  stage.setAttribute("role", "application");
  stage.setAttribute("aria-label", `Map of ${pair.dataset.title}: drag or use arrow keys to move it, plus and minus to zoom`);
  stage.style.aspectRatio = `${width} / ${height}`;
  const swipe = document.createElement("input");
  Object.assign(swipe, { type: "range", min: 0, max: 1000, value: 500 });
  swipe.setAttribute("aria-label", "Where the imagery ends and the map begins");
  const at = { zoom: 1, x: 0, y: 0 };
  const pointers = new Map();
  let swiping = false;

  function fit() {
    return Math.min(stage.clientWidth / width, stage.clientHeight / height);
  }

  function draw() {
    const scale = fit() * at.zoom, seen = [stage.clientWidth, stage.clientHeight];
    // The map stays in sight: it is centred while it is smaller than the stage.
    const limit = (value, size, whole) => (size <= whole ? (whole - size) / 2 : Math.min(0, Math.max(whole - size, value)));
    at.x = limit(at.x, width * scale, seen[0]);
    at.y = limit(at.y, height * scale, seen[1]);
    layers.style.transform = `translate(${at.x}px, ${at.y}px)`;
    layers.style.width = `${width * scale}px`;
    layers.style.height = `${height * scale}px`;
    const cut = (swipe.value / 1000) * seen[0];
    divider.style.left = `${cut}px`;
    map.style.clipPath = `inset(0 0 0 ${Math.min(Math.max(cut - at.x, 0), width * scale)}px)`;
    stage.style.touchAction = at.zoom > 1 ? "none" : "pan-y";
    layers.classList.toggle("pixels", scale > 3);
    if (at.zoom > 1.1) detail();
    if (metres) ruler(metres / (width * scale));
  }

  function ruler(metresPerPixel) {
    const most = metresPerPixel * Math.min(160, stage.clientWidth / 3), power = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].map((factor) => factor * power).find((one) => one <= most);
    bar.style.width = `${length / metresPerPixel}px`;
    bar.textContent = length >= 1000 ? `${length / 1000} km` : `${length} m`;
  }

  function detail() {
    for (const [image, name] of [[imagery, pair.dataset.imagery], [map, pair.dataset.map]]) {
      if (!name || image.dataset.asked) continue;
      image.dataset.asked = name;
      const finer = new Image();
      finer.onload = () => { image.src = finer.src; };  // a page without the files next to it keeps its own picture
      finer.src = name;
    }
  }

  function zoom(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
    const wanted = Math.min(MOST, Math.max(1, at.zoom * factor)), by = wanted / at.zoom;
    at.x = x - (x - at.x) * by;
    at.y = y - (y - at.y) * by;
    at.zoom = wanted;
    draw();
  }

  function place(event) {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  stage.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== stage) return;  // else the page could not be scrolled
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 300), ...place(event));
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => {
    const [x, y] = place(event);
    swiping = pointers.size === 0 && Math.abs(x - (swipe.value / 1000) * stage.clientWidth) < 18;
    pointers.set(event.pointerId, [x, y]);
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!pointers.has(event.pointerId)) return;
    const [x, y] = place(event), [lastX, lastY] = pointers.get(event.pointerId);
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
    pointers.set(event.pointerId, [x, y]);
    if (swiping) {
      swipe.value = (1000 * x) / stage.clientWidth;
      draw();
    } else if (other) {
      const apart = (px, py) => Math.hypot(px - other[0], py - other[1]);
      zoom(apart(x, y) / Math.max(1, apart(lastX, lastY)), (x + other[0]) / 2, (y + other[1]) / 2);
    } else {
      at.x += x - lastX;
      at.y += y - lastY;
      draw();
    }
  });
  for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, (event) => { pointers.delete(event.pointerId); });
  stage.addEventListener("dblclick", (event) => zoom(2, ...place(event)));
  stage.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    if (event.key in moves) {
      at.x += moves[event.key][0];
      at.y += moves[event.key][1];
      draw();
    } else if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 1.5 : 1 / 1.5);
    else return;
    event.preventDefault();
  });
  swipe.addEventListener("input", draw);
  const whole = button("whole", "Show the whole map", () => { at.zoom = 1; draw(); });
  const full = button("full screen", "Show the map on the full screen", () => stage.requestFullscreen());
  const side = document.createElement("label");
  side.className = "swipe";
  side.append("imagery", swipe, "map");
  const controls = div("controls", button("+", "Zoom in", () => zoom(1.5)), button("−", "Zoom out", () => zoom(1 / 1.5)), whole, full, side);
  pair.replaceChildren(stage, controls, caption);
  pair.className = "viewer";
  new ResizeObserver(draw).observe(stage);
}

document.querySelectorAll("[data-title]").forEach(viewer);
