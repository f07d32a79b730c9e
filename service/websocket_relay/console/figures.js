// @ts-check
/**
 * The relay's figures: asks for /stats once a second, and shows tiles and charts.
 *
 * The relay tells totals since its start; rates and percentiles are made here, of the differences
 * between two answers. Knows no channel.
 */

const EVERY_MS = 1_000;
const ANSWER_MS = 5_000; // until a relay that says nothing counts as not reachable
const WINDOW_MS = 120_000;
const STAY_MS = 10_000; // with one replica, where a proxy asks now this one and now that one
const BREAK_MS = 11_000; // a curve has a gap where nothing was heard for so long
const [WIDTH, HEIGHT] = [600, 100]; // of a plot, in its own units

/** @type {Chart[]} */
const CHARTS = [
  {title: "Clients", unit: count, curves: [["", ({now}) => now.connected_clients]]},
  {title: "Messages in", unit: rate, curves: [["", per(({messages}) => messages)]]},
  {title: "Deliveries out", unit: rate, curves: [["", per(({deliveries}) => deliveries)]]},
  {
    title: "Delivery latency",
    unit: duration,
    curves: [
      ["p50", quantile(0.5, (stats) => stats.delivery_seconds)],
      ["p99", quantile(0.99, (stats) => stats.delivery_seconds)],
    ],
  },
  {
    title: "Drops and refusals",
    unit: rate,
    curves: [
      ["drops", per(({drops}) => sum(drops))],
      ["refusals", per(({refusals}) => sum(refusals))],
    ],
  },
  {
    title: "Event loop lag",
    unit: duration,
    curves: [["p99", quantile(0.99, (stats) => stats.event_loop_lag_seconds)]],
  },
];

/** @type {[string, (stats: Stats) => string, ((stats: Stats) => string)?][]} title, text, kind */
const TILES = [
  ["Backplane", (stats) => `${stats.backplane}, ${stateOf(stats)}`, (stats) => KINDS[stateOf(stats)]],
  ["Backplane lag", (stats) => duration(mean(stats.backplane_lag_seconds))],
  ["Outages", (stats) => count(stats.backplane_outages)],
  ["Lost messages", (stats) => count(stats.backplane_lost), (stats) => stats.backplane_lost && "bad"],
  ["Channels", (stats) => count(stats.channels)],
  ["History", (stats) => count(stats.history_messages)],
  ["History size", (stats) => bytes(stats.history_bytes)],
  ["Slow clients", (stats) => count(stats.slow_clients), (stats) => stats.slow_clients && "wait"],
  ["Backlog", (stats) => bytes(stats.backlog_bytes)],
  ["Received", (stats) => bytes(stats.received_bytes)],
  ["Sent", (stats) => bytes(stats.sent_bytes)],
  ["Up for", (stats) => age(stats.uptime_s)],
];

/**
 * How words of state are shown; any other is something to wait for.
 *
 * @type {Record<string, string>}
 */
const KINDS = {ready: "good", up: "good", "backplane outage": "bad", down: "bad"};

/** The figures, for as long as the page is there. */
export class Figures {
  #token;
  /** @type {Stats | null} the last answer, and when it came */
  #last = null;
  #lastAt = 0;
  #isRefused = false;
  #isAsking = false;
  #maxMessageBytes = Infinity;
  #plots = CHARTS.map((chart) => new Plot(chart));
  #tiles = TILES.map(([title]) => tile(title));

  /** @param {() => string} token what to bring; "": nothing. */
  constructor(token) {
    this.#token = token;
    at("charts").append(...this.#plots.map((plot) => plot.figure));
    at("tiles").append(...this.#tiles.map((each) => each.tile));
    document.addEventListener("visibilitychange", () => this.ask());
    setInterval(() => this.ask(), EVERY_MS);
    this.again();
  }

  /** What the relay takes, as far as it told. */
  get maxMessageBytes() {
    return this.#maxMessageBytes;
  }

  /** Ask again after a refusal: there is another token. */
  again() {
    this.#isRefused = false;
    this.ask();
  }

  /** Ask for the figures, unless nobody looks. */
  async ask() {
    if (this.#isAsking || this.#isRefused || document.hidden) return;
    this.#isAsking = true;
    try {
      await this.#fetch();
    } catch {
      this.#tell("not reachable", "bad");
      find(document.body, ".figures").classList.add("stale");
    } finally {
      this.#isAsking = false;
    }
  }

  async #fetch() {
    const token = this.#token();
    const headers = new Headers(token ? {Authorization: `Bearer ${token}`} : {});
    const signal = AbortSignal.timeout(ANSWER_MS);
    const response = await fetch("stats", {headers, signal, cache: "no-store"});
    this.#isRefused = [401, 403].includes(response.status) && token === this.#token();
    const said = await response.text();
    const stats = response.ok ? parsed(said) : null;
    find(document.body, ".figures").classList.remove("stale");
    if (stats) this.#show(stats);
    else this.#refuse(response, said);
  }

  /**
   * @param {Response} response
   * @param {string} said
   */
  #refuse({ok, status, headers}, said) {
    const isAboutTokens = [401, 403].includes(status);
    const needed = `The figures need a token with the claim "relay": {"stats": true}.`;
    const isPlain = headers.get("Content-Type")?.startsWith("text/plain"); // and no proxy's page
    const reason = ok ? "something else" : `${status} ${isPlain ? said.trim().slice(0, 200) : ""}`;
    const what = isAboutTokens ? needed : "There are no figures.";
    text(find(at("no-figures"), "p"), `${what} The relay says: ${reason.trim()}`);
    find(at("no-figures"), "button").hidden = !isAboutTokens;
    this.#reveal(false);
    this.#tell("unknown", "off");
  }

  /** @param {boolean} areThere whether there are figures, or a word about why not */
  #reveal(areThere) {
    at("no-figures").hidden = areThere;
    for (const id of ["tiles", "replicas", "charts"]) at(id).hidden = !areThere;
  }

  /** @param {Stats} stats */
  #show(stats) {
    const isOther = this.#last && this.#last.replica !== stats.replica;
    if (isOther && performance.now() - this.#lastAt < STAY_MS) return;
    this.#reveal(true);
    this.#tell(stats.status, KINDS[stats.status] ?? "wait");
    text(at("replica"), `replica ${stats.replica} · version ${stats.version}`);
    this.#maxMessageBytes = stats.max_message_bytes;
    for (const [index, [, words, kind]] of TILES.entries()) {
      const {tile, value} = this.#tiles[index];
      text(value, words(stats));
      tile.dataset.kind = kind?.(stats) || "";
    }
    this.#list(stats);
    this.#draw(stats);
  }

  /** Show all replicas, where there can be more than one. @param {Stats} stats */
  #list({backplane, replica, replicas}) {
    at("replicas").hidden = backplane === "memory";
    const rows = find(at("replicas"), "tbody");
    while (rows.childElementCount < replicas.length) rows.append(stamp("replica-row"));
    while (rows.childElementCount > replicas.length) rows.lastElementChild?.remove();
    const inOrder = [...replicas].sort((a, b) => order(a.name, b.name) || a.messages - b.messages);
    const isAlone = inOrder.filter(({name}) => name === replica).length === 1;
    for (const [index, {name, clients, messages}] of inOrder.entries()) {
      const [title, ...numbers] = rows.children[index].children;
      text(title, isAlone && name === replica ? `${name} (this one)` : `${name}`);
      for (const [nth, number] of [clients, messages].entries()) text(numbers[nth], count(number));
    }
  }

  /** @param {Stats} stats */
  #draw(stats) {
    const when = performance.now();
    const before = this.#last;
    // Another replica, or one that was started anew, counts from elsewhere.
    const isSame = before?.replica === stats.replica && before.uptime_s <= stats.uptime_s;
    const step = {now: stats, before: isSame ? before : null, seconds: (when - this.#lastAt) / 1000};
    for (const plot of this.#plots) plot.add(when, step);
    this.#last = stats;
    this.#lastAt = when;
  }

  /**
   * @param {string} status
   * @param {string} kind
   */
  #tell(status, kind) {
    text(at("status"), status);
    at("status").dataset.kind = kind;
  }
}

/** One chart: its curves over the last two minutes, and what they are now. */
class Plot {
  #chart;
  /** @type {Point[]} */
  #points = [];
  /** @type {Point | null} the one that is pointed at */
  #looked = null;
  #curves;
  #values;

  /** @param {Chart} chart */
  constructor(chart) {
    this.#chart = chart;
    this.figure = stamp("chart");
    text(find(this.figure, ".title"), chart.title);
    this.#values = chart.curves.map(([name]) => value(name));
    find(this.figure, ".values").append(...this.#values.map(({element}) => element));
    this.#curves = chart.curves.map((_, index) => curve(index));
    const svg = find(this.figure, "svg");
    svg.append(...(chart.curves.length === 1 ? [this.#curves[0].area] : []));
    svg.append(...this.#curves.map(({line}) => line));
    const plot = find(this.figure, ".plot");
    plot.addEventListener("pointermove", (event) => this.#look(event));
    plot.addEventListener("pointerleave", () => this.#look(null));
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
  #look(event) {
    this.#looked = null;
    if (event && this.#points.length) {
      const {left, width} = find(this.figure, ".plot").getBoundingClientRect();
      const end = this.#points[this.#points.length - 1].at;
      const wanted = end - WINDOW_MS * (1 - (event.clientX - left) / width);
      const distance = (/** @type {Point} */ point) => Math.abs(point.at - wanted);
      this.#looked = this.#points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    }
    this.#draw();
  }

  #draw() {
    const points = this.#points;
    if (!points.length) return;
    const end = points[points.length - 1];
    const all = points.flatMap(({values}) => values.filter((each) => each !== null));
    const most = top(Math.max(0, ...all));
    const x = (/** @type {Point} */ {at}) => WIDTH * (1 + (at - end.at) / WINDOW_MS);
    const y = (/** @type {number} */ value) => HEIGHT - 1 - (HEIGHT - 4) * (value / most);
    for (const [index, {line, area}] of this.#curves.entries()) {
      const runs = runsOf(points, index).map((run) =>
        run.map((point) => `${x(point).toFixed(1)} ${y(point.values[index] ?? 0).toFixed(1)}`),
      );
      line.setAttribute("d", runs.map((run) => `M${run.join("L")}h0`).join("")); // one point is a dot
      area.setAttribute("d", runs.map((run) => areaUnder(run)).join(""));
    }
    const looked = this.#looked;
    find(this.figure, ".at").setAttribute("d", looked ? `M${x(looked).toFixed(1)} 0V${HEIGHT}` : "");
    text(find(this.figure, ".most"), all.length ? this.#chart.unit(most) : "");
    this.#tell(looked ?? end, looked ? `${Math.round((end.at - looked.at) / 1000)} s ago` : "");
  }

  /**
   * @param {Point} point
   * @param {string} when
   */
  #tell(point, when) {
    const words = point.values.map((value) => this.#chart.unit(value));
    for (const [index, {number}] of this.#values.entries()) text(number, words[index]);
    text(find(this.figure, ".title"), when ? `${this.#chart.title}, ${when}` : this.#chart.title);
    if (when) return;
    const named = this.#chart.curves.map(([name], index) => `${name} ${words[index]}`.trim());
    find(this.figure, "svg").setAttribute("aria-label", `${this.#chart.title}, now ${named.join(", ")}`);
  }
}

/**
 * @param {Point[]} points
 * @param {number} index of the curve
 * @returns {Point[][]} what is drawn without a gap
 */
function runsOf(points, index) {
  /** @type {Point[][]} */
  const runs = [];
  let before = -Infinity;
  for (const point of points) {
    if (point.values[index] === null) continue;
    if (point.at - before > BREAK_MS) runs.push([]);
    runs[runs.length - 1].push(point);
    before = point.at;
  }
  return runs;
}

/** @param {string[]} run */
function areaUnder(run) {
  const [first, last] = [run[0], run[run.length - 1]].map((point) => point.split(" ")[0]);
  return `M${first} ${HEIGHT}L${run.join("L")}L${last} ${HEIGHT}Z`;
}

// What curves are made of

/**
 * @param {(stats: Stats) => number} total
 * @returns {Value} how much was added in a second
 */
function per(total) {
  return ({now, before, seconds}) => before && Math.max(0, total(now) - total(before)) / seconds;
}

/**
 * Estimate a percentile of what was observed between two answers: as Prometheus does, in a straight
 * line through the bucket that it lies in.
 *
 * @param {number} part
 * @param {(stats: Stats) => Histogram} histogram
 * @returns {Value}
 */
function quantile(part, histogram) {
  return ({now, before}) => {
    if (!before) return null;
    const earlier = histogram(before).buckets;
    const buckets = histogram(now).buckets.map(([bound, seen], index) => ({
      bound: bound === "+Inf" ? Infinity : Number(bound),
      seen: seen - earlier[index][1],
    }));
    const wanted = part * buckets[buckets.length - 1].seen;
    if (!wanted) return null;
    const at = buckets.findIndex(({seen}) => seen >= wanted);
    const below = at ? buckets[at - 1] : {bound: 0, seen: 0};
    if (buckets[at].bound === Infinity) return below.bound;
    const share = (wanted - below.seen) / (buckets[at].seen - below.seen);
    return below.bound + share * (buckets[at].bound - below.bound);
  };
}

/**
 * @param {string} said
 * @returns {Stats | null} what the relay told, or null where something else answered
 */
function parsed(said) {
  try {
    const stats = JSON.parse(said);
    const is = Array.isArray(stats?.replicas) && Array.isArray(stats?.delivery_seconds?.buckets);
    return is ? stats : null;
  } catch {
    return null;
  }
}

/** @param {string} one @param {string} other */
function order(one, other) {
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
function stateOf(stats) {
  return stats.backplane_up === 1 ? "up" : "down";
}

/** @param {number} most @returns {number} a round number above it, with some room */
function top(most) {
  if (!(most > 0)) return 1;
  const value = 1.05 * most;
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * ([1, 2, 5, 10].find((step) => step * unit >= value) ?? 10);
}

// Words

const few = new Intl.NumberFormat("en", {maximumFractionDigits: 1}); // below 10
const some = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const many = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
const MANY = 100_000;
const rough = new Intl.NumberFormat("en", {maximumSignificantDigits: 2});

/** @param {number | null} value */
export function count(value) {
  if (value === null) return "–";
  return (value < 10 ? few : value < MANY ? some : many).format(value);
}

/** @param {number | null} value */
function rate(value) {
  return value === null ? "–" : `${count(value)}/s`;
}

/** @param {number | null} seconds */
export function duration(seconds) {
  if (seconds === null) return "–";
  return seconds < 1 ? `${rough.format(seconds * 1000)} ms` : `${rough.format(seconds)} s`;
}

/** @param {number} size */
export function bytes(size) {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, size)) / 10));
  return `${count(size / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

/** @param {number} seconds */
function age(seconds) {
  const [days, hours, minutes] = [86_400, 3_600, 60].map((unit) => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

// The page's parts

/** @param {string} id @returns {HTMLElement} */
export function at(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** @param {Element} within @param {string} selector @returns {HTMLElement} */
export function find(within, selector) {
  return /** @type {HTMLElement} */ (within.querySelector(selector));
}

/** @param {string} template @returns {HTMLElement} a copy of what it holds */
export function stamp(template) {
  const {content} = /** @type {HTMLTemplateElement} */ (at(template));
  const copy = /** @type {HTMLElement} */ (content.firstElementChild);
  return /** @type {HTMLElement} */ (copy.cloneNode(true));
}

/** @param {Element} element @param {string} words */
export function text(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

/** @param {string} title */
function tile(title) {
  const element = stamp("tile");
  text(find(element, "dt"), title);
  return {tile: element, value: find(element, "dd")};
}

/** @param {string} name */
function value(name) {
  const [element, label, number] = Array.from({length: 3}, () => document.createElement("span"));
  label.className = name ? "name" : "";
  label.textContent = name;
  element.append(label, " ", number);
  return {element, number};
}

/** @param {number} index */
function curve(index) {
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
 * @typedef {{now: Stats, before: Stats | null, seconds: number}} Step between two answers
 * @typedef {(step: Step) => number | null} Value
 * @typedef {{at: number, values: (number | null)[]}} Point
 * @typedef {object} Chart
 * @property {string} title
 * @property {(value: number | null) => string} unit
 * @property {[string, Value][]} curves by their names
 */
