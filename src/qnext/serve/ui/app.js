// The page as a whole: views, the list of conversations, panels, keys.

import { gate, json } from "./api.js";
import { fit, isAnswering, page, setSend, show, stop, submit, branchOff } from "./chat.js";
import { Dashboard } from "./dashboard.js";
import { announce, byId, fill, h, icon, iconButton } from "./dom.js";
import { Inspect } from "./inspect.js";
import { access, applyTheme, setThinking, settings, showKeyState, showSettings } from "./settings.js";
import * as store from "./store.js";

const prompt = byId("prompt");
const wide = matchMedia("(min-width: 60rem)");
const inspect = new Inspect(byId("inspect"));
const dashboard = new Dashboard(byId("dashboard"));
const CURRENT = "qnext.current";

function report(text) {
  const notice = byId("notice");
  fill(notice, text, iconButton("close", "Close", () => (notice.hidden = true)));
  notice.hidden = false;
}
store.trouble.report = report;

// -- conversations -------------------------------------------------------------------------------

function open(conversation) {
  stop();
  page.conversation = conversation;
  localStorage.setItem(CURRENT, conversation.id);
  show();
  list();
  if (!byId("settings").hidden) showSettings(() => page.conversation);
}

function startNew() {
  open(new store.Conversation());
  location.hash = "#chat";
  if (!wide.matches) setSidebar(false);
  prompt.focus();
}

function list() {
  const known = store.all();
  fill(byId("conversations"), known.map((conversation) => {
    const current = conversation.id === page.conversation.id;
    const name = conversation.title || "Untitled";
    return h("li", { class: current ? "current" : null },
      h("button", { type: "button", class: "name", title: name, "aria-current": current && "true",
        onclick: () => {
          if (!current) open(conversation);
          location.hash = "#chat";
          if (!wide.matches) setSidebar(false);
        } }, name),
      iconButton("save", `Export ${name}`, () => download([conversation], name)),
      iconButton("trash", `Delete ${name}`, () => remove(conversation, name)));
  }));
  byId("export").disabled = known.length === 0;
}

function remove(conversation, name) {
  if (!confirm(`Delete “${name}”? It cannot be brought back.`)) return;
  const isOpen = conversation.id === page.conversation.id;
  (isOpen ? page.conversation : conversation).remove();
  announce("Deleted.");
  if (isOpen) open(new store.Conversation());
  else list();
  byId("new").focus();
}

function download(conversations, name) {
  const url = URL.createObjectURL(store.exported(conversations));
  const file = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation"}.json`;
  h("a", { href: url, download: file }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function takeIn(file) {
  try {
    const number = store.imported(await file.text());
    announce(`${number} conversations imported.`);
    list();
  } catch (error) {
    report(error.message);
  }
}

// -- the server ----------------------------------------------------------------------------------

/** Learns what is served; returns whether the server answers this browser. */
async function connect() {
  const model = byId("model");
  try {
    const { data } = await json("/v1/models");
    model.textContent = data[0].id;
    document.title = `${data[0].id} · qnext`;
    return true;
  } catch (error) {
    model.textContent = error.status === 401 ? "needs a key" : error.message;
    document.title = "not connected · qnext";
    return false;
  }
}

/** The key the server has refused already: it is asked for once, not at every look. */
let refused = null;
gate.denied = (message) => {
  if (refused === settings.key) return;
  refused = settings.key;
  if (byId("settings").hidden) setPanel(true);
  showKeyState(message, { refused: true });
  byId("set-key").focus();
};
access.changed = async () => {
  if (await connect()) {
    const message = settings.key ? "The server accepts this key." : "The server asks for no key.";
    showKeyState(`${message} It stays in this browser.`, { refused: false });
    announce(message);
    route();
  }
};

// -- panels and views ----------------------------------------------------------------------------

function setSidebar(isOpen) {
  byId("sidebar").hidden = !isOpen;
  byId("menu").ariaExpanded = String(isOpen);
  if (wide.matches) localStorage.setItem("qnext.sidebar", isOpen ? "open" : "closed");
}

function setPanel(isOpen) {
  if (isOpen) showSettings(() => page.conversation);
  byId("settings").hidden = !isOpen;
  byId("tune").ariaExpanded = String(isOpen);
  if (isOpen) byId("set-system").focus();
  else byId("tune").focus();
}

const VIEWS = ["chat", "inspect", "dashboard"];

function route() {
  const [view, id] = location.hash.slice(1).split("/");
  const current = VIEWS.includes(view) ? view : "chat";
  for (const name of VIEWS) {
    byId(name).hidden = name !== current;
    const link = byId(`to-${name}`);
    if (name === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  dashboard.set(current === "dashboard");
  inspect.set(current === "inspect", page.conversation, id ? decodeURIComponent(id) : null);
  byId("skip").hidden = current !== "chat";
  if (current === "chat") fit();
}

// -- wiring --------------------------------------------------------------------------------------

fill(byId("menu"), icon("menu"));
fill(byId("tune"), icon("tune"));
fill(byId("close-settings"), icon("close"));
fill(byId("new"), icon("plus"), "New chat");

byId("menu").addEventListener("click", () => setSidebar(byId("sidebar").hidden));
byId("tune").addEventListener("click", () => setPanel(byId("settings").hidden));
byId("close-settings").addEventListener("click", () => setPanel(false));
byId("new").addEventListener("click", startNew);
byId("export").addEventListener("click", () => download(store.all(), "qnext-conversations"));
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) takeIn(file);
  event.target.value = "";
});
byId("thinking").addEventListener("click", () => setThinking(!settings.thinking));
byId("suggestions").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) branchOff(null, event.target.textContent);
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  prompt.focus();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isAnswering()) stop();
  else submit();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (isAnswering()) stop();
  else if (!byId("settings").hidden) setPanel(false);
  else if (!wide.matches && !byId("sidebar").hidden) {
    setSidebar(false);
    byId("menu").focus();
  }
});
addEventListener("hashchange", () => {
  route();
  const view = VIEWS.find((name) => !byId(name).hidden);
  if (view !== "chat") byId(view).focus();
});
addEventListener("pagehide", () => {
  if (isAnswering()) page.conversation.save();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);

page.changed = list;
page.inspect = (node) => (location.hash = `#inspect/${encodeURIComponent(node.id)}`);
applyTheme();
setThinking(settings.thinking);
setSidebar(wide.matches && localStorage.getItem("qnext.sidebar") === "open");
const last = localStorage.getItem(CURRENT);
open(store.all().find((one) => one.id === last) ?? new store.Conversation());
setSend();
route();
if (!location.hash || location.hash === "#chat") prompt.focus();
await connect();
