"""Pictures of measurements: speed against context length, and the roofline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qnext.errors import RequestError

INK, WARM, COOL = "#30343b", "#c8553d", "#2f6690"
OTHERS = (WARM, "#6b9080", "#b08968", "#7d5ba6", "#8d99ae")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a picture of two panels; the suffix says the kind. RequestError without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RequestError(
            "--plot needs the package matplotlib, which is not installed. Install it with "
            "pip install 'qnext[train]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    figure.suptitle(
        f"{report['model']}, {report['format']}, {report['isa']}, {report['threads']} threads",
        color=INK,
    )
    _speed(left, report)
    _roofline(right, report)
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RequestError(f"--plot {path}: the picture could not be written ({error}).") from error
    finally:
        pyplot.close(figure)


def _speed(panel: Any, report: Mapping[str, Any]) -> None:
    """Tokens per second against context; of other measurements, one point per case."""
    rows: Sequence[Mapping[str, Any]] = report["cases"]
    # A line over the context joins cases of one kind only.
    alike = [row for row in rows if row["kind"] == rows[0]["kind"]]
    over_context = len({row["context"] for row in alike}) > 1
    rows = alike if over_context else rows
    x = [row["context"] for row in rows] if over_context else list(range(len(rows)))
    _line(panel, x, [row["tokens_per_second"] for row in rows], COOL, "qnext")
    names = dict.fromkeys(other["name"] for row in rows for other in row["against"])
    for name, colour in zip(names, OTHERS, strict=False):
        points = [
            (at, other["tokens_per_second"])
            for at, row in zip(x, rows, strict=True)
            for other in row["against"]
            if other["name"] == name
        ]
        _line(panel, [at for at, _ in points], [y for _, y in points], colour, name)
    panel.set(title="Speed", ylabel="tokens / s")
    panel.set_ylim(bottom=0)
    if over_context:
        panel.set(xlabel="tokens of context", xscale="symlog")
        panel.set_xlim(left=0)
    else:
        panel.set_xticks(x, [row["case"] for row in rows], rotation=30, ha="right", fontsize=7)


def _line(
    panel: Any, x: Sequence[float], spreads: Sequence[Mapping[str, float]], colour: str, label: str
) -> None:
    middle = [one["median"] for one in spreads]
    below = [one["median"] - one["low"] for one in spreads]
    above = [one["high"] - one["median"] for one in spreads]
    panel.errorbar(x, middle, (below, above), color=colour, marker="o", capsize=3, label=label)


def _roofline(panel: Any, report: Mapping[str, Any]) -> None:
    """Operations per second against operations per byte, under what the machine allows."""
    machine = report["machine"]
    bandwidth = machine["read_gigabytes_per_second"]["median"]
    points = []
    for row in report["cases"]:
        if row["gigabytes_per_second"] > 0:
            intensity = row["gigaoperations_per_second"] / row["gigabytes_per_second"]
            points.append((intensity, row["gigaoperations_per_second"], row["case"]))
    low = min([0.25, *(x / 2 for x, _, _ in points)])
    high = max([1000.0, *(2 * x for x, _, _ in points)])
    for name, key, style in (("int8", "int8", "-"), ("bf16", "bf16", "--")):
        peak = machine[f"{key}_gigaoperations_per_second"]["median"]
        knee = peak / bandwidth
        panel.plot([low, knee, high], [low * bandwidth, peak, peak], style, color=INK,
                   linewidth=1, label=f"{bandwidth:.0f} GB/s, {name} {peak:.0f} GOP/s")  # fmt: skip
    panel.scatter([x for x, _, _ in points], [y for _, y, _ in points], s=22, color=COOL, zorder=3)
    if len(points) <= 12:
        for x, y, name in points:
            panel.annotate(name, (x, y), fontsize=7, xytext=(4, -9), textcoords="offset points")
    panel.set(title="Roofline", xlabel="operations / byte", ylabel="10$^9$ operations / s",
              xscale="log", yscale="log")  # fmt: skip
