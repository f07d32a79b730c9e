// @ts-check
/**
 * Poll /stats once a second and show the relay's stats as tiles and charts.
 *
 * The relay reports totals since its start. Rates and percentiles are computed here from the
 * difference between two responses. Knows no channel.
 */

const POLL_INTERVAL_MS = 1_000;
const REQUEST_TIMEOUT_MS = 5_000; // then the relay is shown as not reachable
const WINDOW_MS = 120_000;
const REPLICA_SWITCH_MS = 10_000; // ignore other replicas of a load balancer for this long
const CURVE_GAP_MS = 11_000; // a curve has a gap where responses were missing for longer
const [WIDTH, HEIGHT] = [600, 100]; // of a plot, in SVG user units

/** @type {Chart[]} */
const CHARTS = [
  {title: "Clients", unit: formatCount, curves: [["", ({now}) => now.connected_clients]]},
  {title: "Messages in", unit: formatRate, curves: [["", perSecond(({messages}) => messages)]]},
  {
    title: "Deliveries out",
    unit: formatRate,
    curves: [["", perSecond(({deliveries}) => deliveries)]],
  },
  {
    title: "Delivery latency",
    unit: formatDuration,
    curves: [
      ["p50", quantile(0.5, (stats) => stats.delivery_seconds)],
      ["p99", quantile(0.99, (stats) => stats.delivery_seconds)],
    ],
  },
  {
    title: "Drops and refusals",
    unit: formatRate,
    curves: [
      ["drops", perSecond(({drops}) => sum(drops))],
      ["refusals", perSecond(({refusals}) => sum(refusals))],
    ],
  },
  {
    title: "Event loop lag",
    unit: formatDuration,
    curves: [["p99", quantile(0.99, (stats) => stats.event_loop_lag_seconds)]],
  },
];

/** @type {[string, (stats: Stats) => string, ((stats: Stats) => string)?][]} title, text, kind */
const TILES = [
  [
    "Backplane",
    (stats) => `${stats.backplane}, ${backplaneState(stats)}`,
    (stats) => KINDS[backplaneState(stats)],
  ],
  ["Backplane lag", (stats) => formatDuration(mean(stats.backplane_lag_seconds))],
  ["Outages", (stats) => formatCount(stats.backplane_outages)],
  [
    "Lost messages",
    (stats) => formatCount(stats.backplane_lost),
    (stats) => stats.backplane_lost && "bad",
  ],
  ["Channels", (stats) => formatCount(stats.channels)],
  ["History", (stats) => formatCount(stats.history_messages)],
  ["History size", (stats) => formatBytes(stats.history_bytes)],
  [
    "Slow clients",
    (stats) => formatCount(stats.slow_clients),
    (stats) => stats.slow_clients && "wait",
  ],
  ["Backlog", (stats) => formatBytes(stats.backlog_bytes)],
  ["Received", (stats) => formatBytes(stats.received_bytes)],
  ["Sent", (stats) => formatBytes(stats.sent_bytes)],
  ["Up for", (stats) => formatAge(stats.uptime_s)],
];

/**
 * The display kind of each state; any other state is shown as "wait".
 *
 * @type {Record<string, string>}
 */
const KINDS = {ready: "good", up: "good", "backplane outage": "bad", down: "bad"};

/** The stats panel: polls, and renders each response. */
export class StatsPanel {
  #token;
  /** @type {Stats | null} the last response, and its time in milliseconds */
  #last = null;
  #lastAt = 0;
  #isRefused = false;
  #isPolling = false;
  #maxMessageBytes = Infinity;
  #plots = CHARTS.map((chart) => new Plot(chart));
  #tiles = TILES.map(([title]) => createTile(title));

  /** @param {() => string} token returns the token to send; "": none. */
  constructor(token) {
    this.#token = token;
    byId("charts").append(...this.#plots.map((plot) => plot.figure));
    byId("tiles").append(...this.#tiles.map((each) => each.tile));
    document.addEventListener("visibilitychange", () => this.poll());
    setInterval(() => this.poll(), POLL_INTERVAL_MS);
    this.retry();
  }

  /** The relay's message size limit in bytes; Infinity while unknown. */
  get maxMessageBytes() {
    return this.#maxMessageBytes;
  }

  /** Whether positions begin with the time of publication: those of Redis do. */
  get positionsHaveTime() {
    return /^(redis|valkey)/.test(this.#last?.backplane ?? "");
  }

  /** Poll again after a refusal, with a new token. */
  retry() {
    this.#isRefused = false;
    this.poll();
  }

  /** Request the stats, unless the page is hidden. */
  async poll() {
    if (this.#isPolling || this.#isRefused || document.hidden) return;
    this.#isPolling = true;
    try {
      await this.#fetch();
    } catch {
      this.#showStatus("not reachable", "bad");
      query(document.body, ".stats").classList.add("stale");
    } finally {
      this.#isPolling = false;
    }
  }

  async #fetch() {
    const token = this.#token();
    const headers = new Headers(token ? {Authorization: `Bearer ${token}`} : {});
    const signal = AbortSignal.timeout(REQUEST_TIMEOUT_MS);
    const response = await fetch("stats", {headers, signal, cache: "no-store"});
    this.#isRefused = [401, 403].includes(response.status) && token === this.#token();
    const body = await response.text();
    const stats = response.ok ? parseStats(body) : null;
    query(document.body, ".stats").classList.remove("stale");
    if (stats) this.#render(stats);
    else this.#showRefusal(response, body);
  }

  /**
   * @param {Response} response
   * @param {string} body
   */
  #showRefusal({ok, status, headers}, body) {
    const isTokenRefusal = [401, 403].includes(status);
    const tokenHint = `Stats require a token with the claim "relay": {"stats": true}.`;
    const isPlain = headers.get("Content-Type")?.startsWith("text/plain"); // no proxy's page
    const reason = ok ? "something else" : `${status} ${isPlain ? body.trim().slice(0, 200) : ""}`;
    const what = isTokenRefusal ? tokenHint : "Stats unavailable.";
    setText(query(byId("stats-unavailable"), "p"), `${what} Reason: ${reason.trim()}`);
    query(byId("stats-unavailable"), "button").hidden = !isTokenRefusal;
    this.#setVisible(false);
    this.#showStatus("unknown", "off");
  }

  /** @param {boolean} isVisible show the stats; otherwise the notice that replaces them */
  #setVisible(isVisible) {
    byId("stats-unavailable").hidden = isVisible;
    for (const id of ["tiles", "replicas", "charts"]) byId(id).hidden = !isVisible;
  }

  /** @param {Stats} stats */
  #render(stats) {
    const isOtherReplica = this.#last && this.#last.replica !== stats.replica;
    if (isOtherReplica && performance.now() - this.#lastAt < REPLICA_SWITCH_MS) return;
    this.#setVisible(true);
    this.#showStatus(stats.status, KINDS[stats.status] ?? "wait");
    setText(byId("replica"), `replica ${stats.replica} · version ${stats.version}`);
    this.#maxMessageBytes = stats.max_message_bytes;
    for (const [index, [, format, kindOf]] of TILES.entries()) {
      const {tile, value} = this.#tiles[index];
      setText(value, format(stats));
      tile.dataset.kind = kindOf?.(stats) || "";
    }
    this.#renderReplicas(stats);
    this.#renderCharts(stats);
  }

  /** Show all replicas, unless the backplane allows only one. @param {Stats} stats */
  #renderReplicas({backplane, replica, replicas}) {
    byId("replicas").hidden = backplane === "memory";
    const rows = query(byId("replicas"), "tbody");
    while (rows.childElementCount < replicas.length) rows.append(cloneTemplate("replica-row"));
    while (rows.childElementCount > replicas.length) rows.lastElementChild?.remove();
    const inOrder = [...replicas].sort(
      (a, b) => compareNames(a.name, b.name) || a.messages - b.messages,
    );
    const isAlone = inOrder.filter(({name}) => name === replica).length === 1;
    for (const [index, {name, clients, messages}] of inOrder.entries()) {
      const [title, ...numbers] = rows.children[index].children;
      setText(title, isAlone && name === replica ? `${name} (this one)` : `${name}`);
      for (const [column, number] of [clients, messages].entries()) {
        setText(numbers[column], formatCount(number));
      }
    }
  }

  /** @param {Stats} stats */
  #renderCharts(stats) {
    const nowMs = performance.now();
    const previous = this.#last;
    // Another replica, or a restarted one, has different totals.
    const isSame = previous?.replica === stats.replica && previous.uptime_s <= stats.uptime_s;
    const seconds = (nowMs - this.#lastAt) / 1000;
    const step = {now: stats, previous: isSame ? previous : null, seconds};
    for (const plot of this.#plots) plot.add(nowMs, step);
    this.#last = stats;
    this.#lastAt = nowMs;
  }

  /**
   * @param {string} status
   * @param {string} kind
   */
  #showStatus(status, kind) {
    setText(byId("status"), status);
    byId("status").dataset.kind = kind;
  }
}

/** A chart: its curves over the last two minutes, and their current values. */
class Plot {
  #chart;
  /** @type {Point[]} */
  #points = [];
  /** @type {Point | null} the point under the pointer */
  #hovered = null;
  #curves;
  #values;

  /** @param {Chart} chart */
  constructor(chart) {
    this.#chart = chart;
    this.figure = cloneTemplate("chart");
    setText(query(this.figure, ".title"), chart.title);
    this.#values = chart.curves.map(([name]) => createValue(name));
    query(this.figure, ".values").append(...this.#values.map(({element}) => element));
    this.#curves = chart.curves.map((_, index) => createCurve(index));
    const svg = query(this.figure, "svg");
    svg.append(...(chart.curves.length === 1 ? [this.#curves[0].area] : []));
    svg.append(...this.#curves.map(({line}) => line));
    const plot = query(this.figure, ".plot");
    plot.addEventListener("pointermove", (event) => this.#onPointer(event));
    plot.addEventListener("pointerleave", () => this.#onPointer(null));
  }

  /**
   * @param {number} at
   * @param {Step} step
   */
  add(at, step) {
    this.#points.push({at, values: this.#chart.curves.map(([, of]) => of(step))});
    while (this.#points[0].at < at - WINDOW_MS) this.#points.shift();
    this.#draw();
  }

  /** @param {PointerEvent | null} event */
  #onPointer(event) {
    this.#hovered = null;
    if (event && this.#points.length) {
      const {left, width} = query(this.figure, ".plot").getBoundingClientRect();
      const end = this.#points[this.#points.length - 1].at;
      const wanted = end - WINDOW_MS * (1 - (event.clientX - left) / width);
      const distance = (/** @type {Point} */ point) => Math.abs(point.at - wanted);
      this.#hovered = this.#points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    }
    this.#draw();
  }

  #draw() {
    const points = this.#points;
    if (!points.length) return;
    const end = points[points.length - 1];
    const all = points.flatMap(({values}) => values.filter((each) => each !== null));
    const max = axisMax(Math.max(0, ...all));
    const x = (/** @type {Point} */ {at}) => WIDTH * (1 + (at - end.at) / WINDOW_MS);
    const y = (/** @type {number} */ value) => HEIGHT - 1 - (HEIGHT - 4) * (value / max);
    for (const [index, {line, area}] of this.#curves.entries()) {
      const runs = runsOf(points, index).map((run) =>
        run.map((point) => `${x(point).toFixed(1)} ${y(point.values[index] ?? 0).toFixed(1)}`),
      );
      // h0 draws a single point as a dot.
      line.setAttribute("d", runs.map((run) => `M${run.join("L")}h0`).join(""));
      area.setAttribute("d", runs.map((run) => areaUnder(run)).join(""));
    }
    const hovered = this.#hovered;
    const cursor = hovered ? `M${x(hovered).toFixed(1)} 0V${HEIGHT}` : "";
    query(this.figure, ".cursor").setAttribute("d", cursor);
    setText(query(this.figure, ".max"), all.length ? this.#chart.unit(max) : "");
    const age = hovered ? `${Math.round((end.at - hovered.at) / 1000)} s ago` : "";
    this.#showValues(hovered ?? end, age);
  }

  /**
   * @param {Point} point
   * @param {string} age
   */
  #showValues(point, age) {
    const texts = point.values.map((value) => this.#chart.unit(value));
    for (const [index, {number}] of this.#values.entries()) setText(number, texts[index]);
    setText(query(this.figure, ".title"), age ? `${this.#chart.title}, ${age}` : this.#chart.title);
    if (age) return;
    const named = this.#chart.curves.map(([name], index) => `${name} ${texts[index]}`.trim());
    const label = `${this.#chart.title}, now ${named.join(", ")}`;
    query(this.figure, "svg").setAttribute("aria-label", label);
  }
}

/**
 * @param {Point[]} points
 * @param {number} index of the curve
 * @returns {Point[][]} the runs of points without a gap
 */
function runsOf(points, index) {
  /** @type {Point[][]} */
  const runs = [];
  let previous = -Infinity;
  for (const point of points) {
    if (point.values[index] === null) continue;
    if (point.at - previous > CURVE_GAP_MS) runs.push([]);
    runs[runs.length - 1].push(point);
    previous = point.at;
  }
  return runs;
}

/** @param {string[]} run */
function areaUnder(run) {
  const [first, last] = [run[0], run[run.length - 1]].map((point) => point.split(" ")[0]);
  return `M${first} ${HEIGHT}L${run.join("L")}L${last} ${HEIGHT}Z`;
}

// Values of the curves

/**
 * @param {(stats: Stats) => number} total
 * @returns {Value} the increase per second
 */
function perSecond(total) {
  return ({now, previous, seconds}) =>
    previous && Math.max(0, total(now) - total(previous)) / seconds;
}

/**
 * Estimate a percentile of the observations between two responses, by linear interpolation in its
 * bucket, as Prometheus does.
 *
 * @param {number} fraction
 * @param {(stats: Stats) => Histogram} histogram
 * @returns {Value}
 */
function quantile(fraction, histogram) {
  return ({now, previous}) => {
    if (!previous) return null;
    const earlier = histogram(previous).buckets;
    const buckets = histogram(now).buckets.map(([bound, observed], index) => ({
      bound: bound === "+Inf" ? Infinity : Number(bound),
      observed: observed - earlier[index][1],
    }));
    const rank = fraction * buckets[buckets.length - 1].observed;
    if (!rank) return null;
    const at = buckets.findIndex(({observed}) => observed >= rank);
    const below = at ? buckets[at - 1] : {bound: 0, observed: 0};
    if (buckets[at].bound === Infinity) return below.bound;
    const share = (rank - below.observed) / (buckets[at].observed - below.observed);
    return below.bound + share * (buckets[at].bound - below.bound);
  };
}

/**
 * @param {string} body
 * @returns {Stats | null} null if the response is not the relay's
 */
function parseStats(body) {
  try {
    const stats = JSON.parse(body);
    const {replicas, delivery_seconds: latency} = stats ?? {};
    return Array.isArray(replicas) && Array.isArray(latency?.buckets) ? stats : null;
  } catch {
    return null;
  }
}

/** @param {string} one @param {string} other */
function compareNames(one, other) {
  return String(one).localeCompare(String(other), "en", {numeric: true});
}

/** @param {Record<string, number>} counters */
function sum(counters) {
  return Object.values(counters).reduce((a, b) => a + b, 0);
}

/** @param {Histogram} histogram */
function mean(histogram) {
  return histogram.count ? histogram.sum / histogram.count : null;
}

/** @param {Stats} stats */
function backplaneState(stats) {
  return stats.backplane_up === 1 ? "up" : "down";
}

/** @param {number} max @returns {number} a round number at least 5 % above it */
function axisMax(max) {
  if (!(max > 0)) return 1;
  const value = 1.05 * max;
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * ([1, 2, 5, 10].find((step) => step * unit >= value) ?? 10);
}

// Formats

const oneDecimal = new Intl.NumberFormat("en", {maximumFractionDigits: 1}); // below 10
const integer = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
const COMPACT_FROM = 100_000;
const twoDigits = new Intl.NumberFormat("en", {maximumSignificantDigits: 2});

/** @param {number | null} value */
export function formatCount(value) {
  if (value === null) return "–";
  return (value < 10 ? oneDecimal : value < COMPACT_FROM ? integer : compact).format(value);
}

/** @param {number | null} value */
function formatRate(value) {
  return value === null ? "–" : `${formatCount(value)}/s`;
}

/** @param {number | null} seconds */
export function formatDuration(seconds) {
  if (seconds === null) return "–";
  return seconds < 1 ? `${twoDigits.format(seconds * 1000)} ms` : `${twoDigits.format(seconds)} s`;
}

/** @param {number} size */
export function formatBytes(size) {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, size)) / 10));
  return `${formatCount(size / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

/** @param {number} seconds */
function formatAge(seconds) {
  const [days, hours, minutes] = [86_400, 3_600, 60].map((unit) => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

// DOM access

/** @param {string} id @returns {HTMLElement} */
export function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** @param {Element} within @param {string} selector @returns {HTMLElement} */
export function query(within, selector) {
  return /** @type {HTMLElement} */ (within.querySelector(selector));
}

/** @param {string} template @returns {HTMLElement} a copy of its content */
export function cloneTemplate(template) {
  const {content} = /** @type {HTMLTemplateElement} */ (byId(template));
  const copy = /** @type {HTMLElement} */ (content.firstElementChild);
  return /** @type {HTMLElement} */ (copy.cloneNode(true));
}

/** @param {Element} element @param {string} content */
export function setText(element, content) {
  if (element.textContent !== content) element.textContent = content;
}

/** @param {string} title */
function createTile(title) {
  const element = cloneTemplate("tile");
  setText(query(element, "dt"), title);
  return {tile: element, value: query(element, "dd")};
}

/** @param {string} name */
function createValue(name) {
  const [element, label, number] = Array.from({length: 3}, () => document.createElement("span"));
  label.className = name ? "name" : "";
  label.textContent = name;
  element.append(label, " ", number);
  return {element, number};
}

/** @param {number} index */
function createCurve(index) {
  const [line, area] = ["curve", "area"].map((kind) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", index ? `${kind} second` : kind);
    return path;
  });
  return {line, area};
}

/**
 * @typedef {{buckets: [string, number][], count: number, sum: number}} Histogram
 * @typedef {{name: string, clients: number, messages: number}} Replica
 * @typedef {Record<string, any> & {replica: string, status: string, uptime_s: number,
 *   replicas: Replica[]}} Stats
 * @typedef {{now: Stats, previous: Stats | null, seconds: number}} Step two consecutive responses
 * @typedef {(step: Step) => number | null} Value
 * @typedef {{at: number, values: (number | null)[]}} Point
 * @typedef {object} Chart
 * @property {string} title
 * @property {(value: number | null) => string} unit
 * @property {[string, Value][]} curves by their names
 */
