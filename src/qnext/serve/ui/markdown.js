// Markdown as elements. What the model writes never becomes HTML: every element is made here by
// name, text becomes text nodes, and only plain web and mail addresses become links.

import { copyFrom, h, iconButton } from "./dom.js";
import { highlight } from "./highlight.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 12;

/** Shows a text that grows; what did not change since the last time is left as it is. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.shown = [];
  }

  update(text) {
    const found = blocks(text.replaceAll("\r\n", "\n").split("\n"));
    const same = (block, i) => this.shown[i]?.key === block.key;
    let keep = 0;
    while (keep < found.length && same(found[keep], keep)) keep += 1;
    for (const old of this.shown.slice(keep)) old.node.remove();
    this.shown = this.shown.slice(0, keep);
    for (const block of found.slice(keep)) {
      const node = build(block, 0);
      this.element.append(node);
      this.shown.push({ key: block.key, node });
    }
  }
}

// -- blocks --------------------------------------------------------------------------------------

/** Splits lines into blocks: {kind, key, …}; equal keys mean equal looks. */
function blocks(lines) {
  const found = [];
  let at = 0;
  const add = (kind, end, more) => {
    const key = `${kind}\n${lines.slice(at, end).join("\n")}${more?.open ? "" : "\n."}`;
    found.push({ kind, key, ...more });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) at += 1;
    else if ((match = FENCE.exec(line))) {
      const close = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}[ \\t]*$`);
      let end = at + 1;
      while (end < lines.length && !close.test(lines[end])) end += 1;
      const open = end >= lines.length;
      const code = lines.slice(at + 1, end).join("\n");
      add("code", Math.min(end + 1, lines.length), { code, language: match[2], open });
    } else if ((match = HEADING.exec(line))) {
      add("heading", at + 1, { level: match[1].length, text: match[2] });
    } else if (RULE.test(line)) add("rule", at + 1);
    else if (QUOTE.test(line)) {
      const end = endOf(lines, at, (l) => QUOTE.test(l));
      add("quote", end, { inner: lines.slice(at, end).map((l) => l.replace(QUOTE, "")) });
    } else if (ITEM.test(line)) {
      const list = readList(lines, at);
      add("list", list.end, list);
    } else if (line.includes("|") && DELIMITERS.test(lines[at + 1] ?? "") && isTable(lines, at)) {
      const end = endOf(lines, at, (l) => l.includes("|"));
      add("table", end, { rows: lines.slice(at, end).map(cells) });
    } else {
      const end = endOf(lines, at, (l, i) => l.trim() && (i === at || !interrupts(l)));
      add("paragraph", end, { text: lines.slice(at, end).map((l) => l.trimStart()).join("\n") });
    }
  }
  return found;
}

function endOf(lines, start, goesOn) {
  let end = start;
  while (end < lines.length && goesOn(lines[end], end)) end += 1;
  return end;
}

function interrupts(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) ||
    /^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/.test(line);
}

function isTable(lines, at) {
  return cells(lines[at]).length === cells(lines[at + 1]).length;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** A list that begins at a line: its items as lines of their own. */
function readList(lines, start) {
  const [, indent, marker] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(marker);
  const items = [];
  let at = start;
  let width = 0;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    const isItem = match && match[1].length < indent.length + 2 && /\d/.test(match[2]) === ordered;
    if (isItem && !RULE.test(lines[at])) {
      width = match[1].length + match[2].length + 1;
      items.push([match[3] ?? ""]);
    } else if (!lines[at].trim()) {
      const next = endOf(lines, at, (l) => !l.trim());
      const following = lines[next] ?? "";
      const again = ITEM.exec(following);
      const goesOn = following && (indentOf(following) >= width ||
        (again && again[1].length < indent.length + 2 && /\d/.test(again[2]) === ordered));
      if (!goesOn) break;
      items.at(-1).push("");
    } else if (indentOf(lines[at]) >= Math.min(width, indent.length + 2)) {
      items.at(-1).push(lines[at].slice(Math.min(width, indentOf(lines[at]))));
    } else if (items.at(-1).at(-1).trim() && !interrupts(lines[at]) && !match) {
      items.at(-1).push(lines[at]); // a line that was broken without an indent
    } else break;
    at += 1;
  }
  return { end: at, items, ordered, first: ordered ? Number.parseInt(marker, 10) : 1 };
}

const indentOf = (line) => line.length - line.trimStart().length;

function build(block, depth) {
  const inner = (lines) => (depth < DEEPEST
    ? blocks(lines).map((one) => build(one, depth + 1))
    : [h("p", {}, lines.join("\n"))]);
  switch (block.kind) {
    case "code":
      return codeBlock(block.code, block.language);
    case "heading":
      // The page has headings of its own above.
      return h(`h${Math.min(block.level + 2, 6)}`, {}, inline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, inner(block.inner));
    case "list":
      return h(block.ordered ? "ol" : "ul", block.ordered ? { start: block.first } : {},
        block.items.map((lines) => listItem(lines, inner)));
    case "table":
      return table(block.rows);
    default:
      return h("p", {}, inline(block.text));
  }
}

function listItem(lines, inner) {
  const task = /^\[([ xX])\] /.exec(lines[0]);
  const content = task ? [lines[0].slice(4), ...lines.slice(1)] : lines;
  const nodes = inner(content);
  // A single line needs no paragraph around it.
  const tight = !content.includes("") && nodes[0]?.localName === "p";
  const children = tight ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
  const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ",
    "aria-label": task[1] === " " ? "Open" : "Done" });
  return h("li", task ? { class: "task" } : {}, box, children);
}

function table([head, rule, ...rows]) {
  const sides = rule.map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : null);
  const row = (tag, values) => h("tr", {}, sides.map((side, i) =>
    h(tag, { class: side && `to-${side}` }, inline(values[i] ?? ""))));
  return h("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, row("th", head)),
      h("tbody", {}, rows.map((values) => row("td", values)))));
}

export function codeBlock(code, language) {
  const name = language.slice(0, 24);
  const copy = iconButton("copy", "Copy code", () => copyFrom(copy, code));
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, name || "text"), copy),
    h("pre", { tabIndex: 0, role: "region", "aria-label": `Code${name && `, ${name}`}` },
      h("code", {}, highlight(code, language))));
}

// -- inside a line -------------------------------------------------------------------------------

// Marks reach 1,000 characters far, so that hostile text takes no more than its length's time.
const SPAN = new RegExp(
  [
    /\\([!-/:-@[-`{-~])/, // 1 an escaped sign
    /(`+)([\s\S]{0,1000}?[^`])\2(?!`)/, // 2, 3 code
    /\*\*(?=\S)([\s\S]{0,1000}?\S)\*\*/, // 4 strong
    /(?<![\w_])__(?=\S)([\s\S]{0,1000}?\S)__(?![\w_])/, // 5 strong
    /\*(?=[^\s*])([\s\S]{0,1000}?[^\s*])\*(?!\*)/, // 6 emphasis
    /(?<![\w_])_(?=[^\s_])([\s\S]{0,1000}?[^\s_])_(?![\w_])/, // 7 emphasis
    /~~(?=\S)([\s\S]{0,1000}?\S)~~/, // 8 struck out
    /!?\[((?:[^[\]\\]|\\.)*)\]\(\s*<?((?:[^\s()<>]|\([^\s()]*\))*)>?(?:\s+["'][^"']*["'])?\s*\)/, // 9, 10
    /<?(https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_~])>?/, // 11 an address
    /(?: {2,}|\\)?(\n)/, // 12 a line break
  ].map((pattern) => pattern.source).join("|"), "g");

/** A text with marks as nodes. */
function inline(text, depth = 0) {
  const nodes = [];
  let end = 0;
  if (depth > DEEPEST) return [text];
  const inner = (content) => inline(content, depth + 1);
  for (const match of text.matchAll(SPAN)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    const [, sign, , code, strong, strong2, em, em2, struck, label, target, address, broken] = match;
    if (sign !== undefined) nodes.push(sign);
    else if (code !== undefined) nodes.push(h("code", {}, code.replace(/^ (.*) $/s, "$1")));
    else if (strong ?? strong2) nodes.push(h("strong", {}, inner(strong ?? strong2)));
    else if (em ?? em2) nodes.push(h("em", {}, inner(em ?? em2)));
    else if (struck) nodes.push(h("del", {}, inner(struck)));
    else if (label !== undefined) nodes.push(link(target, inner(label), match[0]));
    else if (address) nodes.push(link(address, [address], match[0]));
    else if (broken) nodes.push(h("br"));
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

/** A link, if the address is one of the web or of mail; otherwise the text as it was written. */
function link(target, content, written) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return written;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return written;
  const properties = { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" };
  return h("a", properties, content.length ? content : url.href);
}
