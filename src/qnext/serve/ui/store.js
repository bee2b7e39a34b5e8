// Conversations, kept in this browser. A conversation is a tree: editing a message, or asking for
// another answer, adds a branch beside the old one. Nothing is sent anywhere.

import { readConversation, readFile, Unreadable } from "./reading.js";

const PREFIX = "qnext.chat.";

/** Called with a message when the browser keeps no more. */
export const trouble = { report: () => {} };

const newId = () => crypto.getRandomValues(new Uint32Array(3)).reduce((s, n) => s + n.toString(36), "");

export class Conversation {
  constructor(saved = {}) {
    this.id = saved.id ?? newId();
    this.title = saved.title ?? "";
    this.created = saved.created ?? Date.now();
    this.updated = saved.updated ?? this.created;
    this.system = saved.system ?? "";
    /** id -> {id, parent, role, content, …} */
    this.nodes = new Map((saved.nodes ?? []).map((node) => [node.id, node]));
    /** parent id ("" at the beginning) -> the child that is shown */
    this.chosen = new Map(saved.chosen ?? []);
  }

  /** Adds a message after `parent` (null: at the beginning) and shows it. */
  add(parent, role, content, more = {}) {
    const node = { id: newId(), parent: parent?.id ?? "", role, content, ...more };
    this.nodes.set(node.id, node);
    this.chosen.set(node.parent, node.id);
    if (!this.title && role === "user") this.title = content.trim().split("\n")[0].slice(0, 80);
    return node;
  }

  /** Messages with the same parent, oldest first: the branches at this place. */
  branches(node) {
    return [...this.nodes.values()].filter((other) => other.parent === node.parent);
  }

  choose(node) {
    this.chosen.set(node.parent, node.id);
    this.save();
  }

  /** The messages that are shown, from the first to the last. */
  path() {
    const found = [];
    let at = this.chosen.get("");
    while (at !== undefined) {
      const node = this.nodes.get(at);
      if (!node) break;
      found.push(node);
      at = this.chosen.get(at);
    }
    return found;
  }

  parent(node) {
    return this.nodes.get(node.parent) ?? null;
  }

  /** Messages up to a node as the server wants them. */
  messages(until) {
    const found = [];
    for (let node = until; node; node = this.parent(node)) {
      if (!node.failed) found.unshift({ role: node.role, content: node.content });
    }
    if (this.system.trim()) found.unshift({ role: "system", content: this.system.trim() });
    return found;
  }

  toJSON() {
    const { id, title, created, updated, system } = this;
    const nodes = [...this.nodes.values()];
    return { id, title, created, updated, system, nodes, chosen: [...this.chosen] };
  }

  save() {
    if (!this.nodes.size || this.removed) return;
    this.updated = Date.now();
    try {
      localStorage.setItem(PREFIX + this.id, JSON.stringify(this));
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      trouble.report("This browser keeps no more conversations: export some and delete them.");
    }
  }

  /** Forgets the conversation; an answer that still arrives does not bring it back. */
  remove() {
    this.removed = true;
    localStorage.removeItem(PREFIX + this.id);
  }
}

/** A conversation as it was kept; null for what is damaged. */
function read(text) {
  try {
    return new Conversation(readConversation(JSON.parse(text), "it"));
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof Unreadable) return null;
    throw error;
  }
}

/** All conversations, the latest first. */
export function all() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const found = keys.map((key) => read(localStorage.getItem(key))).filter(Boolean);
  return found.sort((a, b) => b.updated - a.updated);
}

/** A file of conversations. */
export function exported(conversations) {
  const file = { format: "qnext-conversations", version: 1, conversations };
  return new Blob([JSON.stringify(file, null, 2)], { type: "application/json" });
}

/** Takes conversations in from an exported file; returns how many. All of them, or none. */
export function imported(text) {
  const found = readFile(text).map((saved) => new Conversation(saved));
  for (const conversation of found) conversation.save();
  return found.length;
}
