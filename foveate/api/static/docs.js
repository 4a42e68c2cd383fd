// The reference: every endpoint and every field of /openapi.json, as text and tables.

import { element } from "./charts.js";

const NAME = /^#\/components\/schemas\//;
const BOUNDS = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<", minLength: "length ≥", maxLength: "length ≤", minItems: "items ≥", maxItems: "items ≤" };

// Text with `code` in it.
function prose(text) {
  return (text ?? "").split(/`+/).map((part, number) => (number % 2 ? element("code", {}, part) : part));
}

// A type as nodes: names of objects are links.
function type(schema) {
  if (!schema) return ["any"];
  if (schema.$ref) {
    const name = schema.$ref.replace(NAME, "");
    return [element("a", { href: `#${name}` }, name)];
  }
  const either = schema.anyOf ?? schema.oneOf;
  if (either) return either.flatMap((one, number) => [...(number ? [" or "] : []), ...type(one)]);
  if (schema.allOf?.length === 1) return type(schema.allOf[0]);
  if ("const" in schema) return [element("code", {}, JSON.stringify(schema.const))];
  if (schema.enum) return [element("code", {}, schema.enum.map((one) => JSON.stringify(one)).join(" | "))];
  if (schema.type === "array") return ["array of ", ...type(schema.items)];
  if (schema.type === "object" && schema.additionalProperties?.type) return ["object of ", ...type(schema.additionalProperties)];
  return [[schema.type ?? "any"].flat().join(" or ")];
}

// JSON's numbers are floats here: those that are too large to be exact are powers of two.
function bound(value) {
  return Math.abs(value) < 2 ** 53 ? String(value) : `${value < 0 ? "-" : ""}2^${Math.round(Math.log2(Math.abs(value)))}`;
}

function bounds(schema) {
  const whole = [schema, ...(schema.anyOf ?? [])];
  return whole.flatMap((one) => Object.entries(BOUNDS).filter(([key]) => key in one).map(([key, sign]) => `${sign} ${bound(one[key])}`)).join(", ");
}

function field(name, schema, required) {
  const notes = [bounds(schema), "default" in schema && schema.default !== null ? `default ${JSON.stringify(schema.default)}` : "", required ? "required" : ""];
  const row = element("tr", {}, element("td", {}, element("code", {}, name)), element("td", {}, ...type(schema)));
  row.append(element("td", {}, notes.filter(Boolean).join("; ")), element("td", {}, ...prose(schema.description)));
  return row;
}

function table(rows) {
  const head = element("tr", {}, ...["name", "type", "limits", ""].map((text) => element("th", {}, text)));
  return element("div", { class: "scroll-x" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
}

function content(label, description, kinds) {
  const parts = Object.entries(kinds ?? {}).filter(([, one]) => Object.keys(one.schema ?? {}).length);
  const types = parts.flatMap(([kind, one], number) => [number ? ", or " : " ", ...type(one.schema), ` (${kind})`]);
  return element("p", {}, element("b", {}, label), " ", ...prose(description), ...types);
}

function operation(path, method, one) {
  const title = element("h3", {}, element("span", { class: "method" }, method.toUpperCase()), element("code", {}, path));
  const made = element("article", { class: "panel" }, title, element("p", {}, ...prose(one.description)));
  const given = (one.parameters ?? []).map((parameter) => field(parameter.name, parameter.schema, parameter.required));
  if (given.length) made.append(table(given));
  if (one.requestBody) made.append(content("Body:", "", one.requestBody.content));
  for (const [status, answer] of Object.entries(one.responses)) {
    // Ours have a body of their own; what the framework adds by itself never happens here.
    if (status !== "422") made.append(content(status === "default" ? "Otherwise:" : `${status}:`, answer.description, answer.content));
  }
  return made;
}

function object(name, schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([key, one]) => field(key, one, schema.required?.includes(key)));
  const made = element("article", { class: "panel", id: name }, element("h3", {}, name), element("p", {}, ...prose(schema.description)));
  made.append(rows.length ? table(rows) : element("p", {}, ...type(schema)));
  return made;
}

function needed(description) {
  const found = new Set();
  const visit = (node) => {
    if (node === null || typeof node !== "object") return;
    const name = typeof node.$ref === "string" ? node.$ref.replace(NAME, "") : null;
    if (name !== null && !found.has(name)) {
      found.add(name);
      visit(description.components.schemas[name]);
    }
    for (const [key, value] of Object.entries(node)) if (key !== "422") visit(value);
  };
  visit(description.paths);
  return [...found];
}

try {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const description = await answer.json();
  document.getElementById("version").textContent = `version ${description.info.version}`;
  const operations = Object.entries(description.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, one]) => operation(path, method, one)));
  document.getElementById("operations").append(...operations);
  document.getElementById("schemas").append(...needed(description).map((name) => object(name, description.components.schemas[name])));
  // The browser looked for the place before it was there.
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
} catch (error) {
  const banner = document.getElementById("banner");
  banner.textContent = `/openapi.json could not be read (${error.message}).`;
  banner.hidden = false;
}
