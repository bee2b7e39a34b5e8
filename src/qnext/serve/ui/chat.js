// The conversation on the page: turns, the answer that is being written, branches.

import { answer } from "./api.js";
import { announce, byId, copyFrom, count, fill, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { requestOptions } from "./settings.js";

const log = byId("log");
const scroller = byId("scroller");
const prompt = byId("prompt");
const send = byId("send");

/** Everything the chat needs from the page around it. */
export const page = { conversation: null, changed: () => {}, inspect: () => {} };
/** Ends the answer that is being written; null while none is. */
let stopper = null;

export const isAnswering = () => stopper !== null;
export const stop = () => stopper?.abort();

// -- turns ---------------------------------------------------------------------------------------

function seconds(ms) {
  const s = ms / 1000;
  return s < 10 ? `${s.toFixed(s < 1 ? 2 : 1)} s` : `${Math.round(s)} s`;
}

function branchSwitch(node) {
  const all = page.conversation.branches(node);
  if (all.length < 2) return null;
  const at = all.indexOf(node);
  const go = (step, label, name) => iconButton(name, label, () => {
    if (isAnswering()) return;
    page.conversation.choose(all[at + step]);
    show();
    focusTurn(all[at + step]);
  }, { disabled: !all[at + step] });
  return h("span", { class: "branches", role: "group", "aria-label": "Versions" },
    go(-1, "Earlier version", "left"),
    h("span", { class: "quiet" }, `${at + 1} / ${all.length}`),
    go(1, "Later version", "right"));
}

function focusTurn(node) {
  document.getElementById(`turn-${node.id}`)?.querySelector(".branches button:enabled")?.focus();
}

function userTurn(node) {
  const text = h("p", { class: "text" }, node.content);
  const copy = iconButton("copy", "Copy", () => copyFrom(copy, node.content));
  const edit = iconButton("edit", "Edit", () => startEditing(turn, node));
  const turn = h("article", { class: "turn user", id: `turn-${node.id}`, "aria-label": "You" },
    text, h("div", { class: "actions" }, branchSwitch(node), copy, edit));
  return turn;
}

function startEditing(turn, node) {
  if (isAnswering()) return;
  const field = h("textarea", { value: node.content, rows: 3, "aria-label": "Edit the message" });
  const finish = () => {
    const text = field.value.trim();
    if (text) branchOff(page.conversation.parent(node), text);
  };
  const cancel = () => {
    turn.replaceWith(userTurn(node));
    document.getElementById(`turn-${node.id}`).querySelector('[aria-label="Edit"]').focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      finish();
    }
  });
  fill(turn, h("form", { class: "editor", onsubmit: (event) => {
    event.preventDefault();
    finish();
  } }, field, h("div", { class: "row" },
    h("span", { class: "quiet" }, "The old version stays as a branch."),
    h("button", { type: "button", onclick: cancel }, "Cancel"),
    h("button", { type: "submit", class: "primary" }, "Send"))));
  field.focus();
}

function summary(meta) {
  if (!meta) return "";
  if (meta.error) return meta.error;
  const parts = [];
  if (meta.tokens) parts.push(`${count(meta.tokens)} tokens`);
  if (meta.rate) parts.push(`${meta.rate < 10 ? meta.rate.toFixed(1) : Math.round(meta.rate)} tokens/s`);
  if (meta.first !== undefined) parts.push(`first after ${seconds(meta.first)}`);
  if (meta.cached) parts.push(`${count(meta.cached)} of ${count(meta.prompt)} prompt tokens cached`);
  if (meta.drafted) parts.push(`${meta.accepted} of ${meta.drafted} drafts accepted`);
  if (meta.reason === "length") parts.push("cut off: no room for more tokens");
  if (meta.stopped) parts.push("stopped");
  return parts.join(" · ");
}

function thoughtTitle(meta) {
  const parts = [meta?.thinking !== undefined ? `Thought for ${seconds(meta.thinking)}` : "Thought"];
  if (meta?.thought) parts.push(`${count(meta.thought)} tokens`);
  return parts.join(" · ");
}

/** One answer on the page; `update` shows what its node holds now. */
class AnswerTurn {
  constructor(node) {
    this.node = node;
    this.summary = h("summary", {});
    this.reasoning = h("p", { class: "text" });
    this.fold = h("details", { class: "reasoning", hidden: true }, this.summary, this.reasoning);
    this.text = h("div", { class: "prose" });
    this.view = new MarkdownView(this.text);
    this.remark = h("p", { class: "remark quiet" });
    this.actions = h("div", { class: "actions" });
    this.element = h("article",
      { class: "turn model", id: `turn-${node.id}`, "aria-label": "Model" },
      this.fold, this.text, h("div", { class: "foot" }, this.actions, this.remark));
    this.due = false;
  }

  /** Shows the node at the next frame, however many pieces arrive before. */
  later() {
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => {
      this.due = false;
      const atEnd = isAtEnd();
      this.update();
      if (atEnd) toEnd();
    });
  }

  update() {
    const { node } = this;
    const running = isRunning(node);
    this.element.setAttribute("aria-busy", String(running));
    this.element.classList.toggle("failed", Boolean(node.meta?.error));
    this.fold.hidden = !node.reasoning;
    const thinks = running && node.meta?.thinking === undefined;
    this.fold.classList.toggle("running", thinks);
    this.summary.textContent = thinks ? "Thinking …" : thoughtTitle(node.meta);
    if (this.reasoning.textContent !== (node.reasoning ?? "")) this.reasoning.textContent = node.reasoning;
    this.view.update(node.content);
    this.remark.textContent = running ? "" : summary(node.meta);
    fill(this.actions, running ? null : this.buttons());
  }

  buttons() {
    const { node } = this;
    const copy = iconButton("copy", "Copy", () => copyFrom(copy, node.content));
    return [
      branchSwitch(node),
      node.content && copy,
      iconButton("again", "Answer again", () => regenerate(node)),
      node.answer && iconButton("look", "Inspect this answer", () => page.inspect(node)),
    ];
  }
}

const running = new Set();
const isRunning = (node) => running.has(node.id);

/** Shows the conversation as it is. */
export function show() {
  const path = page.conversation.path();
  byId("welcome").hidden = path.length > 0;
  fill(log, path.map((node) => {
    if (node.role === "user") return userTurn(node);
    const turn = new AnswerTurn(node);
    turn.update();
    return turn.element;
  }));
  toEnd();
  setSend();
}

// -- answering -----------------------------------------------------------------------------------

export function submit() {
  const text = prompt.value.trim();
  if (isAnswering() || !text) return;
  prompt.value = "";
  fit();
  branchOff(page.conversation.path().at(-1) ?? null, text);
}

export function branchOff(parent, text) {
  if (isAnswering()) return;
  const question = page.conversation.add(parent, "user", text);
  respond(question);
}

function regenerate(node) {
  if (!isAnswering()) respond(page.conversation.parent(node));
}

async function respond(question) {
  const { conversation } = page;
  const node = conversation.add(question, "assistant", "", { reasoning: "" });
  conversation.save();
  page.changed();
  running.add(node.id);
  stopper = new AbortController();
  const { signal } = stopper;
  show();
  const turn = new AnswerTurn(node);
  byId(`turn-${node.id}`).replaceWith(turn.element);
  turn.update();
  toEnd();
  prompt.focus();
  announce("The model is answering.");
  node.meta = await receive(node, conversation.messages(question), signal, () => turn.later());
  if (node.meta.error) node.failed = true;
  running.delete(node.id);
  stopper = null;
  conversation.save();
  page.changed();
  if (page.conversation !== conversation) {
    setSend();
    return;
  }
  const atEnd = isAtEnd();
  turn.update();
  if (atEnd) toEnd();
  setSend();
  announce(node.meta.error ?? (node.meta.stopped ? "Stopped." : `The model: ${node.content}`));
}

/** Reads one answer into its node; returns what is to be remembered about it. */
async function receive(node, messages, signal, changed) {
  const asked = performance.now();
  const meta = {};
  let first = null;
  let last = asked;
  let usage = null;
  try {
    for await (const chunk of answer(messages, requestOptions(), signal)) {
      node.answer ??= chunk.id;
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      const { reasoning_content: reasoning, content } = choice.delta;
      if (reasoning || content) {
        last = performance.now();
        first ??= last;
      }
      if (reasoning) node.reasoning += reasoning;
      if (content) {
        if (node.reasoning) meta.thinking ??= last - first;
        node.meta = meta;
        node.content += content;
      }
      meta.reason = choice.finish_reason ?? meta.reason;
      changed();
    }
    if (!meta.reason) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (signal.aborted) meta.stopped = true;
    else meta.error = error.message;
  }
  if (node.reasoning) meta.thinking ??= last - first;
  if (first !== null) meta.first = first - asked;
  if (usage) note(meta, usage, last - first);
  return meta;
}

function note(meta, usage, ms) {
  const details = usage.completion_tokens_details ?? {};
  meta.tokens = usage.completion_tokens;
  meta.prompt = usage.prompt_tokens;
  meta.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  meta.thought = details.reasoning_tokens ?? 0;
  meta.drafted = details.drafted_tokens ?? 0;
  meta.accepted = details.accepted_tokens ?? 0;
  if (meta.tokens > 1 && ms > 0) meta.rate = ((meta.tokens - 1) * 1000) / ms;
}

// -- the field and the scroller ------------------------------------------------------------------

function isAtEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
}

export function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

export function setSend() {
  const answering = isAnswering();
  fill(send, icon(answering ? "stop" : "send"));
  send.classList.toggle("stops", answering);
  send.ariaLabel = answering ? "Stop" : "Send";
  send.title = answering ? "Stop (Escape)" : "Send (Enter)";
  send.disabled = !answering && !prompt.value.trim();
}

/** Makes the field as high as its text; the style sheet sets a limit. */
export function fit() {
  const atEnd = isAtEnd();
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  if (atEnd) toEnd();
  setSend();
}
