// The server: what the page asks it, and how its answers are read.

import { settings } from "./settings.js";

/** Called with a message when the server wants a key, or another one. */
export const gate = { denied: () => {} };

function headers(more = {}) {
  const key = settings.key ? { authorization: `Bearer ${settings.key}` } : {};
  return { ...key, ...more };
}

/** What went wrong, mostly in the server's own words. */
async function refusal(response) {
  if (response.status === 401) {
    const message = settings.key
      ? "The server does not accept this API key. Correct it in the settings, under Access."
      : "This server asks for an API key. Enter it in the settings, under Access.";
    gate.denied(message);
    return Object.assign(new Error(message), { status: 401 });
  }
  const text = await response.text();
  let message = `The server answered ${response.status} ${response.statusText}.`;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // No JSON: the status has to do.
  }
  const error = new Error(message[0].toUpperCase() + message.slice(1));
  error.status = response.status;
  return error;
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function json(path, options) {
  return (await ask(path, options)).json();
}

/** Yields the objects of a stream of server-sent events, until "[DONE]" or its end. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      for (const line of block.split("\n")) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice("data: ".length);
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  }
}

/** Streams the answer to a conversation: chunks as the server sends them. */
export async function* answer(messages, options, signal) {
  const body = {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    qnext: { inspect: true },
    ...options,
  };
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
}

/** What the server knows about the inside of an answer. */
export function inspection(id, signal) {
  return json(`/inspect/${encodeURIComponent(id)}`, { signal });
}

/** The samples of GET /metrics: name -> [{labels, value}]. */
export async function metrics(signal) {
  const text = await (await ask("/metrics", { signal })).text();
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const [, name, pairs, value] = match;
    const labels = {};
    for (const [, key, content] of (pairs ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[key] = content.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels, value: Number(value) });
  }
  return found;
}
