// @ts-check
/** Who is in the channels on show, kept up to date by what relay.js reports. */

import {byId, cloneTemplate, formatNumber, formatTime, query, renderRows, setText} from "./dom.js";

const MAX_SHOWN = 200; // members of a channel
const RENDER_INTERVAL_MS = 250; // in a storm of joins

/** The panel: one list for each channel on show. */
export class MembersPanel {
  #disconnect;
  /** @type {import("./relay.js").Channel[]} */
  #channels = [];
  #timer = 0;
  /** @type {WeakMap<object, number>} in seconds since 1970 */
  #joinedAt = new WeakMap();
  /** Whether the user may disconnect clients. */
  isAdmin = false;

  /** @param {(client: {client: string, user: string}) => void} disconnect */
  constructor(disconnect) {
    this.#disconnect = disconnect;
    this.#render();
  }

  /** @param {Iterable<import("./relay.js").Channel>} channels on show */
  show(channels) {
    this.#channels = [...channels];
    this.#timer ||= setTimeout(() => {
      this.#timer = 0;
      this.#render();
    }, RENDER_INTERVAL_MS);
  }

  #render() {
    const known = this.#channels.filter(({count}) => count !== null);
    const all = known.reduce((sum, {count}) => sum + (count ?? 0), 0);
    const suffix = known.length ? ` (${all.toLocaleString("en")})` : "";
    setText(byId("members-tab"), `Who is here${suffix}`);
    byId("members-empty").hidden = this.#channels.length > 0;
    const key = (/** @type {{name: string}} */ {name}) => name;
    renderRows(byId("members"), "members-of", this.#channels, key, (section, channel) => {
      this.#fill(section, channel);
    });
  }

  /** @param {HTMLElement} section @param {import("./relay.js").Channel} channel */
  #fill(section, {name, members, count}) {
    const shown = [...(members?.values() ?? [])].slice(0, MAX_SHOWN);
    setText(query(section, ".name"), name);
    setText(query(section, ".count"), count === null ? "" : formatNumber(count, "client"));
    const note = query(section, ".note-of");
    const hidden = (count ?? 0) - shown.length;
    const what = shown.length ? "more" : "are not listed: too many";
    const more = `${hidden.toLocaleString("en")} ${what}`;
    const without = "Not known: this channel has no presence (the setting presence.channels).";
    setText(note, count === null ? without : hidden ? more : "");
    note.hidden = !note.textContent;
    renderRows(query(section, "ul"), "client", shown, ({client}) => client, (row, member) => {
      const {client, user, info} = member;
      const joinedAt = this.#joinedAt.get(member) ?? member.since ?? Date.now() / 1000;
      this.#joinedAt.set(member, joinedAt);
      const since = `since ${formatTime(joinedAt)}`;
      const facts = info === undefined ? since : `${since} · ${JSON.stringify(info)}`;
      fillClient(row, {client, user}, facts, this.isAdmin && this.#disconnect);
    });
  }
}

/**
 * Fill the row of a client.
 *
 * @param {HTMLElement} row
 * @param {{client: string, user: string}} identity
 * @param {string} facts
 * @param {false | ((client: {client: string, user: string}) => void)} disconnect false: it may not
 */
export function fillClient(row, identity, facts, disconnect) {
  const {client, user} = identity;
  setText(query(row, ".user"), user || "without a user");
  query(row, ".user").classList.toggle("soft", !user);
  setText(query(row, "code"), client);
  setText(query(row, ".facts"), facts);
  const before = row.querySelector("button");
  if (before && !disconnect) before.remove();
  if (before || !disconnect) return;
  const button = cloneTemplate("disconnect");
  button.setAttribute("aria-label", `Disconnect ${user || "client"} ${client}`);
  button.addEventListener("click", () => disconnect(identity)); // a row stays that of its client
  row.append(button);
}
