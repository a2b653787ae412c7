// Requests to the server with the access token, error messages, number formats.

export const token = {
  get: () => sessionStorage.getItem("rayseg-token") ?? "",
  set: (text) => sessionStorage.setItem("rayseg-token", text.trim()),
};

export class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The server does not answer; check that it is running.");
  }
  if (answer.ok) return answer;
  let detail = `The server answered with status ${answer.status}.`;
  try {
    const text = (await answer.json()).detail;
    detail = text.charAt(0).toUpperCase() + text.slice(1) + ".";
  } catch { /* not a problem document: keep the status */ }
  throw new Problem(answer.status, detail);
}

export const element = (id) => document.getElementById(id);

export function node(name, content = "", attributes = {}) {
  const created = document.createElement(name);
  created.append(content);
  for (const [key, value] of Object.entries(attributes)) created.setAttribute(key, value);
  return created;
}

export function area(m2) {
  if (m2 === null || m2 === undefined) return "–";
  if (m2 >= 1e5) return `${(m2 / 1e6).toPrecision(3)} km²`;
  if (m2 >= 1e4) return `${(m2 / 1e4).toPrecision(3)} ha`;
  return `${m2.toFixed(0)} m²`;
}

// A path as a word of a command.
export const quoted = (path) => (/^[\w@%+=:,.\/-]+$/.test(path) ? path : `'${path.replaceAll("'", "'\\''")}'`);

export const bytes = (count) => (count < 1e5 ? `${Math.ceil(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`);

export const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

export function swatch(color) {
  const created = node("span", "", { class: "swatch", "aria-hidden": "true" });
  if (color) created.style.background = color;
  else created.classList.add("unpainted"); // nothing is painted; not a box that could be ticked
  return created;
}

export function legendRow(row, cells) {
  const line = node("tr");
  const head = node("th", swatch(row.painted === false ? null : row.color), { scope: "row" });
  head.append(row.name);
  line.append(head, ...cells.map((text) => node("td", text, { class: "n" })));
  return line;
}
