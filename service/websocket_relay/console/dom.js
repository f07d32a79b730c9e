// @ts-check
/** Elements of the page, and formats of what they show. */

/** @param {string} id @returns {HTMLElement} */
export function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** @param {string} id @returns {HTMLInputElement} or another form control */
export function input(id) {
  return /** @type {HTMLInputElement} */ (byId(id));
}

/** @param {Element} within @param {string} selector @returns {HTMLElement} */
export function query(within, selector) {
  return /** @type {HTMLElement} */ (within.querySelector(selector));
}

/** @param {Element} element @param {string} content */
export function setText(element, content) {
  if (element.textContent !== content) element.textContent = content;
}

/** @param {string} template @returns {HTMLElement} a copy of its content */
export function cloneTemplate(template) {
  const {content} = /** @type {HTMLTemplateElement} */ (byId(template));
  const copy = /** @type {HTMLElement} */ (content.firstElementChild);
  return /** @type {HTMLElement} */ (copy.cloneNode(true));
}

/**
 * Show one row for each item. An item keeps its row, and with it the focus and what is selected.
 *
 * @template Item
 * @param {Element} container
 * @param {string} template of a row
 * @param {Item[]} items
 * @param {(item: Item, index: number) => string} keyOf of each another one
 * @param {(row: HTMLElement, item: Item) => void} fill
 */
export function renderRows(container, template, items, keyOf, fill) {
  const rows = new Map([...container.children].map((row) => [keys.get(row), row]));
  let next = container.firstElementChild;
  for (const [index, item] of items.entries()) {
    const key = keyOf(item, index);
    const row = /** @type {HTMLElement} */ (rows.get(key) ?? cloneTemplate(template));
    rows.delete(key);
    keys.set(row, key);
    fill(row, item);
    if (row === next) next = row.nextElementSibling;
    else container.insertBefore(row, next);
  }
  for (const row of rows.values()) row.remove();
}

/** @type {WeakMap<Element, string>} */
const keys = new WeakMap(); // of rows

/** Have the browser save a file. @param {Blob} blob @param {string} name */
export function saveFile(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** @param {string} content @returns {Promise<boolean>} whether it is in the clipboard */
export async function copyText(content) {
  const {clipboard} = navigator;
  if (clipboard) return clipboard.writeText(content).then(() => true, () => false);
  const field = document.createElement("textarea"); // a page without TLS has no clipboard
  field.value = content;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  return isCopied;
}

// Formats

const oneDecimal = new Intl.NumberFormat("en", {maximumFractionDigits: 1}); // below 10
const integer = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
const COMPACT_FROM = 100_000;
const twoDigits = new Intl.NumberFormat("en", {maximumSignificantDigits: 2});

/** @param {number} value */
export function formatCount(value) {
  return (value < 10 ? oneDecimal : value < COMPACT_FROM ? integer : compact).format(value);
}

/** @param {number} count @param {string} noun */
export function formatNumber(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
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
export function formatAge(seconds) {
  const [days, hours, minutes] = [86_400, 3_600, 60].map((unit) => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.max(0, Math.floor(seconds))} s`;
}

/** @param {Date} date */
export function clockTime(date) {
  const parts = [date.getHours(), date.getMinutes(), date.getSeconds()];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

/** Return a time as briefly as it is clear. @param {number} seconds since 1970 */
export function formatTime(seconds) {
  const [date, now] = [new Date(seconds * 1000), new Date()];
  const day = date.toDateString() === now.toDateString() ? "" : `${date.toLocaleDateString("sv")} `;
  return day + clockTime(date);
}
