// The server at work, from GET /metrics: how much it does now, and how well its caches do.

import { metrics } from "./api.js";
import { bytes, count, fill, h, svg } from "./dom.js";

const EVERY_MS = 1500;
const KEPT = 80;

export class Dashboard {
  constructor(element) {
    this.element = element;
    this.history = [];
    this.timer = null;
  }

  /** Starts or stops watching. */
  set(active) {
    clearTimeout(this.timer);
    this.request?.abort();
    if (!active) return;
    if (!this.cards) this.build();
    this.look();
  }

  build() {
    this.cards = h("div", { class: "cards" });
    this.status = h("p", { class: "quiet", role: "status" });
    fill(this.element, h("div", { class: "column" },
      h("div", { class: "title-row" }, h("h2", {}, "Dashboard"), this.status), this.cards));
  }

  async look() {
    this.request = new AbortController();
    const { signal } = this.request;
    try {
      const found = await metrics(signal);
      if (signal.aborted) return;
      this.show(found);
    } catch (error) {
      if (signal.aborted) return;
      this.status.textContent = error.message;
    }
    this.timer = setTimeout(() => this.look(), EVERY_MS);
  }

  show(found) {
    const now = performance.now();
    const sum = (name, labels = {}) => (found.get(name) ?? [])
      .filter((one) => Object.entries(labels).every(([key, value]) => one.labels[key] === value))
      .reduce((total, one) => total + one.value, 0);
    const last = this.history.at(-1);
    const generated = sum("qnext_generated_tokens_total");
    const rate = last ? Math.max(generated - last.generated, 0) / ((now - last.now) / 1000) : 0;
    this.history.push({ now, generated, rate, running: sum("qnext_running_requests"),
      waiting: sum("qnext_waiting_requests") });
    if (this.history.length > KEPT) this.history.shift();
    const { running, waiting } = this.history.at(-1);
    const prompt = sum("qnext_prompt_tokens_total");
    const cached = sum("qnext_prompt_tokens_total", { fate: "cached" });
    const drafted = sum("qnext_tokens_total", { kind: "drafted" });
    const accepted = sum("qnext_tokens_total", { kind: "accepted" });
    const first = sum("qnext_first_token_seconds_count");
    const pages = sum("qnext_cache_pages");
    const used = pages - sum("qnext_cache_pages_free");
    const about = found.get("qnext_model_info")?.[0]?.labels ?? {};
    fill(this.cards,
      this.card("Throughput", count(Math.round(rate)), "tokens per second",
        this.line((one) => one.rate), `${count(generated)} tokens since the start`),
      this.card("Requests", `${running}`, `running, ${waiting} waiting`,
        this.line((one) => one.running + one.waiting), `${sum("qnext_slots")} can run at once`),
      this.card("First token", first ? `${(1000 * sum("qnext_first_token_seconds_sum") / first).toFixed(0)}` : "–",
        "ms on average", null, `${count(first)} answers`),
      this.card("Prefix cache", share(cached, prompt), "of prompt tokens reused", meter(cached, prompt),
        `${count(cached)} of ${count(prompt)} tokens; ${sum("qnext_snapshots")} of ` +
        `${sum("qnext_snapshot_slots")} snapshots held`),
      this.card("Drafts", share(accepted, drafted), "accepted", meter(accepted, drafted),
        drafted ? `${count(accepted)} of ${count(drafted)} tokens` : "nothing drafted yet"),
      this.card("Memory", bytes(sum("process_resident_memory_bytes")), "held by the server",
        meter(used, pages), `${count(used)} of ${count(pages)} cache pages in use`),
      h("section", { class: "card about" }, h("h3", {}, about.model ?? "Model"),
        h("ul", { class: "quiet" }, (about.kernels ?? "").split("; ").map((line) => h("li", {}, line)))));
    this.status.textContent = sum("qnext_up") ? "The engine is working." : "The engine has ended.";
  }

  card(name, value, unit, drawing, words) {
    return h("section", { class: "card" }, h("h3", {}, name),
      h("p", { class: "big" }, value, h("span", { class: "quiet" }, ` ${unit}`)),
      drawing, h("p", { class: "quiet" }, words));
  }

  /** What was seen lately, as a line. */
  line(of) {
    const values = this.history.map(of);
    const top = Math.max(...values, 1);
    const at = (value, i) =>
      `${(i * 200) / Math.max(values.length - 1, 1)},${39 - (value / top) * 36}`;
    const points = values.map(at).join(" ");
    return svg("svg", { viewBox: "0 0 200 40", preserveAspectRatio: "none", class: "line",
      "aria-hidden": "true" },
    svg("polyline", { points, "vector-effect": "non-scaling-stroke" }));
  }
}

const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(0)} %` : "–");

function meter(part, whole) {
  const bar = h("span", { class: "bar" });
  bar.style.setProperty("--share", whole ? (part / whole).toFixed(4) : "0");
  return h("div", { class: "meter", "aria-hidden": "true" }, bar);
}
