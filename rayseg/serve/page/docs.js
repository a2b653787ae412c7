// The API reference, rendered from openapi.json.
import { Problem, ask, element, node, token } from "./ask.js";

function parameters(operation) {
  const body = Object.values(operation.requestBody?.content ?? {})[0]?.schema?.properties ?? {};
  const rows = (operation.parameters ?? []).map((one) => [`${one.name} (${one.in})`, one.description ?? ""]);
  for (const [name, one] of Object.entries(body)) rows.push([`${name} (form)`, one.description ?? one.type ?? ""]);
  const table = node("table");
  table.append(...rows.map(([name, text]) => {
    const line = node("tr", node("th", name, { scope: "row" }));
    line.append(node("td", text, { class: "wrap" }));
    return line;
  }));
  return table;
}

function request(path, method, operation) {
  const details = node("details");
  const answers = Object.keys(operation.responses?.["200"]?.content ?? {});
  details.append(node("summary", node("code", `${method.toUpperCase()} ${path}`)), node("p", operation.description ?? operation.summary ?? ""), parameters(operation));
  if (answers.length) details.append(node("p", `Responses: ${answers.join(", ")}`, { class: "soft" }));
  return details;
}

async function start() {
  element("error").textContent = "";
  try {
    const { paths } = await (await ask("/openapi.json")).json();
    element("requests").replaceChildren(...Object.entries(paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, one]) => request(path, method, one))));
    element("token-row").hidden = true;
  } catch (error) {
    element("error").textContent = error instanceof Problem ? error.message : `This page failed: ${error.message}; reload it.`;
    if (error.status === 401) element("token-row").hidden = false;
  }
}

element("example").textContent = `curl -F image=@field.tif -H "Accept: image/png" \\\n  ${location.origin}/v1/models/NAME/predict > mask.png`;
element("token").addEventListener("change", () => { token.set(element("token").value); start(); });
start();
