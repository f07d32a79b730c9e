// @ts-check
/** What a message contains, and how it is shown, found, exported and published again. Pure. */

const PREVIEW_LENGTH = 500; // characters of a message in its row
const PREVIEW_BYTES = 16; // of a binary message in its row
const MAX_DETAIL_LENGTH = 200_000; // characters of an expanded message
const MAX_DETAIL_BYTES = 4_096; // of an expanded binary message
const MAX_JSON_LENGTH = 100_000; // characters; longer messages are treated as text
const MAX_INDENT = 32; // levels
const MAX_ARGUMENT_BYTES = 65_536; // Linux limits each argument of a command to 128 KiB

const MEDIA_TYPES = {
  text: "text/plain; charset=utf-8",
  JSON: "application/json",
  binary: "application/octet-stream",
};
const EXTENSIONS = {text: "txt", JSON: "json", binary: "bin"};

const encoder = new TextEncoder();

/** @param {Payload} data */
export function kindOf(data) {
  if (typeof data !== "string") return "binary";
  return isJson(data) ? "JSON" : "text";
}

/** Return whether the text is a JSON object or array. @param {string} content */
function isJson(content) {
  if (content.length > MAX_JSON_LENGTH || !/^\s*[[{]/.test(content)) return false;
  try {
    JSON.parse(content);
    return true;
  } catch {
    return false;
  }
}

/** @param {Payload} data */
export function sizeOf(data) {
  return typeof data === "string" ? encoder.encode(data).byteLength : data.byteLength;
}

/** @param {Payload} data */
export function preview(data) {
  if (typeof data !== "string") {
    const first = new Uint8Array(data, 0, Math.min(data.byteLength, PREVIEW_BYTES));
    return hexOf(first) + (data.byteLength > PREVIEW_BYTES ? " …" : "");
  }
  return data.length > PREVIEW_LENGTH ? `${data.slice(0, PREVIEW_LENGTH)}…` : data;
}

/** @param {Payload} data */
export function detailOf(data) {
  if (typeof data !== "string") return hexDump(data);
  const content = isJson(data) ? indentJson(data) : data;
  if (content.length <= MAX_DETAIL_LENGTH) return content;
  return `${content.slice(0, MAX_DETAIL_LENGTH)}\n… the rest is in what Save saves`;
}

/**
 * Indent JSON. Its numbers and strings stay unchanged: JSON.parse would round large numbers.
 *
 * @param {string} content valid JSON
 */
function indentJson(content) {
  const tokens = content.match(/"(?:\\.|[^"\\])*"|[[\]{},:]|[^\s"[\]{},:]+/g) ?? [];
  const [opens, closes] = [/^[[{]$/, /^[\]}]$/];
  let [result, depth, before] = ["", 0, ""];
  for (const token of tokens) {
    if (closes.test(token)) depth -= 1;
    const isNewLine = before === "," || opens.test(before) !== closes.test(token);
    if (isNewLine) result += `\n${"  ".repeat(Math.min(depth, MAX_INDENT))}`;
    result += token === ":" ? ": " : token;
    if (opens.test(token)) depth += 1;
    before = token;
  }
  return result;
}

/** @param {ArrayBuffer} data */
function hexDump(data) {
  const lines = [];
  for (let start = 0; start < Math.min(data.byteLength, MAX_DETAIL_BYTES); start += 16) {
    const part = new Uint8Array(data, start, Math.min(16, data.byteLength - start));
    const isPrintable = (/** @type {number} */ byte) => byte > 31 && byte < 127;
    const chars = Array.from(part, (b) => (isPrintable(b) ? String.fromCharCode(b) : "."));
    const offset = start.toString(16).padStart(8, "0");
    lines.push(`${offset}  ${hexOf(part).padEnd(47)}  ${chars.join("")}`);
  }
  if (data.byteLength > MAX_DETAIL_BYTES) lines.push("… the rest is in what Save saves");
  return lines.join("\n");
}

/** @param {Uint8Array} part */
function hexOf(part) {
  return Array.from(part, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
}

/** @param {Uint8Array} bytes */
function base64Of(bytes) {
  let binary = "";
  for (let start = 0; start < bytes.length; start += 32_768) { // arguments of a call are limited
    binary += String.fromCharCode(...bytes.subarray(start, start + 32_768));
  }
  return btoa(binary);
}

/**
 * Return whether messages contain a text, in any case; of binary ones, whether their beginning
 * does, as it is shown.
 *
 * @param {string} sought "": all messages do
 * @returns {(data: Payload) => boolean}
 */
export function finderOf(sought) {
  if (!sought) return () => true;
  const pattern = new RegExp(sought.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "iu");
  return (data) => pattern.test(typeof data === "string" ? data : preview(data));
}

/** Return the name of the file that a message is saved as. @param {PositionedPayload} message */
export function fileNameOf({channel, position, data}) {
  return `${channel}-${position}.${EXTENSIONS[kindOf(data)]}`;
}

/** Return messages as lines of JSON. @param {PositionedPayload[]} messages */
export function ndjsonOf(messages) {
  return messages.map(({channel, position, data}) => {
    const isText = typeof data === "string";
    const content = isText ? {text: data} : {base64: base64Of(new Uint8Array(data))};
    return `${JSON.stringify({channel, position, ...content})}\n`;
  });
}

/**
 * Return the command that publishes a message again. It has no token, but a variable for it.
 *
 * @param {PositionedPayload} message
 * @param {string} base URL of the relay, with a slash at the end
 * @param {boolean} hasToken whether the relay asks for one
 */
export function curlOf(message, base, hasToken) {
  const {channel, data} = message;
  const bytes = typeof data === "string" ? encoder.encode(data) : new Uint8Array(data);
  // Control characters end the paste of a terminal, and are then typed into it.
  const isPlain = typeof data === "string" && !/[\0-\x08\x0b-\x1f\x7f-\x9f]/.test(data);
  let [source, body] = ["", `--data-binary @${fileNameOf(message)}`];
  if (bytes.length <= MAX_ARGUMENT_BYTES) {
    if (isPlain) body = `--data-raw ${shellQuoted(data)}`;
    else [source, body] = [`printf %s ${base64Of(bytes)} | base64 -d | `, "--data-binary @-"];
  }
  const token = hasToken ? ` \\\n  -H "Authorization: Bearer $TOKEN"` : "";
  const type = `-H ${shellQuoted(`Content-Type: ${MEDIA_TYPES[kindOf(data)]}`)}`;
  const url = shellQuoted(new URL(`channels/${channel}`, base).href);
  return `${source}curl ${url}${token} \\\n  ${type} \\\n  ${body}`;
}

/** @param {string} content */
function shellQuoted(content) {
  return `'${content.replaceAll("'", `'\\''`)}'`;
}

/**
 * @typedef {string | ArrayBuffer} Payload
 * @typedef {{channel: string, position: string, data: Payload}} PositionedPayload
 */
