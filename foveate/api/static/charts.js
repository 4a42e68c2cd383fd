// Lines over time, as SVG, and numbers as people read them.

const SVG = "http://www.w3.org/2000/svg";
const GIB = 2 ** 30;
const HEIGHT = 92;
const TOP = 12;
const BOTTOM = 3;

function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return `${digits(value / 1e6)} M`;
  if (size >= 1e4) return `${digits(value / 1e3)} k`;
  return size >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(size >= 10 ? 3 : 2)));
}

const FORMATS = {
  number: digits,
  ratio: (value) => `${digits(Math.round(value * 1000) / 10)} %`,
  seconds: (value) => (value >= 1 || value === 0 ? `${digits(value)} s` : value >= 0.001 ? `${digits(value * 1e3)} ms` : `${digits(value * 1e6)} µs`),
  bytes: (value) => (value >= GIB / 10 ? `${digits(value / GIB)} GiB` : `${digits(value / 2 ** 20)} MiB`),
};

export function format(unit, value) {
  return value === null || value === undefined || Number.isNaN(value) ? "–" : FORMATS[unit](value);
}

export function duration(seconds) {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  const parts = [[days, "d"], [hours, "h"], [minutes, "min"], [Math.floor(seconds % 60), "s"]];
  const first = parts.findIndex(([count]) => count);
  if (first < 0) return "0 s";
  return parts.slice(first, first + 2).filter(([count]) => count).map((part) => part.join(" ")).join(" ");
}

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// The smallest of 1, 2 or 5 times a power of ten that is not below.
function roof(value, unit) {
  const scale = unit !== "bytes" ? 1 : value > GIB / 2 ? GIB : 2 ** 20;
  const least = value / scale;
  const power = 10 ** Math.floor(Math.log10(least));
  return scale * power * [1, 2, 5, 10].find((step) => step * power >= least * (1 - 1e-9));
}

// A card with a title, a legend with values, and the lines. `spec` has title, unit, and max (the least roof).
export class Chart {
  constructor(spec, onPoint) {
    this.spec = spec;
    this.legend = element("ul", { class: "legend" });
    this.svg = drawn("svg", { role: "img", "aria-label": spec.title, height: HEIGHT });
    this.heading = element("h2", { title: spec.help }, spec.title);
    this.card = element("article", { class: "panel chart", id: spec.id }, this.heading, this.legend, this.svg);
    this.svg.addEventListener("pointermove", (event) => onPoint(event.offsetX / this.svg.clientWidth));
    this.svg.addEventListener("pointerleave", () => onPoint(null));
  }

  title(text) {
    this.heading.textContent = text;
    this.svg.setAttribute("aria-label", text);
  }

  // `lines`: [{key, label, unit, aside}]; `points`: [{time, key: value or null ...}], oldest first; `pointed`: one of them, or null.
  draw(lines, points, from, to, pointed) {
    const shown = pointed ?? points[points.length - 1] ?? {};
    this.legend.replaceChildren(...lines.map((line, number) => this.entry(line, number, shown[line.key])));
    lines = lines.filter((line) => !line.aside);
    const width = this.svg.clientWidth || 300;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const most = Math.max(this.spec.max ?? 0, ...lines.flatMap((line) => points.map((point) => point[line.key] ?? 0)));
    const top = this.spec.unit === "ratio" && most <= 1 ? 1 : most > 0 ? roof(most, this.spec.unit) : 1;
    const x = (time) => ((time - from) / (to - from)) * width;
    const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - TOP);
    const grid = [0, top / 2, top].map((value) => drawn("line", { class: "grid", x1: 0, x2: width, y1: y(value), y2: y(value) }));
    const label = drawn("text", { class: "axis", x: 0, y: TOP - 3 }, most > 0 ? format(this.spec.unit, top) : "");
    const span = drawn("text", { class: "axis end", x: width, y: TOP - 3 }, duration((to - from) / 1000));
    const paths = lines.map((line, number) => drawn("path", { class: `line c${number % 4}`, d: path(points, line.key, x, y) }));
    const mark = pointed ? [drawn("line", { class: "mark", x1: x(pointed.time), x2: x(pointed.time), y1: TOP, y2: HEIGHT })] : [];
    this.svg.replaceChildren(...grid, label, span, ...paths, ...mark);
  }

  entry(line, number, value) {
    const name = element("span", { class: "name" }, line.label);
    const shown = element("b", { "data-key": line.key, "data-value": value ?? "" }, format(line.unit ?? this.spec.unit, value));
    return element("li", { class: line.aside ? "aside" : `c${number % 4}` }, name, shown);
  }
}

// A gap wherever a value is missing; a value between two gaps is a short dash.
function path(points, key, x, y) {
  let text = "";
  let open = false;
  for (const point of points) {
    const value = point[key];
    if (value === null || value === undefined) {
      open = false;
      continue;
    }
    const place = `${x(point.time).toFixed(1)} ${y(value).toFixed(1)}`;
    text += open ? `L${place}` : `M${place}h1`;
    open = true;
  }
  return text;
}
