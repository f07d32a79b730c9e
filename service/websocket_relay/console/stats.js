// @ts-check
/**
 * Poll /stats once a second and show the relay's stats as tiles.
 *
 * The relay reports totals since its start. Rates and percentiles are computed here from the
 * difference between two responses. Knows no channel.
 */

import {
  byId,
  cloneTemplate,
  formatAge,
  formatBytes,
  formatCount,
  formatDuration,
  query,
  renderRows,
  setText,
} from "./dom.js";

const POLL_INTERVAL_MS = 1_000;
const REQUEST_TIMEOUT_MS = 5_000; // then the relay is shown as not reachable
const REPLICA_SWITCH_MS = 10_000; // ignore other replicas of a load balancer for this long

/** @type {[string, (step: Step) => string, ((stats: Stats) => string)?][]} title, text, kind */
const TILES = [
  ["Clients", ({now}) => formatCount(now.connected_clients)],
  ["Messages in", perSecond(({messages}) => messages)],
  ["Deliveries out", perSecond(({deliveries}) => deliveries)],
  ["Slow clients", ({now}) => formatCount(now.slow_clients), (stats) => stats.slow_clients && "wait"],
  ["Delivery p50", quantile(0.5, (stats) => stats.delivery_seconds)],
  ["Delivery p99", quantile(0.99, (stats) => stats.delivery_seconds)],
  ["Loop lag p99", quantile(0.99, (stats) => stats.event_loop_lag_seconds)],
  ["Backlog", ({now}) => formatBytes(now.backlog_bytes)],
  ["Drops", perSecond(({drops}) => sum(drops))],
  ["Refusals", perSecond(({refusals}) => sum(refusals))],
  [
    "Lost messages",
    ({now}) => formatCount(now.backplane_lost),
    (stats) => stats.backplane_lost && "bad",
  ],
  ["Outages", ({now}) => formatCount(now.backplane_outages)],
  [
    "Backplane",
    ({now}) => `${now.backplane}, ${backplaneState(now)}`,
    (stats) => KINDS[backplaneState(stats)],
  ],
  ["Backplane lag", ({now}) => formatDuration(mean(now.backplane_lag_seconds))],
  ["Channels", ({now}) => formatCount(now.channels)],
  ["History", ({now}) => formatCount(now.history_messages)],
  ["History size", ({now}) => formatBytes(now.history_bytes)],
  ["Received", ({now}) => formatBytes(now.received_bytes)],
  ["Sent", ({now}) => formatBytes(now.sent_bytes)],
  ["Up for", ({now}) => formatAge(now.uptime_s)],
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
  #tiles = TILES.map(([title]) => createTile(title));
  #onStats;

  /**
   * @param {() => string} token returns the token to send; "": none
   * @param {() => void} onStats called after each response
   */
  constructor(token, onStats) {
    this.#token = token;
    this.#onStats = onStats;
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
    for (const id of ["tiles", "replicas"]) byId(id).hidden = !isVisible;
  }

  /** @param {Stats} stats */
  #render(stats) {
    const isOtherReplica = this.#last && this.#last.replica !== stats.replica;
    if (isOtherReplica && performance.now() - this.#lastAt < REPLICA_SWITCH_MS) return;
    this.#setVisible(true);
    this.#showStatus(stats.status, KINDS[stats.status] ?? "wait");
    setText(byId("replica"), `replica ${stats.replica} · version ${stats.version}`);
    this.#maxMessageBytes = stats.max_message_bytes;
    this.#renderTiles(stats);
    this.#renderReplicas(stats);
    this.#onStats();
  }

  /** Show all replicas, unless the backplane allows only one. @param {Stats} stats */
  #renderReplicas({backplane, replica, replicas}) {
    byId("replicas").hidden = backplane === "memory";
    const inOrder = [...replicas].sort(
      (a, b) => compareNames(a.name, b.name) || a.messages - b.messages,
    );
    const isAlone = inOrder.filter(({name}) => name === replica).length === 1;
    const rows = query(byId("replicas"), "tbody");
    /** @type {(replica: Replica, index: number) => string} */
    const keyOf = (_replica, index) => String(index); // names may repeat
    renderRows(rows, "replica-row", inOrder, keyOf, (row, {name, clients, messages}) => {
      const [title, ...numbers] = row.children;
      setText(title, isAlone && name === replica ? `${name} (this one)` : `${name}`);
      for (const [column, number] of [clients, messages].entries()) {
        setText(numbers[column], formatCount(number));
      }
    });
  }

  /** @param {Stats} stats */
  #renderTiles(stats) {
    const nowMs = performance.now();
    const previous = this.#last;
    // Another replica, or a restarted one, has different totals.
    const isSame = previous?.replica === stats.replica && previous.uptime_s <= stats.uptime_s;
    const seconds = (nowMs - this.#lastAt) / 1000;
    const step = {now: stats, previous: isSame ? previous : null, seconds};
    for (const [index, [, textOf, kindOf]] of TILES.entries()) {
      const {tile, value} = this.#tiles[index];
      setText(value, textOf(step));
      tile.dataset.kind = kindOf?.(stats) || "";
    }
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

// Texts of the tiles

/**
 * @param {(stats: Stats) => number} total
 * @returns {(step: Step) => string} its increase per second
 */
function perSecond(total) {
  return ({now, previous, seconds}) => {
    if (!previous) return "–";
    return `${formatCount(Math.max(0, total(now) - total(previous)) / seconds)}/s`;
  };
}

/**
 * Estimate a percentile of the observations between two responses, by linear interpolation in its
 * bucket, as Prometheus does.
 *
 * @param {number} fraction
 * @param {(stats: Stats) => Histogram} histogram
 * @returns {(step: Step) => string}
 */
function quantile(fraction, histogram) {
  return ({now, previous}) => {
    if (!previous) return "–";
    const earlier = histogram(previous).buckets;
    const buckets = histogram(now).buckets.map(([bound, observed], index) => ({
      bound: bound === "+Inf" ? Infinity : Number(bound),
      observed: observed - earlier[index][1],
    }));
    const rank = fraction * buckets[buckets.length - 1].observed;
    if (!rank) return "–";
    const at = buckets.findIndex(({observed}) => observed >= rank);
    const below = at ? buckets[at - 1] : {bound: 0, observed: 0};
    if (buckets[at].bound === Infinity) return formatDuration(below.bound);
    const share = (rank - below.observed) / (buckets[at].observed - below.observed);
    return formatDuration(below.bound + share * (buckets[at].bound - below.bound));
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

// Rows of the page

/** @param {string} title */
function createTile(title) {
  const element = cloneTemplate("tile");
  setText(query(element, "dt"), title);
  return {tile: element, value: query(element, "dd")};
}

/**
 * @typedef {{buckets: [string, number][], count: number, sum: number}} Histogram
 * @typedef {{name: string, clients: number, messages: number}} Replica
 * @typedef {Record<string, any> & {replica: string, status: string, uptime_s: number,
 *   replicas: Replica[]}} Stats
 * @typedef {{now: Stats, previous: Stats | null, seconds: number}} Step two consecutive responses
 */
