"""Pictures of an evaluation: accuracy against thinking budget, and the grid of needles."""

from pathlib import Path
from typing import Any

from qnext.errors import DataError


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures the record has results for; returns them. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise DataError(
            "--plots needs matplotlib. Install it: pip install 'qnext[train]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    results = record["results"]
    if "budget" in results:
        points = [p for p in results["budget"]["points"] if p["budget"] is not None]
        figure, axes = pyplot.subplots(figsize=(6, 4))
        budgets = [p["budget"] for p in points]
        shares = [p["share"] for p in points]
        below = [s - p["interval"][0] for s, p in zip(shares, points, strict=True)]
        above = [p["interval"][1] - s for s, p in zip(shares, points, strict=True)]
        axes.errorbar(range(len(points)), shares, yerr=[below, above], marker="o", capsize=3)
        axes.set_xticks(range(len(points)), [str(b) for b in budgets])
        axes.set(xlabel="thinking budget, tokens", ylabel="accuracy", ylim=(0, 1))
        axes.set_title(f"{results['budget']['items']} questions never trained on")
        made.append(_save(figure, folder / "thinking_budget.png"))
    if "needles" in results:
        rows, labels = [], []
        for kind in ("plain", "yarn"):
            for length, cells in results["needles"][kind]["lengths"].items():
                rows.append([share for depth, share in cells.items() if depth != "all"])
                labels.append(f"{length}{' (YaRN)' if kind == 'yarn' else ''}")
        figure, axes = pyplot.subplots(figsize=(7, 0.6 * len(rows) + 1.6))
        image = axes.imshow(rows, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xticks(range(len(rows[0])), [f"{n * 10}" for n in range(len(rows[0]))])
        axes.set(xlabel="depth of the needle, %", ylabel="tokens")
        figure.colorbar(image, label="retrieved")
        made.append(_save(figure, folder / "needles.png"))
    pyplot.close("all")
    return made


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
