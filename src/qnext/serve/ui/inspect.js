// Inside an answer: how likely each token was, what else it might have been, what the MTP head had
// drafted, which experts ran in which layer, and what the conversation keeps in memory.

import { inspection } from "./api.js";
import { bytes, count, fill, h } from "./dom.js";
import { HeatMap } from "./heatmap.js";

const percent = (logprob) => {
  const p = Math.exp(logprob) * 100;
  return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};

/** A token's text as it can be seen: spaces and line breaks have signs. */
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";

export class Inspect {
  constructor(element) {
    this.element = element;
    this.known = new Map();
    this.active = false;
  }

  /** Shows (or leaves) the view; `id` is a message, or null for the last answer. */
  async set(active, conversation, id) {
    this.active = active;
    this.request?.abort();
    if (!active) return;
    const answers = conversation.path().filter((node) => node.answer);
    const node = answers.find((one) => one.id === id) ?? answers.at(-1);
    this.head(conversation, answers, node);
    if (!node) {
      this.say("Nothing to look into yet: ask the model something first.");
      return;
    }
    this.say("Running the answer through the model once more …");
    this.request = new AbortController();
    const { signal } = this.request;
    try {
      let found = this.known.get(node.answer);
      if (!found) {
        found = await inspection(node.answer, signal);
        this.known.set(node.answer, found);
      }
      if (!signal.aborted) this.show(node, found);
    } catch (error) {
      if (!signal.aborted) this.say(error.message);
    }
  }

  head(conversation, answers, node) {
    const label = (one) => {
      const question = conversation.parent(one)?.content ?? "";
      return question.length > 60 ? `${question.slice(0, 59)}…` : question;
    };
    const select = h("select", {
      id: "inspect-which",
      onchange: () => (location.hash = `#inspect/${encodeURIComponent(select.value)}`),
    }, answers.map((one) => h("option", { value: one.id, selected: one === node }, label(one))));
    this.body = h("div", { class: "inspection" });
    fill(this.element, h("div", { class: "column" },
      h("div", { class: "title-row" },
        h("h2", {}, "Inspect"),
        answers.length > 0 && h("label", { htmlFor: "inspect-which", class: "quiet" }, "Answer to"),
        answers.length > 0 && select),
      this.body));
  }

  say(text) {
    fill(this.body, h("p", { class: "quiet", role: "status" }, text));
  }

  show(node, found) {
    this.found = found;
    this.detail = h("div", { class: "detail", "aria-live": "polite" });
    fill(this.body,
      this.figures(found),
      h("section", { "aria-labelledby": "tokens-title" },
        h("h3", { id: "tokens-title" }, "Tokens"),
        this.legend(found),
        found.completion_tokens > found.tokens.length && h("p", { class: "quiet" },
          `The first ${count(found.tokens.length)} of ${count(found.completion_tokens)} are shown.`),
        h("div", { class: "tokens-and-detail" }, this.chips(found), this.detail)),
      this.expertsSection(found),
      this.layersSection(found),
      this.memorySection(found));
    // Where the model was least sure is the most interesting place to begin.
    const doubts = found.tokens.map((token) => token.logprob);
    this.select(doubts.indexOf(Math.min(...doubts)));
  }

  figures({ tokens, prompt_tokens: prompt }) {
    const mean = tokens.reduce((sum, token) => sum + token.logprob, 0) / Math.max(tokens.length, 1);
    const drafts = tokens.filter((token) => token.draft !== null);
    const accepted = drafts.filter((token) => token.accepted);
    const figure = (name, value, words) => h("div", { class: "figure" },
      h("dt", {}, name), h("dd", {}, value, words && h("span", { class: "quiet" }, words)));
    return h("dl", { class: "figures" },
      figure("Answer", count(tokens.length), " tokens"),
      figure("Prompt", count(prompt), " tokens"),
      figure("Typical probability", percent(mean), ` perplexity ${Math.exp(-mean).toFixed(2)}`),
      figure("Drafts accepted", drafts.length ? `${accepted.length}` : "none drafted",
        drafts.length ? ` of ${drafts.length}` : null));
  }

  // -- tokens ------------------------------------------------------------------------------------

  legend({ tokens }) {
    const sample = (kind, words) => h("span", {}, h("span", { class: `chip ${kind}` }, "ab"), words);
    return h("p", { class: "legend quiet" },
      h("span", {}, h("span", { class: "scale", "aria-hidden": "true" }), "likely to unlikely"),
      tokens.some((token) => token.draft !== null) && [
        sample("accepted", "drafted and accepted"), sample("rejected", "another token was drafted")]);
  }

  chips({ tokens }) {
    const chips = tokens.map((token, i) => {
      const state = token.draft === null ? "" : token.accepted ? " accepted" : " rejected";
      const words = token.draft === null ? "" : token.accepted ? ", drafted" : ", draft rejected";
      const chip = h("span", {
        class: `chip${state}`, role: "option", tabIndex: -1, "aria-selected": "false",
        "aria-label": `${visible(token.text)}, ${percent(token.logprob)}${words}`,
        onclick: () => this.select(i, true),
      }, token.text.replaceAll("\n", "↵\n"));
      chip.style.setProperty("--doubt", (1 - Math.exp(token.logprob)).toFixed(3));
      return chip;
    });
    this.chipList = chips;
    const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1,
      Home: -Infinity, End: Infinity, PageUp: -20, PageDown: 20 };
    return h("div", { class: "chips", role: "listbox", "aria-label": "Tokens of the answer",
      onkeydown: (event) => {
        if (!(event.key in keys)) return;
        event.preventDefault();
        const last = chips.length - 1;
        this.select(Math.min(Math.max(this.selected + keys[event.key], 0), last), true);
      } }, chips);
  }

  select(i, focus = false) {
    const { chipList, found } = this;
    if (!chipList.length) return;
    const old = chipList[this.selected];
    if (old) {
      old.ariaSelected = "false";
      old.tabIndex = -1;
    }
    this.selected = i;
    chipList[i].ariaSelected = "true";
    chipList[i].tabIndex = 0;
    if (focus) chipList[i].focus();
    this.describe(found.tokens[i], i);
    if (this.heat && this.mode === "token") this.drawToken();
  }

  describe(token, i) {
    const bar = ({ text, logprob }, chosen) => {
      const fillBar = h("span", { class: "bar" });
      fillBar.style.setProperty("--share", Math.exp(logprob).toFixed(4));
      return h("li", { class: chosen ? "chosen" : null },
        h("code", {}, visible(text)), fillBar, h("span", { class: "number" }, percent(logprob)));
    };
    const among = token.top.some((one) => one.id === token.id);
    const drafted = token.draft === null
      ? "The MTP head had drafted nothing here."
      : token.accepted
        ? "The MTP head had drafted this token; it was accepted."
        : ["The MTP head had drafted ", h("code", {}, visible(token.draft)), "; it was rejected."];
    fill(this.detail,
      h("h4", {}, h("code", {}, visible(token.text)),
        h("span", { class: "quiet" }, ` token ${i + 1}, id ${token.id}`)),
      h("ol", { class: "bars" },
        token.top.map((one) => bar(one, one.id === token.id)), !among && bar(token, true)),
      h("p", { class: "quiet" }, drafted));
  }

  // -- experts, layers, memory -------------------------------------------------------------------

  expertsSection({ num_experts: experts, routes, layers, experts_per_token: most }) {
    if (!routes.length || !experts) {
      return h("section", {}, h("h3", {}, "Experts"),
        h("p", { class: "quiet" }, "This model has no routed experts."));
    }
    const sparse = layers.map((layer, i) => ({ ...layer, i })).filter((layer) => layer.sparse);
    const where = h("p", { class: "quiet", id: "heat-text" });
    this.heat = new HeatMap({ rows: sparse, columns: experts, say: (text) => (where.textContent = text) });
    this.mode = "answer";
    const choice = (value, words) => {
      const input = h("input", { type: "radio", name: "heat", id: `heat-${value}`, value,
        checked: value === this.mode, onchange: () => this.draw(value) });
      return h("label", { htmlFor: input.id }, input, words);
    };
    const section = h("section", { "aria-labelledby": "experts-title" },
      h("div", { class: "title-row" },
        h("h3", { id: "experts-title" }, "Experts"),
        h("fieldset", { class: "choices" }, h("legend", { class: "unseen" }, "What to show"),
          choice("answer", "Whole answer"), choice("token", "Selected token"))),
      h("p", { class: "quiet" },
        `Every token runs through ${most} of ${experts} experts in each layer. ` +
        "Rows are layers, columns are experts."),
      this.heat.element, where, this.heat.table);
    requestAnimationFrame(() => this.draw(this.mode));
    return section;
  }

  draw(mode) {
    this.mode = mode;
    if (mode === "token") {
      this.drawToken();
      return;
    }
    const { routes, num_experts: experts } = this.found;
    const rows = routes[0].map(() => new Float32Array(experts));
    for (const token of routes) token.forEach((ids, row) => ids.forEach((id) => (rows[row][id] += 1)));
    this.heat.draw(rows, routes.length);
  }

  drawToken() {
    const { routes, num_experts: experts } = this.found;
    const rows = routes[0].map(() => new Float32Array(experts));
    routes[this.selected].forEach((ids, row) => ids.forEach((id, place) => (rows[row][id] = ids.length - place)));
    this.heat.draw(rows, this.found.experts_per_token, { ranks: true });
  }

  layersSection({ layers }) {
    const attention = layers.filter((layer) => layer.kind === "full_attention").length;
    const cell = (layer, i) => h("li", { class: layer.kind === "full_attention" ? "attention" : "delta",
      title: `Layer ${i + 1}: ${layer.kind === "full_attention" ? "attention" : "DeltaNet"}` },
    layer.kind === "full_attention" ? "A" : "D");
    return h("section", { "aria-labelledby": "layers-title" },
      h("h3", { id: "layers-title" }, "Layers"),
      h("p", { class: "quiet" },
        `${layers.length - attention} DeltaNet layers (D) carry a state of fixed size; ` +
        `${attention} attention layers (A) keep keys and values of every token.`),
      h("ol", { class: "layers" }, layers.map(cell)));
  }

  memorySection({ memory, prompt_tokens: prompt, tokens }) {
    const length = prompt + tokens.length;
    const kv = memory.kv_bytes_per_token * length;
    const all = kv + memory.state_bytes;
    const row = (kind, name, size, words) => {
      const bar = h("span", { class: `bar ${kind}` });
      bar.style.setProperty("--share", (size / all).toFixed(4));
      return h("li", {}, h("span", {}, name), bar, h("span", { class: "number" }, bytes(size)),
        h("span", { class: "quiet" }, words));
    };
    return h("section", { "aria-labelledby": "memory-title" },
      h("h3", { id: "memory-title" }, "Memory of this conversation"),
      h("ul", { class: "bars memory" },
        memory.kv_bytes_per_token > 0 && row("attention", "Keys and values", kv,
          `${bytes(memory.kv_bytes_per_token)} per token, ${count(length)} tokens`),
        memory.state_bytes > 0 && row("delta", "State", memory.state_bytes,
          "the same however long it gets")));
  }
}
