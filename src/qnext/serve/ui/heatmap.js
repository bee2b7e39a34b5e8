// A grid of layers and experts, drawn on a canvas: 48 layers of 512 experts are 24,576 cells. The
// same numbers are in a table for those who do not see it.

import { h } from "./dom.js";

const LABELS = 34;
const TALLEST = 22;

export class HeatMap {
  /** `rows` are layers {i, kind}; `say` shows a sentence about the cell under the pointer. */
  constructor({ rows, columns, say }) {
    this.rows = rows;
    this.columns = columns;
    this.say = say;
    this.canvas = h("canvas", { class: "heat", role: "img", "aria-label": "Experts by layer",
      onpointermove: (event) => this.point(event), onpointerleave: () => this.say(this.hint) });
    this.element = h("div", { class: "heat-frame" }, this.canvas);
    this.body = h("tbody");
    this.table = h("details", { class: "heat-table" }, h("summary", {}, "As a table"),
      h("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Experts by layer" },
        h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Layer"),
          h("th", { scope: "col" }, "Kind"), h("th", { scope: "col" }, "Experts, most used first"))),
        this.body)));
    this.observer = new ResizeObserver(() => this.paint());
    this.observer.observe(this.element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    this.themes = new MutationObserver(() => this.paint());
    this.themes.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  }

  /** Shows values [layer][expert] of at most `most`. */
  draw(values, most, { ranks = false } = {}) {
    this.values = values;
    this.most = Math.max(...values.map((row) => Math.max(...row)), 1);
    this.total = most;
    this.ranks = ranks;
    this.hint = ranks ? "The strongest colour had the largest weight." : "The stronger the colour, the more tokens ran there.";
    this.say(this.hint);
    this.fillTable();
    this.paint();
  }

  kind(row) {
    return this.rows[row].kind === "full_attention" ? "attention" : "DeltaNet";
  }

  fillTable() {
    this.body.replaceChildren(...this.values.map((row, r) => {
      const used = [...row.entries()].filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]);
      const text = used.slice(0, 12).map(([id, value]) => (this.ranks ? `${id}` : `${id} (${value})`));
      const more = used.length > 12 ? `, and ${used.length - 12} more` : "";
      return h("tr", {}, h("th", { scope: "row" }, `${this.rows[r].i + 1}`),
        h("td", {}, this.kind(r)), h("td", {}, text.join(", ") + more));
    }));
  }

  paint() {
    const width = this.element.clientWidth;
    if (!this.values || width <= LABELS) return;
    const tall = Math.max(6, Math.min(TALLEST, 420 / this.rows.length));
    const height = Math.round(tall * this.rows.length);
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(this.element);
    const colour = (name) => style.getPropertyValue(name).trim();
    const empty = colour("--cell");
    this.wide = (width - LABELS) / this.columns;
    this.tall = tall;
    const gap = this.wide > 5 ? 1 : 0;
    context.font = `11px ${style.fontFamily}`;
    context.textBaseline = "middle";
    this.values.forEach((row, r) => {
      const isAttention = this.rows[r].kind === "full_attention";
      const ink = colour(isAttention ? "--attention" : "--delta");
      const y = r * tall;
      context.globalAlpha = 1;
      if (tall >= 11) {
        context.fillStyle = ink;
        context.fillText(`${isAttention ? "A" : "D"} ${this.rows[r].i + 1}`, 0, y + tall / 2);
      } else {
        context.fillStyle = ink;
        context.fillRect(LABELS - 10, y, 5, tall - 1);
      }
      row.forEach((value, e) => {
        const x = LABELS + e * this.wide;
        context.globalAlpha = 1;
        context.fillStyle = empty;
        context.fillRect(x, y, Math.max(this.wide - gap, 0.5), tall - 1);
        if (!value) return;
        context.globalAlpha = 0.18 + 0.82 * (value / this.most);
        context.fillStyle = ink;
        context.fillRect(x, y, Math.max(this.wide - gap, 0.5), tall - 1);
      });
    });
  }

  point(event) {
    const row = Math.floor(event.offsetY / this.tall);
    const expert = Math.floor((event.offsetX - LABELS) / this.wide);
    const value = this.values?.[row]?.[expert];
    if (value === undefined || expert < 0) {
      this.say(this.hint);
      return;
    }
    const what = this.ranks ? (value ? "ran for this token" : "did not run")
      : `ran for ${value} of ${this.total} tokens`;
    this.say(`Layer ${this.rows[row].i + 1} (${this.kind(row)}), expert ${expert}: ${what}.`);
  }
}
