"""The picture of a replay: queue, latencies and throughput over time."""

from pathlib import Path

import numpy as np

from benchmarks.replay import Replay

INK, WARM, COOL = "#30343b", "#c8553d", "#2f6690"


def draw(replay: Replay, path: Path, *, title: str, slo_ttft_s: float, slo_tpot_s: float) -> None:
    """Write a PNG (or what the suffix says) of four panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [one for one in replay.outcomes if one.completed]
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title, color=INK)

    queue = panels[0, 0]
    times = [look.at_s for look in replay.looks]
    queue.step(times, [look.running for look in replay.looks], COOL, where="post", label="running")
    queue.step(times, [look.waiting for look in replay.looks], WARM, where="post", label="waiting")
    queue.set(title="Requests in the engine", xlabel="s since the start", ylabel="requests")

    first = panels[0, 1]
    first.scatter([one.due_s for one in done], [one.ttft_s for one in done], s=9, color=COOL,
                  label="request")  # fmt: skip
    first.axhline(slo_ttft_s, color=WARM, linewidth=1, label=f"goal {slo_ttft_s:g} s")
    first.set(title="Time to first token", xlabel="s, when it was due", ylabel="s", yscale="log")

    each = panels[1, 0]
    per_token = sorted(1000 * one.tpot_s for one in done if one.tpot_s is not None)
    if per_token:
        share = np.arange(1, len(per_token) + 1) / len(per_token)
        each.step(per_token, share, COOL, where="post", label="requests")
    each.axvline(1000 * slo_tpot_s, color=WARM, linewidth=1, label=f"goal {1000 * slo_tpot_s:g} ms")
    each.set(title="Time per output token", xlabel="ms, at most", ylabel="share of requests",
             ylim=(0, 1.02))  # fmt: skip

    rate = panels[1, 1]
    bins = np.linspace(0, max(replay.seconds, 1e-6), 61)
    width = bins[1] - bins[0]
    produced = np.zeros(60)
    for one in done:
        # An answer's tokens are spread evenly over the pieces it arrived in.
        counts, _ = np.histogram(one.pieces_s, bins)
        produced += counts * one.completion_tokens / max(len(one.pieces_s), 1)
    rate.stairs(produced / width, bins, color=COOL, label="output tokens")
    rate.set(title="Throughput", xlabel="s since the start", ylabel="tokens / s")

    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
