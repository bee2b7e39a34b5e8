"""One page of curves from a run's log: a single HTML file with its pictures inside."""

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qnext.errors import RequestError, TrainingError
from qnext.train.telemetry import read_log, scalars

INK, WARM, COOL = "#30343b", "#c8553d", "#2f6690"
COLOURS = (COOL, WARM, "#6b9080", "#b08968", "#7d5ba6", "#8d99ae", "#d9a441", "#4f772d", "#a44a6d",
           "#1b998b", "#e26d5c", "#577590", "#c9a227", "#3d348b")  # fmt: skip
_SMOOTH = 0.9
"""Of the bold line: how much of it each point keeps."""
_MARKED = ("suspicious", "skip", "roll back")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #30343b; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem; text-align: right;
  border-bottom: 1px solid #e4e6ea; } td:first-child, th:first-child { text-align: left; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem; }
img { width: 100%; } pre { background: #f5f6f8; padding: 1rem; overflow: auto; font-size: 13px; }
"""


def write_report(run: Path, target: Path | None = None) -> Path:
    """Draw the run's log; the page is RUN/report.html unless ``target`` says otherwise.

    A ``.png`` target gets the curves alone. Raises TrainingError without a log or without steps,
    RequestError without matplotlib or when the file cannot be written.
    """
    lines: list[Mapping[str, Any]] = list(read_log(run))
    steps = latest_steps(lines)
    if not steps:
        raise TrainingError(f"{run} has logged no step yet.")
    events = [line for line in lines if "event" in line]
    target = target or run / "report.html"
    try:
        if target.suffix == ".png":
            target.write_bytes(_picture(_panels(steps), events, steps))
        else:
            target.write_text(_page(run, steps, events), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{target} could not be written: {error.strerror}.") from error
    return target


def latest_steps(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One line per step: the last, where a roll-back did some twice."""
    by_step = {line["step"]: line for line in lines if "event" not in line}
    return [by_step[step] for step in sorted(by_step)]


# -- the page --------------------------------------------------------------------------------------


def _page(run: Path, steps: Sequence[Mapping[str, Any]], events: list[Mapping[str, Any]]) -> str:
    pictures = ""
    for panel in _panels(steps):
        image = base64.b64encode(_picture([panel], events, steps)).decode()
        pictures += f'<img alt="{html.escape(panel[0])}" src="data:image/png;base64,{image}">'
    title = f"Training run {run.resolve().name}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"{_summary(steps)}<h2>Curves</h2><div class=panels>{pictures}</div>"
        f"{_reports(events)}{_happenings(events)}{_recipe(run)}</html>"
    )


def _summary(steps: Sequence[Mapping[str, Any]]) -> str:
    """A table with a row per stage."""
    rows = []
    for name in dict.fromkeys(line["stage"] for line in steps):
        own = [line for line in steps if line["stage"] == name]
        last = own[-max(1, len(own) // 20) :]
        rows.append(
            [
                name,
                f"{len(own):,}",
                f"{own[-1]['tokens']:,}",
                f"{_mean(last, 'loss'):.4f}",
                *(f"{_mean(last, key):.1%}" if key in own[-1] else "" for key in _HITS),
                f"{_mean(own, 'tokens_per_second'):,.0f}",
                f"{_mean(own, 'mfu'):.1%}",
            ]
        )
    head = ["stage", "steps", "tokens so far", "loss (last 5 %)", "right first guess",
            "MTP right", "tokens / s", "MFU"]  # fmt: skip
    return _table(head, rows)


_HITS = ("hit_main", "hit_mtp_1")


def _reports(events: list[Mapping[str, Any]]) -> str:
    found = [e for e in events if e["event"] == "report"]
    if not found:
        return ""
    rows = [
        [f"{e['stage']}, {e['when']}", name, f"{value:.4g}"]
        for e in found
        for name, value in e["figures"].items()
    ]
    return f"<h2>Measured around stages</h2>{_table(['when', 'what', 'value'], rows)}"


def _happenings(events: list[Mapping[str, Any]]) -> str:
    told = [e for e in events if e["event"] not in ("start", "stage", "report")]
    rows = [
        [e["event"], str(e["step"]),
         ", ".join(f"{k}: {v}" for k, v in e.items() if k not in ("event", "step"))]
        for e in told
    ]  # fmt: skip
    return f"<h2>What happened</h2>{_table(['event', 'step', 'details'], rows)}" if rows else ""


def _recipe(run: Path) -> str:
    file = run / "recipe.json"
    if not file.is_file():
        return ""
    text = json.dumps(json.loads(file.read_text(encoding="utf-8")), indent=1)
    return f"<h2>Recipe</h2><details><summary>as it ran</summary><pre>{html.escape(text)}</pre></details>"  # noqa: E501


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rest = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{first}</tr>{rest}</table>"


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [line[key] for line in lines if isinstance(line.get(key), (int, float))]
    return sum(values) / max(1, len(values))


# -- the curves ------------------------------------------------------------------------------------

Panel = tuple[str, dict[str, list[tuple[int, float]]], bool]
"""Title, curves by name, and whether the axis is logarithmic."""


def _panels(steps: Sequence[Mapping[str, Any]]) -> list[Panel]:
    series: dict[str, list[tuple[int, float]]] = {}
    for line in steps:
        for name, value in scalars(line):
            series.setdefault(name, []).append((line["step"], value))

    def chosen(wanted: Callable[[str], bool], cut: str = "") -> dict[str, list[tuple[int, float]]]:
        return {n.removeprefix(cut): s for n, s in series.items() if wanted(n)}

    def below(prefix: str) -> dict[str, list[tuple[int, float]]]:
        return chosen(lambda n: n.startswith(prefix), prefix)

    panels: list[Panel] = [
        ("Next-token and MTP losses", chosen(lambda n: n == "loss" or n.startswith("mtp_")), False),
        ("Right first guesses", below("hit_"), False),
        ("Learning rate", chosen(lambda n: n == "rate"), False),
        ("Gradient norm by group", {**chosen(lambda n: n == "grad_norm"), **below("grad_norms/")},
         True),
        ("Expert balance (1 is even)", chosen(lambda n: n == "balance"), False),
        ("Largest load of an expert over the mean, by router", below("router_load_max/"), False),
        ("Entropy of the load and per token",
         {**chosen(lambda n: n.startswith(("router_load_entropy/", "router_entropy/")))}, False),
        ("Dead experts by router", below("dead_experts/"), False),
        ("Largest activation by layer", below("probe/activation_max/"), True),
        ("Attention to the first token, by attention layer", below("probe/first_token_mass/"),
         False),
        ("Mean openness of output gates", below("probe/gate_open/"), False),
        ("Decay and write strength of delta layers",
         chosen(lambda n: n.startswith(("probe/delta_keep/", "probe/delta_write/")), "probe/"),
         False),
        ("Change of the weights per step, relative", below("update_ratio/"), True),
        ("Tokens per second", chosen(lambda n: n == "tokens_per_second"), False),
        ("Model-FLOPs utilisation", chosen(lambda n: n == "mfu"), False),
        ("Memory in use, GB",
         {"resident": [(s, v / 1e9) for s, v in series.get("resident_bytes", [])]}, False),
    ]  # fmt: skip
    return [panel for panel in panels if any(panel[1].values())]


def _picture(
    panels: Sequence[Panel],
    events: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
) -> bytes:
    """The panels as one PNG, borders of stages and what the guard saw marked."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RequestError(
            "qnext train report needs the package matplotlib, which is not installed. Install it "
            "with pip install 'qnext[train]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6.4 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    borders = [e["step"] for e in events if e["event"] == "stage"][1:]
    marks = [e["step"] for e in events if e["event"] in _MARKED]
    for axis, (title, curves, logarithmic) in zip(axes.flat, panels, strict=False):
        _draw(axis, curves)
        for at in borders:
            axis.axvline(at + 0.5, color=INK, linewidth=0.8, linestyle=":")
        for at in marks:
            axis.axvline(at, color=WARM, linewidth=0.6, alpha=0.5)
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlim(steps[0]["step"], max(steps[-1]["step"], steps[0]["step"] + 1))
        if logarithmic and any(v > 0 for curve in curves.values() for _, v in curve):
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=7, ncols=2 if len(curves) > 6 else 1)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    pyplot.close(figure)
    # A palette of 256 colours: a quarter of the bytes, and the eye sees no difference.
    Image.open(drawn).convert("RGB").quantize(256).save(out, format="PNG", optimize=True)
    return out.getvalue()


def _draw(axis: Any, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Few points as they are; many as a pale line with a smoothed one over it."""
    for number, (name, points) in enumerate(sorted(curves.items())):
        colour = COLOURS[number % len(COLOURS)]
        x, y = [at for at, _ in points], [value for _, value in points]
        if len(points) < 100 or len(curves) > 4:
            axis.plot(x, y, color=colour, linewidth=1.2, label=name)
            continue
        axis.plot(x, y, color=colour, linewidth=0.5, alpha=0.35)
        smooth, mean = [], y[0]
        for value in y:
            mean = _SMOOTH * mean + (1 - _SMOOTH) * value
            smooth.append(mean)
        axis.plot(x, smooth, color=colour, linewidth=1.5, label=name)
