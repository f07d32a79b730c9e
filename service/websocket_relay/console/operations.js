// @ts-check
/** The server API for operators: busiest channels, clients, and how to disconnect them. */

import {
  byId,
  formatAge,
  formatBytes,
  formatCount,
  formatNumber,
  input,
  query,
  renderRows,
  setText,
} from "./dom.js";
import {fillClient} from "./members.js";

const POLL_INTERVAL_MS = 5_000; // each question is asked of all replicas
const TYPING_MS = 300; // a filter is applied after so long without a key
const REQUEST_TIMEOUT_MS = 5_000;
const LISTED = 100;

const WITHOUT_API = "This relay has no server API: set api.key, or auth.mode.";
const NEEDED = `Needs the API key, or a token with the claim "relay": {"admin": true}.`;

/** The panels "Channels" and "Clients". They ask only while they are shown. */
export class OperationsPanel {
  #token;
  #showChannel;
  #openClients;
  #apiKey = "";
  /** @type {"" | "channels" | "clients"} the panel on show */
  #shown = "";
  #isRefused = false;
  #asked = 0; // number of the last request: what an earlier one answers is stale
  #timer = 0;
  /** @type {(isAdmin: boolean) => void} */
  #onAdmin;
  /** @type {{client: string, user: string} | null} in the dialog */
  #target = null;

  /**
   * @param {object} parts
   * @param {() => string} parts.token returns the token, "": none
   * @param {(channel: string) => void} parts.showChannel shows the messages of a channel
   * @param {(isAdmin: boolean) => void} parts.onAdmin called when it is known
   * @param {() => void} parts.openClients shows the panel of clients
   */
  constructor({token, showChannel, onAdmin, openClients}) {
    this.#token = token;
    this.#showChannel = showChannel;
    this.#onAdmin = onAdmin;
    this.#openClients = openClients;
    for (const id of ["channels-filter", "clients-filter"]) {
      byId(id).addEventListener("input", () => this.#pollIn(TYPING_MS));
      byId(id).addEventListener("submit", (event) => {
        event.preventDefault();
        this.#pollIn(0);
      });
    }
    byId("api-key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#apiKey = input("api-key").value.trim();
      input("api-key").value = "";
      this.retry();
    });
    byId("disconnect-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#disconnect();
    });
    byId("disconnect-form").addEventListener("change", () => this.#updateDialog());
    byId("disconnect-cancel").addEventListener("click", () => dialog().close());
    document.addEventListener("visibilitychange", () => this.#pollIn(0));
  }

  /** @param {string} panel that is shown from now on: "channels", "clients" or another one */
  show(panel) {
    this.#shown = panel === "channels" || panel === "clients" ? panel : "";
    byId("api-unavailable").hidden = !this.#shown || !this.#isRefused;
    for (const id of ["operations-failure", "disconnected", "incomplete"]) this.#report(id, "");
    this.#pollIn(0);
  }

  /** Ask again, with a new token or key. */
  retry() {
    this.#isRefused = false;
    this.#onAdmin(false);
    this.#pollIn(0);
  }

  /** Ask for a confirmation, and disconnect. @param {{client: string, user: string}} target */
  confirm(target) {
    this.#target = target;
    const {client, user} = target;
    setText(byId("disconnect-client"), client);
    setText(byId("disconnect-user"), user);
    byId("disconnect-all").hidden = !user;
    input("disconnect-one").checked = true;
    input("block").value = "0";
    this.#report("disconnect-failure", "");
    this.#updateDialog();
    dialog().showModal();
  }

  /** @param {number} delayMs */
  #pollIn(delayMs) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#poll(), delayMs);
  }

  async #poll() {
    if (!this.#shown || this.#isRefused || document.hidden) return;
    const number = ++this.#asked;
    const panel = this.#shown;
    const answer = await this.#request("GET", `${panel}?${this.#queryOf(panel)}`);
    if (number !== this.#asked || panel !== this.#shown) return;
    this.#pollIn(POLL_INTERVAL_MS);
    this.#showAnswer(answer);
    if (!answer.fields) return;
    if (panel === "channels") this.#renderChannels(answer.fields.channels);
    else this.#renderClients(answer.fields.clients);
    const {missing = [], truncated} = answer.fields;
    const incomplete = missing.length ? `no answer from ${missing.join(", ")}` : "";
    const more = truncated ? "there are more: narrow the filter" : "";
    this.#report("incomplete", [incomplete, more].filter(Boolean).join(" · "));
  }

  /** @param {"channels" | "clients"} panel */
  #queryOf(panel) {
    const names = panel === "channels" ? ["prefix", "order"] : ["channel", "user"];
    const fields = names.map((name) => [name, input(`${panel}-${name}`).value.trim()]);
    const given = fields.filter(([, value]) => value);
    return new URLSearchParams([...given, ["limit", String(LISTED)]]);
  }

  /**
   * @param {string} method
   * @param {string} path
   * @param {object} [body]
   * @returns {Promise<{status: number, reason: string, fields: any}>} status 0: not reachable
   */
  async #request(method, path, body) {
    const secret = this.#apiKey || this.#token();
    /** @type {Record<string, string>} */
    const headers = secret ? {Authorization: `Bearer ${secret}`} : {};
    if (body) headers["Content-Type"] = "application/json";
    try {
      const response = await fetch(`api/${path}`, {
        method,
        headers,
        body: body && JSON.stringify(body),
        signal: AbortSignal.timeout(REQUEST_TIMEOUT_MS),
        cache: "no-store",
      });
      const {status, ok} = response;
      const content = await response.text();
      const type = response.headers.get("Content-Type") ?? "";
      const reason = type.startsWith("text/plain") ? content.trim().slice(0, 200) : ""; // no page
      return {status, reason, fields: ok && JSON.parse(content)};
    } catch {
      return {status: 0, reason: "not reachable", fields: null};
    }
  }

  /** @param {{status: number, reason: string, fields: any}} answer */
  #showAnswer({status, reason, fields}) {
    this.#isRefused = [401, 403, 404].includes(status);
    for (const panel of document.querySelectorAll(".operations")) {
      panel.classList.toggle("refused", this.#isRefused);
      panel.classList.toggle("stale", !fields);
    }
    byId("api-unavailable").hidden = !this.#isRefused;
    const isKnown = Boolean(fields) || this.#isRefused;
    if (this.#isRefused) this.#apiKey = ""; // the token may do, or another key
    const hint = status === 404 ? WITHOUT_API : `${NEEDED} Reason: ${status} ${reason}`;
    if (this.#isRefused) setText(query(byId("api-unavailable"), "p"), hint);
    byId("api-key-form").hidden = status === 404;
    this.#report("operations-failure", isKnown ? "" : `${status || ""} ${reason}`.trim());
    if (isKnown) this.#onAdmin(!this.#isRefused);
  }

  /** @param {{channel: string, clients: number, messages: number}[]} channels */
  #renderChannels(channels) {
    const rows = query(byId("channels-list"), "tbody");
    renderRows(rows, "channel-row", channels, ({channel}) => channel, (row, each) => {
      const [name, clients] = row.querySelectorAll("button");
      setText(name, each.channel);
      setText(clients, formatCount(each.clients));
      setText(row.children[2], formatCount(each.messages));
      if (name.onclick) return; // a row stays that of its channel
      clients.setAttribute("aria-label", `Clients of ${each.channel}`);
      name.onclick = () => this.#showChannel(each.channel);
      clients.onclick = () => {
        input("clients-channel").value = each.channel;
        input("clients-user").value = "";
        this.#openClients();
      };
    });
    byId("channels-empty").hidden = channels.length > 0;
  }

  /** @param {Record<string, any>[]} clients */
  #renderClients(clients) {
    // A client that has just moved may have two connections.
    /** @type {(each: Record<string, any>) => string} */
    const keyOf = ({client, replica, since}) => `${client} ${replica} ${since}`;
    renderRows(byId("clients-list"), "client", clients, keyOf, (row, each) => {
      const {client, user, address, since, channels, backlog, replica} = each;
      const age = formatAge(Date.now() / 1000 - since);
      const waiting = backlog ? `${formatBytes(backlog)} waiting` : "";
      const facts = [address, `for ${age}`, channels.join(", ") || "no channel", waiting, replica];
      const text = facts.filter(Boolean).join(" · ");
      fillClient(row, {client, user}, text, (target) => this.confirm(target));
    });
    byId("clients-empty").hidden = clients.length > 0;
  }

  #updateDialog() {
    const isUser = input("disconnect-every").checked;
    byId("block-field").hidden = !isUser;
    byId("returns").hidden = isUser && input("block").value !== "0";
  }

  async #disconnect() {
    const target = this.#target;
    if (!target) return;
    const isUser = input("disconnect-every").checked;
    const block = Number(input("block").value);
    const {client, user} = target;
    const whom = isUser ? {user, ...(block && {block_s: block})} : {client};
    const reason = input("reason").value.trim();
    const button = input("disconnect-now");
    button.disabled = true;
    const answer = await this.#request("POST", "disconnect", {...whom, ...(reason && {reason})});
    button.disabled = false;
    if (!answer.fields) {
      const why = `${answer.status || ""} ${answer.reason}`.trim();
      return this.#report("disconnect-failure", `Not disconnected: ${why}`);
    }
    dialog().close();
    const {disconnected, missing = []} = answer.fields;
    const unknown = missing.length ? `; no answer from ${missing.join(", ")}` : "";
    this.#report("disconnected", `${formatNumber(disconnected, "client")} disconnected${unknown}`);
    this.#pollIn(0);
  }

  /** @param {string} id @param {string} content "": nothing to report */
  #report(id, content) {
    setText(byId(id), content);
    byId(id).hidden = !content;
  }
}

function dialog() {
  return /** @type {HTMLDialogElement} */ (byId("disconnect-dialog"));
}
