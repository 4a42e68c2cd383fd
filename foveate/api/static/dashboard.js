// Asks /metrics every few seconds, keeps what came in this page, and shows it.

import { Chart, duration, element, format } from "./charts.js";
import { observations, parse, quantile } from "./metrics.js";
import { CHARTS, TILES, point, timed, times } from "./panels.js";

const POLL_MS = 2000;
const ANSWER_MS = 8000;
const RECENT_MS = 10_000;
const MINUTE_MS = 60_000;
const HISTORY_MS = 3_600_000;
const STATUS_POLLS = 15;
const KEY = "foveate-key";

const byId = (id) => document.getElementById(id);
const points = [];
let samples = [];
let status = null;
let told = null;
let polls = 0;
let gone = false;
let pointed = null;
let timer = 0;

class Refused extends Error {}

async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key === null ? {} : { authorization: `Bearer ${key}` };
  const answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
  if (answer.status === 401) throw new Refused();
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer;
}

async function poll() {
  try {
    const families = parse(await (await ask("metrics")).text());
    take({ time: Date.now(), families });
    const now = points[points.length - 1];
    // What is told in words is asked for when a number says that it has changed.
    const telling = [now.errors, now.batch === null, JSON.stringify([...(families.get("foveate_restarts_total") ?? [])])].join();
    if (gone || telling !== told || polls % STATUS_POLLS === 0) {
      status = await (await ask("status")).json();
      told = telling;
    }
    polls += 1;
    gone = false;
    showStatus();
  } catch (error) {
    if (error instanceof Refused) return askForKey("The server refused this key.");
    lose();
  }
  draw();
  timer = setTimeout(poll, POLL_MS);
}

function take(sample) {
  const before = (age) => samples.findLast((one) => sample.time - one.time >= age) ?? samples[0] ?? null;
  points.push(point(sample, before(RECENT_MS), before(MINUTE_MS)));
  samples.push(sample);
  // One that is older than a minute stays, to compare with.
  const old = samples.findLastIndex((one) => sample.time - one.time >= MINUTE_MS);
  samples.splice(0, Math.max(0, old));
  while (points[0].time < sample.time - HISTORY_MS) points.shift();
}

function lose() {
  gone = true;
  samples = [];
  points.push({ time: Date.now() });
  byId("state").textContent = "no answer";
  byId("state").dataset.state = "gone";
  banner("The server does not answer. This page goes on as soon as it does.");
}

function banner(text) {
  byId("banner").hidden = !text;
  if (byId("banner").textContent !== text) byId("banner").textContent = text;
}

function showStatus() {
  const where = status.device ? `on ${status.device}, ${status.dtype}` : "";
  byId("state").textContent = status.state;
  byId("state").dataset.state = status.state;
  byId("facts").textContent = [`${status.model} ${where}`, `version ${status.version}`, `up ${duration(Date.now() / 1000 - status.started)}`].join(" · ");
  document.title = `Foveate: ${status.model}`;
  banner([...(status.state === "starting" ? ["The engine is not there: it loads its model, or is started again."] : []), ...status.problems].join(" "));
  for (const [name, path] of Object.entries(status.links)) {
    if (!byId(`link-${name}`)) byId("links").append(element("a", { id: `link-${name}`, href: path }, name));
  }
  byId("error-counts").textContent = Object.entries(status.error_counts).map(([kind, count]) => `${kind} ${count}`).join(" · ");
  byId("no-errors").hidden = status.errors.length > 0;
  byId("errors").tBodies[0].replaceChildren(...status.errors.map(errorRow));
}

// Messages quote what clients sent: they become text, never markup.
function errorRow(one) {
  const cells = [new Date(one.time * 1000).toLocaleTimeString([], { hour12: false }), one.status || "–", one.type, one.message, one.request_id];
  const names = ["", "status", "type", "message", "id"];
  const row = element("tr", one.status >= 500 || !one.status ? { class: "failure" } : {});
  row.append(...cells.map((cell, number) => element("td", { class: names[number], title: String(cell) }, String(cell))));
  return row;
}

const charts = CHARTS.map((spec) => new Chart(spec, (part) => {
  pointed = part;
  draw();
}));

function draw() {
  const to = Date.now();
  // A page that was just opened has little to show, and shows that large.
  const began = Math.min(points[0]?.time ?? to, to - MINUTE_MS);
  const from = Math.max(began, to - Number(byId("window").value) * 1000);
  const shown = points.filter((one) => one.time >= from);
  const now = points[points.length - 1];
  const mark = pointed === null ? null : closest(shown, from + pointed * (to - from));
  for (const chart of charts) {
    const { lines } = chart.spec;
    chart.draw(typeof lines === "function" ? fitted(chart, lines(now)) : lines, shown, from, to, mark);
  }
  byId("tiles").replaceChildren(...TILES.map((tile) => showTile(tile, now)));
  if (!gone && samples.length) showTimes(samples[samples.length - 1].families, samples.length > 1 ? samples[0].families : null);
}

// With GPUs it is a part of them, elsewhere a number of cores.
function fitted(chart, lines) {
  const onGpu = lines[0]?.key.startsWith("gpu_");
  if (chart.spec.id === "use") {
    chart.spec.unit = onGpu ? "ratio" : "number";
    chart.title(onGpu ? "GPU use" : "CPU cores in use");
  } else chart.title(onGpu ? "GPU memory" : "Memory");
  return lines;
}

function closest(shown, time) {
  return shown.reduce((best, one) => (best && Math.abs(best.time - time) <= Math.abs(one.time - time) ? best : one), null);
}

function showTile(tile, now) {
  const value = now?.[tile.key] ?? null;
  const number = element("b", { "data-key": tile.key, "data-value": value ?? "" }, format(tile.unit, value));
  return element("div", { class: "tile" }, number, element("span", {}, tile.title));
}

function showTimes(now, minute) {
  byId("times").tBodies[0].replaceChildren(...timed(now).map((row) => {
    const cells = [minute ? times(now, minute, row) : [], times(now, null, row)].flatMap((buckets) => [
      String(observations(buckets)),
      ...[0.5, 0.95, 0.99].map((q) => format("seconds", quantile(q, buckets))),
    ]);
    return element("tr", { "data-row": row[2] ?? row[0] }, element("th", { scope: "row" }, row[0]), ...cells.map((cell) => element("td", {}, cell)));
  }));
}

function askForKey(note) {
  sessionStorage.removeItem(KEY);
  if (note) byId("key-note").textContent = note;
  byId("key-form").hidden = false;
  byId("main").hidden = true;
  byId("state").textContent = "locked";
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  byId("main").hidden = false;
  poll();
});

// With a key the address alone shows nothing: a browser sends no header when it follows a link.
byId("metrics-link").addEventListener("click", async (event) => {
  if (sessionStorage.getItem(KEY) === null) return;
  event.preventDefault();
  const text = await (await ask("metrics")).text();
  window.open(URL.createObjectURL(new Blob([text], { type: "text/plain" })));
});

byId("window").addEventListener("change", draw);
window.addEventListener("resize", draw);
document.addEventListener("visibilitychange", () => {
  // Timers of hidden pages are slowed down; whoever comes back sees what is now.
  if (document.hidden || !timer) return;
  clearTimeout(timer);
  poll();
});

byId("charts").append(...charts.map((chart) => chart.card));
if (document.documentElement.dataset.key === "needed" && sessionStorage.getItem(KEY) === null) askForKey("");
else poll();
