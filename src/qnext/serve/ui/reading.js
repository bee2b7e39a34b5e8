// Conversations that come from outside, checked value by value: a file may hold anything. What is
// returned has only fields the page knows, each of the type the page expects.

const NUMBERS = ["tokens", "rate", "first", "thinking", "thought", "cached", "prompt", "drafted", "accepted"];
const ROLES = ["user", "assistant"];

/** Says what is wrong with what was read, and where. */
export class Unreadable extends Error {}

function kindOf(value) {
  if (value === null || value === undefined) return "nothing";
  if (Array.isArray(value)) return "a list";
  if (typeof value === "object") return "an object";
  return typeof value === "string" ? "text" : String(value);
}

function wrong(place, expected, value) {
  return new Unreadable(`${place}: expected ${expected}, found ${kindOf(value)}.`);
}

function object(value, place) {
  if (kindOf(value) !== "an object") throw wrong(place, "an object", value);
  return value;
}

function list(value, place) {
  if (!Array.isArray(value)) throw wrong(place, "a list", value);
  return value;
}

/** A reader of one kind of value; a missing value (or null) is left out unless it is required. */
function reader(kind, words, fits = () => true) {
  return (from, name, place, { required = false } = {}) => {
    const value = from[name] ?? undefined;
    if (value === undefined && !required) return {};
    if (typeof value !== kind || !fits(value)) throw wrong(`${place}.${name}`, words, value);
    return { [name]: value };
  };
}

const text = reader("string", "text");
const flag = reader("boolean", "true or false");
const amount = reader("number", "a number of at least 0", (value) => value >= 0);

function readMeta(value, place) {
  const from = object(value, place);
  return Object.assign({}, ...NUMBERS.map((name) => amount(from, name, place)),
    text(from, "reason", place), text(from, "error", place), flag(from, "stopped", place));
}

function readNode(value, place) {
  const from = object(value, place);
  const needed = { required: true };
  const node = { ...text(from, "id", place, needed), ...text(from, "parent", place, needed),
    ...text(from, "role", place, needed), ...text(from, "content", place, needed),
    ...text(from, "reasoning", place), ...text(from, "answer", place), ...flag(from, "failed", place) };
  if (!ROLES.includes(node.role)) {
    throw new Unreadable(`${place}.role: expected "user" or "assistant", found "${node.role.slice(0, 40)}".`);
  }
  if (!node.id) throw new Unreadable(`${place}.id: is empty.`);
  if ((from.meta ?? null) !== null) node.meta = readMeta(from.meta, `${place}.meta`);
  return node;
}

/** Messages hang together as a tree: every one has its parent, and none is its own ancestor. */
function checkTree(nodes, place) {
  const known = new Map();
  nodes.forEach((node, i) => {
    if (known.has(node.id)) throw new Unreadable(`${place}[${i}].id: another message has it as well.`);
    known.set(node.id, node);
  });
  const rooted = new Set([""]);
  nodes.forEach((node, i) => {
    const trail = new Set();
    for (let at = node; !rooted.has(at.id); at = known.get(at.parent)) {
      if (trail.has(at.id)) throw new Unreadable(`${place}[${i}].parent: the message follows itself.`);
      trail.add(at.id);
      if (at.parent === "") break;
      if (!known.has(at.parent)) throw new Unreadable(`${place}[${i}].parent: there is no such message.`);
    }
    for (const id of trail) rooted.add(id);
  });
  return known;
}

function readChosen(value, known, place) {
  return list(value, place).map((pair, i) => {
    const here = `${place}[${i}]`;
    const [parent, child] = list(pair, here);
    if (typeof parent !== "string" || known.get(child)?.parent !== parent) {
      throw new Unreadable(`${here}: expected a message's id and that of one that follows it.`);
    }
    return [parent, child];
  });
}

/** A saved conversation; throws Unreadable, which names the place of what is wrong. */
export function readConversation(value, place) {
  const from = object(value, place);
  const saved = { ...text(from, "id", place, { required: true }), ...text(from, "title", place),
    ...text(from, "system", place), ...amount(from, "created", place), ...amount(from, "updated", place) };
  saved.nodes = list(from.nodes, `${place}.nodes`).map((node, i) => readNode(node, `${place}.nodes[${i}]`));
  const known = checkTree(saved.nodes, `${place}.nodes`);
  saved.chosen = readChosen(from.chosen ?? [], known, `${place}.chosen`);
  return saved;
}

/** The conversations of an exported file; throws Unreadable, which says what is wrong with it. */
export function readFile(content) {
  let file;
  try {
    file = JSON.parse(content);
  } catch {
    throw new Unreadable("This file is not JSON.");
  }
  if (file?.format !== "qnext-conversations" || !Array.isArray(file.conversations)) {
    throw new Unreadable("This file holds no conversations that were exported here.");
  }
  if ((file.version ?? 1) !== 1) {
    throw new Unreadable(`This file has version ${JSON.stringify(file.version)}; this page reads version 1.`);
  }
  try {
    return file.conversations.map((one, i) => readConversation(one, `conversations[${i}]`));
  } catch (error) {
    if (!(error instanceof Unreadable)) throw error;
    throw new Unreadable(`Nothing was imported. ${error.message}`);
  }
}
