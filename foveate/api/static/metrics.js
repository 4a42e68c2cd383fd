// Prometheus' text format, and what can be computed from two samples of it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

// Parse a whole answer: a map from each name to a map from its labels, as text, to {labels, value}.
export function parse(text) {
  const families = new Map();
  for (const line of text.split("\n")) {
    const found = LINE.exec(line);
    if (!found) continue;
    const [, name, written = "", value] = found;
    const labels = {};
    for (const [, key, quoted] of written.matchAll(LABEL)) {
      labels[key] = quoted.replace(/\\(.)/g, (_, one) => (one === "n" ? "\n" : one));
    }
    if (!families.has(name)) families.set(name, new Map());
    families.get(name).set(written, { labels, value: value === "+Inf" ? Infinity : Number(value) });
  }
  return families;
}

export function series(families, name) {
  return [...(families.get(name)?.entries() ?? [])].map(([written, one]) => ({ written, ...one }));
}

// The sum over all labels; null where there is no such number.
export function total(families, name) {
  const all = series(families, name);
  return all.length ? all.reduce((sum, one) => sum + one.value, 0) : null;
}

// By how much one counter grew. One that is smaller than before began again at 0: its process was started again.
function grown(one, before) {
  const old = before?.get(one.written)?.value ?? 0;
  return one.value >= old ? one.value - old : one.value;
}

// By how much counters grew between two samples, over all labels; null where there is nothing to compare.
export function increase(now, then, name, wanted = () => true) {
  const all = series(now, name).filter((one) => wanted(one.labels));
  if (!all.length || !then.has(name)) return null;
  return all.reduce((sum, one) => sum + grown(one, then.get(name)), 0);
}

export function ratio(part, whole) {
  return part === null || !whole ? null : part / whole;
}

// The observations of a histogram between two samples, or since the start without `then`: [[le, cumulative], ...].
export function histogram(now, then, name, wanted = () => true) {
  const buckets = new Map();
  for (const one of series(now, `${name}_bucket`)) {
    if (!wanted(one.labels)) continue;
    const le = one.labels.le === "+Inf" ? Infinity : Number(one.labels.le);
    buckets.set(le, (buckets.get(le) ?? 0) + grown(one, then?.get(`${name}_bucket`)));
  }
  return [...buckets].sort(([a], [b]) => a - b);
}

export function observations(buckets) {
  return buckets.length ? buckets[buckets.length - 1][1] : 0;
}

// A quantile as Prometheus' histogram_quantile has it: linear within the bucket; null of nothing.
export function quantile(q, buckets) {
  const wanted = q * observations(buckets);
  if (!wanted) return null;
  let [lower, below] = [0, 0];
  for (const [le, cumulative] of buckets) {
    if (cumulative >= wanted) {
      return le === Infinity ? lower : lower + ((le - lower) * (wanted - below)) / (cumulative - below);
    }
    [lower, below] = [le, cumulative];
  }
  return lower;
}
