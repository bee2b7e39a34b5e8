// Building the page: elements from names, properties and children. Text only ever becomes text
// nodes; nothing here, or anywhere in the page, parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Paths of the icons, drawn with a stroke in a square of 24. */
const ICONS = {
  send: "M12 19V5M5.5 11.5 12 5l6.5 6.5",
  stop: "M8 8h8v8H8z",
  plus: "M12 5v14M5 12h14",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19 5v5h-5M18.4 14a7 7 0 1 1-1.2-6.5L19 10",
  edit: "M5 19l1-4L16 5l3 3L9 18z",
  look: "M2.5 12S6 6 12 6s9.5 6 9.5 6-3.5 6-9.5 6-9.5-6-9.5-6ZM12 14.5a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5Z",
  left: "M14.5 6 8.5 12l6 6",
  right: "M9.5 6l6 6-6 6",
  menu: "M4 7h16M4 12h16M4 17h16",
  tune: "M4 8h9M17 8h3M15 6v4M4 16h3M11 16h9M9 14v4",
  close: "M6 6l12 12M18 6 6 18",
  trash: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12",
  save: "M12 4v11M7.5 10.5 12 15l4.5-4.5M5 19h14",
  open: "M12 15V4M7.5 8.5 12 4l4.5 4.5M5 19h14",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8ZM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6 7 7M17 17l1.4 1.4M5.6 18.4 7 17M17 7l1.4-1.4",
  moon: "M19 14.5A7.5 7.5 0 0 1 9.5 5a7.5 7.5 0 1 0 9.5 9.5Z",
};

/** An element with properties (`class`, `onclick`, `aria-label`, …) and children. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name in element && !name.includes("-") && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child);
  }
}

/** Replaces everything inside an element. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

/** An element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  append(element, children);
  return element;
}

export function icon(name) {
  const drawing = { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" };
  return svg("svg", drawing, svg("path", { d: ICONS[name] }));
}

/** A button that shows an icon; the label is its tooltip and its name. */
export function iconButton(name, label, onclick, more = {}) {
  const properties = { type: "button", class: "icon-button", title: label, "aria-label": label };
  return h("button", { ...properties, onclick, ...more }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Tells screen readers something that is seen otherwise. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Copies text and shows on the button that it is done. */
export async function copyFrom(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without leave (or over plain HTTP): through a field that is selected for a moment.
    const field = h("textarea", { value: text, class: "unseen" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  const before = button.firstElementChild;
  before.replaceWith(icon("check"));
  announce("Copied.");
  setTimeout(() => button.firstElementChild.replaceWith(before), 1200);
}

/** 1,234 or 1.2 M, as short as it stays clear. */
export function count(number) {
  return number < 1e6 ? number.toLocaleString("en") : `${(number / 1e6).toFixed(1)} M`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}
