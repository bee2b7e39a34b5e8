// What a person has set: sampling, thinking, the key, light or dark. Kept in this browser.

import { byId, fill, h, icon } from "./dom.js";

const PLACE = "qnext.settings";
const BUDGETS = [0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, null];

/** Numbers a request may carry; empty means the model's own. */
const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05 }, "0 always takes the likeliest"],
  ["top_p", "Top-p", { min: 0.01, max: 1, step: 0.01 }, "Likeliest tokens up to this sum"],
  ["top_k", "Top-k", { min: 0, max: 1000, step: 1 }, "So many likeliest tokens; 0 for all"],
  ["min_p", "Min-p", { min: 0, max: 1, step: 0.01 }, "At least this share of the likeliest"],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1 }, "Against repeating"],
  ["max_tokens", "Longest answer", { min: 1, max: 1000000, step: 1 }, "In tokens"],
  ["seed", "Seed", { min: 0, max: 2 ** 31, step: 1 }, "The same seed, the same answer"],
];

const FIRST = { thinking: true, budget: BUDGETS.length - 1, theme: "system", key: "" };

export const settings = { ...FIRST, ...saved() };

/** What the page does when another key was entered. */
export const access = { changed: () => {} };

function saved() {
  try {
    const found = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    return found && typeof found === "object" ? found : {};
  } catch (error) {
    if (error instanceof SyntaxError) return {};
    throw error;
  }
}

function keep(name, value) {
  settings[name] = value;
  localStorage.setItem(PLACE, JSON.stringify(settings));
}

/** The fields of a request that follow from the settings. */
export function requestOptions() {
  const found = { chat_template_kwargs: { enable_thinking: settings.thinking } };
  const budget = BUDGETS[settings.budget] ?? null;
  if (settings.thinking && budget !== null) found.thinking_budget = budget;
  for (const [name] of NUMBERS) {
    if (typeof settings[name] === "number") found[name] = settings[name];
  }
  return found;
}

function budgetText() {
  const budget = BUDGETS[settings.budget] ?? null;
  return budget === null ? "no limit" : `${budget.toLocaleString("en")} tokens`;
}

// -- theme ---------------------------------------------------------------------------------------

const THEMES = ["system", "light", "dark"];

export function applyTheme() {
  const root = document.documentElement;
  if (settings.theme === "system") delete root.dataset.theme;
  else root.dataset.theme = settings.theme;
  const dark =
    settings.theme === "dark" ||
    (settings.theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
  const button = byId("theme");
  const next = dark ? "light" : "dark";
  button.title = `Change to ${next}`;
  button.ariaLabel = button.title;
  fill(button, icon(dark ? "sun" : "moon"));
  button.onclick = () => setTheme(next);
}

function setTheme(theme) {
  keep("theme", theme);
  const choice = byId(`theme-${theme}`);
  if (choice) choice.checked = true;
  applyTheme();
}

// -- panel ---------------------------------------------------------------------------------------

function numberField([name, label, limits, hint]) {
  const input = h("input", {
    id: `set-${name}`, type: "number", ...limits, placeholder: "model's own",
    value: settings[name] ?? "", "aria-describedby": `hint-${name}`,
    onchange: () => {
      if (!input.checkValidity()) {
        input.reportValidity();
        return;
      }
      keep(name, input.value === "" ? undefined : input.valueAsNumber);
    },
  });
  return h("div", { class: "setting" },
    h("label", { htmlFor: input.id }, label), input,
    h("p", { id: `hint-${name}`, class: "quiet" }, hint));
}

function thinkingFields() {
  const output = h("output", { htmlFor: "set-budget", id: "budget-text" }, budgetText());
  const slider = h("input", {
    id: "set-budget", type: "range", min: 0, max: BUDGETS.length - 1, step: 1,
    value: settings.budget, disabled: !settings.thinking, "aria-valuetext": budgetText(),
    oninput: () => {
      keep("budget", slider.valueAsNumber);
      output.textContent = budgetText();
      slider.setAttribute("aria-valuetext", budgetText());
    },
  });
  const toggle = h("input", {
    id: "set-thinking", type: "checkbox", checked: settings.thinking,
    onchange: () => setThinking(toggle.checked),
  });
  return [
    h("div", { class: "setting row" },
      h("label", { htmlFor: "set-thinking" }, "Think before answering"), toggle),
    h("div", { class: "setting" },
      h("div", { class: "row" }, h("label", { htmlFor: "set-budget" }, "Thinking budget"), output),
      slider,
      h("p", { class: "quiet" }, "When it is spent, the model closes its thoughts and answers.")),
  ];
}

export function setThinking(on) {
  keep("thinking", on);
  const slider = byId("set-budget");
  if (slider) {
    slider.disabled = !on;
    byId("set-thinking").checked = on;
  }
  const button = byId("thinking");
  button.ariaPressed = String(on);
}

/** Fills the panel; `conversation` gives the one whose system prompt is edited. */
export function showSettings(conversation) {
  const system = h("textarea", {
    id: "set-system", rows: 4, value: conversation().system,
    placeholder: "How the model should behave in this conversation",
    onchange: () => {
      conversation().system = system.value;
      conversation().save();
    },
  });
  const key = h("input", {
    id: "set-key", type: "password", autocomplete: "off", value: settings.key,
    "aria-describedby": "hint-key",
    onchange: () => {
      const value = key.value.trim();
      const isKey = /^[\x21-\x7e]*$/.test(value);
      key.setCustomValidity(isKey ? "" : "A key has ASCII letters, digits and signs only, and no spaces.");
      if (!key.reportValidity()) return;
      keep("key", value);
      access.changed();
    },
  });
  const themes = THEMES.map((theme) => {
    const choice = h("input", {
      type: "radio", name: "theme", id: `theme-${theme}`, checked: settings.theme === theme,
      onchange: () => setTheme(theme),
    });
    return h("label", { htmlFor: `theme-${theme}` }, choice, theme[0].toUpperCase() + theme.slice(1));
  });
  const group = (title, ...content) =>
    h("section", {}, h("h3", {}, title), ...content);
  fill(byId("settings-body"),
    group("System prompt",
      h("div", { class: "setting" },
        h("label", { htmlFor: "set-system", class: "unseen" }, "System prompt"), system)),
    group("Thinking", ...thinkingFields()),
    group("Sampling", h("div", { class: "numbers" }, ...NUMBERS.map(numberField))),
    group("Appearance", h("fieldset", { class: "choices" },
      h("legend", { class: "unseen" }, "Appearance"), ...themes)),
    group("Access", h("form", { class: "setting", onsubmit: (event) => event.preventDefault() },
      h("label", { htmlFor: "set-key" }, "API key"), key,
      h("p", { id: "hint-key", class: "quiet" },
        "Only where the server asks for one. It stays in this browser."))));
}

/** Says beside the key what the server made of it. */
export function showKeyState(message, { refused }) {
  const hint = byId("hint-key");
  if (!hint) return;
  hint.textContent = message;
  hint.className = refused ? "alarm" : "quiet";
  byId("set-key").setAttribute("aria-invalid", String(refused));
}
